"""Figures, their provenance and pictures -> `report.json`, `report.md` and `report.html` on a job's storage.

    pictures/NAME.png · report.md · report.html (one file, pictures inside) · report.json, written last

The page is put together once, as a list of blocks, and written twice. What a reader must know before believing a figure
(caveats) stands above the figures; what is needed to check it (digests, seeds, patients) stands below them.
"""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2r.report.tables import MODE_NAMES, Row, aggregate, best_cells, gain_text, is_transductive, label_of
from p2r.storage import Storage

FORMAT = "p2r-report/1"

_OWN_PLACE = ("title", "caveats", "captions", "tasks")
_MAX_ENTRIES = 30
_HOW_TO_READ = (
    "Dice is hard, in 3D, on the scan's own grid, per patient (frames averaged first), then over patients. "
    "± is the standard deviation over draws of the labelled patients; every mode is given the same draws, and `over "
    "scratch` is the difference on them. HD95 and NSD are means over classes. A class that only the prediction or only "
    "the reference lacks counts as Dice 0, NSD 0, HD95 the grid's diagonal; one that both lack is left out. "
    "Bold: the best mode for that number of patients."
)
_TRANSDUCTIVE = (
    "Transductive: validation or test patients are in the corpus that the backbone was pretrained on. These figures say nothing "
    "about patients whom it has not seen, and must not be compared with leak-free ones. Rows are labelled in report.json."
)
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{border-bottom:2px solid #888}
.note{background:#fff4e0;border-left:4px solid #d55e00;padding:.6rem 1rem;margin:1rem 0}
img{max-width:100%} figure{margin:1.5rem 0} figcaption{color:#555}"""


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text, or a note that must not be missed."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Grid:
    """A table; cells in `bold`, by row and column, stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A picture by its name."""

    name: str
    caption: str


Block = Heading | Paragraph | Grid | Picture


def write_report(
    storage: Storage, *, rows: Sequence[Row], context: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> dict[str, Any]:
    """Write the report and return what `report.json` holds.

    Args:
        storage: The report's own folder.
        rows: One for each final trial.
        context: JSON values that say where the rows come from. `title`, `caveats` (sentences, shown first), `captions`
            (by picture) and `tasks` (by name: title, licence, citation, splits) have places of their own; the rest
            becomes lines of the provenance, nested keys joined by dots.
        pictures: PNG files by name, without suffix, in the order of the page.
    """
    for name, content in pictures.items():
        storage.write_bytes(f"pictures/{name}.png", content)
    blocks = list(_blocks(rows, context, list(pictures)))
    storage.write_bytes("report.md", markdown(blocks).encode())
    storage.write_bytes("report.html", _html(blocks, pictures).encode())
    report = {
        "format": FORMAT,
        "rows": [dict(row) for row in rows],
        "context": dict(context),
        "pictures": [f"pictures/{name}.png" for name in pictures],
    }
    storage.write_json("report.json", report)
    return report


def _blocks(rows: Sequence[Row], context: Mapping[str, Any], pictures: Sequence[str]) -> Iterator[Block]:
    yield Heading(1, str(context.get("title", "Few-shot segmentation")) + label_of(rows))
    if is_transductive(rows):
        yield Paragraph(_TRANSDUCTIVE, note=True)
    for caveat in context.get("caveats", ()):
        yield Paragraph(str(caveat), note=True)
    tasks = context.get("tasks", {})
    names = sorted({row["task"] for row in rows})
    for name in names:
        about = tasks.get(name, {})
        yield Heading(2, str(about.get("title", name)))
        yield from _figures([row for row in rows if row["task"] == name])
        for key in ("licence", "citation"):
            if about.get(key):
                yield Paragraph(f"{key.capitalize()} of the data: {about[key]}")
    yield Paragraph(_HOW_TO_READ if rows else "There are no figures.")
    if pictures:
        yield Heading(2, "Pictures")
        for picture in pictures:
            yield Picture(picture, str(context.get("captions", {}).get(picture, picture.replace("-", " "))))
    yield Heading(2, "Provenance")
    rest = {key: value for key, value in context.items() if key not in _OWN_PLACE}
    facts = [(key, value) for key, value in _flat(rest) if value not in ("", "None")]
    backbones = sorted({str(row["backbone_sha256"]) for row in rows if row.get("backbone_sha256")})
    facts += [(key, value) for key, value in (("backbone in rows, sha256", ", ".join(backbones)),) if value]
    if facts:
        yield Grid(("what", "value"), facts)
    for name in names:
        splits = tasks.get(name, {}).get("splits", {})
        if splits:
            yield Heading(3, f"Splits of {name}")
            yield Grid(
                ("split", "subjects", "who"),
                [(str(split), str(len(who)), ", ".join(map(str, who))) for split, who in splits.items()],
            )
        yield Heading(3, f"Labelled patients of {name}")
        yield _draws([row for row in rows if row["task"] == name])


def _figures(rows: Sequence[Row]) -> Iterator[Block]:
    """One table for each protocol: figures of different protocols must not be compared by accident."""
    cells = aggregate(rows)
    best = best_cells(cells)
    for protocol in sorted({cell.protocol for cell in cells}):
        chosen = [cell for cell in cells if cell.protocol == protocol]
        classes = list(dict.fromkeys(name for cell in chosen for name in cell.dice))
        of_protocol = [row for row in rows if row["protocol"] == protocol]
        num_patients = sorted({row["num_test_subjects"] for row in of_protocol if row.get("num_test_subjects")})
        splits = sorted({str(row["split"]) for row in of_protocol if row.get("split")})
        where = f"{', '.join(map(str, num_patients))} patients of the {', '.join(splits)} split" if num_patients else ""
        yield Paragraph(f"Protocol: {protocol}. " + (f"Read on {where}." if where else ""))
        header = ("labelled patients", "mode", "Dice", "over scratch", *classes, "HD95 (mm)", "NSD", "draws")
        lines = [
            (
                str(cell.num_labelled),
                MODE_NAMES.get(cell.mode, cell.mode),
                cell.dice_mean.text(3),
                gain_text(cell),
                *(cell.dice[name].text(3) if name in cell.dice else "–" for name in classes),
                cell.hd95_mm.text(1),
                cell.nsd.text(3),
                str(cell.num_draws),
            )
            for cell in chosen
        ]
        yield Grid(header, lines, frozenset((index, 2) for index, cell in enumerate(chosen) if cell in best))
        counted = _absences(of_protocol)
        if counted:
            yield Paragraph(counted)


def _absences(rows: Sequence[Row]) -> str:
    """Say how often a class was missing, summed over all trials: means alone hide it."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, of_class in (row.get("absent") or {}).items():
            for where, count in of_class.items():
                counts[name, where] = counts.get((name, where), 0) + count
    parts = [f"{name} in {where} {count} times" for (name, where), count in counts.items() if count]
    return f"Missing classes, over all trials and scans: {', '.join(parts)}." if parts else ""


def _draws(rows: Sequence[Row]) -> Grid:
    keys = ("num_labelled", "draw", "seed")
    found = {(*(row.get(key) for key in keys), ", ".join(row["subjects"])) for row in rows}
    lines = [tuple("" if value is None else str(value) for value in line) for line in sorted(found, key=_sortable)]
    return Grid(("labelled patients", "draw", "seed", "who"), lines)


def _sortable(line: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((value is not None, value) for value in line)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _flat(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        long = len(value) > _MAX_ENTRIES
        yield key, f"{len(value)} entries, in report.json" if long else ", ".join(str(entry) for entry in value)
    else:
        yield key, str(value)


def markdown(blocks: Sequence[Block], *, pictures: str = "pictures/") -> str:
    """Return a page as Markdown; `pictures` is the folder of its pictures."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text, note):
                parts.append(f"> **Note.** {text}" if note else text)
            case Picture(name, caption):
                parts.append(f"![{caption}]({pictures}{name}.png)\n\n*{caption}*")
            case Grid(header, rows, bold):
                lines = [_line(header), _line(["---"] * len(header))]
                for i, row in enumerate(rows):
                    lines.append(_line([f"**{cell}**" if (i, j) in bold else cell for j, cell in enumerate(row)]))
                parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _html(blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{_safe(title)}</title>",
        f"<style>{_STYLE}</style><body>",
    ]
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"<h{level}>{_safe(text)}</h{level}>")
            case Paragraph(text, note):
                parts.append(f'<p class="note">{_safe(text)}</p>' if note else f"<p>{_safe(text)}</p>")
            case Picture(name, caption):
                data = base64.b64encode(pictures[name]).decode()
                source = f"data:image/png;base64,{data}"
                parts.append(f'<figure><img alt="{_safe(caption)}" src="{source}">')
                parts.append(f"<figcaption>{_safe(caption)}</figcaption></figure>")
            case Grid(header, rows, bold):
                parts.append("<table><tr>" + "".join(f"<th>{_safe(cell)}</th>" for cell in header) + "</tr>")
                for i, row in enumerate(rows):
                    cells = (f"<b>{_safe(cell)}</b>" if (i, j) in bold else _safe(cell) for j, cell in enumerate(row))
                    parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
                parts.append("</table>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _safe(text: str) -> str:
    return html.escape(text)
