"""Facts of a report other than its rows: validated once, read by every part of the page."""

from typing import Any

from pydantic import Field, TypeAdapter

from p2r.documents import checked
from p2r.errors import DataError
from p2r.evaluate.rows import JsonModel


class TaskFacts(JsonModel):
    """Description of a task."""

    title: str | None = None
    licence: str | None = None
    citation: str | None = None
    thirds: list[str] = Field(default_factory=list)
    """Names of the thirds of the organ; empty: lower, middle, upper."""
    classes: list[str] = Field(default_factory=list)
    """Names of the classes in the order of their labels; empty: unknown, as in an older report."""
    splits: dict[str, list[str]] = Field(default_factory=dict)
    """Patients of each split."""


class ForeignWeights(JsonModel):
    """Weights of another tool from which a backbone began."""

    source: str | None = None
    """Name of the other network."""
    file: str | None = None
    weights_sha256: str | None = None
    citations: str | None = None
    table: list[dict[str, object]] = Field(default_factory=list)
    """Tensors that were matched and left out, with reasons."""


class ReportContext(JsonModel):
    """Origin of the rows. The fields below have places of their own on the page; unknown fields become lines of the provenance."""

    title: str = "Few-shot segmentation"
    caveats: list[str] = Field(default_factory=list)
    """Sentences, shown first."""
    tasks: dict[str, TaskFacts] = Field(default_factory=dict)
    captions: dict[str, str] = Field(default_factory=dict)
    """By name of the picture."""
    places: dict[str, str] = Field(default_factory=dict)
    """By name of the picture: the task that it belongs to."""
    searched: Any = None
    """Trials of the search: a list of mappings."""
    chosen: Any = None
    """Settings that won: a mapping, or a list of mappings."""
    failed: list[dict[str, object]] | None = None
    """Trials that failed, with their reasons."""
    overhead: Any = None
    """Time of the sweep outside its trials."""
    spent: dict[str, object] = Field(default_factory=dict)
    """Time of pretraining and search."""
    test_reads: list[dict[str, object]] | None = None
    """Test-set evaluations."""
    left_out: list[str] = Field(default_factory=list)
    """Sentences about parts that could not be shown."""
    backbone: Any = None
    """A mapping with its `url`, or a name."""
    initial_weights: "ForeignWeights | None" = None
    """Weights of another tool from which the backbone began."""
    code: str | None = None
    """Commit that wrote the report."""

    def provenance(self) -> dict[str, object]:
        """Return the facts without a place of their own."""
        return {name: value for name, value in self.to_json().items() if name not in _OWN_PLACE}


_OWN_PLACE = set(ReportContext.model_fields) - {"backbone", "code"}
_CONTEXT = TypeAdapter(ReportContext)


def context_of(value: object) -> ReportContext:
    """Validate a context.

    Raises:
        DataError: It breaks a rule of `ReportContext`.
    """
    return value if isinstance(value, ReportContext) else checked(_CONTEXT, value, where="the context", error=DataError)
