"""Panels of stages, reads, ranks and bandwidth."""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..data.reading import STAGES
from ..data.series import format_count
from ..models.stages import PART_ORDER, PARTS
from .axes import (
    MAX_PANELS,
    PART_COLOURS,
    STAGE_MARKERS,
    by_size,
    context_axis,
    draw_invalid,
    line_style,
    log_ticks,
    percent,
    pick_evenly,
    time_unit,
    times_sign,
)
from .style import MARKERS, Panel, colour

MAX_BARS = 14  # of a panel


def branch_panels(frame, brief=False):
    """Stacked bars of stages: by context on the fewest ranks, then by layout for each context.

    `brief`: of a report, whose context_panel shows the contexts; by layout only, for the largest size.
    """
    panels = []
    few = frame[frame.ranks == frame.ranks.min()]
    layout = few.layout.iloc[0]
    few = few[few.layout == layout]
    several = frame.layout.nunique() > 1
    if brief and not several and few.context.nunique() > 1:
        return []
    if len(list(by_size(few))) > 1 and not brief:
        panels += [
            stack_panel(f"Stages by context, layout {times_sign(layout)}", few, False),
            stack_panel(f"The same as shares, layout {times_sign(layout)}", few, True),
        ]
    if several:
        panels += [
            stack_panel(f"Stages by layout, context {label}", rows, False, by_layout=True)
            for label, rows in (list(by_size(frame))[-1:] if brief else by_size(frame, MAX_PANELS))
            if rows.layout.nunique() > 1
        ]
    return panels or [stack_panel(f"Stages, layout {times_sign(layout)}", few, False)]


def context_panel(frame, totals):
    """Time against context on the fewest ranks: the six longest stages, and the whole step of mode `total` beside them.

    `totals` is the table of whole steps, stages_table(points, modes=("total",)).
    """
    few = frame[frame.ranks == frame.ranks.min()]
    few = few[(few.layout == few.layout.iloc[0]) & (few.batch == few.batch.min()) & (few.forced == few.forced.iloc[0])]
    if few.context.nunique() < 2:
        return []
    keys = ["file", "point"]
    whole = totals.merge(few[keys].drop_duplicates(), on=keys).sort_values("context") if len(totals) else totals
    largest = few.groupby("stage")["median"].max().nlargest(6).index
    factor, unit = time_unit([*few["median"], *whole.get("median", [])])

    def draw(ax):
        if len(whole):
            style = dict(color=colour("ink"), linewidth=2.2, marker="o")
            ax.plot(whole.context, whole["median"] * factor, **style, label="total")
        for stage in (s for s in STAGES if s in largest):
            rows = few[few.stage == stage].sort_values("context")
            style = dict(color=colour(PART_COLOURS[PARTS[stage]]), marker=STAGE_MARKERS[stage])
            ax.plot(rows.context, rows["median"] * factor, **style, label=stage)
        context_axis(ax, few.context)
        ax.set_yscale("log")
        log_ticks(ax.yaxis, [*(few[few.stage.isin(largest)]["median"] * factor), *(whole.get("median", []) * factor)])
        ax.set_ylabel(f"time ({unit})")

    return [Panel(f"Time against context, layout {times_sign(few.layout.iloc[0])}", draw, legend_columns=4)]


