"""Page of a comparison: comparison.html, comparison.json and pictures."""

import math
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from p2r.evaluate.rows import TrialRow
from p2r.report.canvas import INK, NARROW, WIDE, Drawing, apart, drawing, mode_colour, new_sheet, plain
from p2r.report.comparison import CellName, ComparedCell, ComparedDifference, Comparison
from p2r.report.comparison_tables import SETTINGS_TITLE, comparison_line, notes_of, reasons_of
from p2r.report.curve import draw_series
from p2r.report.forest import Difference, forest
from p2r.report.page import Block, Grid, Heading, Paragraph, Picture, html
from p2r.report.runs import Setting
from p2r.report.settings_compared import settings_grid
from p2r.report.sources import source_line
from p2r.report.tables import LEAK_FREE, aggregate, label_of, series_name, series_order
from p2r.report.text import for_file_name, for_picture, shortened
from p2r.storage import Storage

_PANEL, _BELOW = 1.9, 0.6  # inches
_DODGE = 0.06  # fraction of the axis, between runs: in a small panel, the marks of means would hide the draws
_LINES = ("solid", "dashed", "dotted", "dashdot")


def write_comparison(storage: Storage, comparison: Comparison) -> str:
    """Write `comparison.html`, `comparison.json` and pictures, and return the URL of the page."""
    drawn: dict[str, Drawing | bytes] = {}
    blocks = list(_blocks(comparison, drawn))
    for name, picture in drawn.items():
        assert isinstance(picture, Drawing)
        storage.write_bytes(f"pictures/{name}.png", picture.png)
        storage.write_bytes(f"pictures/{name}.svg", picture.svg)
    storage.write_bytes("comparison.html", html(blocks, drawn).encode())
    storage.write_json(
        "comparison.json", {**comparison.to_json(), "pictures": [f"pictures/{name}.png" for name in drawn]}
    )
    return storage.at("comparison.html")


def _blocks(comparison: Comparison, drawn: dict[str, Drawing | bytes]) -> Iterator[Block]:
    letters, cells = comparison.letters, comparison.cells
    yield Heading(1, f"{' and '.join(letters)} side by side{_label(cells)}")
    if any(cell.protocol != LEAK_FREE for cell in cells):
        yield Paragraph(
            "Not all results are leak-free: each states its protocol, and protocols are never mixed.", note=True
        )
    for note in notes_of(comparison):
        yield Paragraph(f"{note[:1].upper()}{note[1:]}.", note=True)
    yield Heading(2, "Runs")
    yield _runs_grid(comparison)
    header, differ = settings_grid(comparison.settings, letters)
    if differ:
        yield Grid(header, differ, caption=SETTINGS_TITLE)
    for setting in dict.fromkeys(cell.setting for cell in cells):
        yield from _setting_blocks(comparison, setting, drawn)
    reasons = reasons_of(comparison)
    if reasons:
        yield Heading(2, "Not compared")
        yield Grid(("", "reason"), [(str(number), reason) for number, reason in enumerate(reasons, start=1)])


def _runs_grid(comparison: Comparison) -> Grid:
    runs = comparison.runs
    facts = [
        ("job", [run.job for run in runs]),
        ("backbone", [run.backbone for run in runs]),
        ("sha256", [_abbreviated(run.backbone_sha256) for run in runs]),
        ("code", [run.code for run in runs]),
        ("seed", [run.seed for run in runs]),
        ("licence", [run.licence for run in runs]),
        ("report", [run.url for run in runs]),
    ]
    return Grid(("", *comparison.letters), [(name, *values) for name, values in facts])


