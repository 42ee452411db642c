"""Charts as SVG text: lines and heat maps, without scripts or other files. Colours follow the page (`STYLE`).

A chart is 400 units wide, the width of a phone; pages show several side by side. Lines differ in colour (Okabe and
Ito's palette for the colour-blind, brighter on a dark page), dashes and marks. Heat maps use cividis.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 24, 40
_PLOT_HEIGHT = 190
_LEGEND_LINE = 17.0
# Width of a letter at the charts' font size, in units. It is an upper bound, so that no text is clipped.
_LETTER = 6.2

_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
_MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "M-3 -3h6v6h-6z",
    "M0 -4l3.6 6.6h-7.2z",
    "M0 -4l4 4l-4 4l-4 -4z",
    "M0 4l3.6 -6.6h-7.2z",
    "M-3.5 -1h2.5v-2.5h2v2.5h2.5v2h-2.5v2.5h-2v-2.5h-2.5z",
)
STYLES = len(_DASHES)

# cividis at equal steps (Nunez, Anderton, Renslow, PLOS ONE 13:e0199239).
_CIVIDIS = ((0, 34, 78), (53, 69, 107), (102, 105, 112), (148, 142, 119), (200, 182, 107), (254, 232, 56))
LEVELS = 20

STYLE = """
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--ink); }
svg .quiet { fill: var(--quiet); }
svg .grid { stroke: var(--grid); }
svg .frame { stroke: var(--quiet); fill: none; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .band { stroke: none; opacity: 0.14; }
svg .cells { shape-rendering: crispEdges; }
svg .wrong { fill: #000; }
:root { --s0: #0072b2; --s1: #c84e00; --s2: #008a64; --s3: #a8468c; --s4: #8a6a00; --s5: #5a55c8; }
@media (prefers-color-scheme: dark) {
  :root { --s0: #56b4e9; --s1: #ff8f52; --s2: #2fcfa0; --s3: #e79fcb; --s4: #e6c229; --s5: #aaa6ff; }
}
"""


@dataclass(frozen=True)
class Series:
    """One line: its points (x, y), by rising x, and optionally a band: the limits (low, high) of each point.

    Series of the same style share one entry of the legend.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    band: Sequence[tuple[float, float]] = field(default=())


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    x_ticks: Sequence[float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines over one pair of axes; labels hold the units.

    Args:
        title: text for screen readers; the page shows the caption beside the chart.
        x_label: below the axis.
        y_label: above the axis.
        series: at least one, with at least one point.
        x_ticks: by default round numbers.
        y_range: range of the y axis; by default that of the values.

    """
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points if math.isfinite(y)]
    x_axis = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y_low, y_high = y_range or _around(min(ys, default=0.0), max(ys, default=1.0))
    y_axis = _Axis(y_low, y_high, _TOP + _PLOT_HEIGHT, _TOP)
    legend, legend_height = _legend(series, _TOP + _PLOT_HEIGHT + _BOTTOM)
    parts = [_axes(x_axis, y_axis, x_label, y_label, ticks(x_axis.low, x_axis.high, 6) if x_ticks is None else x_ticks)]
    for one in series:
        if one.band:
            edge = [(x, high) for (x, _), (_, high) in zip(one.points, one.band)]
            edge += [(x, low) for (x, _), (low, _) in reversed(list(zip(one.points, one.band)))]
            parts.append(f'<path class="band" fill="var(--s{one.style % STYLES})" d="{_path(edge, x_axis, y_axis)}z"/>')
    for one in series:
        parts.append(_stroke(one.style, _path(one.points, x_axis, y_axis)))
        every = max(1, math.ceil(len(one.points) / 12))
        shown = [p for i, p in enumerate(one.points) if (len(one.points) - 1 - i) % every == 0 and math.isfinite(p[1])]
        parts += [_mark(one.style, x_axis.at(x), y_axis.at(y)) for x, y in shown]
    return _svg(title, _TOP + _PLOT_HEIGHT + _BOTTOM + legend_height, [*parts, legend])


@dataclass(frozen=True)
class Scale:
    """The colour scale, from `low` to `high` in `LEVELS` steps. Values outside get the nearest end's colour."""

    low: float
    high: float
    label: str
    clipped: bool = False

    def level(self, value: float) -> int:
        """The step of a value."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return min(LEVELS - 1, max(0, int(share * LEVELS)))


def heat_map(
    title: str,
    x_label: str,
    y_label: str,
    values: Sequence[Sequence[float]],
    scale: Scale,
    *,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    row_height: float,
    marked: Sequence[tuple[int, int]] = (),
    rows_per_group: int = 0,
) -> str:
    """Cells coloured by value, the first row on top.

    Args:
        title: text for screen readers.
        x_label: below the axis.
        y_label: above the axis.
        values: rows of cells.
        scale: the colour scale; drawn below as a bar.
        x_ticks: (column, text); column 0 is the middle of the first cell.
        y_ticks: (row, text), likewise.
        row_height: height of a row in units.
        marked: (row, column) of cells that get a dot.
        rows_per_group: number of rows between separating lines; 0: no lines.

    """
    rows, columns = len(values), len(values[0])
    width, bottom = (WIDTH - _LEFT - _RIGHT) / columns, _TOP + rows * row_height
    cells: dict[int, list[str]] = {}
    for r, row in enumerate(values):
        top, below = _n(_TOP + r * row_height), _n(_TOP + (r + 1) * row_height)
        # Neighbours of one colour share a rectangle, which saves space. Edges are absolute, so that no gaps remain.
        levels = [scale.level(value) for value in row]
        for level, neighbours in itertools.groupby(range(columns), key=levels.__getitem__):
            run = list(neighbours)
            start, end = _n(_LEFT + run[0] * width), _n(_LEFT + (run[-1] + 1) * width)
            cells.setdefault(level, []).append(f"M{start} {top}H{end}V{below}H{start}z")
    parts = [
        f'<path class="cells" fill="{colour(level)}" d="{"".join(paths)}"/>' for level, paths in sorted(cells.items())
    ]
    dots = [f"M{_n(_LEFT + (c + 0.5) * width - 1)} {_n(_TOP + (r + 0.5) * row_height - 1)}h2v2h-2z" for r, c in marked]
    if dots:
        parts.append(f'<path class="wrong" d="{"".join(dots)}"/>')
    for r in range(rows_per_group, rows, rows_per_group) if rows_per_group else ():
        y = _n(_TOP + r * row_height)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="#fff" stroke-width="1.5"/>')
    parts.append(
        f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" '
        f'height="{_n(rows * row_height)}"/>'
    )
    parts += [_text(_LEFT + (c + 0.5) * width, bottom + 14, text, "middle") for c, text in x_ticks]
    parts += [_text(_LEFT - 5, _TOP + (r + 0.5) * row_height + 4, text, "end") for r, text in y_ticks]
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 30, x_label, "middle", quiet=True))
    parts.append(_text(4, 14, y_label, "start", quiet=True))
    return _svg(title, bottom + 76, [*parts, _colour_bar(scale, bottom + 44)])


def colour(level: int) -> str:
    """The colour of a level from 0 to LEVELS - 1, as "#rrggbb"."""
    place = level / (LEVELS - 1) * (len(_CIVIDIS) - 1)
    below = min(int(place), len(_CIVIDIS) - 2)
    mixed = [a + (b - a) * (place - below) for a, b in zip(_CIVIDIS[below], _CIVIDIS[below + 1])]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Axis:
    """Maps values to coordinates on the page."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


def _around(low: float, high: float) -> tuple[float, float]:
    """The range of the values with a margin above and below; it starts at 0 if the values come near 0."""
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < (high - low) else low - room), high + room


def _axes(x: _Axis, y: _Axis, x_label: str, y_label: str, x_ticks: Sequence[float]) -> str:
    parts = []
    for value in ticks(y.low, y.high):
        place = _n(y.at(value))
        parts.append(f'<line class="grid" x1="{_n(x.start)}" x2="{_n(x.end)}" y1="{place}" y2="{place}"/>')
        parts.append(_text(x.start - 6, y.at(value) + 4, f"{value:g}", "end"))
    for value in x_ticks:
        place = _n(x.at(value))
        parts.append(f'<line class="frame" x1="{place}" x2="{place}" y1="{_n(y.start)}" y2="{_n(y.start + 4)}"/>')
        parts.append(_text(x.at(value), y.start + 16, f"{value:g}", "middle"))
    parts.append(f'<path class="frame" d="M{_n(x.start)} {_n(y.end)}V{_n(y.start)}H{_n(x.end)}"/>')
    parts.append(_text((x.start + x.end) / 2, y.start + 32, x_label, "middle", quiet=True))
    parts.append(_text(4, 14, y_label, "start", quiet=True))
    return "".join(parts)


def _legend(series: Sequence[Series], top: float) -> tuple[str, float]:
    """The legend's entries, wrapped into lines; and their height."""
    names = {one.style: one.name for one in reversed(series)}
    parts, x, y = [], float(_LEFT), top + 12
    for style, name in sorted(names.items()):
        width = 34 + _LETTER * len(name) + 12
        if x > _LEFT and x + width > WIDTH:
            x, y = float(_LEFT), y + _LEGEND_LINE
        parts.append(_stroke(style, f"M{_n(x)} {_n(y - 4)}h28") + _mark(style, x + 14, y - 4))
        parts.append(_text(x + 34, y, name, "start"))
        x += width
    return "".join(parts), y - top + 8


def _colour_bar(scale: Scale, top: float) -> str:
    width = (WIDTH - _LEFT - _RIGHT) * 0.5
    parts = [
        f'<rect x="{_n(_LEFT + i * width / LEVELS)}" y="{_n(top)}" width="{_n(width / LEVELS + 0.3)}" height="9" '
        f'fill="{colour(i)}"/>'
        for i in range(LEVELS)
    ]
    for share in (0.0, 0.5, 1.0):
        text = f"{scale.low + share * (scale.high - scale.low):.3g}"
        text = f"≥ {text}" if share == 1 and scale.clipped else text
        parts.append(_text(_LEFT + share * width, top + 22, text, "middle"))
    parts.append(_text(_LEFT + width + 14, top + 9, scale.label, "start", quiet=True))
    return "".join(parts)


def _stroke(style: int, path: str) -> str:
    dash = _DASHES[style % STYLES]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="line" stroke="var(--s{style % STYLES})"{dashed} d="{path}"/>'


def _mark(style: int, x: float, y: float) -> str:
    shape = _MARKS[style % STYLES]
    return f'<path class="mark" fill="var(--s{style % STYLES})" transform="translate({_n(x)} {_n(y)})" d="{shape}"/>'


def _path(points: Sequence[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    """A line through the points, with a gap at every NaN."""
    found, pen = [], "M"
    for px, py in points:
        if not math.isfinite(py):
            pen = "M"
            continue
        found.append(f"{pen}{_n(x.at(px))} {_n(y.at(py))}")
        pen = "L"
    return "".join(found)


def _text(x: float, y: float, text: str, anchor: str, *, quiet: bool = False) -> str:
    kind = ' class="quiet"' if quiet else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{kind}>{html.escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_n(height)}" role="img">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
    )


def _n(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
