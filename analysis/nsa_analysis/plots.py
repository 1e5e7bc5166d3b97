"""Panels from the tables of this package: each function takes a DataFrame and returns a list of Panel."""

import math

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .reading import STAGES
from .series import short
from .stages import PART_ORDER
from .style import MARKERS, SERIES, Panel, colour

PART_COLOURS = {"cmp": "blue", "rank": "orange", "sel": "vermillion", "win": "green", "comm": "purple",
                "project, output": "sky", "other": "grey"}
MOST_PANELS = 6  # of one kind; the table has the rest


def time_unit(seconds):
    """(factor, name) of the unit in which a time reads well."""
    finite = [s for s in np.ravel(seconds) if s > 0]
    largest = max(finite, default=1.0)
    return (1e6, "µs") if largest < 2e-3 else (1e3, "ms") if largest < 2 else (1.0, "s")


def times_sign(layout):
    return layout.replace("x", "×")


def style_of(i):
    return {"color": colour(SERIES[i % len(SERIES)]), "marker": MARKERS[i % len(MARKERS)]}


def spread(items, most=MOST_PANELS):
    """At most `most` of the items, first and last among them."""
    items = list(items)
    if len(items) <= most:
        return items
    return [items[i] for i in sorted({round(k * (len(items) - 1) / (most - 1)) for k in range(most)})]


def percent():
    return FuncFormatter(lambda v, _: f"{100 * v:g}")


def rank_axis(ax, ranks, base=2):
    ranks = sorted(set(int(r) for r in ranks))
    ax.set_xscale("log", base=base)
    ax.xaxis.set_major_locator(FixedLocator(spread(ranks, 8)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.set_xlim(ranks[0] / 1.18, ranks[-1] * 1.18)
    ax.set_xlabel("ranks")


def log_values(axis, values):
    """1-2-5 ticks in plain numbers; few enough to stand apart."""
    values = [v for v in values if v and v > 0 and math.isfinite(v)]
    if not values:
        return
    low, high = min(values), max(values)
    steps = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 100 else (1,)
    ticks = [m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for m in steps]
    inside = [t for t in ticks if low / 1.3 <= t <= high * 1.3] or [low]
    inside = inside[::-1][::math.ceil(len(inside) / (7 if low > 1e-3 else 4))]
    axis.set_major_locator(FixedLocator(inside))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("e-0", "e-")))


def draw_intervals(ax, x, y, low, high, i, label):
    """A line with marks, and the 95% intervals of its points."""
    errors = np.clip(np.nan_to_num([y - low, high - y]), 0, None)
    look = style_of(i)
    ax.plot(x, y, **look, label=label)
    ax.errorbar(x, y, yerr=errors, linestyle="none", color=look["color"], capsize=2.5, elinewidth=1.2)


def draw_invalid(ax, x, y):
    """INVALID points: a cross of their own, on no line."""
    if len(x):
        ax.plot(x, y, linestyle="none", marker="x", markersize=8, markeredgewidth=2, color=colour("bad"), label="INVALID")


def size_label(context, batch, many_batches):
    return f"{short(int(context))}" + (f", batch {int(batch)}" if many_batches else "")


def by_size(frame):
    """(label, rows) of each swept size of a table; the batch is named where it varies."""
    many = frame.batch.nunique() > 1
    forced = frame.forced.nunique() > 1
    for (context, batch, force), rows in frame.groupby(["context", "batch", "forced"], sort=True):
        yield size_label(context, batch, many) + (f", forced {force}" if forced else ""), rows


# Scaling ----------------------------------------------------------------------------------------------------------------

def scaling_panels(frame):
    """Panels of `scaling`: strong curves, then weak ones."""
    step = frame[frame.stage == "step"]
    strong, weak = step[step.curve.str.startswith("strong")], step[step.curve.str.startswith("weak")]
    panels = []
    if strong.ranks.nunique() > 1:
        panels += [speedup_panel(strong)]
        panels += [time_panel(label, rows) for label, rows in spread(by_size(strong)) if rows.ranks.nunique() > 1]
        panels += [stage_time_panel(frame, strong)]
        panels += [fraction_panel(strong, "comm_share", "Time in communication", "part of all stages' time"),
                   fraction_panel(strong, "serial_fraction", "Serial fraction (Karp–Flatt)", "serial fraction"),
                   balance_panel(strong)]
    if not weak.empty:
        panels += [weak_panel(weak)]
    return [p for p in panels if p]


