"""Outputs of a job: the URLs and results of its stages, in the order in which they are made."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a finished job imports neither
    from rich.table import Table

    from p2r.fewshot.results import FailedTrial


@dataclass(frozen=True)
class Outputs:
    """Outputs of the stages that ran; None: the job does not have this stage."""

    storage: str
    """URL of the job's storage."""
    corpus: str | None = None
    """URL of the corpus."""
    checkpoint: str | None = None
    """URL of the last checkpoint."""
    backbone: str | None = None
    """URL of the published backbone."""
    backbone_pin: str | None = None
    """The same, with the digest of its manifest."""
    models: Mapping[str, str] | None = None
    """URLs of published segmentation models, by task and name."""
    report: str | None = None
    """URL of the report as Markdown."""
    page: str | None = None
    """URL of the report as one HTML page."""
    pictures: str | None = None
    """URL of the folder of its pictures."""
    table: "Table | None" = field(default=None, compare=False)
    """The results, for a terminal."""
    failed: tuple["FailedTrial", ...] = ()
    """Trials without a result."""
    unfinished: str | None = None
    """Stage that is to be continued by running the job again; None: the job is finished."""

    def outputs(self) -> dict[str, Any]:
        """Return the outputs by name, except the table and the failed trials."""
        found = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("table", "failed")}
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the outputs by name as JSON values, with `failed` if trials failed."""
        return self.outputs() | ({"failed": [one.to_json() for one in self.failed]} if self.failed else {})

    def lines(self) -> Iterator[str]:
        """Yield the lines that a run prints: name and URL; several of one kind are indented below it."""
        for name, value in self.outputs().items():
            if isinstance(value, Mapping):
                yield f"{name}:"
                yield from (f"  {key}: {child}" for key, child in value.items())
            else:
                yield f"{name}: {value}"
