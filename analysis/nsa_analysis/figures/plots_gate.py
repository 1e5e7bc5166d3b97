"""Panels of the gate and of kernel points."""

import numpy as np

from .axes import context_axis, draw_intervals, draw_invalid, line_style, log_ticks, percent, row_offset, time_unit
from .style import Panel, colour


def gate_panels(table):
    """Conditions of the gate: shares by context, speedups and errors by shape, with thresholds."""
    panels = []
    for device, rows in table.groupby("device", sort=False):
        if (share := rows[rows.condition == "share"]).value.notna().any():
            panels.append(share_panel(device, share, rows[rows.condition == "share_30"]))
        speedup = rows[rows.condition.isin(["shape_speedup", "shape_speedup_packed"])]
        if speedup.value.notna().any():
            panels.append(
                interval_panel(
                    f"{device}: fused against packed SDPA",
                    "speedup (times)",
                    speedup,
                    {"shape_speedup": "with the gather", "shape_speedup_packed": "packed before"},
                )
            )
        error = rows[rows.condition == "shape_error"]
        if error.value.notna().any():
            panels.append(
                interval_panel(
                    f"{device}: error of fused", "mean absolute error (1)", error, {"shape_error": "against float64"}
                )
            )
    return panels


def error_bars(rows):
    """[2, row] distances of the bounds from the value."""
    bars = np.array([rows.value - rows.bound_low, rows.bound_high - rows.value])
    return np.clip(np.nan_to_num(bars), 0, None)


def share_panel(device, share, share_30):
    """Selection's share by context with the thresholds of `share` and `share_30`."""

    def draw(ax):
        names = [at.removeprefix("context ").removesuffix(", batch 1") for at in share["at"]]
        ax.errorbar(
            range(len(share)),
            share.value,
            yerr=error_bars(share),
            **line_style(0),
            capsize=3,
            linestyle="none",
            label="share, 95% interval",
        )
        for rows, line in (share, "--"), (share_30, ":"):
            if len(rows):
                ax.axhline(
                    rows.threshold.iloc[0],
                    linestyle=line,
                    color=colour("muted"),
                    label=f"threshold {rows.threshold.iloc[0]:.0%}",
                )
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_ylim(
            0, max(0.35, share.bound_high.max() * 1.1 if share.bound_high.notna().any() else share.value.max() * 1.2)
        )
        ax.yaxis.set_major_formatter(percent())
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel("selection's share of a step (%)")

    return Panel(f"{device}: selection's share", draw)


def interval_panel(title, xlabel, rows, names):
    """Values with intervals, one row per shape; `names` maps conditions to labels."""
    shapes = list(dict.fromkeys(rows["at"]))

    def draw(ax):
        ax.axvline(
            rows.threshold.iloc[0], linestyle="--", color=colour("muted"), label=f"threshold {rows.threshold.iloc[0]:g}"
        )
        for i, (condition, name) in enumerate(names.items()):
            values = rows[rows.condition == condition]
            ax.errorbar(
                values.value,
                [shapes.index(a) + row_offset(i, len(names)) for a in values["at"]],
                xerr=error_bars(values),
                **line_style(i),
                capsize=2,
                markersize=3.5,
                linestyle="none",
                label=name,
            )
        ax.set_yticks(range(len(shapes)), shapes, fontsize=7)
        ax.set_ylim(len(shapes) - 0.5, -0.5)
        ax.set_xscale("log")
        log_ticks(ax.xaxis, [*rows.value, *rows.bound_low, *rows.bound_high, rows.threshold.iloc[0]])
        ax.set_xlabel(xlabel)
        ax.set_ylabel("shape")

    return Panel(title, draw, height=1.6 + 0.17 * len(shapes))


# An implementation has the same colour in all panels. Implementations not listed follow these.
IMPLEMENTATIONS = ("fused", "sdpa", "flash", "sdpa_packed", "flash_packed", "masked")


def implementation_index(name, frame):
    """Number of the line style of an implementation."""
    known = [*IMPLEMENTATIONS, *sorted(set(frame.implementation) - set(IMPLEMENTATIONS))]
    return known.index(name)


def kernel_panels(frame, brief=False):
    """Implementations side by side, one panel per (device, commit, input) and branch.

    The x axis is context where it is swept. Else rows are shapes, with one panel per value of `spans`; `brief`: of the
    last value only.
    """
    panels = []
    for (name, branch), rows in frame.groupby(["series", "branch"], sort=False):
        if rows.context.nunique() > 1:
            panels.append(kernel_context_panel(f"{name}: {branch}", rows))
        else:
            of_spans = list(rows.groupby("spans", sort=False))
            panels += [
                kernel_shape_panel(f"{name}: {branch}, blocks {spans}", shapes)
                for spans, shapes in of_spans[-1 if brief else 0 :]
            ]
    return panels


def kernel_context_panel(title, frame):
    """Time against context for the first shape; the table has the others."""
    shape = ["rows", "heads", "head_size", "blocks", "spans"]
    first = frame[(frame[shape] == frame[shape].iloc[0]).all(axis=1)]
    valid, bad = first[first.validity == "VALID"], first[first.validity != "VALID"]
    factor, unit = time_unit(first["median"])

    def draw(ax):
        for name, rows in valid.groupby("implementation", sort=False):
            rows, i = rows.sort_values("context"), implementation_index(name, frame)
            draw_intervals(ax, rows.context, rows["median"] * factor, rows.low * factor, rows.high * factor, i, name)
        draw_invalid(ax, bad.context, bad["median"] * factor)
        context_axis(ax, first.context)
        ax.set_yscale("log")
        log_ticks(ax.yaxis, first["median"] * factor)
        ax.set_ylabel(f"time of one execution ({unit})")

    row = first.iloc[0]
    return Panel(f"{title}, H={row['heads']} D={row['head_size']}", draw)


def kernel_shape_panel(title, frame):
    """Times with intervals, one row per shape."""
    factor, unit = time_unit(frame["median"])
    frame = frame.assign(shape=[f"N={r.rows} H={r.heads} D={r.head_size} n={r.blocks}" for r in frame.itertuples()])
    shapes = list(dict.fromkeys(frame["shape"]))
    valid, bad = frame[frame.validity == "VALID"], frame[frame.validity != "VALID"]

    def draw(ax):
        for i, (name, rows) in enumerate(valid.groupby("implementation", sort=False)):
            at = [shapes.index(s) + row_offset(i, frame.implementation.nunique()) for s in rows["shape"]]
            bars = np.clip(np.nan_to_num([rows["median"] - rows.low, rows.high - rows["median"]]), 0, None) * factor
            style = line_style(implementation_index(name, frame))
            ax.errorbar(rows["median"] * factor, at, xerr=bars, **style, markersize=3.5, linestyle="none", label=name)
        draw_invalid(ax, bad["median"] * factor, [shapes.index(s) for s in bad["shape"]])
        ax.set_yticks(range(len(shapes)), shapes, fontsize=7)
        ax.set_ylim(len(shapes) - 0.5, -0.5)
        ax.set_xscale("log")
        log_ticks(ax.xaxis, frame["median"] * factor)
        ax.set_xlabel(f"time of one execution ({unit})")
        ax.set_ylabel("shape")

    return Panel(title, draw, height=1.7 + 0.19 * len(shapes))
