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
from .report.report_series import PREDICTION_COLUMNS

EXAMPLES = """examples:
  nsa-analysis report results/ -o report.html           everything, on one page
  nsa-analysis scaling results/*.h5 --figure s.svg      time, speedup, efficiency, serial fraction by ranks
  nsa-analysis scaling results/ --where run.context=65536 --csv scaling.csv
  nsa-analysis model results/ --fit-ranks 1,2 --up-to 256
  nsa-analysis gate m4_decode.h5 m4_kernels.h5          the decision of `nsa gate`, drawn

FILES are result files of `nsa run`, or folders of them. Exit codes: 0 ok, 2 input or usage, 6 file."""

# Columns of the table on the terminal; --csv and --json have all columns.
TERMINAL_COLUMNS = {
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
    """Runs the command and returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        return 0
    except AnalysisError as error:
        print(f"nsa-analysis: error: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(
            f"nsa-analysis: error: {error.filename or 'a file'}: {error.strerror or error}; "
            "check the path, permissions and free disk space",
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
        command.add_argument("files", nargs="+", metavar="FILES", help="result files, or folders of them")
        command.set_defaults(run=run, name=name)
        return command

    def table(name, run, text, figure=True):
        command = add(name, run, text)
        command.add_argument(
            "--where",
            action="append",
            metavar="NAME=VALUE",
            help="only points whose parameter has this value, e.g. run.context=65536, layout=2x2; can be repeated",
        )
        outputs(command, figure)
        return command

    def outputs(command, figure):
        command.add_argument("--csv", metavar="FILE", help="write the whole table, SI units; - for standard output")
        command.add_argument("--json", metavar="FILE", help="the same as JSON records")
        if figure:
            command.add_argument("--figure", metavar="FILE", help="write the figures as .svg, .png or .pdf")

    table("points", run_points, "every point: parameters, time with statistics, shares, reads, memory", figure=False)
    command = table("scaling", run_scaling, "strong and weak scaling, whole steps and stages")
    command.add_argument("--kind", choices=("strong", "weak", "both"), default="both")
    table("branches", run_branches, "time of the stages by context and layout")
    table("reads", run_reads, "tokens read against context")
    table("ranks", run_ranks, "time by rank and stage; stragglers")
    table("roofline", run_roofline, "achieved against measured bandwidth by stage")
    command = table("model", run_model, "fit a cost model, show its error, extrapolate it to more ranks")
    command.add_argument("--fit-ranks", metavar="N,N", help="rank counts to fit to; the error is shown on the others")
    command.add_argument("--up-to", type=int, default=1024, metavar="N", help="most ranks of predictions (1024)")
    add_network_options(command)
    table("kernels", run_kernels, "implementations of a branch side by side, of kind = kernels")
    command = add("gate", run_gate, "run `nsa gate` and draw its decision")
    outputs(command, True)
    command.add_argument("--nsa", metavar="PATH", help="the program ($NSA, else nsa on the PATH)")
    command = add("report", run_report, "one self-contained HTML page")
    command.add_argument("-o", "--output", default="report.html", metavar="FILE", help="report.html")
    command.add_argument("--title", default="nsa report")
    command.add_argument("--nsa", metavar="PATH", help="the program, for the gate ($NSA, else nsa on the PATH)")
    add_network_options(command)
    return top


def add_network_options(command):
    """Options of the assumed network between nodes."""
    default = cost_model.Network()
    group = command.add_argument_group("the assumed network between nodes")
    group.add_argument("--network", default=default.name, metavar="NAME", help=default.name)
    group.add_argument("--latency", type=float, default=default.latency * 1e6, metavar="US", help="%(default)s us")
    group.add_argument(
        "--link", type=float, default=default.bandwidth / 1e9, metavar="GBPS", help="%(default)s GB/s per rank"
    )
    group.add_argument("--node", type=int, default=default.node, metavar="N", help="%(default)s ranks per node")


def network_from(options):
    """Network of the options. Raises AnalysisError if one is out of range."""
    if options.latency < 0 or options.link <= 0 or options.node < 1:
        raise AnalysisError("the network needs --latency >= 0, --link > 0 and --node >= 1; correct the option")
    return cost_model.Network(options.network, options.latency * 1e-6, options.link * 1e9, options.node)


def selected_points(options):
    """Points of the files that satisfy --where."""
    return series.where(read(options.files), options.where)


def write_outputs(options, frame, panels=None, terminal_columns=None):
    """Writes the table to --csv, --json or the terminal, and the figures to --figure."""
    if options.csv:
        frame.to_csv(sys.stdout if options.csv == "-" else options.csv, index=False)
    if options.json:
        text = frame.to_json(orient="records", double_precision=15)
        print(text) if options.json == "-" else write_text(options.json, text)
    if getattr(options, "figure", None):
        if not options.figure.endswith((".svg", ".png", ".pdf")):
            raise AnalysisError(f"--figure {options.figure}: unknown image format; end the name in .svg, .png or .pdf")
        if not panels:
            raise AnalysisError(
                f"nothing to draw for `{options.name}` in these files; give points of more sizes or rank counts"
            )
        style.save(panels, options.figure)
    if not (options.csv or options.json):
        names = [c for c in terminal_columns or TERMINAL_COLUMNS.get(options.name, list(frame)) if c in frame]
        print(align_columns(frame, names) if len(frame) else "no rows")


def align_columns(frame, names):
    """These columns as aligned text, with the units and digits of the report."""
    headings, rows, text = html.format_table(frame, names)
    columns = [[heading, *cells] for heading, cells in zip(headings.values(), zip(*rows))]
    sides = [str.ljust if name in text else str.rjust for name in headings]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*([side(v, w) for v in column] for side, w, column in zip(sides, widths, columns)))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def run_points(options):
    write_outputs(options, points_table(selected_points(options)))


def run_scaling(options):
    frame = scaling(selected_points(options), options.kind)
    write_outputs(options, frame, plots.scaling_panels(frame))


def run_branches(options):
    points = selected_points(options)
    frame = branches(points)
    write_outputs(options, frame, plots.branch_panels(frame) + plots.reads_panels(reads(points)))


def run_reads(options):
    frame = reads(series.one_series(selected_points(options), "chart of reads"))
    write_outputs(options, frame, plots.reads_panels(frame))


def selected_for_figure(options, what):
    """Selected points; with --figure they must form one series, since a figure shows only one."""
    points = selected_points(options)
    return series.one_series(points, what) if options.figure else points


def run_ranks(options):
    frame = ranks(selected_for_figure(options, "heat map of ranks"))
    write_outputs(options, frame, plots.rank_panels(frame) if options.figure else None)
    slow = stragglers(frame)
    if not (options.csv or options.json):
        print("\nstragglers: " + ("none" if slow.empty else "\n" + align_columns(slow, list(slow))))


def run_roofline(options):
    frame = roofline(selected_for_figure(options, "bandwidth figure"))
    write_outputs(options, frame, plots.roofline_panels(frame) if options.figure else None)


def run_model(options):
    points = selected_points(options)
    try:
        fit_ranks = [int(n) for n in options.fit_ranks.split(",")] if options.fit_ranks else None
    except ValueError:
        raise AnalysisError(
            f"--fit-ranks {options.fit_ranks}: not a list of numbers; write it as --fit-ranks 1,2"
        ) from None
    if not 1 <= options.up_to <= 1 << 20:
        raise AnalysisError(f"--up-to {options.up_to}: out of range; give 1 to {1 << 20}")
    model = cost_model.fit(points, fit_ranks)
    checked = cost_model.check(model, points)
    network = network_from(options)
    predictions = cost_model.extrapolate(model, points, options.up_to, network)
    tables = pd.concat([checked.assign(table="measured and predicted"), predictions.assign(table="predicted alone")])
    panels = plots.check_panels(checked) + plots.prediction_panels(predictions)
    if options.csv or options.json:
        return write_outputs(options, tables, panels)
    write_outputs(
        options,
        checked[checked.stage == "step"],
        panels,
        ["context", "batch", "layout", "measured", "predicted", "error", "part"],
    )
    coefficients = model.coefficients()
    print(f"\nfitted to {', '.join(map(str, model.fit_ranks))} ranks")
    print(align_columns(coefficients, list(coefficients)))
    errors = cost_model.cross_validate(points)
    if len(errors):
        print("\neach rank count predicted by a fit to the others\n" + align_columns(errors, list(errors)))
    print(f"\nPREDICTED, not measured. {cost_model.reliability(errors, points)}", end=" ")
    print(f"Network between nodes: {network.text()}")
    print(align_columns(predictions, PREDICTION_COLUMNS))


def run_kernels(options):
    frame = kernels(selected_points(options))
    if frame.empty:
        raise AnalysisError('no point of these files is of kind = "kernels"; run inputs/m4_kernels.toml')
    write_outputs(options, frame, plots.kernel_panels(frame))


def run_gate(options):
    answer = gate.call_gate(options.files, options.nsa)
    frame = gate.gate_table(answer)
    write_outputs(options, frame, plots.gate_panels(frame))
    if not (options.csv or options.json):
        for row in gate.verdicts(answer).itertuples():
            print(f"\n{row.device}: {row.verdict} ({row.why})")


def run_report(options):
    text = make_report(options.files, options.nsa, options.title, network_from(options))
    write_text(options.output, text)
    print(f"{options.output}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