def speedup_panel(strong):
    def draw(ax):
        ranks = strong.ranks
        ends = np.array([ranks.min(), ranks.max()], dtype=float)
        ax.plot(ends, ends / ends[0], "--", color=colour("muted"), linewidth=1.2, label="ideal")
        for i, (label, rows) in enumerate(spread(by_size(strong), len(SERIES))):
            best = rows[rows.best].sort_values("ranks")
            draw_intervals(ax, best.ranks, best.speedup, best.speedup_low, best.speedup_high, i, label)
        rank_axis(ax, ranks)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.set_ylabel("speedup (times)")
    return Panel("Strong scaling, fastest layout, by context", draw)


def time_panel(label, rows):
    """All layouts of one size: a colour and a line for each number of head shards."""
    factor, unit = time_unit(rows.time)

    def draw(ax):
        valid = rows[rows.validity == "VALID"]
        if valid.ideal_time.notna().any():
            ideal = valid.dropna(subset="ideal_time").drop_duplicates("ranks").sort_values("ranks")
            ax.plot(ideal.ranks, ideal.ideal_time * factor, "--", color=colour("muted"), linewidth=1.2, label="ideal")
        for i, (heads, group) in enumerate(valid.groupby("heads")):
            group = group.sort_values("ranks")
            draw_intervals(ax, group.ranks, group.time * factor, group.time_low * factor, group.time_high * factor, i,
                           f"heads = {heads}")
        bad = rows[rows.validity != "VALID"]
        draw_invalid(ax, bad.ranks, bad.time * factor)
        rank_axis(ax, rows.ranks)
        ax.set_yscale("log")
        log_values(ax.yaxis, [*(rows.time * factor), *(rows.ideal_time * factor)])
        ax.set_ylabel(f"time of a step ({unit})")
    return Panel(f"Every layout, context {label}; kv = ranks / heads", draw, legend_columns=4)


def stage_time_panel(frame, strong):
    """Stages of the fastest layouts of the largest size."""
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
        for i, stage in enumerate(s for s in STAGES if s in largest):
            rows = stages[stages.stage == stage].sort_values("ranks")
            ax.plot(rows.ranks, rows.time * factor, **style_of(i), label=stage)
        rank_axis(ax, stages.ranks)
        ax.set_yscale("log")
        log_values(ax.yaxis, stages[stages.stage.isin(largest)].time * factor)
        ax.set_ylabel(f"time of a stage ({unit})")
    return Panel(f"Stages, fastest layout, context {label}", draw)


def fraction_panel(strong, column, title, ylabel):
    if strong[column].isna().all():
        return None

    def draw(ax):
        for i, (label, rows) in enumerate(spread(by_size(strong), len(SERIES))):
            best = rows[rows.best].dropna(subset=column).sort_values("ranks")
            if len(best):
                ax.plot(best.ranks, best[column], **style_of(i), label=label)
        rank_axis(ax, strong.ranks)
        ax.yaxis.set_major_formatter(percent())
        ax.set_ylim(min(0, strong[column].min() * 1.1), max(ax.get_ylim()[1], 0.01))
        ax.set_ylabel(f"{ylabel} (%)")
    return Panel(f"{title}, fastest layout", draw)


def balance_panel(strong):
    def draw(ax):
        for i, (label, rows) in enumerate(spread(by_size(strong), len(SERIES))):
            best = rows[rows.best].sort_values("ranks")
            ax.plot(best.ranks, best.max_over_median, **style_of(i), label=label)
        rank_axis(ax, strong.ranks)
        ax.axhline(1, linestyle="--", color=colour("muted"), linewidth=1.2)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.99), max(high, 1.05))
        ax.set_ylabel("max / median over ranks (1)")
    return Panel("Balance of own work, fastest layout", draw)


