"""Charts: every value where its axis says it is, the same value under the pointer, and colours that are the page's."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fast_spatial.reporting import charts
from fast_spatial.reporting.charts import (
    COLOURS,
    HEIGHT,
    SERIES_COLOURS,
    SHADE,
    STYLES,
    WIDTH,
    AxesText,
    Cells,
    Chart,
    Scale,
    Series,
    colour_bar,
    dots,
    heat_map,
    key,
    lines,
    profiles,
    scale_of,
)

ROOT = Path(__file__).parents[2]
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
STYLE = (ROOT / "fast_spatial" / "reporting" / "templates" / "report.css").read_text(encoding="utf-8")
TEXT = AxesText("angle, degrees", "accuracy, %", "up to {}°")
ROWS = [
    Series("a < b", 0, (0, 10, 30), (10.0, 50.0, 20.0), ((5.0, 15.0), (40.0, 60.0), (10.0, 30.0))),
    Series("other", 1, (0, 10, 30), (90.0, 40.0, 0.0), ((80.0, 95.0), (30.0, 50.0), (0.0, 9.0))),
]
SHIFTS = Cells("tx, px", ["−24", "−12", "0", "12", "24"], ["tx −24 px", "tx −12 px", "tx 0 px", "tx 12 px", "tx 24 px"])
ANGLES = Cells("angle, degrees", [str(2 * a - 30) for a in range(31)], [f"{2 * a - 30}°" for a in range(31)])
LOSS = np.arange(775, dtype=float).reshape(5, 5, 31) / 100
WRONG = (np.arange(775) % 7 < 3).reshape(5, 5, 31)
PANELS = Cells("tx, px", SHIFTS.numbers, [f"{shift}, {angle}" for shift in SHIFTS.names for angle in ANGLES.names])


def all_charts() -> list[Chart]:
    return [
        lines("t", TEXT, ROWS, (0.0, 100.0)),
        dots("t", TEXT, ROWS, (0.0, 100.0)),
        heat_map("t", LOSS[0], Scale(10.0, "loss, nats"), ANGLES, SHIFTS),
        profiles("t", LOSS, WRONG, Scale(8.0, "loss, nats"), PANELS, SHIFTS),
    ]


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def ticks(root: ElementTree.Element, axis: str) -> dict[str, float]:
    """The places of an axis's labels, "x" or "y"."""
    anchor = {"x": "middle", "y": "end"}[axis]
    found = [text for text in root.iter(f"{SVG}text") if f"text-anchor: {anchor}" in text.attrib["style"]]
    return {text.text or "": float(text.attrib[axis]) for text in found}


def strokes(root: ElementTree.Element, colour: str) -> Iterator[list[tuple[float, float]]]:
    """The points of the lines of this colour."""
    for path in root.iter(f"{SVG}path"):
        if f"stroke: var({COLOURS[colour]})" in path.get("style", "") and path.attrib["d"].count(" L ") > 1:
            yield [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])]


def marks(root: ElementTree.Element, colour: str) -> list[tuple[float, float]]:
    uses = [use for use in root.iter(f"{SVG}use") if f"fill: var({COLOURS[colour]})" in use.get("style", "")]
    return [(float(use.attrib["x"]), float(use.attrib["y"])) for use in uses if use.attrib["x"] != "0"]


