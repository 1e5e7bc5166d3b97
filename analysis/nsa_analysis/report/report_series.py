"""The sections of a report that are about one series: points that may share a curve."""

from ..data import series
from ..errors import AnalysisError
from ..figures import plots
from ..figures.axes import times_sign
from ..models import cost_model
from ..models.balance import ranks, stragglers
from ..models.roofline import roofline
from ..models.scaling import scaling
from ..models.stages import branches, reads
from . import html

WHAT = ["context", "batch", "layout"]


def columns(frame, names):
    """Those of the names that a table has, a swept size only where it varies."""
    once = {"batch": 1, "forced": 1, "kind": 1}
    return [n for n in names if n in frame and (n not in once or frame[n].nunique() > 1)]


def part(heading, text, command, body):
    return f"<h3>{html.escape(heading)}</h3><p class=muted>{html.escape(text)}</p>{html.command_line(command)}{body}"


def series_section(i, members, groups, paths, network):
    name = series.titles(groups)[i]

    def command(verb):
        return series.command(verb, members, groups, paths, "--figure", f"{verb}.svg")

    parts = [f'<h2 id="s{i}">{html.escape(name)}</h2><p class=muted>{html.escape(facts(members))}</p>']
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
    sizes = {name: sorted({p.get(f"run.{name}") for p in members}) for name in ("context", "batch")}
    return (
        f"context {', '.join(map(series.short, sizes['context']))}, batch {', '.join(map(str, sizes['batch']))}; "
        f"l={get('nsa.l')} d={get('nsa.d')} l'={get('nsa.l_sel')} n={get('nsa.n_sel')} w={get('nsa.w')}, "
        f"phi {get('nsa.phi')}, {get('model.layers')} layer(s), dim {get('model.dim')}, "
        f"fill {get('run.fill', 'prefill')}, "
        f"shared_kv {get('model.shared_kv')}; routes of cmp, sel, win: {' or '.join(routes)}; "
        f"commit {members[0].run.attributes.get('git_commit', 'unknown')}. {len(members)} points."
    )


def scaling_part(prefix, members, command):
    frame = scaling(members)
    panels = plots.scaling_panels(frame)
    if not panels:
        return f"<p class=muted>Scaling: one rank count ({members[0].ranks}); run this input on others to see it.</p>"
    frame = frame.assign(curve=frame.curve.str.replace("context ", ""))
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
        f"Each rank's median over the median of all ranks, by stage; where there are stragglers and on {most} ranks; "
        "blank: no work. A straggler's 95% interval "
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
        "rank. Above 100% the bytes came from a cache. FLOPs are counted from the shape; "
        "no peak FLOP rate was measured."
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
        f"A stage takes a fixed time plus its bytes and FLOPs over rates; an exchange a fixed time, a latency a "
        f"hop and its "
        f"bytes over a rate. Fitted to {', '.join(map(str, model.fit_ranks))} ranks; "
        + (
            f"held out: {', '.join(map(str, held))} ranks."
            if held
            else "that is all there are."
        )
    )
    errors = cost_model.left_out(members)
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
    if len(errors):
        body += html.table(errors, list(errors), "Each rank count predicted by a fit to the others, whole steps")
    predicted = (
        f'<div class="predicted-part"><h3>Predicted, not measured: up to {carried.ranks.max()} ranks</h3>'
        f"<p class=muted>The layout that the model finds fastest on each rank count. Network between nodes: "
        f"{html.escape(network.text())}. Nothing in this box was run. "
        f"{html.escape(cost_model.trust(errors, members))}</p>"
        + html.figures(plots.carry_panels(carried), f"{prefix}p")
        + html.table(
            carried,
            columns(carried, ["context", "batch", "ranks", "layout", "time", "speedup", "efficiency", "time_comm"]),
            "Predictions",
        )
        + "</div>"
    )
    return part("Cost model", text, command("model"), body + predicted)
