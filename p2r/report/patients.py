"""Results of single patients: Dice by class and by third of the organ, from rows (one trial each).

Frames are averaged within a patient, then draws. Rows of earlier reports have no `cases`: for them, only a patient's mean
over classes is known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from p2r.evaluate.rows import CaseRow, TrialRow
from p2r.report.tables import series_of, series_order

MEAN = "mean of classes"
THIRDS = ("lower", "middle", "upper")


@dataclass(frozen=True)
class Patient:
    """One test patient under one mode with one number of labelled patients."""

    series: tuple[str, str]
    num_labelled: int
    subject: str
    stratum: str | None
    dice: dict[str, float | None]
    """By class; under `MEAN` their mean."""
    thirds: tuple[float | None, float | None, float | None]
    """Mean over classes in the lower, middle and upper third of the slices that hold any class."""


def patients_of(rows: Sequence[TrialRow]) -> list[Patient]:
    """Return every patient of rows of one task and protocol, by number of labelled patients, mode and name."""
    groups: dict[tuple[int, tuple[str, str]], list[TrialRow]] = {}
    for row in rows:
        groups.setdefault((row.num_labelled, series_of(row)), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], series_order(item[0][1])))
    return [
        _patient(subject, series, num_labelled, of_group)
        for (num_labelled, series), of_group in ordered
        for subject in sorted({subject for row in of_group for subject in row.dice_by_subject})
    ]


def _patient(subject: str, series: tuple[str, str], num_labelled: int, rows: Sequence[TrialRow]) -> Patient:
    """Average the cases of a patient over the draws of one mode."""
    cases = [[case for case in row.cases or () if case.subject == subject] for row in rows]
    of_all = [case for of_row in cases for case in of_row]
    dice: dict[str, float | None] = {
        name: mean_of(mean_of(_dice(case, name) for case in of_row) for of_row in cases)
        for name in dict.fromkeys(name for case in of_all for name in case.scores)
    }
    dice[MEAN] = mean_of(row.dice_by_subject.get(subject) for row in rows)
    lower, middle, upper = (_third_dice(cases, number) for number in range(3))
    stratum = next((case.stratum for case in of_all if case.stratum), None)
    return Patient(series, num_labelled, subject, stratum, dice, (lower, middle, upper))


def classes_of(patients: Sequence[Patient]) -> list[str]:
    """Return the classes of the patients' Dice, with the mean of all last if there are several."""
    names = dict.fromkeys(name for patient in patients for name in patient.dice if name != MEAN)
    return list(names) if len(names) == 1 else [*names, MEAN]


def mean_of(figures: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None."""
    present = [figure for figure in figures if figure is not None]
    return fmean(present) if present else None


def _dice(case: CaseRow, name: str) -> float | None:
    score = case.scores.get(name)
    return None if score is None else score.dice


def _third_dice(cases: Sequence[Sequence[CaseRow]], number: int) -> float | None:
    return mean_of(
        mean_of(mean_of(thirds[number] for thirds in (case.thirds or {}).values()) for case in of_row)
        for of_row in cases
    )
