"""Every measured time as one tidy table: point x mode x stage x rank x statistic, with every parameter of the point."""

import json

import numpy as np
import pandas as pd

from .reading import read_samples
from .statistics import STATISTICS, summaries
from .tables import identity_row

SLOWEST = "slowest"  # label of the maximum over ranks in column `rank`
UNITS = {"n": "1", "cv": "1"}  # of the statistics that are no times


def export(points, statistics=STATISTICS):
    """DataFrame, one row per (point, mode, stage, rank, statistic); see `frames`."""
    return pd.concat(frames(points, statistics), ignore_index=True)


def frames(points, statistics=STATISTICS):
    """The table of `export` in parts, one DataFrame per file, all with the same columns.

    Columns: those of every table; every parameter of a point under its name in the file; mode, stage, rank ("slowest"
    is the maximum over ranks of each repetition, else a number), statistic, value, and unit ("s" or "1"). A stage that
    was not timed has no row. Implementations of kernel points are stages of mode "kernels".
    """
    names = list(dict.fromkeys(name for p in points for name in p.parameters))
    files = {}
    for point in points:
        files.setdefault(point.run.path, []).append(point)
    for members in files.values():
        yield pd.concat([point_frame(p, names, statistics) for p in members], ignore_index=True)


def point_frame(point, names, statistics):
    """Rows of one point; `names` are the parameters that become columns."""
    parts = []
    for mode, (labels, samples) in read_samples(point).items():
        table = summaries(np.concatenate([np.fmax.reduce(samples, axis=1, keepdims=True), samples], axis=1))
        grid = np.stack([table[s] for s in statistics], axis=-1)  # [stage, 1 + rank, statistic]
        stage, rank, statistic = np.indices(grid.shape).reshape(3, -1)
        timed = (table["n"] > 0)[stage, rank]
        ranks = np.array([SLOWEST, *map(str, range(samples.shape[1]))], dtype=object)
        rows = pd.DataFrame(
            {
                "mode": mode,
                "stage": np.array(labels, dtype=object)[stage],
                "rank": ranks[rank],
                "statistic": np.array(statistics, dtype=object)[statistic],
                "value": grid.ravel(),
            }
        )[timed]
        parts.append(rows.assign(unit=rows.statistic.map(UNITS).fillna("s")))
    columns = ["mode", "stage", "rank", "statistic", "value", "unit"]
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
    same = {k: v for k, v in identity_row(point).items() if k not in names}
    same |= {name: text_of_list(point.get(name)) for name in names}
    return pd.concat([pd.DataFrame(same, index=rows.index), rows], axis=1)


def text_of_list(value):
    """A list as text, joined by commas; other values as they are."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def json_lines(frame):
    """A JSON object for each row, with all digits of its numbers; null for NaN and infinity, which JSON lacks."""
    finite = frame.replace([np.inf, -np.inf], np.nan)
    columns = [finite[name].astype(object).where(finite[name].notna(), None).tolist() for name in finite]
    for row in zip(*columns):
        yield json.dumps(dict(zip(frame, row)), default=lambda value: value.item(), allow_nan=False)


def one_type(frame):
    """The frame with text in columns that hold text and numbers, as a column of Parquet has one type."""
    mixed = [c for c in frame if frame[c].dtype == object and frame[c].map(type).nunique() > 1]
    return frame.assign(**{c: frame[c].map(lambda v: None if v is None else str(v)) for c in mixed})
