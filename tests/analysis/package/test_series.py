"""Which points are one curve, and that nothing is dropped without a line on stderr."""

import itertools
import os
import pathlib
import shlex
import subprocess
import sys

import h5py
import nsa_analysis
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.data import series
from nsa_analysis.errors import LeftOut

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "docs/results"
TABLES = ("points", "scaling", "branches", "reads", "ranks", "roofline", "model", "kernels")


def two(folder, **other):
    """Points of two files that differ in these parameters."""
    table = synthetic.times(1, 8, 1e-4, attend_cmp=1e-5)
    paths = [synthetic.write(folder / f"{i}.h5", [synthetic.point(table, **p)]) for i, p in enumerate(({}, other))]
    return nsa_analysis.read(paths)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parallel_kv_chunk_blocks", 64),
        ("run_seed", 2),
        ("run_steps", 64),
        ("runtime_fa2_min_len_win", 1024),
        ("input_file", "x.h5"),
        ("model_rope_base", 5e5),
        ("route_sel", "sdpa"),
        ("made_up_key", 1),
    ],
)
def test_every_parameter_that_is_not_listed_counts(tmp_path, name, value):
    points = two(tmp_path, **{name: value})
    assert len(series.split(points)) == 2 and len(series.latest(points)[0]) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run_deadline", 60.0),
        ("run_min_time", 1.0),
        ("run_modes", "total"),
        ("run_check", 0),
        ("run_warmup", 9),
        ("parallel_heads", 1),
        ("output_file", "other.h5"),
        ("kernels_cold", 0),  # of a decode
        ("needle_depths", "0.5"),
    ],
)
def test_how_it_was_measured_does_not_split_a_curve(tmp_path, name, value):
    points = two(tmp_path, **{name: value})
    assert len(series.split(points)) == 1
    kept, lines = series.latest(points)
    assert [p.run.path for p in kept] == [points[1].run.path] and len(lines) == 1 and points[0].run.path in lines[0]


def test_a_route_of_the_environment_splits(tmp_path):
    points = two(tmp_path)
    with h5py.File(points[1].run.path, "r+") as file:
        file["points/0000"].attrs["route_reasons"] = ["", "asked for by NSA_ROUTE_SEL", ""]
    points = nsa_analysis.read(tmp_path)
    assert series.differences(series.split(points)) == {"NSA_ROUTE_SEL": ["-", "fused"]}


def test_warm_and_cold_kernels_are_two_series(tmp_path):
    for name, cold in (("cold", 1), ("warm", 0)):
        parameters = {"kernels_branch": "sel", "kernels_cold": cold, "kernels_rows": 256}
        synthetic.write(tmp_path / f"{name}.h5", [synthetic.kernel_point({"fused": 1e-6}, **parameters)])
    assert nsa_analysis.kernels(nsa_analysis.read(tmp_path)).series.nunique() == 2


def test_chunks_of_64_blocks_are_a_series_of_their_own():
    """On four H200s kv = 4 takes 12.4 ms with chunks of 16 blocks and 12.2 with 64; neither replaces the other."""
    files = [RESULTS / f"h200/scaling_gpu_prefill_{name}.h5" for name in ("r4_h1_kv4", "r4_h1_kv4_chunk64")]
    files += [RESULTS / f"h200/scaling_gpu_prefill_{name}.h5" for name in ("r2_h1_kv2", "r2_h1_kv2_chunk64")]
    for order in itertools.permutations(files):
        groups = series.split(nsa_analysis.read(order))
        assert sorted(len(g) for g in groups) == [4, 4]
        for group in groups:
            chunk = group[0]["parallel.kv_chunk_blocks"]
            assert {p["parallel.kv_chunk_blocks"] for p in group} == {chunk}
            frame = nsa_analysis.scaling(group, "strong")
            at = frame[(frame.stage == "step") & (frame.context == 65536)].set_index("layout").time
            assert at["1x2"] == pytest.approx(16.0e-3 if chunk == 16 else 14.4e-3, rel=0.01)


@pytest.mark.parametrize(("kind", "chunks"), [("prefill", (16, 64)), ("decode", (16, 16))])
def test_chunks_that_the_input_leaves_open_split_no_curve(tmp_path, kind, chunks):
    """`auto` chunks grow with the context of a prefill; a decode with 16 as the default is as one that says 16."""
    table = synthetic.times(1, 8, 1e-4)
    for name, text in ("auto", '"auto"'), ("said", "16"):
        points = [
            synthetic.point(table, task_kind=kind, run_context=context, parallel_kv_chunk_blocks=chunk)
            for context, chunk in zip((16384, 65536), chunks if name == "auto" else (16, 16))
        ]
        synthetic.write(tmp_path / f"{name}.h5", points)
        with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
            file.attrs["config"] = f"[parallel]\nkv_chunk_blocks = {text}\n"
    groups = series.split(nsa_analysis.read(tmp_path))
    assert [len(g) for g in groups] == ([2, 2] if kind == "prefill" else [4])


