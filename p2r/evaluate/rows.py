"""The row of one final trial in `report.json`: an immutable model for statistics, report and comparison.

A row is validated once, when it is read. Fields that rows of earlier versions lack are None or empty. Unknown fields are
kept, so that a report can be rewritten without loss; `to_json` returns exactly the fields that were set.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter

from p2r.documents import JsonRow, checked
from p2r.errors import DataError


class JsonModel(JsonRow):
    """An immutable JSON object; unknown fields are kept."""

    def __getitem__(self, name: str) -> Any:
        """Return a field by its JSON name, as a plain value. For notebooks; p2r itself uses attributes."""
        return self.to_json()[name]

    def replaced(self, **changes: Any) -> Self:
        """Return a copy with other values, without validation."""
        return self.model_copy(update=changes)


class CaseScore(JsonModel):
    """One class of one case."""

    dice: float | None = None
    hd95_mm: float | None = None
    nsd: float | None = None
    absent: str = "none"


class CaseRow(JsonModel):
    """One frame of one scan of the reported split."""

    subject: str
    scan: str
    frame: int
    stratum: str | None = None
    scores: dict[str, CaseScore]
    """By class."""
    thirds: dict[str, list[float | None]] | None = None
    """Dice by class in the lower, middle and upper third of the slices."""

    @property
    def key(self) -> tuple[str, int]:
        """Scan and frame."""
        return self.scan, self.frame


class CurvePoint(JsonModel):
    """Validation result after a number of training steps."""

    step: int | None
    dice_mean: float | None
    dice: dict[str, float | None]
    """By class."""

    def text(self) -> str:
        """Return the scores, for a log line."""
        classes = ", ".join(f"{name} {dice:.3f}" for name, dice in self.dice.items() if dice is not None)
        mean = "none" if self.dice_mean is None else f"{self.dice_mean:.3f}"
        return f"validation Dice {mean} ({classes})"


class RoundRow(JsonModel):
    """One round of self-training, before a step of the training."""

    step: int
    by: str
    counted_fraction: float
    plausible_frames: int
    frames: int
    class_fractions: dict[str, float] = Field(default_factory=dict)
    """Fraction of the counted pixels by class, background included."""
    change: float | None
    ended_at_step: int | None = None
    ended_by: str | None = None
    """Reason that this round is the last one."""


class PseudoLabelRow(JsonModel):
    """Pseudo-labels of one training run, by interval of steps."""

    steps: list[int] = Field(default_factory=list)
    """Last step of each interval."""
    confident_fraction: list[float] = Field(default_factory=list)
    """Fraction of the scans' pixels that count."""
    class_fractions: dict[str, list[float]] = Field(default_factory=dict)
    """Fraction of these pixels by class, background included."""
    classes_never_found: list[str] = Field(default_factory=list)
    rounds: list[RoundRow] | None = None
    """Rounds of self-training."""
    warnings: list[str] = Field(default_factory=list)


class Reliability(JsonModel):
    """Bins of confidence over all patients."""

    num_voxels: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]


class CalibrationRow(JsonModel):
    """Calibration of the reported split; see `p2r.evaluate.calibration`."""

    num_bins: int
    margin_mm: float
    ece: float | None = None
    brier: float | None = None
    ece_whole: float | None = None
    brier_whole: float | None = None
    by_subject: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """The same metrics per patient."""
    reliability: Reliability


class ContrastRow(JsonModel):
    """Scores on the reported split with some contrasts only, the others withheld."""

    contrasts: list[str]
    """The contrasts that are given."""
    num_subjects: int
    """Patients who have at least one of them."""
    dice_mean: float | None = None
    dice: dict[str, float | None] = Field(default_factory=dict)
    """By class."""
    dice_by_subject: dict[str, float | None] = Field(default_factory=dict)


class TrialRow(JsonModel):
    """One final trial with its scores on the reported split."""

    task: str
    protocol: str = "leak_free"
    mode: str
    num_labelled: PositiveInt
    draw: NonNegativeInt
    subjects: list[str]
    """The labelled patients."""
    id: str = ""
    settings: dict[str, object] = Field(default_factory=dict)
    seed: int | None = None
    code: str | None = None
    """Commit that ran the trial."""
    training_code: str | None = None
    """Commit that trained, if the weights of an earlier trial with the same training were evaluated."""
    device: str | None = None
    seconds: float | None = None

    backbone_sha256: str | None = None
    """Digest of the manifest; None: from scratch."""
    backbone: str | None = None
    """Short name of the backbone, in a table of several backbones."""
    variant: str | None = None
    """Name of the variant, in an ablation."""
    transductive: bool = False
    """True if the backbone has seen validation or test patients, or may have."""
    corpora: str | None = None
    """`unknown` if the backbone's manifest does not name its corpora."""

    split: str = "test"
    dice_mean: float | None = None
    dice: dict[str, float | None] = Field(default_factory=dict)
    """By class."""
    dice_by_subject: dict[str, float | None] = Field(default_factory=dict)
    hd95_mm: float | None = None
    nsd: float | None = None
    absent: dict[str, dict[str, int]] | None = None
    """By class: number of scans in which it is absent in both, only in the prediction, and only in the reference."""
    num_test_subjects: int | None = None
    validation_dice_mean: float | None = None
    soft_dice_with_background: float | None = None
    cases: list[CaseRow] | None = None
    contrasts: list[str] | None = None
    """Contrasts that the model reads; None: one contrast without a name."""
    by_contrasts: list[ContrastRow] | None = None
    """Scores with subsets of these contrasts."""
    predictions: str | None = None
    """Path of the predictions below the task's storage."""
    calibration: CalibrationRow | None = None
    pseudo_labels: PseudoLabelRow | None = None
    curve: list[CurvePoint] | None = None
    warnings: list[str] | None = None
    """Problems that did not end the training."""

    @property
    def all_warnings(self) -> list[str]:
        """Problems that did not end the training; those of pseudo-labels come last."""
        return all_warnings(self)


class _HasWarnings(Protocol):
    @property
    def warnings(self) -> list[str] | None: ...

    @property
    def pseudo_labels(self) -> PseudoLabelRow | None: ...


def all_warnings(facts: _HasWarnings) -> list[str]:
    """Return the problems that did not end a training; those of pseudo-labels come last."""
    return [*(facts.warnings or ()), *(() if facts.pseudo_labels is None else facts.pseudo_labels.warnings)]


_ROW = TypeAdapter(TrialRow)


def rows_of(values: Iterable[object], *, where: str = "rows") -> list[TrialRow]:
    """Validate rows.

    Args:
        values: JSON objects.
        where: Name of their document, for messages.

    Raises:
        DataError: if a row breaks a rule of `TrialRow`.
    """
    return [
        value if isinstance(value, TrialRow) else checked(_ROW, value, where=f"{where}: row {number}:", error=DataError)
        for number, value in enumerate(values)
    ]


def digests_of(rows: Sequence[TrialRow]) -> list[str]:
    """Return the sorted digests of the rows' backbones."""
    return sorted({row.backbone_sha256 for row in rows if row.backbone_sha256})
