"""Style of figures, and rendering of panels to files and to HTML.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind readers can distinguish. Every
series also has a marker or a position of its own. In HTML each colour is a CSS variable, so figures follow the light or
dark scheme of the page.
"""

import contextlib
import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Callable

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

matplotlib.use("Agg")

# role -> (light, dark). Matplotlib draws with the light colours; to_svg finds them by value, so all are distinct.
COLOURS = {
    "ink": ("#1b1f24", "#e6e9ee"),
    "muted": ("#59616c", "#a3acb8"),
    "grid": ("#d9dde3", "#363c46"),
    "paper": ("#fdfdfe", "#15181d"),
    "bad": ("#b3001e", "#ff7686"),
    "blue": ("#0072b2", "#4ba6e8"),
    "vermillion": ("#d55e00", "#ff8a4c"),
    "green": ("#009e73", "#35c99c"),
    "purple": ("#cc79a7", "#e8a0c8"),
    "orange": ("#e69f00", "#f6bd4f"),
    "sky": ("#56b4e9", "#a5dcff"),
    "grey": ("#868d97", "#8d96a3"),
}
SERIES = ("blue", "vermillion", "green", "purple", "orange", "sky", "grey")
MARKERS = "osD^vPX"

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "nsa",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


def colour(role):
    return COLOURS[role][0]


STYLE |= {key: colour("ink") for key in ("text.color", "axes.labelcolor", "axes.titlecolor")}
STYLE |= {key: colour("muted") for key in ("xtick.color", "ytick.color", "axes.edgecolor")}
STYLE |= {
    "grid.color": colour("grid"),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes with its title; `draw(ax)` labels both axes, with units."""

    title: str
    draw: Callable
    height: float = 3.1  # inches; all panels have the same width
    legend_columns: int = 3
    predicted: bool = False  # tinted background that separates predictions from measurements

    def _repr_png_(self):
        """PNG that Jupyter shows."""
        picture = io.BytesIO()
        render(self).savefig(picture, format="png", dpi=150, facecolor=colour("paper"))
        return picture.getvalue()


WIDTH = 4.3


def draw_into(figure, panel):
    """Draws the panel on a figure or subfigure, with the legend below the axes."""
    ax = figure.subplots()
    ax.set_title(textwrap.fill(panel.title, 50))
    if panel.predicted:
        ax.patch.set_facecolor(colour("grid"))
        ax.patch.set_alpha(0.35)
        ax.grid(color=colour("paper"))
    panel.draw(ax)
    handles, names = ax.get_legend_handles_labels()
    if names:
        columns = min(panel.legend_columns, len(names))
        by_row = [i for c in range(columns) for i in range(c, len(names), columns)]  # legends fill by column
        figure.legend(
            [handles[i] for i in by_row],
            [names[i] for i in by_row],
            loc="outside lower center" if figure.get_layout_engine() else "lower center",
            ncols=columns,
            handlelength=1.6,
            columnspacing=1.2,
        )


@contextlib.contextmanager
def style(more=()):
    """The style of every figure; a matplotlibrc, of the user or in the current folder, changes nothing."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | dict(more))
        yield


def render(panel):
    """Figure of one panel."""
    with style():
        figure = Figure(figsize=(WIDTH, panel.height), layout="constrained")
        draw_into(figure, panel)
        return figure


TEXT_WIDTH = 0.6  # of a character, in font sizes


def quick_layout(figure):
    """Margins from the lengths of the texts, a fifth of the time of constrained layout: for pages of many panels."""
    ax, (width, height) = figure.axes[0], figure.get_size_inches()

    def widest(labels):
        return max((len(t.get_text()) * t.get_fontsize() * TEXT_WIDTH / 72 for t in labels), default=0)

    x_labels = ax.get_xticklabels()
    turned = math.sin(math.radians(x_labels[0].get_rotation() if x_labels else 0))
    legend_rows = 0
    for legend in figure.legends:
        legend_rows = math.ceil(len(legend.get_texts()) / legend._ncols)
    left = 0.42 + widest(ax.get_yticklabels())
    bottom = 0.44 + 0.1 * (turned == 0) + turned * (widest(x_labels) + 0.12) + 0.155 * legend_rows
    title = ax.get_title(loc="left")
    top = 0.12 + 0.16 * title.count("\n") + 0.18
    right = 0.12 if len(figure.axes) == 1 else 0.12 + 0.75  # a colour bar
    ax.set_position([left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height])
    # Long tick labels push the axes to the right; a title begins with the axes, or where it still fits.
    length = max(map(len, title.split("\n"))) * 9.5 * TEXT_WIDTH / 72
    begin = max(0.08, min(left, width - 0.1 - length))
    ax.set_title(title, loc="left", x=(begin - left) / (width - left - right), y=1.0)
    for bar in figure.axes[1:]:
        bar.set_position([1 - 0.78 / width, bottom / height, 0.11 / width, 1 - (bottom + top) / height])


def save(panels, path):
    """Writes all panels as one picture: PNG, SVG or PDF by the suffix of the path."""
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    with style({"savefig.facecolor": colour("paper")}):
        heights = [max(p.height for p in panels[r * columns : (r + 1) * columns]) for r in range(rows)]
        figure = Figure(figsize=(WIDTH * columns, sum(heights)), layout="constrained")
        cells = figure.subfigures(rows, columns, squeeze=False, height_ratios=heights)
        for panel, cell in zip(panels, cells.flat):
            draw_into(cell, panel)
        figure.savefig(path, dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else None)


def to_svg(panel, prefix, label):
    """Inline SVG with CSS variables as colours and ids that begin with `prefix`."""
    text = io.StringIO()
    with style():
        # savefig draws twice to find the layout; one draw gives the same bytes.
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure = Figure(figsize=(WIDTH, panel.height))
        draw_into(figure, panel)
        quick_layout(figure)
        FigureCanvasSVG(figure).print_svg(text, metadata=metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for role, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{role})")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    box = re.search(r'viewBox="([^"]+)"', svg).group(0)
    return re.sub(
        r"<svg[^>]*>",
        f'<svg {box} role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )


def css_variables(dark):
    """CSS declarations of all colours."""
    return " ".join(f"--{role}:{pair[1 if dark else 0]};" for role, pair in COLOURS.items())
