"""Rules for turning a scan into images, and the properties that they need: slice axis and intensity percentiles.

No tensors here; `preprocess` applies the rules.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from p2r.config import PERCENTILES
from p2r.config.section import is_none
from p2r.contrasts import Contrasts
from p2r.errors import RefusedScan

SliceAxis = Literal["auto", 0, 1, 2]

_TIED_SPACING = 0.01
_MAX_PERCENTILE_VOXELS = 1 << 18
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MIN_CONTRAST = 1e-30  # between two percentiles; smaller differences vanish in 32-bit numbers


class Preparation(BaseModel):
    """Rules for turning a scan into images: the part of a corpus and of a job that is published with a backbone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dimensions: Literal[2, 3] = 2
    """Dimensions of an image: 2 for a slice of the scan, 3 for a part of its volume."""
    slice_axis: SliceAxis = "auto"
    """Axis perpendicular to the slices, or auto."""
    intensity_percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of the non-zero voxels that become 0 and 1; two of `PERCENTILES`."""
    spacing_mm: Annotated[float, Field(ge=1e-3, lt=1e4)]
    """Pixel size, mm."""
    image_size: Annotated[int, Field(ge=1, le=2**14)]
    """Every side of an image in training, pixels."""
    planes: Literal["whole", "centre"] = "whole"
    """Part of a slice or volume that a segmentation model reads. whole: all, in windows of `image_size`; centre: one central window."""
    contrasts: Contrasts | None = Field(default=None, exclude_if=is_none)
    """Names of the contrasts of an image, in the order of its channels; None: one contrast, of any kind."""

    @property
    def num_contrasts(self) -> int:
        """C, the number of channels of an image."""
        return 1 if self.contrasts is None else len(self.contrasts)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.intensity_percentiles
        if low not in PERCENTILES or high not in PERCENTILES or low >= high:
            raise ValueError(
                f"intensity_percentiles must be two of {PERCENTILES} in increasing order, got {[low, high]}"
            )
        return self


def slice_axis(spacing_mm: tuple[float, ...], rule: SliceAxis = "auto", *, shape: tuple[int, ...] = (0, 0, 0)) -> int:
    """Return the axis perpendicular to the slices: the given one, or the axis with the largest spacing.

    Spacings within 1 % of the largest count as equal, and the last axis wins: isotropic scans give axial slices.

    Args:
        spacing_mm: Voxel size.
        rule: auto, or an axis.
        shape: Shape of the volume, if known; the axis of a single slice is the one with one voxel.
    """
    if rule != "auto":
        return int(rule)
    if 1 in shape[:3]:
        return shape.index(1)
    largest = max(spacing_mm)
    return max(axis for axis, spacing in enumerate(spacing_mm) if spacing >= largest * (1 - _TIED_SPACING))


def plane_axes(axis: int) -> tuple[int, int]:
    """Return the two axes of a volume that become rows and columns of a slice perpendicular to `axis`."""
    rows, columns = (other for other in range(3) if other != axis)
    return rows, columns


def percentile_table(data: NDArray[Any], *, name: str = "the scan") -> tuple[float, ...]:
    """Return the intensities at `PERCENTILES` of the non-zero voxels, or of all voxels if those are constant.

    Raises:
        RefusedScan: `constant`, if 99 of 100 voxels are equal; `nonfinite`, if their range exceeds 32-bit numbers.
    """
    # A stride without a common factor with the size samples every slice, row and column, in a fixed pattern.
    stride = math.ceil(data.size / _MAX_PERCENTILE_VOXELS)
    while math.gcd(stride, data.size) > 1:
        stride += 1
    sample = data.reshape(-1)[::stride]
    for voxels in (sample[sample != 0], sample):
        if voxels.size:
            table = _compute_percentiles(voxels)
            if table[-1] - table[0] > _MAX_FLOAT32:
                raise RefusedScan("nonfinite", "the range of the voxels exceeds 32-bit numbers; scale them down")
            if is_percentile_table(table):
                return table
    raise RefusedScan(
        "constant",
        f"{name}: percentiles 0.5 and 99.5 of the voxels are equal: 99 of 100 voxels have the same value; "
        "leave the scan out, or crop it to its content",
    )


def is_percentile_table(table: Sequence[float]) -> bool:
    """Return whether intensities at `PERCENTILES` can normalise a scan in 32-bit numbers: increasing, and not all equal."""
    return bool(
        len(table) == len(PERCENTILES)
        and all(math.isfinite(value) for value in table)
        and all(low <= high for low, high in pairwise(table))
        and table[-1] - table[0] <= _MAX_FLOAT32
        and table[PERCENTILES.index(99.5)] - table[PERCENTILES.index(0.5)] >= _MIN_CONTRAST
    )


def _compute_percentiles(voxels: NDArray[Any]) -> tuple[float, ...]:
    """Compute `np.percentile` for all `PERCENTILES` with one sort, several times faster."""
    ordered = np.sort(voxels.astype(np.float32))  # exact for all dtypes of a Volume, and the fastest sort in numpy
    places = np.asarray(PERCENTILES) / 100 * (len(ordered) - 1)
    below = np.floor(places).astype(np.int64)
    low, high = (ordered[index].astype(np.float64) for index in (below, np.minimum(below + 1, len(ordered) - 1)))
    return tuple((low + (high - low) * (places - below)).tolist())


def intensity_window(table: Sequence[float], percentiles: tuple[float, float]) -> tuple[float, float]:
    """Return the intensities that become 0 and 1.

    Args:
        table: Intensities from `percentile_table`.
        percentiles: Two of `PERCENTILES`. If their intensities are equal, the lowest and the highest of the table are used.
    """
    low, high = (table[PERCENTILES.index(percentile)] for percentile in percentiles)
    return (low, high) if high - low >= _MIN_CONTRAST else (table[0], table[-1])


def plane_spacing(spacing_mm: tuple[float, ...], axis: int) -> tuple[float, float]:
    """Return the row and column spacing of slices perpendicular to `axis`, mm."""
    rows, columns = plane_axes(axis)
    return spacing_mm[rows], spacing_mm[columns]


def volume_to_planes(data: NDArray[Any], axis: int) -> NDArray[Any]:
    """Cut (X, Y, Z, T) into slices (P, h, w) perpendicular to `axis`, frame by frame; rows are the lower remaining axis."""
    frames_first = np.moveaxis(data, (3, axis), (0, 1))  # (T, Z, h, w)
    return np.ascontiguousarray(frames_first.reshape(-1, *frames_first.shape[2:]))


def planes_to_volume(planes: NDArray[Any], axis: int, num_frames: int) -> NDArray[Any]:
    """Stack slices (P, h, w, ...) into (X, Y, Z, T, ...), the inverse of `volume_to_planes`; further axes are kept."""
    if planes.shape[0] % num_frames:
        raise ValueError(f"{planes.shape[0]} planes do not make {num_frames} frames")
    frames_first = planes.reshape(num_frames, -1, *planes.shape[1:])  # (T, Z, h, w, ...)
    return np.ascontiguousarray(np.moveaxis(frames_first, (0, 1), (3, axis)))
