"""The ledger: a row for every input of a corpus, whatever became of it.

    key, source, num_bytes, modified, subject           which input, and which version of it
    status, reason, message, copy_of                    what became of it, and why
    num_samples, shape, spacing_mm, dtype, percentiles, voxels_sha256, shard      of what was accepted
    notes                                               codes of what was passed over on the way, such as a broken sidecar

`status` is `accepted`, `refused` or `not_selected`. `reason` is the same word, or says why a scan was refused, in the
codes of `RefusedScan`. Under pseudonyms `num_bytes` is null, and `modified` a keyed digest of size and time.

A row is a volume: a series that holds several has as many rows. Each revision has its own ledger, `ledgers/<sha256>.jsonl`;
`ledger.jsonl` is the current one again, for people.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from p2r.data.label_maps import CODE as LABEL_MAP
from p2r.data.manifest import Manifest, ledger_path
from p2r.data.preprocess import is_percentile_table
from p2r.data.volume import Volume
from p2r.documents import checked, read_lines
from p2r.errors import DataError
from p2r.storage import Storage

LedgerRow = dict[str, Any]


def _table(percentiles: list[float]) -> list[float]:
    if not is_percentile_table(percentiles):
        raise ValueError("percentiles do not rise, have no contrast, or are not as many as are recorded")
    return percentiles


MAX_BYTES = 1 << 30
"""Largest ledger that is read, of about a million scans."""
_MAX_LINE_BYTES = 1 << 16
_MAX_MEMORY_BYTES = 1 << 33

_Name = Annotated[str, Field(max_length=4096)]
_Code = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
_Axis = Annotated[int, Field(ge=1, le=2**20)]
_Size = Annotated[float, Field(gt=0, lt=1e4)]


class _Row(BaseModel):
    """What every row has."""

    model_config = ConfigDict(strict=True)  # further keys may come with later versions
    key: _Name
    source: _Name
    num_bytes: Annotated[int, Field(ge=0, lt=2**53)] | None
    modified: _Name
    subject: _Name | None
    status: Literal["accepted", "refused", "not_selected"]
    reason: _Code
    message: str
    copy_of: _Name | None
    num_samples: Annotated[int, Field(ge=0, lt=2**40)]
    voxels_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    shard: _Name | None
    notes: Annotated[list[_Code], Field(max_length=100)]


class _Accepted(_Row):
    """What the row of an accepted scan has."""

    subject: _Name
    num_samples: Annotated[int, Field(ge=1, lt=2**40)]
    shape: Annotated[list[_Axis], Field(min_length=4, max_length=4)]
    spacing_mm: Annotated[list[_Size], Field(min_length=3, max_length=3)]
    dtype: Literal["int8", "uint8", "int16", "uint16", "float32"]
    percentiles: Annotated[list[float], AfterValidator(_table)]
    voxels_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    shard: _Name


_ROW, _ACCEPTED = TypeAdapter(_Row), TypeAdapter(_Accepted)


def ledger_row(
    *,
    key: str,
    source: str,
    num_bytes: int | None,
    modified: str,
    subject: str | None,
    status: str,
    reason: str,
    message: str = "",
    copy_of: str | None = None,
) -> LedgerRow:
    """Return the row of an input that was not accepted, or not yet."""
    return {
        "key": key,
        "source": source,
        "num_bytes": num_bytes,
        "modified": modified,
        "subject": subject,
        "status": status,
        "reason": reason,
        "message": message,
        "copy_of": copy_of,
        "num_samples": 0,
        "shape": None,
        "spacing_mm": None,
        "dtype": None,
        "percentiles": None,
        "voxels_sha256": None,
        "shard": None,
        "notes": [],
    }


def accepted_fields(volume: Volume, *, axis: int, percentiles: Sequence[float], voxels_sha256: str) -> dict[str, Any]:
    """Return what the row of an accepted scan says of its voxels."""
    return {
        "num_samples": volume.data.shape[axis] * volume.data.shape[3],
        "shape": list(volume.data.shape),
        "spacing_mm": list(volume.spacing_mm),
        "dtype": volume.data.dtype.name,
        "percentiles": list(percentiles),
        "voxels_sha256": voxels_sha256,
        "notes": list(volume.notes),
    }


def ledger_bytes(rows: Iterable[LedgerRow]) -> bytes:
    """Serialise a ledger: one JSON object a line, by key; equal rows are equal bytes."""
    ordered = sorted(rows, key=lambda row: (str(row["key"]), str(row["source"])))
    return b"".join(json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n" for row in ordered)


def read_ledger(storage: Storage, manifest: Manifest) -> list[LedgerRow]:
    """Read the ledger of a revision.

    Raises:
        DataError: if it is not the one that the manifest names.
    """
    path = ledger_path(manifest)
    found = storage.read_tagged(path, max_bytes=MAX_BYTES)
    if found is None or hashlib.sha256(found[0]).hexdigest() != manifest["ledger_sha256"]:
        state = "absent" if found is None else "damaged"
        raise DataError(f"{storage.at(path)} is {state}: the corpus cannot grow without it; restore the file")
    return parse_ledger(found[0], name=storage.at(path))


def parse_ledger(content: bytes, *, name: str) -> list[LedgerRow]:
    """Return the rows in the bytes of a ledger.

    Raises:
        DataError: They are none.
    """
    rows = []
    lines = read_lines(
        content,
        where=name,
        max_bytes=MAX_BYTES,
        max_line_bytes=_MAX_LINE_BYTES,
        max_memory_bytes=_MAX_MEMORY_BYTES,
        max_depth=4,
        error=DataError,
    )
    for number, row in lines:
        check_row(row, where=f"{name}, line {number}:")
        rows.append(row)
    return rows


def check_row(row: object, *, where: str) -> None:
    """Refuse what is no row of a ledger.

    Raises:
        DataError: naming the field and the rule.
    """
    found = checked(_ROW, row, where=where, error=DataError)
    if found.status == "accepted":
        checked(_ACCEPTED, row, where=where, error=DataError)


def count_reasons(rows: Iterable[LedgerRow]) -> dict[str, int]:
    """Count rows by reason."""
    return dict(sorted(Counter(str(row["reason"]) for row in rows).items()))


def is_accepted(row: LedgerRow) -> bool:
    """Tell whether a row's scan is in the corpus."""
    return bool(row["status"] == "accepted")


def is_failure(row: LedgerRow) -> bool:
    """Tell whether a row's scan was refused as unusable: copies of good scans and label maps are not."""
    return bool(row["status"] == "refused" and row["reason"] not in ("duplicate", "cross_subject_copy", LABEL_MAP))
