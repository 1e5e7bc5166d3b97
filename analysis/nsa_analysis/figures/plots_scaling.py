"""Panels of strong and weak scaling."""

import numpy as np

from ..data.reading import STAGES
from ..models.stages import PARTS
from .axes import (
    PART_COLOURS,
    STAGE_MARKERS,
    by_size,
    draw_intervals,
    draw_invalid,
    line_style,
    log_ticks,
    percent,
    pick_evenly,
    rank_axis,
    time_unit,
)
from .style import SERIES, Panel, colour


def scaling_panels(frame, brief=False):
    """Panels of the table of `scaling`: strong scaling, then weak scaling. `brief`: those of a report."""
    step = frame[frame.stage == "step"]
    strong, weak = step[step.curve.str.startswith("strong")], step[step.curve.str.startswith("weak")]
    panels = []
    if strong.ranks.nunique() > 1:
        panels += [speedup_panel(strong)]
        sizes = [(label, rows) for label, rows in by_size(strong) if rows.ranks.nunique() > 1]
        panels += [time_panel(label, rows) for label, rows in (sizes[-1:] if brief else pick_evenly(sizes))]
        if not brief:
            panels += [comm_panel(strong), stage_time_panel(frame, strong), serial_panel(strong), balance_panel(strong)]
    if not weak.empty:
        panels += [weak_panel(weak)]
    return [p for p in panels if p]


def speedup_panel(strong):
    """Speedup of the fastest layouts, one line per size."""

    def draw(ax):
        ranks = strong.ranks
        ends = np.array([ranks.min(), ranks.max()], dtype=float)
        ax.plot(ends, ends / ends[0], "--", color=colour("muted"), linewidth=1.2, label="ideal")
        for i, (label, rows) in enumerate(by_size(strong, len(SERIES))):
            best = rows[rows.best].sort_values("ranks")
            draw_intervals(ax, best.ranks, best.speedup, best.speedup_low, best.speedup_high, i, label)
        rank_axis(ax, ranks)
        ax.set_yscale("log", base=2)
        log_ticks(ax.yaxis, [*strong[strong.best].speedup, *(ends / ends[0])])
        ax.set_ylabel("speedup (times)")

    return Panel("Strong scaling, fastest layout, by context", draw)


def time_panel(label, rows):
    """Time of all layouts of one size, one line per number of head shards."""
    factor, unit = time_unit(rows.time)

    def draw(ax):
        valid = rows[(rows.validity == "VALID") & ~rows.crowded]
        if valid.ideal_time.notna().any():
            ideal = valid.dropna(subset="ideal_time").drop_duplicates("ranks").sort_values("ranks")
            ax.plot(ideal.ranks, ideal.ideal_time * factor, "--", color=colour("muted"), linewidth=1.2, label="ideal")
        for i, (heads, group) in enumerate(valid.groupby("heads")):
            group = group.sort_values("ranks")
            draw_intervals(
                ax,
                group.ranks,
                group.time * factor,
                group.time_low * factor,
                group.time_high * factor,
                i,
                f"heads = {heads}",
            )
        bad = rows[rows.validity != "VALID"]
        draw_invalid(ax, bad.ranks, bad.time * factor)
        crowded = rows[rows.crowded & (rows.validity == "VALID")]
        if len(crowded):
            style = dict(marker="o", facecolors="none", edgecolors=colour("muted"), label="shared cores")
            ax.scatter(crowded.ranks, crowded.time * factor, **style)
        rank_axis(ax, rows.ranks)
        ax.set_yscale("log")
        log_ticks(ax.yaxis, [*(rows.time * factor), *(rows.ideal_time * factor)])
        ax.set_ylabel(f"time of a step ({unit})")

    return Panel(f"Every layout, context {label}; kv = ranks / heads", draw, legend_columns=4)


