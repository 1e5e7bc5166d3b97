"""Why a step on several ranks is not faster by the ratio of the ranks: its lost efficiency, split by cause.

Linear scaling would take base time x base ranks / ranks. What a step takes beyond it is lost, and is split into causes
that are measured independently of it, and a rest (docs/METRICS.md, "Why not linear").
"""

import numpy as np
import pandas as pd

from ..data.reading import STAGES
from ..data.series import keep_latest, one_series
from ..data.tables import NAN, identity_row
from .cost_model import non_negative_fit
from .roofline import plan_of, step_bytes
from .scaling import baseline, measured_time, strong_groups
from .stages import with_stages

CAUSES = ("exchange", "fixed_cost", "imbalance", "overlap", "rest")


def work_and_exchange(point):
    """(mean over ranks, slowest rank, exchange) in s, of mode `branches`.

    Of each rank's own work, the median of the sum of its stages without `comm`. Exchange: the least median of `comm` of
    any rank, since the others wait there for the slowest.
    """
    times = point.times("branches")
    comm = times.rank_median[STAGES.index("comm")]
    exchange = float(np.nanmin(comm)) if point.ranks > 1 and not np.isnan(comm).all() else 0.0
    return float(np.nanmean(times.compute_median)), float(np.nanmax(times.compute_median)), exchange


def fixed_time(points):
    """Seconds of a decode step that do not shrink with its bytes: a of the fit time = a + b x bytes, a and b >= 0.

    Over points of one layout and batch that differ in context; NaN for fewer than two contexts.
    """
    usable = [p for p in points if p.valid and p.bytes is not None]
    found = {p["run.context"]: (1.0, float(step_bytes(p).max()), measured_time(p, "step")[0]) for p in usable}
    table = np.array([row for row in found.values() if np.isfinite(row).all()]).reshape(-1, 3)
    return float(non_negative_fit(table[:, :2], table[:, 2])[0]) if len(table) > 1 else NAN


def linearity(points):
    """DataFrame, one row per VALID point with more ranks than the baseline of its size (scaling.baseline).

    Columns: base_ranks, time and base_time of the step in s, efficiency, and as fractions of the step `lost`,
    1 - efficiency, with its CAUSES, which add up to it (docs/METRICS.md). fixed_cost is NaN where a fused baseline has
    one context. `best`: the fastest layout on its rank count.
    """
    points = keep_latest(one_series(with_stages(points), "decomposition of efficiency"))
    points = [p for p in points if measured_time(p, "step")[0] > 0 and work_and_exchange(p)[1] > 0]
    rows = []
    for members in strong_groups(points).values():
        base = baseline(members)
        fastest = {r: baseline([p for p in members if p.ranks == r]) for r in {p.ranks for p in members}}
        more = [p for p in members if base and p.valid and not p.run.oversubscribed and p.ranks > base.ranks]
        for p in sorted(more, key=lambda p: (p.ranks, p["heads"])):
            same = ("run.batch", "run.force_branch")
            alike = [q for q in points if q.layout == base.layout and all(q.get(k) == base.get(k) for k in same)]
            rows.append(identity_row(p) | lost_efficiency(p, base, fixed_time(alike)) | {"best": p is fastest[p.ranks]})
    return pd.DataFrame(rows)


def lost_efficiency(point, base, fixed):
    """Columns of `linearity` for one point; `fixed` is the fixed time of a fused step in s."""
    time, base_time = measured_time(point, "step")[0], measured_time(base, "step")[0]
    ideal = base.ranks / point.ranks  # time over that of the baseline
    mean, slowest, exchange = work_and_exchange(point)
    base_mean, base_slowest, base_exchange = work_and_exchange(base)
    # A whole step fuses stages: its work takes this part of what the stages take in sequence, by the baseline.
    fused = base_time / (base_slowest + base_exchange)
    if plan_of(base) == "staged":  # the stages show what does not shrink
        fixed_cost = fused * (mean - base_mean * ideal)
    else:
        fixed_cost = fixed * (1 - ideal)
    lost = time - base_time * ideal
    causes = {
        "exchange": exchange - base_exchange * ideal,
        "fixed_cost": fixed_cost,
        "imbalance": fused * (slowest - mean - (base_slowest - base_mean) * ideal),
        "overlap": -min(exchange, max(0.0, fused * slowest + exchange - time)),
    }
    return {
        "base_ranks": base.ranks,
        "time": time,
        "base_time": base_time,
        "efficiency": 1 - lost / time,
        "lost": lost / time,
        **{name: seconds / time for name, seconds in causes.items()},
        "rest": (lost - np.nansum([*causes.values()])) / time,
    }
