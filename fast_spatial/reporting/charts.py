"""Charts as SVG, drawn by Matplotlib, for a page that colours them and shows the value under the pointer.

Every colour of a chart is one of `COLOURS`, and refers to a CSS variable of the page, so that it follows light and dark
mode. Text stays text. Only the colours of heat maps are fixed: cividis, for the colour-blind. A chart is `WIDTH` units
wide, and pages show several side by side. Series differ in colour (Okabe and Ito's palette, darkened), dashes and
markers.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from fast_spatial.kernels.host import cache_folder

# Matplotlib keeps a list of fonts. Its own folder need not be writable, and may hold a user's style. Listing a system's
# fonts takes seconds, and the text of a chart is drawn by the reader's browser.
os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
os.environ.setdefault("MPL_IGNORE_SYSTEM_FONTS", "1")
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it announces a wait of five seconds
import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 320, 220
# Left, bottom, right and top margins of a chart in units.
_MARGINS = (40, 36, 8, 20)
_FONT = 11
_MAP_HEIGHT = 166

# CSS variables of report.css. The values are placeholders: no other colour may equal them.
SERIES_COLOURS = ("#0072b2", "#c84e00", "#008a64", "#a8468c", "#8a6a00", "#5a55c8")
_INK, _QUIET, _GRID, _LOSS = "#1b1d21", "#5c6068", "#e6e8eb", "#3a6ea5"
COLOURS = {
    **{value: f"--s{i}" for i, value in enumerate(SERIES_COLOURS)},
    **{_INK: "--ink", _QUIET: "--quiet", _GRID: "--grid", _LOSS: "--loss"},
}
_DASHES = ("-", (0, (4, 1.6)), (0, (1.2, 1.6)), (0, (5, 1.6, 1.2, 1.6)), (0, (7, 2)), (0, (2.4, 1.2)))
_LOOKS: list[dict[str, Any]] = [
    {"color": colour, "linestyle": dash, "marker": marker, "markeredgewidth": 0, "clip_on": False}
    for colour, dash, marker in zip(SERIES_COLOURS, _DASHES, "os^DvP")
]
STYLES = len(_LOOKS)
# Opacity of bands; a placeholder, too.
_BAND = 0.14
# Of what is judged wrong; in report.css, too.
SHADE = "#e58a1f80"

_SETTINGS: dict[Any, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "fast_spatial", "figure.facecolor": "none"},
    **{"font.size": _FONT, "axes.titlesize": _FONT, "axes.labelsize": _FONT, "text.color": _INK},
    **{"axes.facecolor": "none", "axes.edgecolor": _QUIET, "axes.labelcolor": _QUIET, "axes.titlecolor": _QUIET},
    **{"axes.titlelocation": "left", "axes.titlepad": 7, "axes.titley": 1.0, "axes.labelpad": 3, "axes.linewidth": 1},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.xmargin": 0.02},
    **{"xtick.color": _QUIET, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "ytick.major.size": 0},
    **{"grid.color": _GRID, "grid.linewidth": 1, "lines.linewidth": 1.7, "lines.markersize": 4.5},
}


class Values(NamedTuple):
    """Texts for the pointer: the nearest column and row within a box. Places are fractions of the picture.

    Attributes:
        box: left, top, right, bottom.
        xs: the middle of each column, from the left.
        ys: the middle of each row, from the top.
        columns: a text for each column.
        rows: a text for each row.
        texts: a text for each row and column.

    """

    box: tuple[float, float, float, float]
    xs: list[float]
    ys: list[float]
    columns: Sequence[str]
    rows: Sequence[str]
    texts: Sequence[Sequence[str]]


class Chart(NamedTuple):
    """A picture, and the values that the page shows under the pointer."""

    svg: str
    values: Values


@dataclass(frozen=True)
class Series:
    """Values by rising x, optionally each with its limits (low, high). Series of one row have one style."""

    name: str
    style: int
    xs: Sequence[float]
    ys: Sequence[float]
    limits: Sequence[tuple[float, float]] = ()

    @property
    def look(self) -> dict[str, Any]:
        """Matplotlib's options of the line and its markers; after all looks, the markers change places."""
        turns, number = divmod(self.style, STYLES)
        return {**_LOOKS[number], "marker": _LOOKS[(number + turns) % STYLES]["marker"]}


