"""A fine-tuning section and a task -> the list of trials: which patients, which mode, which learning rate.

    search_trials -> validation Dice of each -> choose_learning_rates -> final_trials -> figures on test patients

A draw is a choice of labelled patients. It depends on the seed, their number and the draw's index alone, never on the
mode, so that modes are compared on the same patients. Each mode searches equally many learning rates, on validation
patients only; the choice is then frozen for every number of patients and every draw, and test patients are read once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal, Protocol

from p2r.config import FinetuneConfig, Mode
from p2r.errors import DataError
from p2r.randomness import keyed_generator

PROTOCOL = "leak-free"
TRANSDUCTIVE = "transductive"
"""Figures on patients whose scans the backbone was pretrained on: never put beside leak-free ones."""


class LabelledTask(Protocol):
    """What the protocol needs of a task: its name and the subjects of its splits."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def subjects(self) -> Mapping[str, tuple[str, ...]]:
        """Subjects by split."""


@dataclass(frozen=True)
class Trial:
    """One training run on labelled patients."""

    task: str
    mode: Mode
    num_labelled: int
    draw: int
    subjects: tuple[str, ...]
    learning_rate: float
    purpose: Literal["search", "final"]

    @property
    def id(self) -> str:
        """A stable name that can be a folder: equal trials of two runs of a job have equal names."""
        name = f"{self.task}-{self.purpose}-{self.mode}-n{self.num_labelled}-d{self.draw}"
        return f"{name}-lr{self.learning_rate!r}" if self.purpose == "search" else name

    def to_row(self) -> dict[str, Any]:
        """Return what a row of `report.json` says of the trial."""
        return {**asdict(self), "subjects": list(self.subjects), "protocol": PROTOCOL, "id": self.id}


def draw_subjects(train_subjects: Sequence[str], *, num_labelled: int, draw: int, seed: int) -> tuple[str, ...]:
    """Choose the labelled patients of one draw, sorted by name.

    Raises:
        DataError: if there are fewer training patients than asked for.
    """
    available = sorted(set(train_subjects))
    if not 1 <= num_labelled <= len(available):
        raise DataError(
            f"{num_labelled} labelled patients were asked for, but the task's train split has {len(available)}: "
            f"finetune.num_labelled and finetune.search.num_labelled must lie between 1 and {len(available)}"
        )
    generator = keyed_generator(seed, "labelled", num_labelled, draw)
    chosen = generator.choice(len(available), size=num_labelled, replace=False)
    return tuple(available[index] for index in sorted(chosen.tolist()))


def search_trials(config: FinetuneConfig, task: LabelledTask) -> list[Trial]:
    """List the runs that compare learning rates: the first draw of each number of patients in `config.search`."""
    return [
        _trial(config, task, mode, num_labelled, 0, learning_rate=rate, purpose="search")
        for num_labelled in config.search.num_labelled
        for mode in config.modes
        for rate in config.search.learning_rates[mode]
    ]


def choose_learning_rates(results: Iterable[tuple[Trial, float]]) -> dict[Mode, float]:
    """Return, for each mode, the rate of the best mean validation Dice; the smaller one of two equals.

    Args:
        results: Every search trial of one task, with its mean validation Dice.

    Raises:
        ValueError: if trials of several tasks are mixed, a Dice is not finite, or a rate lacks a trial.
    """
    dice: dict[Mode, dict[float, dict[tuple[int, int], float]]] = {}
    tasks = set()
    for trial, found in results:
        if not math.isfinite(found):
            raise ValueError(f"validation Dice of {trial.id} is {found}")
        tasks.add(trial.task)
        dice.setdefault(trial.mode, {}).setdefault(trial.learning_rate, {})[trial.num_labelled, trial.draw] = found
    if len(tasks) > 1:
        raise ValueError(f"learning rates are chosen for one task at a time, got {', '.join(sorted(tasks))}")
    for mode, by_rate in dice.items():
        if len({frozenset(settings) for settings in by_rate.values()}) > 1:
            raise ValueError(f"{mode}: every learning rate must be tried on the same draws, or none can be compared")
    return {
        mode: min(by_rate, key=lambda rate: (-fmean(by_rate[rate].values()), rate)) for mode, by_rate in dice.items()
    }


def final_trials(config: FinetuneConfig, task: LabelledTask, learning_rates: Mapping[Mode, float]) -> list[Trial]:
    """List the runs whose figures on test patients are reported, few patients first."""
    return [
        _trial(config, task, mode, num_labelled, draw, learning_rate=learning_rates[mode], purpose="final")
        for num_labelled in config.num_labelled
        for draw in range(config.draws)
        for mode in config.modes
    ]


def _trial(
    config: FinetuneConfig,
    task: LabelledTask,
    mode: Mode,
    num_labelled: int,
    draw: int,
    *,
    learning_rate: float,
    purpose: Literal["search", "final"],
) -> Trial:
    subjects = draw_subjects(task.subjects["train"], num_labelled=num_labelled, draw=draw, seed=config.seed)
    return Trial(task.name, mode, num_labelled, draw, subjects, learning_rate, purpose)
