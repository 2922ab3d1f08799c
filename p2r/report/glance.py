"""Top of the page: the key results of every task, and the setup of the job."""

from collections.abc import Iterator, Mapping, Sequence

from p2r.evaluate.rows import TrialRow, digests_of
from p2r.evaluate.statistics import LabelEfficiency
from p2r.modes import SCRATCH
from p2r.report.figures import against_text, rows_of_cell, worth_text
from p2r.report.forest import p_text
from p2r.report.material import Material, entry_of
from p2r.report.page import Block, Cards, Grid, Heading, Paragraph
from p2r.report.patients import mean_of
from p2r.report.provenance import hours_text
from p2r.report.tables import (
    LEAK_FREE,
    Cell,
    aggregate,
    code_of,
    protocol_of,
    series_name,
    series_of,
    series_order,
    split_of,
)
from p2r.report.text import signed

Card = tuple[str, str, str]
"""Name, value, remark."""


def glance(material: Material, rows: Sequence[TrialRow]) -> Iterator[Block]:
    """Yield the key results of every task."""
    for task in sorted({row.task for row in rows}):
        for protocol in sorted({protocol_of(row) for row in rows if row.task == task}):
            chosen = [row for row in rows if row.task == task and protocol_of(row) == protocol]
            cards = list(_cards(material, chosen))
            if cards:
                title = material.title_of(task)
                yield Heading(3, title if protocol == LEAK_FREE else f"{title} ({protocol})")
                yield Cards(cards)
    facts = []
    for name, found in (
        ("trials failed", material.context.failed),
        ("test-set evaluations", material.context.test_reads),
    ):
        if found is not None:
            facts.append(f"{name}: {len(found)}")
    seconds = sum(row.seconds or 0.0 for row in rows)
    if seconds:
        facts.append(f"final trials took {hours_text(seconds)}")
    if facts:
        yield Paragraph(f"{'; '.join(facts)}.".capitalize())


def _cards(material: Material, rows: Sequence[TrialRow]) -> Iterator[Card]:
    """Yield results of one task for the fewest and the most labelled patients, with the mode that is best on validation patients."""
    cells = [cell for cell in aggregate(rows) if cell.dice_mean.mean is not None]
    numbers = sorted({cell.num_labelled for cell in cells})
    for number in dict.fromkeys((*numbers[:1], *numbers[-1:])):
        here = [cell for cell in cells if cell.num_labelled == number]
        labelled = f"{number} labelled patient{'s' * (number > 1)}"
        yield _best_card(material, rows, here, labelled)
        others = [cell for cell in here if cell.mode != SCRATCH]
        if others:
            leader = max(others, key=lambda cell: _validation(rows, cell))
            yield from _gain_cards(material, rows, leader, labelled)
            efficiency = entry_of(material.efficiency(rows), leader)
            if number == numbers[0] and efficiency is not None:
                yield (
                    f"{labelled.capitalize()}, {series_name(leader.series)}, is worth",
                    worth_text(efficiency, rows),
                    "labelled patients from scratch, for the same Dice" + _worth_interval(material, efficiency, rows),
                )


def _worth_interval(material: Material, efficiency: LabelEfficiency, rows: Sequence[TrialRow]) -> str:
    """Return the interval of a number of labelled patients from scratch; empty if there is none."""
    tried = [row.num_labelled for row in rows if row.mode == SCRATCH]
    if not tried or efficiency.scratch_interval is None:
        return ""
    ends = {"below": f"below {min(tried)}", "above": f"above {max(tried)}"}
    low, high = (ends[end] if isinstance(end, str) else f"{end:.1f}" for end in efficiency.scratch_interval)
    return f"; {material.level} {low} to {high}" if low != high else f"; {material.level} {low}"


def _best_card(material: Material, rows: Sequence[TrialRow], here: Sequence[Cell], labelled: str) -> Card:
    cell = max(here, key=lambda cell: (_validation(rows, cell), cell.mode != SCRATCH))
    interval = entry_of(material.intervals(rows), cell)
    spread = "" if interval is None else f"{material.level} {interval.lower:.2f} to {interval.upper:.2f}"
    who = series_name(cell.series) + ", best on validation patients" * (len(here) > 1)
    return f"Dice from {labelled}", f"{cell.dice_mean.mean:.2f}", _sentence("; ".join(filter(None, (who, spread))))


def _gain_cards(material: Material, rows: Sequence[TrialRow], leader: Cell, labelled: str) -> Iterator[Card]:
    """Yield the paired differences of a cell; without any, its mean gain over scratch."""
    found = [
        one
        for one in material.differences(rows)
        if one.num_labelled == leader.num_labelled and series_of(one) == leader.series
    ]
    for one in found:
        interval = f"{signed(one.lower, 3)} to {signed(one.upper, 3)}"
        yield (
            _sentence(f"{series_name(series_of(one))} over {against_text(one.against)}, {labelled}"),
            signed(one.difference, 3),
            f"{material.level} {interval}; p (Holm) {p_text(one.p_holm)}, {one.patients} patients",
        )
    if not found and leader.gain is not None:
        yield (
            _sentence(f"{series_name(leader.series)} over scratch, {labelled}"),
            signed(leader.gain, 3),
            f"mean of {leader.num_draws} draw{'s' * (leader.num_draws > 1)}",
        )


def setup_grid(material: Material, rows: Sequence[TrialRow]) -> Grid:
    """Return the setup of the job as a table."""
    draws = sorted({(cell.num_labelled, cell.num_draws) for cell in aggregate(rows)})
    series = sorted({series_of(row) for row in rows}, key=series_order)
    backbone = material.context.backbone or {}
    digests = digests_of(rows)
    lines = [
        ("task", ", ".join(sorted({row.task for row in rows}))),
        ("protocol", ", ".join(sorted({protocol_of(row) for row in rows}))),
        ("evaluated on", f"{split_of(rows)} patients"),
        ("modes", "; ".join(map(series_name, series))),
        ("labelled patients", "; ".join(f"{number} ({count} draw{'s' * (count > 1)})" for number, count in draws)),
        ("backbone", str(backbone.get("url") or "") if isinstance(backbone, Mapping) else str(backbone)),
        ("backbone, sha256", ", ".join(digests)),
        ("seed", ", ".join(sorted({str(row.seed) for row in rows if row.seed is not None}))),
        ("code of the trials", code_of(rows, material.context.code)),
    ]
    return Grid(("fact", "value"), [line for line in lines if line[1]])


def _validation(rows: Sequence[TrialRow], cell: Cell) -> float:
    """Return the mean validation Dice of a cell. It selects the mode shown first, without test patients."""
    return mean_of(row.validation_dice_mean for row in rows_of_cell(rows, cell)) or 0.0


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
