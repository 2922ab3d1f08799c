"""A fine-tuning section and a task -> the list of trials, each with its patients, mode and settings.

    search_trials -> validation Dice of each -> choose_settings -> final_trials -> scores on test patients

A draw is a choice of labelled patients. It depends only on the seed, their number and the draw's index, never on the
mode, so that modes are compared on the same patients. Each mode searches the same number of candidates, on validation
patients only. The choice is then frozen for every number of patients and every draw, and test patients are evaluated
once. A mode with one candidate uses it without a search trial.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal, Protocol

from p2r.config import Distribution, FinetuneConfig, NumLabelled
from p2r.errors import DataError
from p2r.evaluate.sampling import draw_subjects
from p2r.modes import MODES, Mode
from p2r.randomness import keyed_generator

ProtocolName = Literal["leak_free", "paper_compat"]
Candidate = Mapping[str, float]
"""Values of a search trial by setting."""

_INTEGER_SETTINGS = (
    "steps",
    "warmup_head_steps",
    "prototypes_per_class",
    "background_prototypes",
    "self_training_rounds",
    "agreement_views",
)
_ADDED_SETTINGS = (
    "prototypes_per_class",
    "prototype_smoothing_pixels",
    "self_training_rounds",
    "self_training_fraction",
    "self_training_min_change",
    "agreement_views",
    "plausible_size_factor",
    "plausible_margin_mm",
)
"""Settings added after results were published. They are left out of a digest if unset, so that older digests stay valid."""


class LabelledTask(Protocol):
    """Properties of a task that the protocol needs."""

    @property
    def name(self) -> str:
        """Name of the task."""

    @property
    def subjects(self) -> Mapping[str, tuple[str, ...]]:
        """Subjects by split."""

    @property
    def strata(self) -> Mapping[str, str]:
        """Stratum by subject."""


@dataclass(frozen=True)
class Settings:
    """Training settings of a trial that a search may choose. None: the mode has no such setting."""

    learning_rate: float | None = None
    """Peak learning rate of the head."""
    weight_decay: float | None = None
    steps: int | None = None
    warmup_head_steps: int | None = None
    backbone_learning_rate_factor: float | None = None
    ema_decay: float | None = None
    ramp_up_fraction: float | None = None
    consistency_weight: float | None = None
    confidence_threshold: float | None = None
    cutmix_probability: float | None = None
    cutmix_labelled_fraction: float | None = None
    feature_dropout: float | None = None
    prototypes_per_class: int | None = None
    background_prototypes: int | None = None
    prototype_smoothing_pixels: float | None = None
    self_training_rounds: int | None = None
    self_training_fraction: float | None = None
    self_training_min_change: float | None = None
    agreement_views: int | None = None
    plausible_size_factor: float | None = None
    plausible_margin_mm: float | None = None

    def given(self) -> dict[str, float]:
        """Return the settings that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Trial:
    """One training run on labelled patients."""

    task: str
    mode: Mode
    num_labelled: int
    draw: int
    subjects: tuple[str, ...]
    settings: Settings
    purpose: Literal["search", "final", "publish"]
    """search: validated only. final: a row of the table. publish: trained on all labelled patients, validated only."""
    protocol: ProtocolName = "leak_free"
    searched: tuple[str, ...] = ()
    """Settings that differ between the candidates of a search; part of a search trial's name."""

    @property
    def id(self) -> str:
        """Stable name, valid as a folder name: the same trial has the same name in every run of a job."""
        name = f"{self.task}-{self.purpose}-{self.mode}-n{self.num_labelled}-d{self.draw}"
        name += f"-{self.protocol}" * (self.protocol != "leak_free")
        values = asdict(self.settings)
        return name + "".join(f"-{'lr' if key == 'learning_rate' else key}{values[key]!r}" for key in self.searched)

    def to_recipe(self) -> dict[str, object]:
        """Return the values that the digest of the trial covers."""
        values = asdict(self)
        settings = values["settings"].items()
        values["settings"] = {
            name: value for name, value in settings if value is not None or name not in _ADDED_SETTINGS
        }
        return values

    def to_row(self) -> dict[str, object]:
        """Return the trial's fields of a row of `report.json`."""
        row = {**asdict(self), "subjects": list(self.subjects), "id": self.id}
        del row["searched"]
        return {**row, "learning_rate": self.settings.learning_rate, "settings": self.settings.given()}


