"""Achieved bandwidth of a stage against the copy bandwidth measured in the same run."""

import numpy as np
import pandas as pd

from ..data.reading import STAGES
from ..data.series import leave_out
from ..data.tables import NAN, identity_row, stage_median
from ..errors import AnalysisError
from . import traffic


def plan_of(point):
    """How mode `total` ran attention, by `route_kernels` of the file: "fused", "sharded" or "staged".

    A sharded step in one launch keeps what a fused one keeps.
    """
    ran = str((point.get("route_kernels") or [""])[0]).split(", ")
    if point.kind != "decode":
        return "staged"
    return "fused" if {"step", "sharded_step"} & {*ran} else "sharded" if "shard" in ran else "staged"


def step_bytes(point):
    """[rank] modelled bytes of a step of mode `total` without comm, by what ran (traffic.step_bytes)."""
    stages = dict(zip(STAGES, point.bytes.astype(float)))
    shape = traffic.shape_of(point)
    return stages["step"] - stages["comm"] if shape is None else traffic.step_bytes(shape, plan_of(point), stages)


def roofline(points):
    """DataFrame, one row per (point, stage).

    Columns: modelled `bytes` of the busiest rank (docs/METRICS.md), median `time` of the slowest rank in s, `achieved`
    byte/s, `copy_bandwidth` of the run, `fraction` of it (above 1 the bytes came from a cache; NaN for comm, which is
    not memory traffic), `flops` from the shape (NaN where unknown), `flop_rate` in FLOP/s, `intensity` in FLOP/byte.
    Stages are of mode `branches`. `step` is the whole step of mode `total` with the bytes of what ran (step_bytes); of
    `branches` where `total` did not run.
    """
    rows = []
    for point in leave_out(points, lambda p: p.bytes is not None and p.modes, "without times or modelled bytes"):
        identity, flops = identity_row(point), traffic.point_flops(point)
        copy = point.get("copy_bandwidth", NAN)
        busiest = point.bytes.max(axis=1, initial=0).astype(float)
        by_mode = step_bytes(point) if point.times("total") else point.bytes[-1] - point.bytes[STAGES.index("comm")]
        busiest[-1] = np.max(by_mode, initial=0)
        for i, stage in enumerate(STAGES):
            mode = "total" if stage == "step" and point.times("total") else "branches"
            time = stage_median(point, stage, mode)
            if not (time > 0 and busiest[i] > 0):
                continue
            achieved = busiest[i] / time
            rows.append(
                identity
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