def weak_panel(weak):
    def draw(ax):
        ax.axhline(1, linestyle="--", color=colour("muted"), linewidth=1.2, label="ideal")
        for i, (curve, rows) in enumerate(spread(weak.groupby("curve"), len(SERIES))):
            best = rows[rows.best].sort_values("ranks")
            ax.plot(best.ranks, best.efficiency, **style_of(i), label=curve.removeprefix("weak, "))
        rank_axis(ax, weak.ranks)
        ax.yaxis.set_major_formatter(percent())
        ax.set_ylim(0, max(1.1, weak.efficiency.max() * 1.1))
        ax.set_ylabel("weak-scaling efficiency (%)")
    return Panel("Weak scaling, fastest layout", draw, height=3.5, legend_columns=1)


# Branches ---------------------------------------------------------------------------------------------------------------

def branch_panels(frame):
    """Stacked stages: by context on the fewest ranks, then by layout for each context."""
    panels = []
    few = frame[frame.ranks == frame.ranks.min()]
    layout = few.layout.iloc[0]
    few = few[few.layout == layout]
    if len(list(by_size(few))) > 1:
        panels += [stack_panel(f"Stages by context, layout {times_sign(layout)}", few, False),
                   stack_panel(f"The same as shares, layout {times_sign(layout)}", few, True)]
    if frame.layout.nunique() > 1:
        panels += [stack_panel(f"Stages by layout, context {label}", rows, False, by_layout=True)
                   for label, rows in spread(by_size(frame)) if rows.layout.nunique() > 1]
    return panels or [stack_panel(f"Stages, layout {times_sign(layout)}", few, False)]


def stack_panel(title, frame, shares, by_layout=False):
    if by_layout:
        order = frame[["ranks", "heads", "layout"]].drop_duplicates().sort_values(["ranks", "heads"])
        bars = [(times_sign(r.layout), frame[frame.layout == r.layout]) for r in order.itertuples()]
    else:
        bars = list(by_size(frame))
    bars = spread(bars, 14)
    factor, unit = time_unit(frame.groupby(["file", "point"])["median"].sum())

    def draw(ax):
        bottom = np.zeros(len(bars))
        totals = np.array([rows["median"].sum() for _, rows in bars])
        for part in PART_ORDER:
            height = np.array([rows[rows.part == part]["median"].sum() for _, rows in bars])
            if not height.any():
                continue
            height = height / totals if shares else height * factor
            ax.bar(range(len(bars)), height, 0.72, bottom=bottom, color=colour(PART_COLOURS[part]), label=part,
                   edgecolor=colour("paper"), linewidth=0.6)
            bottom = bottom + height
        bad = [i for i, (_, rows) in enumerate(bars) if (rows.validity != "VALID").any()]
        draw_invalid(ax, bad, bottom[bad])
        ax.set_xticks(range(len(bars)), [name for name, _ in bars],
                      rotation=35 if sum(len(name) for name, _ in bars) > 40 else 0,
                      ha="right" if sum(len(name) for name, _ in bars) > 40 else "center")
        ax.grid(axis="x", visible=False)
        ax.set_xlabel("layout, heads × kv" if by_layout else "context (tokens)")
        if shares:
            ax.yaxis.set_major_formatter(percent())
        ax.set_ylabel("part of all stages (%)" if shares else f"sum of stages ({unit})")
    return Panel(title, draw, legend_columns=4)


