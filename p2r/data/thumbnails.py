"""A volume -> its middle plane, 96 x 96 pixels of 8 bits; and which scans' thumbnails a corpus keeps for its report.

Integers only, once the intensities are: equal volumes give equal bytes on every machine, since thumbnails are part of a
revision. Which scans are shown is drawn by a hash of their keys, so a corpus that grows keeps most of its pictures, and
only a bounded number of thumbnails ever travels.

Shapes: h w a plane's voxels; 96 x 96 the thumbnail, rows and columns as in `preprocess`.
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
"""By key."""

SIZE = 96
MAX_BYTES = 1 << 26
"""Largest file of thumbnails that is read."""
MOST = 48
"""How many accepted, and how many refused scans a report shows."""

_DARK, _BRIGHT = 1.0, 99.0  # percentiles of the plane that become black and white
_LEVELS = 65_535


def thumbnail(volume: Volume) -> Pixels:
    """Return the middle plane of the first frame, with square pixels, centred on black."""
    axis = slice_axis(volume.spacing_mm, shape=volume.data.shape)
    plane = np.take(volume.data[..., 0], volume.data.shape[axis] // 2, axis=axis)
    low, high = np.percentile(plane, (_DARK, _BRIGHT))
    levels = (plane.astype(np.float64) - low) / max(float(high - low), 1e-12)
    levels = np.rint(levels.clip(0, 1) * _LEVELS).astype(np.int64)
    sizes_mm = [n * mm for n, mm in zip(plane.shape, plane_spacing(volume.spacing_mm, axis), strict=True)]
    rows, columns = (max(1, round(SIZE * mm / max(sizes_mm))) for mm in sizes_mm)
    small = _averaged(_averaged(levels, rows).T, columns).T  # (rows, columns)
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    top, left = (SIZE - rows) // 2, (SIZE - columns) // 2
    canvas[top : top + rows, left : left + columns] = small // ((_LEVELS + 1) // 256)
    return canvas


def lot(key: str) -> str:
    """The lot of a scan: the lowest are shown."""
    return hashlib.sha256(f"thumbnail/{key}".encode()).hexdigest()


def drawn(keys: Iterable[str], most: int) -> list[str]:
    """Return the `most` keys of the lowest lots, in their order."""
    return sorted(keys, key=lot)[:most]


def to_bytes(thumbnails: Thumbnails) -> bytes:
    """Serialise thumbnails: one JSON object a line, by key."""
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in to_rows(thumbnails)).encode()


def from_bytes(content: bytes) -> Thumbnails:
    """Undo `to_bytes`.

    Raises:
        DataError: if the content is something else.
    """
    try:
        rows = read_lines(content, where="the file", max_bytes=MAX_BYTES, max_depth=2, error=DataError)
        return from_rows([row for _, row in rows])
    except DataError as error:
        raise DataError(f"thumbnails cannot be parsed: {error}") from None


def to_rows(thumbnails: Thumbnails) -> list[dict[str, str]]:
    """Return thumbnails as JSON values, by key. They are not compressed: compressors differ between machines."""
    return [{"key": key, "pixels": base64.b64encode(thumbnails[key].tobytes()).decode()} for key in sorted(thumbnails)]


def from_rows(rows: Sequence[Any]) -> Thumbnails:
    """Undo `to_rows`.

    Raises:
        DataError: if they are something else.
    """
    found = {}
    for row in rows:
        try:
            pixels = np.frombuffer(base64.b64decode(row["pixels"], validate=True), np.uint8)
            found[str(row["key"])] = pixels.reshape(SIZE, SIZE)
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"a thumbnail cannot be parsed: {error}") from error
    return found


def _averaged(levels: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Resample rows to `length` by the mean of the rows that each new one covers; exact in integers."""
    edges = np.arange(length + 1) * len(levels)
    first, last = edges[:-1] // length, -(-edges[1:] // length)
    sums = np.concatenate([np.zeros_like(levels[:1]), levels.cumsum(axis=0)])
    means: NDArray[np.int64] = (sums[last] - sums[first]) // (last - first)[:, None]
    return means
