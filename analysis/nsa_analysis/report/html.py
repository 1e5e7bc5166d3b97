"""HTML of tables and figures, and the page template. The page loads no external resource."""

import html
import math
import re

import numpy as np
import pandas as pd

from ..figures.axes import time_unit, times_sign
from ..figures.style import css_variables, to_svg

TIMES = {
    "time",
    "time_low",
    "time_high",
    "ideal_time",
    "median",
    "low",
    "high",
    "min",
    "p95",
    "p99",
    "measured",
    "predicted",
    "fixed",
    "per_hop",
    "time_a",
    "time_b",
}
SHARES = {
    "efficiency",
    "lost",
    "exchange",
    "fixed_cost",
    "imbalance",
    "overlap",
    "rest",
    "comm_share",
    "share",
    "selection_share",
    "serial_fraction",
    "fraction",
    "cv",
    "error",
    "median_error",
}
# Headings of columns whose name is not the heading.
HEADINGS = {
    "time_low": "95% interval",
    "low": "95% interval",
    "bound_low": "interval",
    "ratio_low": "interval",
    "max_over_median": "max/median",
    "comm_share": "comm",
    "serial_fraction": "Karp–Flatt",
    "base_ranks": "against ranks",
    "speedup_low": "its bounds",
    "copy_bandwidth": "copy",
    "validity": "result",
    "peak_memory": "peak memory",
    "selection_share": "selection",
    "bytes_per_s": "bytes",
    "flops_per_s": "FLOPs",
    "flop_rate": "FLOPs",
    "fraction": "of copy",
    "ideal_time": "ideal",
    "nsa_vibe": "nsa-vibe",
    "median_error": "median error",
}


HAS_MARKUP = re.compile("[&<>\"']").search


def escape(value):
    text = str(value)
    return html.escape(text, quote=True) if HAS_MARKUP(text) else text


