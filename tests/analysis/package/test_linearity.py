"""Lost efficiency by cause: by hand on made-up times, and recomputed from the raw samples of committed files."""

import math
import pathlib
import statistics

import h5py
import nsa_analysis
import numpy as np
import pytest
import synthetic
from nsa_analysis.figures import plots, style

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "docs/results"
CAUSES = ["exchange", "fixed_cost", "imbalance", "overlap", "rest"]


def staged(folder):
    """One rank: stages of 100 us, a step of 80. Two: 70 and 62 us of stages, 10 of exchange; a step of 60 us.

    Exchange waits 8 us longer on the fast rank. By the base a step takes 0.8 of its stages.
    """
    one = synthetic.times(1, 11, 80e-6, attend_cmp=60e-6, attend_sel=40e-6)
    cmp, comm = (np.repeat(np.array(v)[:, None], 11, axis=1) * 1e-6 for v in ((40, 32), (10, 18)))
    two = synthetic.times(2, 11, 60e-6, attend_cmp=cmp, attend_sel=30e-6, comm=comm)
    synthetic.write(folder / "1.h5", [synthetic.point(one)])
    synthetic.write(folder / "2.h5", [synthetic.point(two, 1, 2)])
    return nsa_analysis.read(folder)


def test_by_hand(tmp_path):
    row = nsa_analysis.linearity(staged(tmp_path)).iloc[0]
    assert row.efficiency == pytest.approx(80 / 60 / 2) and row.lost == pytest.approx(20 / 60)
    assert row.exchange == pytest.approx(10 / 60)  # the least of any rank
    assert row.fixed_cost == pytest.approx(0.8 * (66 - 50) / 60)  # the mean rank's 66 us against half of 100
    assert row.imbalance == pytest.approx(0.8 * (70 - 66) / 60)
    assert row.overlap == pytest.approx(-(0.8 * 70 + 10 - 60) / 60)  # 66 us one after the other take 60
    assert row.rest == pytest.approx(row.lost - row[CAUSES[:4]].sum())
    assert row[CAUSES].sum() == pytest.approx(row.lost)


def test_the_panel_ends_at_the_efficiency(tmp_path):
    (panel,) = plots.linearity_panels(nsa_analysis.linearity(staged(tmp_path)))
    assert panel.title == "Why not linear: 2 ranks (1×2), context 64K"
    texts = [t.get_text() for t in style.render(panel).axes[0].texts]
    assert texts == ["100%", "−17%", "−21%", "−5%", "+10%", "−0%", "67%"]


def test_one_rank_count_or_shared_cores_have_no_rows(tmp_path):
    points = staged(tmp_path)
    assert nsa_analysis.linearity(points[:1]).empty
    with h5py.File(tmp_path / "2.h5", "r+") as file:
        file.attrs["backend"] = "host"
        for name, value in (("threads", 1), ("cores", 1), ("sharers", 2)):
            synthetic.add_dataset(file["system"], name, [value] * 2, ["rank"])
    with h5py.File(tmp_path / "1.h5", "r+") as file:
        file.attrs["backend"] = "host"
    assert nsa_analysis.linearity(nsa_analysis.read(tmp_path)).empty


def raw_point(path, context):
    """Samples of a committed point, [mode][stage][rank][rep] without warm-up, and its attributes."""
    with h5py.File(path) as file:
        for group in file["points"].values():
            if group.attrs["run.context"] == context:
                warm = int(group.attrs["warmup_reps"])
                names = [list(group[n].asstr()) for n in ("mode", "stage")]
                table = group["time"][:, :, :, warm:]
                time = {m: dict(zip(names[1], table[i].tolist())) for i, m in enumerate(names[0])}
                return time, group["bytes"][:].tolist(), dict(group.attrs)


def median(values):
    return statistics.median(v for v in values if not math.isnan(v))


def parts_by_hand(time):
    """(step, mean work, slowest work, exchange) from lists."""
    step = median(max(rep) for rep in zip(*time["total"]["step"]))
    stages = [s for s in time["branches"] if s not in ("comm", "step")]
    ranks = range(len(time["total"]["step"]))
    work = []
    for rank in ranks:
        reps = zip(*(time["branches"][s][rank] for s in stages))
        work.append(median(sum(v for v in rep if not math.isnan(v)) for rep in reps))
    exchanges = [c for c in time["branches"]["comm"] if not all(map(math.isnan, c))]
    comm = [median(c) for c in exchanges] if len(ranks) > 1 and exchanges else [0.0]
    return step, sum(work) / len(work), max(work), min(comm)


def fused_bytes(table, attributes):
    """Bytes of a fused step of bf16 from the stages: 9 of 32 raw scores, q once, no outputs of branches."""
    stage = [row[0] for row in table]
    rows = attributes["run.batch"] * attributes["model.n_heads"]
    whole = stage[-1] - stage[-2] - 2 * stage[4] * 23 / 32
    return whole - rows * (2 * attributes["model.d_k"] * 2 + 6 * attributes["model.d_v"] * 4)


@pytest.mark.parametrize("layout", ["r2_h2_kv1", "r2_h1_kv2", "r4_h2_kv2"])
@pytest.mark.parametrize("context", [65536, 1048576])
def test_every_cause_from_the_raw_samples(layout, context):
    """Decode on H200s: the fixed cost is the intercept of the base's time over its bytes, of two contexts."""
    files = [RESULTS / f"h200/scaling_gpu_decode_{name}.h5" for name in ("r1_h1_kv1", layout)]
    frame = nsa_analysis.linearity(nsa_analysis.read(files))
    row = frame[frame.context == context].iloc[0]
    base = {c: raw_point(files[0], c) for c in (65536, 1048576)}
    base_step, _, base_slowest, _ = parts_by_hand(base[context][0])
    step, mean, slowest, exchange = parts_by_hand(raw_point(files[1], context)[0])
    (t0, b0), (t1, b1) = ((parts_by_hand(time)[0], fused_bytes(table, a)) for time, table, a in base.values())
    fixed = t0 - (t1 - t0) / (b1 - b0) * b0  # two points: the line through them
    share, fused = 1 / row.ranks, base_step / base_slowest
    expected = {
        "exchange": exchange / step,
        "fixed_cost": fixed * (1 - share) / step,
        "imbalance": fused * (slowest - mean) / step,
        "overlap": -min(exchange, max(0, fused * slowest + exchange - step)) / step,
        "lost": 1 - base_step * share / step,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert row.rest == pytest.approx(expected["lost"] - sum(v for k, v in expected.items() if k != "lost"), abs=1e-6)