def picture(root: ElementTree.Element, rows: int, columns: int) -> np.ndarray:
    """The colours of an image's cells, uint8 [rows, columns, 4]."""
    (image,) = root.iter(f"{SVG}image")
    data = base64.b64decode(image.attrib[LINK].partition(",")[2])
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
    return pixels[pixels.shape[0] // rows // 2 :: pixels.shape[0] // rows, 5 :: pixels.shape[1] // columns]


# --- values


def test_points_stand_where_the_ticks_say():
    root = parsed(all_charts()[0].svg)
    across, down = ticks(root, "x"), ticks(root, "y")
    per_percent = (down["40"] - down["100"]) / 60
    for row, colour in zip(ROWS, SERIES_COLOURS):
        (line,) = strokes(root, colour)
        assert [x for x, _ in line] == pytest.approx([across[f"{x}"] for x in row.xs], abs=0.2)
        for (_, y), value in zip(line, row.ys):
            assert y - line[0][1] == pytest.approx((row.ys[0] - value) * per_percent, abs=0.2)
        assert marks(root, colour) == line


def test_the_pointer_reads_each_point_where_it_is_drawn():
    chart = all_charts()[0]
    values = chart.values
    (line,) = strokes(parsed(chart.svg), SERIES_COLOURS[0])
    assert [WIDTH * x for x in values.xs] == pytest.approx([x for x, _ in line], abs=0.2)
    assert values.columns == ["up to 0°", "up to 10°", "up to 30°"]
    assert values.texts[0][1] == "a < b: 50.0 [40.0, 60.0] %\nother: 40.0 [30.0, 50.0] %"
    left, top, right, bottom = values.box
    assert all(left * WIDTH <= x <= right * WIDTH and top * HEIGHT <= y <= bottom * HEIGHT for x, y in line)


def test_bands_enclose_their_line():
    root = parsed(lines("t", TEXT, ROWS[:1], (0.0, 100.0)).svg)
    (line,) = strokes(root, SERIES_COLOURS[0])
    (band,) = (path for path in root.iter(f"{SVG}path") if path.attrib["d"].count("L") > 5 and "id" in path.attrib)
    edge = [(float(x), float(y) + HEIGHT) for x, y in re.findall(r"[ML] (\S+) (\S+)", band.attrib["d"])]
    for x, y in line:
        ys = [found for at, found in edge if abs(at - x) < 0.2]
        assert min(ys) < y < max(ys)


def test_a_level_is_a_line_at_its_height():
    plain, marked = (parsed(lines("t", TEXT, ROWS, (0.0, 100.0), level=level).svg) for level in (None, 35.0))
    before, after = ({path.attrib["d"] for path in root.iter(f"{SVG}path")} for root in (plain, marked))
    (added,) = after - before
    (_, (_, of_40), (_, of_0)), *_ = strokes(marked, SERIES_COLOURS[1])
    height = of_0 + 35 / 40 * (of_40 - of_0)
    assert [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", added)] == pytest.approx([height] * 2, abs=0.2)


def test_gaps_stay_gaps_and_seeds_share_a_line_of_the_pointer():
    seeds = [Series("row", 0, (1, 2, 3), (1.0, math.nan, 2.0)), Series("row", 0, (1, 3), (2.0, 1.0))]
    chart = lines("t", AxesText("epoch", "loss, nats", "epoch {}"), seeds)
    assert "nan" not in chart.svg
    assert chart.values.texts[0] == ["row: 1.000 nats, 2.000 nats", "", "row: 2.000 nats, 1.000 nats"]


@pytest.mark.parametrize("count", [1, 6])
def test_dots_stand_beside_each_other_at_their_limit(count):
    rows = [
        Series(f"row {i}", i, (0, 12, 24), (90.0, 50.0, 100.0), ((80, 95), (40, 60), (96, 100))) for i in range(count)
    ]
    chart = dots("t", TEXT, rows, (0.0, 100.0))
    root = parsed(chart.svg)
    across, down = ticks(root, "x"), ticks(root, "y")
    found = np.array([marks(root, SERIES_COLOURS[i]) for i in range(count)])
    assert found[:, :, 0].mean(axis=0) == pytest.approx([across[x] for x in ("0", "12", "24")], abs=0.3)
    assert [WIDTH * x for x in chart.values.xs] == pytest.approx(found[:, :, 0].mean(axis=0), abs=0.3)
    assert len(np.unique(found[:, 0, 0])) == count
    per_percent = (down["40"] - down["100"]) / 60
    assert found[:, 1, 1] - found[:, 2, 1] == pytest.approx(50 * per_percent, abs=0.3)


def test_every_cell_has_the_colour_of_its_value_and_the_pointer_its_number():
    values = np.array([[(7 * r + 3 * c) % 11 for c in range(31)] for r in range(5)], dtype=float)
    scale = Scale(10.0, "loss, nats", colours="cividis_r")
    chart = heat_map("t", values, scale, ANGLES, SHIFTS)
    expected = matplotlib.colormaps[scale.colours](values / 10.0, bytes=True)
    assert (picture(parsed(chart.svg), 5, 31) == expected).all()
    assert chart.values.texts[4][30] == f"{values[4, 30]:.3f} nats"
    across, down = (ticks(parsed(chart.svg), axis) for axis in ("x", "y"))
    assert [WIDTH * x for x in chart.values.xs[::5]] == pytest.approx([across[t] for t in ANGLES.numbers[::5]], abs=0.2)
    rows = [down[text] for text in SHIFTS.numbers]
    assert np.diff(chart.values.ys) * 166 == pytest.approx(np.diff(rows), abs=0.3)


def test_a_panel_shows_its_losses_and_where_they_are_wrong():
    chart = profiles("t", LOSS, WRONG, Scale(8.0, "loss, nats"), PANELS, SHIFTS)
    root = parsed(chart.svg)
    shaded = picture(root, 5, 155)[..., 3] > 0
    assert (shaded == WRONG.reshape(5, 155)).all()
    # The loss rises from panel to panel and within each, so the lines rise, and end in the last panel's top.
    (line,) = strokes(root, charts._LOSS)
    left, top, right, bottom = (edge * size for edge, size in zip(chart.values.box, (WIDTH, HEIGHT) * 2))
    height = (bottom - top) / 5
    for r, (first, last) in enumerate(zip(LOSS[:, 0, 0], LOSS[:, -1, -1])):
        panel = [(x, y) for x, y in line if top + r * height < y < top + (r + 1) * height]
        base = top + (r + 1 - 0.06) * height
        assert panel[0] == pytest.approx((left + (right - left) / 310, base - 0.88 * height * first / 8), abs=0.3)
        assert panel[-1] == pytest.approx((right - (right - left) / 310, base - 0.88 * height * last / 8), abs=0.3)
    assert chart.values.texts[0][:4] == ["0.000 nats, wrong", "0.010 nats, wrong", "0.020 nats, wrong", "0.030 nats"]
    assert [WIDTH * x for x in chart.values.xs[:2]] == pytest.approx(
        [left + (right - left) * k / 310 for k in (1, 3)], abs=0.1
    )


def test_a_scale_ends_near_the_largest_values():
    assert scale_of([np.array([0.0, 2.9]), np.array([0.1])], "nats") == Scale(
        3.0, "nats", clipped=False, colours="cividis_r"
    )
    assert scale_of([np.r_[np.ones(99), 50.0]], "nats") == Scale(1.0, "nats", clipped=True, colours="cividis_r")
    assert {"0", "0.5", "≥ 1"} <= ticks(parsed(colour_bar(Scale(1.0, "nats", clipped=True))), "x").keys()


@pytest.mark.parametrize("values", [((1,), (5.0,)), ((0, 110), (0.0, 99.99)), ((0, 1), (1e-6, 3e-6))])
def test_no_text_leaves_the_picture(values):
    root = parsed(lines("t", TEXT, [Series("a", 0, *values)]).svg)
    for text in root.iter(f"{SVG}text"):
        x, y, wide = float(text.attrib["x"]), float(text.attrib["y"]), 6.2 * len(text.text or "")
        anchor = re.search(r"text-anchor: (\w+)", text.attrib["style"])
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor[1] if anchor else "start"]
        assert left >= -2 and left + wide <= WIDTH + 12 and 0 < y <= HEIGHT, text.text


# --- a part of the page


def test_charts_can_stand_on_one_page():
    """No id is used for two things, none is of a figure, and nothing styles the page."""
    shapes: dict[str, str] = {}
    for svg in [*(chart.svg for chart in all_charts()), *map(key, range(STYLES)), colour_bar(Scale(1.0, "nats"))]:
        root = parsed(svg)
        assert root.attrib["role"] == "img" and "width" not in root.attrib
        assert list(root.iter(f"{SVG}style")) == []
        for element in root.iter():
            if "id" in element.attrib:
                shape = re.sub(r"#\w+", "", ElementTree.tostring(element, encoding="unicode").strip())
                assert shapes.setdefault(element.attrib["id"], shape) == shape
            if element.get(LINK, "#").startswith("#") and LINK in element.attrib:
                assert element.attrib[LINK][1:] in shapes
    assert not any(re.fullmatch(r"[a-z.]+\d*_\d+", name) for name in shapes)


def test_the_same_values_make_the_same_chart():
    assert all_charts() == all_charts()


def test_every_colour_is_the_pages():
    for svg in [*(chart.svg for chart in all_charts()), *map(key, range(STYLES))]:
        for _, colour in re.findall(r"(fill|stroke): ([^;\"]+)", svg):
            assert colour == "none" or re.fullmatch(r"var\(--\w+\)", colour)
    for mode in modes():
        assert {*COLOURS.values()} <= mode.keys()
    assert f"background: {SHADE};" in STYLE
    assert "fill-opacity: var(--band)" in all_charts()[0].svg
    assert STYLE.count("--band: ") == len(modes()) == 2


def test_series_are_told_apart_without_colours():
    looks = [re.sub(r"var\(--s\d\)|\w+(?=\")", "", key(style)) for style in range(STYLES)]
    assert len(set(looks)) == STYLES == 6  # as many as the table has rows


def modes() -> list[dict[str, str]]:
    """The colours of light and dark mode."""
    found = [dict(re.findall(r"(--\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)]
    return [colours for colours in found if colours]


def luminance(text: str) -> float:
    channels = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("mode", [0, 1])
def test_lines_and_text_stand_out_from_the_page(mode):
    """At least 3 : 1, as WCAG asks of graphics, and 4.5 : 1 for text."""
    colours = modes()[mode]
    page = colours["--page"].replace("#fff", "#ffffff")
    for name, least in [*((f"--s{i}", 3.0) for i in range(STYLES)), ("--loss", 3.0), ("--ink", 4.5), ("--quiet", 4.5)]:
        light, dark = sorted((luminance(colours[name]), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, name


# --- Matplotlib's own files


def test_a_home_that_cannot_be_written_and_a_users_style_change_nothing(tmp_path):
    """Its list of fonts is kept among our caches; a style of the working folder has no effect."""
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\n")
    code = (
        "from fast_spatial.reporting.charts import AxesText, Series, lines\n"
        "print(lines('t', AxesText('x', 'y, %', '{}'), [Series('a', 0, (1, 2), (3.0, 4.0))]).svg)"
    )
    environment = {
        **os.environ,
        "HOME": "/proc/none",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("MPLCONFIGDIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    expected = lines("t", AxesText("x", "y, %", "{}"), [Series("a", 0, (1, 2), (3.0, 4.0))]).svg
    assert done.stdout.strip() == expected
    assert list((tmp_path / "cache" / "fast_spatial" / "matplotlib").glob("fontlist*"))
