"""Every column of the tables, recomputed independently from the raw samples of synthetic files."""

import math
import pathlib
import statistics

import h5py
import nsa_analysis
import numpy as np
import pytest
import synthetic
from nsa_analysis.data import hdf5, reading
from nsa_analysis.data.statistics import summarise
from nsa_analysis.errors import AnalysisError
from nsa_analysis.figures.axes import by_size

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "docs/results"


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
    assert row["max_over_median"] == pytest.approx(work[1] / work[0])  # over the median of the other ranks
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
    assert sel.ratio.tolist() == pytest.approx([median[0] / median[1], median[1] / median[0]])
    slow = nsa_analysis.stragglers(frame)
    assert slow["rank"].tolist() == [1] and "attend_sel" in slow.stages[0] and slow.uuid[0] == "GPU-1"
    assert "comm" not in slow.stages[0]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_rank_that_is_a_fifth_slower_is_named(tmp_path, ranks):
    """From two ranks on: with the slow rank in the median its ratio would be 1.09 on two ranks, below the 1.1."""
    rng = np.random.default_rng(ranks)
    samples = 50e-6 * (1 + 0.01 * rng.random((ranks, 24)))
    samples[1] *= 1.2
    table = synthetic.times(ranks, 24, 60e-6, attend_cmp=samples)
    points = nsa_analysis.read(synthetic.write(tmp_path / "slow.h5", [synthetic.point(table, ranks)]))
    slow = nsa_analysis.stragglers(nsa_analysis.ranks(points))
    assert slow["rank"].tolist() == [1] and slow.worst[0] == pytest.approx(1.2, rel=0.01)
    assert nsa_analysis.points_table(points).max_over_median[0] == pytest.approx(1.2, rel=0.01)


def test_the_fast_rank_of_two_is_no_reason_to_name_the_other(tmp_path):
    """5% apart: below the threshold."""
    samples = np.full((2, 24), 50e-6)
    samples[0] *= 0.95
    table = synthetic.times(2, 24, 60e-6, attend_cmp=samples)
    points = nsa_analysis.read(synthetic.write(tmp_path / "even.h5", [synthetic.point(table, 2)]))
    assert nsa_analysis.stragglers(nsa_analysis.ranks(points)).empty


def test_phases_say_who_waits_for_whom(tmp_path):
    path = synthetic.write(tmp_path / "kv.h5", [synthetic.point(synthetic.times(2, 3, 50e-6), 1, 2)])
    with h5py.File(path, "r+") as file:
        group = file["points/0000"].create_group("phases")
        for name, labels in ("phase", ["attend_cmp", "wait_lse"]), ("rank", [0, 1]), ("rep", list(range(5))):
            synthetic.add_scale(group, name, labels)
        seconds = [
            [[9.0, 9.0, 8e-6, 8e-6, 8e-6], [9.0, 9.0, 10e-6, 11e-6, 12e-6]],
            [[9.0, 9.0, 4e-6, 4e-6, 5e-6], [9.0, 9.0, 1e-6, 0, 1e-6]],
        ]
        synthetic.add_dataset(group, "time", seconds, ["phase", "rank", "rep"], "s")
    frame = nsa_analysis.phases(nsa_analysis.read(path))
    assert frame.time.tolist() == pytest.approx([8e-6, 11e-6, 4e-6, 1e-6])
    assert frame.share.tolist() == pytest.approx([8 / 12, 11 / 12, 4 / 12, 1 / 12])
    table = nsa_analysis.waiting(frame)
    assert table.waiting.tolist() == pytest.approx([4e-6, 1e-6])
    assert table.working.tolist() == pytest.approx([8e-6, 11e-6])
    with pytest.raises(AnalysisError, match="no point has phases"):
        nsa_analysis.phases(nsa_analysis.read(synthetic.sweep(tmp_path, layouts=[(2, 1)])))


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


