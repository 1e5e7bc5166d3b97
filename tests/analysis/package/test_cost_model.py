"""The cost model: modelled bytes equal those of the program, coefficients are recovered, predictions by hand."""

import dataclasses
import math
import os
import pathlib
import subprocess
import types

import nsa_analysis
import numpy as np
import pytest
import synthetic
from nsa_analysis.data.reading import STAGES
from nsa_analysis.errors import AnalysisError
from nsa_analysis.figures import plots, style
from nsa_analysis.models import cost_model, prediction, traffic

ROOT = pathlib.Path(__file__).resolve().parents[3]
NETWORK = nsa_analysis.Network("a network", latency=10e-6, bandwidth=1e9, node=4)


DECODE_FILES = sorted((ROOT / "docs/results/h200").glob("scaling_gpu_decode_r*.h5"))


@pytest.mark.parametrize("file", DECODE_FILES, ids=lambda f: f.stem)
def test_bytes_are_those_the_program_stored(file):
    for point in nsa_analysis.read(file):
        assert traffic.modelled_bytes(traffic.shape_of(point)) == dict(zip(STAGES, point.bytes[:, 0].tolist()))


@pytest.mark.parametrize("key, value", [("batch.context", "64,300"), ("batch.distribution", "zipf")])
def test_a_ragged_batch_has_no_shape(key, value):
    parameters = synthetic.PARAMETERS | {"heads": 1, "kv": 1, "batch.context": "", "batch.distribution": "equal"}
    assert traffic.shape_of(types.SimpleNamespace(kind="decode", parameters=parameters))
    assert traffic.shape_of(types.SimpleNamespace(kind="decode", parameters=parameters | {key: value})) is None


PREFIX = """task.kind = "prefill"
model = { dim = 32, n_heads = 4, n_kv_groups = 2, d_k = 16, d_v = 16 }
nsa = { l = 8, d = 4, l_sel = 16, n_sel = 5, w = 24 }
run = { backend = "host", context = [60, 101], prefix = 77, prefill_chunk = 23, steps = 1, warmup = 0, check = false }
parallel = { heads = 1, kv_chunk_blocks = 1 }
"""


