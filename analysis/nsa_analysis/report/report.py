"""The report: all tables and figures of result files on one self-contained HTML page."""

import os
import shlex

from ..data import series
from ..data.parallel import parallel
from ..data.reading import find_files, read
from ..data.tables import KERNEL_COLUMNS, kernels, points_table
from ..errors import AnalysisError
from ..figures import plots
from . import html
from .report_gate import gate_decisions, gate_section
from .report_head import header, in_order, runs_section, warnings_section
from .report_series import PARTS, series_part, series_section, varying_columns


def make_report(paths, program=None, title="nsa report", network=None, options=("-o", "report.html")):
    """HTML of the report on these files and folders.

    `program` is the `nsa` that decides the gate; `options` are those of the command line that makes the page again.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = find_files(paths)
    csvs = [f for f in files if f.endswith(".csv")]
    points = read([f for f in files if f not in csvs]) if len(csvs) < len(files) else []
    if not points:
        raise AnalysisError("a report needs result files (only CSVs were given); use `nsa-analysis gate` to audit CSVs")
    groups = in_order(series.split([p for p in points if p.modes]))
    decisions = gate_decisions(points, csvs, program)
    regenerate = shlex.join(["nsa-analysis", "report", *series.shown_paths(paths), *options])
    top = [(header, title, points, groups, decisions, regenerate), (warnings_section, points)]
    of_series = [(series_part, build, i, groups, paths, network) for i in range(len(groups)) for build in PARTS]
    bottom = [
        (kernels_section, points, paths),
        (gate_section, decisions),
        (runs_section, points),
        (points_section, points, paths),
    ]
    texts = iter(parallel(call, [*top, *of_series, *bottom]))
    parts = [next(texts) for _ in top]
    parts += [series_section(i, groups, [next(texts) for _ in PARTS]) for i in range(len(groups))]
    return html.page(title, "\n".join(filter(None, [*parts, *texts])))


def call(function, *arguments):
    return function(*arguments)


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
