"""The ledger: a row for every input of a corpus, accepted or not.

    key, source, num_bytes, modified, subject           the input, and its version
    status, reason, message, copy_of                    its outcome, and the reason
    num_samples, shape, spacing_mm, dtype, percentiles, voxels_sha256, shard      accepted inputs only
    notes                                               codes of defects that were ignored, such as a broken sidecar
    outline                                             accepted inputs only: coarse shape of the image, see `likeness`

`status` is `accepted`, `refused` or `not_selected`. `reason` is the same word, or the code of the `RefusedScan`. With
pseudonyms, `num_bytes` is null and `modified` is a keyed digest of size and time.

Each volume has a row, so a series with several volumes has several rows. Each revision has its own ledger,
`ledgers/<sha256>.jsonl`; `ledger.jsonl` is a copy of the current one, for people.
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


def _check_percentiles(percentiles: list[float]) -> list[float]:
    if not is_percentile_table(percentiles):
        raise ValueError("percentiles must never decrease, span a range, and have one value per recorded percentile")
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
    """Fields of every row."""

    model_config = ConfigDict(strict=True)  # not extra="forbid": later versions may add keys
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
    """Fields of the row of an accepted scan."""

    subject: _Name
    num_samples: Annotated[int, Field(ge=1, lt=2**40)]
    shape: Annotated[list[_Axis], Field(min_length=4, max_length=4)]
    spacing_mm: Annotated[list[_Size], Field(min_length=3, max_length=3)]
    dtype: Literal["int8", "uint8", "int16", "uint16", "float32"]
    percentiles: Annotated[list[float], AfterValidator(_check_percentiles)]
    voxels_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    shard: _Name
    outline: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{159}=$")] | None = None
    """See `likeness`; None in corpora of versions before it."""


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
    """Return the row of an input that is not accepted, or not yet."""
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
    """Return the fields of an accepted scan's row that describe its voxels."""
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
    """Serialise a ledger: one JSON object per line, sorted by key. Equal rows give equal bytes."""
    ordered = sorted(rows, key=lambda row: (str(row["key"]), str(row["source"])))
    return b"".join(json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n" for row in ordered)


def read_ledger(storage: Storage, manifest: Manifest) -> list[LedgerRow]:
    """Read the ledger of a revision.

    Raises:
        DataError: if it is absent, or its digest differs from the one in the manifest.
    """
    path = ledger_path(manifest)
    found = storage.read_tagged(path, max_bytes=MAX_BYTES)
    if found is None or hashlib.sha256(found[0]).hexdigest() != manifest.facts.ledger_sha256:
        state = "absent" if found is None else "damaged"
        raise DataError(f"{storage.at(path)} is {state}: the corpus cannot grow without it; restore the file")
    return parse_ledger(found[0], name=storage.at(path))


def parse_ledger(content: bytes, *, name: str) -> list[LedgerRow]:
    """Parse the rows of a ledger.

    Raises:
        DataError: if a line is not a valid row.
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
    """Check that an object is a row of a ledger.

    Raises:
        DataError: if it is not; names the field and the rule.
    """
    found = checked(_ROW, row, where=where, error=DataError)
    if found.status == "accepted":
        checked(_ACCEPTED, row, where=where, error=DataError)


def count_reasons(rows: Iterable[LedgerRow]) -> dict[str, int]:
    """Count rows by reason."""
    return dict(sorted(Counter(str(row["reason"]) for row in rows).items()))


def is_accepted(row: LedgerRow) -> bool:
    """Return whether a row's scan is in the corpus."""
    return bool(row["status"] == "accepted")


def is_failure(row: LedgerRow) -> bool:
    """Return whether a row's scan was refused as unusable; copies of good scans and label maps do not count."""
    return bool(row["status"] == "refused" and row["reason"] not in ("duplicate", "cross_subject_copy", LABEL_MAP))
