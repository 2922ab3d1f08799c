"""Metrics of pretraining that are published with a backbone: rows of a history -> one strict document.

    history.jsonl up to the published step -> TrainingMetrics -> metrics-<sha256>.json

Only values that the training computes are kept: no speed, no machine. The document is part of the artefact, so its pin covers it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from p2r.artefact import Artefact
from p2r.artefact_manifest import MAX_TEXT_BYTES, Count
from p2r.documents import checked, read_json
from p2r.errors import DamagedError

FORMAT = "p2r-training-metrics/1"
_MAX_DEPTH = 4

Number = Annotated[float, Field(allow_inf_nan=False)]


class TrainingMetrics(BaseModel):
    """Metrics of pretraining at a step."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Annotated[str, Field(pattern=rf"^{FORMAT}$")] = FORMAT
    step: Count
    """The published step."""
    loss: Number | None = None
    """Loss of the last report up to that step."""
    skipped_steps: Count = 0
    """Steps that were skipped because a value was not finite."""
    equivariance_error: Number | None = None
    """0 if embeddings follow the warp perfectly, 1 if no better than chance."""
    health: Annotated[dict[Annotated[str, Field(max_length=100)], Number], Field(max_length=100)] | None = None
    """Metrics of `p2r.engine.health`, of the last report that has them; None: no report has."""
    probe_dice: Number | None = None
    """Last online probe: mean Dice of its labelled task."""

    @classmethod
    def from_history(cls, rows: Sequence[Mapping[str, Any]], *, step: int) -> Self:
        """Return the metrics at a step.

        Args:
            rows: Rows of `history.jsonl`.
            step: The published step; later rows are ignored.
        """
        past = [row for row in rows if row["step"] <= step]

        def last(key: str) -> Any:
            return next((row[key] for row in reversed(past) if row.get(key) is not None), None)

        health = last("health")
        return cls(
            step=step,
            loss=last("loss"),
            skipped_steps=last("skipped_steps") or 0,
            equivariance_error=last("equivariance_error"),
            health=None if health is None else {name: one for name, one in health.items() if one is not None},
            probe_dice=last("probe_dice"),
        )

    def text(self) -> str:
        """Return the metrics as one line for people."""
        named = {
            "loss": self.loss,
            "effective rank": (self.health or {}).get("effective_rank"),
            "equivariance error": self.equivariance_error,
            "probe Dice": self.probe_dice,
        }
        return ", ".join(f"{name} {value:.3g}" for name, value in named.items() if value is not None)


_METRICS = TypeAdapter(TrainingMetrics)


def metrics_of(artefact: Artefact) -> TrainingMetrics | None:
    """Return the metrics that were published with an artefact; None if there are none.

    Raises:
        DamagedError: They are absent, or break a rule.
    """
    entry = artefact.manifest.files.metrics
    if entry is None:
        return None
    where = artefact.storage.at(entry.name)
    value = read_json(
        artefact.read("metrics"), where=where, max_bytes=MAX_TEXT_BYTES, max_depth=_MAX_DEPTH, error=DamagedError
    )
    return checked(_METRICS, value, where=f"{where} is not valid:", error=DamagedError)
