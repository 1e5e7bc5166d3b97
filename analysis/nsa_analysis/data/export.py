"""Every measured time as one tidy table: point x mode x stage x rank x statistic, with every parameter of the point."""

import csv
import functools
import io
import itertools
import json

import numpy as np
import pandas as pd

from .parallel import parallel
from .reading import by_shape, in_blocks, samples_of
from .statistics import STATISTICS, summaries
from .tables import identity_row

SLOWEST = "slowest"  # label of the maximum over ranks in column `rank`
UNITS = {"n": "1", "cv": "1"}  # of the statistics that are no times
TIMES = ["mode", "stage", "rank", "statistic", "value", "unit"]  # columns that differ between the rows of a point


def export(points, statistics=STATISTICS):
    """DataFrame, one row per (point, mode, stage, rank, statistic); see `frames`."""
    return pd.concat(frames(points, statistics), ignore_index=True)


def frames(points, statistics=STATISTICS):
    """The table of `export` in parts, one DataFrame per file, all with the same columns.

    Columns: those of every table; every parameter of a point under its name in the file; mode, stage, rank ("slowest"
    is the maximum over ranks of each repetition, else a number), statistic, value, and unit ("s" or "1"). A stage that
    was not timed has no row. Implementations of kernel points are stages of mode "kernels".
    """
    for same, times in parts(points, statistics):
        counts = [sum(len(values) for _, values in of_point) for of_point in times]
        rows = [(*label, value, unit) for label, value, unit in itertools.chain(*map(rows_of, times))]
        repeated = same.iloc[np.repeat(np.arange(len(same)), counts)].reset_index(drop=True)
        yield pd.concat([repeated, pd.DataFrame(rows, columns=TIMES)], axis=1)


def parts(points, statistics):
    """(columns that are the same for all rows of a point, a row each; times of each point as in times_of) by file."""
    names = list(dict.fromkeys(name for p in points for name in p.parameters))
    files = {}
    for point in points:
        files.setdefault(point.run.path, []).append(point)
    for path, members in files.items():
        blocks = [(path, block, tuple(statistics)) for block in in_blocks(members)]
        yield same_columns(members, names), [times for block in parallel(times_of, blocks) for times in block]


def times_of(path, points, statistics):
    """For each point [(arguments of labels_of, values [label])] by mode."""
    samples = [
        ((i, mode, tuple(stages)), array)
        for i, modes in enumerate(samples_of(path, points))
        for mode, (stages, array) in modes.items()
    ]
    found = {}
    for keys, stack in by_shape(samples):
        table = summaries(np.concatenate([np.fmax.reduce(stack, axis=2, keepdims=True), stack], axis=2))
        grid = np.stack([table[s] for s in statistics], axis=-1)  # [entry, stage, 1 + rank, statistic]
        timed = np.broadcast_to((table["n"] > 0)[..., None], grid.shape)
        for (i, mode, stages), values, chosen in zip(keys, grid, timed):
            arguments = (mode, stages, values.shape[1] - 1, statistics, chosen.tobytes())
            found[i, mode, stages] = arguments, values[chosen]
    times = [[] for _ in points]
    for key, _ in samples:
        times[key[0]].append(found[key])
    return times


@functools.lru_cache(maxsize=256)  # most points have the same stages
def labels_of(mode, stages, ranks, statistics, timed):
    """[(mode, stage, rank, statistic)] of the timed ones of [stage, 1 + rank, statistic]; `timed`: bytes of flags."""
    every = itertools.product([mode], stages, [SLOWEST, *map(str, range(ranks))], statistics)
    return list(itertools.compress(every, np.frombuffer(timed, dtype=bool)))


def rows_of(times):
    """((mode, stage, rank, statistic), value, unit) of every row of a point."""
    for key, values in times:
        for label, value in zip(labels_of(*key), values.tolist()):
            yield label, value, UNITS.get(label[-1], "s")


def same_columns(points, names):
    """DataFrame, one row per point: identity and parameters. A column of numbers and text keeps both as they are."""
    rows = [identity_row(p) for p in points]
    for point, row in zip(points, rows):
        kept = {k: v for k, v in row.items() if k not in names}
        row.clear()
        row.update(kept, **{name: text_of_list(point.get(name)) for name in names})
    return pd.DataFrame({name: column([row[name] for row in rows]) for name in rows[0]})


def column(values):
    """Series of these values: of numbers or text where all are, else of objects."""
    kinds = set(map(type, values))
    return pd.Series(values, dtype=None if len(kinds) == 1 or kinds <= {int, float} else object)


def text_of_list(value):
    """A list as text, joined by commas; other values as they are."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def csv_lines(points, statistics=STATISTICS):
    """The table as lines of CSV, as pandas writes them, with a header. Of a point's columns the text is made once."""
    for i, (same, times) in enumerate(parts(points, statistics)):
        header, *lines = records(same.to_csv(index=False))
        if i == 0:
            yield f"{header},{','.join(TIMES)}\n"
        for line, of_point in zip(lines, times):
            for key, values in of_point:
                texts = ("" if value != value else repr(value) for value in values.tolist())
                yield from (f"{line},{a}{text}{b}" for (a, b), text in zip(csv_labels(*key), texts))


@functools.lru_cache(maxsize=256)
def csv_labels(*key):
    """(text before the value, text after it) of the rows of labels_of."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(labels_of(*key))
    return [
        (f"{text},", f",{UNITS.get(label[-1], 's')}\n") for text, label in zip(records(out.getvalue()), labels_of(*key))
    ]


def records(text):
    """The records of CSV, without the ends of their lines; quoted text may hold others."""
    found, begun = [], []
    for line in text.removesuffix("\n").split("\n"):
        begun.append(line)
        if sum(part.count('"') for part in begun) % 2 == 0:
            found.append("\n".join(begun))
            begun = []
    return found


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