def _setting_blocks(comparison: Comparison, setting: Setting, drawn: dict[str, Drawing | bytes]) -> Iterator[Block]:
    """Yield the results of one task, protocol and split."""
    (task, protocol, split), letters = setting, comparison.letters
    here = [cell for cell in comparison.cells if cell.setting == setting]
    name = for_file_name(task if protocol == LEAK_FREE else f"{task}-{protocol}")
    name = name if len({one.split for one in comparison.cells}) == 1 else f"{name}-{for_file_name(split)}"
    yield Heading(2, task)
    yield Paragraph(f"Protocol: {protocol}. Evaluated on {split} patients.")
    if any(dice is not None for cell in here for dice in cell.dice.values()):
        drawn[f"runs-{name}"] = _side_by_side(comparison, here, task)
        yield Picture(
            f"runs-{name}", f"Dice on {split} patients by number of labelled patients, one panel for each mode."
        )
    yield Grid(
        ("task", "labelled patients", "mode", *letters, *_flat_headers(letters)),
        [comparison_line(comparison, cell) for cell in here],
    )
    places = {cell.cell for cell in here}
    found = [one for one in comparison.differences if one.cell in places]
    if found:
        drawn[f"differences-{name}"] = _forest(comparison, here, found, task)
        yield Picture(
            f"differences-{name}",
            f"Difference in Dice to {letters[0]}, paired by patient: right of zero, {letters[0]} is worse.",
        )


def _forest(
    comparison: Comparison, here: Sequence[ComparedCell], found: Sequence[ComparedDifference], task: str
) -> Drawing:
    letters, paired = comparison.letters, {one.cell for one in found}
    return forest(
        [
            Difference(
                f"{one.num_labelled} labelled patient{'s' * (one.num_labelled > 1)}",
                series_name((one.mode, "" if len(letters) == 2 else one.run)),
                one.mode,
                one.difference,
                one.lower,
                one.upper,
                one.p_holm,
            )
            for one in sorted(found, key=lambda one: (one.num_labelled, series_order((one.mode, one.run))))
        ],
        title=f"{task}: {', '.join(letters[1:])} against {letters[0]}{_label(here)}",
        subtitle="paired by patient, same labelled patients; line: 95 % of a bootstrap over draws and patients; p: Wilcoxon, "
        "Holm over n",
        axis=f"gain in Dice over {letters[0]}",
        source=_source(comparison, [cell for cell in here if cell.cell in paired]),
    )


def _label(cells: Sequence[CellName]) -> str:
    """Return the suffix of a title for results that are not leak-free; else empty."""
    return label_of([_empty_row(cell) for cell in cells])


def _empty_row(cell: CellName) -> TrialRow:
    """Return a row without results for a cell. Its protocol tells if the backbone has seen the patients."""
    return TrialRow(
        task=cell.task,
        protocol=cell.protocol,
        split=cell.split,
        mode=cell.mode,
        num_labelled=cell.num_labelled,
        draw=0,
        subjects=[],
    )


def _abbreviated(digests: str) -> str:
    """Shorten each digest: comparison.json has all of it."""
    return ", ".join(digest[:12] for digest in digests.split(", "))


def _flat_headers(letters: Sequence[str]) -> list[str]:
    return [
        text
        for letter in letters[1:]
        for text in (f"{letter} − {letters[0]}, 95 % interval", "draws of its sign", "p (Holm)")
    ]


