"""Which rank is slow, and in what."""

import pandas as pd

from .errors import AnalysisError
from .reading import STAGES, WORK
from .tables import NAN, identity_row
import numpy as np

STRAGGLER = 1.1  # times the median over ranks that a straggler exceeds, with the low end of its interval
NOTICED = 0.01  # stages below this part of the stages' sum name no straggler


def ranks(points):
    """DataFrame, a row a (point, stage, rank) of mode `branches`: median in s, low end of its 95% interval, ratio to
    the median over ranks, and `straggler`: the low end exceeds 1.1 times that median in a stage with at least 1% of
    the sum. `comm` names none: who waits there is not who is slow."""
    tables = []
    for point in points:
        if (times := point.times("branches")) is None:
            continue
        middle = np.nanmedian(np.where(np.isnan(times.rank_median).all(axis=1, keepdims=True), 0.0,
                                       times.rank_median), axis=1)
        total = middle[:len(WORK) + 1].sum()
        for i, stage in enumerate(STAGES[:-1]):
            if not middle[i] > 0:
                continue
            median, low = times.rank_median[i], times.rank_low[i]
            slow = (low > STRAGGLER * middle[i]) & (middle[i] > NOTICED * total) & (stage != "comm")
            tables.append(pd.DataFrame(identity_row(point) | {
                "stage": stage, "rank": np.arange(point.ranks),
                "host": point.run.system.get("host", [""] * point.ranks),
                "uuid": point.run.system.get("uuid", [""] * point.ranks),
                "time": median, "time_low": low, "ratio": median / middle[i], "straggler": slow}))
    if not tables:
        raise AnalysisError("no point has mode `branches`; run with run.modes = [\"branches\", \"total\"]")
    return pd.concat(tables, ignore_index=True)


def stragglers(frame):
    """Of the table of `ranks`: a row a (point, rank) that is slow, its stages named, the worst first."""
    slow = frame[frame.straggler]
    if slow.empty:
        return pd.DataFrame(columns=["file", "point", "layout", "context", "batch", "rank", "host", "uuid", "stages",
                                     "worst"])
    named = slow.assign(named=slow.stage + slow.ratio.map(" {:.2f}x".format))
    keys = ["file", "point", "layout", "context", "batch", "rank", "host", "uuid"]
    table = named.groupby(keys, dropna=False).agg(stages=("named", ", ".join), worst=("ratio", "max")).reset_index()
    return table.sort_values("worst", ascending=False, ignore_index=True)
