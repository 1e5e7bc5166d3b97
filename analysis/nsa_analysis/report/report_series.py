"""The section of one series, with a part for scaling, lost efficiency, stages, ranks, bandwidth and the cost model."""

from ..data import series
from ..data.tables import stages_table
from ..errors import AnalysisError
from ..figures import plots
from ..figures.axes import times_sign
from ..models import cost_model
from ..models.balance import ranks, stragglers
from ..models.linearity import CAUSES, linearity
from ..models.prediction import extrapolate
from ..models.roofline import roofline
from ..models.scaling import scaling
from ..models.stages import branches, reads
from . import html

PREDICTION_COLUMNS = ["context", "batch", "ranks", "layout", "source", "time", "time_low", "time_high", "speedup"]
PREDICTION_COLUMNS += ["efficiency", "time_comm", "memory"]
POINT_COLUMNS = ["context", "batch", "layout"]


def varying_columns(frame, names):
    """The names that are columns of the table; batch, forced and kind only where they vary."""
    optional = ("batch", "forced", "kind")
    return [n for n in names if n in frame and (n not in optional or frame[n].nunique() > 1)]


def subsection(heading, text, command, body):
    """HTML of one part: heading, text, the command that makes it, and its figures and tables."""
    return f"<h3>{html.escape(heading)}</h3><p class=muted>{html.escape(text)}</p>{html.command_line(command)}{body}"


def series_part(build, i, groups, paths, network):
    """HTML of one of PARTS of series number i; `network` is of the cost model, None: the default."""
    members = groups[i]

    def command(verb):
        return series.shell_command(verb, members, groups, paths, "--figure", f"{verb}.svg")

    try:
        options = (network,) if build is model_part else ()
        return build(f"s{i}", members, command, *options)
    except AnalysisError as reason:
        part = build.__name__.removesuffix("_part").capitalize()
        return f"<p class=muted>{part}: not available: {html.escape(reason)}.</p>"


def series_section(i, groups, parts):
    """HTML of series number i, of that of its parts; folded where there are several series."""
    text = f"<p class=muted>{html.escape(parameters_text(groups[i]))}</p>"
    return html.section(f"s{i}", series.titles(groups)[i], text + "".join(parts), opened=len(groups) == 1)


def parameters_text(members):
    """Parameters of a series in one paragraph."""
    get = members[0].get
    routes = sorted({",".join(map(str, p.get("routes", []))) for p in members})
    contexts, batches = (sorted({p.get(f"run.{name}") for p in members}) for name in ("context", "batch"))
    return (
        f"context {', '.join(map(series.format_count, contexts))}, batch {', '.join(map(str, batches))}; "
        f"l={get('nsa.l')} d={get('nsa.d')} l'={get('nsa.l_sel')} n={get('nsa.n_sel')} w={get('nsa.w')}, "
        f"phi {get('nsa.phi')}, {get('model.layers')} layer(s), dim {get('model.dim')}, "
        f"fill {get('run.fill', 'prefill')}, "
        f"shared_kv {get('model.shared_kv')}; routes of cmp, sel, win: {' or '.join(routes)}; "
        f"commit {members[0].run.attributes.get('git_commit', 'unknown')}. {len(members)} points."
    )