def _side_by_side(comparison: Comparison, of_task: Sequence[ComparedCell], task: str) -> Drawing:
    """Draw Dice over the number of labelled patients: a panel for each mode, a line with its draws and band for each run."""
    letters = comparison.letters
    rows, places = _rows_in(comparison, of_task), {cell.cell for cell in of_task}
    cells = [cell for cell in aggregate(rows) if cell.dice_mean.mean is not None]
    bands = {
        ((one.mode, one.run), one.num_labelled): (one.lower, one.upper)
        for one in comparison.intervals
        if one.cell in places
    }
    modes = sorted({cell.mode for cell in cells}, key=lambda mode: series_order((mode, "")))
    numbers = sorted({cell.num_labelled for cell in cells})
    span = max(math.log(numbers[-1] / numbers[0]), 0.7)
    subtitle = (
        f"mean of {', '.join(cells[0].dice)}; points: draws of the labelled patients, line: their mean, band: 95 % of a bootstrap "
        "over draws and patients; "
    ) + ", ".join(f"{letter}: {_LINES[number % 4]}" for number, letter in enumerate(letters))

    def figure(width: float) -> Figure:
        columns = min(len(modes), 1 if width <= NARROW else 3)
        lines = -(-len(modes) // columns)
        left, gap = 0.6, 0.45
        each = (width - left - 0.35 - (columns - 1) * gap) / columns
        sheet = new_sheet(
            width,
            lines * (_PANEL + _BELOW),
            title=f"{task}: {' and '.join(letters)} side by side{label_of(rows)}",
            subtitle=subtitle,
            source=_source(comparison, of_task),
        )
        for index, mode in enumerate(modes):
            line, column = divmod(index, columns)
            low = (lines - 1 - line) * (_PANEL + _BELOW) + _BELOW - 0.1
            axes = sheet.panel(left + column * (each + gap), low, each, _PANEL - 0.25)
            ends = []
            for number, letter in enumerate(letters):
                here = [cell for cell in cells if cell.series == (mode, letter)]
                if here:
                    offset = (number - (len(letters) - 1) / 2) * _DODGE * span
                    draw_series(axes, here, rows, bands, offset, span, _LINES[number % 4])
                    ends.append((letter, here[-1].num_labelled, here[-1].dice_mean.mean or 0.0))
            _name_lines(axes, ends, mode)
            _style_panel(axes, mode, numbers, span)
            if column == 0:
                axes.set_ylabel("Dice", color=INK)
            if index + columns >= len(modes):
                axes.set_xlabel("labelled patients", color=INK)
        return sheet.figure

    return drawing(figure(WIDE), figure(NARROW))


def _name_lines(axes: Axes, ends: Sequence[tuple[str, int, float]], mode: str) -> None:
    """Write the letter of each run at the end of its line: letter, number of labelled patients, Dice."""
    places = apart([dice for _, _, dice in ends], 0.11)
    for (letter, at, _), place in zip(ends, places, strict=True):
        axes.annotate(
            letter,
            (at, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=mode_colour(mode),
            weight="bold",
        )


def _style_panel(axes: Axes, mode: str, numbers: Sequence[int], span: float) -> None:
    """Title a panel by its mode, and scale it: Dice from 0 to 1 over the numbers of labelled patients, logarithmic."""
    axes.set_ylim(0, 1)
    axes.set_xscale("log")
    axes.set_xlim(numbers[0] * math.exp(-0.08 * span), numbers[-1] * math.exp(0.08 * span))
    axes.xaxis.set_major_locator(FixedLocator(numbers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(number) for number in numbers])
    plain(axes)
    title = for_picture(series_name((mode, "")), 30)
    axes.set_title(title, fontsize=10, loc="left", color=mode_colour(mode), weight="bold")


def _rows_in(comparison: Comparison, cells: Sequence[CellName]) -> list[TrialRow]:
    """Return the draws of some cells as rows of a report, with their run as backbone. Only Dice is compared, so distances are
    left out."""
    places = {cell.cell for cell in cells}
    return [
        _empty_row(row).replaced(
            draw=row.draw,
            dice_mean=row.dice_mean,
            dice=row.dice,
            seed=row.seed,
            code=row.code,
            backbone_sha256=row.backbone_sha256,
            backbone=row.run,
        )
        for row in comparison.rows
        if row.cell in places
    ]


def _source(comparison: Comparison, cells: Sequence[CellName]) -> str:
    """Return the source line of some cells: the parts that all runs share, then the parts of each run."""
    rows = _rows_in(comparison, cells)
    of_run = {
        run.letter: source_line([row for row in rows if row.backbone == run.letter], run.code).split(" · ")
        for run in comparison.runs
    }
    own = {
        letter: [part for part in parts if any(part not in other for other in of_run.values())]
        for letter, parts in of_run.items()
    }
    first = next(iter(of_run))
    shared = [part for part in of_run[first] if part not in own[first]]
    differ = comparison.settings.relevant_names()
    return " · ".join(
        [
            *shared,
            *(f"{letter}: {', '.join(parts)}" for letter, parts in own.items() if parts),
            *([f"settings differ: {shortened(', '.join(differ), 100)}"] if differ else []),
        ]
    )
