"""One page of everything that result files can show: self-contained HTML."""

import datetime
import os
import shlex

import pandas as pd

from . import cost_model, findings, html, plots, series, verdict
from .curves import scaling
from .errors import AnalysisError
from .reading import find_files, read_file
from .report_series import columns, series_section
from .tables import KERNEL_COLUMNS, kernels, points_table


def make_report(paths, program=None, title="nsa report", network=cost_model.Network()):
    """HTML text of the report on these files and folders; `program` is the `nsa` that decides the gate."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = find_files(paths)
    csvs = [f for f in files if f.endswith(".csv")]
    points = [p for f in files if f not in csvs for p in read_file(f)]
    if not points:
        raise AnalysisError("a report needs result files (only CSVs were given); `nsa-analysis gate` audits those")
    groups = series.split([p for p in points if p.modes])
    regenerate = shlex.join(["nsa-analysis", "report", *series.shown_paths(paths), "-o", "report.html"])
    parts = [header(title, points, groups, regenerate), warned(points), runs_section(points)]
    for i, members in enumerate(groups):
        parts.append(series_section(i, members, groups, paths, network))
    parts += [kernels_section(points, paths), gate_section(points, csvs, program), points_section(points, paths)]
    return html.page(title, "\n".join(filter(None, parts)))


def header(title, points, groups, regenerate):
    valid = sum(p.valid for p in points)
    runs = {p.run.path for p in points}
    cards = [
        (f"{valid} of {len(points)}", "points VALID"),
        (len(runs), "runs"),
        (max(p.ranks for p in points), "ranks at most"),
        (", ".join(sorted({p.run.device for p in points})), "device"),
    ]
    cards += best_speedup(groups)
    links = "".join(
        f'<a href="#s{i}">{html.escape(name)}</a>' for i, name in enumerate(series.titles(groups, short_title)[:12])
    )
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"<h1>{html.escape(title)}</h1><p class=muted>Made {made} by</p>{html.command_line(regenerate)}"
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{html.escape(v)}</b><span>{html.escape(what)}</span></div>' for v, what in cards
        )
        + f'</div><nav aria-label="sections"><a href="#runs">Runs</a>{links}<a href="#gate">Gate</a>'
        '<a href="#points">All points</a></nav>'
    )


def short_title(point):
    return f"{point.kind}, {point.run.device}"


def best_speedup(groups):
    """Card of the largest speedup of any series, over a real baseline."""
    best = None
    for members in groups:
        try:
            frame = scaling(members, "strong", per_stage=False)
        except AnalysisError:
            continue
        frame = frame[(frame.ranks > frame.base_ranks) & frame.speedup.notna()]
        if len(frame):
            row = frame.loc[frame.speedup.idxmax()]
            if best is None or row.speedup > best.speedup:
                best = row
    if best is None:
        return []
    return [
        (
            f"{best.speedup:.2f}× on {best.ranks}",
            f"best speedup ({series.short(int(best.context))}, {best.layout}, against {int(best.base_ranks)})",
        )
    ]


def warned(points):
    parts = []
    for kind, lines in (" bad", findings.serious(points)), ("", findings.warnings(points)):
        if not lines:
            continue
        shown = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:12])
        rest = "".join(f"<li>{html.escape(line)}</li>" for line in lines[12:])
        more = f"<details><summary>{len(lines) - 12} more</summary><ul>{rest}</ul></details>" if rest else ""
        name = "Wrong results" if kind else "Before you read on"
        parts.append(
            f'<section class="warnings{kind}" aria-label="{name}"><b>{name}</b><ul>{shown}</ul>{more}</section>'
        )
    return "".join(parts)


def runs_section(points):
    """System facts, a row a run; what all share is said once."""
    rows = []
    for run in {p.run.path: p.run for p in points}.values():
        of = [p for p in points if p.run.path == run.path]
        join = lambda name: ", ".join(dict.fromkeys(str(v) for v in run.system.get(name, []) if v not in ("", 0)))
        hosts = set(run.system.get("host", []))
        clock = run.system.get("clock_mhz_after", [])
        rows.append(
            {
                "file": run.path,
                "started": run.attributes.get("start", ""),
                "status": run.attributes.get("status", ""),
                "backend": run.attributes.get("backend", ""),
                "device": run.device,
                "ranks": max(p.ranks for p in of),
                "nodes": len(hosts),
                "points": len(of),
                "commit": str(run.attributes.get("git_commit", ""))[:12],
                "compiler": run.attributes.get("compiler", ""),
                "driver": join("driver"),
                "cuda": join("cuda"),
                "nccl": join("nccl"),
                "mpi": join("mpi"),
                "clock": f"{min(clock):.0f} MHz" if clock and min(clock) > 0 else "",
                "copy_bandwidth": min((p.get("copy_bandwidth", float("nan")) for p in of), default=float("nan")),
                "schema": str(run.attributes.get("schema_version", "")),
            }
        )
    frame = pd.DataFrame(rows)
    varying = [c for c in frame if len(frame) == 1 or frame[c].nunique(dropna=False) > 1 or c == "file"]
    shared = [c for c in frame if c not in varying]
    text = "; ".join(
        f"{c} {frame[c].iloc[0]}"
        for c in shared
        if frame[c].iloc[0] not in ("",) and isinstance(frame[c].iloc[0], (str, int)) or c in ("ranks", "points")
    )
    return (
        '<h2 id="runs">Runs</h2>'
        + (f"<p>All runs: {html.escape(text)}.</p>" if shared else "")
        + html.table(frame, varying, "System facts, a row a run", open_rows=40)
    )


def kernels_section(points, paths):
    frame = kernels(points)
    if frame.empty:
        return ""
    command = shlex.join(["nsa-analysis", "kernels", *series.shown_paths(paths), "--figure", "kernels.svg"])
    shown = columns(frame, ["device", *KERNEL_COLUMNS])
    return (
        '<h2 id="kernels">Kernels</h2>'
        + "<p class=muted>Implementations of one branch on one shape, repetition beside "
        "repetition; medians of the slowest rank, errors against float64.</p>"
        + html.command_line(command)
        + html.figures(plots.kernel_panels(frame[frame.validity == "VALID"]), "k")
        + html.table(frame, shown, "Implementations side by side")
    )


def is_evidence(point):
    """Points that the gate decides on: selection kernels, and decode with its ablations."""
    return (point.kernels is not None and point.get("kernels.branch") == "sel") or any(
        mode.startswith("ablation_") for mode in point.modes
    )


def gate_section(points, csvs, program):
    begin = '<h2 id="gate">M4 gate: is a custom selection kernel worth it?</h2>'
    files = list(dict.fromkeys(p.run.path for p in points if is_evidence(p))) + csvs
    if not files:
        return begin + (
            "<p>Nothing to decide: none of these files holds kernel points (inputs/m4_kernels.toml) or decode "
            "with its ablations (inputs/m4_decode.toml).</p>"
        )
    command = html.command_line(shlex.join(["nsa-analysis", "gate", *files, "--figure", "gate.svg"]))
    try:
        answer = verdict.call_gate(files, program)
    except AnalysisError as reason:
        return begin + command + f"<p>Not decided: {html.escape(reason)}.</p>"
    table, said = verdict.gate_table(answer), verdict.verdicts(answer)
    lines = "".join(
        f"<p><b>{html.escape(r.device)}: {html.escape(r.verdict)}</b> {html.escape(r.why)}</p>"
        + (f"<p class=muted>{html.escape(r.notes)}</p>" if r.notes else "")
        for r in said.itertuples()
    )
    text = "Decided by <code>nsa gate --json</code>; this page draws its answer and holds no rule of its own."
    return (
        begin
        + f"<p class=muted>{text}</p>"
        + command
        + lines
        + html.figures(plots.gate_panels(table), "g")
        + (
            html.table(
                table,
                ["device", "condition", "at", "value", "bound_low", "bound_high", "n", "threshold", "outcome"],
                "Conditions; shares and errors are fractions",
            )
            if len(table)
            else ""
        )
    )


def points_section(points, paths):
    frame = points_table(points)
    command = shlex.join(["nsa-analysis", "points", *series.shown_paths(paths), "--csv", "points.csv"])
    shown = columns(
        frame,
        [
            "file",
            "point",
            "kind",
            "context",
            "batch",
            "forced",
            "layout",
            "median",
            "low",
            "high",
            "n",
            "cv",
            "selection_share",
            "comm_share",
            "max_over_median",
            "reads_counted",
            "reads_expected",
            "max_abs_err",
            "peak_memory",
            "routes",
            "validity",
        ],
    )
    return (
        '<h2 id="points">All points</h2>'
        + html.command_line(command)
        + html.table(frame, shown, "Every point of every file")
    )
