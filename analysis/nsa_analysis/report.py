"""One page of everything that result files can show: self-contained HTML."""

import datetime
import os
import shlex

import pandas as pd

from . import cost_model, findings, html, plots, series, verdict
from .axes import times_sign
from .balance import ranks, stragglers
from .bandwidth import roofline
from .curves import scaling
from .errors import AnalysisError
from .reading import find_files, read_file
from .stages import branches, reads
from .tables import kernels, points_table

WHAT = ["context", "batch", "layout"]


def columns(frame, names):
    """Those of the names that a table has, a swept size only where it varies."""
    once = {"batch": 1, "forced": 1, "kind": 1}
    return [n for n in names if n in frame and (n not in once or frame[n].nunique() > 1)]


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
    links = "".join(f'<a href="#s{i}">{html.escape(short_title(g[0]))}</a>' for i, g in enumerate(groups[:12]))
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


def part(heading, text, command, body):
    return f"<h3>{html.escape(heading)}</h3><p class=muted>{html.escape(text)}</p>{html.command_line(command)}{body}"


def series_section(i, members, groups, paths, network):
    first = members[0]

    def command(verb):
        return series.command(verb, members, groups, paths, "--figure", f"{verb}.svg")

    parts = [f'<h2 id="s{i}">{html.escape(series.title(first))}</h2><p class=muted>{html.escape(facts(members))}</p>']
    for build in scaling_part, branches_part, ranks_part, roofline_part, model_part:
        try:
            options = (network,) if build is model_part else ()
            parts.append(build(f"s{i}", members, command, *options))
        except AnalysisError as reason:
            name = build.__name__.removesuffix("_part").capitalize()
            parts.append(f"<p class=muted>{name}: nothing to show: {html.escape(reason)}.</p>")
    return "<section>" + "".join(parts) + "</section>"


def facts(members):
    get = members[0].get
    routes = sorted({",".join(map(str, p.get("routes", []))) for p in members})
    return (
        f"l={get('nsa.l')} d={get('nsa.d')} l'={get('nsa.l_sel')} n={get('nsa.n_sel')} w={get('nsa.w')}, "
        f"phi {get('nsa.phi')}, {get('model.layers')} layer(s), dim {get('model.dim')}, fill {get('run.fill', 'prefill')}, "
        f"shared_kv {get('model.shared_kv')}; routes of cmp, sel, win: {' or '.join(routes)}; "
        f"commit {members[0].run.attributes.get('git_commit', 'unknown')}. {len(members)} points."
    )


def scaling_part(prefix, members, command):
    frame = scaling(members)
    panels = plots.scaling_panels(frame)
    if not panels:
        return f"<p class=muted>Scaling: one rank count ({members[0].ranks}); run this input on others to see it.</p>"
    step = frame[frame.stage == "step"]
    text = (
        "Medians of the slowest rank, against the fastest layout on the fewest ranks. Speedup bounds come from both "
        "95% intervals. Karp–Flatt: the serial part that would explain the speedup. comm is that of the stages one "
        "after the other; a whole step hides some of it."
    )
    shown = columns(
        step,
        [
            "curve",
            "ranks",
            "layout",
            "time",
            "time_low",
            "time_high",
            "ideal_time",
            "speedup",
            "speedup_low",
            "speedup_high",
            "efficiency",
            "serial_fraction",
            "comm_share",
            "max_over_median",
            "best",
            "validity",
        ],
    )
    stages = frame[frame.stage != "step"]
    per_stage = columns(
        stages,
        ["curve", "stage", "ranks", "layout", "time", "speedup", "efficiency", "max_over_median", "slowest_rank"],
    )
    return part(
        "Scaling",
        text,
        command("scaling"),
        html.figures(panels, f"{prefix}c")
        + html.table(step, shown, "Whole steps")
        + html.table(stages, per_stage, "Stages"),
    )


def branches_part(prefix, members, command):
    frame, counts = branches(members), reads(members)
    panels = plots.branch_panels(frame) + plots.reads_panels(counts)
    text = (
        "Mode branches: the stages one after the other, medians of the slowest rank. They can add up to more than a "
        "step, in which they overlap. Reads: tokens whose K and V one query of "
        "one group loads at the last step; in prefill, all queries of a sequence."
    )
    body = html.figures(panels, f"{prefix}b")
    body += html.table(
        frame,
        columns(frame, [*WHAT, "stage", "median", "low", "high", "n", "share", "max_over_median"]),
        "Time of the stages",
    )
    if len(counts):
        counts = counts.assign(nsa_vibe=counts.get("nsa_vibe"))
        body += html.table(counts, columns(counts, [*WHAT, "branch", "counted", "expected", "nsa_vibe"]), "Reads")
    return part("Branches", text, command("branches"), body)