class AxesText(NamedTuple):
    """Texts of the axes, with units: below the x axis, above the y axis, and of an x value with "{}" for its number."""

    x: str
    y: str
    x_value: str


@dataclass(frozen=True)
class Scale:
    """A range of values, shared by the charts that are compared. Values above `high` are shown as `high`.

    `colours` is a map of Matplotlib.
    """

    high: float
    label: str
    clipped: bool = False
    colours: str = "cividis"


def scale_of(values: Sequence[NDArray[np.floating]], label: str) -> Scale:
    """A scale of losses, from 0 to the 98th percentile of all values, rounded up. As for accuracies, bright is good."""
    flat = np.concatenate([one.ravel() for one in values])
    highest = max(float(np.percentile(flat, 98)), 0.01)
    power = 10.0 ** math.floor(math.log10(highest))
    high = next(power * m for m in (1, 1.5, 2, 3, 4, 6, 8, 10) if power * m >= highest * 0.999)
    return Scale(high, label, clipped=bool(flat.max() > high), colours="cividis_r")


def lines(
    title: str,
    text: AxesText,
    series: Sequence[Series],
    y_range: tuple[float, float] | None = None,
    *,
    level: float | None = None,
) -> Chart:
    """Lines over numbers; limits become bands.

    Args:
        title: for screen readers; the page shows the caption beside the chart.
        text: texts of the axes.
        series: at least one, with at least one finite value.
        y_range: by default that of the values.
        level: the y value of a thin line for comparison.

    """
    with _drawing(HEIGHT) as (figure, axes):
        if level is not None:
            axes.axhline(level, color=_QUIET, linewidth=1)
        for one in series:
            axes.plot(one.xs, one.ys, **one.look, markevery=math.ceil(len(one.xs) / 16))
            if one.limits:
                low, high = np.transpose(one.limits)
                axes.fill_between(one.xs, low, high, color=one.look["color"], alpha=_BAND, linewidth=0, clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        _label(axes, text, y_range)
        xs = sorted({x for one in series for x in one.xs})
        return Chart(_svg(figure, title), _values_at(axes, text, xs, xs, series))


def dots(title: str, text: AxesText, series: Sequence[Series], y_range: tuple[float, float]) -> Chart:
    """Points and their limits over a few x values, which are the same for all series: beside each other, not joined."""
    with _drawing(HEIGHT) as (figure, axes):
        xs = series[0].xs
        middles = np.arange(len(xs))
        beside = (np.arange(len(series)) - (len(series) - 1) / 2) * 0.5 / len(series)  # a gap before the next x
        for shift, one in zip(beside, series):
            look = {**one.look, "linestyle": "none", "elinewidth": 1.7, "markersize": 5.5}
            axes.errorbar(middles + shift, one.ys, yerr=np.abs(np.transpose(one.limits) - one.ys), **look)
        axes.set_xticks(middles, [f"{x:.3g}" for x in xs])
        axes.set_xlim(-0.5, len(xs) - 0.5)
        _label(axes, text, y_range)
        return Chart(_svg(figure, title), _values_at(axes, text, xs, middles.tolist(), series))


class Cells(NamedTuple):
    """One axis of cells: its label with unit, the number shown at each cell, and each cell's name for the pointer."""

    label: str
    numbers: Sequence[str]
    names: Sequence[str]


def heat_map(title: str, values: NDArray[np.floating], scale: Scale, columns: Cells, rows: Cells) -> Chart:
    """Cells [rows, columns] coloured by value, the first row on top; `title` is for screen readers."""
    with _drawing(_MAP_HEIGHT) as (figure, axes):
        across, down = (np.arange(len(cells.numbers)) + 0.5 for cells in (columns, rows))
        _colour(axes, values, scale.colours, scale.high)
        axes.set(xlabel=columns.label, title=rows.label)
        axes.set_xticks(across[::5], columns.numbers[::5])
        axes.set_yticks(down, rows.numbers)
        texts = [[_with_unit(scale.label, value) for value in row] for row in values.tolist()]
        return Chart(_svg(figure, title), Values(*_places(axes, across, down), columns.names, rows.names, texts))


def profiles(
    title: str, loss: NDArray[np.floating], wrong: NDArray[np.bool_], scale: Scale, columns: Cells, rows: Cells
) -> Chart:
    """A panel per cell: the loss as a curve over equally spaced positions, shaded where the prediction is wrong.

    Args:
        title: for screen readers.
        loss: [rows, columns, positions].
        wrong: likewise.
        scale: from the bottom to the top of a panel.
        columns: labels of the panels; their names are those of all positions, panel after panel.
        rows: labels of the panels, the first row on top.

    """
    with _drawing(HEIGHT) as (figure, axes):
        down, across, positions = loss.shape
        _colour(axes, wrong.reshape(down, -1), ListedColormap(["none", SHADE]), 1, width=across)
        x = np.arange(across)[:, None] + (np.arange(positions) + 0.5) / positions
        y = np.arange(1, down + 1)[:, None, None] - 0.06 - 0.88 * np.minimum(loss / scale.high, 1)
        # A NaN after each panel interrupts the line.
        gapped = [np.pad(one, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan) for one in (x + 0 * y, y)]
        axes.plot(*(one.ravel() for one in gapped), color=_LOSS, linewidth=1.3, clip_on=False)
        axes.vlines(range(across + 1), 0, down, color=_GRID, linewidth=1.5)
        axes.hlines(range(down + 1), 0, across, color=_GRID, linewidth=1.5)
        axes.set(xlabel=columns.label, title=rows.label)
        axes.set_xticks(np.arange(across) + 0.5, columns.numbers)
        axes.set_yticks(np.arange(down) + 0.5, rows.numbers)
        axes.tick_params(length=0)
        shown = zip(loss.reshape(down, -1).tolist(), wrong.reshape(down, -1).tolist())
        texts = [[_with_unit(scale.label, v) + ", wrong" * is_wrong for v, is_wrong in zip(*row)] for row in shown]
        places = _places(axes, x.ravel(), np.arange(down) + 0.5)
        return Chart(_svg(figure, title), Values(*places, columns.names, rows.names, texts))


def key(style: int) -> str:
    """A legend's picture of a series."""
    with _drawing(12, width=34, margins=(0, 0, 0, 0)) as (figure, axes):
        axes.plot([0, 0.5, 1], [0, 0, 0], **Series("", style, (), ()).look, markevery=[1])
        axes.set_axis_off()
        return _svg(figure, "")


def colour_bar(scale: Scale) -> str:
    """A legend's picture of a scale's colours."""
    with _drawing(26, width=170, margins=(16, 16, 16, 0)) as (figure, axes):
        _colour(axes, np.arange(256)[None], scale.colours, 255)
        high = f"{'≥ ' if scale.clipped else ''}{scale.high:.3g}"
        axes.set_xticks([0, 128, 256], ["0", f"{scale.high / 2:.3g}", high])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        return _svg(figure, scale.label)


@contextmanager
def _drawing(
    height: float, width: float = WIDTH, margins: tuple[float, float, float, float] = _MARGINS
) -> Iterator[tuple[Figure, Axes]]:
    """A figure of this size in units, with one pair of axes, under our settings instead of the user's."""
    left, bottom, right, top = margins
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(width / 72, height / 72))
        inner = ((width - left - right) / width, (height - bottom - top) / height)
        yield figure, figure.add_axes((left / width, bottom / height, *inner))


