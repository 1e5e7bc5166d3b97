"""Writes what commands make: tables to the terminal and to files, figures and texts."""

import sys
from contextlib import nullcontext

from .data import export
from .data.tables import KERNEL_COLUMNS
from .errors import AnalysisError
from .figures import style
from .outputs import replacing
from .report import html

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
    "linearity": [
        "context",
        "batch",
        "layout",
        "time",
        "efficiency",
        "lost",
        "exchange",
        "fixed_cost",
        "imbalance",
        "overlap",
        "rest",
        "best",
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
    "phases": ["context", "batch", "layout", "phase", "rank", "time", "share"],
    "roofline": ["context", "layout", "stage", "time", "bytes", "achieved", "fraction", "intensity", "validity"],
    "kernels": KERNEL_COLUMNS,
    "compare": [
        "context",
        "batch",
        "branch",
        "rows",
        "heads",
        "head_size",
        "blocks",
        "spans",
        "layout",
        "mode",
        "stage",
        "runs_a",
        "runs_b",
        "time_a",
        "time_b",
        "ratio",
        "ratio_low",
        "ratio_high",
        "verdict",
    ],
    "gate": ["device", "condition", "at", "value", "bound_low", "bound_high", "threshold", "outcome"],
}


def write_outputs(options, frame, panels=None):
    """Writes the table to --csv, --json or the terminal, and the figures to --figure."""
    write_data(options, frame)
    if getattr(options, "figure", None):
        save_figure(options, panels)
    if not (options.csv or options.json):
        names = [c for c in TERMINAL_COLUMNS.get(options.name, list(frame)) if c in frame]
        print(align_columns(frame, names) if len(frame) else "no rows")


def write_data(options, frame):
    """Writes the table to --csv and --json."""
    if options.csv:
        with nullcontext(sys.stdout) if options.csv == "-" else replacing(options.csv) as file:
            frame.to_csv(file, index=False)
    if options.json:
        text = f"[{', '.join(export.json_lines(frame))}]"
        print(text) if options.json == "-" else write_text(options.json, text)


def save_figure(options, panels):
    """Writes the panels to --figure."""
    if not options.figure.endswith((".svg", ".png", ".pdf")):
        raise AnalysisError(f"--figure {options.figure}: unknown image format; end the name in .svg, .png or .pdf")
    if not panels:
        raise AnalysisError(
            f"nothing to draw for `{options.name}` in these files; give points of more sizes or rank counts"
        )
    try:
        style.save(panels, options.figure)
    except OSError as error:
        raise OSError(error.errno, error.strerror, options.figure) from None


def align_columns(frame, names):
    """These columns as aligned text, with the units and digits of the report."""
    headings, cells, text = html.format_table(frame, names)
    columns = [[heading, *column] for heading, column in zip(headings.values(), cells)]
    sides = [str.ljust if name in text else str.rjust for name in headings]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*([side(v, w) for v in column] for side, w, column in zip(sides, widths, columns)))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def write_text(path, text):
    """Writes a file, once it is whole. An OSError names it."""
    with replacing(path) as file:
        file.write(text)


def write_tables(options, frame, panels=None):
    """write_outputs; on the terminal a table for each series."""
    if options.csv or options.json or frame.series.nunique() < 2:
        return write_outputs(options, frame, panels)
    for name, rows in frame.groupby("series", sort=False):
        print(f"\n{name}")
        write_outputs(options, rows)


def shown_columns(frame, names):
    """The names that are columns with a value; those of kernel shapes and the batch only where they vary."""
    optional = {"batch", "branch", "rows", "heads", "head_size", "blocks", "spans", "mode"}
    present = [n for n in names if n in frame and frame[n].notna().any() or n.startswith("ratio")]
    return [n for n in present if n not in optional or frame[n].nunique() > 1]


def write_parquet(path, frame):
    """Writes Parquet where pyarrow is installed. Raises AnalysisError where it is not."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise AnalysisError(f"-o {path}: Parquet needs pyarrow; pip install pyarrow, or write .csv or .jsonl") from None
    export.one_type(frame).to_parquet(path, index=False)
