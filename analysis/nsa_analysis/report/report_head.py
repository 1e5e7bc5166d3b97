"""The top of the report: a summary of every series, warnings, and the runs with their machines."""

import datetime

import pandas as pd

from ..data import series
from ..data.tables import stage_share
from ..errors import AnalysisError
from ..figures.axes import by_size, time_unit, times_sign
from ..models.balance import ranks, stragglers
from ..models.scaling import scaling
from . import html, report_warnings

GLANCE = ("context", "fewest ranks", "time", "ranks", "time", "speedup", "bounds", "efficiency", "comm")
GLANCE_ALONE = ("context", "ranks", "time", "95% interval", "selection", "comm")
WIDE = ("fewest ranks", "bounds", "comm")  # columns that narrow screens hide
SHOWN_WARNINGS = 5  # the others are folded


def header(title, points, groups, decisions, regenerate):
    """Title, cards, links and the summary; `regenerate` is the command that makes the report."""
    runs = {p.run.path for p in points}
    devices = {p.run.device for p in points}
    noisy = sum(bool(p.get("noisy")) for p in points)
    cards = [
        (f"{sum(p.valid for p in points)} of {len(points)}", "points VALID" + (f", {noisy} NOISY" if noisy else "")),
        (len(runs), f"runs, {max(p.ranks for p in points)} ranks at most"),
    ]
    if len(devices) == 1:
        cards.append((devices.pop(), "device"))
    cards += straggler_card(points) + verdict_cards(decisions)
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


def straggler_card(points):
    """[(text, explanation)] about ranks that are slower than the others; empty where no point has several ranks."""
    several = [p for p in points if p.valid and p.ranks > 1 and p.times("branches")]
    if not several:
        return []
    slow = stragglers(ranks(several))
    if slow.empty:
        return [("no stragglers", f"in {len(several)} VALID points of several ranks")]
    worst = slow.iloc[0]
    more = len(slow) - 1
    where = f"{times_sign(worst.layout)} on {worst.host}, context {series.format_count(int(worst.context))}"
    text = f"straggler of {where}: {worst.stages}" + (f"; and {more} more" if more else "")
    return [(f"rank {worst['rank']}: {worst.worst:.2f}×", text)]


def verdict_cards(decisions):
    """[(verdicts, what they answer)] by device and commit; several decisions of one are counted."""
    verdicts = {}
    for decision in decisions:
        for v in decision.verdicts():
            verdicts.setdefault((v.device, v.commit), []).append(v.verdict)
    cards = []
    for (device, commit), found in verdicts.items():
        unique = sum(other == device for other, _ in verdicts) == 1
        counts = {name: found.count(name) for name in dict.fromkeys(found)}
        text = ", ".join(name if len(found) == 1 else f"{count} × {name}" for name, count in counts.items())
        of = device if unique else f"{device}, commit {commit[:12]}"
        cards.append((text, f"ship a custom selection kernel? {of}" + ("" if len(found) == 1 else ", by input")))
    return cards


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
    """Summary table: the smallest and largest sizes of every series, on the fewest and the most ranks.

    Without a second rank count anywhere it has the layout, interval and shares of each size instead.
    """
    frames = {}
    for i, members in enumerate(groups):
        try:
            frames[i] = scaling(members, "strong", per_stage=False)
        except AnalysisError:
            continue
    if not frames:
        return ""
    compares = any(len(set(f[f.best].ranks)) > 1 for f in frames.values())
    columns, row_of = (GLANCE, glance_row) if compares else (GLANCE_ALONE, lone_row)
    names, bodies = series.titles(groups), []
    for i, frame in frames.items():
        shares = {(p.run.path, p.index): stage_share(p, ("rank", "attend_sel")) for p in groups[i]}
        frame["selection_share"] = [shares[key] for key in zip(frame.file, frame.point)]
        sizes = by_size(frame, 2 if len(groups) > 2 else 4)
        name = names[i]
        if frame.batch.nunique() == 1 and frame.batch.iloc[0] > 1:
            name += f", batch {frame.batch.iloc[0]:g}"
        bodies.append(
            f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup"><a href="#s{i}">{html.escape(name)}</a>'
            f"</th></tr>{''.join(html_row(row_of(label, rows), columns) for label, rows in sizes)}"
        )
    head = "".join(f'<th scope="col" class="{css}">{name}</th>' for name, css in zip(columns, glance_classes(columns)))
    text = (
        "Median time of a step (of a whole prefill) on the fewest and on the most ranks, of the fastest layout there "
        "(heads × kv); bounds of the speedup from both 95% intervals; comm: part of the stages' time."
        if compares
        else "Median time of a step (of a whole prefill) of the fastest layout (heads × kv) with its 95% interval; "
        "selection and comm: parts of the stages' time."
    )
    return (
        f'<h2 id="glance">At a glance</h2><p class=muted>{text}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="At a glance"><table class="glance">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(bodies)}</tbody></table></div>"
    )


