"""The ledger: a row for every input of a corpus, accepted or not.

    key, source, num_bytes, modified, subject           the input, and its version
    status, reason, message, copy_of                    its outcome, and the reason
    num_samples, shape, spacing_mm, dtype, percentiles, voxels_sha256, shard      accepted inputs only
    notes                                               codes of defects that were ignored, such as a broken sidecar, some with a
                                                        number, as in nan_voxels=600
    outline                                             accepted inputs only: coarse shape of the image, see `likeness`

`status` is `accepted`, `refused` or `not_selected`. `reason` is the same word, or the code of the `RefusedScan`. With
pseudonyms, `num_bytes` is null and `modified` is a keyed digest of size and time.

Each volume has a row, so a series with several volumes has several rows. Each revision has its own ledger,
`ledgers/<sha256>.jsonl`; `ledger.jsonl` is a copy of the current one, for people.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, TypeGuard

from pydantic import AfterValidator, Field, TypeAdapter

from p2r.data.label_maps import CODE as LABEL_MAP
from p2r.data.manifest import Manifest, ledger_path
from p2r.data.preprocess import is_percentile_table
from p2r.data.volume import Volume
from p2r.documents import JsonRow, Sha256, checked, read_lines
from p2r.errors import DataError
from p2r.storage import Storage


def _check_percentiles(percentiles: list[float]) -> list[float]:
    if not is_percentile_table(percentiles):
        raise ValueError("percentiles must never decrease, span a range, and have one value per recorded percentile")
    return percentiles


MAX_BYTES = 1 << 30
"""Largest ledger that is read, of about a million scans."""
_MAX_LINE_BYTES = 1 << 16
_MAX_FIELD_STRENGTH_T = 100.0
_MAX_MEMORY_BYTES = 1 << 33

_Name = Annotated[str, Field(max_length=4096)]
_Code = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
_Note = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}(=[0-9]{1,15})?$")]
_Axis = Annotated[int, Field(ge=1, le=2**20)]
_Size = Annotated[float, Field(gt=0, lt=1e4)]


class LedgerRow(JsonRow):
    """Row of an input."""

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
    voxels_sha256: Sha256 | None
    shard: _Name | None
    notes: Annotated[list[_Note], Field(max_length=100)]


class AcceptedRow(LedgerRow):
    """Row of an accepted scan."""

    subject: _Name
    num_samples: Annotated[int, Field(ge=1, lt=2**40)]
    shape: Annotated[list[_Axis], Field(min_length=4, max_length=4)]
    spacing_mm: Annotated[list[_Size], Field(min_length=3, max_length=3)]
    dtype: Literal["int8", "uint8", "int16", "uint16", "float32"]
    percentiles: Annotated[list[float], AfterValidator(_check_percentiles)]
    voxels_sha256: Sha256
    shard: _Name
    """Name of the tar; empty until the shard has a name."""
    record: _Name | None = None
    """Key of its session's record; None if the scan is a record."""
    contrast: _Name | None = None
    resampled_to: _Name | None = None
    """Contrast to whose grid it was resampled; None: it had this grid."""
    covered_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Part of the grid that the scan covers; None: all of it."""
    outline: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{159}=$")] | None = None
    """See `likeness`; None in corpora of versions before it."""
    scanner: Annotated[str, Field(max_length=200)] | None = None
    """Manufacturer and model, as far as the scan's sidecar states them; with pseudonyms only a known manufacturer."""
    field_strength_t: Annotated[float, Field(gt=0, lt=100)] | None = None


@dataclass(frozen=True)
class SessionPlace:
    """Place of a scan in the record of its session."""

    record: str
    contrast: str
    resampled_to: str | None = None
    covered_fraction: float | None = None


