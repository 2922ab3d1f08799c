"""Documents of few-shot trials on a job's storage -> checked values.

    trials/*.json, searches/*.json    result of a trial, or of a stopped one
    searches/MODE-*.json              candidates proposed by a search algorithm
    sweeps/*.json                     time of a sweep
    report/test_reads/*.json          test-set evaluations

Each is read within the limits of `p2r.documents`. Keys that p2r uses are checked; all others are kept unchanged.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, TypeAdapter

from p2r.documents import FewKeys, RelativePath, Sha256, is_relative_path
from p2r.fewshot.protocol import Settings
from p2r.storage import Storage

MAX_BYTES = 1 << 26
"""Largest document that is read."""

_Name = Annotated[str, Field(max_length=1000)]
_Text = Annotated[str, Field(max_length=100_000)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Seconds = Annotated[float, Field(ge=0, le=1e12)]
_Dice = Annotated[float, Field(ge=0, le=1)]


def _check_settings(values: dict[str, float]) -> dict[str, float]:
    if unknown := values.keys() - Settings.__dataclass_fields__.keys():
        raise ValueError(f"{min(unknown)[:80]!r} is not a setting of a trial")
    return values


def _check_trial_id(name: str) -> str:
    if not is_relative_path(name) or "/" in name:
        raise ValueError("must be a file name")
    return name


class _Kept(BaseModel):
    """Part of a document: the keys that p2r uses; other keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Trial(_Kept):
    id: Annotated[str, AfterValidator(_check_trial_id)]
    task: _Name
    mode: _Name
    protocol: _Name
    num_labelled: Annotated[int, Field(ge=1, lt=2**53)]
    draw: _Count
    subjects: Annotated[list[_Name], FailFast()]
    settings: Annotated[dict[str, float], FewKeys, AfterValidator(_check_settings)]


class _Validation(_Kept):
    dice_mean: _Dice | None


class _Row(_Kept):
    task: _Name
    mode: _Name
    split: _Name
    dice_mean: _Dice | None
    dice: Annotated[dict[str, _Dice | None], FewKeys]
    backbone_sha256: Sha256 | None
    predictions: RelativePath


class _Result(_Kept):
    trial: _Trial
    validation: _Validation | None = None
    """None: the trial failed."""
    failed: _Text | None = None
    stopped_at_step: _Count | None = None
    seconds: _Seconds | None = None
    weights: RelativePath | None = None
    num_prototypes: Annotated[list[_Count], Field(max_length=1000)] | None = None
    row: _Row | None = None


class _Sweep(_Kept):
    num_trials: Annotated[int, Field(ge=1, lt=2**53)]
    num_concurrent: Annotated[int, Field(ge=1, lt=2**53)]
    sweep_s: _Seconds
    trials_s: _Seconds


class _Reading(_Kept):
    time: _Name
    trial: _Name
    recipe_sha256: _Name


class _Report(_Kept):
    rows: Annotated[list[_Row], FailFast()]


_RESULT, _SWEEP, _READING, _REPORT = (TypeAdapter(one) for one in (_Result, _Sweep, _Reading, _Report))
_CANDIDATES = TypeAdapter(list[tuple[dict[str, Annotated[float, Field(strict=True)]], _Result | None]])


def read_result(storage: Storage, path: str) -> dict[str, Any]:
    """Return the result of a trial, or of a stopped one.

    Raises:
        DamagedError: if it is invalid; names the file, the key and the rule.
    """
    return _read_document(storage, path, _RESULT)


def read_candidates(storage: Storage, path: str) -> list[tuple[dict[str, float], dict[str, Any] | None]]:
    """Return the candidates of a search, each with its outcome, or with None if its result is stored.

    Raises:
        DamagedError: if the document is invalid; names the file, the key and the rule.
    """
    found = storage.read_checked(path, _CANDIDATES, max_bytes=MAX_BYTES)
    return [(candidate, other) for candidate, other in found]


def read_sweeps(storage: Storage) -> list[dict[str, Any]]:
    """Return the times of all sweeps.

    Raises:
        DamagedError: if a document is invalid; names the file, the key and the rule.
    """
    return [_read_document(storage, path, _SWEEP) for path in storage.list("sweeps") if path.endswith(".json")]


def read_readings(storage: Storage, folder: str) -> list[dict[str, Any]]:
    """Return all test-set evaluations below a folder.

    Raises:
        DamagedError: if a document is invalid; names the file, the key and the rule.
    """
    return [_read_document(storage, path, _READING) for path in storage.list(folder) if path.endswith(".json")]


def read_report_rows(storage: Storage, path: str) -> list[dict[str, Any]]:
    """Return the rows of a report.

    Raises:
        DamagedError: if the report is invalid; names the file, the key and the rule.
    """
    rows: list[dict[str, Any]] = _read_document(storage, path, _REPORT)["rows"]
    return rows


def _read_document(storage: Storage, path: str, adapter: TypeAdapter[Any]) -> dict[str, Any]:
    found: dict[str, Any] = storage.read_checked(path, adapter, max_bytes=MAX_BYTES)
    return found
