"""Speedup, efficiency, Karp-Flatt, weak scaling and errors, on sweeps with known answers."""

import math
import pathlib
import random
import re
import statistics

import h5py
import nsa_analysis
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.errors import AnalysisError

ROOT = pathlib.Path(__file__).resolve().parents[3]


def steps(paths, kind="strong"):
    frame = nsa_analysis.scaling(nsa_analysis.read(paths), kind)
    return frame[frame.stage == "step"].set_index("layout")


def test_amdahls_law_gives_its_serial_fraction(tmp_path):
    """A step of s + (1-s)/p, heads only: Karp-Flatt finds s on every rank count."""
    frame = steps(synthetic.sweep(tmp_path, lambda p: 110e-6 * (0.25 + 0.75 / p), [(1, 1), (2, 1), (4, 1)]))
    assert frame.time.tolist() == pytest.approx([110e-6, 68.75e-6, 48.125e-6])
    assert frame.speedup.tolist() == pytest.approx([1, 1.6, 110 / 48.125])
    assert frame.efficiency.tolist() == pytest.approx([1, 0.8, 110 / 48.125 / 4])
    assert frame.serial_fraction["2x1"] == pytest.approx(0.25) and frame.serial_fraction["4x1"] == pytest.approx(0.25)
    assert frame.ideal_time.tolist() == pytest.approx([110e-6, 55e-6, 27.5e-6])
    assert frame.serial_fraction.isna()["1x1"]


def test_speedup_bounds_come_from_both_intervals(tmp_path):
    frame = steps(synthetic.sweep(tmp_path, layouts=[(1, 1), (2, 1)]))
    # 11 samples: 2 and 10 bound the median, 4 steps of 0.1% from it.
    assert frame.speedup_low["2x1"] == pytest.approx(110 * 0.996 / (60 * 1.004))
    assert frame.speedup_high["2x1"] == pytest.approx(110 * 1.004 / (60 * 0.996))


def test_the_best_layout(tmp_path):
    frame = steps(synthetic.sweep(tmp_path))
    assert set(frame.index[frame.best]) == {"1x1", "2x1", "4x1"}
    assert frame.comm_share["2x2"] == pytest.approx(0.1 / 1.1) and frame.comm_share["4x1"] == 0
    assert frame.base_ranks.unique().tolist() == [1]


def test_stages_are_compared_with_the_same_stage(tmp_path):
    frame = nsa_analysis.scaling(
        nsa_analysis.read(synthetic.sweep(tmp_path, lambda p: 100e-6 / p, [(1, 1), (4, 1)])), "strong"
    )
    cmp = frame[frame.stage == "attend_cmp"].set_index("layout")
    assert cmp.time["4x1"] == pytest.approx(12.5e-6) and cmp.speedup["4x1"] == pytest.approx(4)


def test_without_one_rank_the_smallest_is_the_baseline(tmp_path):
    frame = steps(synthetic.sweep(tmp_path, lambda p: 110e-6 * (0.25 + 0.75 * 2 / p), [(2, 1), (4, 1)]))
    assert frame.base_ranks.unique().tolist() == [2]
    assert frame.efficiency["4x1"] == pytest.approx(1 / 0.625 / 2)
    assert frame.serial_fraction["4x1"] == pytest.approx(0.25)


def test_weak_scaling(tmp_path):
    """A step that takes as long as its context over its ranks, plus 10%: 64K on 1, 128K on 2 ranks."""
    paths = synthetic.sweep(tmp_path, lambda p: 100e-6 / p, [(1, 1)])
    other = tmp_path / "two"
    other.mkdir()
    paths += synthetic.sweep(other, lambda p: 110e-6 / p, [(2, 1)], contexts=[131072])
    frame = steps(paths, "weak")
    assert frame.curve.unique().tolist() == ["weak, batch 1, context 64K a rank"]
    assert frame.efficiency["2x1"] == pytest.approx(1 / 1.1) and frame.speedup["2x1"] == pytest.approx(2 / 1.1)
    assert frame.ideal_time["2x1"] == pytest.approx(100e-6) and frame.serial_fraction.isna().all()


