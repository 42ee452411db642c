"""A document of sections, with two outputs: a self-contained HTML page, and Markdown.

Texts may contain `code`, and limits of intervals in [brackets], which are kept on one line.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fast_spatial.reporting.charts import STYLE as CHART_STYLE
from fast_spatial.reporting.statistics import Interval
from fast_spatial.runtime.text import aligned

# The placeholder of a missing number.
DASH = "–"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under a head. The first `text_columns` columns are text, the others numbers.

    Rows whose first cell begins with a space belong to the row above.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Code:
    """Lines for a terminal."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A chart and its caption."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Figures:
    """Charts side by side where there is room."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Card:
    """Pictures of one subject, side by side, and their description."""

    pictures: Sequence[tuple[Path, str]]
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Cards side by side where there is room."""

    title: str
    cards: Sequence[Card]


Block = Text | Table | Code | Figures | Pictures


@dataclass(frozen=True)
class Section:
    """A headline and its blocks."""

    title: str
    blocks: Sequence[Block]


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One self-contained HTML page."""
    contents = "".join(f'<a href="#{_anchor(s.title)}">{_inline(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{_anchor(s.title)}"><h2>{_inline(s.title)}</h2>{"".join(map(_block_html, s.blocks))}</section>\n'
        for s in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}{CHART_STYLE}</style>\n</head>\n<body>\n<header><h1>{_inline(title)}</h1>"
        f"<nav>{contents}</nav></header>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same document as Markdown, which names the pictures instead of showing them."""
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", _block_markdown(block)]
    return "\n".join(lines) + "\n"


def percent(interval: Interval | None) -> str:
    """A share in percent with its limits: "71.3 [70.9, 71.7]"."""
    if interval is None:
        return DASH
    value, low, high = (f"{100 * v:.1f}" for v in interval)
    return f"{value} [{low}, {high}]"


def points(interval: Interval | None) -> str:
    """A difference of shares in percentage points, with its limits, all with signs."""
    if interval is None:
        return DASH
    value, low, high = (signed(100 * v, ".1f", plus=True) for v in interval)
    return f"{value} [{low}, {high}]"


def signed(value: float, layout: str = ".3g", *, plus: bool = False) -> str:
    """A number with a typographic minus sign; a number that is shown as zero has no sign."""
    text = format(abs(value), layout)
    if float(text) == 0:
        return text
    return f"{'−' if value < 0 else '+' if plus else ''}{text}"


def _block_html(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Code(text):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Table():
            return _table_html(block)
        case Figures(figures):
            shown = (f"<figure><figcaption>{_inline(f.caption)}</figcaption>{f.svg}</figure>" for f in figures)
            return f'<div class="figures">{"".join(shown)}</div>'
        case Pictures(title, cards):
            return f'<h3>{_inline(title)}</h3><div class="cards">{"".join(map(_card_html, cards))}</div>'


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


def _table_html(table: Table) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ("" if i < table.text_columns else ' class="number"' for i in range(len(row)))
        heads = (f' data-head="{html.escape(head)}"' if tag == "td" else "" for head in table.head)
        return "".join(
            f'<{tag}{kind}{head}><span class="cell">{_inline(cell.strip())}</span></{tag}>'
            for cell, kind, head in zip(row, kinds, heads)
        )

    body = "".join(
        f"<tr{' class=below' if row[0].startswith(' ') else ''}>{cells(row, 'td')}</tr>" for row in table.rows
    )
    head = f"<thead><tr>{cells(table.head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _card_html(card: Card) -> str:
    pictures = "".join(
        f'<img src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{html.escape(alt)}">'
        for path, alt in card.pictures
    )
    return f"<figure>{pictures}<figcaption>{_inline(card.caption)}</figcaption></figure>"


def _inline(text: str) -> str:
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\[[^\]]*\]", lambda m: f'<span class="interval">{m[0]}</span>', escaped)


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1d21; --quiet: #5c6068; --grid: #e6e8eb; --panel: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --ink: #e6e8eb; --quiet: #a4a9b2; --grid: #30343b; --panel: #1d2026; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.2rem clamp(0.8rem, 3vw, 2.4rem) 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.4rem 0 0.8rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 0.6rem; padding-top: 0.8rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
p { max-width: 76ch; margin: 0.6rem 0; overflow-wrap: break-word; }
a { color: inherit; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; font-size: 0.9rem; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
pre { background: var(--panel); padding: 0.7rem 0.9rem; border-radius: 6px; }
pre code { white-space: pre-wrap; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.24rem 0.7rem 0.24rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1.5px solid var(--quiet); font-weight: 600; vertical-align: bottom; }
td { border-top: 1px solid var(--grid); }
tr.below td { border-top: none; color: var(--quiet); padding-top: 0; }
tr.below td:first-child { padding-left: 1rem; }
.number { text-align: right; }
.interval { white-space: nowrap; color: var(--quiet); font-size: 0.92em; }
.figures > figure { display: flex; flex-direction: column; justify-content: flex-end; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 1.4rem 1.6rem;
  margin: 1rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.9rem; line-height: 1.35; margin-bottom: 0.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 1rem; margin: 0.6rem 0; }
.cards img { width: calc(50% - 2px); image-rendering: auto; vertical-align: top; background: #000; }
.cards img + img { margin-left: 4px; }
.cards figcaption { margin-top: 0.25rem; font-size: 0.82rem; }
@media (max-width: 640px) {
  body { font-size: 14px; }
  .scroll { overflow-x: visible; }
  table, tbody { display: block; }
  thead { display: none; }
  tr { display: grid; grid-template-columns: auto 1fr; border-top: 1px solid var(--grid); padding: 0.3rem 0; }
  tr.below { border-top: none; padding-top: 0; }
  td, tr.below td { border: none; padding: 0.05rem 0; min-width: 0; overflow-wrap: anywhere; }
  td:first-child { grid-column: 1 / -1; font-weight: 600; }
  tr.below td:first-child { padding-left: 0; font-weight: 400; }
  td:not(:first-child) { display: contents; }
  td:not(:first-child)::before { content: attr(data-head); color: var(--quiet); padding-right: 1rem; text-align: left; }
  td > span.cell { text-align: left; }
  .number > span.cell { text-align: right; }
}
"""
