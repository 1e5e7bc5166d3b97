"""Every column of the tables, recomputed independently from the raw samples of synthetic files."""

import math
import statistics

import h5py
import nsa_analysis
import numpy as np
import pytest
import synthetic
from nsa_analysis.errors import AnalysisError


@pytest.fixture
def noisy(tmp_path):
    """Two ranks with random samples; rank 1 is the slower one in attend_sel."""
    rng = np.random.default_rng(3)

    def sample(scale):
        return scale * (1 + 0.2 * rng.random((2, 24)))

    sel = sample(30e-6)
    sel[1] *= 1.5
    moved = np.arange(22).reshape(11, 2) * 10_000
    table = synthetic.times(
        2,
        24,
        sample(100e-6),
        attend_cmp=sample(50e-6),
        rank=sample(10e-6),
        attend_sel=sel,
        comm=sample(8e-6),
        step=sample(120e-6),
    )
    table[0, synthetic.STAGES.index("comm"), 0, 5] = np.nan  # a sample that is missing
    return synthetic.write(tmp_path / "noisy.h5", [synthetic.point(table, heads=1, kv=2, moved=moved)])


def raw(path, mode, stage):
    """Samples [rank][rep] as the document says: after warmup_reps."""
    with h5py.File(path) as file:
        p = file["points/0000"]
        m, s = (list(p[d].asstr()).index(v) for d, v in (("mode", mode), ("stage", stage)))
        return p["time"][m, s, :, int(p.attrs["warmup_reps"]) :].tolist()


def slowest(path, mode, stage):
    columns = zip(*raw(path, mode, stage))
    return [max(v for v in column if not math.isnan(v)) for column in columns]


def test_stage_medians_and_intervals(noisy):
    frame = nsa_analysis.branches(nsa_analysis.read(noisy)).set_index("stage")
    assert set(frame.index) == {"attend_cmp", "rank", "attend_sel", "comm"}
    total = sum(statistics.median(slowest(noisy, "branches", s)) for s in frame.index)
    for stage, row in frame.iterrows():
        samples = slowest(noisy, "branches", stage)
        ordered = sorted(samples)
        assert row["n"] == 24
        assert row["median"] == pytest.approx(statistics.median(samples), rel=1e-12)
        assert (row["low"], row["high"]) == (ordered[6], ordered[17])
        assert (row["min"], row["p95"], row["p99"]) == (ordered[0], ordered[22], ordered[23])
        assert row["cv"] == pytest.approx(statistics.stdev(samples) / statistics.mean(samples))
        assert row["share"] == pytest.approx(row["median"] / total)


def test_point_row(noisy):
    row = nsa_analysis.points_table(nsa_analysis.read(noisy)).iloc[0]
    median = {s: statistics.median(slowest(noisy, "branches", s)) for s in ("attend_cmp", "rank", "attend_sel", "comm")}
    assert row["median"] == statistics.median(slowest(noisy, "total", "step"))
    assert row["selection_share"] == pytest.approx((median["rank"] + median["attend_sel"]) / sum(median.values()))
    assert row["comm_share"] == pytest.approx(median["comm"] / sum(median.values()))
    work = [
        statistics.median(
            sum(v) for v in zip(*(raw(noisy, "branches", s)[r] for s in ("attend_cmp", "rank", "attend_sel")))
        )
        for r in range(2)
    ]
    assert row["max_over_median"] == pytest.approx(max(work) / statistics.median(work))
    assert row["slowest_rank"] == 1
    assert (row["reads_counted"], row["reads_expected"], row["reads_sel_counted"], row["reads_nsa_vibe"]) == (
        600,
        600,
        200,
        777,
    )
    assert row["device"] == "Test GPU" and row["layout"] == "1x2" and row["peak_memory"] == 10**6


def test_ranks_and_stragglers(noisy):
    frame = nsa_analysis.ranks(nsa_analysis.read(noisy))
    sel = frame[frame.stage == "attend_sel"].set_index("rank")
    median = [statistics.median(r) for r in raw(noisy, "branches", "attend_sel")]
    assert sel.time.tolist() == median
    assert sel.ratio.tolist() == pytest.approx([m / statistics.median(median) for m in median])
    slow = nsa_analysis.stragglers(frame)
    assert slow["rank"].tolist() == [1] and "attend_sel" in slow.stages[0] and slow.uuid[0] == "GPU-1"
    assert "comm" not in slow.stages[0]


def test_an_even_run_has_no_stragglers(tmp_path):
    points = nsa_analysis.read(synthetic.sweep(tmp_path, layouts=[(2, 2)]))
    assert nsa_analysis.stragglers(nsa_analysis.ranks(points)).empty


def test_roofline(noisy):
    frame = nsa_analysis.roofline(nsa_analysis.read(noisy)).set_index("stage")
    sel = statistics.median(slowest(noisy, "branches", "attend_sel"))
    assert frame.bytes["attend_sel"] == 110_000  # the busiest rank's
    assert frame.achieved["attend_sel"] == pytest.approx(110_000 / sel)
    assert frame.fraction["attend_sel"] == pytest.approx(110_000 / sel / 1e12)
    assert math.isnan(frame.fraction["comm"])
    total = statistics.median(slowest(noisy, "total", "step"))
    assert frame.achieved["step"] == pytest.approx((200_000 - 180_000) / total)  # a rank's step less its comm
    # Position 65567: 15 whole blocks and 32 tokens are selected, half on each kv rank; 8 query heads, Dk+Dv = 128.
    assert frame.flops["attend_sel"] == 2 * 8 * (15 * 64 + 32) / 2 * 128


def test_reads(noisy):
    frame = nsa_analysis.reads(nsa_analysis.read(noisy)).set_index("branch")
    assert frame.counted.to_dict() == {"cmp": 100, "sel": 200, "win": 300, "all": 600}


def test_branches_need_their_mode(tmp_path):
    table = synthetic.times(1, 8, 1e-4)[1:]
    path = synthetic.write(tmp_path / "total.h5", [synthetic.point(np.concatenate([table, table]))])
    with h5py.File(path, "r+") as file:
        file["points/0000/mode"][:] = ["total", "ablation_sel"]
    with pytest.raises(AnalysisError, match="branches"):
        nsa_analysis.branches(nsa_analysis.read(path))
    assert nsa_analysis.points_table(nsa_analysis.read(path))["median"][0] == 1e-4


def test_kernels(tmp_path):
    path = synthetic.write(
        tmp_path / "k.h5",
        [synthetic.kernel_point({"fused": 2e-6, "sdpa": 10e-6}, kernels_branch="sel", kernels_rows=256)],
    )
    frame = nsa_analysis.kernels(nsa_analysis.read(path)).set_index("implementation")
    assert frame["median"].to_dict() == {"fused": 2e-6, "sdpa": 10e-6} and frame.n.tolist() == [10, 10]
    assert frame.rows.tolist() == [256, 256] and frame.mean_abs_err["fused"] == 1e-5
    with pytest.raises(AnalysisError, match="was timed"):
        nsa_analysis.scaling(nsa_analysis.read(path))