def run_program(folder, ranks, *options):
    """The points of in.toml, run with these options of `nsa run`."""
    mpirun = [os.environ.get("MPIEXEC", "mpirun"), "--oversubscribe", "--allow-run-as-root", "-n", str(ranks)]
    name = f"r{len(list(folder.iterdir()))}.h5"
    command = [*(mpirun if ranks > 1 else []), os.environ["NSA"], "run", "in.toml", "--output", name, *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return nsa_analysis.read(folder / name)


@pytest.mark.skipif("NSA" not in os.environ, reason="NSA does not name the program")
@pytest.mark.parametrize("ranks", (1, 2))
def test_bytes_of_chunks_onto_a_prefix_are_those_the_program_stored(tmp_path, ranks):
    (tmp_path / "in.toml").write_text(PREFIX)
    for point in run_program(tmp_path, ranks):
        assert traffic.modelled_bytes(traffic.shape_of(point)) == dict(zip(STAGES, point.bytes[:, 0].tolist()))


@pytest.mark.skipif("NSA" not in os.environ, reason="NSA does not name the program")
@pytest.mark.parametrize("kind", ("prefill", "decode"))
@pytest.mark.parametrize("ranks", (1, 2))
def test_a_replayed_point_ranks_nothing(tmp_path, kind, ranks):
    """No bytes and FLOPs of rank, no candidates; all else as in the run that ranked, and as the program stored it."""
    (tmp_path / "in.toml").write_text(PREFIX.replace(" prefix = 77, prefill_chunk = 23,", ""))
    (recorded,) = run_program(tmp_path, 1, "--record-selection", "--set", "run.context=200")
    lists = f'input.selection="{recorded.run.path}"'
    sizes = ("--set", f'task.kind="{kind}"', "--set", f"run.context={200 if kind == 'prefill' else 190}", "--set",
             "run.steps=3")  # fmt: skip
    (ranked,) = run_program(tmp_path, ranks, *sizes)
    (replayed,) = run_program(tmp_path, ranks, *sizes, "--set", lists)
    shapes = [traffic.shape_of(point) for point in (ranked, replayed)]
    moved, other = (traffic.modelled_bytes(shape) for shape in shapes)
    assert other == dict(zip(STAGES, replayed.bytes[:, 0].tolist()))
    assert moved == dict(zip(STAGES, ranked.bytes[:, 0].tolist()))
    flops, fewer = (traffic.modelled_flops(shape) for shape in shapes)
    assert (other["rank"], fewer["rank"]) == (0, 0) and flops["rank"] > 0
    assert flops["step"] - fewer["step"] == flops["rank"]
    assert moved["step"] - other["step"] == moved["rank"] + moved["comm"] - other["comm"]
    assert (moved["comm"] > other["comm"]) == (kind == "decode" and ranks > 1)


def linear_sweep(folder, layouts=((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 1), (2, 4))):
    """Stages of 3 us + bytes at 1 TB/s, exchanges of 4 us + 2 us per hop, a step that saves 2 us per stage and overlaps
    half of its exchanges."""
    paths = []
    for heads, kv in layouts:
        points = []
        for context in (65536, 1048576):
            parameters = synthetic.PARAMETERS | {"run.context": context, "heads": heads, "kv": kv}
            shape = traffic.shape_of(types.SimpleNamespace(kind="decode", parameters=parameters))
            moved = traffic.modelled_bytes(shape)
            stages = {
                s: 3e-6 + moved[s] / 1e12
                for s in ("append", "compress", "attend_cmp", "rank", "attend_sel", "attend_win", "combine")
            }
            own, saved = sum(stages.values()), 2e-6 * len(stages)
            comm = sum(4e-6 + 2e-6 * (e.ranks - 1) for e in traffic.exchanges(shape))
            if comm:
                stages["comm"] = comm
            points.append(
                synthetic.point(
                    synthetic.times(heads * kv, 9, own - saved + comm / 2, **stages), heads, kv, run_context=context
                )
            )
        paths.append(str(synthetic.write(folder / f"h{heads}k{kv}.h5", points)))
    return paths


@pytest.fixture(scope="module")
def linear_points(tmp_path_factory):
    """Points of linear_sweep on all its layouts."""
    return nsa_analysis.read(linear_sweep(tmp_path_factory.mktemp("linear")))


def test_coefficients_are_recovered(linear_points):
    model = nsa_analysis.fit(linear_points, [1, 2, 4])
    assert model.comm[:2] == pytest.approx((4e-6, 2e-6), rel=1e-6) and model.comm[2] == pytest.approx(0, abs=1e-16)
    # A whole step: 7 stages of 1 us and its bytes at 1 TB/s; half of its exchanges.
    assert model.step == pytest.approx((7e-6, 1e-12, 0, 0), rel=1e-5, abs=1e-16)
    assert model.step_comm == pytest.approx((2e-6, 1e-6, 0), rel=1e-5, abs=1e-16)
    checked = nsa_analysis.check(model, linear_points)
    assert checked.error.abs().max() < 0.01
    assert set(checked[checked.part == "held out"].ranks) == {8}
    assert nsa_analysis.fit(linear_points).fit_ranks == (1, 2, 4, 8)


def test_error_is_measured_against_predicted(linear_points):
    model = dataclasses.replace(nsa_analysis.fit(linear_points), comm=(8e-6, 4e-6, 0.0))
    comm = nsa_analysis.check(model, linear_points).query("stage == 'comm'")
    assert comm.error.tolist() == pytest.approx([1.0] * len(comm))


def test_an_exchange_beyond_a_node_by_hand():
    coefficients = (4e-6, 2e-6, 1e-9)
    shape = traffic.Shape(
        "decode", 65536, 0, 65536, 1, 65567, 256, 8, 4, 64, 64, 1, 2, False, True, 32, 16, 64, 16, 512, 0, 1024, 1, 16
    )
    gather = traffic.Exchange("lse", "all_gather", 16, 1000)
    # 4 us, 3 hops in the node, 15 kB received; 2 doublings to 4 nodes, 12 kB from others over 4 links.
    assert cost_model.exchange_time(gather, shape, NETWORK, coefficients) == pytest.approx(
        4e-6 + 3 * 2e-6 + 15000e-9 + 2 * 10e-6 + 12000 / 4 / 1e9
    )
    heads = traffic.Exchange("outputs", "all_reduce", 4, 1000)
    # Head shards are 16 ranks apart: each in a node of its own, 2 doublings and 3/4 of 1 kB, in both passes.
    assert cost_model.exchange_time(heads, shape, NETWORK, coefficients) == pytest.approx(
        4e-6 + 1500e-9 + 4 * 10e-6 + 1500 / 1e9
    )


def test_what_was_measured_is_not_predicted(linear_points):
    """Rows of measured rank counts are the measurements; efficiency is against the measured baseline."""
    model = nsa_analysis.fit(linear_points)
    frame = nsa_analysis.extrapolate(model, linear_points, 1024, NETWORK)
    small = frame[frame.context == 65536].set_index("ranks")
    assert frame[frame.context == 1048576].ranks.tolist() == [1 << i for i in range(11)]
    assert small.index.max() == 256  # at most 64 chunks x 4 head shards
    assert (small.source == "measured").tolist() == [r <= 8 for r in small.index]
    steps = {}
    for p in linear_points:
        if p["run.context"] == 65536:
            steps[p.ranks] = min(steps.get(p.ranks, 1), float(np.median(p.step_samples())))
    for ranks, time in steps.items():
        assert small.time[ranks] == time and small.network[ranks] == ""
    for ranks, row in small.iterrows():
        assert row.speedup == pytest.approx(steps[1] / row.time)
        assert row.efficiency == pytest.approx(steps[1] / row.time / ranks)
    assert small.network[small.index > 8].str.contains("a network.*assumed").all()
    ahead = small.loc[16]
    shape = traffic.shape_of(linear_points[0])
    layouts = prediction.layouts_of(shape, 16)
    assert ahead.time == pytest.approx(min(model.predict(s, NETWORK)["step"] for s in layouts))
    error = cost_model.cross_validate(linear_points).error.max()
    assert (ahead.time_low, ahead.time_high) == pytest.approx((ahead.time / (1 + error), ahead.time / (1 - error)))


def test_layouts_that_do_not_fit_into_memory_are_not_predicted(linear_points):
    """The synthetic peaks are 1 MB on every layout."""
    model = nsa_analysis.fit(linear_points)
    fits = nsa_analysis.extrapolate(model, linear_points, 16, NETWORK, memory=2e6)
    none = nsa_analysis.extrapolate(model, linear_points, 16, NETWORK, memory=0.5e6)
    assert fits.time.notna().all() and none[none.source == "predicted"].time.isna().all()
    assert set(none[none.source == "predicted"].layout) == {"none fits"}
    assert none[none.source == "measured"].time.notna().all()


@pytest.mark.parametrize(
    ("name", "size"), [("NVIDIA H200", 141e9), ("NVIDIA H100 80GB HBM3", 80e9), ("A100-SXM4-40GB", 40e9)]
)
def test_memory_of_known_devices(name, size):
    assert prediction.device_memory(name) == size and math.isnan(prediction.device_memory("AMD EPYC"))


def test_the_memory_of_a_rank_is_not_underestimated():
    points = cost_model.usable(nsa_analysis.read(DECODE_FILES))
    memory = prediction.fit_memory(points)
    ratios = [memory(traffic.shape_of(p)) / p.peak_memory for p in points]
    assert min(ratios) >= 1 - 1e-9 and max(ratios) < 1.6


def test_invalid_points_and_shared_cores_are_not_fitted(tmp_path):
    paths = linear_sweep(tmp_path)
    synthetic.write(tmp_path / "h2k4.h5", [synthetic.point(synthetic.times(8, 9, 5.0, append=5.0), 2, 4, valid=False)])
    with pytest.warns(nsa_analysis.errors.LeftOut, match="INVALID"):
        model = nsa_analysis.fit(nsa_analysis.read(paths))
    assert model.fit_ranks == (1, 2, 4)
    assert nsa_analysis.check(model, nsa_analysis.read(paths)).measured.max() < 1


def test_nothing_to_fit_is_an_error(linear_points):
    with pytest.raises(AnalysisError, match="no VALID point .* on 64 ranks"):
        nsa_analysis.fit(linear_points, [64])


def test_non_negative_fit():
    columns = np.array([[1.0, 2], [1, 4], [1, 8]])
    assert cost_model.non_negative_fit(columns, columns @ [3, 0.5]) == pytest.approx([3, 0.5])
    assert cost_model.non_negative_fit(columns, np.array([4.0, 2, 1]))[1] == 0  # falling times: no negative rate


def test_each_layout_is_predicted_by_the_others(linear_points):
    errors = cost_model.cross_validate(linear_points).set_index("layout")
    assert set(errors.index) == {"1x1", "2x1", "1x2", "2x2", "1x4", "4x1", "2x4"}
    assert errors.points.tolist() == [2] * 7 and errors.error.max() < 0.01
    text = cost_model.reliability(errors.reset_index(), linear_points)
    assert text.startswith("Up to ") and "held out" in text and cost_model.unusable(errors) == ""


def test_an_error_above_15_percent_makes_predictions_unusable(tmp_path):
    """On 4 head shards a step takes twice as long as the model of the others predicts: 50% off there."""
    paths = linear_sweep(tmp_path, ((1, 1), (2, 1), (1, 2), (4, 1)))
    points = nsa_analysis.read(paths[:3])
    model = nsa_analysis.fit(points)
    slow = []
    for context in (65536, 1048576):
        shape = dataclasses.replace(traffic.shape_of(points[0]), heads=4, context=context, last=context + 31)
        table = synthetic.times(4, 9, 2 * model.predict(shape)["step"], append=3e-6)
        slow.append(synthetic.point(table, 4, run_context=context))
    points = nsa_analysis.read([*paths[:3], synthetic.write(tmp_path / "h4k1.h5", slow)])
    errors = cost_model.cross_validate(points).set_index("layout")
    assert errors.error["4x1"] == pytest.approx(0.5, abs=1e-6)
    assert "Cannot be used" in cost_model.reliability(errors, points)
    frame = nsa_analysis.extrapolate(nsa_analysis.fit(points), points, 16, NETWORK)
    panels = plots.prediction_panels(frame, cost_model.unusable(errors))
    assert all("Cannot be used" in style.to_svg(p, "x", "y").replace("\n", " ") for p in panels)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_error_on_held_out_layouts_of_h200(kind):
    """At most 15%: one to four GPUs, every layout predicted by a fit to the others, from the raw samples."""
    files = sorted((ROOT / "docs/results/h200").glob(f"scaling_gpu_{kind}_r*kv?.h5"))
    errors = cost_model.cross_validate(nsa_analysis.read(files))
    assert len(errors) == 6 and errors.error.max() <= 0.15


def test_layouts_whose_exchanges_were_not_timed_are_not_predicted(tmp_path):
    """Head shards alone exchange nothing; exchanges that cost nothing would make kv shards look ideal."""
    points = nsa_analysis.read(linear_sweep(tmp_path, ((1, 1), (2, 1))))
    model = nsa_analysis.fit(points)
    predictions = nsa_analysis.extrapolate(model, points, 1024, NETWORK)
    assert predictions[predictions.context == 65536].layout.tolist() == ["1x1", "2x1", "4x1"]  # 4 groups
    assert "only layouts without exchanges" in cost_model.reliability(cost_model.cross_validate(points), points)


def test_layouts_that_others_do_not_explain_are_not_held_out(tmp_path):
    """Without 1x2 no exchange is fitted, so it has no prediction; with it alone the cost of a rank is unknown."""
    points = nsa_analysis.read(linear_sweep(tmp_path, ((1, 1), (2, 1), (1, 2))))
    errors = cost_model.cross_validate(points)
    assert errors.layout.tolist() == ["1x1", "2x1"]
    assert "equally many ranks" in cost_model.reliability(errors, points)
    none = cost_model.cross_validate(nsa_analysis.read(linear_sweep(tmp_path, ((1, 1),))))
    assert none.empty and "unknown" in cost_model.reliability(none, points)
