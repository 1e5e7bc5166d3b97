"""Comparison of two sets of runs: the ratio of their times with an interval, and a verdict whose error rate is known.

A run counts once, by its median, because the steps of one run share what makes runs differ: placement, clocks, load.
The interval of the ratio is that of the rank-sum test (Mann and Whitney, 1947; Hodges and Lehmann, 1963), or of the
sign test for runs that were made in turns. Both assume no distribution: where the runs of both sides are equal, the
probability that the interval does not hold 1 is at most ERROR_RATE (docs/METRICS.md, "Comparing runs").
"""

import functools
import math

import numpy as np
import pandas as pd

from ..data.reading import STAGES
from ..data.series import KERNEL_SHAPE, SWEPT, identity, leave_out, title, titles
from ..data.statistics import interval_ranks, median_and_interval
from ..data.tables import NAN
from ..errors import AnalysisError

ERROR_RATE = 0.005  # of calling equal runs different; half of what METRICS.md promises, as runs are not independent
PROGRAM = ("device", "backend", "git_commit")  # of an identity; a comparison is between these


@functools.cache
def rank_sum_index(a, b, alpha):
    """k: the k-th smallest and k-th largest of the a·b differences bound their median with confidence 1 - alpha.

    k - 1 is the largest u with P(U <= u) <= alpha / 2, U of the rank-sum test with a and b values. 0: no such k.
    """
    ways = np.zeros(a * b + 1)  # ways[u]: the number of orders with U = u, by the recursion over the a values
    ways[0] = 1
    for i in range(1, a + 1):  # Gaussian binomial coefficient: product of (1 - x^(b+i)) / (1 - x^i)
        for u in range(a * b, b + i - 1, -1):
            ways[u] -= ways[u - b - i]
        for u in range(i, a * b + 1):
            ways[u] += ways[u - i]
    below = np.cumsum(ways) / math.comb(a + b, a)
    return int(np.searchsorted(below, alpha / 2 * (1 + 1e-9), side="right"))


def ratio_of_runs(a, b, paired=False, alpha=ERROR_RATE):
    """(ratio, low, high) of b over a, medians in s of the runs of each side; low and high are NaN for too few runs.

    With `paired`, run i of a was made next to run i of b, and the ratios of the pairs count. The interval needs 6 runs
    a side, or 9 pairs.
    """
    a, b = np.log(a), np.log(b)
    if paired:
        n = min(len(a), len(b))
        differences = np.sort(b[:n] - a[:n])
        k = interval_ranks(n, alpha)[0]
    else:
        differences = np.sort((b[None, :] - a[:, None]).ravel())
        k = rank_sum_index(len(a), len(b), alpha)
    ratio = float(np.exp(np.median(differences)))
    if k == 0:
        return ratio, NAN, NAN
    return ratio, float(np.exp(differences[k - 1])), float(np.exp(differences[-k]))


def ratio_of_samples(a, b, run_noise, alpha=ERROR_RATE):
    """(ratio, low, high) of medians of the samples of single runs that differ by at most run_noise between runs."""
    _, median_a, low_a, high_a = median_and_interval(a, alpha / 2)
    _, median_b, low_b, high_b = median_and_interval(b, alpha / 2)
    wide = 1 + run_noise
    return float(median_b / median_a), float(low_b / high_a / wide), float(high_b / low_a * wide)


def verdict(low, high, same):
    """SLOWER or FASTER where the interval does not hold 1, SAME where it lies within 1 ± same, else UNCLEAR."""
    if math.isnan(low) or math.isnan(high):
        return "UNCLEAR"
    if low >= 1 / (1 + same) and high <= 1 + same:
        return "SAME"
    return "SLOWER" if low > 1 else "FASTER" if high < 1 else "UNCLEAR"


def pair_key(point, ignored):
    """(values of a series without the program, layout, sizes): what two points must share to be compared."""
    same = {k: v for k, v in identity(point).items() if k not in PROGRAM and k not in ignored and k != "input.file"}
    same["input_file_sha256"] = point.run.attributes.get("input_file_sha256", "")
    sizes = SWEPT + (KERNEL_SHAPE if point.kind == "kernels" else ())
    return tuple(same.items()), point.layout, tuple(str(point.get(k)) for k in sizes if k not in ignored)


def timed_series(point, stages):
    """{(mode, stage): samples in s} of a point: the step, with `stages` the stages; of kernels each."""
    if point.kernels:
        return {("kernels", name): result["samples"] for name, result in point.kernels.items()}
    found = {("total" if point.times("total") else "branches", "step"): point.step_samples()}
    if stages and point.times("branches"):
        slowest = point.times("branches").slowest
        found |= {("branches", s): slowest[i] for i, s in enumerate(STAGES[:-1]) if not np.isnan(slowest[i]).all()}
    return found