def test_no_weak_scaling_is_an_error(tmp_path):
    with pytest.raises(AnalysisError, match="no weak scaling"):
        nsa_analysis.scaling(nsa_analysis.read(synthetic.sweep(tmp_path)), "weak")


def invalid_sweep(folder, which):
    paths = synthetic.sweep(folder, layouts=[(1, 1), (2, 1), (4, 1)])
    heads = {"h1": 1, "h2": 2, "h4": 4}[which]
    synthetic.write(folder / f"{which}k1.h5", [synthetic.point(synthetic.times(heads, 11, 1e-6), heads, valid=False)])
    return paths


def test_invalid_points_are_shown_and_not_compared(tmp_path):
    frame = steps(invalid_sweep(tmp_path, "h2"))
    assert frame.validity["2x1"] == "INVALID" and frame.time["2x1"] == pytest.approx(1e-6)
    assert frame.loc["2x1", ["speedup", "efficiency", "serial_fraction"]].isna().all() and not frame.best["2x1"]
    assert frame.speedup["4x1"] == pytest.approx(110 / 35)


def test_an_invalid_point_is_no_baseline(tmp_path):
    frame = steps(invalid_sweep(tmp_path, "h1"))
    assert frame.base_ranks.dropna().unique().tolist() == [2]
    assert frame.speedup.isna()["1x1"] and frame.speedup["2x1"] == 1


def test_ranks_on_oversubscribed_cores_are_not_compared(tmp_path):
    paths = synthetic.sweep(tmp_path, layouts=[(1, 1), (2, 1), (4, 1)])
    for path in paths:
        with h5py.File(path, "r+") as file:
            ranks = len(file["system/rank"])
            file.attrs["backend"] = "host"
            for name, value in (("threads", 1), ("cores", 2), ("sharers", ranks)):
                file[f"system/{name}"] = [value] * ranks
                file[f"system/{name}"].dims[0].attach_scale(file["system/rank"])
    frame = steps(paths)
    assert frame.crowded.tolist() == [False, False, True] and frame.best.tolist() == [True, True, False]
    assert frame.time.notna()["4x1"] and frame.speedup.isna()["4x1"] and frame.speedup.notna()["2x1"]


@pytest.mark.parametrize(
    "other, said",
    [
        ({"device": "Other GPU"}, "device Test GPU .*h1k1.h5.*Other GPU .*h2k1.h5"),
        ({"commit": "beef"}, "git_commit c0ffee .*beef"),
    ],
)
def test_mixed_devices_and_commits_share_no_curve(tmp_path, capsys, other, said):
    one = synthetic.sweep(tmp_path, layouts=[(1, 1)])
    two = synthetic.sweep(tmp_path, layouts=[(2, 1)], **other)
    with pytest.raises(AnalysisError, match=said):
        nsa_analysis.scaling(nsa_analysis.read(one + two))
    assert main(["scaling", *one, *two, "--figure", str(tmp_path / "s.svg")]) == 2
    assert "cannot share" in capsys.readouterr().err
    assert main(["scaling", *one, *two]) == 0  # a table for each
    assert re.findall(r" step .* (speedup|1) ", capsys.readouterr().out) == ["1", "1"]
    assert main(["scaling", *one, *two, "--where", "device=Test GPU", "--where", "git_commit=c0ffee"]) == 0


def test_mixed_inputs_are_refused(tmp_path):
    one = synthetic.sweep(tmp_path, layouts=[(1, 1)])
    two = synthetic.write(tmp_path / "w.h5", [synthetic.point(synthetic.times(2, 8, 1e-4), 2, nsa_w=256)])
    with pytest.raises(AnalysisError, match=r"nsa.w 512 .*256"):
        nsa_analysis.scaling(nsa_analysis.read([*one, two]))


def test_the_later_of_two_measurements_is_used(tmp_path):
    paths = synthetic.sweep(tmp_path, layouts=[(1, 1), (2, 1)])
    again = synthetic.write(
        tmp_path / "again.h5", [synthetic.point(synthetic.times(2, 11, 30e-6), 2)], start="2026-02-01T00:00:00Z"
    )
    frame = steps([again, *paths])
    assert len(frame) == 2 and frame.time["2x1"] == pytest.approx(30e-6)