def ranks_part(prefix, members, command):
    most = max(p.ranks for p in members)
    if most == 1:
        return ""
    frame = ranks(members)
    slow = stragglers(frame)
    panels = plots.rank_panels(frame)
    text = (
        f"Each rank's median over the median of all ranks, by stage; where there are stragglers and on {most} ranks; blank: no work. A straggler's 95% interval "
        "lies above 1.1 times the median, in a stage of at least 1% of the sum. Waiting shows up in comm, so comm "
        "names nobody."
    )
    body = html.figures(panels, f"{prefix}r")
    if slow.empty:
        body += "<p>No stragglers.</p>"
    else:
        named = slow.groupby(["layout", "rank", "host", "uuid"], sort=False).agg(
            times=("worst", "size"), stages=("stages", "first")
        )
        body += (
            "<ul>"
            + "".join(
                f"<li>{html.escape(f'rank {rank} of {times_sign(layout)} on {host} {uuid}: {r.stages}'.strip())}"
                + (f" and in {r.times - 1} more points" if r.times > 1 else "")
                + "</li>"
                for (layout, rank, host, uuid), r in list(named.iterrows())[:5]
            )
            + "</ul>"
        )
        body += html.table(
            slow, columns(slow, [*WHAT, "rank", "host", "uuid", "stages", "file"]), "Stragglers, worst first"
        )
    return part("Ranks", text, command("ranks"), body)


def roofline_part(prefix, members, command):
    frame = roofline(members)
    text = (
        "Bytes that a stage must move at the least, per second, against a copy measured in the same run on the slowest "
        "rank. Above 100% the bytes came from a cache. FLOPs are counted from the shape; no peak FLOP rate was measured."
    )
    return part(
        "Bandwidth",
        text,
        command("roofline"),
        html.figures(plots.roofline_panels(frame), f"{prefix}f")
        + html.table(
            frame,
            columns(
                frame,
                [
                    *WHAT,
                    "stage",
                    "time",
                    "bytes",
                    "achieved",
                    "copy_bandwidth",
                    "fraction",
                    "flops",
                    "flop_rate",
                    "intensity",
                ],
            ),
            "Achieved bandwidth",
        ),
    )


def model_part(prefix, members, command, network):
    if len({p.ranks for p in members if p.valid}) < 2:
        return "<p class=muted>Cost model: it needs VALID points on two rank counts at least.</p>"
    model = cost_model.fit(members)
    checked, carried = cost_model.check(model, members), cost_model.carry(model, members, network=network)
    held = sorted({p.ranks for p in members} - set(model.fit_ranks))
    text = (
        f"A stage takes a fixed time plus its bytes and FLOPs over rates; an exchange a fixed time, a latency a hop and its "
        f"bytes over a rate. Fitted to {', '.join(map(str, model.fit_ranks))} ranks; "
        + (
            f"held out: {', '.join(map(str, held))} ranks."
            if held
            else "no rank count could be held out: its error is not known."
        )
    )
    off = checked[(checked.stage == "step") & (checked.part == "held out")].error.abs().max()
    trust = (
        ""
        if pd.isna(off)
        else f" On the rank counts held out the model was within {off:.0%} of the measured step"
        + (": too far to rely on." if off > 0.25 else ".")
    )
    step = checked[checked.stage == "step"]
    body = html.figures(plots.check_panels(checked), f"{prefix}m")
    body += html.table(
        step,
        columns(step, [*WHAT, "ranks", "measured", "predicted", "error", "part"]),
        "Model against measurement, whole steps",
    )
    body += html.table(
        model.coefficients(),
        ["stage", "fixed", "bytes_per_s", "flops_per_s", "per_hop"],
        "What the fit found (–: the term takes no part)",
    )
    predicted = (
        f'<div class="predicted-part"><h3>Predicted, not measured: up to {carried.ranks.max()} ranks</h3>'
        f"<p class=muted>The layout that the model finds fastest on each rank count. Network between nodes: "
        f"{html.escape(network.text())}. Nothing in this box was run.{trust}</p>"
        + html.figures(plots.carry_panels(carried), f"{prefix}p")
        + html.table(
            carried,
            columns(carried, ["context", "batch", "ranks", "layout", "time", "speedup", "efficiency", "time_comm"]),
            "Predictions",
        )
        + "</div>"
    )
    return part("Cost model", text, command("model"), body + predicted)


def kernels_section(points, paths):
    frame = kernels(points)
    if frame.empty:
        return ""
    command = shlex.join(["nsa-analysis", "kernels", *series.shown_paths(paths), "--figure", "kernels.svg"])
    shown = columns(
        frame,
        [
            "device",
            "branch",
            "context",
            "rows",
            "heads",
            "head_size",
            "blocks",
            "spans",
            "implementation",
            "median",
            "low",
            "high",
            "n",
            "mean_abs_err",
            "max_abs_err",
            "validity",
        ],
    )
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
