"""Strong scaling (fixed problem size) and weak scaling (fixed problem size per rank).

Speedup, efficiency and serial fraction come from medians of the slowest rank. INVALID points have a row and a time, but
no speedup, and are no baseline.
"""

import math

import pandas as pd

from ..data.reading import STAGES
from ..data.series import SWEPT, format_count, keep_latest, leave_out, one_series, size_text
from ..data.tables import NAN, identity_row, imbalance, rank_compute_times, stage_share
from ..errors import AnalysisError


def karp_flatt(speedup, ratio):
    """Serial fraction (1/speedup - 1/ratio) / (1 - 1/ratio); `ratio` is the rank count over that of the baseline.

    Karp and Flatt, CACM 33(5), 1990. NaN at the baseline itself.
    """
    return (1 / speedup - 1 / ratio) / (1 - 1 / ratio) if ratio > 1 else NAN


def measured_time(point, stage):
    """(median, low, high) in seconds: `step` of mode `total`, stages of mode `branches`."""
    times = stage == "step" and point.times("total") or point.times("branches")
    if times is None:
        return NAN, NAN, NAN
    return tuple(float(times.summary[name][STAGES.index(stage)]) for name in ("median", "low", "high"))


def strong_groups(points):
    """{curve name: points} of equal context, batch and forced branch."""
    groups = {}
    for p in points:
        groups.setdefault(tuple(p.get(k) for k in SWEPT), []).append(p)
    return {f"strong, {size_text(g[0])}": g for g in groups.values()}


def weak_groups(points):
    """{curve name: points} of equal work per rank: the batch or, in decode, the context grows with the ranks."""
    groups = {}
    for p in points:
        context, batch, forced = (p.get(k) for k in SWEPT)
        if not (context and batch):
            continue
        also = "" if forced == "none" else f", forced {forced}"
        name = f"weak, context {format_count(context)}, batch {batch / p.ranks:g} a rank{also}"
        groups.setdefault((1, batch / p.ranks, name), []).append(p)
        if p.kind == "decode" and context % p.ranks == 0:
            size = context // p.ranks
            name = f"weak, batch {batch}, context {format_count(size)} a rank{also}"
            groups.setdefault((0, size, name), []).append(p)
    return {name: members for (*_, name), members in sorted(groups.items())}


def baseline(points):
    """The fastest VALID point on the fewest ranks whose cores are not oversubscribed, else None."""
    timed = [p for p in points if p.valid and not p.run.oversubscribed and measured_time(p, "step")[0] > 0]
    if not timed:
        return None
    fewest = min(p.ranks for p in timed)
    return min((p for p in timed if p.ranks == fewest), key=lambda p: measured_time(p, "step")[0])


def compare(point, base, stage, weak):
    """Columns that compare a stage of a point with the same stage of the baseline."""
    median, low, high = measured_time(point, stage)
    row = {
        "stage": stage,
        "time": median,
        "time_low": low,
        "time_high": high,
        "base_ranks": NAN,
        "ideal_time": NAN,
        "speedup": NAN,
        "speedup_low": NAN,
        "speedup_high": NAN,
        "efficiency": NAN,
        "serial_fraction": NAN,
    }
    if base is None or not point.valid or point.run.oversubscribed:
        return row
    base_median, base_low, base_high = measured_time(base, stage)
    ratio = point.ranks / base.ranks
    row["base_ranks"] = base.ranks
    if not (median > 0 and base_median > 0):
        return row
    factor = ratio if weak else 1.0  # weak: `ratio` times the work in equal time is a speedup of `ratio`
    speedup = factor * base_median / median
    row |= {
        "ideal_time": base_median * factor / ratio,
        "speedup": speedup,
        "efficiency": speedup / ratio,
        "speedup_low": factor * base_low / high,
        "speedup_high": factor * base_high / low,
    }
    if point is base:
        row |= {"speedup_low": 1.0, "speedup_high": 1.0}
    elif not weak:
        row["serial_fraction"] = karp_flatt(speedup, ratio)
    return row


def stage_imbalance(point, stage):
    """(max/median over ranks, slowest rank) of a stage; for `step`, of the sum of COMPUTE_STAGES."""
    if stage == "step":
        return imbalance(rank_compute_times(point))
    times = point.times("branches")
    return (NAN, -1) if times is None else imbalance(times.rank_median[STAGES.index(stage)])


def scaling(points, kind="both", per_stage=True):
    """DataFrame, one row per (curve, point, stage); `kind` is "strong", "weak" or "both".

    Columns besides those of the point: curve; stage (`step` is the whole step in mode `total`, others are of mode
    `branches`); time with its 95% interval time_low, time_high, and ideal_time, in s; speedup over the fastest layout
    on base_ranks ranks, with bounds speedup_low and speedup_high from both intervals (at least 90% confidence);
    efficiency; serial_fraction (strong); comm_share of the sum of all stages; max_over_median over ranks; crowded: the
    cores are oversubscribed, so the point is not compared; best: the fastest VALID layout on its rank count.

    Raises AnalysisError that says what differs for points of several devices, commits or inputs.
    """
    points = leave_out(points, lambda p: p.modes, "never timed as a step")
    if not points:
        raise AnalysisError(
            "no point of these files was timed (needle and kernel points are not); give a decode or prefill run"
        )
    points = keep_latest(one_series(points, "scaling curve"))
    curves = {}
    if kind in ("strong", "both"):
        curves |= strong_groups(points)
    if kind in ("weak", "both"):
        curves |= {name: g for name, g in weak_groups(points).items() if len({p.ranks for p in g}) > 1}
    if kind == "weak" and not curves:
        raise AnalysisError(
            "these files have no weak scaling (no two rank counts with equal work per rank); "
            "run contexts or batches that grow with the ranks"
        )
    rows = []
    for name, members in curves.items():
        base = baseline(members)
        fastest = {r: baseline([p for p in members if p.ranks == r]) for r in {p.ranks for p in members}}
        for p in sorted(members, key=lambda p: (p.ranks, p["heads"])):
            identity = {"curve": name} | identity_row(p)
            for stage in ("step", *STAGES[:-1]) if per_stage else ("step",):
                row = compare(p, base, stage, name.startswith("weak"))
                if stage != "step" and math.isnan(row["time"]):
                    continue
                ratio, slowest = stage_imbalance(p, stage)
                rows.append(
                    identity
                    | row
                    | {
                        "crowded": bool(p.run.oversubscribed),
                        "comm_share": stage_share(p, ("comm",)) if stage == "step" else NAN,
                        "max_over_median": ratio,
                        "slowest_rank": slowest,
                        "best": p is fastest[p.ranks],
                    }
                )
    return pd.DataFrame(rows)
