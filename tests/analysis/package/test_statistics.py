"""Order statistics against independent definitions and the examples of docs/METRICS.md."""

import fractions
import math
import random
import statistics

import numpy as np
import pytest
from nsa_analysis.data.statistics import interval_ranks, median_and_interval, median_of_others, summarise


@pytest.mark.parametrize(
    "n, ranks", [(5, (0, 0)), (6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (30, (10, 21)), (50, (18, 33)), (100, (40, 61))]
)
def test_interval_ranks_of_the_document(n, ranks):
    assert interval_ranks(n) == ranks


@pytest.mark.parametrize("n", [*range(6, 60), 301])
def test_interval_ranks_by_exact_binomials(n):
    def below(k):
        return fractions.Fraction(sum(math.comb(n, i) for i in range(k)), 2**n)

    k = max(k for k in range(1, n) if below(k) <= fractions.Fraction(25, 1000))
    assert interval_ranks(n) == (k, n + 1 - k)


def test_interval_of_very_many_samples():
    low, high = interval_ranks(1_000_000)
    assert low + high == 1_000_001 and low == pytest.approx(500_000 - 1.96 * 500, abs=2)


def test_median_and_interval_by_row():
    rng = random.Random(1)
    rows = [[rng.random() for _ in range(n)] for n in (24, 24, 24)]
    n, median, low, high = median_and_interval(rows)
    for i, row in enumerate(rows):
        assert n[i] == 24 and median[i] == statistics.median(row)
        assert (low[i], high[i]) == (sorted(row)[6], sorted(row)[17])  # n = 24: samples 7 and 18


def test_nan_is_ignored():
    n, median, low, high = median_and_interval([[3.0, np.nan, 1.0, 2.0], [np.nan] * 4, [1, 2, 3, 4]])
    assert list(n) == [3, 0, 4]
    assert median[0] == 2 and math.isnan(median[1]) and median[2] == 2.5
    assert np.isnan(low).all() and np.isnan(high).all()  # none below 6


def test_summary_row():
    samples = [float(v) for v in range(1, 101)]
    random.Random(2).shuffle(samples)
    row = summarise([*samples, math.nan])
    assert (row["n"], row["median"], row["low"], row["high"], row["min"], row["p95"], row["p99"]) == (
        100,
        50.5,
        40,
        61,
        1,
        95,
        99,
    )
    assert row["cv"] == pytest.approx(statistics.stdev(samples) / statistics.mean(samples))
    assert summarise([])["n"] == 0 and math.isnan(summarise([])["median"])


def test_median_of_others():
    """Against the definition: the median of the list without the value, for every length, with ties and NaN."""
    rng = random.Random(4)
    for n in range(2, 9):
        values = [float(rng.randrange(4)) for _ in range(n)]
        expected = [statistics.median(values[:i] + values[i + 1 :]) for i in range(n)]
        assert median_of_others(values).tolist() == expected
    assert median_of_others([3.0]).tolist() == [3.0]
    assert median_of_others([[1.0, np.nan, 5.0, 2.0]]).tolist()[0][::2] == [3.5, 1.5]