def _label(axes: Axes, text: AxesText, y_range: tuple[float, float] | None) -> None:
    axes.set_xlabel(text.x)
    axes.set_title(text.y)
    axes.grid(axis="y")
    if y_range is not None:
        axes.set_ylim(*y_range)
    elif 0 <= axes.dataLim.y0 < axes.dataLim.height:
        axes.set_ylim(bottom=0)


def _values_at(
    axes: Axes, text: AxesText, xs: Sequence[float], places: Sequence[float], series: Sequence[Series]
) -> Values:
    """One column of the pointer's texts for each x, drawn at its place: the values of all series there."""
    found = []
    for at in xs:
        here: dict[str, list[str]] = {}
        for one in series:
            every: Iterable[Sequence[float]] = one.limits or itertools.repeat(())
            for x, y, limits in zip(one.xs, one.ys, every):
                if x == at and math.isfinite(y):
                    here.setdefault(one.name, []).append(_with_unit(text.y, y, *limits))
        found.append("\n".join(f"{name}: {', '.join(values)}" for name, values in here.items()))
    columns = [text.x_value.format(f"{x:.4g}".replace("-", "−")) for x in xs]
    return Values(*_places(axes, places, axes.get_ylim()[:1]), columns, [""], [found])


def _colour(
    axes: Axes, values: NDArray[Any], colour_map: str | Colormap, high: float, width: float | None = None
) -> None:
    """Fill the axes with cells, the first row on top: of unit height, and of unit width unless another is given."""
    # Viewers of PDF files may blur an enlarged image by a pixel: here by a tenth of a cell.
    cells = np.kron(values, np.ones((10, 10)))
    corners = (0, width or values.shape[1], values.shape[0], 0)
    axes.imshow(cells, colour_map, vmin=0, vmax=high, extent=corners, aspect="auto", interpolation="none")


