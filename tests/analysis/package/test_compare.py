"""`compare`: intervals against brute force, the error rate over equal runs, slower runs found, the command."""

import itertools
import json
import math

import h5py
import nsa_analysis
import numpy as np
import pandas as pd
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.errors import AnalysisError
from nsa_analysis.models.compare import rank_sum_index, ratio_of_runs, verdict


@pytest.mark.parametrize("sizes", [(1, 1), (3, 3), (5, 5), (5, 6), (6, 6), (3, 11), (3, 12)])
def test_the_rank_sum_interval_by_counting_every_order(sizes):
    """P(U < k) <= 0.25% over all orders of a and b values, and k is the largest such number."""
    a, b = sizes
    smaller = []  # U of every choice of the places of the a values
    for places in itertools.combinations(range(a + b), a):
        smaller.append(sum(other < place for place in places for other in range(a + b) if other not in places))
    below = [sum(u < k for u in smaller) / len(smaller) for k in range(a * b + 2)]
    k = rank_sum_index(a, b, 0.005)
    assert below[k] <= 0.0025 < below[k + 1]
    assert (k == 0) == math.isnan(ratio_of_runs(np.ones(a), np.ones(b))[1])


def test_the_interval_is_of_the_ratios_of_all_pairs_of_runs():
    a, b = np.array([10.0, 11, 12, 13, 14, 15]), np.array([20.0, 21, 22, 23, 24, 25])
    ratios = np.sort((b[None, :] / a[:, None]).ravel())
    assert ratio_of_runs(a, b) == pytest.approx((np.exp(np.median(np.log(ratios))), ratios[1], ratios[-2]))
    nine = np.arange(1.0, 10)
    assert ratio_of_runs(nine, nine * 1.1, paired=True) == pytest.approx((1.1, 1.1, 1.1))
    assert math.isnan(ratio_of_runs(nine[:8], nine[:8], paired=True)[1])


def test_verdicts():
    assert verdict(1.01, 1.03, 0.02) == "SLOWER" and verdict(0.9, 0.97, 0.02) == "FASTER"
    assert verdict(0.99, 1.01, 0.02) == verdict(1.001, 1.01, 0.02) == "SAME"
    assert verdict(0.97, 1.03, 0.02) == verdict(math.nan, math.nan, 0.02) == "UNCLEAR"


def called_different(rng, runs, paired, slowdown, noise, trials):
    """Part of comparisons of simulated runs that are called different: a run's median varies by `noise`, and one run in
    five takes up to three times as long, as on a machine that others use."""
    found = 0
    for _ in range(trials):
        load = 1 + 2 * rng.random((2, runs)) * (rng.random((2, runs)) < 0.2)
        a, b = np.exp(noise * rng.standard_normal((2, runs))) * load
        ratio, low, high = ratio_of_runs(a, b * slowdown, paired)
        found += verdict(low, high, 0.0) in ("SLOWER", "FASTER")
    return found / trials


@pytest.mark.parametrize(("runs", "paired"), [(6, False), (8, False), (9, True), (12, True)])
def test_equal_runs_are_called_different_in_at_most_one_of_a_hundred(runs, paired):
    assert called_different(np.random.default_rng(7), runs, paired, 1.0, 0.03, 4000) <= 0.005


def test_two_percent_slower_is_found_where_runs_agree_within_a_fifth_of_it():
    rng = np.random.default_rng(3)

    def found():
        a, b = np.exp(0.004 * rng.standard_normal((2, 8)))
        return verdict(*ratio_of_runs(a, 1.02 * b)[1:], same=0.005) == "SLOWER"

    assert sum(found() for _ in range(400)) / 400 >= 0.95


def folder(path, times, commit="c0ffee", **parameters):
    """A folder with one run for each of `times`, seconds of a step on one rank and a tenth of it in attend_sel."""
    path.mkdir()
    for i, seconds in enumerate(times):
        table = synthetic.times(1, 11, seconds * (1 + 1e-3 * np.arange(-5, 6)), attend_sel=seconds / 10)
        start = f"2026-01-01T00:{i:02d}:00Z"
        synthetic.write(path / f"{i}.h5", [synthetic.point(table, **parameters)], commit=commit, start=start)
    return str(path)


