"""Results of trials, and of a whole search with its final trials: immutable models, validated where they are read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, FailFast, Field

from p2r.documents import FewKeys, RelativePath, is_relative_path
from p2r.errors import DataError
from p2r.evaluate.rows import CurvePoint, JsonModel, PseudoLabelRow, TrialRow
from p2r.fewshot.protocol import Settings, Trial

Name = Annotated[str, Field(max_length=1000)]
Text = Annotated[str, Field(max_length=100_000)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Dice = Annotated[float, Field(ge=0, le=1)]


def _check_settings(values: dict[str, int | float]) -> dict[str, int | float]:
    if unknown := values.keys() - Settings.__dataclass_fields__.keys():
        raise ValueError(f"{min(unknown)[:80]!r} is not a setting of a trial")
    return values


def _check_trial_id(name: str) -> str:
    if not is_relative_path(name) or "/" in name:
        raise ValueError("must be a file name")
    return name


class TrialFacts(JsonModel):
    """The trial that a result belongs to; see `Trial.to_row`."""

    id: Annotated[str, AfterValidator(_check_trial_id)]
    task: Name
    mode: Name
    protocol: Name
    num_labelled: Annotated[int, Field(ge=1, lt=2**53)]
    draw: Count
    subjects: Annotated[list[Name], FailFast()]
    settings: Annotated[dict[str, int | float], FewKeys, AfterValidator(_check_settings)]


class SplitSummary(JsonModel):
    """Scores of one split; see `p2r.evaluate.metrics.Summary`."""

    dice_mean: Dice | None


class TrialResult(JsonModel):
    """The outcome of one trial: finished, stopped by a scheduler, or failed."""

    trial: TrialFacts
    validation: SplitSummary | None = None
    """None: the trial failed."""
    seconds: Seconds | None = None
    train_loss: float | None = None
    device: str | None = None
    curve: list[CurvePoint] | None = None
    pseudo_labels: PseudoLabelRow | None = None
    num_prototypes: Annotated[list[Count], Field(max_length=20_000)] | None = None
    weights: RelativePath | None = None
    """Path below the task's storage; None for search trials."""
    row: TrialRow | None = None
    """Row of `report.json`; None for search trials."""
    stopped_at_step: Count | None = None
    """Step after which a scheduler stopped the trial; None: it was not stopped."""
    failed: Text | None = None
    """Reason; None: the trial did not fail."""
    diverged: bool = False
    """True if a repetition would fail in the same way."""

    @property
    def validation_dice(self) -> float | None:
        """Mean validation Dice; None if it is undefined."""
        return None if self.validation is None else self.validation.dice_mean

    @property
    def is_whole(self) -> bool:
        """True if the trial reached its last step."""
        return self.failed is None and self.stopped_at_step is None

    def reported(self) -> TrialRow:
        """Return the row.

        Raises:
            DataError: There is none.
        """
        if self.row is None:
            raise DataError(f"trial {self.trial.id} has no row: it is a search trial, or it did not finish")
        return self.row


def failed_result(trial: Trial, reason: str, *, diverged: bool = False) -> TrialResult:
    """Return the result of a failed trial."""
    facts = {"trial": trial.to_row(), "failed": reason, **({"diverged": True} if diverged else {})}
    return TrialResult.model_validate(facts)


def stopped_result(trial: Trial, *, step: int, validation_dice: float, seconds: float) -> TrialResult:
    """Return the result of a trial that a scheduler stopped."""
    facts = {"trial": trial.to_row(), "stopped_at_step": step, "seconds": seconds}
    return TrialResult.model_validate({**facts, "validation": {"dice_mean": validation_dice}})


class FailedTrial(JsonModel):
    """A trial without a result."""

    trial: str
    """Id of the trial; in an ablation after its variant, or `variant NAME` for a variant without any result."""
    reason: str

    @property
    def is_variant(self) -> bool:
        """True for a whole variant of an ablation; the id of a trial has no space."""
        return self.trial.startswith("variant ")


class SearchedTrial(JsonModel):
    """A candidate of the search."""

    task: str
    mode: str
    protocol: str
    num_labelled: int
    draw: int
    settings: dict[str, int | float]
    validation_dice_mean: float | None
    seconds: float | None
    stopped_at_step: int | None
    failed: str | None

    @classmethod
    def of(cls, trial: Trial, result: TrialResult) -> "SearchedTrial":
        """Describe a candidate and its result."""
        return cls(
            task=trial.task,
            mode=trial.mode,
            protocol=trial.protocol,
            num_labelled=trial.num_labelled,
            draw=trial.draw,
            settings=trial.settings.given(),
            validation_dice_mean=result.validation_dice,
            seconds=result.seconds,
            stopped_at_step=result.stopped_at_step,
            failed=result.failed,
        )


class ChosenSettings(JsonModel):
    """The settings of the final trials of one task and mode."""

    task: str
    mode: str
    settings: dict[str, int | float]
    by: str
    """`search`, or `only candidate`."""

    @classmethod
    def of(cls, task: str, mode: str, settings: Settings, *, is_searched: bool) -> "ChosenSettings":
        """Describe a choice."""
        return cls(task=task, mode=mode, settings=settings.given(), by="search" if is_searched else "only candidate")


class SweepTime(JsonModel):
    """Time of one call that ran trials."""

    num_trials: Annotated[int, Field(ge=1, lt=2**53)]
    num_concurrent: Annotated[int, Field(ge=1, lt=2**53)]
    sweep_s: Seconds
    trials_s: Seconds


class Overhead(JsonModel):
    """Time of all sweeps compared with the time of their trials."""

    num_trials: int
    num_concurrent: int
    sweep_s: float
    trials_s: float
    overhead_fraction: float | None

    def text(self) -> str:
        """Return a log line for one trial or more."""
        share = 0.0 if self.overhead_fraction is None else self.overhead_fraction
        return (
            f"{self.num_trials} trial{'s' * (self.num_trials > 1)}: {self.trials_s:.0f} s in total, up to {self.num_concurrent} at a "
            f"time, in a sweep of {self.sweep_s:.0f} s: overhead {share:.1%}"
        )


NO_OVERHEAD = Overhead(num_trials=0, num_concurrent=0, sweep_s=0.0, trials_s=0.0, overhead_fraction=None)
"""Of no sweep."""


def failures_of(results: Iterable[TrialResult]) -> list[FailedTrial]:
    """Return the failed trials with their reasons."""
    return [FailedTrial(trial=one.trial.id, reason=one.failed) for one in results if one.failed is not None]


def failures_text(failed: Sequence[FailedTrial]) -> str:
    """Return the number of failures: `1 variant and 2 trials`."""
    variants = sum(one.is_variant for one in failed)
    counts = ((variants, "variant"), (len(failed) - variants, "trial"))
    return " and ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts if count)


@dataclass
class FewShot:
    """Results of the whole protocol."""

    results: list[TrialResult]
    """Final trials that did not fail."""
    searched: list[SearchedTrial] = field(default_factory=list)
    chosen: list[ChosenSettings] = field(default_factory=list)
    failed: list[FailedTrial] = field(default_factory=list)
    overhead: Overhead = field(default_factory=lambda: NO_OVERHEAD)

    def facts(self) -> dict[str, object]:
        """Return the part of a report beside its rows, as JSON values."""
        lists = {name: [one.to_json() for one in getattr(self, name)] for name in ("searched", "chosen", "failed")}
        return {**lists, "overhead": self.overhead.to_json()}