def distribution_panel(points):
    """Distribution of the samples of a step around their median, for at most six points from few to many ranks."""
    timed = [p for p in points if p.valid and p.step_summary()["median"] > 0]
    chosen = pick_evenly(sorted(timed, key=lambda p: (p.ranks, p["run.context"])), 6)
    if not chosen:
        return []
    many = len({p.layout for p in chosen}) > 1

    def draw(ax):
        for i, p in enumerate(chosen):
            samples = np.sort(p.step_samples())
            samples = samples[~np.isnan(samples)]
            part = (np.arange(len(samples)) + 0.5) / len(samples)
            name = format_count(int(p["run.context"])) + (f", {times_sign(p.layout)}" if many else "")
            style = line_style(i) | {"marker": MARKERS[i], "markevery": max(1, len(samples) // 6)}
            ax.plot(samples / np.median(samples), part, drawstyle="steps-mid", **style, label=name)
        relative = [p.step_samples() / np.nanmedian(p.step_samples()) for p in chosen]
        spread = [np.nanquantile(samples, q) for samples in relative for q in (0, 0.95)]
        ax.set_xlim(max(0, min(spread) - 0.01), max(spread) + 0.01)
        ax.yaxis.set_major_formatter(percent())
        ax.set_xlabel("sample / median of its point (1)")
        ax.set_ylabel("part of the samples (%)")

    return [Panel("Samples of a step", draw)]


def stack_panel(title, frame, shares, by_layout=False):
    """Stacked bars of parts, in time or as shares, one bar per size or per layout."""
    if by_layout:
        order = frame[["ranks", "heads", "layout"]].drop_duplicates().sort_values(["ranks", "heads"])
        order = pick_evenly(order.itertuples(), MAX_BARS)
        bars = [(times_sign(r.layout), frame[frame.layout == r.layout]) for r in order]
    else:
        bars = list(by_size(frame, MAX_BARS))
    factor, unit = time_unit(frame.groupby(["file", "point"])["median"].sum())

    def draw(ax):
        bottom = np.zeros(len(bars))
        totals = np.array([rows["median"].sum() for _, rows in bars])
        for part in PART_ORDER:
            height = np.array([rows[rows.part == part]["median"].sum() for _, rows in bars])
            if not height.any():
                continue
            height = height / totals if shares else height * factor
            ax.bar(
                range(len(bars)),
                height,
                0.72,
                bottom=bottom,
                color=colour(PART_COLOURS[part]),
                label=part,
                edgecolor=colour("paper"),
                linewidth=0.6,
            )
            bottom = bottom + height
        bad = [i for i, (_, rows) in enumerate(bars) if (rows.validity != "VALID").any()]
        draw_invalid(ax, bad, bottom[bad])
        ax.set_xticks(
            range(len(bars)),
            [name for name, _ in bars],
            rotation=35 if sum(len(name) for name, _ in bars) > 40 else 0,
            ha="right" if sum(len(name) for name, _ in bars) > 40 else "center",
        )
        ax.grid(axis="x", visible=False)
        ax.set_xlabel("layout, heads × kv" if by_layout else "context (tokens)")
        if shares:
            ax.yaxis.set_major_formatter(percent())
        ax.set_ylabel("part of all stages (%)" if shares else f"sum of stages ({unit})")

    return Panel(title, draw, legend_columns=4)


def reads_panels(frame):
    """Reads against context: counted as markers, expected as lines, and nsa-vibe's formula."""
    if frame.empty:
        return []
    frame = frame[frame.ranks == frame.ranks.min()].drop_duplicates(["context", "batch", "forced", "branch"])
    frame = frame[(frame.batch == frame.batch.min()) & (frame.forced == frame.forced.iloc[0])]
    if frame.context.nunique() < 2:
        return []

    def draw(ax):
        for branch, role, marker in (
            ("cmp", "blue", "o"),
            ("sel", "vermillion", "s"),
            ("win", "green", "D"),
            ("all", "ink", "^"),
        ):
            rows = frame[frame.branch == branch].sort_values("context")
            ax.plot(rows.context, rows.expected, color=colour(role), linewidth=1.2)
            ax.plot(rows.context, rows.counted, linestyle="none", marker=marker, color=colour(role), label=branch)
        rows = frame[frame.branch == "all"].sort_values("context")
        if rows.nsa_vibe.notna().any():
            ax.plot(rows.context, rows.nsa_vibe, ":", color=colour("purple"), label="nsa-vibe's formula")
        context_axis(ax, frame.context)
        ax.set_yscale("log")
        log_ticks(ax.yaxis, [*frame.counted, *frame.expected])
        ax.set_ylabel(f"reads a {'sequence' if frame.kind.iloc[0] == 'prefill' else 'query'} and group (tokens)")

    return [Panel("Reads: counted (marks) and expected (lines)", draw)]


def rank_panels(frame, most=4):
    """At most `most` heat maps, rank x stage.

    First the two points with the worst stragglers, then layouts on the most ranks at the largest context.
    """
    keys = ["layout", "file", "point"]
    slow = frame[frame.straggler & (frame.ranks > 1)].sort_values("ratio", ascending=False, kind="stable")
    large = frame[(frame.ranks == frame.ranks.max()) & (frame["rank"] == 0)]
    large = large[large.context == large.context.max()].sort_values("heads", kind="stable")
    chosen = [*dict.fromkeys(slow[keys].drop_duplicates("layout").itertuples(index=False, name=None))][:2]
    chosen += pick_evenly(dict.fromkeys(large[keys].itertuples(index=False, name=None)), 4)
    chosen = list(dict.fromkeys(chosen))[:most]
    return [heat_panel(layout, frame[(frame.file == file) & (frame.point == point)]) for layout, file, point in chosen]


def heat_panel(layout, rows):
    """Heat map of time over the median of the other ranks, with crosses at stragglers."""
    stages = [s for s in STAGES if s in set(rows.stage)]
    grid = rows.pivot(index="rank", columns="stage", values="ratio")[stages].to_numpy()
    context, validity = int(rows.context.iloc[0]), rows.validity.iloc[0]

    def draw(ax):
        reach = float(np.clip(np.nanmax(np.maximum(grid, 1 / np.maximum(grid, 1e-3))), 1.05, 4))
        image = ax.imshow(grid, aspect="auto", interpolation="nearest", cmap="cividis", norm=LogNorm(1 / reach, reach))
        far = (2, 4) if reach > 2 else (1.4, 2) if reach > 1.4 else (1.1, 1.2, 1.3) if reach > 1.12 else (1.05, 1.1)
        ticks = [1, *(t for t in far if t <= reach), *(round(1 / t, 2) for t in far if t <= reach)]
        bar = ax.figure.colorbar(
            image,
            ax=ax,
            extend="both" if reach == 4 else "neither",
            ticks=ticks,
            format=FuncFormatter(lambda v, _: f"{v:g}"),
        )
        bar.minorticks_off()
        bar.set_label("time / median of the others (1)")
        bar.outline.set_visible(False)
        slow = rows[rows.straggler]
        if len(slow):
            ax.plot(
                [stages.index(s) for s in slow.stage],
                slow["rank"],
                linestyle="none",
                marker="x",
                markersize=7,
                markeredgewidth=2,
                color=colour("bad"),
                label="straggler",
            )
        ax.set_xticks(range(len(stages)), stages, rotation=45, ha="right")
        ax.yaxis.set_major_locator(FixedLocator(pick_evenly(range(len(grid)), 9)))
        ax.grid(visible=False)
        ax.set_xlabel("stage")
        ax.set_ylabel("rank")

    name = f"Ranks, layout {times_sign(layout)}, context {format_count(context)}"
    return Panel(name + ("" if validity == "VALID" else ", INVALID"), draw, height=3.5)


def roofline_panels(frame, most=4):
    """Achieved fraction of the copy bandwidth by stage, one marker per context, for at most `most` layouts."""
    layouts = frame[["ranks", "heads", "layout"]].drop_duplicates().sort_values(["ranks", "heads"]).layout
    return [roofline_panel(layout, frame[frame.layout == layout]) for layout in pick_evenly(layouts, most)]


def roofline_panel(layout, frame):
    """Achieved fraction of the copy bandwidth by stage, of one layout."""
    rows = frame[frame.fraction.notna()]
    stages = [s for s in STAGES if s in set(rows.stage)]
    copy = rows.copy_bandwidth.median() / 1e9

    def draw(ax):
        ax.axvline(1, linestyle="--", color=colour("muted"), linewidth=1.2, label=f"copy: {copy:.0f} GB/s")
        for i, (label, group) in enumerate(by_size(rows[rows.validity == "VALID"], 5)):
            ax.plot(
                group.fraction, [stages.index(s) for s in group.stage], linestyle="none", **line_style(i), label=label
            )
        bad = rows[rows.validity != "VALID"]
        draw_invalid(ax, bad.fraction, [stages.index(s) for s in bad.stage])
        ax.set_yticks(range(len(stages)), stages)
        ax.set_ylim(len(stages) - 0.5, -0.5)
        ax.set_xscale("log")
        ax.set_xlim(min(0.01, rows.fraction.min() / 1.5), max(1.6, rows.fraction.max() * 1.3))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}"))
        ax.set_xlabel("achieved bandwidth (% of the measured copy)")
        ax.set_ylabel("stage")

    return Panel(f"Bandwidth by stage, layout {times_sign(layout)}", draw)
