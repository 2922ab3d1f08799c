"""Comparison of several runs or backbones: results side by side, and differences paired by patient.

    Run (A, B, ...) -> comparison -> table for the terminal; comparison.html, comparison.json, pictures

Only results of the same task, protocol, split, mode and number of labelled patients are put side by side. All others are listed,
and never mixed. A difference is paired if the draws had the same labelled patients and were evaluated on the same test patients.
Otherwise both results are shown, with the reason for the missing difference. Differing settings do not forbid a comparison. They
are printed above its results, because they may explain a difference.

Every run is compared with the first one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from p2r.errors import DataError
from p2r.evaluate.rows import JsonModel, TrialRow
from p2r.evaluate.statistics import Interval, PairedDifference, few_shot_statistics
from p2r.report.runs import Choice, Run, Setting, setting_of
from p2r.report.settings_compared import ComparedSettings, compare_settings
from p2r.report.tables import LEAK_FREE, aggregate, series_name, series_order

FORMAT = "p2r-comparison/1"

_MOST_NAMES = 3
_SEED = 0


class CellName(JsonModel):
    """Properties that compared results share: one row of the table."""

    task: str
    protocol: str
    split: str
    num_labelled: int
    mode: str

    @property
    def setting(self) -> Setting:
        """Task, protocol and split."""
        return self.task, self.protocol, self.split

    @property
    def cell(self) -> tuple[Setting, int, str]:
        """Setting, number of labelled patients and mode."""
        return self.setting, self.num_labelled, self.mode

    @property
    def task_and_protocol(self) -> str:
        """Name of the task, with its protocol unless that is leak-free."""
        return self.task if self.protocol == LEAK_FREE else f"{self.task} ({self.protocol})"

    def order(self) -> tuple[Any, ...]:
        """Return the sort key of cells in all reports."""
        return (*self.setting, self.num_labelled, series_order((self.mode, "")))

    def text(self) -> str:
        """Return the name of the cell in a sentence."""
        return f"{self.task} ({self.protocol}, {self.split}), n = {self.num_labelled}, {series_name((self.mode, ''))}"


class ComparedCell(CellName):
    """Results of every run, by its letter."""

    dice: dict[str, float | None]
    """Mean over draws."""
    sd: dict[str, float | None]
    draws: dict[str, int]


class ComparedRow(CellName):
    """One draw of one run."""

    run: str
    draw: int
    dice_mean: float | None
    dice: dict[str, float | None]
    seed: int | None = None
    code: str | None = None
    backbone_sha256: str | None = None


class ComparedInterval(CellName):
    """Interval of the mean of one run."""

    run: str
    draws: int
    patients: int
    mean: float
    lower: float
    upper: float


class ComparedDifference(CellName):
    """Difference of a run from the first one, paired by patient."""

    run: str
    against: str
    draws: int
    patients: int
    difference: float
    lower: float
    upper: float
    p: float
    p_holm: float
    draws_agree: int
    """Number of draws whose difference has the sign of `difference`."""


class Unpaired(CellName):
    """A cell without a difference, and the reason."""

    run: str
    against: str
    reason: str


class ComparedRun(JsonModel):
    """A run without its rows."""

    letter: str
    url: str
    job: str
    backbone: str
    backbone_sha256: str
    code: str
    seed: str
    licence: str
    finetune: dict[str, object]
    chosen: list[Choice]


class Comparison(JsonModel):
    """Results of several runs side by side: the content of `comparison.json`."""

    format: str
    runs: list[ComparedRun]
    settings: ComparedSettings
    seed: int
    cells: list[ComparedCell]
    rows: list[ComparedRow]
    """The draws of the cells' means."""
    intervals: list[ComparedInterval]
    differences: list[ComparedDifference]
    unpaired: list[Unpaired]
    not_compared: list[str]
    """Sentences about results that only some runs have."""

    @property
    def letters(self) -> list[str]:
        """The letters of the runs."""
        return [run.letter for run in self.runs]

    def difference(self, cell: CellName, letter: str) -> ComparedDifference | None:
        """Return the difference of a run in a cell."""
        return next((one for one in self.differences if one.run == letter and one.cell == cell.cell), None)


