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
    if not known:
        return []
    chosen = _choose_trial(known)
    beside = [
        row
        for row in known
        if row.mode == SCRATCH
        and (row.num_labelled, row.draw) == (chosen.num_labelled, chosen.draw)
        and row is not chosen
    ]
    trials = {series_name(series_of(row)): row for row in (*beside[:1], chosen)}
    ranked = sorted((dice, case.key) for case in chosen.cases or () if (dice := _dice(case)) is not None)
    return [_shown(rank, ranked[place][1], trials) for rank, place in _places(len(ranked)).items()]


def _choose_trial(known: Sequence[TrialRow]) -> TrialRow:
    """Return the middle draw of the mode that validation prefers, with the fewest labelled patients; scratch only without others."""
    trained = [row for row in known if row.mode != SCRATCH] or known
    few = min(row.num_labelled for row in trained)
    by_series: dict[tuple[str, str], list[TrialRow]] = {}
    for row in trained:
        if row.num_labelled == few:
            by_series.setdefault(series_of(row), []).append(row)
    series = max(sorted(by_series), key=lambda one: mean_of(row.validation_dice_mean for row in by_series[one]) or 0.0)
    draws = sorted(by_series[series], key=lambda row: (row.validation_dice_mean or 0.0, row.draw))
    return draws[(len(draws) - 1) // 2]


def _places(num_ranked: int) -> dict[str, int]:
    """Return the places in ascending order of Dice, by their name."""
    if num_ranked < 3:
        return {"best": 1, "worst": 0} if num_ranked == 2 else {"only": 0} if num_ranked == 1 else {}
    return {"best": num_ranked - 1, "median": (num_ranked - 1) // 2, "worst": 0}


def _shown(rank: str, key: tuple[str, int], trials: Mapping[str, TrialRow]) -> ShownCase:
    of_trials = {
        name: next((case for case in row.cases or () if case.key == key), None) for name, row in trials.items()
    }
    dice = {name: found for name, case in of_trials.items() if case and (found := _dice(case)) is not None}
    case = next(case for case in reversed(of_trials.values()) if case is not None)
    return ShownCase(rank, case.subject, *key, case.stratum, trials, dice)


def _dice(case: CaseRow) -> float | None:
    return mean_of(score.dice for score in case.scores.values())
