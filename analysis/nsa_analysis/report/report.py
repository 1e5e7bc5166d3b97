"""The report: all tables and figures of result files on one self-contained HTML page."""

import concurrent.futures
import multiprocessing
import os
import shlex
import sys
import warnings

from ..data import series
from ..data.reading import find_files, read_file
from ..data.tables import KERNEL_COLUMNS, kernels, points_table
from ..errors import AnalysisError, LeftOut
from ..figures import plots
from . import html
from .report_gate import gate_decisions, gate_section
from .report_head import header, in_order, runs_section, warnings_section
from .report_series import series_section, varying_columns


def make_report(paths, program=None, title="nsa report", network=None, options=("-o", "report.html")):
    """HTML of the report on these files and folders.

    `program` is the `nsa` that decides the gate; `options` are those of the command line that makes the page again.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = find_files(paths)
    csvs = [f for f in files if f.endswith(".csv")]
    points = [p for found in parallel(read_file, [(f,) for f in files if f not in csvs]) for p in found]
    if not points:
        raise AnalysisError("a report needs result files (only CSVs were given); use `nsa-analysis gate` to audit CSVs")
    groups = in_order(series.split([p for p in points if p.modes]))
    decisions = gate_decisions(points, csvs, program)
    regenerate = shlex.join(["nsa-analysis", "report", *series.shown_paths(paths), *options])
    parts = parallel(
        call,
        [
            *((series_section, i, members, groups, paths, network) for i, members in enumerate(groups)),
            (kernels_section, points, paths),
            (gate_section, decisions),
            (runs_section, points),
            (points_section, points, paths),
        ],
    )
    head = [header(title, points, groups, decisions, regenerate), warnings_section(points)]
    return html.page(title, "\n".join(filter(None, [*head, *parts])))


def call(function, *arguments):
    return function(*arguments)


def parallel(function, calls):
    """[function(*arguments) for arguments in calls], on all cores where processes can be forked.

    LeftOut warnings of the calls are repeated here. Raises the first error.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if cores < 2 or len(calls) < 4 or not sys.platform.startswith("linux"):
        return [function(*arguments) for arguments in calls]
    # Fork hands the points over without copying them; arguments are numbers of calls.
    global _work
    _work = function, calls
    with concurrent.futures.ProcessPoolExecutor(min(cores, 8), multiprocessing.get_context("fork")) as pool:
        answers = list(pool.map(_run, range(len(calls))))
    _work = None
    for _, lines in answers:
        for line in lines:
            warnings.warn(line, LeftOut, stacklevel=2)
    return [answer for answer, _ in answers]


_work = None


def _run(i):
    """(result, texts of the LeftOut warnings) of call number i."""
    function, calls = _work
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*calls[i])
    return result, [str(w.message) for w in caught if issubclass(w.category, LeftOut)]


def kernels_section(points, paths):
    frame = kernels(points)
    if frame.empty:
        return ""
    command = shlex.join(["nsa-analysis", "kernels", *series.shown_paths(paths), "--figure", "kernels.svg"])
    shown = varying_columns(frame, ["device", *KERNEL_COLUMNS])
    return html.section(
        "kernels",
        "Kernels",
        "<p class=muted>Implementations of one branch on one shape, with interleaved "
        "repetitions; medians of the slowest rank, errors against float64. The command draws every panel.</p>"
        + html.command_line(command)
        + html.figures(plots.kernel_panels(frame, brief=True), "k")
        + html.table(frame, shown, "Implementations side by side"),
    )


def points_section(points, paths):
    frame = points_table(points)
    command = shlex.join(["nsa-analysis", "points", *series.shown_paths(paths), "--csv", "points.csv"])
    shown = varying_columns(
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
    body = html.command_line(command) + html.table(frame, shown, "Every point of every file")
    return html.section("points", "All points", body)
