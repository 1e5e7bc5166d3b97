"""Numbers of the report's bandwidth and model tables, recomputed from the raw samples by independent code."""

import math
import os
import pathlib
import re
import statistics
import subprocess

import h5py
import nsa_analysis
import numpy as np
import pytest
from nsa_analysis.models import cost_model, traffic

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "docs/results"
DECODE = [RESULTS / f"h200/scaling_gpu_decode_{name}.h5" for name in ("r1_h1_kv1", "r2_h1_kv2", "r2_h2_kv1")]
FILES = [*DECODE, RESULTS / "host/scaling_r2_h1_kv2.h5", RESULTS / "h200/scaling_gpu_prefill_r2_h1_kv2.h5"]


def slowest_median(group, mode, stage):
    """Median over repetitions of the slowest rank; NaN where the stage was not timed."""
    at = [list(group[d].asstr()).index(v) for d, v in (("mode", mode), ("stage", stage))]
    reps = zip(*group["time"][at[0], at[1], :, int(group.attrs["warmup_reps"]) :].tolist())
    values = [max(v for v in rep if not math.isnan(v)) for rep in reps if not all(map(math.isnan, rep))]
    return statistics.median(values) if values else math.nan


def moved_by_step(group, rank):
    """Bytes of a whole step of one rank by docs/METRICS.md: sharded 10/32 of the raw scores, fused 9/32 and no o, q."""
    stage = dict(zip(group["stage"].asstr(), group["bytes"][:, rank].tolist()))
    total, a = stage["step"] - stage["comm"], group.attrs
    ran = str(list(a.get("route_kernels", [""]))[0]).split(", ")
    if "shard" in ran:
        return total - 2 * stage["rank"] * 22 / 32
    if "step" not in ran or a["task.kind"] != "decode":
        return total
    heads = a["run.batch"] * a["model.layers"] * a["model.n_heads"] // a["heads"]
    q, o = heads * a["model.d_k"] * 2, heads * a["model.d_v"] * 4
    return total - 2 * stage["rank"] * 23 / 32 - 2 * q - 6 * o


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
def test_bandwidth(path):
    """Bytes of the busiest rank, time of the slowest, rate, and the fraction of the copy rate: every stage and step."""
    frame = nsa_analysis.roofline(nsa_analysis.read(path)).set_index(["point", "stage"])
    count = 0
    with h5py.File(path) as file:
        for index, group in enumerate(file["points"].values()):
            copy = float(group.attrs["copy_bandwidth"])
            for s, stage in enumerate(group["stage"].asstr()):
                whole = stage == "step"
                time = slowest_median(group, "total" if whole else "branches", stage)
                ranks = range(group["bytes"].shape[1])
                moved = max(moved_by_step(group, r) if whole else group["bytes"][s, r] for r in ranks)
                if math.isnan(time) or moved == 0:
                    continue
                row = frame.loc[index, stage]
                assert (row.time, row.bytes) == pytest.approx((time, moved), rel=1e-12)
                assert row.achieved == pytest.approx(moved / time)
                assert stage == "comm" or row.fraction == pytest.approx(moved / time / copy)
                count += 1
    assert count == len(frame) > 7


def assert_best(columns, times, coefficients):
    """Karush-Kuhn-Tucker: no coefficient >= 0 has a smaller sum of squared relative errors. The problem is convex."""
    a = columns / times[:, None]
    norm = np.linalg.norm(a, axis=0)
    slope = a.T @ (a @ coefficients - 1) / np.where(norm > 0, norm, 1)
    assert (coefficients >= 0).all() and (slope > -1e-9).all()
    assert np.abs(slope[coefficients > 0]).max() < 1e-9


def test_the_cost_model_of_held_out_layouts():
    """Decode on up to four H200s: each layout from the others, by the best coefficients."""
    files = sorted((RESULTS / "h200").glob("scaling_gpu_decode_r*.h5"))
    points = nsa_analysis.read(files)
    rows = []
    for p in points:
        with h5py.File(p.run.path) as file:
            group = file[f"points/{p.index:04d}"]
            s = traffic.shape_of(p)
            exchanges = [(1, e.ranks - 1, e.bytes * (e.ranks - 1)) for e in traffic.exchanges(s)]
            terms = np.sum(exchanges, axis=0) if exchanges else np.zeros(3)
            moved = moved_by_step(group, 0)
            blocks = np.ceil((p["run.context"] + p["run.steps"]) / p["nsa.l_sel"]) / p["kv"]
            columns = [1.0, moved, traffic.modelled_flops(s)["step"], blocks, *terms]
            rows.append((p.layout, p["run.context"], np.array(columns), slowest_median(group, "total", "step")))
    table = cost_model.held_out(points).query("stage == 'step'").set_index(["layout", "context"])
    for layout, context, columns, time in rows:
        others = [(c, t) for name, _, c, t in rows if name != layout]
        model = cost_model.fit([p for p in points if p.layout != layout])
        coefficients = (*model.step, *model.launch_comm)  # over kv ranks these files ran in several launches
        assert not any(model.step_comm)
        assert_best(np.array([c for c, _ in others]), np.array([t for _, t in others]), np.array(coefficients))
        row = table.loc[layout, context]
        assert row.measured == pytest.approx(time, rel=1e-12)
        assert row.predicted == pytest.approx(columns @ np.array(coefficients), rel=1e-12)
        assert row.error == pytest.approx(row.predicted / time - 1)


@pytest.mark.skipif("NSA" not in os.environ, reason="NSA does not name the program")
@pytest.mark.parametrize("path", DECODE, ids=lambda f: f.stem)
def test_the_program_counts_the_same_bytes(path):
    """`nsa report` prints the copy rate of the table: 92.59% at 1M on one H200."""
    said = subprocess.run([os.environ["NSA"], "report", path], capture_output=True, text=True, check=True).stdout
    rates = [float(v) for v in re.findall(r"FOM decode_copy_rate_\S+ = (\S+) %", said)]
    frame = nsa_analysis.roofline(nsa_analysis.read(path))
    steps = frame[frame.stage == "step"]
    assert rates == [round(100 * v, 2) for v in steps.fraction]
