"""`export`: one row per point, mode, stage, rank and statistic, recomputed from the raw samples, in three formats."""

import json
import math
import statistics

import h5py
import nsa_analysis
import numpy as np
import pandas as pd
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.data.statistics import STATISTICS


@pytest.fixture
def noisy(tmp_path):
    rng = np.random.default_rng(5)
    sel = 1e-5 * (1 + rng.random((2, 12)))
    sel[1, 3] = np.nan
    table = synthetic.times(2, 12, 1e-4 * (1 + rng.random((2, 12))), attend_sel=sel, step=1e-4 * rng.random((2, 12)))
    return synthetic.write(tmp_path / "a.h5", [synthetic.point(table, 1, 2), synthetic.point(table, 2, 1, nsa_w=256)])


def expected(samples):
    """Statistics of a list by the standard library, without NaN."""
    ordered = sorted(v for v in samples if not math.isnan(v))
    n = len(ordered)
    low, high = {11: (2, 10), 12: (3, 10)}[n]
    return {
        "n": n,
        "median": statistics.median(ordered),
        "low": ordered[low - 1],
        "high": ordered[high - 1],
        "min": ordered[0],
        "p95": ordered[math.ceil(0.95 * n) - 1],
        "p99": ordered[math.ceil(0.99 * n) - 1],
        "cv": statistics.stdev(ordered) / statistics.mean(ordered),
    }


def test_every_value_from_the_raw_samples(noisy):
    frame = nsa_analysis.export(nsa_analysis.read(noisy))
    values = frame.set_index(["point", "mode", "stage", "rank", "statistic"]).value
    count = 0
    with h5py.File(noisy) as file:
        for index, group in enumerate(file["points"].values()):
            for m, s in ((0, "attend_sel"), (0, "step"), (1, "step")):
                raw = group["time"][m, synthetic.STAGES.index(s), :, 2:]
                slowest = [max(v for v in column if not math.isnan(v)) for column in raw.T]
                for rank, samples in (("slowest", slowest), ("0", raw[0]), ("1", raw[1])):
                    for name, value in expected(samples).items():
                        got = values[index, ("branches", "total")[m], s, rank, name]
                        assert got == pytest.approx(value, rel=1e-12), (s, rank, name)
                        count += 1
    assert count == len(frame) == 2 * 3 * 3 * 8
    assert set(frame[frame.unit == "1"].statistic) == {"n", "cv"}


def test_every_parameter_is_a_column(noisy):
    frame = nsa_analysis.export(nsa_analysis.read(noisy))
    with h5py.File(noisy) as file:
        assert set(file["points/0000"].attrs) <= set(frame)
    assert frame[frame.point == 1]["nsa.w"].unique().tolist() == [256] and set(frame.layout) == {"1x2", "2x1"}
    assert frame.routes.unique().tolist() == ["fused,fused,fused"]


def test_formats_hold_the_same(noisy, tmp_path, capsys):
    paths = {ending: str(tmp_path / f"t.{ending}") for ending in ("csv", "jsonl", "parquet")}
    for ending in ("csv", "jsonl"):
        assert main(["export", str(noisy), "-o", paths[ending]]) == 0
    csv = pd.read_csv(paths["csv"])
    lines = pd.DataFrame([json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()])
    assert list(csv) == list(lines) and len(csv) == len(lines) == 144
    np.testing.assert_allclose(csv.value, lines.value, rtol=1e-14)
    assert main(["export", str(noisy)]) == 0
    assert capsys.readouterr().out == (tmp_path / "t.csv").read_text()
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        assert main(["export", str(noisy), "-o", paths["parquet"]]) == 2
        assert "Parquet needs pyarrow" in capsys.readouterr().err
    else:
        assert main(["export", str(noisy), "-o", paths["parquet"]]) == 0
        np.testing.assert_array_equal(pd.read_parquet(paths["parquet"]).value, lines.value)


def test_csv_is_that_of_pandas(tmp_path):
    table = synthetic.times(2, 7, np.array([[3e-5] * 7, [1e-5, np.nan, 0, 1e22, 1 / 3, 5e-324, 2]]))
    points = [
        synthetic.point(table, 2, nsa_w=256),
        synthetic.point(table[:, :, :1], nsa_w="auto", output_file='a "b", c\nd'),
        synthetic.point(table, 2, nsa_w=2.5, model_extra=7),
        synthetic.kernel_point({"fused, 1": 2e-6, 'the "other"': 1e-5}),
    ]
    path = synthetic.write(tmp_path / "odd.h5", points)
    assert main(["export", str(path), "-o", str(tmp_path / "t.csv")]) == 0
    frame = nsa_analysis.export(nsa_analysis.read(path))
    assert (tmp_path / "t.csv").read_text() == frame.to_csv(index=False)
    assert frame["model.extra"].notna().sum() == (frame.point == 2).sum() > 0
    assert set(frame["nsa.w"]) == {256, "auto", 2.5, 512}
    assert set(frame[frame["mode"] == "kernels"].stage) == {"fused, 1", 'the "other"'}


def test_a_file_is_opened_once_for_its_points(tmp_path, monkeypatch):
    table = synthetic.times(1, 4, np.full((1, 4), 1e-5))
    points = [synthetic.point(table, run_context=context) for context in range(64, 104)]
    read = nsa_analysis.read(synthetic.write(tmp_path / "many.h5", points))
    opened = []
    monkeypatch.setattr(h5py, "File", lambda *args, of=h5py.File: opened.append(args) or of(*args))
    assert nsa_analysis.export(read).point.nunique() == 40
    assert len(opened) == 1


def test_selection_and_errors(noisy, tmp_path, capsys):
    assert main(["export", str(noisy), "--where", "layout=2x1", "--statistics", "median", "--csv", "-"]) == 0
    assert capsys.readouterr().out.count("\n") == 1 + 9
    assert main(["export", str(noisy), "--statistics", "mode"]) == 2
    assert ", ".join(STATISTICS) in capsys.readouterr().err
    assert main(["export", str(noisy), "-o", str(tmp_path / "t.xls")]) == 2
    assert ".csv, .parquet or .jsonl" in capsys.readouterr().err


def test_kernels(tmp_path):
    parameters = {"kernels_branch": "sel"}
    path = synthetic.write(tmp_path / "k.h5", [synthetic.kernel_point({"fused": 2e-6, "sdpa": 1e-5}, **parameters)])
    synthetic.write(tmp_path / "d.h5", [synthetic.point(synthetic.times(1, 8, 1e-4))])
    frame = nsa_analysis.export(nsa_analysis.read([path, tmp_path / "d.h5"]), ("median",))
    kernels = frame[(frame["mode"] == "kernels") & (frame["rank"] == "slowest")].set_index("stage").value
    assert kernels.to_dict() == {"fused": 2e-6, "sdpa": 1e-5}