def reads_panels(frame):
    """Reads against context: counted as marks, expected as lines; nsa-vibe's formula beside them."""
    frame = frame[frame.ranks == frame.ranks.min()].drop_duplicates(["context", "batch", "forced", "branch"])
    frame = frame[(frame.batch == frame.batch.min()) & (frame.forced == frame.forced.iloc[0])]
    if frame.context.nunique() < 2:
        return []

    def draw(ax):
        for branch, role, marker in (("cmp", "blue", "o"), ("sel", "vermillion", "s"), ("win", "green", "D"),
                                     ("all", "ink", "^")):
            rows = frame[frame.branch == branch].sort_values("context")
            ax.plot(rows.context, rows.expected, color=colour(role), linewidth=1.2)
            ax.plot(rows.context, rows.counted, linestyle="none", marker=marker, color=colour(role), label=branch)
        rows = frame[frame.branch == "all"].sort_values("context")
        if rows.nsa_vibe.notna().any():
            ax.plot(rows.context, rows.nsa_vibe, ":", color=colour("purple"), label="nsa-vibe's formula")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        contexts = spread(sorted(frame.context.unique()), 6)
        ax.xaxis.set_major_locator(FixedLocator(contexts))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(int(round(v)))))
        log_values(ax.yaxis, [*frame.counted, *frame.expected])
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel(f"reads a {'sequence' if frame.kind.iloc[0] == 'prefill' else 'query'} and group (tokens)")
    return [Panel("Reads: counted (marks) and expected (lines)", draw)]


# Ranks ------------------------------------------------------------------------------------------------------------------

def rank_panels(frame):
    """A heat map, rank x stage, of each layout on the most ranks, at the largest context."""
    frame = frame[frame.ranks == frame.ranks.max()]
    frame = frame[frame.context == frame.context.max()]
    panels = []
    for (layout, file, _), rows in spread(frame.groupby(["layout", "file", "point"], sort=True, observed=True), 4):
        panels.append(heat_panel(layout, rows))
    return panels


def heat_panel(layout, rows):
    stages = [s for s in STAGES if s in set(rows.stage)]
    grid = rows.pivot(index="rank", columns="stage", values="ratio")[stages].to_numpy()
    context, validity = int(rows.context.iloc[0]), rows.validity.iloc[0]

    def draw(ax):
        reach = float(np.clip(np.nanmax(np.maximum(grid, 1 / np.maximum(grid, 1e-3))), 1.05, 4))
        image = ax.imshow(grid, aspect="auto", interpolation="nearest", cmap="cividis", norm=LogNorm(1 / reach, reach))
        far = (2, 4) if reach > 2 else (1.4, 2) if reach > 1.4 else (1.1, 1.2, 1.3) if reach > 1.12 else (1.05, 1.1)
        ticks = [1, *(t for t in far if t <= reach), *(round(1 / t, 2) for t in far if t <= reach)]
        bar = ax.figure.colorbar(image, ax=ax, extend="both" if reach == 4 else "neither", ticks=ticks,
                                 format=FuncFormatter(lambda v, _: f"{v:g}"))
        bar.minorticks_off()
        bar.set_label("time / median over ranks (1)")
        bar.outline.set_visible(False)
        slow = rows[rows.straggler]
        if len(slow):
            ax.plot([stages.index(s) for s in slow.stage], slow["rank"], linestyle="none", marker="x", markersize=7,
                    markeredgewidth=2, color=colour("bad"), label="straggler")
        ax.set_xticks(range(len(stages)), stages, rotation=45, ha="right")
        ax.yaxis.set_major_locator(FixedLocator(spread(range(len(grid)), 9)))
        ax.grid(visible=False)
        ax.set_xlabel("stage")
        ax.set_ylabel("rank")
    name = f"Ranks, layout {times_sign(layout)}, context {short(context)}"
    return Panel(name + ("" if validity == "VALID" else ", INVALID"), draw, height=3.5)


# Roofline ---------------------------------------------------------------------------------------------------------------

def roofline_panels(frame):
    """Achieved part of the copy bandwidth by stage, a mark a context, for up to six layouts."""
    layouts = frame[["ranks", "heads", "layout"]].drop_duplicates().sort_values(["ranks", "heads"]).layout
    return [roofline_panel(layout, frame[frame.layout == layout]) for layout in spread(layouts, 4)]


