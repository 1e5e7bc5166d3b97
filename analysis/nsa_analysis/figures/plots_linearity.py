"""Waterfall of lost efficiency."""

import numpy as np

from ..data.series import format_count
from ..models.linearity import CAUSES
from .axes import percent, times_sign
from .style import Panel, colour

MAX_WATERFALLS = 2


def linearity_panels(frame):
    """At most two waterfalls of the largest size on the most ranks: the fastest layout, and that of most kv shards."""
    if frame.empty:
        return []
    most = frame[frame.ranks == frame.ranks.max()].sort_values(["context", "batch", "kv"])
    chosen = [*most[most.best].index[-1:], *most.index[-1:]]
    return [waterfall(frame.loc[i]) for i in list(dict.fromkeys(chosen))[:MAX_WATERFALLS]]


def waterfall(row):
    """Linear efficiency, what each cause takes of it, and the efficiency that is left."""
    names = ["linear", *(c.replace("_", " ") for c in CAUSES), "efficiency"]
    losses = np.nan_to_num(np.array([row[c] for c in CAUSES], dtype=float))  # a cause that is not known is in the rest
    ends = 1 - np.cumsum(losses)
    starts = np.concatenate([[1.0], ends[:-1]])

    def draw(ax):
        ax.bar([0, len(names) - 1], [1.0, row.efficiency], 0.7, color=colour("blue"), label="efficiency")
        at = np.arange(1, 1 + len(losses))
        for sign, role, label in (losses >= 0, "vermillion", "lost"), (losses < 0, "green", "regained"):
            if sign.any():
                ax.bar(at[sign], -losses[sign], 0.7, bottom=starts[sign], color=colour(role), label=label)
        for i, start in zip(at, starts):
            ax.plot([i - 1.35, i + 0.35], [start, start], color=colour("muted"), linewidth=0.8)
        texts = [1.0, *(-losses), row.efficiency]
        tops = [1.0, *np.maximum(starts, ends), row.efficiency]
        for i, (text, top) in enumerate(zip(texts, tops)):
            sign = "" if i in (0, len(names) - 1) else "+" if text > 0 else "−" if text < 0 else ""
            ax.annotate(f"{sign}{abs(text):.0%}", (i, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.grid(axis="x", visible=False)
        ax.axhline(0, color=colour("muted"), linewidth=0.8)
        ax.set_ylim(min(0, ends.min() - 0.05), max(1.12, starts.max() + 0.12))
        ax.yaxis.set_major_formatter(percent())
        ax.set_xlabel("cause")
        ax.set_ylabel("efficiency (%)")

    layout = f"{int(row.ranks)} ranks ({times_sign(row.layout)})"
    return Panel(f"Why not linear: {layout}, context {format_count(int(row.context))}", draw)
