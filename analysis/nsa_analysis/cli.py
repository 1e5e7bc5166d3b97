"""The command line: nsa-analysis COMMAND FILES..."""

import argparse
import os
import sys

import pandas as pd

from . import __version__
from .data import series
from .data.reading import read
from .data.tables import KERNEL_COLUMNS, kernels, points_table
from .errors import AnalysisError
from .figures import plots, style
from .models import cost_model, gate
from .models.balance import ranks, stragglers
from .models.roofline import roofline
from .models.scaling import scaling
from .models.stages import branches, reads
from .report import html
from .report.report import make_report

EXAMPLES = """examples:
  nsa-analysis report results/ -o report.html           everything, on one page
  nsa-analysis scaling results/*.h5 --figure s.svg      time, speedup, efficiency, serial fraction by ranks
  nsa-analysis scaling results/ --where run.context=65536 --csv scaling.csv
  nsa-analysis model results/ --fit-ranks 1,2 --up-to 256
  nsa-analysis gate m4_decode.h5 m4_kernels.h5          what `nsa gate` decides, drawn

FILES are result files of `nsa run`, or folders that hold them. Exit codes: 0 ok, 2 input or usage, 6 file."""

# Columns that a terminal has room for; --csv and --json have all.
BRIEF = {
    "points": [
        "file",
        "point",
        "kind",
        "context",
        "batch",
        "layout",
        "median",
        "low",
        "high",
        "n",
        "selection_share",
        "comm_share",
        "validity",
    ],
    "scaling": [
        "curve",
        "stage",
        "layout",
        "time",
        "time_low",
        "time_high",
        "speedup",
        "efficiency",
        "serial_fraction",
        "comm_share",
        "max_over_median",
        "validity",
    ],
    "branches": [
        "context",
        "batch",
        "layout",
        "stage",
        "median",
        "low",
        "high",
        "share",
        "max_over_median",
        "validity",
    ],
    "ranks": ["context", "layout", "stage", "rank", "host", "time", "ratio", "straggler"],
    "roofline": ["context", "layout", "stage", "time", "bytes", "achieved", "fraction", "intensity", "validity"],
    "kernels": KERNEL_COLUMNS,
    "gate": ["device", "condition", "at", "value", "bound_low", "bound_high", "threshold", "outcome"],
}


def main(arguments=None):
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        return 0
    except AnalysisError as error:
        print(f"nsa-analysis: error: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(
            f"nsa-analysis: error: {error.filename or 'a file'}: {error.strerror or error}; "
            "check the path, permissions and room on the disk",
            file=sys.stderr,
        )
        return 6


def parser():
    top = argparse.ArgumentParser(
        prog="nsa-analysis",
        description="Tables, figures and one report from result files of nsa",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"nsa-analysis {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def add(name, run, text):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("files", nargs="+", metavar="FILES", help="result files, or folders that hold them")
        command.set_defaults(run=run, name=name)
        return command

    def table(name, run, text, figure=True):
        command = add(name, run, text)
        command.add_argument(
            "--where",
            action="append",
            metavar="NAME=VALUE",
            help="only points whose parameter has this value, e.g. run.context=65536, layout=2x2; may be repeated",
        )
        outputs(command, figure)
        return command

    def outputs(command, figure):
        command.add_argument("--csv", metavar="FILE", help="write the whole table, SI units; - for standard output")
        command.add_argument("--json", metavar="FILE", help="the same as JSON records")
        if figure:
            command.add_argument("--figure", metavar="FILE", help="write the figures as .svg, .png or .pdf")

    table("points", run_points, "every point: what it is, time with statistics, shares, reads, memory", figure=False)
    command = table("scaling", run_scaling, "strong and weak scaling, whole steps and stages")
    command.add_argument("--kind", choices=("strong", "weak", "both"), default="both")
    table("branches", run_branches, "time of the stages by context and layout")
    table("reads", run_reads, "tokens read against context")
    table("ranks", run_ranks, "rank by stage; stragglers are named")
    table("roofline", run_roofline, "achieved against measured bandwidth by stage")
    command = table("model", run_model, "fit a cost model, show its error, carry it to more ranks")
    command.add_argument("--fit-ranks", metavar="N,N", help="rank counts to fit to; the others show the error")
    command.add_argument("--up-to", type=int, default=1024, metavar="N", help="ranks to carry it to (1024)")
    network_options(command)
    table("kernels", run_kernels, "implementations of a branch side by side, of kind = kernels")
    command = add("gate", run_gate, "call `nsa gate` and draw what it decided")
    outputs(command, True)
    command.add_argument("--nsa", metavar="PATH", help="the program ($NSA, else nsa on the PATH)")
    command = add("report", run_report, "one self-contained HTML page")
    command.add_argument("-o", "--output", default="report.html", metavar="FILE", help="report.html")
    command.add_argument("--title", default="nsa report")
    command.add_argument("--nsa", metavar="PATH", help="the program, for the gate ($NSA, else nsa on the PATH)")
    network_options(command)
    return top


def network_options(command):
    default = cost_model.Network()
    group = command.add_argument_group("the network between nodes, assumed")
    group.add_argument("--network", default=default.name, metavar="NAME", help=default.name)
    group.add_argument("--latency", type=float, default=default.latency * 1e6, metavar="US", help="%(default)s us")
    group.add_argument(
        "--link", type=float, default=default.bandwidth / 1e9, metavar="GBPS", help="%(default)s GB/s a rank"
    )
    group.add_argument("--node", type=int, default=default.node, metavar="N", help="%(default)s ranks a node")


def network_of(options):
    if options.latency < 0 or options.link <= 0 or options.node < 1:
        raise AnalysisError("the network needs --latency >= 0, --link > 0 and --node >= 1; mend the option")
    return cost_model.Network(options.network, options.latency * 1e-6, options.link * 1e9, options.node)


def chosen(options):
    return series.where(read(options.files), options.where)


def put(options, frame, panels=None, brief=None):
    """The table to where it was asked for, the figures beside it."""
    if options.csv:
        frame.to_csv(sys.stdout if options.csv == "-" else options.csv, index=False)
    if options.json:
        text = frame.to_json(orient="records", double_precision=15)
        print(text) if options.json == "-" else write(options.json, text)
    if getattr(options, "figure", None):
        if not options.figure.endswith((".svg", ".png", ".pdf")):
            raise AnalysisError(f"--figure {options.figure}: unknown kind of picture; end it in .svg, .png or .pdf")
        if not panels:
            raise AnalysisError(
                f"nothing to draw for `{options.name}` in these files; give points of more sizes or ranks"
            )
        style.save(panels, options.figure)
    if not (options.csv or options.json):
        names = [c for c in brief or BRIEF.get(options.name, list(frame)) if c in frame]
        print(aligned(frame, names) if len(frame) else "no rows")


def aligned(frame, names):
    """These columns as text, in the units and digits of the report."""
    headings, rows, text = html.texts(frame, names)
    columns = [[heading, *cells] for heading, cells in zip(headings.values(), zip(*rows))]
    sides = [str.ljust if name in text else str.rjust for name in headings]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*([side(v, w) for v in column] for side, w, column in zip(sides, widths, columns)))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def run_points(options):
    put(options, points_table(chosen(options)))