@pytest.mark.parametrize(
    ("ran", "changed", "handed_over", "kept"),
    [
        ("decode", {}, 1, 0),  # stage by stage
        ("step, decode", {}, 9 / 32, 1),
        ("shard, decode", {}, 10 / 32, 0),
        ("step, decode", {"nsa_l": 64}, 1, 1),  # no tiles of 32 tokens
        ("step, decode", {"nsa_n_sel": 32}, 1, 1),
        ("step, decode", {"parallel_kv_chunk_blocks": 4}, 1, 1),
        ("step, decode", {"model_n_heads": 128}, 1, 1),
    ],
)
def test_the_bytes_of_a_step_are_those_of_what_ran(tmp_path, ran, changed, handed_over, kept):
    """3 layers, batch 5, 4 query heads on a rank: q [60, 64] in bf16 twice less, three o [60, 64] in fp32 not moved."""
    moved = np.zeros((11, 2), dtype=np.int64)
    moved[synthetic.STAGES.index("rank")], moved[-1] = 320_000, 10_000_000
    given = {"model_layers": 3, "run_batch": 5} | changed
    path = synthetic.write(
        tmp_path / "a.h5", [synthetic.point(synthetic.times(2, 8, 1e-4, rank=1e-5), 2, moved=moved, **given)]
    )
    with h5py.File(path, "r+") as file:
        file["points/0000"].attrs["route_kernels"] = [ran, "decode", ran]
    frame = nsa_analysis.roofline(nsa_analysis.read(path)).set_index("stage")
    rows = 3 * 5 * given.get("model_n_heads", 8) // 2
    assert frame.bytes["step"] == 10_000_000 - 640_000 * (1 - handed_over) - kept * rows * 64 * (2 * 2 + 6 * 4)
    assert frame.bytes["rank"] == 320_000  # a stage is of mode branches


def test_the_bytes_of_a_sharded_step_in_one_launch(tmp_path):
    """120 rows of q and o on each of two kv ranks, which store and read no outputs of branches.

    A rank has o of half of the heads, and reads their rows of W_O: the bytes of `output` without y, fp32 [15, 256].
    """
    moved = np.zeros((11, 2), dtype=np.int64)
    moved[synthetic.STAGES.index("rank")], moved[-1] = 320_000, 10_000_000
    moved[synthetic.STAGES.index("output")] = 515_360
    given = {"model_layers": 3, "run_batch": 5}
    path = synthetic.write(
        tmp_path / "a.h5", [synthetic.point(synthetic.times(2, 8, 1e-4, rank=1e-5), 1, 2, moved=moved, **given)]
    )
    with h5py.File(path, "r+") as file:
        file["points/0000"].attrs["route_kernels"] = ["sharded_step, decode"] * 3
    frame = nsa_analysis.roofline(nsa_analysis.read(path)).set_index("stage")
    kept = 640_000 * 23 / 32 + 120 * 64 * (2 * 2 + 9 * 4)
    assert frame.bytes["step"] == 10_000_000 - kept - (120 * 64 * 2 + 500_000) / 2


def test_a_fused_step_at_1m_is_below_the_copy_rate():
    """On one H200: 108% with all raw scores; a fused step hands over 9/32 of them."""
    points = nsa_analysis.read(RESULTS / "h200/scaling_gpu_decode_r1_h1_kv1.h5")
    frame = nsa_analysis.roofline(points)
    step = frame[(frame.stage == "step") & (frame.context == 1048576)].iloc[0]
    assert step.fraction == pytest.approx(0.926, abs=0.002)


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


def test_a_dataset_of_a_point_is_opened_once(noisy, monkeypatch):
    opened = []

    def counted(group, name):
        opened.append(name)
        return original(group, name)

    original = hdf5.open_dataset
    monkeypatch.setattr(hdf5, "open_dataset", counted)
    with h5py.File(noisy) as file:
        reading.read_point(None, "0000", file["points/0000"], noisy.stat().st_size, {})
    assert {"time", "mode", "stage", "bytes"} <= {*opened} and len(opened) == len({*opened})


def test_summary_of_a_step(noisy):
    (point,) = nsa_analysis.read(noisy)
    assert point.step_summary() == summarise(point.step_samples())
    assert type(point.step_summary()["n"]) is int


def test_sizes_picked_evenly(tmp_path):
    contexts = [1024 << i for i in range(7)]
    frame = nsa_analysis.points_table(
        nsa_analysis.read(synthetic.sweep(tmp_path, layouts=((1, 1), (2, 1)), contexts=contexts))
    )
    every = list(by_size(frame))
    assert [label for label, _ in every] == ["1K", "2K", "4K", "8K", "16K", "32K", "64K"]
    assert all(sorted(rows.ranks) == [1, 2] and len({*rows.context}) == 1 for _, rows in every)
    picked = list(by_size(frame, 3))
    assert [label for label, _ in picked] == ["1K", "8K", "64K"]
    assert all(rows.equals(dict(every)[label]) for label, rows in picked)
