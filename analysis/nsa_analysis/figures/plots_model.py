"""Panels of the cost model: against measurements, and predictions apart from them."""

import math

import numpy as np

from .axes import log_values, rank_axis, size_label, spread, style_of, time_unit
from .style import SERIES, Panel, colour


def check_panels(frame):
    """Measured against predicted steps: fitted points and those held out."""
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
                **style_of(i),
                label=f"{part}, within {worst:.0%}",
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        log_values(ax.xaxis, step.measured * factor)
        log_values(ax.yaxis, step.predicted * factor)
        ax.set_xlabel(f"measured step ({unit})")
        ax.set_ylabel(f"predicted step ({unit})")

    return [Panel("Cost model against measurement", draw)]


def carry_panels(frame):
    """Predictions alone; nothing measured stands here."""

    def draw_with(column, ylabel, factor=1.0):
        def draw(ax):
            ends = np.array([1.0, frame.ranks.max()])
            if column == "speedup":
                ax.plot(ends, ends, "--", color=colour("muted"), linewidth=1.2, label="ideal")
            many = frame.batch.nunique() > 1
            for i, ((context, batch), rows) in enumerate(spread(frame.groupby(["context", "batch"]), len(SERIES))):
                look = style_of(i)
                ax.plot(
                    rows.ranks,
                    rows[column] * factor,
                    ":",
                    **look,
                    markerfacecolor="none",
                    label=size_label(context, batch, many),
                )
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
            rank_axis(ax, spread(sorted(frame.ranks.unique()), 6))
            ax.set_yscale("log")
            values = [*(frame[column] * factor), *(ends if column == "speedup" else [])]
            log_values(ax.yaxis, values)
            ax.set_ylabel(ylabel)

        return draw

    factor, unit = time_unit(frame.time)
    return [
        Panel("PREDICTED time of a step", draw_with("time", f"predicted step ({unit})", factor), predicted=True),
        Panel("PREDICTED speedup", draw_with("speedup", "predicted speedup (times)"), predicted=True),
    ]
