"""A volume -> a thumbnail of its middle slice, 96 x 96 pixels of 8 bits; and the choice of thumbnails for a report.

Thumbnails are part of a revision, so equal volumes must give equal bytes on every machine: after the intensities are
quantised, all arithmetic is in integers. The scans shown are drawn by a hash of their keys. So a growing corpus keeps most
of its thumbnails, and their number is bounded.

Shapes: h w voxels of a slice; 96 x 96 the thumbnail, rows and columns as in `preprocess`.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2r.data.preparation import plane_spacing, slice_axis
from p2r.data.volume import Volume
from p2r.documents import read_lines
from p2r.errors import DataError

Pixels = NDArray[np.uint8]
Thumbnails = dict[str, Pixels]
"""Thumbnails by key."""

SIZE = 96
MAX_BYTES = 1 << 26
"""Largest file of thumbnails that is read."""
MOST = 48
"""Number of accepted scans, and of refused scans, that a report shows."""

_DARK, _BRIGHT = 1.0, 99.0  # percentiles of the slice that become black and white
_LEVELS = 65_535


def thumbnail(volume: Volume) -> Pixels:
    """Return the middle slice of the first frame, with square pixels, centred on black."""
    axis = slice_axis(volume.spacing_mm, shape=volume.data.shape)
    plane = np.take(volume.data[..., 0], volume.data.shape[axis] // 2, axis=axis)
    low, high = np.percentile(plane, (_DARK, _BRIGHT))
    levels = (plane.astype(np.float64) - low) / max(float(high - low), 1e-12)
    levels = np.rint(levels.clip(0, 1) * _LEVELS).astype(np.int64)
    sizes_mm = [n * mm for n, mm in zip(plane.shape, plane_spacing(volume.spacing_mm, axis), strict=True)]
    rows, columns = (max(1, round(SIZE * mm / max(sizes_mm))) for mm in sizes_mm)
    small = average(average(levels, rows, axis=0), columns, axis=1)
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    top, left = (SIZE - rows) // 2, (SIZE - columns) // 2
    canvas[top : top + rows, left : left + columns] = small // ((_LEVELS + 1) // 256)
    return canvas


def lot(key: str) -> str:
    """Return the lot of a scan: the scans with the lowest lots are shown."""
    return hashlib.sha256(f"thumbnail/{key}".encode()).hexdigest()


def lowest_lots(keys: Iterable[str], most: int) -> list[str]:
    """Return the `most` keys with the lowest lots, in increasing order of lot."""
    return sorted(keys, key=lot)[:most]


def to_bytes(thumbnails: Thumbnails) -> bytes:
    """Serialise thumbnails: one JSON object per line, sorted by key."""
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in to_rows(thumbnails)).encode()


def from_bytes(content: bytes) -> Thumbnails:
    """Parse the output of `to_bytes`.

    Raises:
        DataError: if the content is invalid.
    """
    try:
        rows = read_lines(content, where="the file", max_bytes=MAX_BYTES, max_depth=2, error=DataError)
        return from_rows([row for _, row in rows])
    except DataError as error:
        raise DataError(f"thumbnails cannot be parsed: {error}") from None


def to_rows(thumbnails: Thumbnails) -> list[dict[str, str]]:
    """Return thumbnails as JSON values, sorted by key. Uncompressed, because compressors differ between machines."""
    return [{"key": key, "pixels": base64.b64encode(thumbnails[key].tobytes()).decode()} for key in sorted(thumbnails)]


def from_rows(rows: Sequence[Any]) -> Thumbnails:
    """Parse the output of `to_rows`.

    Raises:
        DataError: if a row is invalid.
    """
    found = {}
    for row in rows:
        try:
            pixels = np.frombuffer(base64.b64decode(row["pixels"], validate=True), np.uint8)
            found[str(row["key"])] = pixels.reshape(SIZE, SIZE)
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"a thumbnail cannot be parsed: {error}") from error
    return found


def average(levels: NDArray[np.int64], length: int, *, axis: int) -> NDArray[np.int64]:
    """Resample an axis to `length` values, each the mean of the values in its part (`parts`); exact in integers."""
    moved = np.moveaxis(levels, axis, 0)
    first, last = parts(len(moved), length)
    sums = np.concatenate([np.zeros_like(moved[:1]), moved.cumsum(axis=0)])
    means: NDArray[np.int64] = (sums[last] - sums[first]) // (last - first).reshape(-1, *[1] * (moved.ndim - 1))
    return np.moveaxis(means, 0, axis)


def block_means(data: NDArray[np.generic], length: int) -> NDArray[np.int64]:
    """Return the means of blocks of a volume (X, Y, Z), times a constant: `length` along each axis; shorter axes repeat voxels."""
    low, high = float(data.min()), float(data.max())
    scale = _LEVELS / max(high - low, 1e-30)
    slabs = []
    for first, last in zip(*parts(len(data), length), strict=True):  # one slab at a time, since a volume is large
        levels = np.rint((data[first:last].astype(np.float64) - low) * scale).astype(np.int64)
        slabs.append(levels.sum(axis=0) * 256 // (last - first))
    return average(average(np.stack(slabs), length, axis=1), length, axis=2)


def parts(num: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and last index, exclusive, of each of `length` equal parts of `num` values; neighbours share a value cut by both."""
    edges = np.arange(length + 1) * num
    return edges[:-1] // length, -(-edges[1:] // length)
