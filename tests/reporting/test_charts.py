"""Charts: well-formed, labelled, and with every value where its axis says it is."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from fast_spatial.reporting import charts
from fast_spatial.reporting.charts import (
    LEVELS,
    STYLE,
    STYLES,
    WIDTH,
    Scale,
    Series,
    colour,
    heat_map,
    line_chart,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"
ROWS = [Series("a < b", [(0, 10.0), (15, 50.0), (30, 20.0)], 0), Series("other", [(0, 90.0), (30, 0.0)], 1)]


def texts(root: ElementTree.Element) -> dict[str, tuple[float, float]]:
    return {t.text or "": (float(t.attrib["x"]), float(t.attrib["y"])) for t in root.iter(f"{SVG}text")}


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", text)]


def points(root: ElementTree.Element) -> Iterator[list[tuple[float, float]]]:
    """The lines' points, without the strokes of the legend."""
    for path in root.iter(f"{SVG}path"):
        if path.attrib.get("class") == "line" and "h" not in path.attrib["d"]:
            values = numbers(path.attrib["d"])
            yield list(zip(values[::2], values[1::2]))


def test_points_stand_where_the_ticks_say():
    root = ElementTree.fromstring(line_chart("title", "degrees", "percent", ROWS, y_range=(0.0, 100.0)))
    place = texts(root)
    (first, second) = points(root)
    # A label of the x axis stands below its tick, one of the y axis beside it, its baseline 4 lower.
    assert [x for x, _ in first] == [place["0"][0], place["15"][0], place["30"][0]]
    height_per_percent = (place["40"][1] - place["100"][1]) / 60
    for value, point in ((50, first[1]), (10, first[0]), (20, first[2]), (90, second[0]), (0, second[1])):
        assert point[1] == pytest.approx(place["100"][1] - 4 + (100 - value) * height_per_percent, abs=0.11)


def test_a_chart_says_what_it_shows():
    root = ElementTree.fromstring(line_chart("A title & more", "angle, degrees", "accuracy, %", ROWS))
    assert root.attrib["role"] == "img"
    assert root.findtext(f"{SVG}title") == "A title & more"
    assert {"angle, degrees", "accuracy, %", "a < b", "other"} <= texts(root).keys()
    strokes = [p.attrib for p in root.iter(f"{SVG}path") if p.attrib.get("class") == "line"]
    assert len({(s["stroke"], s.get("stroke-dasharray")) for s in strokes}) == 2  # told apart without colours


def test_bands_enclose_their_line():
    band = [(5.0, 15.0), (40.0, 60.0), (10.0, 30.0)]
    root = ElementTree.fromstring(line_chart("t", "x", "y", [Series("a", ROWS[0].points, 0, band)], y_range=(0, 100)))
    values = numbers(next(p for p in root.iter(f"{SVG}path") if p.attrib.get("class") == "band").attrib["d"])
    edge = list(zip(values[::2], values[1::2]))
    (line,) = points(root)
    for (x, y), above, below in zip(line, edge[:3], reversed(edge[3:])):
        assert x == above[0] == below[0]
        assert above[1] < y < below[1]  # y grows downwards


def test_seeds_share_an_entry_of_the_legend_and_gaps_stay_gaps():
    seeds = [Series("row", [(1, 1.0), (2, math.nan), (3, 2.0)], 0), Series("row", [(1, 2.0), (3, 1.0)], 0)]
    root = ElementTree.fromstring(line_chart("t", "epoch", "loss", seeds))
    assert [t.text for t in root.iter(f"{SVG}text")].count("row") == 1
    first = next(p for p in root.iter(f"{SVG}path") if p.attrib.get("class") == "line").attrib["d"]
    assert first.count("M") == 2 and "nan" not in first


@pytest.mark.parametrize("names", [["standard"], ["a rather long name of a row, 30 degrees"] * 6, ["row"] * 6])
@pytest.mark.parametrize("values", [[(1, 5.0)], [(0, 0.0), (110, 99.99)], [(0, 1e-6), (1, 3e-6)]])
def test_no_text_leaves_the_picture(names, values):
    chart = line_chart("t", "x", "y", [Series(f"{name} {i}", values, i) for i, name in enumerate(names)])
    root = ElementTree.fromstring(chart)
    height = numbers(root.attrib["viewBox"])[3]
    for text in root.iter(f"{SVG}text"):
        x, y, wide = float(text.attrib["x"]), float(text.attrib["y"]), 6.2 * len(text.text or "")
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[text.attrib["text-anchor"]]
        assert left >= -2 and left + wide <= WIDTH + 12 and 0 < y <= height, text.text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 30, [0, 5, 10, 15, 20, 25, 30]),
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (1, 110, [20, 40, 60, 80, 100]),
        (0.113, 0.171, [0.12, 0.14, 0.16]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high, 6 if high in (30, 110) else 5) == pytest.approx(expected)