def roofline_panel(layout, frame):
    rows = frame[frame.fraction.notna()]
    stages = [s for s in STAGES if s in set(rows.stage)]
    copy = rows.copy_bandwidth.median() / 1e9

    def draw(ax):
        ax.axvline(1, linestyle="--", color=colour("muted"), linewidth=1.2, label=f"copy: {copy:.0f} GB/s")
        for i, (label, group) in enumerate(spread(by_size(rows[rows.validity == "VALID"]), 5)):
            ax.plot(group.fraction, [stages.index(s) for s in group.stage], linestyle="none", **style_of(i), label=label)
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


# Cost model -------------------------------------------------------------------------------------------------------------

def check_panels(frame):
    """Measured against predicted steps: fitted points and those held out."""
    step = frame[frame.stage == "step"]
    factor, unit = time_unit(step.measured)

    def draw(ax):
        ends = np.array([step[["measured", "predicted"]].min().min(), step[["measured", "predicted"]].max().max()]) * factor
        ax.plot(ends, ends, "--", color=colour("muted"), linewidth=1.2, label="equal")
        for i, (part, rows) in enumerate(step.groupby("part")):
            worst = rows.error.abs().max()
            ax.plot(rows.measured * factor, rows.predicted * factor, linestyle="none", **style_of(i),
                    label=f"{part}, within {worst:.0%}")
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
                ax.plot(rows.ranks, rows[column] * factor, ":", **look, markerfacecolor="none",
                        label=size_label(context, batch, many))
            one_node = frame[frame.network == ""].ranks.max()
            if one_node < frame.ranks.max():
                ax.axvline(one_node * math.sqrt(2), color=colour("muted"), linewidth=0.9)
                ax.annotate("network assumed →", (one_node * math.sqrt(2), 1), (4, -3), textcoords="offset points",
                            xycoords=("data", "axes fraction"), va="top", fontsize=8, color=colour("muted"))
            rank_axis(ax, spread(sorted(frame.ranks.unique()), 6))
            ax.set_yscale("log")
            values = [*(frame[column] * factor), *(ends if column == "speedup" else [])]
            log_values(ax.yaxis, values)
            ax.set_ylabel(ylabel)
        return draw

    factor, unit = time_unit(frame.time)
    return [Panel("PREDICTED time of a step", draw_with("time", f"predicted step ({unit})", factor), predicted=True),
            Panel("PREDICTED speedup", draw_with("speedup", "predicted speedup (times)"), predicted=True)]


# Gate -------------------------------------------------------------------------------------------------------------------

def gate_panels(table):
    """What the gate decided on: shares by context, speedups and errors by shape, with the thresholds."""
    panels = []
    for device, rows in table.groupby("device", sort=False):
        if (share := rows[rows.condition == "share"]).value.notna().any():
            panels.append(share_panel(device, share, rows[rows.condition == "share_30"]))
        speedup = rows[rows.condition.isin(["shape_speedup", "shape_speedup_packed"])]
        if speedup.value.notna().any():
            panels.append(interval_panel(f"{device}: fused against packed SDPA", "speedup (times)", speedup,
                                         {"shape_speedup": "with the gather", "shape_speedup_packed": "packed before"}))
        error = rows[rows.condition == "shape_error"]
        if error.value.notna().any():
            panels.append(interval_panel(f"{device}: error of fused", "mean absolute error (1)", error,
                                         {"shape_error": "against float64"}))
    return panels


def beside(i, count):
    """Where mark i of `count` stands in its row, so that intervals do not hide each other."""
    return 0.5 * (i - (count - 1) / 2) / count


def error_bars(rows):
    bars = np.array([rows.value - rows.bound_low, rows.bound_high - rows.value])
    return np.clip(np.nan_to_num(bars), 0, None)


def share_panel(device, share, high):
    def draw(ax):
        names = [at.removeprefix("context ").removesuffix(", batch 1") for at in share["at"]]
        ax.errorbar(range(len(share)), share.value, yerr=error_bars(share), **style_of(0), capsize=3, linestyle="none",
                    label="share, 95% interval")
        for rows, line in (share, "--"), (high, ":"):
            if len(rows):
                ax.axhline(rows.threshold.iloc[0], linestyle=line, color=colour("muted"),
                           label=f"threshold {rows.threshold.iloc[0]:.0%}")
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_ylim(0, max(0.35, share.bound_high.max() * 1.1 if share.bound_high.notna().any() else share.value.max() * 1.2))
        ax.yaxis.set_major_formatter(percent())
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel("selection's share of a step (%)")
    return Panel(f"{device}: selection's share", draw)


