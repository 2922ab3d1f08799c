"""Foreground of a volume as 8 x 8 x 8 cells: a bit for each, in the index of a shard, by which patches are drawn.

A cell is foreground if its mean intensity exceeds the mean of all cells, as for `pretrain.loss.foreground_share`. Reading no voxel,
a stream can so draw patches where there is anatomy. Cells are part of a corpus, so equal volumes must give equal bytes on every
machine: after the intensities are quantised, all sums are in integers.
"""

import base64
import binascii

import numpy as np
from numpy.typing import NDArray

from p2r.data.thumbnails import average, block_means
from p2r.data.volume import Volume

CELLS = 8
"""Cells along each axis."""
_NUM_BYTES = CELLS**3 // 8


def foreground(volume: Volume) -> str:
    """Return the foreground of a volume's first frame: 512 bits in base64."""
    means = block_means(volume.data[..., 0], 2 * CELLS)
    for axis in range(3):
        means = average(means, CELLS, axis=axis)
    return base64.b64encode(np.packbits(means * CELLS**3 > means.sum()).tobytes()).decode()


def is_foreground(text: object) -> bool:
    """Return whether a text has the form of `foreground`."""
    if not isinstance(text, str) or len(text) > 2 * _NUM_BYTES:
        return False
    try:
        return len(base64.b64decode(text, validate=True)) == _NUM_BYTES
    except (binascii.Error, ValueError):
        return False


def foreground_cells(text: str) -> NDArray[np.int64]:
    """Return the places (n, 3) of the foreground cells along X, Y, Z."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))
    return np.argwhere(bits.reshape(CELLS, CELLS, CELLS))
