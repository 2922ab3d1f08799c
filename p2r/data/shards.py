"""Volumes -> one WebDataset tar and its index; and slices or boxes read back from it, each checked before decoding.

A record is one volume, stored as two members of a plain tar: `<key>.json` with metadata, and the voxels, in chunks that are
compressed separately. So any WebDataset reader gets whole volumes, and p2r reads one chunk with one `pread` or one range
request. A record of a session has these two members for each contrast, `<key>.<contrast>.json` and its voxels, all on one
grid; a missing contrast has none. Three layouts, named by the member's extension:

- `.planes`: a chunk is a slice; for 2D training.
- `.blocks`: a chunk is a cube of 16, 24 or 32 voxels; for 3D patches, which read a fraction of the bytes of `.planes`.
- `.npy`: all slices, uncompressed, in numpy's format. Any reader decodes it without p2r; a chunk is a slice.

Chunks are blosc2: lz4 after byte shuffle (20,000 slices of 256 x 256 per second and core; about the size of `.nii.gz`), or
zstd after bit shuffle (a fifth smaller, three times slower). Stock readers lose data silently when a tar is truncated or a
bit flips. So the index holds a CRC-32 of every chunk, and the manifest holds the digests of the tar and the index: p2r reads
no byte without one of these checks.

Shapes: (X, Y, Z, T) as in `volume`; stored as (T, P, h, w): frames of slices perpendicular to `slice_axis`. Sample n of a
shard is its n-th slice, frame by frame.
"""

import json
import math
import os
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import blosc2
import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from p2r.data.index import MAX_INDEX_BYTES as MAX_INDEX_BYTES
from p2r.data.index import Box as Box
from p2r.data.index import IndexRow as IndexRow
from p2r.data.index import check_row, make_row, records_of, row_as_dict
from p2r.data.index import index_name as index_name
from p2r.data.index import index_shard as index_shard
from p2r.data.index import parse_index as parse_index
from p2r.data.index import read_index as read_index
from p2r.data.manifest import Shard
from p2r.data.preparation import planes_to_volume, volume_to_planes
from p2r.data.volume import Volume
from p2r.data.volume import voxels_sha256 as voxels_sha256
from p2r.errors import DataError
from p2r.storage import file_sha256

Array = NDArray[Any]
Record = Literal["planes", "blocks", "npy"]
Codec = Literal["lz4", "zstd"]
ReadRange = Callable[[int, int], bytes]

_BLOCK_SIZE = 32
_COMPRESSION = {
    "lz4": (blosc2.Codec.LZ4, 5, blosc2.Filter.SHUFFLE),
    "zstd": (blosc2.Codec.ZSTD, 1, blosc2.Filter.BITSHUFFLE),
}
blosc2.set_releasegil(True)  # otherwise a decoding thread would block the training thread for each chunk

_SPLIT_BYTES = (
    1 << 15
)  # fixed, because blosc2 would choose it by the machine's cache: equal records must give equal bytes


def encode_record(
    volume: Volume,
    meta: Mapping[str, Any],
    *,
    record: Record = "planes",
    codec: Codec = "lz4",
    block_size: int = _BLOCK_SIZE,
) -> tuple[bytes, dict[str, Any]]:
    """Lay out and compress a volume.

    Args:
        volume: The scan.
        meta: Metadata with at least `key`, `slice_axis` and `percentiles`; all of it is stored.
        record: Layout.
        codec: Compression; not used for `npy`.
        block_size: Edge of the cubes of `blocks`, voxels.

    Returns:
        The bytes of the voxel member, and the content of the `.json` member.
    """
    data = volume.data.astype(volume.data.dtype.newbyteorder("<"), copy=False)
    planes = volume_to_planes(data, meta["slice_axis"])
    stored = planes.reshape(data.shape[3], -1, *planes.shape[1:])  # (T, P, h, w)
    chunk_shape = (1, *stored.shape[2:])
    if record == "blocks":
        chunk_shape = (min(block_size, stored.shape[1]), block_size, block_size)
    described = {
        **meta,
        "shape": list(data.shape),
        "stored_shape": list(stored.shape),
        "dtype": data.dtype.str,
        "spacing_mm": list(volume.spacing_mm),
        "affine": volume.affine.tolist(),
        "source_affine": volume.source_affine.tolist(),
        "source_shape": list(volume.source_shape),
        "is_compressed": record != "npy",
        "chunk_shape": list(chunk_shape),
    }
    if record == "npy":
        file = BytesIO()
        np.save(file, stored, allow_pickle=False)
        content = file.getvalue()
        sizes = [planes[0].nbytes] * len(planes)
        start = len(content) - sum(sizes)
    else:
        chunks = [_compress_chunk(chunk, codec) for frame in stored for chunk in _cut_chunks(frame, chunk_shape)]
        content, sizes, start = b"".join(chunks), [len(chunk) for chunk in chunks], 0
    offsets = list(accumulate(sizes, initial=start))
    checksums = [crc32(content[begin:end]) for begin, end in pairwise(offsets)]
    return content, {**described, "chunk_offsets": offsets, "chunk_crc32": checksums}