Cells = dict[tuple[Setting, int, str], list[TrialRow]]


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Compare runs with the first of them.

    Raises:
        DataError: The runs have no result in common.
    """
    first, others = runs[0], runs[1:]
    cells_of, names, not_compared = _shared_cells(runs)
    reasons = {
        (run.letter, name.cell): _explain_unpaired(
            cells_of[first.letter][name.cell], cells_of[run.letter][name.cell], first.letter, run.letter
        )
        for run in others
        for name in names
    }
    return Comparison(
        format=FORMAT,
        runs=[_without_rows(run) for run in runs],
        settings=compare_settings(runs, [(name.task, name.mode) for name in names]),
        seed=_SEED,
        cells=[_cell(name, cells_of) for name in names],
        rows=[
            _row(name, row, letter) for letter, cells in cells_of.items() for name in names for row in cells[name.cell]
        ],
        intervals=[
            one for letter, cells in cells_of.items() for one in _intervals(letter, _rows_of_run(cells, names, letter))
        ],
        differences=[
            one
            for run in others
            for one in _differences(
                run.letter,
                first.letter,
                [
                    row
                    for letter in (first.letter, run.letter)
                    for row in _rows_of_run(
                        cells_of[letter], [name for name in names if not reasons[run.letter, name.cell]], letter
                    )
                ],
            )
        ],
        unpaired=[
            Unpaired(**name.to_json(), run=run.letter, against=first.letter, reason=reason)
            for run in others
            for name in names
            if (reason := reasons[run.letter, name.cell])
        ],
        not_compared=not_compared,
    )


def _shared_cells(runs: Sequence[Run]) -> tuple[dict[str, Cells], list[CellName], list[str]]:
    """Return the rows of every run by cell, the cells that all runs have, and sentences about the others."""
    first, others = runs[0], runs[1:]
    not_compared: list[str] = []
    shared = _settings(first)
    for run in others:
        shared = shared & _settings(run)
        not_compared += _explain_unshared(first, run)
    cells_of = {run.letter: _cells(run, shared) for run in runs}
    names = sorted((_name(key) for key in {key for cells in cells_of.values() for key in cells}), key=CellName.order)
    alike = [name for name in names if all(name.cell in cells for cells in cells_of.values())]
    for name in names:
        there = [letter for letter, cells in cells_of.items() if name.cell in cells]
        if len(there) < len(runs):
            not_compared.append(f"{name.text()}: only in {' and '.join(there)}")
    sentences = list(dict.fromkeys(not_compared))
    if not alike:
        raise DataError(
            "these reports have no result in common (same task, protocol, split, mode and number of labelled patients): "
            + "; ".join(sentences)
        )
    return cells_of, alike, sentences


def _without_rows(run: Run) -> ComparedRun:
    values = {name: value for name, value in asdict(run).items() if name not in ("rows", "chosen")}
    return ComparedRun(**values, chosen=list(run.chosen))


def _cell(name: CellName, cells_of: Mapping[str, Cells]) -> ComparedCell:
    by_letter = {letter: aggregate(cells[name.cell])[0] for letter, cells in cells_of.items()}
    return ComparedCell(
        **name.to_json(),
        dice={letter: cell.dice_mean.mean for letter, cell in by_letter.items()},
        sd={letter: cell.dice_mean.sd for letter, cell in by_letter.items()},
        draws={letter: cell.num_draws for letter, cell in by_letter.items()},
    )


def _row(name: CellName, row: TrialRow, letter: str) -> ComparedRow:
    return ComparedRow(
        **name.to_json(),
        run=letter,
        draw=row.draw,
        dice_mean=row.dice_mean,
        dice=row.dice,
        seed=row.seed,
        code=row.code,
        backbone_sha256=row.backbone_sha256,
    )


def _intervals(letter: str, rows: Sequence[TrialRow]) -> Iterator[ComparedInterval]:
    for one in few_shot_statistics(rows, seed=_SEED).intervals:
        yield ComparedInterval(
            **_name_of(one).to_json(),
            run=letter,
            draws=one.draws,
            patients=one.patients,
            mean=one.mean,
            lower=one.lower,
            upper=one.upper,
        )


def _differences(letter: str, against: str, rows: Sequence[TrialRow]) -> Iterator[ComparedDifference]:
    for one in few_shot_statistics(rows, seed=_SEED).between_backbones:
        yield ComparedDifference(
            **_name_of(one).to_json(),
            run=letter,
            against=against,
            draws=one.draws,
            patients=one.patients,
            difference=one.difference,
            lower=one.lower,
            upper=one.upper,
            p=one.p,
            p_holm=one.p_holm,
            draws_agree=one.draws_agree,
        )


def _name_of(one: Interval | PairedDifference) -> CellName:
    return CellName(task=one.task, protocol=one.protocol, split=one.split, num_labelled=one.num_labelled, mode=one.mode)


def _settings(run: Run) -> set[Setting]:
    return {setting_of(row) for row in run.rows}


def _explain_unshared(first: Run, run: Run) -> Iterator[str]:
    """Yield sentences about tasks of only one run, and about differing protocols or splits of a shared task."""
    tasks = [{task for task, _, _ in _settings(one)} for one in (first, run)]
    for task in sorted(tasks[0] ^ tasks[1]):
        yield f"task {task}: only in {first.letter if task in tasks[0] else run.letter}"
    for task in sorted(tasks[0] & tasks[1]):
        ours, theirs = (
            sorted({f"{protocol} on {split} patients" for name, protocol, split in _settings(one) if name == task})
            for one in (first, run)
        )
        if ours != theirs:
            yield (
                f"task {task}: {first.letter} is {' and '.join(ours)}, {run.letter} is {' and '.join(theirs)}; results of "
                "different protocols or splits are never mixed"
            )


def _cells(run: Run, settings: set[Setting]) -> Cells:
    cells: Cells = {}
    for row in run.rows:
        if setting_of(row) in settings:
            cells.setdefault((setting_of(row), row.num_labelled, row.mode), []).append(row)
    return cells


def _name(key: tuple[Setting, int, str]) -> CellName:
    (task, protocol, split), num_labelled, mode = key
    return CellName(task=task, protocol=protocol, split=split, num_labelled=num_labelled, mode=mode)


def _rows_of_run(cells: Cells, names: Sequence[CellName], letter: str) -> list[TrialRow]:
    """Return the rows of some cells under the letter of their run, for statistics."""
    return [
        row.replaced(protocol=name.protocol, transductive=False, corpora=None, backbone=letter)
        for name in names
        for row in cells[name.cell]
    ]


def _explain_unpaired(ours: Sequence[TrialRow], theirs: Sequence[TrialRow], our_letter: str, their_letter: str) -> str:
    """Return the reason why two cells cannot be paired by patient; empty if they can."""
    mine, yours = ({subject for row in rows for subject in row.dice_by_subject} for rows in (ours, theirs))
    if mine != yours:
        parts = [
            f"only {letter} has {_shorten_names(sorted(there))}"
            for letter, there in ((our_letter, mine - yours), (their_letter, yours - mine))
            if there
        ]
        return f"the evaluated patients differ: {', '.join(parts)}"
    draws = [{row.draw: sorted(row.subjects) for row in rows} for rows in (ours, theirs)]
    common = sorted(draws[0].keys() & draws[1].keys())
    if not common:
        return "they have no draw in common"
    alike = [draw for draw in common if draws[0][draw] == draws[1][draw]]
    if not alike:
        draw = common[0]
        return (
            f"the labelled patients differ: draw {draw} is {_shorten_names(draws[0][draw])} in {our_letter}, "
            f"{_shorten_names(draws[1][draw])} in {their_letter}"
        )
    scored = [
        {row.draw: {name for name, dice in row.dice_by_subject.items() if dice is not None} for row in rows}
        for rows in (ours, theirs)
    ]
    if not any(scored[0][draw] & scored[1][draw] for draw in alike):
        return "no evaluated patient has a Dice in both, in a draw of the same labelled patients"
    return ""


def _shorten_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