def scaling_part(prefix, members, command):
    """Strong and weak scaling of steps and stages."""
    if len({p.ranks for p in members}) < 2:
        return f"<p class=muted>Scaling: one rank count ({members[0].ranks}); run this input on other rank counts.</p>"
    frame = scaling(members)
    panels = plots.scaling_panels(frame, brief=True)
    frame = frame.assign(curve=frame.curve.str.replace("context ", ""))
    step = frame[frame.stage == "step"]
    text = (
        "Medians of the slowest rank, against the fastest layout on the fewest ranks. Speedup bounds come from both "
        "95% intervals. Karp–Flatt: the serial fraction that explains the speedup. comm is measured with the stages in "
        "sequence; a whole step overlaps part of it."
    )
    shown = varying_columns(
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
    per_stage = varying_columns(
        stages,
        ["curve", "stage", "ranks", "layout", "time", "speedup", "efficiency", "max_over_median", "slowest_rank"],
    )
    return subsection(
        "Scaling",
        text,
        command("scaling"),
        html.figures(panels, f"{prefix}c")
        + html.table(step, shown, "Whole steps")
        + html.table(stages, per_stage, "Stages"),
    )


def linearity_part(prefix, members, command):
    """Why a step is not faster by the ratio of the ranks; empty on one rank count."""
    if len({p.ranks for p in members}) < 2:
        return ""
    frame = linearity(members)
    if frame.empty:
        return "<p class=muted>Why not linear: no VALID point has more ranks than the baseline.</p>"
    text = (
        "Lost efficiency, 100% less that of the step, by cause, as parts of the step. Exchange: comm of the stages in "
        "sequence, without waiting for the slowest rank. Fixed cost: what does not shrink with the work. Imbalance: "
        "the slowest rank's work over the mean. Overlap (a gain): exchange that the whole step hides. Rest: what these "
        "do not explain, such as the launches between exchanges."
    )
    shown = varying_columns(frame, [*POINT_COLUMNS, "time", "efficiency", "lost", *CAUSES, "best"])
    return subsection(
        "Why not linear",
        text,
        command("linearity"),
        html.figures(plots.linearity_panels(frame), f"{prefix}w")
        + html.table(frame, shown, "Lost efficiency by cause"),
    )


def branches_part(prefix, members, command):
    """Time of the stages, and reads."""
    frame, counts = branches(members), reads(members)
    totals = stages_table(members, modes=("total",))
    panels = plots.context_panel(frame, totals) + plots.branch_panels(frame, brief=True)
    panels += plots.distribution_panel(members)
    text = (
        "Mode branches: the stages in sequence, medians of the slowest rank. Their sum can exceed a step (total), in "
        "which they overlap and share launches. Reads: tokens whose K and V one query of "
        "one group loads at the last step; in prefill, all queries of a sequence."
    )
    body = html.figures(panels, f"{prefix}b")
    body += html.table(
        frame,
        varying_columns(frame, [*POINT_COLUMNS, "stage", "median", "low", "high", "n", "share", "max_over_median"]),
        "Time of the stages",
    )
    if len(counts):
        counts = counts.assign(nsa_vibe=counts.get("nsa_vibe"))
        shown = varying_columns(counts, [*POINT_COLUMNS, "branch", "counted", "expected", "nsa_vibe"])
        body += html.table(counts, shown, "Reads")
    return subsection("Branches", text, command("branches"), body)


def ranks_part(prefix, members, command):
    """Time by rank and stage, and stragglers; empty on one rank."""
    if max(p.ranks for p in members) == 1:
        return ""
    frame = ranks(members)
    slow = stragglers(frame)
    panels = [] if slow.empty else plots.rank_panels(frame, most=1)
    text = (
        "Each rank's median over the median of the other ranks, by stage, for the point with the worst straggler; "
        "blank: not timed. A straggler's 95% interval lies above 1.1 times that median, in a stage of at least 1% "
        "of the sum. Waiting counts as comm, so comm has no stragglers."
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
        shown = varying_columns(slow, [*POINT_COLUMNS, "rank", "host", "uuid", "stages", "file"])
        body += html.table(slow, shown, "Stragglers, worst first")
    return subsection("Ranks", text, command("ranks"), body)


def roofline_part(prefix, members, command):
    """Achieved bandwidth by stage."""
    frame = roofline(members)
    text = (
        "The minimum bytes of a stage per second, of a whole step those of what ran, against a copy measured in the "
        "same run on the slowest rank. Above 100% the bytes came from a cache. FLOPs are counted from the shape; "
        "no peak FLOP rate was measured."
    )
    return subsection(
        "Bandwidth",
        text,
        command("roofline"),
        html.figures(plots.roofline_panels(frame, most=1), f"{prefix}f")
        + html.table(
            frame,
            varying_columns(
                frame,
                [
                    *POINT_COLUMNS,
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
    """Cost model: error against measurements, coefficients, predictions."""
    if len({p.ranks for p in members if p.valid}) < 2:
        return "<p class=muted>Cost model: it needs VALID points on at least two rank counts.</p>"
    network = network or cost_model.Network()
    model = cost_model.fit(members)
    predictions, errors = extrapolate(model, members, network=network), cost_model.cross_validate(members)
    held = cost_model.held_out(members)
    step = held[held.stage == "step"]
    text = (
        "A stage takes a fixed time plus its bytes and FLOPs over rates, an exchange a fixed time, a latency per hop "
        "and its bytes over a rate, and a whole step the same terms with coefficients of its own. Its error is that on "
        "layouts that were held out: each is predicted by a fit to the other layouts."
    )
    body = html.figures(plots.check_panels(held), f"{prefix}m") if len(step) else ""
    body += html.table(
        step,
        varying_columns(step, [*POINT_COLUMNS, "ranks", "measured", "predicted", "error"]),
        "Held-out layouts against measurement, whole steps",
    )
    body += html.table(errors, list(errors), "Error by held-out layout, whole steps") if len(errors) else ""
    body += html.table(
        model.coefficients(),
        ["stage", "fixed", "bytes_per_s", "flops_per_s", "per_hop"],
        "Fitted coefficients (–: the coefficient is 0)",
    )
    predicted = (
        f'<div class="predicted-part"><h3>Predicted where not measured: up to {predictions.ranks.max()} ranks</h3>'
        f"<p><b>{html.escape(cost_model.reliability(errors, members))}</b></p>"
        "<p class=muted>The fastest layout of each rank count: the measured one where it was measured, else that which "
        "the model predicts fastest of those that fit into memory. Speedup and efficiency are against the measured "
        "baseline; the interval of a prediction is that of the error on held-out layouts. Network between nodes: "
        f"{html.escape(network.text())}.</p>"
        + html.figures(plots.prediction_panels(predictions, cost_model.unusable(errors))[:1], f"{prefix}p")
        + html.table(predictions, varying_columns(predictions, PREDICTION_COLUMNS), "Predictions", open_rows=6)
        + "</div>"
    )
    return subsection("Cost model", text, command("model"), body + predicted)


PARTS = (scaling_part, linearity_part, branches_part, ranks_part, roofline_part, model_part)
