"""The command line: nsa-analysis COMMAND FILES..."""

import argparse
import os
import sys
import warnings

from . import __version__, commands
from .errors import AnalysisError, LeftOut
from .models import cost_model
from .outputs import check_outputs

EXAMPLES = """examples:
  nsa-analysis report results/ -o report.html           everything, on one page
  nsa-analysis scaling results/*.h5 --figure s.svg      time, speedup, efficiency, serial fraction by ranks
  nsa-analysis scaling results/ --where run.context=65536 --csv scaling.csv
  nsa-analysis model results/ --fit-ranks 1,2 --up-to 256
  nsa-analysis model results/ --memory 80 --machine m.toml   for nsa run --dry-run --advise m.toml
  nsa-analysis gate m4_decode.h5 m4_kernels.h5          the decision of `nsa gate`, drawn
  nsa-analysis compare before/ after/ --fail-above 5%   ratios with intervals; exit 1 where it is slower
  nsa-analysis export results/ -o times.csv             every statistic of every stage and rank
  nsa-analysis export results/ --format aiconfigurator -o perf/

FILES are result files of `nsa run`, or folders of them.
Exit codes: 0 ok, 1 slower (compare --fail-above), 2 input or usage, 6 file."""

class Parser(argparse.ArgumentParser):
    """Takes whole names of options only, and each that keeps one value once: the other value would be lost."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, allow_abbrev=False)
        self.register("action", None, Once)
        self.register("action", "store", Once)


class Once(argparse._StoreAction):
    def __call__(self, parser, namespace, values, option_string=None):
        given = namespace.__dict__.setdefault("given", set())
        if option_string and self.dest in given:
            parser.error(f"argument {option_string}: given twice; give it once")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


def open_standard_streams():
    """Closed ones become the null device, and names of files that are no text are printed all the same."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")