def decode_record(content: bytes, meta: Mapping[str, Any]) -> Array:
    """Decode the two members of a record of any layout to (X, Y, Z, T) voxels, for readers that get whole records.

    Raises:
        DataError: if a chunk does not have its checksum in the metadata, or the two members do not fit each other.
    """
    row = check_row(make_row(meta, offset=0, size=len(content), checksum=0), num_bytes=len(content))
    reader = ShardReader(f"of record {row.key}", [row], lambda start, stop: content[start:stop])
    stored = np.stack([reader.read_box(row, frame, row.whole) for frame in range(row.shape[3])])
    return planes_to_volume(stored.reshape(-1, *stored.shape[2:]), row.slice_axis, len(stored))


def write_shard(
    path: Path,
    records: Iterable[tuple[Volume, Mapping[str, object]]],
    *,
    record: Record = "planes",
    codec: Codec = "lz4",
    block_size: int = _BLOCK_SIZE,
) -> Shard:
    """Write `<path>` (a `.tar`) and its `.idx` beside it, each atomically; equal records give equal bytes.

    Args:
        path: The tar; its folder must exist.
        records: Volumes with metadata: `key` (unique, of letters, digits, `-` and `_`), `subject`, `cohort`,
            `slice_axis`, `percentiles` (from `percentile_table`), and any other fields to store. Volumes of one session follow
            one another, with the same key and grid, and a `contrast` each.
        record: Layout of the voxels.
        codec: Compression of the voxels.
        block_size: Edge of the cubes of `blocks`, voxels.

    Returns:
        The shard's entry in the manifest.
    """
    from webdataset import TarWriter  # imported here: it imports torch, which readers do not need

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        tar, index = Path(folder, path.name), Path(folder, index_name(path.name))
        # GNU's format allows names beyond 100 bytes and members beyond 8 GiB, and every tar reader supports it.
        with (
            tar.open("wb") as file,
            TarWriter(file, encoder=False, compress=False, mtime=0, format="GNU_FORMAT") as writer,
        ):
            for volume, meta in records:
                if not str(meta["key"]).replace("-", "").replace("_", "").isalnum():
                    raise ValueError(f"key {meta['key']!r} must consist of letters, digits, '-' and '_'")
                voxels, described = encode_record(volume, meta, record=record, codec=codec, block_size=block_size)
                text = json.dumps(described, sort_keys=True, allow_nan=False)
                prefix = f"{meta['contrast']}." if meta.get("contrast") else ""
                writer.write({"__key__": meta["key"], f"{prefix}json": text.encode(), f"{prefix}{record}": voxels})
        rows = index_shard(tar)
        index.write_text("".join(json.dumps(row_as_dict(row), sort_keys=True) + "\n" for row in rows))
        entry = Shard(
            name=path.name,
            **count_records(rows),
            num_bytes=tar.stat().st_size,
            sha256=file_sha256(tar),
            index_sha256=file_sha256(index),
        )
        index.replace(path.with_suffix(".idx"))
        tar.replace(path)
    return entry


