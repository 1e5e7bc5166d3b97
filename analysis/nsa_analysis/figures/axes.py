"""Common parts of figures: units, ticks, colours and markers."""

import math

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..data.reading import STAGES
from ..data.series import format_count
from .style import MARKERS, SERIES, colour

PART_COLOURS = {
    "cmp": "blue",
    "rank": "orange",
    "sel": "vermillion",
    "win": "green",
    "comm": "purple",
    "project, output": "sky",
    "other": "grey",
}
# A line of a stage has the colour of its part and a marker of its own, equal in all figures.
STAGE_MARKERS = dict(zip(STAGES, "P<>oDs^vX*."))
MAX_PANELS = 6  # panels of one kind; tables have all rows


def time_unit(seconds):
    """(factor, name) of the unit that suits these times in seconds."""
    finite = [s for s in np.ravel(seconds) if s > 0]
    largest = max(finite, default=1.0)
    return (1e6, "µs") if largest < 2e-3 else (1e3, "ms") if largest < 2 else (1.0, "s")


def times_sign(layout):
    """`2x4` -> `2×4`."""
    return layout.replace("x", "×")


def line_style(i):
    """Colour and marker of series number i."""
    return {"color": colour(SERIES[i % len(SERIES)]), "marker": MARKERS[i % len(MARKERS)]}


def pick_evenly(items, most=MAX_PANELS):
    """At most `most` of the items, evenly spaced, with the first and, of several, the last."""
    items = list(items)
    if len(items) <= most:
        return items
    if most == 1:
        return items[:1]
    return [items[i] for i in sorted({round(k * (len(items) - 1) / (most - 1)) for k in range(most)})]


def percent():
    return FuncFormatter(lambda v, _: f"{100 * v:g}")


def rank_axis(ax, ranks, base=2):
    ranks = sorted(set(int(r) for r in ranks))
    ax.set_xscale("log", base=base)
    ax.xaxis.set_major_locator(FixedLocator(pick_evenly(ranks, 11)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.set_xlim(ranks[0] / 1.18, ranks[-1] * 1.18)
    ax.set_xlabel("ranks")


def log_ticks(axis, values):
    """1-2-5 ticks as plain numbers, few enough not to overlap."""
    values = [v for v in values if v and v > 0 and math.isfinite(v)]
    if not values:
        return
    low, high = min(values), max(values)
    multiples = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 100 else (1,)
    ticks = [
        m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for m in multiples
    ]
    inside = [t for t in ticks if low / 1.3 <= t <= high * 1.3] or [low]
    inside = inside[::-1][:: math.ceil(len(inside) / (7 if low > 1e-3 else 4))]
    axis.set_major_locator(FixedLocator(inside))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("e-0", "e-")))


def draw_intervals(ax, x, y, low, high, i, label):
    """A line with markers and the 95% intervals of its points."""
    errors = np.clip(np.nan_to_num([y - low, high - y]), 0, None)
    style = line_style(i)
    ax.plot(x, y, **style, label=label)
    ax.errorbar(x, y, yerr=errors, linestyle="none", color=style["color"], capsize=2.5, elinewidth=1.2)


def draw_invalid(ax, x, y):
    """INVALID points as crosses without a line."""
    if len(x):
        ax.plot(
            x, y, linestyle="none", marker="x", markersize=8, markeredgewidth=2, color=colour("bad"), label="INVALID"
        )


def size_label(context, batch, many_batches):
    """`64K`, with the batch where it varies."""
    return f"{format_count(int(context))}" + (f", batch {int(batch)}" if many_batches else "")


def by_size(frame, most=None):
    """(label, rows) of each swept size of a table, or of `most` of them picked evenly; labels name only what varies."""
    many = frame.batch.nunique() > 1
    forced = frame.forced.nunique() > 1
    sizes = frame.groupby(["context", "batch", "forced"], sort=True)
    keys = sorted(sizes.indices)
    for context, batch, force in keys if most is None else pick_evenly(keys, most):
        label = size_label(context, batch, many) + (f", forced {force}" if forced else "")
        yield label, sizes.get_group((context, batch, force))


def context_axis(ax, contexts):
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(pick_evenly(sorted(set(contexts)), 6)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_count(int(round(v)))))
    ax.set_xlabel("context (tokens)")


def row_offset(i, count):
    """Offset of marker i of `count` in its row, so that intervals do not overlap."""
    return 0.5 * (i - (count - 1) / 2) / count
