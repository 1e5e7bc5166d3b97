"""Balance over ranks: time of each rank and stage against the median, and stragglers."""

import numpy as np
import pandas as pd

from ..data.reading import COMPUTE_STAGES, STAGES
from ..data.series import leave_out
from ..data.statistics import median_of_others
from ..data.tables import identity_row, stage_medians
from ..errors import AnalysisError

STRAGGLER_RATIO = 1.1  # a straggler's lower interval bound exceeds this multiple of the median of the other ranks
MIN_STAGE_SHARE = 0.01  # no stragglers in stages below this share of the sum of all stages


def ranks(points):
    """DataFrame, one row per (point, stage, rank) of mode `branches`.

    Columns: median in s, lower bound of its 95% interval, ratio to the median of the other ranks (1 on one rank), and
    `straggler`: the bound exceeds STRAGGLER_RATIO times that median in a stage of at least MIN_STAGE_SHARE of the sum.
    `comm` has no stragglers, because the rank that waits there is not the slow one.
    """
    identities, columns = [], []
    for point in leave_out(points, stage_medians, "without stages of mode `branches`"):
        times = point.times("branches")
        grid, low = times.rank_median[: len(COMPUTE_STAGES) + 1], times.rank_low[: len(COMPUTE_STAGES) + 1]
        middle = np.nanmedian(np.where(np.isnan(grid).all(axis=1, keepdims=True), 0.0, grid), axis=1)
        eligible = (middle > MIN_STAGE_SHARE * middle.sum())[:, None] & (np.array(STAGES[:-1]) != "comm")[:, None]
        others = median_of_others(grid)
        slow = (low > STRAGGLER_RATIO * others) & eligible
        timed = middle > 0
        shape = (int(timed.sum()), point.ranks)
        system = {
            name: np.broadcast_to(np.array(point.run.system.get(name) or [""] * point.ranks, dtype=object), shape)
            for name in ("host", "uuid")
        }
        columns.append(
            {
                "point_row": np.full(shape, len(identities)),
                "stage": np.repeat(np.flatnonzero(timed), point.ranks),
                "rank": np.broadcast_to(np.arange(point.ranks), shape),
            }
            | system
            | {
                "time": grid[timed],
                "time_low": low[timed],
                "ratio": grid[timed] / others[timed],
                "straggler": slow[timed],
            }
        )
        identities.append(identity_row(point))
    if not columns:
        raise AnalysisError('no point has stages of mode `branches`; run with run.modes = ["branches", "total"]')
    data = {name: np.concatenate([c[name].ravel() for c in columns]) for name in columns[0]}
    # Text columns are categorical, because there may be millions of rows.
    text = pd.DataFrame(identities)
    text = text.astype({c: "category" for c in text if not pd.api.types.is_numeric_dtype(text[c])})
    frame = text.take(data.pop("point_row")).reset_index(drop=True)
    frame["stage"] = pd.Categorical.from_codes(data.pop("stage"), STAGES[:-1])
    for name, values in data.items():
        frame[name] = pd.Categorical(values) if name in ("host", "uuid") else values
    return frame


def phases(points):
    """DataFrame, one row per (point, phase, rank) of the launch that a decode step of KV shards is.

    Columns: median in s, its share of the sum of the rank's phases, and `waits`: the rank waits for words of others.
    The rank that waits least is the one that the others wait for.
    """
    rows = []
    for point in leave_out(points, lambda p: p.phases, "without phases of one launch"):
        total = sum(point.phases.values())
        for phase, times in point.phases.items():
            for rank, time in enumerate(times):
                row = {"phase": phase, "rank": rank, "time": time, "share": time / total[rank]}
                rows.append(identity_row(point) | row | {"waits": phase.startswith("wait_")})
    if not rows:
        raise AnalysisError(
            'no point has phases of one launch; run decode on GPUs with run.modes = ["total"] and parallel.kv = 2'
        )
    return pd.DataFrame(rows)


def waiting(frame):
    """DataFrame from that of `phases`, one row per (point, rank): seconds of waiting for others, and of the rest."""
    keys = ["file", "point", "layout", "context", "batch", "rank"]
    waits = frame.time.where(frame.waits, 0.0)
    table = frame.assign(waiting=waits, working=frame.time - waits)
    return table.groupby(keys, dropna=False, observed=True)[["waiting", "working"]].sum().reset_index()


def stragglers(frame):
    """DataFrame from that of `ranks`, one row per straggling (point, rank) with its slow stages, the worst first."""
    slow = frame[frame.straggler]
    if slow.empty:
        return pd.DataFrame(
            columns=["file", "point", "layout", "context", "batch", "rank", "host", "uuid", "stages", "worst"]
        )
    named = slow.assign(named=slow.stage.astype(str) + slow.ratio.map(" {:.2f}x".format))
    keys = ["file", "point", "layout", "context", "batch", "rank", "host", "uuid"]
    table = (
        named.groupby(keys, dropna=False, observed=True)
        .agg(stages=("named", ", ".join), worst=("ratio", "max"))
        .reset_index()
    )
    return table.sort_values("worst", ascending=False, ignore_index=True)