class ShardReader:
    """Reader of slices and boxes of one shard. Thread-safe.

    A sample is a slice of a record. A record with several contrasts is located by its first volume; `volumes` has all of them.

    Args:
        name: Name of the tar, for messages.
        index: Rows of its index, from `read_index`.
        read: Returns the bytes between two offsets, of a local file (`local_ranges`) or of an object in a bucket.
    """

    def __init__(self, name: str, index: list[IndexRow], read: ReadRange) -> None:
        self.name = name
        records = records_of(index)
        self.records = tuple(record[0] for record in records)
        self._volumes = {record[0].key: record for record in records if len(record) > 1}
        self._read = read
        self._ends = list(accumulate(row.num_planes for row in self.records))
        self.num_records, self.num_samples = len(records), self._ends[-1] if self._ends else 0
        self._volume_ends = list(accumulate(row.shape[3] for row in self.records))
        self.num_volumes = self._volume_ends[-1] if self._volume_ends else 0

    def locate(self, sample: int) -> tuple[IndexRow, int]:
        """Return the record of a sample (0 to `num_samples` - 1), and the index of its slice in the record."""
        if not 0 <= sample < self.num_samples:
            raise ValueError(f"{self.name} has {self.num_samples} samples, got number {sample}")
        record = bisect_right(self._ends, sample)
        return self.records[record], sample - (self._ends[record - 1] if record else 0)

    def locate_volume(self, number: int) -> tuple[IndexRow, int]:
        """Return the record and the frame of a volume (0 to `num_volumes` - 1)."""
        record = bisect_right(self._volume_ends, number)
        if number < 0 or record == len(self.records):
            raise ValueError(f"{self.name} has no volume number {number}")
        return self.records[record], number - (self._volume_ends[record - 1] if record else 0)

    def volumes(self, row: IndexRow) -> tuple[IndexRow, ...]:
        """Return the volumes of a record, one for each of its contrasts, given any of them."""
        return self._volumes.get(row.key, (row,))

    def of_records(self, is_chosen: Callable[[str], bool], *, contrast: str | None) -> "ShardReader":
        """Return a reader of some records of this shard.

        Args:
            is_chosen: Called with the key of each record.
            contrast: Name of the contrast of records that do not state it.
        """
        rows = [volume for row in self.records if is_chosen(row.key) for volume in self.volumes(row)]
        if contrast is not None:
            rows = [replace(row, contrast=row.contrast or contrast) for row in rows]
        return ShardReader(self.name, rows, self._read)

    def read_plane(self, sample: int, out: Array | None = None) -> Array:
        """Read, check and decode one slice of the first contrast, (h, w) in the dtype of its scan.

        Args:
            sample: Sample number, 0 to `num_samples` - 1.
            out: Output array; None: a new array.

        Raises:
            DataError: if the bytes are damaged; names shard, key and chunk.
        """
        row, number = self.locate(sample)
        target: Array = np.empty(row.stored_shape[2:], row.dtype) if out is None else out
        self.read_located(row, number, target)
        return target

    def read_located(self, row: IndexRow, number: int, out: Array) -> None:
        """Read, check and decode the slice that `locate` returned, into `out`."""
        if row.chunk_shape[0] == 1:  # each slice is a chunk
            offsets = row.chunk_offsets
            try:
                _decode_chunk(row, number, self._read(offsets[number], offsets[number + 1]), out)
            except _Damage as damage:
                raise self._name_damage(damage) from None
        else:
            frame, plane = divmod(number, row.stored_shape[1])
            self.read_box(row, frame, (slice(plane, plane + 1), *row.whole[1:]), out[None])

    def read_box(self, row: IndexRow, frame: int, box: Box, out: Array | None = None) -> Array:
        """Read, check and decode a box of one frame: slices, rows and columns in stored order, each from start to stop.

        Raises:
            DataError: as `read_plane`.
        """
        target = np.empty([part.stop - part.start for part in box], row.dtype) if out is None else out
        try:
            _read_box(row, frame, box, target, self._read)
        except _Damage as damage:
            raise self._name_damage(damage) from None
        return target

    def _name_damage(self, damage: "_Damage") -> DataError:
        return DataError(f"shard {self.name}: {damage}; restore the file or ingest these scans again")


def count_records(rows: Sequence[IndexRow]) -> dict[str, int]:
    """Return the counts of a shard in its manifest entry: records, and the slices and volumes (frames) of one contrast of each."""
    first = [record[0] for record in records_of(rows)]
    return {
        "num_records": len(first),
        "num_samples": sum(row.num_planes for row in first),
        "num_volumes": sum(row.shape[3] for row in first),
    }


def open_shard(tar: Path, *, index: Path | None = None) -> ShardReader:
    """Open a local shard with the index beside it, or with another one.

    Raises:
        DataError: if the index is absent, or does not belong to this tar.
    """
    rows = read_index(tar.with_suffix(".idx") if index is None else index, num_bytes=tar.stat().st_size)
    return ShardReader(str(tar), rows, local_ranges(tar))


def local_ranges(path: Path) -> ReadRange:
    """Return a function that reads ranges of a local file; the file stays open as long as the function exists.

    It uses `pread`, not `mmap`: just as fast, and a file truncated meanwhile gives a short read instead of a bus error.
    """
    file = os.open(path, os.O_RDONLY)

    def read(start: int, stop: int) -> bytes:
        return os.pread(file, stop - start, start)

    weakref.finalize(read, os.close, file)
    return read


