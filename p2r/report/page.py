"""Pages: blocks (headings, paragraphs, tables, pictures) -> one HTML page, and the same page as Markdown.

The HTML is one self-contained file: pictures are embedded, there are no scripts, and its own policy forbids loading anything.
The page and its pictures follow the reader's light or dark mode. Narrow screens get pictures drawn for them, and wide tables
scroll sideways on their own. All incoming text is escaped here, and only here.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from p2r.report.canvas import Drawing
from p2r.report.text import for_file_name, for_html, for_markdown

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--faint:#5f6368;--rule:#d8dbdf;--paper:#fff;--card:#f6f7f9;--link:#0062a3;
--note:#fff4e0;--edge:#c75000}
@media (prefers-color-scheme:dark){:root{--ink:#ececec;--faint:#a9adb3;--rule:#3a3f46;--paper:#15181c;--card:#1e2227;
--link:#6cbcf0;--note:#33261a;--edge:#f08a4b}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);background:var(--paper);margin:0}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem;overflow-wrap:anywhere}
h1{font-size:1.75rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.35rem;margin:2.75rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1.08rem;margin:2rem 0 .5rem}
a{color:var(--link)} p{max-width:46rem}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;padding:0;margin:0 0 1rem}
.note{background:var(--note);border-left:4px solid var(--edge);padding:.6rem 1rem;margin:1rem 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(13.5rem,100%),1fr));gap:.75rem;margin:1rem 0;padding:0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.8rem 1rem;display:flex;flex-direction:column}
.card dt{color:var(--faint);font-size:.85rem;order:1}
.card dd{margin:0;order:2} .card dd.value{font-size:1.7rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.card dd.detail{font-size:.85rem;color:var(--faint);order:3}
.scroll{overflow-x:auto;margin:1rem 0}
.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;line-height:1.4}
caption{text-align:left;color:var(--faint);padding-bottom:.4rem;min-width:min(28rem,80vw)}
td,th{padding:.32rem .9rem .32rem 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;font-weight:400;
overflow-wrap:normal}
thead th{border-bottom:2px solid var(--faint);font-weight:600;vertical-align:bottom}
td.number{text-align:right;white-space:nowrap} thead th.number{text-align:right}
td.short,th.short{white-space:nowrap} td.long,th.long{min-width:min(16rem,45vw);overflow-wrap:anywhere}
figure{margin:1.5rem 0} figure img{display:block;width:100%;max-width:60rem;height:auto}
figcaption{color:var(--faint);font-size:.88rem;max-width:46rem;margin-top:.5rem}
details{margin:1rem 0} summary{cursor:pointer;color:var(--link)}
@media print{details{display:block} .scroll{overflow:visible}}
"""
_NUMBER = re.compile(r"[<>≈]? ?[+\-−]?\d[\d.,]*( ?%| s| ± [\d.]+| \[[^\]]*\])?|–|")
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
_SHORT, _LONG = 20, 44  # letters; longer cells may break lines, or get more room


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's title, level 2 is listed in the contents."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text, or a prominent note."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Grid:
    """A table; cells in `bold`, given by row and column, are emphasised."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    caption: str = ""


@dataclass(frozen=True)
class Cards:
    """Key results: name, value, and necessary context."""

    cards: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Picture:
    """A picture, referred to by name."""

    name: str
    caption: str
    alt: str = ""
    """Alternative text; empty: the caption."""


@dataclass(frozen=True)
class Folded:
    """Blocks that are folded until opened."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Grid | Cards | Picture | Folded


def markdown(blocks: Sequence[Block], *, pictures: str = "pictures/") -> str:
    """Return a page as Markdown; `pictures` is the folder of its pictures."""
    return "\n\n".join(_markdown_blocks(blocks, pictures)) + "\n"


