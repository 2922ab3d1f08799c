"""Report of a few-shot evaluation, from rows of final trials, statistics and provenance, in a job's storage.

    pictures/NAME.png, NAME.svg · report.md · report.html (one file, pictures inside) · report.json, written last

The page is built once, as a list of blocks, and rendered twice. Caveats, and protocols that are not leak-free, are printed above
the results; digests, seeds, patients and test-set evaluations below them. Facts missing from rows of an earlier report are left out.
"""

from collections.abc import Iterator, Mapping, Sequence

from p2r.evaluate.rows import TrialRow
from p2r.evaluate.statistics import Statistics
from p2r.modes import MODES
from p2r.report.canvas import Drawing
from p2r.report.context import ReportContext, TaskFacts
from p2r.report.figures import figures
from p2r.report.glance import glance, setup_grid
from p2r.report.material import Material
from p2r.report.page import Block, Heading, Paragraph, html, markdown
from p2r.report.provenance import provenance, run_blocks
from p2r.report.tables import LEAK_FREE, is_paper_compatible, is_transductive, is_unknown, label_of, protocol_of
from p2r.storage import Storage

FORMAT = "p2r-report/1"

_WORDS = (
    "Dice: twice the overlap of two segmentations, divided by the sum of their sizes. HD95: the 95th percentile of the distances between "
    "their surfaces. NSD: the share of both surfaces that is within a tolerance of the other. A draw is one random choice of the labelled "
    "patients. A mode is a way to learn from them. Leak-free: no validation or test patient was used in any training."
)
_HOW_TO_READ = (
    "Dice is hard, in 3D, on the scan's own grid, per patient (frames averaged first), then over patients. "
    "± is the standard deviation over draws of the labelled patients; every mode has the same draws, and “over "
    "scratch” is the difference on them. HD95 and NSD are means over classes. A class that only the prediction or only "
    "the reference lacks counts as Dice 0, NSD 0, HD95 the grid's diagonal. A class that both lack is left out. "
    "Bold: the best mode for that number of patients. Intervals come from a bootstrap over draws and patients. With one draw they "
    "cover only the patients; with three to five draws of one patient they are rather too narrow (p2r/evaluate/statistics.py)."
)
_TRANSDUCTIVE = (
    "Transductive: validation or test patients are in the backbone's pretraining corpus. These results do not hold for unseen "
    "patients, and must not be compared with leak-free results. Rows are labelled in report.json."
)
_UNKNOWN = (
    "Corpora unknown: the backbone's manifest does not state its pretraining data. It may have seen validation or test patients: "
    "these results must not be compared with leak-free results. Rows are labelled in report.json."
)
_PAPER_COMPATIBLE = (
    "paper_compat: follows the choices of the paper's released code, in which the reference determines the network's input, at "
    "test too. These results may be compared with the paper's only, not with leak-free results."
)


def write_report(
    storage: Storage,
    *,
    rows: Sequence[TrialRow],
    context: ReportContext,
    pictures: Mapping[str, Drawing | bytes],
    statistics: Statistics | None = None,
) -> dict[str, object]:
    """Write the report and return the content of `report.json`.

    Args:
        storage: The report's own folder.
        rows: One for each final trial.
        context: The source of the rows.
        pictures: Pictures that do not come from the rows, by name: drawings, or PNG files.
        statistics: Statistics of the rows; None: no intervals are shown.
    """
    material = Material(context, pictures, statistics)
    blocks = list(_blocks(rows, material))
    for name, picture in material.drawn.items():
        if isinstance(picture, bytes):
            storage.write_bytes(f"pictures/{name}.png", picture)
        else:
            storage.write_bytes(f"pictures/{name}.png", picture.png)
            storage.write_bytes(f"pictures/{name}.svg", picture.svg)
    storage.write_bytes("report.md", markdown(blocks).encode())
    storage.write_bytes("report.html", html(blocks, material.drawn).encode())
    report: dict[str, object] = {
        "format": FORMAT,
        "rows": [row.to_json() for row in rows],
        "context": context.to_json(),
        "pictures": [f"pictures/{name}.png" for name in material.drawn],
        **({} if statistics is None else {"statistics": statistics.to_json()}),
    }
    storage.write_json("report.json", report)
    return report


def _blocks(rows: Sequence[TrialRow], material: Material) -> Iterator[Block]:
    """Yield the page; its pictures are added to `material.drawn`, in the order of the page."""
    context = material.context
    yield Heading(1, context.title + label_of(rows))
    yield from _notes(rows, context)
    if rows:
        yield Heading(2, "At a glance")
        yield from glance(material, rows)
        yield Paragraph(_WORDS + _describe_modes(rows))
        yield Heading(2, "Setup")
        yield setup_grid(material, rows)
    else:
        yield Paragraph("There are no results.")
    names = sorted({row.task for row in rows})
    for name in names:
        yield from _task([row for row in rows if row.task == name], name, material)
    if rows:
        yield Paragraph(_HOW_TO_READ)
    others = list(material.given(None))
    if others:
        yield Heading(2, "The backbone")
        yield from others
    yield from run_blocks(rows, context)
    yield Heading(2, "Provenance")
    yield from provenance(rows, context, names)


def _describe_modes(rows: Sequence[TrialRow]) -> str:
    """Return a sentence on the training of each mode on the page; empty if this version knows none of them."""
    found = {row.mode for row in rows}
    known = [f"{facts.title}: {facts.training}" for mode, facts in MODES.items() if mode in found and facts.training]
    return f" Modes: {'; '.join(known)}." if known else ""


def _notes(rows: Sequence[TrialRow], context: ReportContext) -> Iterator[Block]:
    """Yield the caveats, which are printed above all results."""
    if is_unknown(rows):
        yield Paragraph(_UNKNOWN, note=True)
    if is_transductive(rows):
        yield Paragraph(_TRANSDUCTIVE, note=True)
    if is_paper_compatible(rows):
        yield Paragraph(_PAPER_COMPATIBLE, note=True)
    for caveat in context.caveats:
        yield Paragraph(caveat, note=True)


def _task(rows: Sequence[TrialRow], name: str, material: Material) -> Iterator[Block]:
    about = material.context.tasks.get(name, TaskFacts())
    yield Heading(2, material.title_of(name))
    for protocol in sorted({protocol_of(row) for row in rows}, key=lambda one: (one != LEAK_FREE, one)):
        yield from figures(material, [row for row in rows if protocol_of(row) == protocol], protocol)
    shown = list(material.given(name))
    if shown:
        yield Heading(3, "Single patients")
        yield from shown
    for key, text in (("Licence", about.licence), ("Citation", about.citation)):
        if text:
            yield Paragraph(f"{key} of the data: {text}")