def numbers_of(wanted: Sequence[NumLabelled], task: LabelledTask) -> dict[int, NumLabelled]:
    """Return distinct numbers of labelled patients, mapped to the job's spelling; `all` is the size of the train split."""
    num_train = len(set(task.subjects["train"]))
    numbers: dict[int, NumLabelled] = {}
    for number in wanted:
        numbers.setdefault(num_train if number == "all" else number, number)
    return numbers


def candidates_of(config: FinetuneConfig, mode: Mode) -> list[Candidate]:
    """List the candidates of a mode: the grid of all lists of values, or random samples that depend only on the seed.

    Sample i of a setting has the same quantile in every mode's distribution, so that modes are searched equally.
    """
    space = space_of(config, mode)
    if not any(isinstance(candidates, Distribution) for candidates in space.values()):
        grid = itertools.product(*(values for values in space.values() if not isinstance(values, Distribution)))
        return [dict(zip(space, values, strict=True)) for values in grid]
    drawn = [
        {
            name: _sample_value(candidates, quantile=_sample_quantile(config.seed, number, name))
            for name, candidates in space.items()
        }
        for number in range(config.search.num_samples)
    ]
    return [candidate for index, candidate in enumerate(drawn) if candidate not in drawn[:index]]


def space_of(config: FinetuneConfig, mode: Mode) -> dict[str, tuple[float, ...] | Distribution]:
    """Return the candidate values of each searched setting of a mode."""
    space: dict[str, tuple[float, ...] | Distribution] = {}
    if MODES[mode].trains != "nothing":
        space["learning_rate"] = config.search.learning_rates[mode]
    return space | {name: config.search.space[name] for name in MODES[mode].settings if name in config.search.space}


def _sample_quantile(seed: int, number: int, name: str) -> float:
    return float(keyed_generator(seed, "candidate", number, name).random())


def _sample_value(candidates: tuple[float, ...] | Distribution, *, quantile: float) -> float:
    name, bounds = candidates.named() if isinstance(candidates, Distribution) else ("choice", candidates)
    low, high = bounds[0], bounds[-1]
    if name == "choice":
        return bounds[int(quantile * len(bounds))]
    if name == "randint":
        return low + int(quantile * (high - low))
    value = low * (high / low) ** quantile if name == "loguniform" else low + quantile * (high - low)
    return float(f"{value:.4g}")  # rounded, because it is part of a trial's name


def settings_of(config: FinetuneConfig, mode: Mode, candidate: Candidate) -> Settings:
    """Return a trial's settings: the candidate's values, and the section's values for all others."""
    of_section = {**{name: getattr(config, name) for name in MODES[mode].settings}, "steps": config.steps_of(mode)}
    values: dict[str, Any] = {name: candidate.get(name, of_section[name]) for name in MODES[mode].settings}
    values = {name: int(value) if name in _INTEGER_SETTINGS else float(value) for name, value in values.items()}
    if MODES[mode].trains != "nothing":
        values["learning_rate"] = float(candidate["learning_rate"])
    return Settings(**values)


def is_searched(config: FinetuneConfig, mode: Mode) -> bool:
    """Return whether a mode has more than one candidate."""
    space = space_of(config, mode)
    return bool(space) and (config.search.searcher != "grid" or len(candidates_of(config, mode)) > 1)


def search_trials(config: FinetuneConfig, task: LabelledTask) -> list[Trial]:
    """List the trials that compare candidates, on the first draw of each number of patients in `config.search`."""
    return [
        search_trial(config, task, mode, num_labelled, candidate)
        for num_labelled in numbers_of(config.search.num_labelled, task)
        for mode in config.modes
        if len(candidates_of(config, mode)) > 1
        for candidate in candidates_of(config, mode)
    ]


