"""Selection of the scans to show: the best, the median and the worst case of one trial, beside a trial from scratch.

The trial is chosen on validation patients: for the fewest labelled patients, the mode with the highest mean validation Dice, and
its median draw. Its cases are ranked by Dice on the reported patients. The ranking only selects pictures and affects no result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2r.evaluate.rows import CaseRow, TrialRow
from p2r.modes import SCRATCH
from p2r.report.patients import mean_of
from p2r.report.tables import series_name, series_of


@dataclass(frozen=True)
class ShownCase:
    """One frame of one scan, with the trials whose segmentations are shown side by side."""

    rank: str
    """`best`, `median` or `worst`."""
    subject: str
    scan: str
    frame: int
    stratum: str | None
    trials: Mapping[str, TrialRow]
    """By the mode's name: the chosen trial last, one from scratch with the same patients before it."""
    dice: Mapping[str, float]
    """Mean over classes, by the mode's name."""


def shown_cases(rows: Sequence[TrialRow]) -> list[ShownCase]:
    """Choose the cases to show from rows of one task and protocol; none without stored predictions."""
    known = [row for row in rows if row.cases and row.predictions]
    trained = [row for row in known if row.mode != SCRATCH] or known
    if not trained:
        return []
    few = min(row.num_labelled for row in trained)
    candidates = [row for row in trained if row.num_labelled == few]
    validation = {
        series: mean_of(row.validation_dice_mean for row in candidates if series_of(row) == series) or 0.0
        for series in sorted({series_of(row) for row in candidates})
    }
    series = max(validation, key=lambda one: validation[one])
    draws = sorted(
        (row for row in candidates if series_of(row) == series),
        key=lambda row: (row.validation_dice_mean or 0.0, row.draw),
    )
    chosen = draws[(len(draws) - 1) // 2]
    beside = [
        row
        for row in known
        if row.mode == SCRATCH and (row.num_labelled, row.draw) == (few, chosen.draw) and row is not chosen
    ]
    trials = {series_name(series_of(row)): row for row in (*beside[:1], chosen)}
    ranked = sorted(
        ((dice, case.key) for case in chosen.cases or () if (dice := _dice(case)) is not None), key=lambda pair: pair
    )
    if not ranked:
        return []
    places = {"best": len(ranked) - 1, "median": (len(ranked) - 1) // 2, "worst": 0}
    if len(ranked) < len(places):
        places = {"best": len(ranked) - 1, "worst": 0} if len(ranked) > 1 else {"only": 0}
    return [_shown(rank, ranked[place][1], trials) for rank, place in places.items()]


def _shown(rank: str, key: tuple[str, int], trials: Mapping[str, TrialRow]) -> ShownCase:
    of_trials = {
        name: next((case for case in row.cases or () if case.key == key), None) for name, row in trials.items()
    }
    dice = {name: found for name, case in of_trials.items() if case and (found := _dice(case)) is not None}
    case = next(case for case in reversed(of_trials.values()) if case is not None)
    return ShownCase(rank, case.subject, *key, case.stratum, trials, dice)


def _dice(case: CaseRow) -> float | None:
    return mean_of(score.dice for score in case.scores.values())
