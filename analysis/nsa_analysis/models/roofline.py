"""Achieved bandwidth of a stage against the copy bandwidth measured in the same run."""

import pandas as pd

from ..data.reading import STAGES
from ..data.tables import NAN, identity_row, stage_median
from ..errors import AnalysisError
from . import traffic


def roofline(points):
    """DataFrame, one row per (point, stage).

    Columns: modelled `bytes` of the busiest rank (docs/METRICS.md), median `time` of the slowest rank in s, `achieved`
    byte/s, `copy_bandwidth` of the run, `fraction` of it (above 1 the bytes came from a cache; NaN for comm, which is
    not memory traffic), `flops` from the shape (NaN where unknown), `flop_rate` in FLOP/s, `intensity` in FLOP/byte.
    `step` is the whole step of mode `total`, without comm in its bytes.
    """
    rows = []
    for point in points:
        if point.bytes is None or not point.modes:
            continue
        flops = traffic.point_flops(point)
        copy = point.get("copy_bandwidth", NAN)
        busiest = point.bytes.max(axis=1, initial=0).astype(float)
        busiest[-1] = (point.bytes[-1] - point.bytes[STAGES.index("comm")]).max(initial=0)
        for i, stage in enumerate(STAGES):
            mode = "total" if stage == "step" and point.times("total") else "branches"
            time = stage_median(point, stage, mode)
            if not (time > 0 and busiest[i] > 0):
                continue
            achieved = busiest[i] / time
            rows.append(
                identity_row(point)
                | {
                    "stage": stage,
                    "bytes": busiest[i],
                    "time": time,
                    "achieved": achieved,
                    "copy_bandwidth": copy,
                    "fraction": achieved / copy if stage != "comm" and copy > 0 else NAN,
                    "flops": flops.get(stage, NAN),
                    "flop_rate": flops.get(stage, NAN) / time,
                    "intensity": flops.get(stage, NAN) / busiest[i],
                }
            )
    if not rows:
        raise AnalysisError("no point has times and bytes; give decode or prefill runs of nsa")
    return pd.DataFrame(rows)