def format_number(value, digits=3):
    """`value` with this many significant digits, without exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def is_time(name):
    return name in TIMES or name.startswith("time_")


def unit_of(name, times):
    """(factor, unit) of a column; `times` is that of all time columns."""
    if is_time(name):
        return times
    if name in SHARES:
        return 100, "%"
    return {
        "achieved": (1e-9, "GB/s"),
        "copy_bandwidth": (1e-9, "GB/s"),
        "bytes_per_s": (1e-9, "GB/s"),
        "flop_rate": (1e-12, "TFLOP/s"),
        "flops_per_s": (1e-12, "TFLOP/s"),
        "bytes": (1e-6, "MB"),
        "flops": (1e-9, "10⁹"),
        "peak_memory": (1e-6, "MB"),
        "memory": (1e-9, "GB"),
        "intensity": (1, "FLOP/byte"),
    }.get(name, (1, ""))


def heading(name, unit):
    text = HEADINGS.get(name, name.removeprefix("time_").replace("_", " "))
    return f"{text} ({unit})" if unit else text


def format_cell(value, factor, name):
    """Text of a cell; – where the value is missing."""
    if isinstance(value, str):
        return times_sign(value) if name == "layout" else value
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else ""
    value = float(value) * factor
    if value.is_integer() and factor == 1:
        return f"{int(value)}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else format_number(value)


def format_interval(low, high, factor=1):
    """`[low, high]`, as the program prints intervals."""
    return "–" if pd.isna(low) or pd.isna(high) else f"[{format_number(low * factor)}, {format_number(high * factor)}]"


def upper_bound(name):
    """Column of the upper bound, given that of a lower bound; else None. Tables show both in one cell."""
    return f"{name.removesuffix('low')}high" if name == "low" or name.endswith("_low") else None


OPEN_ROWS = 14  # longer tables are collapsed on screen and expanded in print


def format_table(frame, columns):
    """({column: heading}, [cell texts] by column, names of text columns). The bounds of an interval share a cell."""
    times = time_unit(frame[[c for c in columns if is_time(c)]].to_numpy(dtype=float))
    bounds = {c: upper_bound(c) for c in columns if upper_bound(c) in columns}
    columns = [c for c in columns if c not in bounds.values()]
    units = {c: unit_of(c, times) for c in columns}

    values = {c: frame[c].tolist() for c in (*columns, *bounds.values())}

    def shown(c):
        factor = units[c][0]
        if c in bounds:
            return [format_interval(low, high, factor) for low, high in zip(values[c], values[bounds[c]])]
        return [format_cell(value, factor, c) for value in values[c]]

    text = {c for c in columns if all(isinstance(v, str) for v in values[c])}
    return {c: heading(c, units[c][1]) for c in columns}, [shown(c) for c in columns], text


def table(frame, columns, caption, open_rows=OPEN_ROWS):
    """Table of these columns in a box that scrolls horizontally. INVALID rows are highlighted."""
    headings, cells, text = format_table(frame, columns)
    classes = ["" if c in text else " class=n" for c in headings]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(classes, headings.values()))
    invalid = (frame["validity"] != "VALID") if "validity" in frame else [False] * len(frame)
    tagged = [[f"<td{css}>{escape(text)}</td>" for text in column] for css, column in zip(classes, cells)]
    rows = [f"<tr{' class=invalid' if bad else ''}>{''.join(row)}</tr>" for bad, *row in zip(invalid, *tagged)]
    body = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    if len(rows) <= open_rows:
        return f'<p class="caption">{escape(caption)}</p>{body}'
    return f"<details><summary>{escape(caption)}, {len(rows)} rows</summary>{body}</details>"


def section(name, heading, body, opened=False):
    """A section with a heading that folds it; ids of sections are targets of links, which unfold them."""
    return (
        f'<details class="section" id="{name}"{" open" if opened else ""}>'
        f"<summary><h2>{escape(heading)}</h2></summary>{body}</details>"
    )


def command_line(text):
    """Shell command in a box."""
    return f'<pre class="command" tabindex="0"><code>{escape(text)}</code></pre>'


def figures(panels, prefix):
    """Grid of figures; ids begin with `prefix`."""
    parts = []
    for i, panel in enumerate(panels):
        svg = to_svg(panel, f"{prefix}{i}", escape(panel.title))
        parts.append(f'<figure class="{"predicted" if panel.predicted else "measured"}">{svg}</figure>')
    return f'<div class="figures">{"".join(parts)}</div>'


STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%%; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .25rem; }
h1, h2, h3, p, li, td { overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .4rem 0; }
.muted, .caption { color: var(--muted); font-size: .9rem; }
nav { margin: .75rem 0; } nav a { margin-right: 1rem; display: inline-block; }
a { color: var(--blue); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.card { border: 1px solid var(--grid); border-radius: .4rem; padding: .6rem .8rem; min-width: 0; }
.card b { display: block; font-size: 1.1rem; overflow-wrap: anywhere; }
.card span { color: var(--muted); font-size: .85rem; }
.warnings { border-left: .3rem solid var(--orange); padding: .1rem 0 .1rem 1rem; margin: 1rem 0; }
.warnings.bad { border-color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 25rem), 1fr)); gap: .75rem; }
figure { margin: .5rem 0; min-width: 0; max-width: 36rem; }
figure svg { width: 100%%; height: auto; display: block; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.predicted-part { border: 2px dashed var(--muted); border-radius: .5rem;
  padding: .25rem 1rem .75rem; margin: 1.5rem 0; }
.scroll { overflow-x: auto; max-width: 100%%; margin: .25rem 0 .75rem; /* a shadow where the table continues */
  background: linear-gradient(90deg, var(--paper) 40%%, transparent) local,
    linear-gradient(270deg, var(--paper) 40%%, transparent) 100%% 0 local,
    linear-gradient(90deg, var(--grid), transparent), linear-gradient(270deg, var(--grid), transparent) 100%% 0;
  background-size: 3rem 100%%, 3rem 100%%, .5rem 100%%, .5rem 100%%; background-repeat: no-repeat; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid var(--grid); white-space: nowrap; }
.warnings li { white-space: normal; }
th { color: var(--muted); font-weight: 600; } .n { text-align: right; }
tr.group th { padding-top: .7rem; white-space: normal; } .glance { width: 100%%; max-width: 60rem; }
tr.group a { display: inline-block; max-width: calc(100vw - 3.5rem); }
@media (max-width: 40rem) { .glance { font-size: .74rem; } .glance .wide { display: none; }
  .glance th, .glance td { padding: .2rem .22rem; } }
tr.invalid td { color: var(--bad); font-weight: 600; }
details.section { margin: 0; border-top: 1px solid var(--grid); }
details.section > summary h2 { display: inline; font-size: 1.05rem; font-weight: 600; margin: 0; padding: 0; border: 0;
  color: var(--ink); }
details.section > summary { padding: .45rem 0; } details.section[open] { padding-bottom: 1.5rem; }
details.section[open] > summary h2 { font-size: 1.25rem; }
details { margin: .25rem 0 .75rem; } summary { cursor: pointer; color: var(--muted); font-size: .9rem; }
pre.command { overflow-x: auto; max-width: 100%%; max-height: 9rem; padding: .45rem .7rem; margin: .4rem 0;
  font-size: .8rem; border: 1px solid var(--grid); border-radius: .3rem; color: var(--muted); white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media print {
  :root { %(light)s color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  figure, tr, .card { break-inside: avoid; } h2, h3 { break-after: avoid; } h2 { break-before: auto; }
  .scroll { overflow: visible; background: none; } table { font-size: 7pt; }
  th, td { padding: .1rem .25rem; white-space: normal; }
  td:first-child { white-space: nowrap; } .figures { grid-template-columns: 1fr 1fr; } pre.command { max-height: none; }
}
"""

# Printing expands collapsed tables.
SCRIPT = """
const unfold = () => { const at = document.getElementById(location.hash.slice(1));
  for (let e = at; e; e = e.parentElement) if (e.tagName == "DETAILS") e.open = true;
  if (at) at.scrollIntoView(); };
addEventListener("hashchange", unfold); addEventListener("load", unfold);
document.querySelectorAll('a[href^="#"]').forEach(a => a.addEventListener("click", () => setTimeout(unfold)));
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach(d => {
  d.open = true; d.dataset.folded = ""; }));
addEventListener("afterprint", () => document.querySelectorAll("details[data-folded]").forEach(d => {
  d.open = false; delete d.dataset.folded; }));
"""


def page(title, body):
    """The whole HTML document."""
    style = STYLE % {"light": css_variables(False), "dark": css_variables(True)}
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{style}</style></head>\n<body>\n{body}\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