def run_scaling(options):
    frame = scaling(chosen(options), options.kind)
    put(options, frame, plots.scaling_panels(frame))


def run_branches(options):
    points = chosen(options)
    frame = branches(points)
    put(options, frame, plots.branch_panels(frame) + plots.reads_panels(reads(points)))


def run_reads(options):
    frame = reads(series.one_series(chosen(options), "chart of reads"))
    put(options, frame, plots.reads_panels(frame))


def chosen_to_draw(options, what):
    """Points whose table may hold several series and whose figure may not."""
    points = chosen(options)
    return series.one_series(points, what) if options.figure else points


def run_ranks(options):
    frame = ranks(chosen_to_draw(options, "heat map of ranks"))
    put(options, frame, plots.rank_panels(frame) if options.figure else None)
    slow = stragglers(frame)
    if not (options.csv or options.json):
        print("\nstragglers: " + ("none" if slow.empty else "\n" + aligned(slow, list(slow))))


def run_roofline(options):
    frame = roofline(chosen_to_draw(options, "bandwidth figure"))
    put(options, frame, plots.roofline_panels(frame) if options.figure else None)


def run_model(options):
    points = chosen(options)
    try:
        fit_ranks = [int(n) for n in options.fit_ranks.split(",")] if options.fit_ranks else None
    except ValueError:
        raise AnalysisError(
            f"--fit-ranks {options.fit_ranks}: no list of numbers; write it as --fit-ranks 1,2"
        ) from None
    if not 1 <= options.up_to <= 1 << 20:
        raise AnalysisError(f"--up-to {options.up_to}: out of range; give 1 to {1 << 20}")
    model = cost_model.fit(points, fit_ranks)
    checked = cost_model.check(model, points)
    network = network_of(options)
    carried = cost_model.carry(model, points, options.up_to, network)
    tables = pd.concat([checked.assign(table="measured and predicted"), carried.assign(table="predicted alone")])
    panels = plots.check_panels(checked) + plots.carry_panels(carried)
    if options.csv or options.json:
        return put(options, tables, panels)
    put(
        options,
        checked[checked.stage == "step"],
        panels,
        ["context", "batch", "layout", "measured", "predicted", "error", "part"],
    )
    found = model.coefficients()
    print(f"\nfitted to {', '.join(map(str, model.fit_ranks))} ranks\n" + aligned(found, list(found)))
    left_out = cost_model.left_out(points)
    if len(left_out):
        print("\neach rank count predicted by a fit to the others\n" + aligned(left_out, list(left_out)))
    print(f"\nPREDICTED, not measured. {cost_model.trust(left_out, points)} Network between nodes: {network.text()}")
    print(aligned(carried, ["context", "batch", "ranks", "layout", "time", "speedup", "efficiency", "time_comm"]))


def run_kernels(options):
    frame = kernels(chosen(options))
    if frame.empty:
        raise AnalysisError('no point of these files is of kind = "kernels"; run inputs/m4_kernels.toml')
    put(options, frame, plots.kernel_panels(frame))


def run_gate(options):
    answer = gate.call_gate(options.files, options.nsa)
    frame = gate.gate_table(answer)
    put(options, frame, plots.gate_panels(frame))
    if not (options.csv or options.json):
        for row in gate.verdicts(answer).itertuples():
            print(f"\n{row.device}: {row.verdict} ({row.why})")


def run_report(options):
    text = make_report(options.files, options.nsa, options.title, network_of(options))
    write(options.output, text)
    print(f"{options.output}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