def _with_unit(label: str, value: float, *limits: float) -> str:
    """A value and its limits, if they are known, with the unit at the label's end."""
    unit = label.rpartition(", ")[2]
    shown = [f"{one:.1f}" if unit == "%" else f"{one:.3f}" for one in (value, *limits) if not math.isnan(one)]
    return f"{shown[0]}{f' [{shown[1]}, {shown[2]}]' if shown[1:] else ''} {unit}"


def _places(
    axes: Axes, xs: Sequence[float] | NDArray[np.floating], ys: Sequence[float] | NDArray[np.floating]
) -> tuple[tuple[float, float, float, float], list[float], list[float]]:
    """The axes' box, and these values' places, in fractions of the picture from its top left."""
    box = axes.get_position()
    to_figure = axes.transData + axes.figure.transFigure.inverted()
    across = to_figure.transform([(x, axes.get_ylim()[0]) for x in xs])[:, 0]
    down = 1 - to_figure.transform([(axes.get_xlim()[0], y) for y in ys])[:, 1]
    left, top, right, bottom = np.round([box.x0, 1 - box.y1, box.x1, 1 - box.y0], 4).tolist()
    return (left, top, right, bottom), across.round(4).tolist(), down.round(4).tolist()


_LONG_NUMBER = re.compile(r"(-?\d+\.\d)\d+")
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page: with the page's colours and font, short numbers, and no ids of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root[0])  # a style for all of a document
    for element in root.iter():
        if re.fullmatch(r"[\w.]+_\d+", element.get("id", "")):  # a part's name; what is referred to has another form
            del element.attrib["id"]
        for name in {"d", "x", "y", "width", "height"} & element.attrib.keys():
            element.set(name, _LONG_NUMBER.sub(r"\1", " ".join(element.attrib[name].split())))
        style = re.sub(r"font(-family)?: [^;]*'[^;]*", f"font-size: {_FONT}px", element.get("style", ""))
        if style:
            style = style.replace(f"opacity: {_BAND}", "opacity: var(--band)")
            element.set("style", re.sub(r"#\w{6}", lambda found: f"var({COLOURS[found[0]]})", style))
        element.text, element.tail = (text if (text or "").strip() else None for text in (element.text, element.tail))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")