def test_command(tmp_path, capsys):
    a = folder(tmp_path / "a", [1e-4, 1.001e-4, 0.999e-4, 1.002e-4, 0.998e-4, 1e-4])
    b = folder(tmp_path / "b", [1.1e-4, 1.101e-4, 1.099e-4, 1.102e-4, 1.098e-4, 1.1e-4], commit="beef")
    assert main(["compare", a, b, "--stages"]) == 0
    said = capsys.readouterr().out
    assert "c0ffee" in said and "beef" in said and "Test GPU" in said and "node" in said and said.count("SLOWER") == 3
    assert main(["compare", a, b, "--csv", str(tmp_path / "c.csv"), "--fail-above", "5%"]) == 1
    assert "1 of 1 are slower by more than 5%" in capsys.readouterr().err
    row = pd.read_csv(tmp_path / "c.csv").iloc[0]
    assert (row.runs_a, row.n_b, row.verdict) == (6, 66, "SLOWER") and row.ratio == pytest.approx(1.1)
    times_a, times_b = [1.0, 1.001, 0.999, 1.002, 0.998, 1.0], [1.1, 1.101, 1.099, 1.102, 1.098, 1.1]
    ratios = sorted(y / x for x in times_a for y in times_b)
    assert (row.ratio_low, row.ratio_high) == pytest.approx((ratios[1], ratios[-2]))
    assert main(["compare", a, b, "--fail-above", "0.12"]) == 0
    assert main(["compare", b, a, "--fail-above", "0%"]) == 0  # faster
    assert main(["compare", a, a, "--json", "-"]) == 0
    (same,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert same["verdict"] == "SAME" and same["ratio"] == 1


def test_single_runs_need_the_noise_between_runs(tmp_path):
    a, b = (nsa_analysis.read(folder(tmp_path / n, [t])) for n, t in (("a", 1e-4), ("b", 1.1e-4)))
    (row,) = nsa_analysis.compare(a, b)[0].to_dict("records")
    assert row["verdict"] == "UNCLEAR" and row["ratio"] == pytest.approx(1.1) and math.isnan(row["ratio_low"])
    (row,) = nsa_analysis.compare(a, b, run_noise=0.02)[0].to_dict("records")
    # Order statistics 1 and 11 of 11 samples, half a percent to each side, and 2%.
    assert row["verdict"] == "SLOWER" and row["ratio_low"] == pytest.approx(1.1 * 0.995 / 1.005 / 1.02)
    (row,) = nsa_analysis.compare(a, b, run_noise=0.12)[0].to_dict("records")
    assert row["verdict"] == "UNCLEAR"
    b[0].parameters["noisy"] = "total: steal of 12%"
    (row,) = nsa_analysis.compare(a, b, run_noise=0.02)[0].to_dict("records")
    assert row["verdict"] == "UNCLEAR" and math.isnan(row["ratio_low"])


def test_only_equal_points_are_compared(tmp_path, capsys):
    a, b = folder(tmp_path / "a", [1e-4]), folder(tmp_path / "b", [1e-4], route_sel="sdpa")
    assert main(["compare", a, b]) == 2
    assert "no point in common (they differ in route.sel)" in capsys.readouterr().err
    assert main(["compare", a, b, "--ignore", "route.sel"]) == 0
    more = folder(tmp_path / "c", [1e-4], run_context=1024)
    with h5py.File(tmp_path / "c/0.h5", "r+") as file:
        file.copy("points/0000", "points/0001")
        file["points/0001"].attrs["run.context"] = 65536
        file.copy("points/0000", "points/0002")
        file["points/0002"].attrs.update({"validity": "INVALID", "run.context": 2048})
    assert main(["compare", a, more]) == 0
    said = capsys.readouterr().err
    assert f"1 points are only in {more}" in said and "1 of 3 points are left out, INVALID" in said


@pytest.mark.parametrize("option", [["--fail-above", "much"], ["--same", "1000%"], ["--run-noise", "x%"]])
def test_bad_fractions(tmp_path, capsys, option):
    a = folder(tmp_path / "a", [1e-4])
    assert main(["compare", a, a, *option]) == 2
    assert option[0] in capsys.readouterr().err


def test_kernels_are_compared_by_implementation(tmp_path):
    for name, fused in ("a", 1e-6), ("b", 2e-6):
        point = synthetic.kernel_point({"fused": fused, "sdpa": 8e-6}, kernels_branch="sel", kernels_rows=256)
        synthetic.write(tmp_path / f"{name}.h5", [point])
    a, b = (nsa_analysis.read(tmp_path / f"{name}.h5") for name in "ab")
    frame = nsa_analysis.compare(a, b, run_noise=0.01)[0].set_index("stage")
    assert frame.verdict.to_dict() == {"fused": "SLOWER", "sdpa": "SAME"}
    with pytest.raises(AnalysisError, match="no point in common"):
        nsa_analysis.compare(a, [])
