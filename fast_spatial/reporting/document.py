"""A document of sections, with two outputs: a self-contained HTML page, and Markdown.

Texts may contain `code`, and limits of intervals in [brackets], which are kept on one line.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fast_spatial.reporting.charts import Chart
from fast_spatial.runtime.text import aligned


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Table:
    """Rows under a head. The first `text_columns` columns are text, the others numbers.

    Rows whose first cell begins with a space belong to the row above.
    """

    kind: ClassVar = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Code:
    """Lines for a terminal."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Figure:
    """A chart and its caption."""

    caption: str
    chart: Chart


@dataclass(frozen=True)
class LegendEntry:
    """What a line, a colour or a scale stands for: an SVG picture, or the name of a CSS class that colours a patch."""

    text: str
    svg: str = ""
    patch: str = ""


@dataclass(frozen=True)
class Figures:
    """Charts, in so many columns where there is room, under one legend."""

    kind: ClassVar = "figures"
    figures: Sequence[Figure]
    columns: int
    legend: Sequence[LegendEntry]


@dataclass(frozen=True)
class Card:
    """Pictures of one subject, side by side, and their description."""

    pictures: Sequence[tuple[Path, str]]
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Cards side by side where there is room."""

    kind: ClassVar = "pictures"
    title: str
    cards: Sequence[Card]


Block = Text | Table | Code | Figures | Pictures


@dataclass(frozen=True)
class Section:
    """A headline and its blocks."""

    title: str
    blocks: Sequence[Block]


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One self-contained HTML page, from the template, the style and the script in templates/."""
    environment = Environment(
        loader=PackageLoader("fast_spatial.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {"inline": _inline, "anchor": _anchor, "jpeg": _jpeg}
    return environment.get_template("report.html").render(title=title, sections=sections)


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same document as Markdown, which names the pictures instead of showing them."""
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", _block_markdown(block)]
    return "\n".join(lines) + "\n"


def _block_markdown(block: Block) -> str:
    match block:
        case Text(text):
            return text
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())
        case Table(head, rows, text_columns):
            escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
            return aligned(escaped, text_columns)
        case Figures(figures):
            return "\n".join(f"- chart in report.html: {figure.caption}" for figure in figures)
        case Pictures(title, cards):
            return "\n".join([f"{title} (pictures in report.html):", "", *(f"- {card.caption}" for card in cards)])


def _inline(text: str) -> Markup:
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\[[^\]]*\]", r'<span class="interval">\g<0></span>', marked))


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _jpeg(file: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(file.read_bytes()).decode()}"