def interval_panel(title, xlabel, rows, names):
    shapes = list(dict.fromkeys(rows["at"]))

    def draw(ax):
        ax.axvline(rows.threshold.iloc[0], linestyle="--", color=colour("muted"),
                   label=f"threshold {rows.threshold.iloc[0]:g}")
        for i, (condition, name) in enumerate(names.items()):
            of = rows[rows.condition == condition]
            ax.errorbar(of.value, [shapes.index(a) + beside(i, len(names)) for a in of["at"]], xerr=error_bars(of), **style_of(i), capsize=2,
                        markersize=3.5, linestyle="none", label=name)
        ax.set_yticks(range(len(shapes)), shapes, fontsize=7)
        ax.set_ylim(len(shapes) - 0.5, -0.5)
        ax.set_xscale("log")
        log_values(ax.xaxis, [*rows.value, *rows.bound_low, *rows.bound_high, rows.threshold.iloc[0]])
        ax.set_xlabel(xlabel)
        ax.set_ylabel("shape")
    return Panel(title, draw, height=1.6 + 0.17 * len(shapes))




# Kernels ----------------------------------------------------------------------------------------------------------------

def kernel_panels(frame):
    """Implementations side by side: against context where that is swept, else shape by shape."""
    panels = []
    for (device, branch), rows in frame.groupby(["device", "branch"], sort=False):
        if rows.context.nunique() > 1:
            panels.append(kernel_context_panel(f"{device}: {branch}", rows))
        else:
            panels.append(kernel_shape_panel(f"{device}: {branch}", rows))
    return panels


def kernel_context_panel(title, frame):
    """Of the first shape; the table has the others."""
    shape = ["rows", "heads", "head_size", "blocks", "spans"]
    first = frame[(frame[shape] == frame[shape].iloc[0]).all(axis=1)]
    factor, unit = time_unit(first["median"])

    def draw(ax):
        for i, (name, rows) in enumerate(first.groupby("implementation", sort=False)):
            rows = rows.sort_values("context")
            draw_intervals(ax, rows.context, rows["median"] * factor, rows.low * factor, rows.high * factor, i, name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        contexts = spread(sorted(first.context.unique()), 6)
        ax.xaxis.set_major_locator(FixedLocator(contexts))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(int(round(v)))))
        log_values(ax.yaxis, first["median"] * factor)
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel(f"time of one execution ({unit})")
    row = first.iloc[0]
    return Panel(f"{title}, H={row['heads']} D={row['head_size']}", draw)


def kernel_shape_panel(title, frame):
    factor, unit = time_unit(frame["median"])
    frame = frame.assign(shape=[f"N={r.rows} H={r.heads} D={r.head_size} n={r.blocks} {r.spans}" for r in frame.itertuples()])
    shapes = list(dict.fromkeys(frame["shape"]))

    def draw(ax):
        for i, (name, rows) in enumerate(frame.groupby("implementation", sort=False)):
            at = [shapes.index(s) + beside(i, frame.implementation.nunique()) for s in rows["shape"]]
            bars = np.clip(np.nan_to_num([rows["median"] - rows.low, rows.high - rows["median"]]), 0, None) * factor
            ax.errorbar(rows["median"] * factor, at, xerr=bars, **style_of(i), markersize=3.5, linestyle="none", label=name)
        ax.set_yticks(range(len(shapes)), shapes, fontsize=7)
        ax.set_ylim(len(shapes) - 0.5, -0.5)
        ax.set_xscale("log")
        log_values(ax.xaxis, frame["median"] * factor)
        ax.set_xlabel(f"time of one execution ({unit})")
        ax.set_ylabel("shape")
    return Panel(title, draw, height=1.7 + 0.19 * len(shapes))