def test_the_later_run_counts_in_any_order_and_the_other_is_named(tmp_path, capsys):
    table = synthetic.times(1, 8, 1e-4)
    for name, start in (("a", 3), ("b", 1), ("c", 2)):
        synthetic.write(tmp_path / f"{name}.h5", [synthetic.point(table)], start=f"2026-0{start}-01T00:00:00Z")
    files = [str(tmp_path / f"{name}.h5") for name in "abc"]
    for order in itertools.permutations(files):
        assert main(["scaling", *order, "--csv", "-"]) == 0
        said = capsys.readouterr()
        assert files[0] in said.out and files[1] not in said.out and files[2] not in said.out
        assert said.err.count("measured the same point") == 2
        assert f"{files[1]} and {files[2]}" in said.err and f"{files[2]} and {files[0]}" in said.err


def test_points_that_a_table_does_not_hold_are_named(tmp_path, capsys):
    synthetic.sweep(tmp_path, layouts=[(1, 1), (2, 1)])
    synthetic.write(tmp_path / "k.h5", [synthetic.kernel_point({"fused": 1e-6}, kernels_branch="sel")])
    for command in ("scaling", "branches", "reads", "ranks", "roofline"):
        assert main([command, str(tmp_path)]) == 0
        said = capsys.readouterr().err
        assert "nsa-analysis: note: 1 of 3 points are left out" in said and "k.h5" in said, command
    with pytest.warns(LeftOut, match="1 of 3 points are left out, never timed as a step"):
        nsa_analysis.scaling(nsa_analysis.read(tmp_path))


@pytest.mark.parametrize("command", TABLES)
def test_every_table_takes_a_folder_of_several_series(tmp_path, capsys, command):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        layouts = [(1, 1), (2, 1), (1, 2), (2, 2)]
        synthetic.sweep(tmp_path / name, layouts=layouts, contexts=(65536, 131072), device=f"GPU {name}")
    parameters = {f"kernels_{key}": 4 for key in ("rows", "heads", "head_size", "blocks")}
    kernel = synthetic.kernel_point({"fused": 1e-6}, kernels_branch="sel", kernels_spans="mixed", **parameters)
    synthetic.write(tmp_path / "k.h5", [kernel], device="GPU one")
    assert main([command, str(tmp_path), "--csv", "-"]) == 0
    table = capsys.readouterr().out
    assert "GPU one" in table and ("GPU two" in table or command == "kernels")
    assert main([command, str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("condition", "count"),
    [
        ("context=64K", 1),
        ("run.context=64k,128K", 2),
        ("context=1M", 1),
        ("run.context=65536.0", 1),
        ("context=*", 3),
        ("model.shared_kv=false", 3),
        ("ranks=1", 3),
        ("kernels.cold=true", 0),
    ],
)
def test_where_takes_numbers_as_they_are_written(tmp_path, condition, count):
    table = synthetic.times(1, 8, 1e-4)
    contexts = (65536, 131072, 1048576)
    points = [synthetic.point(table, run_context=context, kernels_cold=0) for context in contexts]
    points = nsa_analysis.read(synthetic.write(tmp_path / "a.h5", points))
    if count:
        assert len(series.where(points, [condition])) == count
    else:
        with pytest.raises(nsa_analysis.AnalysisError, match="here kernels.cold is 0"):
            series.where(points, [condition])


def test_titles_tell_series_apart(tmp_path):
    table = synthetic.times(1, 8, 1e-4)
    for i, (w, seed, n) in enumerate(itertools.product((256, 512), (1, 2), (8, 16))):
        point = synthetic.point(table, nsa_w=w, run_seed=seed, nsa_n_sel=n, input_file=f"{i}", run_fill=f"f{i % 2}")
        synthetic.write(tmp_path / f"{i}.h5", [point])
    assert len(set(series.titles(series.split(nsa_analysis.read(tmp_path))))) == 8


def piped(tmp_path, shell):
    """Exit code of the command and stderr, of a shell line that runs $NSA_ANALYSIS."""
    program = f"{shlex.quote(sys.executable)} -m nsa_analysis"
    environment = os.environ | {"PROGRAM": program}
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=tmp_path, env=environment)


def test_a_closed_pipe_is_no_error_and_a_full_disk_is(tmp_path):
    table = synthetic.times(1, 8, 1e-4)
    synthetic.write(tmp_path / "a.h5", [synthetic.point(table)])
    done = piped(tmp_path, "$PROGRAM points a.h5 | true; exit ${PIPESTATUS[0]}")  # true reads nothing
    assert done.returncode == 0 and done.stderr == ""
    done = piped(tmp_path, "$PROGRAM points a.h5 --csv - > /dev/full")
    assert done.returncode == 6 and "standard output: No space left" in done.stderr and done.stderr.count("\n") == 1
