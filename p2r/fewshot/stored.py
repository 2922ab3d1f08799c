"""Documents of few-shot trials on a job's storage -> checked values.

    trials/*.json, searches/*.json    result of a trial, or of a stopped one
    searches/MODE-*.json              candidates proposed by a search algorithm
    sweeps/*.json                     time of a sweep
    report/test_reads/*.json          test-set evaluations

Each is read within the bounds of `p2r.documents`. The fields that p2r computes with are checked; a model keeps all others.
"""

from typing import Annotated, Any

from pydantic import FailFast, Field, TypeAdapter

from p2r.documents import FewKeys, RelativePath, Sha256
from p2r.evaluate.rows import JsonModel, TrialRow
from p2r.fewshot.results import Dice, Name, SweepTime, TrialResult
from p2r.storage import Storage

MAX_BYTES = 1 << 26
"""Largest document that is read."""


class _Row(TrialRow):
    """A row as written by trials: complete, and within bounds."""

    task: Name
    mode: Name
    split: Name
    dice_mean: Dice | None
    dice: Annotated[dict[str, Dice | None], FewKeys]
    backbone_sha256: Sha256 | None
    predictions: RelativePath


class _Result(TrialResult):
    row: _Row | None = None


class Reading(JsonModel):
    """A test-set evaluation."""

    time: Name
    trial: Name
    recipe_sha256: Name


class _Report(JsonModel):
    rows: Annotated[list[_Row], FailFast()]


_RESULT, _SWEEP, _READING, _REPORT = (TypeAdapter(one) for one in (_Result, SweepTime, Reading, _Report))
_CANDIDATES = TypeAdapter(list[tuple[dict[str, Annotated[float, Field(strict=True)]], _Result | None]])


def read_result(storage: Storage, path: str) -> TrialResult:
    """Return the result of a trial, or of a stopped one.

    Raises:
        DamagedError: naming the file, the key and the rule.
    """
    return TrialResult.model_validate(_read_document(storage, path, _RESULT))


def read_candidates(storage: Storage, path: str) -> list[tuple[dict[str, float], TrialResult | None]]:
    """Return the candidates of a search, each with its result; None: the result is stored with its trial.

    Raises:
        DamagedError: naming the file, the key and the rule.
    """
    found = _read_document(storage, path, _CANDIDATES)
    return [(candidate, other and TrialResult.model_validate(other)) for candidate, other in found]


def read_sweeps(storage: Storage) -> list[SweepTime]:
    """Return the time of every sweep.

    Raises:
        DamagedError: naming the file, the key and the rule.
    """
    return [
        SweepTime.model_validate(_read_document(storage, path, _SWEEP))
        for path in storage.list("sweeps")
        if path.endswith(".json")
    ]


def read_readings(storage: Storage, folder: str) -> list[Reading]:
    """Return all test-set evaluations below a folder.

    Raises:
        DamagedError: naming the file, the key and the rule.
    """
    return [
        Reading.model_validate(_read_document(storage, path, _READING))
        for path in storage.list(folder)
        if path.endswith(".json")
    ]


def read_report_rows(storage: Storage, path: str) -> list[TrialRow]:
    """Return the rows of a report.

    Raises:
        DamagedError: naming the file, the key and the rule.
    """
    return [TrialRow.model_validate(row) for row in _read_document(storage, path, _REPORT)["rows"]]


def _read_document(storage: Storage, path: str, adapter: TypeAdapter[Any]) -> Any:
    return storage.read_checked(path, adapter, max_bytes=MAX_BYTES)