def by_key(points, ignored):
    """{key: points in the order of their runs' starts} of the VALID, timed points."""
    points = leave_out(points, lambda p: p.valid, "INVALID")
    points = leave_out(points, lambda p: p.modes or p.kernels, "never timed")
    groups = {}
    for p in sorted(points, key=lambda p: (str(p.run.attributes.get("start", "")), p.run.path, p.index)):
        groups.setdefault(pair_key(p, ignored), []).append(p)
    return groups


def nearest(side_a, side_b):
    """What differs between the two points, one of each side, that differ in the fewest parameters."""
    pairs = [(dict(x[0]), dict(y[0])) for x in side_a for y in side_b][:10_000]
    if not pairs:
        return "one side has no VALID point with times"
    names = min(([k for k in {**x, **y} if x.get(k) != y.get(k)] for x, y in pairs), key=len)
    return f"they differ in {', '.join(names[:5])}" if names else "layouts or sizes differ"


def compare(a, b, stages=False, paired=False, run_noise=None, same=0.02, ignored=()):
    """(table, points of a alone, points of b alone): one row per point and timed series that both sides measured.

    Columns: series, the sizes and layout of the point, mode, stage; runs, samples n and time in s of both sides, `_a`
    and `_b`; ratio of b over a with ratio_low and ratio_high, and verdict. `run_noise`: by how much runs differ
    at most, as a fraction; it allows a verdict where there are too few runs for an interval and none is NOISY.
    `ignored`: parameters that may differ. Raises AnalysisError where nothing can be compared.
    """
    side_a, side_b = by_key(a, ignored), by_key(b, ignored)
    common = [k for k in side_a if k in side_b]
    groups = {}  # by what a series shares, the first part of a key
    for key in common:
        groups.setdefault(key[0], []).append(side_a[key][0])
    names = dict(zip(groups, titles(list(groups.values()), lambda p: title(p, device=False))))
    rows = []
    for key in common:
        found = compare_points(side_a[key], side_b[key], stages, paired, run_noise, same)
        rows += [{"series": names[key[0]]} | row for row in found]
    if common and not rows:
        raise AnalysisError("the points that both sides hold have no times above 0; give runs that were timed")
    if not rows:
        raise AnalysisError(
            f"the two sides have no point in common ({nearest(side_a, side_b)}); "
            "compare runs of one input, or name parameters that may differ with --ignore NAME"
        )
    alone = [[p for k, group in one.items() if k not in other for p in group]
             for one, other in ((side_a, side_b), (side_b, side_a))]  # fmt: skip
    return pd.DataFrame(rows), *alone


def compare_points(a, b, stages, paired, run_noise, same):
    """Rows of one point from its runs of both sides."""
    first, rows = a[0], []
    series_a, series_b = ([timed_series(p, stages) for p in side] for side in (a, b))
    for mode, stage in series_a[0]:
        samples_a, samples_b = ([s[mode, stage] for s in side if (mode, stage) in s] for side in (series_a, series_b))
        medians_a, medians_b = (
            [m for s in side if (m := float(median_and_interval(s)[1])) > 0] for side in (samples_a, samples_b)
        )
        if not (medians_a and medians_b):
            continue
        ratio, low, high = ratio_of_runs(medians_a, medians_b, paired)
        if math.isnan(low) and run_noise is not None and not any(p.get("noisy") for p in (*a, *b)):
            ratio, low, high = ratio_of_samples(np.concatenate(samples_a), np.concatenate(samples_b), run_noise)
        rows.append(
            {
                **{name: first.get(f"run.{name}", NAN) for name in ("context", "batch")},
                "forced": first.get("run.force_branch", "none"),
                **{k.replace("kernels.", ""): first.get(k) for k in KERNEL_SHAPE if first.kind == "kernels"},
                "layout": first.layout,
                "mode": mode,
                "stage": stage,
                "runs_a": len(medians_a),
                "runs_b": len(medians_b),
                "n_a": sum(np.count_nonzero(~np.isnan(s)) for s in samples_a),
                "n_b": sum(np.count_nonzero(~np.isnan(s)) for s in samples_b),
                "time_a": float(np.median(medians_a)),
                "time_b": float(np.median(medians_b)),
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
                "verdict": verdict(low, high, same),
            }
        )
    return rows


def sides(a, b):
    """DataFrame, one row per side and program: device, machine, commit, compiler, runs, and first and last start."""
    rows = []
    for name, points in ("A", a), ("B", b):
        runs = {p.run.path: p.run for p in points}
        programs = {}
        for run in runs.values():
            programs.setdefault((run.device, run.attributes.get("git_commit", "unknown")), []).append(run)
        for (device, commit), members in programs.items():
            starts = sorted(str(r.attributes.get("start", "")) for r in members)
            rows.append(
                {
                    "side": name,
                    "device": device,
                    "machine": ", ".join(dict.fromkeys(h for r in members for h in r.system.get("host", []))),
                    "commit": commit,
                    "compiler": ", ".join(dict.fromkeys(str(r.attributes.get("compiler", "")) for r in members)),
                    "runs": len(members),
                    "first": starts[0],
                    "last": starts[-1],
                }
            )
    return pd.DataFrame(rows)
