"""The top of the report: a summary of every series, warnings, and the runs with their machines."""

import datetime

import pandas as pd

from ..data import series
from ..errors import AnalysisError
from ..figures.axes import by_size, pick_evenly, time_unit, times_sign
from ..models import warnings
from ..models.scaling import scaling
from . import html

GLANCE = ("context", "fewest ranks", "time", "ranks", "time", "speedup", "bounds", "efficiency", "comm")
WIDE = ("fewest ranks", "bounds", "comm")  # columns that narrow screens hide


def header(title, points, groups, decisions, regenerate):
    """Title, cards, links and the summary; `regenerate` is the command that makes the report."""
    runs = {p.run.path for p in points}
    devices = {p.run.device for p in points}
    cards = [
        (f"{sum(p.valid for p in points)} of {len(points)}", "points VALID"),
        (len(runs), f"runs, {max(p.ranks for p in points)} ranks at most"),
    ]
    if len(devices) == 1:
        cards.append((devices.pop(), "device"))
    verdicts = [v for decision in decisions for v in decision.verdicts()]
    for v in verdicts:
        unique = sum(other.device == v.device for other in verdicts) == 1
        commit = "" if unique else f", commit {v.commit[:12]}"
        cards.append((v.verdict, f"ship a custom selection kernel? {v.device}{commit}"))
    links = "".join(f'<a href="#{at}">{html.escape(name)}</a>' for at, name in landmarks(points, groups))
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"<h1>{html.escape(title)}</h1><p class=muted>Made {made} by</p>{html.command_line(regenerate)}"
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{html.escape(v)}</b><span>{html.escape(what)}</span></div>' for v, what in cards
        )
        + f'</div><nav aria-label="sections">{links}</nav>{glance(groups)}'
    )


def landmarks(points, groups):
    """(id, name) of the links: the first section of each device, and the sections that belong to no series."""
    first = {}
    for i, members in enumerate(groups):
        first.setdefault(members[0].run.device, f"s{i}")
    kernels = [("kernels", "Kernels")] if any(p.kernels for p in points) else []
    return [
        ("runs", "Runs"),
        *((at, device) for device, at in first.items()),
        *kernels,
        ("gate", "Gate"),
        ("points", "All points"),
    ]


def in_order(groups):
    """Groups sorted: several rank counts before one, GPUs before hosts, then by device and task, latest run first."""

    def key(members):
        first = members[0]
        one_rank_count = len({p.ranks for p in members}) == 1
        return one_rank_count, first.run.attributes.get("backend") != "cuda", first.run.device, first.kind

    latest = sorted(groups, key=lambda g: max(str(p.run.attributes.get("start", "")) for p in g), reverse=True)
    return sorted(latest, key=key)


def glance(groups):
    """Summary table: the smallest and largest sizes of every series, on the fewest and the most ranks."""
    bodies = []
    for i, (members, name) in enumerate(zip(groups, series.titles(groups))):
        try:
            frame = scaling(members, "strong", per_stage=False)
        except AnalysisError:
            continue
        rows = [glance_row(label, sizes) for label, sizes in pick_evenly(by_size(frame), 2 if len(groups) > 2 else 4)]
        if frame.batch.nunique() == 1 and frame.batch.iloc[0] > 1:
            name += f", batch {frame.batch.iloc[0]:g}"
        bodies.append(
            f'<tr class="group"><th colspan="{len(GLANCE)}" scope="rowgroup"><a href="#s{i}">{html.escape(name)}</a>'
            f"</th></tr>{''.join(rows)}"
        )
    if not bodies:
        return ""
    head = "".join(f'<th scope="col" class="{css}">{name}</th>' for name, css in zip(GLANCE, glance_classes()))
    return (
        '<h2 id="glance">At a glance</h2><p class=muted>Median time of a step (of a whole prefill) on the fewest and '
        "on the most ranks, of the fastest layout there (heads × kv); bounds of the speedup from both 95% intervals; "
        "comm: part of the stages' time.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="At a glance"><table class="glance">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(bodies)}</tbody></table></div>"
    )


def glance_classes():
    """CSS class of each column."""
    return [f"{'n' if i else ''}{' wide' if name in WIDE else ''}" for i, name in enumerate(GLANCE)]