def stage_time_panel(frame, strong):
    """Times of the six longest stages, for the fastest layouts of the largest size."""
    label, rows = list(by_size(strong))[-1]
    best = rows[rows.best]
    if best.ranks.nunique() < 2:
        return None
    keys = set(zip(best.file, best.point))
    stages = frame[(frame.curve == best.curve.iloc[0]) & (frame.stage != "step")]
    stages = stages[[k in keys for k in zip(stages.file, stages.point)]]
    if stages.empty:
        return None
    largest = stages.groupby("stage").time.max().nlargest(6).index
    factor, unit = time_unit(stages.time)

    def draw(ax):
        for stage in (s for s in STAGES if s in largest):
            rows = stages[stages.stage == stage].sort_values("ranks")
            ax.plot(
                rows.ranks,
                rows.time * factor,
                color=colour(PART_COLOURS[PARTS[stage]]),
                marker=STAGE_MARKERS[stage],
                label=stage,
            )
        rank_axis(ax, stages.ranks)
        ax.set_yscale("log")
        log_ticks(ax.yaxis, stages[stages.stage.isin(largest)].time * factor)
        ax.set_ylabel(f"time of a stage ({unit})")

    return Panel(f"Stages, fastest layout, context {label}", draw)


def draw_shares(ax, strong, column, others=None):
    """One line per size through its fastest layouts. With a label `others`, hollow markers for the other layouts."""
    for i, (label, rows) in enumerate(by_size(strong, len(SERIES))):
        best = rows[rows.best].dropna(subset=column).sort_values("ranks")
        if len(best):
            ax.plot(best.ranks, best[column], **line_style(i), label=label)
        rest = rows[~rows.best & ~rows.crowded & (rows.validity == "VALID")]
        if others and len(rest):
            ax.plot(rest.ranks, rest[column], linestyle="none", **line_style(i), markerfacecolor="none")
    if others:
        ax.plot([], [], linestyle="none", marker="o", markerfacecolor="none", color=colour("muted"), label=others)
    rank_axis(ax, strong.ranks)
    ax.yaxis.set_major_formatter(percent())
    ax.set_ylim(min(0, strong[column].min() * 1.1), max(ax.get_ylim()[1], 0.01))


def comm_panel(strong):
    """Share of comm. Other layouts are shown too, because the fastest layout may have no exchanges."""
    if not strong.comm_share.max() > 0:
        return None

    def draw(ax):
        draw_shares(ax, strong, "comm_share", "other layouts")
        ax.set_ylabel("part of all stages' time (%)")

    return Panel("Time in communication; lines: fastest layout", draw, legend_columns=4)


def serial_panel(strong):
    """Karp-Flatt serial fraction of the fastest layouts."""
    if strong.serial_fraction.isna().all():
        return None

    def draw(ax):
        draw_shares(ax, strong, "serial_fraction")
        ax.set_ylabel("serial fraction (%)")

    return Panel("Serial fraction (Karp–Flatt), fastest layout", draw)


def balance_panel(strong):
    """Maximum over median of the ranks' compute time, for the fastest layouts."""

    def draw(ax):
        for i, (label, rows) in enumerate(by_size(strong, len(SERIES))):
            best = rows[rows.best].sort_values("ranks")
            ax.plot(best.ranks, best.max_over_median, **line_style(i), label=label)
        rank_axis(ax, strong.ranks)
        ax.axhline(1, linestyle="--", color=colour("muted"), linewidth=1.2)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.99), max(high, 1.05))
        ax.set_ylabel("max / median over ranks (1)")

    return Panel("Balance of own work, fastest layout", draw)


def weak_panel(weak):
    """Weak-scaling efficiency of the curves with the most rank counts, at most five."""
    longest = weak.groupby("curve", sort=False).ranks.nunique().nlargest(5).index

    def draw(ax):
        ax.axhline(1, linestyle="--", color=colour("muted"), linewidth=1.2, label="ideal")
        for i, (curve, rows) in enumerate(weak[weak.curve.isin(longest)].groupby("curve", sort=False)):
            best = rows[rows.best].sort_values("ranks")
            ax.plot(best.ranks, best.efficiency, **line_style(i), label=curve.removeprefix("weak, "))
        rank_axis(ax, weak.ranks)
        ax.yaxis.set_major_formatter(percent())
        ax.set_ylim(0, max(1.1, weak.efficiency.max() * 1.1))
        ax.set_ylabel("weak-scaling efficiency (%)")

    return Panel("Weak scaling, fastest layout", draw, height=3.5, legend_columns=1)
