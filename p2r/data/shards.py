"""Volumes -> one WebDataset tar and its index; and single planes back out of it, each checked before it is decoded.

A record is one volume, as two members of a plain tar: `<key>.json` describes it, `<key>.planes` is its planes, each
compressed by itself (blosc2: lz4 after byte shuffle, 27,000 planes of 256 x 256 decoded per second and core, against
1,200 for deflate). So any WebDataset reader gets whole volumes, and p2r reads one plane with one `pread`.

Stock readers lose data in silence where a tar is cut or a bit flips. The index holds a CRC-32 for every plane, the
manifest the digest of the tar and of the index: p2r reads nothing that neither covers.

Shapes: X, Y, Z, T as in `volume`; P = T * Z' planes of (H, W), frame-major, cut across `slice_axis`.
"""

import hashlib
import json
import math
import os
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter

from p2r.data.preprocess import planes_to_volume, volume_to_planes
from p2r.data.volume import Volume
from p2r.errors import DataError
from p2r.storage import file_sha256

Array = NDArray[Any]

_BLOCK_BYTES = 1 << 15  # fixed, so that no machine chooses it by its own cache: equal records, equal bytes


@dataclass(frozen=True)
class IndexRow:
    """One record of a shard, as its index describes it; offsets count from the start of the tar."""

    key: str
    subject: str
    offset: int
    size: int
    crc32: int
    shape: tuple[int, int, int, int]
    dtype: str
    slice_axis: int
    spacing_mm: tuple[float, float, float]
    window: tuple[float, float]
    plane_offsets: tuple[int, ...]
    plane_crc32: tuple[int, ...]

    @property
    def num_planes(self) -> int:
        """P, the samples in this record."""
        return len(self.plane_crc32)

    @property
    def plane_shape(self) -> tuple[int, int]:
        """(H, W)."""
        rows, columns = (self.shape[axis] for axis in range(3) if axis != self.slice_axis)
        return (rows, columns)


def encode_record(volume: Volume, meta: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Compress a volume.

    Args:
        volume: The scan.
        meta: At least `key`, `slice_axis`, `window`; all of it is kept.

    Returns:
        The `.planes` member, and the content of the `.json` member.
    """
    data = volume.data.astype(volume.data.dtype.newbyteorder("<"), copy=False)
    planes = volume_to_planes(data, meta["slice_axis"])
    chunks = [_compress(plane) for plane in planes]
    described = {
        **meta,
        "shape": list(data.shape),
        "dtype": data.dtype.str,
        "spacing_mm": list(volume.spacing_mm),
        "affine": volume.affine.tolist(),
        "source_affine": volume.source_affine.tolist(),
        "source_shape": list(volume.source_shape),
        "plane_offsets": list(accumulate((len(chunk) for chunk in chunks), initial=0)),
        "plane_crc32": [zlib.crc32(chunk) for chunk in chunks],
    }
    return b"".join(chunks), described


def decode_record(planes: bytes, meta: Mapping[str, Any]) -> Array:
    """Give back the (X, Y, Z, T) voxels of the two members of a record, as any reader could without p2r.

    Raises:
        DataError: A plane does not have the checksum that the record states.
    """
    raw = []
    for number, (start, stop) in enumerate(pairwise(meta["plane_offsets"])):
        if zlib.crc32(planes[start:stop]) != meta["plane_crc32"][number]:
            raise DataError(f"record {meta['key']}: plane {number} is damaged (its CRC-32 differs)")
        raw.append(np.frombuffer(blosc2.decompress2(planes[start:stop], nthreads=1), meta["dtype"]))
    shape = [n for axis, n in enumerate(meta["shape"][:3]) if axis != meta["slice_axis"]]
    return planes_to_volume(np.stack(raw).reshape(-1, *shape), meta["slice_axis"], meta["shape"][3])


def voxels_sha256(volume: Volume) -> str:
    """Digest of the voxel values: the same for a copy that was zipped again, or has another header or dtype."""
    digest = hashlib.sha256(repr(volume.data.shape).encode())
    digest.update(np.ascontiguousarray(volume.data, dtype="<f4").data)  # exact for all dtypes that a Volume has
    return digest.hexdigest()


def write_shard(path: Path, records: Iterable[tuple[Volume, Mapping[str, Any]]]) -> dict[str, Any]:
    """Write `<path>` (a `.tar`) and its `.idx` beside it, each whole or not at all; equal records give equal bytes.

    Args:
        path: The tar; its folder must exist.
        records: Volumes with their meta: `key` (unique, of letters, digits, `-` and `_`), `subject`, `cohort`,
            `slice_axis`, `window` (low, high), and what else is worth keeping, such as `source` and `licence`.

    Returns:
        The shard's entry in the manifest.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        tar, index = Path(folder, path.name), Path(folder, _index_name(path.name))
        # GNU's format takes names beyond 100 bytes and members beyond 8 GiB, and every tar reader knows it.
        with (
            tar.open("wb") as file,
            TarWriter(file, encoder=False, compress=False, mtime=0, format="GNU_FORMAT") as writer,
        ):
            for volume, meta in records:
                planes, described = encode_record(volume, meta)
                if not str(meta["key"]).replace("-", "").replace("_", "").isalnum():
                    raise ValueError(f"key {meta['key']!r} must consist of letters, digits, '-' and '_'")
                text = json.dumps(described, sort_keys=True, allow_nan=False)
                writer.write({"__key__": meta["key"], "json": text.encode(), "planes": planes})
        rows = index_shard(tar)
        index.write_text("".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows))
        entry = {
            "name": path.name,
            "num_records": len(rows),
            "num_samples": sum(row.num_planes for row in rows),
            "num_bytes": tar.stat().st_size,
            "sha256": file_sha256(tar),
            "index_sha256": file_sha256(index),
        }
        index.replace(path.with_suffix(".idx"))
        tar.replace(path)
    return entry


