"""Order statistics of samples (docs/METRICS.md), vectorised over tables."""

import functools
import math

import numpy as np


@functools.cache
def interval_ranks(n):
    """1-based (low, high): the order statistics that bound the median with at least 95% confidence.

    low is the largest k with P(Binomial(n, 1/2) < k) <= 0.025, high is n + 1 - k. (0, 0) below n = 6: no such k.
    """
    if n < 6:
        return 0, 0
    j = np.arange(n // 2)
    steps = np.log((n - j) / (j + 1))  # log C(n, j+1) - log C(n, j)
    log_terms = np.concatenate([[0.0], np.cumsum(steps)]) - n * math.log(2)
    below = np.cumsum(np.exp(log_terms))  # below[i] = P(Binomial < i + 1)
    k = int(np.searchsorted(below, 0.025 * (1 + 1e-9), side="right"))
    return k, n + 1 - k


def median_and_interval(samples):
    """(n, median, low, high) over the last axis of `samples`, without NaN samples.

    Each is an array of the shape without that axis; NaN where there is no median or interval.
    """
    ordered = np.sort(np.asarray(samples, dtype=float), axis=-1)  # NaN last
    n = np.count_nonzero(~np.isnan(ordered), axis=-1)
    if ordered.shape[-1] == 0:
        empty = np.full(n.shape, np.nan)
        return n, empty, empty.copy(), empty.copy()

    def at(index):
        return np.take_along_axis(ordered, np.maximum(index, 0)[..., None], axis=-1)[..., 0]

    counts = np.unique(n)
    ranks = np.array([interval_ranks(int(c)) for c in counts]).reshape(-1, 2)[np.searchsorted(counts, n)]
    median = np.where(n > 0, (at((n - 1) // 2) + at(n // 2)) / 2, np.nan)
    low = np.where(ranks[..., 0] > 0, at(ranks[..., 0] - 1), np.nan)
    high = np.where(ranks[..., 0] > 0, at(ranks[..., 1] - 1), np.nan)
    return n, median, low, high


def median_of_others(values):
    """For each value of the last axis the median of the other ones, NaN left out; of a value alone itself.

    With two values this is the other one. The median of all of them would contain the value itself.
    """
    values = np.asarray(values, dtype=float)
    place = np.argsort(np.argsort(values, axis=-1), axis=-1)  # NaN last
    ordered = np.sort(values, axis=-1)
    others = np.count_nonzero(~np.isnan(values), axis=-1)[..., None] - 1

    def other(index):  # the index-th value in order without the own one
        index = np.maximum(np.where(index >= place, index + 1, index), 0)
        return np.take_along_axis(ordered, np.minimum(index, values.shape[-1] - 1), axis=-1)

    middle = (other((others - 1) // 2) + other(others // 2)) / 2
    return np.where(np.isnan(values), np.nan, np.where(others < 1, values, middle))


def summarise(samples):
    """Summary of a vector of samples (docs/METRICS.md): n, median, low, high, min, p95, p99, cv."""
    values = np.sort(np.asarray(samples, dtype=float).ravel())
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return {"n": 0, **dict.fromkeys(("median", "low", "high", "min", "p95", "p99", "cv"), math.nan)}
    _, median, low, high = median_and_interval(values)

    def nearest_rank(percent):
        return float(values[-(-n * percent // 100) - 1])

    cv = float(values.std(ddof=1) / values.mean()) if n > 1 else math.nan
    return {
        "n": n,
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "min": float(values[0]),
        "p95": nearest_rank(95),
        "p99": nearest_rank(99),
        "cv": cv,
    }
