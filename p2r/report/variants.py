"""Table and picture of an ablation's variants, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from types import MappingProxyType

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from rich.table import Table
from rich.text import Text

from p2r.evaluate.rows import TrialRow, digests_of
from p2r.evaluate.statistics import PairedDifference, few_shot_statistics
from p2r.report.canvas import (
    INK,
    KEY_LINE,
    NARROW,
    WIDE,
    Drawing,
    KeyEntry,
    drawing,
    key_lines,
    mode_colour,
    new_sheet,
    plain,
)
from p2r.report.forest import difference_texts
from p2r.report.tables import Cell, aggregate, label_of, mode_title, split_of
from p2r.report.text import for_markdown, for_picture, one_line

_COLUMNS = ("variant", "task", "labelled patients", "mode", "Dice", "per class", "backbone")


def variants_table(rows: Sequence[TrialRow], *, stopped: Mapping[str, str] = MappingProxyType({})) -> Table:
    """Return the variants' results as a table for the terminal.

    Args:
        rows: Rows with a `variant`.
        stopped: Variants without results because their pretraining was stopped, and where.
    """
    result = Table(
        *_COLUMNS, title=f"Dice on {split_of(rows)} patients, mean ± standard deviation over draws{label_of(rows)}"
    )
    for line in _lines(rows, stopped):
        result.add_row(*(Text(one_line(cell)) for cell in line))
    return result


def markdown_variants(rows: Sequence[TrialRow], *, stopped: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Return the same table as lines of Markdown."""
    found = ([for_markdown(cell) for cell in line] for line in _lines(rows, stopped))
    lines = (_COLUMNS, ("---",) * len(_COLUMNS), *found)
    return [f"| {' | '.join(line)} |" for line in lines]


def differences_of_variants(rows: Sequence[TrialRow], *, seed: int) -> list[PairedDifference]:
    """Return the paired differences of each variant from the first one, named as `backbone` and `against_backbone`.

    Args:
        rows: Rows with a `variant`.
        seed: Seed of the intervals' resamples.
    """
    names = list(dict.fromkeys(row.variant or "" for row in rows))
    keys = {
        name: f"{place:06d}" for place, name in enumerate(names)
    }  # the statistics subtract the one that sorts first
    name_of = {key: name for name, key in keys.items()}
    numbered = [row.replaced(backbone=keys[row.variant or ""]) for row in rows]
    return [
        one.replaced(backbone=name_of[one.backbone or ""], against_backbone=names[0])
        for one in few_shot_statistics(numbered, seed=seed).between_backbones
        if one.against_backbone == keys[names[0]]
    ]


def markdown_differences(differences: Sequence[PairedDifference]) -> list[str]:
    """Return the differences from the first variant as lines of Markdown; none without differences."""
    if not differences:
        return []
    first = for_markdown(differences[0].against_backbone or "")
    columns = (*_COLUMNS[:4], f"minus {first} [95 %]", "draws of its sign", "p (Holm)")
    lines: list[tuple[str, ...]] = [columns, ("---",) * len(columns)]
    for one in differences:
        names = (for_markdown(one.backbone or ""), for_markdown(one.task), str(one.num_labelled), mode_title(one.mode))
        lines.append((*names, *difference_texts(one)))
    return [
        "Differences of Dice, paired by labelled patients and by scored patients. Intervals: over draws, then patients. p: Wilcoxon by"
        " patient, corrected over the numbers of labelled patients.",
        "",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]


def variants_picture(rows: Sequence[TrialRow], *, title: str, source: str = "") -> Drawing:
    """Draw Dice by variant: a large point is a mean over draws, its bar the standard deviation, a small point one draw.

    Args:
        rows: One for each final trial, with its `variant`.
        title: Headline.
        source: Source line below the picture.
    """
    return drawing(*(_figure(rows, title + label_of(rows), source, width) for width in (WIDE, NARROW)))


def _figure(rows: Sequence[TrialRow], title: str, source: str, width: float) -> Figure:
    names = list(dict.fromkeys(row.variant or "" for row in rows))
    groups = sorted({(row.task, row.num_labelled, row.mode) for row in rows})
    tasks, numbers = ({group[place] for group in groups} for place in (0, 1))
    entries = []
    for task, num_labelled, mode in groups:
        name = f"{mode_title(mode)}, {num_labelled} labelled" + f", {task}" * (len(tasks) > 1)
        marker = "os^D"[sorted(numbers).index(num_labelled) % 4]
        entries.append(KeyEntry(for_picture(name), marker, mode_colour(mode), mode_colour(mode)))
    key = key_lines(entries, width - 0.3)
    labels = ["\n".join(wrap(for_picture(name, 24), 12)) for name in names]
    left, below, body = 0.75, 0.55 + 0.14 * max(label.count("\n") for label in labels), 2.6
    height = below + body + KEY_LINE * len(key) + 0.16
    subtitle = "points: mean over draws of the labelled patients, bars: standard deviation, dots: draws"
    sheet = new_sheet(width, height, title=title, subtitle=subtitle, source=source)
    sheet.key(key, 0.15, height - 0.02)
    axes = sheet.panel(left, below, width - left - 0.15, body)
    for index, ((task, num_labelled, mode), entry) in enumerate(zip(groups, entries, strict=True)):
        offset = (index - (len(groups) - 1) / 2) * 0.6 / len(groups)
        for place, name in enumerate(names):
            chosen = [row for row in rows if _key(row) == (name, task, num_labelled, mode)]
            for row in chosen:
                if row.dice_mean is not None:
                    axes.plot(
                        place + offset, row.dice_mean, entry.marker, color=entry.colour, alpha=0.35, markersize=4.5
                    )
            for cell in aggregate(chosen):
                if cell.dice_mean.mean is not None:
                    axes.errorbar(
                        place + offset,
                        cell.dice_mean.mean,
                        yerr=cell.dice_mean.sd or 0.0,
                        color=entry.colour,
                        marker=entry.marker,
                        markersize=8,
                    )
    axes.xaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.set_xticklabels(labels)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("variant", color=INK)
    axes.set_ylabel(f"mean Dice, {for_picture(split_of(rows))} patients", color=INK)
    plain(axes)
    return sheet.figure


def _lines(rows: Sequence[TrialRow], stopped: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys(row.variant or "" for row in rows):
        of_variant = [row for row in rows if (row.variant or "") == name]
        digests = {digest[:12] for digest in digests_of(of_variant)}
        for cell in aggregate(of_variant):
            yield _line(name, cell, ", ".join(sorted(digests)))
    for name, state in stopped.items():
        yield name, "", "", "", state, "", ""


def _line(name: str, cell: Cell, digests: str) -> tuple[str, ...]:
    per_class = ", ".join(f"{of} {spread.mean_text(2)}" for of, spread in cell.dice.items())
    mode = mode_title(cell.mode)
    return name, cell.task, str(cell.num_labelled), mode, cell.dice_mean.text(3), per_class, digests


def _key(row: TrialRow) -> tuple[str, str, int, str]:
    return row.variant or "", row.task, row.num_labelled, row.mode
