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
    found = []
    for (num_labelled, series), of_group in sorted(
        groups.items(), key=lambda item: (item[0][0], series_order(item[0][1]))
    ):
        subjects = sorted({subject for row in of_group for subject in row.dice_by_subject})
        for subject in subjects:
            cases = [[case for case in row.cases or () if case.subject == subject] for row in of_group]
            strata = [case.stratum for of_row in cases for case in of_row if case.stratum]
            classes = list(dict.fromkeys(name for of_row in cases for case in of_row for name in case.scores))
            dice: dict[str, float | None] = {
                name: mean_of(mean_of(_dice(case, name) for case in of_row) for of_row in cases) for name in classes
            }
            dice[MEAN] = mean_of(row.dice_by_subject.get(subject) for row in of_group)
            lower, middle, upper = (_third(cases, number) for number in range(3))
            found.append(
                Patient(series, num_labelled, subject, strata[0] if strata else None, dice, (lower, middle, upper))
            )
    return found


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


def _third(cases: Sequence[Sequence[CaseRow]], number: int) -> float | None:
    return mean_of(
        mean_of(mean_of(thirds[number] for thirds in (case.thirds or {}).values()) for case in of_row)
        for of_row in cases
    )
