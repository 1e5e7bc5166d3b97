"""Order statistics of samples (docs/METRICS.md), vectorised over tables."""

import functools
import math

import numpy as np


@functools.cache
def interval_ranks(n, alpha=0.05):
    """1-based (low, high): the order statistics that bound the median with confidence 1 - alpha, at least 95%.

    low is the largest k with P(Binomial(n, 1/2) < k) <= alpha / 2, high is n + 1 - k. (0, 0) where there is no such k:
    below n = 6 for 95%, below n = 9 for 99.5%.
    """
    if n < 6:
        return 0, 0
    j = np.arange(n // 2)
    ratios = np.log((n - j) / (j + 1))  # log C(n, j+1) - log C(n, j)
    log_terms = np.concatenate([[0.0], np.cumsum(ratios)]) - n * math.log(2)
    below = np.cumsum(np.exp(log_terms))  # below[i] = P(Binomial < i + 1)
    k = int(np.searchsorted(below, alpha / 2 * (1 + 1e-9), side="right"))
    return (k, n + 1 - k) if k else (0, 0)


def median_and_interval(samples, alpha=0.05):
    """(n, median, low, high) over the last axis of `samples`, without NaN samples; confidence 1 - alpha.

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
    ranks = np.array([interval_ranks(int(c), alpha) for c in counts]).reshape(-1, 2)[np.searchsorted(counts, n)]
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


STATISTICS = ("n", "median", "low", "high", "min", "p95", "p99", "cv")


def summaries(samples):
    """Statistics (docs/METRICS.md) over the last axis, without NaN samples: {name of STATISTICS: array}."""
    ordered = np.sort(np.asarray(samples, dtype=float), axis=-1)  # NaN last
    n, median, low, high = median_and_interval(ordered)

    def nearest_rank(percent):
        if ordered.shape[-1] == 0:
            return np.full(n.shape, np.nan)
        index = np.maximum(-(-n * percent // 100) - 1, 0)
        return np.take_along_axis(ordered, index[..., None], axis=-1)[..., 0]

    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(ordered, axis=-1) / n
        variance = np.nansum((ordered - mean[..., None]) ** 2, axis=-1) / np.where(n > 1, n - 1, np.nan)
        cv = np.sqrt(variance) / mean
    values = (n, median, low, high, nearest_rank(0), nearest_rank(95), nearest_rank(99), cv)
    return dict(zip(STATISTICS, values))


def summarise(samples):
    """Summary of a vector of samples (docs/METRICS.md): n, median, low, high, min, p95, p99, cv."""
    table = summaries(np.ravel(samples))
    return {name: int(value) if name == "n" else float(value) for name, value in table.items()}
