"""Choice of the patch that a sample of a volume shows: anywhere in the scan, or in its foreground."""

import math

import numpy as np

from p2r.config import ImageConfig
from p2r.data.foreground import CELLS, foreground_cells
from p2r.data.index import Box, IndexRow
from p2r.data.preparation import plane_axes
from p2r.errors import DataError


def choose_patch(row: IndexRow, image: ImageConfig, generator: np.random.Generator) -> tuple[Box, tuple[float, ...]]:
    """Choose a patch of a frame: at random along each axis, or centred where the axis is shorter than the patch.

    Raises:
        DataError: if the foreground is requested and not in the index.
    """
    wanted = _choose_centre(row, image, generator)
    sides, centres = [], []
    for axis in range(3):
        num_voxels, scale = row.shape[axis], image.spacing_mm / row.spacing_mm[axis]
        extent = image.size * scale  # in voxels
        free = num_voxels - extent
        if free <= 0:
            first_edge = free / 2
        elif wanted is None:
            first_edge = generator.random() * free
        else:
            first_edge = min(max(0.0, wanted[axis] - extent / 2), free)
        centre = first_edge + extent / 2 - 0.5
        margin = extent / 2 + max(1.0, scale)  # includes the reach of the filter
        start, stop = max(0, math.floor(centre - margin)), min(num_voxels, math.ceil(centre + margin) + 1)
        sides.append(slice(start, stop))
        centres.append(centre - start)
    stored = (row.slice_axis, *plane_axes(row.slice_axis))
    planes, rows, columns = (sides[axis] for axis in stored)
    return (planes, rows, columns), tuple(centres)


def _choose_centre(
    row: IndexRow, image: ImageConfig, generator: np.random.Generator
) -> tuple[float, float, float] | None:
    """Choose a centre in the foreground, in voxels from the edge; None: the patch may be anywhere."""
    if not image.foreground_share or generator.random() >= image.foreground_share:
        return None
    if row.foreground is None:
        raise DataError(
            f"the foreground of {row.key} is not known, image.foreground_share is {image.foreground_share:g}: ingest these scans "
            "with ingest.record: blocks into a new storage, or set foreground_share to 0"
        )
    cells = foreground_cells(row.foreground)
    if not len(cells):
        return None
    cell = cells[int(generator.random() * len(cells))]
    x, y, z = (
        float((place + generator.random()) / CELLS * length) for place, length in zip(cell, row.shape[:3], strict=True)
    )
    return x, y, z