def html(blocks: Sequence[Block], pictures: Mapping[str, Drawing | bytes]) -> str:
    """Return a page as one HTML file; `pictures` are drawings, or PNG files, by name."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    targets = _section_anchors(sections)
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f'<title>{for_html(title)}</title><link rel="icon" href="data:,">',
        f"<style>{_STYLE}</style></head><body><main>",
    ]
    body = []
    for block, part in zip(blocks, _html_blocks(blocks, pictures, iter(targets)), strict=True):
        body.append(part)
        if isinstance(block, Heading) and block.level == 1 and len(sections) > 2:
            links = "".join(
                f'<li><a href="#{target}">{for_html(text)}</a></li>'
                for target, text in zip(targets, sections, strict=True)
            )
            body.append(f'<nav aria-label="Contents"><ul>{links}</ul></nav>')
    return "\n".join([*head, *body, "</main></body></html>"]) + "\n"


def _section_anchors(sections: Sequence[str]) -> list[str]:
    """Return a unique anchor for each section."""
    return [f"s{number}-{for_file_name(text)}" for number, text in enumerate(sections, start=1)]


def _markdown_blocks(blocks: Sequence[Block], pictures: str) -> Iterator[str]:
    for block in blocks:
        match block:
            case Heading(level, text):
                yield f"{'#' * level} {for_markdown(text)}"
            case Paragraph(text, note):
                yield f"> **Note.** {for_markdown(text)}" if note else for_markdown(text)
            case Picture(name, caption, alt):
                yield f"![{for_markdown(alt or caption)}]({pictures}{name}.png)\n\n*{for_markdown(caption)}*"
            case Cards(cards):
                lines = [_table_line(("", "", "")), _table_line(["---"] * 3)]
                lines += [
                    _table_line((for_markdown(a), f"**{for_markdown(b)}**", for_markdown(c))) for a, b, c in cards
                ]
                yield "\n".join(lines)
            case Folded(summary, inside):
                yield f"**{for_markdown(summary)}**"
                yield from _markdown_blocks(inside, pictures)
            case Grid(header, rows, bold, caption):
                if caption:
                    yield for_markdown(caption)
                lines = [_table_line([for_markdown(cell) for cell in header]), _table_line(["---"] * len(header))]
                for i, row in enumerate(rows):
                    cells = [for_markdown(cell) for cell in row]
                    lines.append(
                        _table_line([f"**{cell}**" if (i, j) in bold else cell for j, cell in enumerate(cells)])
                    )
                yield "\n".join(lines)


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _html_blocks(
    blocks: Sequence[Block], pictures: Mapping[str, Drawing | bytes], targets: Iterator[str]
) -> Iterator[str]:
    for block in blocks:
        match block:
            case Heading(level, text):
                target = f' id="{next(targets)}"' if level == 2 else ""
                yield f"<h{level}{target}>{for_html(text)}</h{level}>"
            case Paragraph(text, note):
                yield f'<p class="note" role="note">{for_html(text)}</p>' if note else f"<p>{for_html(text)}</p>"
            case Picture(name, caption, alt):
                yield _html_figure(pictures[name], for_html(alt or caption), for_html(caption))
            case Cards(cards):
                yield f'<dl class="cards">{"".join(_html_card(*card) for card in cards)}</dl>'
            case Folded(summary, inside):
                content = "\n".join(_html_blocks(inside, pictures, targets))
                yield f"<details><summary>{for_html(summary)}</summary>\n{content}\n</details>"
            case Grid():
                yield _html_table(block)


def _html_card(name: str, value: str, detail: str) -> str:
    return (
        f'<div class="card"><dt>{for_html(name)}</dt><dd class="value">{for_html(value)}</dd>'
        f'<dd class="detail">{for_html(detail)}</dd></div>'
    )


def _html_figure(picture: Drawing | bytes, alt: str, caption: str) -> str:
    if isinstance(picture, bytes):
        image = f'<img alt="{alt}" src="{_data_url(picture, "png")}">'
    else:
        image = f'<img alt="{alt}" src="{_data_url(picture.wide, "svg+xml")}">'
        if picture.narrow is not None:
            narrow = _data_url(picture.narrow, "svg+xml")
            image = f'<picture><source media="(max-width:600px)" srcset="{narrow}">{image}</picture>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _html_table(grid: Grid) -> str:
    """Return a table in a box that the keyboard can scroll; columns of numbers are right-aligned."""
    numeric = [
        all(_NUMBER.fullmatch(row[column]) for row in grid.rows) and any(row[column] for row in grid.rows)
        for column in range(len(grid.header))
    ]

    def cell(tag: str, text: str, column: int, *, scope: str = "", bold: bool = False) -> str:
        classes = (
            "number" if (numeric[column] and tag == "td") or (numeric[column] and scope == "col" and column) else ""
        )
        classes = classes or (
            "long"
            if len(text) > _LONG
            else "short"
            if (len(text) <= _SHORT or _TIME.fullmatch(text)) and scope != "col"
            else ""
        )
        attributes = (f' class="{classes}"' if classes else "") + (f' scope="{scope}"' if scope else "")
        return f"<{tag}{attributes}>{'<b>' if bold else ''}{for_html(text)}{'</b>' if bold else ''}</{tag}>"

    head = "".join(cell("th", text, column, scope="col") for column, text in enumerate(grid.header))
    lines = []
    for i, row in enumerate(grid.rows):
        cells = [
            cell("td" if j else "th", text, j, scope="" if j else "row", bold=(i, j) in grid.bold)
            for j, text in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{for_html(grid.caption)}</caption>" if grid.caption else ""
    name = for_html(grid.caption or f"Table: {', '.join(text for text in grid.header if text)}")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
