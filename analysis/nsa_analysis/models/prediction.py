"""Times on more ranks: measured where they were, else predicted by the cost model, with intervals and memory."""

import dataclasses
import math
import re

import numpy as np
import pandas as pd

from ..data.reading import COMPUTE_STAGES
from ..data.tables import NAN, stage_median
from . import traffic
from .cost_model import Network, cross_validate, largest_error, non_negative_fit, usable
from .scaling import baseline, measured_time, strong_groups


def layouts_of(shape, ranks):
    """The shape on every heads x kv layout of `ranks` ranks; a kv shard has at least one chunk."""
    return [
        dataclasses.replace(shape, heads=h, kv=ranks // h)
        for h in range(1, shape.groups_total + 1)
        if shape.groups_total % h == 0 and ranks % h == 0 and ranks // h <= max(1, shape.context // shape.chunk)
    ]


DEVICE_MEMORY = {"H200": 141e9, "H100": 80e9, "GB200": 186e9, "B200": 180e9, "A100": 80e9, "4090": 24e9}  # byte

# Compute capability times 10 and SMs, of which the workspace of a plan follows.
GPUS = {"H200": (90, 132), "H100 PCIe": (90, 114), "H100": (90, 132), "A100": (80, 108), "4090": (89, 128)}


def device_gpu(device):
    """(capability, SMs) of a GPU by its name; None where unknown."""
    return next((gpu for name, gpu in GPUS.items() if name in device), None)


def device_memory(device):
    """Memory in bytes of a device by its name, "80GB" in it or a known one; NaN where unknown."""
    if said := re.search(r"(\d+) ?GB", device):
        return float(said[1]) * 1e9
    return next((size for name, size in DEVICE_MEMORY.items() if name in device), NAN)


def memory_columns(shape):
    """What the memory of a rank grows with: 1, tokens x groups that it stores, and those that prefill gathers."""
    tokens = shape.layers * shape.batch * shape.groups * shape.context
    return 1.0, tokens / shape.kv, float(tokens)


def fit_memory(points):
    """Function of a shape: peak bytes of a rank; None where no peak was measured.

    A fit to the measured peaks, raised so that none of them is underestimated.
    """
    rows = [(memory_columns(traffic.shape_of(p)), p.peak_memory) for p in points if p.peak_memory > 0]
    if not rows:
        return None
    columns, peaks = map(np.array, zip(*rows))
    coefficients = non_negative_fit(columns, peaks)
    margin = max(1.0, (peaks / (columns @ coefficients)).max())
    return lambda shape: float(np.dot(coefficients, memory_columns(shape)) * margin)


def extrapolate(model, points, ranks=1024, network=None, memory=None):
    """DataFrame, one row per (context, batch, rank count): the measured rank counts and powers of two up to `ranks`.

    `source`: "measured" where VALID points have that rank count; the row is then the fastest of them, with its 95%
    interval. Else "predicted": the layout predicted fastest of those that the model covers and that fit into `memory`
    bytes (default: that of the device, where it is known), with an interval from the largest error on held-out layouts.
    Columns: layout, time, time_low, time_high and seconds by stage; speedup and efficiency against the measured
    baseline; memory, the bytes of a rank; network (empty within one node). A count where no layout fits has no time.
    """
    network = network or Network()
    points = usable(points)
    error, memory_of = largest_error(cross_validate(points)), fit_memory(points)
    limit = device_memory(points[0].run.device) if memory is None else memory
    rows = []
    for members in strong_groups(points).values():
        base = baseline(members) or min(members, key=lambda p: p.ranks)
        shape, base_time = traffic.shape_of(base, 1, 1), measured_time(base, "step")[0]
        counts = {1 << i for i in range(int(math.log2(ranks)) + 1)} | {p.ranks for p in members}
        for count in sorted(counts):
            row = measured_row([p for p in members if p.ranks == count])
            row = row or predicted_row(model, shape, count, network, error, memory_of, limit)
            if row:
                speedup = base_time / row["time"]
                same = {"context": shape.context, "batch": shape.batch, "ranks": count}
                gain = {"speedup": speedup, "efficiency": speedup * base.ranks / count}
                rows.append(same | row | gain)
    frame = pd.DataFrame(rows)
    return frame.sort_values(["context", "batch", "ranks"], ignore_index=True) if len(frame) else frame


def measured_row(points):
    """Columns of `extrapolate` of the fastest measured point; None where there is none."""
    best = baseline(points)
    if best is None:
        return None
    time, low, high = measured_time(best, "step")
    stages = {f"time_{s}": t for s in (*COMPUTE_STAGES, "comm") if (t := stage_median(best, s)) > 0}
    row = {"layout": best.layout, "source": "measured", "time": time, "time_low": low, "time_high": high}
    return row | stages | {"memory": best.peak_memory, "network": ""}


def predicted_row(model, shape, count, network, error, memory_of, limit):
    """Columns of `extrapolate` of the layout that is predicted fastest; None where the model covers none."""
    layouts = [s for s in layouts_of(shape, count) if model.covers(s)]
    if not layouts:
        return None
    needed = {s: memory_of(s) if memory_of else NAN for s in layouts}
    fitting = [s for s in layouts if not needed[s] > limit]
    if not fitting:
        least = min(needed.values())
        return {"layout": "none fits", "source": "predicted", "time": NAN, "memory": least, "network": ""}
    times, layout = min(((model.predict(s, network), s) for s in fitting), key=lambda pair: pair[0]["step"])
    step = times.pop("step")
    return {
        "layout": f"{layout.heads}x{layout.kv}",
        "source": "predicted",
        "time": step,
        "time_low": step / (1 + error),
        "time_high": step / (1 - error) if error < 1 else NAN,
        **{f"time_{s}": t for s, t in times.items()},
        "memory": needed[layout],
        "network": network.text() if count > network.node else "",
    }