_ROW, _ACCEPTED = TypeAdapter(LedgerRow), TypeAdapter(AcceptedRow)


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
    """Return the row of an input that is not accepted."""
    values: dict[str, object] = {
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
    return checked(_ROW, values, where=f"the ledger row of {source}:", error=DataError)


def accepted_row(
    *,
    key: str,
    source: str,
    num_bytes: int | None,
    modified: str,
    subject: str,
    volume: Volume,
    axis: int,
    percentiles: Sequence[float],
    voxels_sha256: str,
    outline: str,
    place: SessionPlace | None,
    acquisition: Mapping[str, object],
) -> AcceptedRow:
    """Return the row of an accepted volume, in a shard without a name yet.

    Args:
        key: Key of the volume's record, or of the volume in its session's record.
        source: Published name of the file.
        num_bytes: Published size of the file.
        modified: Published state of the file.
        subject: Published name of the subject.
        volume: The volume.
        axis: Axis across its planes.
        percentiles: From `percentile_table`.
        voxels_sha256: Digest of the acquired voxels.
        outline: From `likeness.outline`.
        place: Place in the record of its session; None: the volume is a record.
        acquisition: Tags of its sidecar that the corpus publishes.
    """
    in_session = {} if place is None else {name: value for name, value in asdict(place).items() if value is not None}
    values: dict[str, object] = {
        "key": key,
        "source": source,
        "num_bytes": num_bytes,
        "modified": modified,
        "subject": subject,
        "status": "accepted",
        "reason": "accepted",
        "message": "",
        "copy_of": None,
        "num_samples": volume.data.shape[axis] * volume.data.shape[3],
        "shape": list(volume.data.shape),
        "spacing_mm": list(volume.spacing_mm),
        "dtype": volume.data.dtype.name,
        "percentiles": list(percentiles),
        "voxels_sha256": voxels_sha256,
        "shard": "",
        "notes": list(volume.notes),
        "outline": outline,
        **in_session,
        **_describe_scanner(acquisition),
    }
    return checked(_ACCEPTED, values, where=f"the ledger row of {source}:", error=DataError)


def _describe_scanner(tags: Mapping[str, object]) -> dict[str, object]:
    words = [str(tags[tag]) for tag in ("Manufacturer", "ManufacturersModelName") if tags.get(tag)]
    found: dict[str, object] = {"scanner": " ".join(words)} if words else {}
    strength = tags.get("MagneticFieldStrength")
    if isinstance(strength, int | float) and 0 < strength < _MAX_FIELD_STRENGTH_T:
        found["field_strength_t"] = float(strength)
    return found


def ledger_bytes(rows: Iterable[LedgerRow]) -> bytes:
    """Serialise a ledger: one JSON object per line, sorted by key. Equal rows give equal bytes."""
    ordered = sorted(rows, key=lambda row: (row.key, row.source))
    return b"".join(json.dumps(row.to_json(), sort_keys=True, allow_nan=False).encode() + b"\n" for row in ordered)


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
        rows.append(parse_row(row, where=f"{name}, line {number}:"))
    return rows


def parse_row(value: object, *, where: str) -> LedgerRow:
    """Validate the row of a ledger; that of an accepted scan is an `AcceptedRow`.

    Raises:
        DataError: if it is not a row; names the field and the rule.
    """
    row = checked(_ROW, value, where=where, error=DataError)
    return checked(_ACCEPTED, value, where=where, error=DataError) if row.status == "accepted" else row


def count_reasons(rows: Iterable[LedgerRow]) -> dict[str, int]:
    """Count rows by reason."""
    return dict(sorted(Counter(row.reason for row in rows).items()))


def is_accepted(row: LedgerRow) -> TypeGuard[AcceptedRow]:
    """Return whether a row's scan is in the corpus."""
    return isinstance(row, AcceptedRow)


def is_failure(row: LedgerRow) -> bool:
    """Return whether a row's scan was refused as unusable; copies of good scans and label maps do not count."""
    return row.status == "refused" and row.reason not in ("duplicate", "cross_subject_copy", LABEL_MAP)