def index_shard(path: Path) -> list[IndexRow]:
    """Make the index of a tar from the tar alone."""
    rows = []
    with tarfile.open(path, "r:") as tar:
        described: dict[str, Any] = {}
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None  # shards hold regular files only
            if member.name.endswith(".json"):
                described = json.load(content)
                continue
            rows.append(
                IndexRow(
                    key=described["key"],
                    subject=described["subject"],
                    offset=member.offset_data,
                    size=member.size,
                    crc32=zlib.crc32(content.read()),
                    shape=tuple(described["shape"]),
                    dtype=described["dtype"],
                    slice_axis=described["slice_axis"],
                    spacing_mm=tuple(described["spacing_mm"]),
                    window=tuple(described["window"]),
                    plane_offsets=tuple(member.offset_data + offset for offset in described["plane_offsets"]),
                    plane_crc32=tuple(described["plane_crc32"]),
                )
            )
    return rows


def read_index(path: Path, *, sha256: str | None = None) -> list[IndexRow]:
    """Read an `.idx` file: one JSON object per record.

    Raises:
        DataError: It is not what was written: another digest, or lines that do not parse.
    """
    content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: the index is damaged (its SHA-256 is not the manifest's); ingest this corpus again")
    try:
        return [_row_from(json.loads(line)) for line in content.decode().splitlines()]
    except (AttributeError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{path}: the index cannot be parsed: {error}") from error


class ShardReader:
    """Single planes of one local shard. Safe to share between threads; closed when nobody holds it any more.

    Args:
        tar: The shard.
        index: Its rows, from `read_index`.
    """

    def __init__(self, tar: Path, index: list[IndexRow]) -> None:
        self._tar = tar
        self._rows = index
        self._ends = np.cumsum([row.num_planes for row in index], dtype=np.int64)
        self._file = os.open(tar, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    @property
    def num_samples(self) -> int:
        """Planes in this shard."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, sample: int) -> tuple[IndexRow, int]:
        """Record and number of the plane in it, for sample 0 to `num_samples` - 1 of the shard."""
        if not 0 <= sample < self.num_samples:
            raise ValueError(f"{self._tar.name} has {self.num_samples} samples, asked for number {sample}")
        record = int(np.searchsorted(self._ends, sample, side="right"))
        return self._rows[record], sample - (int(self._ends[record - 1]) if record else 0)

    def read_plane(self, sample: int) -> Array:
        """Read, check and decode one plane, (H, W) in the dtype of its scan.

        Raises:
            DataError: The bytes are not those that were written; names shard, key and plane.
        """
        row, plane = self.locate(sample)
        start, stop = row.plane_offsets[plane], row.plane_offsets[plane + 1]
        content = os.pread(self._file, stop - start, start)
        if len(content) != stop - start or zlib.crc32(content) != row.plane_crc32[plane]:
            raise DataError(
                f"shard {self._tar}: plane {plane} of {row.key} is damaged (bytes {start} to {stop} lack the CRC-32 "
                "of the index); restore the file or ingest this corpus again"
            )
        decoded: Array = np.empty(row.plane_shape, row.dtype)
        blosc2.decompress2(content, dst=decoded, nthreads=1)
        return decoded


def _index_name(tar_name: str) -> str:
    return tar_name.removesuffix(".tar") + ".idx"


def _compress(plane: Array) -> bytes:
    compressed: bytes = blosc2.compress2(
        plane,
        codec=blosc2.Codec.LZ4,
        clevel=5,
        filters=[blosc2.Filter.SHUFFLE],
        typesize=plane.dtype.itemsize,
        blocksize=min(_BLOCK_BYTES, max(plane.nbytes, plane.dtype.itemsize)),
        nthreads=1,
    )
    return compressed


def _row_from(value: dict[str, Any]) -> IndexRow:
    fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    row = IndexRow(**fields)
    if len(row.plane_offsets) != row.num_planes + 1 or row.num_planes != row.shape[3] * row.shape[row.slice_axis]:
        raise ValueError(f"record {row.key}: {len(row.plane_crc32)} planes do not fit shape {row.shape}")
    if math.prod(row.shape) < 1:
        raise ValueError(f"record {row.key}: shape {row.shape} is empty")
    return row
