"""Panels of the cost model: comparison with measurements, and predictions."""

import math
import textwrap

import numpy as np

from .axes import line_style, log_ticks, pick_evenly, rank_axis, size_label, time_unit
from .style import SERIES, Panel, colour


def check_panels(frame):
    """Predicted against measured steps, for fitted and held-out points."""
    step = frame[frame.stage == "step"]
    factor, unit = time_unit(step.measured)

    def draw(ax):
        ends = (
            np.array([step[["measured", "predicted"]].min().min(), step[["measured", "predicted"]].max().max()])
            * factor
        )
        ax.plot(ends, ends, "--", color=colour("muted"), linewidth=1.2, label="equal")
        for i, (part, rows) in enumerate(step.groupby("part")):
            worst = rows.error.abs().max()
            ax.plot(
                rows.measured * factor,
                rows.predicted * factor,
                linestyle="none",
                **line_style(i),
                label=f"{part}, within {worst:.0%}",
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        log_ticks(ax.xaxis, step.measured * factor)
        log_ticks(ax.yaxis, step.predicted * factor)
        ax.set_xlabel(f"measured step ({unit})")
        ax.set_ylabel(f"predicted step ({unit})")

    return [Panel("Cost model against measurement", draw)]


def prediction_panels(frame, unusable=""):
    """Predicted time and speedup against ranks; measured rank counts are filled marks without a line through them.

    `unusable` is written across the figures: why they cannot be used.
    """
    frame = frame[frame.time > 0]

    def draw_with(column, ylabel, factor=1.0):
        def draw(ax):
            ends = np.array([1.0, frame.ranks.max()])
            if column == "speedup":
                ax.plot(ends, ends, "--", color=colour("muted"), linewidth=1.2, label="ideal")
            if unusable:
                style = dict(transform=ax.transAxes, ha="center", va="center", color=colour("bad"), weight="bold")
                ax.text(0.5, 0.5, textwrap.fill(unusable, 34), **style)
            many = frame.batch.nunique() > 1
            for i, ((context, batch), rows) in enumerate(pick_evenly(frame.groupby(["context", "batch"]), len(SERIES))):
                style, ahead = line_style(i), rows[rows.source == "predicted"]
                label = size_label(context, batch, many)
                if column == "time" and ahead.time_high.notna().any():
                    ax.fill_between(
                        ahead.ranks, ahead.time_low * factor, ahead.time_high * factor, color=style["color"], alpha=0.15
                    )
                ax.plot(ahead.ranks, ahead[column] * factor, ":", **style, markerfacecolor="none", label=label)
                known = rows[rows.source == "measured"]
                ax.plot(known.ranks, known[column] * factor, linestyle="none", **style)
            one_node = frame[frame.network == ""].ranks.max()
            if one_node < frame.ranks.max():
                ax.axvline(one_node * math.sqrt(2), color=colour("muted"), linewidth=0.9)
                ax.annotate(
                    "network assumed →",
                    (one_node * math.sqrt(2), 1),
                    (4, -3),
                    textcoords="offset points",
                    xycoords=("data", "axes fraction"),
                    va="top",
                    fontsize=8,
                    color=colour("muted"),
                )
            rank_axis(ax, pick_evenly(sorted(frame.ranks.unique()), 6))
            ax.set_yscale("log")
            values = [*(frame[column] * factor), *(ends if column == "speedup" else [])]
            log_ticks(ax.yaxis, values)
            ax.set_ylabel(ylabel)

        return draw

    factor, unit = time_unit(frame.time)
    return [
        Panel(f"PREDICTED {name}; filled: measured", draw_with(*axis), predicted=True)
        for name, axis in (
            ("time of a step", ("time", f"time ({unit})", factor)),
            ("speedup", ("speedup", "speedup (times)")),
        )
    ]