class _Damage(Exception):
    """The bytes read differ from the bytes written."""


class _Cut(NamedTuple):
    """Overlap of a box with a row of chunks, along one axis."""

    place: int
    """Index of the chunk along the axis."""
    length: int
    """Voxels of the chunk; fewer at the far edge."""
    source: slice
    """Overlap, counted from the start of the chunk."""
    target: slice
    """Overlap, counted from the start of the box."""


def _cut_axis(part: slice, chunk: int, length: int) -> Iterator[_Cut]:
    """Yield the overlaps of `part` of an axis with its chunks."""
    for place in range(part.start // chunk, math.ceil(part.stop / chunk)):
        start, stop = place * chunk, min((place + 1) * chunk, length)
        first, last = max(start, part.start), min(stop, part.stop)
        yield _Cut(
            place, stop - start, slice(first - start, last - start), slice(first - part.start, last - part.start)
        )


def _read_box(row: IndexRow, frame: int, box: Box, out: Array, read: ReadRange) -> None:
    """Fill `out` with a box of a frame. Neighbouring chunks are read together; each is checked, then decoded."""
    _, num_lines, num_columns = row.grid
    first_of_frame = frame * math.prod(row.grid)
    cuts = {
        first_of_frame + (plane.place * num_lines + line.place) * num_columns + column.place: (plane, line, column)
        for plane, line, column in product(*map(_cut_axis, box, row.chunk_shape, row.stored_shape[1:]))
    }
    for run in _group_runs(cuts):
        start = row.chunk_offsets[run[0]]
        content = memoryview(read(start, row.chunk_offsets[run[-1] + 1]))
        for number in run:
            chunk = content[row.chunk_offsets[number] - start : row.chunk_offsets[number + 1] - start]
            _decode_into_box(row, number, cuts[number], chunk, out)


def _decode_into_box(
    row: IndexRow, number: int, cuts: tuple[_Cut, _Cut, _Cut], content: memoryview, out: Array
) -> None:
    """Decode a chunk into the part of `out` that it covers."""
    plane, line, column = cuts
    shape = (plane.length, line.length, column.length)
    target = out[plane.target, line.target, column.target]
    if target.shape == shape and target.flags.c_contiguous:
        _decode_chunk(row, number, content, target)
        return
    decoded = np.empty(shape, row.dtype)
    _decode_chunk(row, number, content, decoded)
    target[...] = decoded[plane.source, line.source, column.source]


def _decode_chunk(row: IndexRow, number: int, content: bytes | memoryview, out: Array) -> None:
    """Check a chunk, then decode it into `out`, which must have its shape."""
    start, stop = row.chunk_offsets[number], row.chunk_offsets[number + 1]
    if len(content) != stop - start or crc32(content) != row.chunk_crc32[number]:
        raise _Damage(f"chunk {number} of {row.key} is damaged (bytes {start} to {stop} lack the CRC-32 of the index)")
    # A blosc2 chunk has its decoded size at byte 4 of the header.
    size = int.from_bytes(content[4:8], "little") if row.is_compressed else len(content)
    if size != out.nbytes:
        raise _Damage(f"chunk {number} of {row.key} does not decode to its shape {out.shape}")
    if row.is_compressed:
        blosc2.decompress2(content, dst=out, nthreads=1)
    else:
        out[...] = np.frombuffer(content, row.dtype).reshape(out.shape)


def _group_runs(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Group increasing numbers into runs of consecutive ones."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _cut_chunks(frame: Array, chunk_shape: tuple[int, ...]) -> Iterator[Array]:
    starts = (range(0, n, chunk) for n, chunk in zip(frame.shape, chunk_shape, strict=True))
    for place in product(*starts):
        box = tuple(slice(start, start + chunk) for start, chunk in zip(place, chunk_shape, strict=True))
        yield np.ascontiguousarray(frame[box])


def _compress_chunk(chunk: Array, codec: Codec) -> bytes:
    name, level, filter_ = _COMPRESSION[codec]
    compressed: bytes = blosc2.compress2(
        chunk,
        codec=name,
        clevel=level,
        filters=[filter_],
        typesize=chunk.dtype.itemsize,
        blocksize=min(_SPLIT_BYTES, max(chunk.nbytes, chunk.dtype.itemsize)) if codec == "lz4" else chunk.nbytes,
        nthreads=1,
    )
    return compressed