def main(arguments=None):
    """Runs the command and returns its exit code."""
    open_standard_streams()
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            print_warnings()
            check_outputs(options)
            code = options.run(options) or 0
        sys.stdout.flush()  # here, where an error can still be reported
        return code
    except AnalysisError as error:
        print(f"nsa-analysis: error: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        drop_output()
        return 0
    except OSError as error:
        drop_output()
        print(
            f"nsa-analysis: error: {error.filename or 'standard output'}: {error.strerror or error}; "
            "check the path, permissions and free disk space",
            file=sys.stderr,
        )
        return 6


def print_warnings():
    """From here on each LeftOut warning is one line on stderr, printed once; there are no other warnings."""
    printed = set()

    def show(message, category, *_):
        if issubclass(category, LeftOut) and str(message) not in printed:
            printed.add(str(message))
            print(f"nsa-analysis: note: {message}", file=sys.stderr)

    warnings.simplefilter("always")
    warnings.showwarning = show


def drop_output():
    """Discards what standard output still buffers, which would fail again when the process ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a file, as in tests
        pass


def parser():
    top = Parser(
        prog="nsa-analysis",
        description="Tables, figures and one report from result files of nsa",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"nsa-analysis {__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)

    def add(name, run, text):
        command = subparsers.add_parser(name, help=text, description=text)
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

    text = "every point: parameters, time with statistics, shares, reads, memory"
    table("points", commands.run_points, text, figure=False)
    command = table("scaling", commands.run_scaling, "strong and weak scaling, whole steps and stages")
    command.add_argument("--kind", choices=("strong", "weak", "both"), default="both")
    table("linearity", commands.run_linearity, "why a step is not faster by the ratio of the ranks, by cause")
    table("branches", commands.run_branches, "time of the stages by context and layout")
    table("reads", commands.run_reads, "tokens read against context")
    table("ranks", commands.run_ranks, "time by rank and stage; stragglers")
    text = "phases of the one launch of a decode step of KV shards; who waits for whom"
    table("phases", commands.run_phases, text, figure=False)
    table("roofline", commands.run_roofline, "achieved against measured bandwidth by stage")
    command = table("model", commands.run_model, "fit a cost model, show its error, extrapolate it to more ranks")
    command.add_argument("--fit-ranks", metavar="N,N", help="rank counts to fit to; the error is shown on the others")
    command.add_argument("--up-to", type=int, default=1024, metavar="N", help="most ranks of predictions (1024)")
    command.add_argument("--machine", metavar="FILE", help="also write the fit for `nsa run --dry-run --advise FILE`")
    add_network_options(command)
    table("kernels", commands.run_kernels, "implementations of a branch side by side, of kind = kernels")
    command = add("gate", commands.run_gate, "run `nsa gate` and draw its decision")
    outputs(command, True)
    command.add_argument("--nsa", metavar="PATH", help="the program ($NSA, else nsa on the PATH)")
    add_compare(subparsers)
    command = table("export", commands.run_export, "one tidy table: point, mode, stage, rank, statistic", figure=False)
    command.add_argument(
        "-o", "--output", metavar="FILE", help="write .csv, .parquet or .jsonl (JSON lines) by the ending of the name"
    )
    command.add_argument(
        "--format",
        choices=("table", "aiconfigurator"),
        default="table",
        help="aiconfigurator: tables of its perf database, below the folder -o",
    )
    command.add_argument("--statistics", metavar="NAME,NAME", help="only these: " + ", ".join(commands.STATISTICS))
    command = add("report", commands.run_report, "one self-contained HTML page")
    command.add_argument("-o", "--output", default="report.html", metavar="FILE", help="report.html")
    command.add_argument("--title", default="nsa report")
    command.add_argument("--nsa", metavar="PATH", help="the program, for the gate ($NSA, else nsa on the PATH)")
    add_network_options(command)
    return top


def add_compare(subparsers):
    """The command `compare A B`."""
    text = "times of one set of runs over those of another, with intervals and a verdict"
    command = subparsers.add_parser("compare", help=text, description=text + " (docs/METRICS.md, Comparing runs)")
    command.add_argument("files", action="append", metavar="A", help="a result file, or a folder of them: the base")
    command.add_argument("files", action="append", metavar="B", help="what is compared with it")
    command.add_argument("--where", action="append", metavar="NAME=VALUE", help="only these points of both sides")
    command.add_argument("--stages", action="store_true", help="stages of mode `branches` too")
    command.add_argument("--ignore", action="append", metavar="NAME", help="a parameter that may differ")
    command.add_argument("--paired", action="store_true", help="run i of A was made next to run i of B, in turns")
    command.add_argument("--run-noise", metavar="2%", help="runs differ by no more than this: a verdict of single runs")
    command.add_argument("--same", default="2%", metavar="2%", help="SAME: the interval lies within this of 1 (2%%)")
    command.add_argument("--fail-above", metavar="5%", help="exit code 1 where B is SLOWER by more than this")
    command.add_argument("--csv", metavar="FILE", help="write the whole table, SI units; - for standard output")
    command.add_argument("--json", metavar="FILE", help="the same as JSON records")
    command.set_defaults(run=commands.run_compare, name="compare")


def add_network_options(command):
    """Options of the assumed network between nodes."""
    default = cost_model.Network()
    group = command.add_argument_group("the assumed network between nodes")
    group.add_argument("--network", default=default.name, metavar="NAME", help=default.name)
    group.add_argument("--latency", type=float, default=default.latency * 1e6, metavar="US", help="%(default)s us")
    group.add_argument(
        "--link", type=float, default=default.bandwidth / 1e9, metavar="GBPS", help="%(default)s GB/s per rank"
    )
    group.add_argument("--memory", type=float, metavar="GB", help="memory of a rank's device; default: by its name")
    group.add_argument("--node", type=int, default=default.node, metavar="N", help="%(default)s ranks per node")


if __name__ == "__main__":
    sys.exit(main())