# --- heat maps


def cells(root: ElementTree.Element, rows: int, columns: int) -> list[list[str]]:
    """The colour of every cell, read back from the rectangles."""
    boxes: list[tuple[str, float, float, float, float]] = []
    for path in root.iter(f"{SVG}path"):
        if path.attrib.get("class") == "cells":
            for box in re.findall(r"M(\S+) (\S+?)H(\S+?)V(\S+?)H", path.attrib["d"]):
                x, y, right, below = map(float, box)
                boxes.append((path.attrib["fill"], x, y, right, below))
    left, top = min(b[1] for b in boxes), min(b[2] for b in boxes)
    width, height = (max(b[3] for b in boxes) - left) / columns, (max(b[4] for b in boxes) - top) / rows
    found = [[""] * columns for _ in range(rows)]
    for fill, x, y, right, below in boxes:
        for r in range(round((y - top) / height), round((below - top) / height)):
            for c in range(round((x - left) / width), round((right - left) / width)):
                assert found[r][c] == ""
                found[r][c] = fill
    return found


def test_every_cell_has_the_colour_of_its_value():
    values = [[(7 * r + 3 * c) % 11 for c in range(31)] for r in range(25)]
    scale = Scale(0.0, 10.0, "loss, nats")
    svg = heat_map("t", "x", "y", values, scale, x_ticks=[], y_ticks=[], row_height=7)
    expected = [[colour(scale.level(v)) for v in row] for row in values]
    assert cells(ElementTree.fromstring(svg), 25, 31) == expected


def test_labels_and_dots_stand_at_their_cells():
    svg = heat_map(
        "t",
        "angle, degrees",
        "tx, px",
        [[0.0] * 31 for _ in range(5)],
        Scale(0.0, 6.0, "nats", clipped=True),
        x_ticks=[(0, "−30"), (15, "0"), (30, "30")],
        y_ticks=[(0, "−24"), (4, "24")],
        row_height=24,
        marked=[(4, 15)],
    )
    root = ElementTree.fromstring(svg)
    place = texts(root)
    assert {"angle, degrees", "tx, px", "nats", "≥ 6", "3"} <= place.keys()
    assert place["30"][0] - place["−30"][0] == pytest.approx((WIDTH - 60) * 30 / 31, abs=0.2)
    assert place["24"][1] - place["−24"][1] == pytest.approx(4 * 24)
    x, y, *_ = numbers(next(p for p in root.iter(f"{SVG}path") if p.attrib.get("class") == "wrong").attrib["d"])
    assert x + 1 == pytest.approx((place["30"][0] + place["−30"][0]) / 2, abs=0.2)
    assert y + 1 == pytest.approx(place["24"][1] - 4)


def test_levels_end_where_the_scale_does():
    scale = Scale(0.0, 100.0, "%")
    assert [scale.level(v) for v in (-5, 0, 4.99, 5, 99.9, 100, 1e9)] == [
        0,
        0,
        0,
        1,
        LEVELS - 1,
        LEVELS - 1,
        LEVELS - 1,
    ]


# --- colours


def luminance(text: str) -> float:
    channels = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_brighter_colour_is_always_a_larger_value():
    shades = [luminance(colour(level)) for level in range(LEVELS)]
    assert shades == sorted(shades)
    assert min(b - a for a, b in itertools.pairwise(shades)) > 0.002


@pytest.mark.parametrize(("mode", "page"), [(0, "#ffffff"), (1, "#14161a")])
def test_lines_stand_out_from_the_page(mode, page):
    """At least 3 : 1, as WCAG asks of graphics."""
    found = re.findall(r"--s\d: (#\w{6})", STYLE)
    assert len(found) == 2 * STYLES
    for shade in found[mode * STYLES :][:STYLES]:
        light, dark = sorted((luminance(shade), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, shade
    assert charts.STYLES == 6  # as many as the table has rows