def glance_classes(columns):
    """CSS class of each column."""
    return [f"{'n' if i else ''}{' wide' if name in WIDE else ''}" for i, name in enumerate(columns)]


def html_row(row, columns):
    """Table row of (cells, whether a point is INVALID); cells that are missing stay empty."""
    cells, invalid = row
    cells += [""] * (len(columns) - len(cells))
    shown = "".join(f'<td class="{css}">{html.escape(c)}</td>' for c, css in zip(cells, glance_classes(columns)))
    return f"<tr{' class=invalid' if invalid else ''}>{shown}</tr>"


def fastest_rows(label, rows):
    """(label, the fastest VALID layouts by ranks, number of INVALID points); the label says where cores were shared."""
    invalid = int((rows.validity != "VALID").sum())
    label += f" ({invalid} of {len(rows)} INVALID)" if invalid else ""
    best = rows[rows.best].sort_values("ranks")
    if best.empty:  # ranks that share cores are compared with nothing, but they have times
        crowded = rows[rows.crowded & (rows.validity == "VALID")].nsmallest(1, "time")
        return label + (", shared cores" if len(crowded) else ""), crowded, invalid
    return label, best, invalid


def percent_text(share):
    return "–" if pd.isna(share) else f"{share:.0%}"


def glance_row(label, rows):
    """(cells of GLANCE, whether a point is INVALID) of one size of a series. INVALID points are only counted."""
    label, best, invalid = fastest_rows(label, rows)
    if best.empty:
        return [label], invalid > 0
    few, most = best.iloc[0], best.iloc[-1]
    cells = [label, layout_text(few), time_text(few.time)]
    if most.ranks > few.ranks:
        cells += [
            layout_text(most),
            time_text(most.time),
            html.format_number(most.speedup),
            html.format_interval(most.speedup_low, most.speedup_high),
            f"{most.efficiency:.0%}",
            percent_text(most.comm_share),
        ]
    return cells, invalid > 0


def lone_row(label, rows):
    """(cells of GLANCE_ALONE, whether a point is INVALID) of one size of a series."""
    label, best, invalid = fastest_rows(label, rows)
    if best.empty:
        return [label], invalid > 0
    row = best.iloc[0]
    factor, unit = time_unit(row.time)
    interval = html.format_interval(row.time_low, row.time_high, factor) + f" {unit}"
    shares = [percent_text(row.selection_share), percent_text(row.comm_share)]
    return [label, layout_text(row), time_text(row.time), interval, *shares], invalid > 0


def layout_text(row):
    return f"{int(row.ranks)} ({times_sign(row.layout)})" if row.ranks > 1 else "1"


def time_text(seconds):
    factor, unit = time_unit(seconds)
    return f"{html.format_number(seconds * factor)} {unit}"


def warnings_section(points):
    """INVALID results and warnings; all but the first SHOWN_WARNINGS lines are folded."""
    parts = []
    for kind, lines in (" bad", report_warnings.invalid_results(points)), ("", report_warnings.warnings(points)):
        if not lines:
            continue
        shown = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:SHOWN_WARNINGS])
        rest = "".join(f"<li>{html.escape(line)}</li>" for line in lines[SHOWN_WARNINGS:])
        count = len(lines) - SHOWN_WARNINGS
        more = f"<details><summary>{count} more</summary><ul>{rest}</ul></details>" if rest else ""
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
    parts = []
    if len(frame) > 1:
        table = machine_table(frame)
        parts.append(html.table(table, list(table), "Machines and software by device and commit", open_rows=40))
    varying = [c for c in frame if len(frame) == 1 or frame[c].nunique(dropna=False) > 1 or c == "file"]
    parts.append(html.table(frame, varying, "Machines and software by run", open_rows=4))
    return html.section("runs", "Runs: machines and software", "".join(parts))
