"""Test results of a backbone, collected beside its manifest by the jobs that fine-tune it.

    <name>/<version>/results.json    mean Dice and interval per task, mode and number of labelled patients

A manifest is written once, and results come later. So they are a document of their own, which names the manifest's digest and is not
part of the pin. Every job replaces its own entries and keeps all others, by compare-and-swap.
"""

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter

from p2r.artefact import RESULTS, Artefact
from p2r.documents import Sha256, checked, read_json, way_out
from p2r.errors import DamagedError, StorageError
from p2r.evaluate.statistics import Interval, Statistics
from p2r.modes import facts_of
from p2r.storage import json_bytes

FORMAT = "p2r-results/1"
MAX_BYTES = 2**24
_MAX_DEPTH = 6
_MAX_TRIES = 20

Text = Annotated[str, Field(max_length=2000)]
Dice = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Key = tuple[str, str, str, bool, str, int]
"""Task, protocol, split, transductive, mode, number of labelled patients."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Result(_Strict):
    """Mean Dice of one mode and number of labelled patients, with its interval."""

    task: Text
    protocol: Text
    split: Text
    transductive: bool
    mode: Text
    num_labelled: Annotated[int, Field(ge=1)]
    draws: Annotated[int, Field(ge=1)]
    patients: Annotated[int, Field(ge=1)]
    mean: Dice
    lower: Dice
    upper: Dice
    report: Text = ""
    """URL of the report."""

    @property
    def key(self) -> Key:
        """Settings that must agree for two results to be comparable."""
        return self.task, self.protocol, self.split, self.transductive, self.mode, self.num_labelled

    def text(self) -> str:
        """Return the result as one line for people."""
        return f"{self.setting()}: Dice {self.mean:.3f} [{self.lower:.3f}, {self.upper:.3f}]"

    def setting(self) -> str:
        """Return task, mode and number of labelled patients, for people."""
        seen = ", transductive" * self.transductive
        return f"{self.task}, {self.mode}, {self.num_labelled} labelled{seen}"


class Results(_Strict):
    """Document `results.json`."""

    format: Annotated[str, Field(pattern=rf"^{FORMAT}$")] = FORMAT
    sha256: Sha256
    """Digest of the manifest of the artefact."""
    results: Annotated[list[Result], Field(max_length=10_000), FailFast()] = []


_RESULTS = TypeAdapter(Results)


def results_of(artefact: Artefact) -> list[Result]:
    """Return the results that jobs have added to an artefact.

    Raises:
        DamagedError: The document breaks a rule, or belongs to another artefact.
        StorageError: It cannot be read.
    """
    return _read(artefact)[0]


def _read(artefact: Artefact) -> tuple[list[Result], str | None]:
    found = artefact.storage.read_tagged(RESULTS, max_bytes=MAX_BYTES)
    if found is None:
        return [], None
    where = artefact.storage.at(RESULTS)
    with way_out("delete the file, and run the job that fine-tuned the backbone again"):
        value = read_json(found[0], where=where, max_bytes=MAX_BYTES, max_depth=_MAX_DEPTH, error=DamagedError)
        document = checked(_RESULTS, value, where=f"{where} is not valid:", error=DamagedError)
        if document.sha256 != artefact.sha256:
            raise DamagedError(
                f"{where} is of the manifest with sha256 {document.sha256}, this one has {artefact.sha256}"
            )
    return document.results, found[1]


def results_from(statistics: Statistics, *, report: str) -> list[Result]:
    """Return the results that depend on the backbone: of modes that start from its weights.

    Args:
        statistics: Statistics of a report.
        report: Its URL.
    """
    return [_result_of(one, report) for one in statistics.intervals if _is_of_backbone(one)]


def _is_of_backbone(interval: Interval) -> bool:
    facts = facts_of(interval.mode)
    return facts is not None and facts.weights in ("frozen", "pretrained")


def _result_of(interval: Interval, report: str) -> Result:
    return Result(
        task=interval.task,
        protocol=interval.protocol,
        split=interval.split,
        transductive=interval.transductive,
        mode=interval.mode,
        num_labelled=interval.num_labelled,
        draws=interval.draws,
        patients=interval.patients,
        mean=interval.mean,
        lower=interval.lower,
        upper=interval.upper,
        report=report,
    )


def add_results(artefact: Artefact, results: Iterable[Result]) -> None:
    """Add results to an artefact, in place of earlier ones with the same settings.

    Raises:
        DamagedError: The present document breaks a rule.
        StorageError: It cannot be written, or others write it all the time.
    """
    added = {one.key: one for one in results}
    if not added:
        return
    for _ in range(_MAX_TRIES):
        before, tag = _read(artefact)
        merged = {**{one.key: one for one in before}, **added}
        if list(merged.values()) == before:
            return
        document = Results(sha256=artefact.sha256, results=[merged[key] for key in sorted(merged)])
        if artefact.storage.replace(RESULTS, json_bytes(document.model_dump(mode="json")), tag=tag):
            return
    raise StorageError(f"{artefact.storage.at(RESULTS)} was changed by others {_MAX_TRIES} times in a row: try again")