def test_where_selects_points(tmp_path, capsys):
    paths = synthetic.sweep(tmp_path, contexts=(65536, 131072))
    assert main(["scaling", *paths, "--where", "context=131072", "--where", "layout=1x1,2x*", "--csv", "-"]) == 0
    text = capsys.readouterr().out
    assert "context 128K" in text and "context 64K" not in text and "1x4" not in text and "2x2" in text
    assert main(["scaling", *paths, "--where", "run.colour=red"]) == 2
    assert main(["scaling", *paths, "--where", "context=7"]) == 2


def recomputed(files):
    """{(context, batch): {file: (step samples, ranks)}} of mode `total`, the slowest rank's, from the raw datasets."""
    found = {}
    for path in files:
        with h5py.File(path) as file:
            for point in file["points"].values():
                step = [list(point[d].asstr()).index(v) for d, v in (("mode", "total"), ("stage", "step"))]
                raw = point["time"][step[0], step[1], :, int(point.attrs["warmup_reps"]) :].tolist()
                size = int(point.attrs["run.context"]), int(point.attrs["run.batch"])
                found.setdefault(size, {})[str(path)] = [max(column) for column in zip(*raw)], len(raw)
    return found


def noisy_sweep(folder):
    rng = random.Random(11)
    for heads, kv in ((1, 1), (2, 1), (1, 2), (2, 2)):
        rows = [[1e-4 / (heads * kv) ** 0.8 * (1 + rng.random() / 5) for _ in range(24)] for _ in range(heads * kv)]
        table = synthetic.times(heads * kv, 24, rows)
        synthetic.write(folder / f"h{heads}k{kv}.h5", [synthetic.point(table, heads, kv)])
    return sorted(folder.glob("*.h5"))


@pytest.mark.parametrize("which", ["noisy", "docs/results/h200"])
def test_every_number_of_a_curve_from_the_raw_samples(tmp_path, which):
    """Medians, intervals, speedup and its bounds, efficiency and serial fraction, by independent textbook formulas."""
    files = noisy_sweep(tmp_path) if which == "noisy" else sorted((ROOT / which).glob("scaling_gpu_decode_r*.h5"))
    frame = nsa_analysis.scaling(nsa_analysis.read(files), "strong")
    frame = frame[frame.stage == "step"].set_index(["context", "batch", "file"])
    raw = recomputed(files)
    assert len(frame) == sum(map(len, raw.values())) >= 4
    for size, runs in raw.items():
        alone = next(samples for samples, ranks in runs.values() if ranks == 1)
        for path, (samples, ranks) in runs.items():
            row, median = frame.loc[(*size, path)], statistics.median(samples)
            low, high = bounds_of_median(samples)
            assert (row["time"], row["time_low"], row["time_high"]) == pytest.approx((median, low, high), rel=1e-12)
            speedup = statistics.median(alone) / median
            assert row["speedup"] == pytest.approx(speedup, rel=1e-12)
            assert row["efficiency"] == pytest.approx(speedup / ranks, rel=1e-12)
            if ranks == 1:
                continue
            one_low, one_high = bounds_of_median(alone)
            assert (row["speedup_low"], row["speedup_high"]) == pytest.approx((one_low / high, one_high / low))
            # T(p) = T(1) (s + (1 - s) / p), solved for s.
            serial = (ranks * median / statistics.median(alone) - 1) / (ranks - 1)
            assert row["serial_fraction"] == pytest.approx(serial, rel=1e-9)


def bounds_of_median(samples):
    """The narrowest symmetric pair of order statistics that covers the median with 95%, by counting subsets."""
    n, ordered = len(samples), sorted(samples)

    def covered(k):
        return sum(math.comb(n, i) for i in range(k, n - k + 1)) / 2**n

    k = max(k for k in range(1, n // 2 + 1) if covered(k) >= 0.95)
    return ordered[k - 1], ordered[n - k]