def glance_row(label, rows):
    """Row of one size of a series. INVALID points are only counted."""
    best = rows[rows.best].sort_values("ranks")
    invalid = int((rows.validity != "VALID").sum())
    cells = [label + (f" ({invalid} of {len(rows)} INVALID)" if invalid else "")]
    if len(best):
        few, most = best.iloc[0], best.iloc[-1]
        cells += [layout_text(few), time_text(few.time)]
        if most.ranks > few.ranks:
            cells += [
                layout_text(most),
                time_text(most.time),
                html.format_number(most.speedup),
                html.format_interval(most.speedup_low, most.speedup_high),
                f"{most.efficiency:.0%}",
                "–" if pd.isna(most.comm_share) else f"{most.comm_share:.0%}",
            ]
    cells += [""] * (len(GLANCE) - len(cells))
    shown = "".join(f'<td class="{css}">{html.escape(c)}</td>' for c, css in zip(cells, glance_classes()))
    return f"<tr{' class=invalid' if invalid else ''}>{shown}</tr>"


def layout_text(row):
    return f"{int(row.ranks)} ({times_sign(row.layout)})" if row.ranks > 1 else "1"


def time_text(seconds):
    factor, unit = time_unit(seconds)
    return f"{html.format_number(seconds * factor)} {unit}"


def warnings_section(points):
    """INVALID results and warnings; all but the first 12 lines are collapsed."""
    parts = []
    for kind, lines in (" bad", warnings.invalid_results(points)), ("", warnings.warnings(points)):
        if not lines:
            continue
        shown = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:12])
        rest = "".join(f"<li>{html.escape(line)}</li>" for line in lines[12:])
        more = f"<details><summary>{len(lines) - 12} more</summary><ul>{rest}</ul></details>" if rest else ""
        name = "INVALID results" if kind else "Warnings"
        parts.append(
            f'<section class="warnings{kind}" aria-label="{name}"><b>{name}</b><ul>{shown}</ul>{more}</section>'
        )
    return "".join(parts)


def join_unique(values):
    """Distinct values that are neither empty nor 0, joined by commas."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v not in ("", 0)))


def run_row(run, points):
    """Columns of one run: file, machine and software."""
    clock = [c for c in run.system.get("clock_mhz_after", []) if c > 0]
    return {
        "file": run.path,
        "started": run.attributes.get("start", ""),
        "status": run.attributes.get("status", ""),
        "backend": run.attributes.get("backend", ""),
        "device": run.device,
        "ranks": max(p.ranks for p in points),
        "nodes": len(set(run.system.get("host", []))),
        "points": len(points),
        "commit": str(run.attributes.get("git_commit", ""))[:12],
        "compiler": run.attributes.get("compiler", ""),
        **{name: join_unique(run.system.get(name, [])) for name in ("driver", "cuda", "nccl", "mpi")},
        "clock": f"{min(clock):.0f} MHz" if clock else "",
        "copy_bandwidth": min((p.get("copy_bandwidth", float("nan")) for p in points), default=float("nan")),
        "schema": str(run.attributes.get("schema_version", "")),
    }


def machine_table(frame):
    """The table of runs, reduced to one row per device and commit, with the distinct values of its runs."""
    rows = []
    for (device, commit), runs in frame.groupby(["device", "commit"], sort=False):
        row = {"device": device, "commit": commit, "runs": len(runs), "ranks": join_unique(sorted(runs.ranks.unique()))}
        for name in ("backend", "compiler", "driver", "cuda", "nccl", "mpi"):
            row[name] = join_unique(runs[name]) or "–"
        clocks = sorted({int(c.split()[0]) for c in runs.clock if c})
        row["clock"] = "–" if not clocks else f"{join_unique(dict.fromkeys((clocks[0], clocks[-1])))} MHz"
        row["copy_bandwidth"] = runs.copy_bandwidth.median()
        row["started"] = join_unique(dict.fromkeys(str(s)[:10] for s in (runs.started.min(), runs.started.max())))
        rows.append(row)
    return pd.DataFrame(rows)


def runs_section(points):
    """Machine and software: one row per device and commit, and one row per run."""
    runs = {p.run.path: p.run for p in points}
    frame = pd.DataFrame([run_row(run, [p for p in points if p.run.path == path]) for path, run in runs.items()])
    parts = ['<h2 id="runs">Runs</h2>']
    if len(frame) > 1:
        table = machine_table(frame)
        parts.append(html.table(table, list(table), "Machines and software by device and commit", open_rows=40))
    varying = [c for c in frame if len(frame) == 1 or frame[c].nunique(dropna=False) > 1 or c == "file"]
    return "".join(parts) + html.table(frame, varying, "Machines and software by run", open_rows=4)
