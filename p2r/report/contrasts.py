"""Scores of models of several contrasts by the contrasts that a patient has: one table."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from p2r.evaluate.rows import TrialRow
from p2r.report.page import Block, Grid, Heading, Paragraph
from p2r.report.tables import Spread, series_name, series_of, series_order, split_of, spread_of


def contrast_blocks(rows: Sequence[TrialRow]) -> Iterator[Block]:
    """Yield the part of a page about subsets of contrasts; empty for rows without them.

    Args:
        rows: Rows of one task and protocol.
    """
    known = [row for row in rows if row.by_contrasts]
    if not known:
        return
    read = next(row.contrasts for row in known) or []
    subsets = list(dict.fromkeys(tuple(one.contrasts) for row in known for one in row.by_contrasts or ()))
    counts = {subset: _num_subjects(known, subset) for subset in subsets}
    yield Heading(3, "By contrast")
    yield Grid(
        ("labelled patients", "mode", "all they have", *(f"{', '.join(one)} ({counts[one]})" for one in subsets)),
        [
            (
                str(num_labelled),
                series_name(series),
                spread_of(row.dice_mean for row in group).text(3),
                *(_dice_text(group, subset) for subset in subsets),
            )
            for (num_labelled, series), group in _groups(known)
        ],
        caption=f"Mean Dice on {split_of(known)} patients with only these contrasts (number of patients who have one of them)",
    )
    yield Paragraph(
        f"The models read {', '.join(read)}. A column is the same models on the same patients, with all other contrasts withheld; "
        "patients without any of its contrasts are left out of it. ± over draws."
    )


def _groups(
    rows: Sequence[TrialRow],
) -> list[tuple[tuple[int, tuple[str, str]], list[TrialRow]]]:
    """Return the rows of all draws by number of labelled patients and series."""
    groups: dict[tuple[int, tuple[str, str]], list[TrialRow]] = {}
    for row in rows:
        groups.setdefault((row.num_labelled, series_of(row)), []).append(row)
    return sorted(groups.items(), key=lambda item: (item[0][0], series_order(item[0][1])))


def _dice_text(rows: Sequence[TrialRow], subset: tuple[str, ...]) -> str:
    found = [one.dice_mean for row in rows for one in row.by_contrasts or () if tuple(one.contrasts) == subset]
    return spread_of(found).text(3) if found else Spread(None, None).text(3)


def _num_subjects(rows: Sequence[TrialRow], subset: tuple[str, ...]) -> str:
    found = [one.num_subjects for row in rows for one in row.by_contrasts or () if tuple(one.contrasts) == subset]
    return f"{fmean(found):.0f}"
