"""The index of a shard: a row for each volume, with the offset and checksum of each of its chunks.

A record has one volume, or one for each contrast of a session, all on one grid. The rows of a record follow one another and
have its key; each names its contrast. An index is untrusted input: no byte of a tar is read for a row that breaks a rule.
"""

import hashlib
import math
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from p2r.config import PERCENTILES
from p2r.data.foreground import is_foreground
from p2r.data.header import is_physical
from p2r.data.preparation import is_percentile_table
from p2r.documents import read_json, read_lines, read_start
from p2r.errors import DataError

Box = tuple[slice, slice, slice]

DTYPES = ("|i1", "|u1", "<i2", "<u2", "<f4")
"""Data types that a volume may have."""

MAX_INDEX_BYTES = 1 << 28
"""Largest index that is read."""

_MAX_CHUNK_BYTES = 1 << 28  # limits the memory that a damaged or hostile index can request
_MAX_JSON_BYTES = 1 << 26
_MAX_AXIS = 1 << 20
_MAX_OFFSET = 1 << 50
_MAX_KEY = 1024
_CONTRAST = re.compile(r"[a-z0-9_]{1,64}")
_COVERAGE_ROUNDING = 1e-4  # of half the extent
_OPTIONAL = ("contrast", "coverage", "foreground")
_PARSE_ERRORS = (AttributeError, KeyError, ValueError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class IndexRow:
    """Index entry of one volume of a shard; offsets count from the start of the tar."""

    key: str
    subject: str
    offset: int
    size: int
    crc32: int
    shape: tuple[int, int, int, int]
    dtype: str
    slice_axis: int
    spacing_mm: tuple[float, float, float]
    percentiles: tuple[float, ...]
    is_compressed: bool
    chunk_shape: tuple[int, int, int]
    chunk_offsets: tuple[int, ...]
    chunk_crc32: tuple[int, ...]
    contrast: str | None = None
    """Name of the volume's contrast in its session; None: the record has one volume without a name."""
    coverage: tuple[float, ...] | None = None
    """(3 * 4): affine from a voxel X, Y, Z to three numbers that are in [-1, 1] inside the scan as acquired. None: all voxels are."""
    foreground: str | None = None
    """From `p2r.data.foreground`; None: not known, as in corpora of planes."""

    @cached_property
    def stored_shape(self) -> tuple[int, int, int, int]:
        """(T, P, h, w)."""
        rows, columns = (self.shape[axis] for axis in range(3) if axis != self.slice_axis)
        return (self.shape[3], self.shape[self.slice_axis], rows, columns)

    @property
    def whole(self) -> Box:
        """Box with all voxels of one frame."""
        _, planes, rows, columns = self.stored_shape
        return (slice(0, planes), slice(0, rows), slice(0, columns))

    @property
    def num_planes(self) -> int:
        """Number of slices over all frames: the samples in this record."""
        return self.shape[3] * self.shape[self.slice_axis]

    @cached_property
    def plane_grid(self) -> tuple[Any, ...]:
        """Key that is equal for records whose slices can be stacked in one array and resampled together."""
        return (self.stored_shape[2:], self.dtype, self.slice_axis, self.spacing_mm, self.coverage is None)

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Number of chunks along slices, rows and columns of one frame."""
        planes, rows, columns = (
            math.ceil(n / chunk) for n, chunk in zip(self.stored_shape[1:], self.chunk_shape, strict=True)
        )
        return (planes, rows, columns)


def covered_box(row: IndexRow, box: Box) -> NDArray[np.bool_]:
    """Return the voxels of a box of slices, rows and columns that are inside the scan as acquired."""
    if row.coverage is None:
        return np.ones([part.stop - part.start for part in box], dtype=np.bool_)
    coverage = np.reshape(row.coverage, (3, 4))
    stored = [row.slice_axis, *(axis for axis in range(3) if axis != row.slice_axis), 3]
    return covered_voxels(coverage[:, stored], box)


def covered_voxels(coverage: NDArray[np.float64], box: Box) -> NDArray[np.bool_]:
    """Return the voxels of a box at which a coverage (3, 4), along the axes of the box, gives numbers in [-1, 1]."""
    covered = np.ones([part.stop - part.start for part in box], dtype=np.bool_)
    x, y, z = np.ogrid[box]
    for a, b, c, d in coverage:
        covered &= np.abs(a * x + b * y + c * z + d) <= 1 + _COVERAGE_ROUNDING
    return covered


def index_name(tar_name: str) -> str:
    """Return the name of the index beside a tar."""
    return tar_name.removesuffix(".tar") + ".idx"


def index_shard(path: Path) -> list[IndexRow]:
    """Rebuild the index of a tar from the tar itself.

    Raises:
        DataError: if it is not a tar, or its members are not pairs written by `write_shard`.
    """
    rows = []
    num_bytes = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            stem, described, voxels = "", None, None
            for member in tar:
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None or member.offset_data + member.size > num_bytes:
                    raise ValueError(f"member {member.name!r} is not a complete file")
                if described is None and voxels is None:
                    stem = member.name.rpartition(".")[0]
                if member.name == f"{stem}.json" and described is None and member.size <= _MAX_JSON_BYTES:
                    text = content.read(member.size)
                    described = read_json(text, where=member.name, max_bytes=_MAX_JSON_BYTES, error=DataError)
                elif member.name in (f"{stem}.planes", f"{stem}.blocks", f"{stem}.npy") and voxels is None:
                    voxels = {"offset": member.offset_data, "size": member.size, "checksum": _file_crc32(content)}
                else:
                    raise ValueError(f"member {member.name!r} is not at its position in a record")
                if described is not None and voxels is not None:
                    row = check_row(make_row(described, **voxels), num_bytes=num_bytes)
                    if (row.contrast or "") != stem.partition(".")[2]:
                        raise ValueError(f"member {member.name!r} is not named by its contrast, {row.contrast}")
                    rows.append(row)
                    described, voxels = None, None
            if described is not None or voxels is not None:
                raise ValueError(f"record {stem} is incomplete")
        records_of(rows)
    except (tarfile.TarError, EOFError, DataError, *_PARSE_ERRORS) as error:
        raise DataError(f"{path}: not a shard, or damaged: {error}") from error
    return rows


def read_index(path: Path, *, sha256: str | None = None, num_bytes: int | None = None) -> list[IndexRow]:
    """Read an `.idx` file: one JSON object per record.

    Args:
        path: The index.
        sha256: Expected digest.
        num_bytes: Size of the tar, an upper bound of all offsets.

    Raises:
        DataError: if the digest differs, or a line cannot be parsed.
    """
    try:
        content = read_start(path, max_bytes=MAX_INDEX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: the index cannot be read: {error}") from error
    return parse_index(content, name=str(path), sha256=sha256, num_bytes=num_bytes)


def parse_index(
    content: bytes, *, name: str, sha256: str | None = None, num_bytes: int | None = None
) -> list[IndexRow]:
    """Parse the bytes of an index, with the rules of `read_index`."""
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(
            f"{name}: the index is damaged (its SHA-256 differs from the manifest); ingest this corpus again"
        )
    rows = []
    lines = read_lines(
        content, where=name, max_bytes=MAX_INDEX_BYTES, max_line_bytes=_MAX_JSON_BYTES, max_depth=4, error=DataError
    )
    for number, described in lines:
        try:
            rows.append(check_row(IndexRow(**_lists_to_tuples(described)), num_bytes=num_bytes))
        except DataError as error:
            raise DataError(f"{name}, line {number}: {error}") from None
        except _PARSE_ERRORS as error:
            raise DataError(f"{name}, line {number}: the index cannot be parsed: {error}") from error
    try:
        records_of(rows)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return rows


def records_of(rows: Sequence[IndexRow]) -> list[tuple[IndexRow, ...]]:
    """Group the rows of an index by record.

    Raises:
        DataError: if a record is listed twice, or its volumes do not fit together.
    """
    records = [tuple(volumes) for _, volumes in groupby(rows, key=lambda row: row.key)]
    if len({record[0].key for record in records}) < len(records):
        raise DataError("the index lists a record twice")
    for record in records:
        if len(record) == 1:
            continue
        names = [row.contrast for row in record]
        if None in names or len(set(names)) < len(names):
            raise DataError(f"the index lists a record twice, or a contrast of it: {record[0].key[:80]!r}")
        if len({(row.subject, row.shape, row.slice_axis, row.spacing_mm, row.chunk_shape) for row in record}) > 1:
            raise DataError(f"the contrasts of record {record[0].key[:80]!r} are not on one grid")
    return records


def make_row(described: Mapping[str, Any], *, offset: int, size: int, checksum: int) -> IndexRow:
    """Return the row of a volume from its `.json` member, and the position of its voxel member in the tar."""
    names = {field.name for field in fields(IndexRow)} - {"offset", "size", "crc32"}
    names -= {name for name in _OPTIONAL if name not in described}
    values = _lists_to_tuples({name: described[name] for name in names})
    values["chunk_offsets"] = tuple(offset + int(start) for start in values["chunk_offsets"])
    return IndexRow(offset=offset, size=size, crc32=checksum, **values)


def _file_crc32(file: IO[bytes]) -> int:
    checksum = 0
    while part := file.read(1 << 20):
        checksum = crc32(part, checksum)
    return checksum


def row_as_dict(row: IndexRow) -> dict[str, Any]:
    """Return the fields of a row as in an `.idx` file; optional ones only if they have a value."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value for name, value in values.items() if value is not None or name not in _OPTIONAL}


def _lists_to_tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


def check_row(row: IndexRow, *, num_bytes: int | None) -> IndexRow:
    """Refuse a row that `write_shard` cannot have written, before anything is allocated or read for it.

    Raises:
        DataError: if the row breaks a rule; names the record and the rule.
    """
    for is_valid, rule in chain(_rules_of_volume(row), _rules_of_chunks(row, num_bytes)):
        if not is_valid:
            raise DataError(f"record {str(row.key)[:80]!r} of an index breaks a rule: {rule}")
    return row


def _rules_of_volume(row: IndexRow) -> Iterator[tuple[bool, str]]:
    """Yield whether a row keeps each rule about numbers, names and the volume, and the rule. Each relies on those before it."""
    whole = (row.offset, row.size, *row.shape, *row.chunk_shape, *row.chunk_offsets, *row.chunk_crc32)
    yield (
        all(type(value) is int and 0 <= value <= _MAX_OFFSET for value in whole),
        "offsets, sizes and shapes are whole numbers up to 2**50",
    )
    yield (
        all(isinstance(text, str) and len(text) <= _MAX_KEY for text in (row.key, row.subject)),
        f"key and subject are texts of up to {_MAX_KEY} characters",
    )
    yield (
        len(row.shape) == 4 and min(row.shape) >= 1 and max(row.shape) <= _MAX_AXIS,
        f"shape has four axes of 1 to {_MAX_AXIS:,} voxels",
    )
    yield type(row.slice_axis) is int and row.slice_axis in (0, 1, 2), "slice_axis is 0, 1 or 2"
    yield row.dtype in DTYPES, f"dtype is one of {', '.join(DTYPES)}"
    yield _are_finite(row.spacing_mm, row.percentiles), "spacing and percentiles are finite"
    yield (
        len(row.spacing_mm) == 3 and is_physical(row.shape, row.spacing_mm),
        f"spacing_mm has three values that are plausible for a scan, got {list(row.spacing_mm)[:4]}",
    )
    yield (
        is_percentile_table(row.percentiles),
        f"percentiles has {len(PERCENTILES)} values that never decrease, span a range and fit 32 bits",
    )
    yield isinstance(row.is_compressed, bool), "is_compressed is true or false"
    yield (
        row.contrast is None or (isinstance(row.contrast, str) and _CONTRAST.fullmatch(row.contrast) is not None),
        "contrast is a name of a to z, 0 to 9 and _",
    )
    yield row.coverage is None or _is_coverage(row.coverage), "coverage has 12 numbers"
    yield row.foreground is None or is_foreground(row.foreground), "foreground has 512 bits in base64"


def _rules_of_chunks(row: IndexRow, num_bytes: int | None) -> Iterator[tuple[bool, str]]:
    """Yield the rules about chunks, for a row that keeps those of its volume."""
    yield len(row.chunk_shape) == 3 and min(row.chunk_shape) >= 1, "chunk_shape has three positive axes"
    yield math.prod(row.chunk_shape) * np.dtype(row.dtype).itemsize <= _MAX_CHUNK_BYTES, "a chunk has at most 256 MiB"
    num_chunks = math.prod(row.grid) * row.shape[3]
    yield len(row.chunk_crc32) == num_chunks and len(row.chunk_offsets) == num_chunks + 1, "chunks fill the shape"
    yield list(row.chunk_offsets) == sorted(row.chunk_offsets), "chunks follow one another"
    yield (
        row.offset <= row.chunk_offsets[0] and row.chunk_offsets[-1] <= row.offset + row.size,
        "chunks are inside their member",
    )
    yield num_bytes is None or row.offset + row.size <= num_bytes, "members are inside the tar"


def _are_finite(*values: Sequence[float]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in chain(*values))


def _is_coverage(coverage: object) -> bool:
    return (
        isinstance(coverage, tuple)
        and len(coverage) == 12
        and all(type(value) in (int, float) and abs(value) < 1e9 for value in coverage)
    )
