"""Which rank is slow, and in what."""

import numpy as np
import pandas as pd

from ..data.reading import STAGES, WORK
from ..data.tables import identity_row, stage_medians
from ..errors import AnalysisError

STRAGGLER = 1.1  # times the median over ranks that a straggler exceeds, with the low end of its interval
NOTICED = 0.01  # stages below this part of the stages' sum name no straggler


def ranks(points):
    """DataFrame, a row a (point, stage, rank) of mode `branches`: median in s, low end of its 95% interval, ratio to
    the median over ranks, and `straggler`: the low end exceeds 1.1 times that median in a stage with at least 1% of
    the sum. `comm` names none: who waits there is not who is slow."""
    identities, columns = [], []
    for point in points:
        if not stage_medians(point):
            continue
        times = point.times("branches")
        grid, low = times.rank_median[: len(WORK) + 1], times.rank_low[: len(WORK) + 1]
        middle = np.nanmedian(np.where(np.isnan(grid).all(axis=1, keepdims=True), 0.0, grid), axis=1)
        noticed = (middle > NOTICED * middle.sum())[:, None] & (np.array(STAGES[:-1]) != "comm")[:, None]
        slow = (low > STRAGGLER * middle[:, None]) & noticed
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
                "ratio": grid[timed] / middle[timed, None],
                "straggler": slow[timed],
            }
        )
        identities.append(identity_row(point))
    if not columns:
        raise AnalysisError('no point has stages of mode `branches`; run with run.modes = ["branches", "total"]')
    data = {name: np.concatenate([c[name].ravel() for c in columns]) for name in columns[0]}
    # Text stands once: there may be millions of rows.
    what = pd.DataFrame(identities)
    what = what.astype({c: "category" for c in what if not pd.api.types.is_numeric_dtype(what[c])})
    frame = what.take(data.pop("point_row")).reset_index(drop=True)
    frame["stage"] = pd.Categorical.from_codes(data.pop("stage"), STAGES[:-1])
    for name, values in data.items():
        frame[name] = pd.Categorical(values) if name in ("host", "uuid") else values
    return frame


def stragglers(frame):
    """Of the table of `ranks`: a row a (point, rank) that is slow, its stages named, the worst first."""
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