def search_trial(
    config: FinetuneConfig, task: LabelledTask, mode: Mode, num_labelled: int, candidate: Candidate
) -> Trial:
    """Return the search trial of a candidate."""
    settings = settings_of(config, mode, candidate)
    return _make_trial(config, task, mode, num_labelled, 0, settings, purpose="search", searched=tuple(candidate))


def choose_settings(results: Iterable[tuple[Trial, float | None]]) -> dict[Mode, Settings]:
    """Return, by mode, the settings of the best mean validation Dice. Ties go to the smaller learning rate.

    Args:
        results: Every search trial of one task with its mean validation Dice; None excludes the settings of a trial that
            failed or was stopped.

    Returns:
        Settings by mode, without modes whose settings were all excluded.

    Raises:
        ValueError: if trials of several tasks are mixed, a Dice is not finite, or settings lack a trial.
    """
    dice: dict[Mode, dict[Settings, dict[tuple[int, int], float | None]]] = {}
    tasks = set()
    for trial, found in results:
        if found is not None and not math.isfinite(found):
            raise ValueError(f"validation Dice of {trial.id} is {found}")
        tasks.add(trial.task)
        dice.setdefault(trial.mode, {}).setdefault(trial.settings, {})[trial.num_labelled, trial.draw] = found
    if len(tasks) > 1:
        raise ValueError(f"settings are chosen for one task at a time, got {', '.join(sorted(tasks))}")
    chosen = {}
    for mode, by_settings in dice.items():
        if len({frozenset(draws) for draws in by_settings.values()}) > 1:
            raise ValueError(f"{mode}: settings can be compared only if all have trials on the same draws")
        means = {
            settings: fmean(score for score in draws.values() if score is not None)
            for settings, draws in by_settings.items()
            if None not in draws.values()
        }
        if means:
            chosen[mode] = min(means, key=lambda settings: (-means[settings], settings.learning_rate or 0.0))
    return chosen


def final_trials(config: FinetuneConfig, task: LabelledTask, chosen: Mapping[Mode, Settings]) -> list[Trial]:
    """List the reported trials by number of patients, smallest first; modes without settings are left out."""
    numbers_by_mode = {
        mode: numbers_of(config.num_labelled_by_mode.get(mode, config.num_labelled), task) for mode in config.modes
    }
    return [
        _make_trial(config, task, mode, num_labelled, draw, chosen[mode], purpose="final")
        for num_labelled, number in numbers_of(config.num_labelled, task).items()
        for draw in range(config.draws[number] if isinstance(config.draws, dict) else config.draws)
        for mode in config.modes
        if mode in chosen and num_labelled in numbers_by_mode[mode]
    ]


def trial_on_all(config: FinetuneConfig, task: LabelledTask, mode: Mode, settings: Settings) -> Trial:
    """Return the trial that trains the published model on every patient of the train split."""
    return _make_trial(config, task, mode, len(set(task.subjects["train"])), 0, settings, purpose="publish")


def _make_trial(
    config: FinetuneConfig,
    task: LabelledTask,
    mode: Mode,
    num_labelled: int,
    draw: int,
    settings: Settings,
    *,
    purpose: Literal["search", "final", "publish"],
    searched: tuple[str, ...] = (),
) -> Trial:
    subjects = draw_of(config, task, num_labelled=num_labelled, draw=draw)
    return Trial(task.name, mode, num_labelled, draw, subjects, settings, purpose, config.protocol, searched)


def draw_of(config: FinetuneConfig, task: LabelledTask, *, num_labelled: int, draw: int) -> tuple[str, ...]:
    """Return the labelled patients of a draw, stratified if the section says so.

    Raises:
        DataError: see `draw_subjects`.
    """
    train, strata = task.subjects["train"], task.strata if config.stratify else None
    try:
        return draw_subjects(train, num_labelled=num_labelled, draw=draw, seed=config.seed, strata=strata)
    except DataError as error:
        raise DataError(f"task {task.name}: {error}") from None
