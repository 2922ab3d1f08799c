"""The rules by which a scan becomes images, and what they need of a scan: its sharpest axis and its intensities. No tensors.

`preprocess` applies them.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from p2r.config import PERCENTILES
from p2r.errors import RefusedScan

SliceAxis = Literal["auto", 0, 1, 2]

_TIED_SPACING = 0.01
_MAX_PERCENTILE_VOXELS = 1 << 18
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_LEAST_CONTRAST = 1e-30  # between two percentiles; less vanishes in 32-bit numbers


class Preparation(BaseModel):
    """How a scan becomes images: the part of a corpus and of a job that a published backbone must carry along."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dimensions: Literal[2, 3] = 2
    """Of an image: a plane of the scan, or a part of its volume."""
    slice_axis: SliceAxis = "auto"
    """Rule for the axis across which planes are cut."""
    intensity_percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of the non-zero voxels that become 0 and 1; two of `PERCENTILES`."""
    spacing_mm: Annotated[float, Field(ge=1e-3, lt=1e4)]
    """Pixel size, mm."""
    image_size: Annotated[int, Field(ge=1, le=2**14)]
    """Every side of an image in training, pixels."""
    planes: Literal["whole", "centre"] = "whole"
    """What a segmentation model reads of a plane or volume: all of it, by windows of `image_size`, or that size about its centre."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.intensity_percentiles
        if low not in PERCENTILES or high not in PERCENTILES or low >= high:
            raise ValueError(f"intensity_percentiles must be two of {PERCENTILES} that rise, got {[low, high]}")
        return self


def slice_axis(spacing_mm: tuple[float, ...], rule: SliceAxis = "auto", *, shape: tuple[int, ...] = (0, 0, 0)) -> int:
    """Return the axis across which planes are cut: the rule's, or the one of the largest spacing.

    Spacings within 1 % of the largest tie, and the last of them wins: an isotropic scan is cut axially.

    Args:
        spacing_mm: Voxel size.
        rule: auto, or an axis.
        shape: Of the volume, if known: a single plane is cut across the axis along which it is one voxel.
    """
    if rule != "auto":
        return int(rule)
    if 1 in shape[:3]:
        return shape.index(1)
    largest = max(spacing_mm)
    return max(axis for axis, spacing in enumerate(spacing_mm) if spacing >= largest * (1 - _TIED_SPACING))


def plane_axes(axis: int) -> tuple[int, int]:
    """Return the two axes of a volume that become rows and columns of a plane cut across `axis`."""
    rows, columns = (other for other in range(3) if other != axis)
    return rows, columns


def percentile_table(data: NDArray[Any], *, name: str = "the scan") -> tuple[float, ...]:
    """Return the intensities at `PERCENTILES` of the non-zero voxels, or of all if those are constant.

    Raises:
        RefusedScan: `constant`, if 99 of 100 voxels have one value; `nonfinite`, if 32-bit numbers cannot hold their range.
    """
    # A stride that shares no factor with the size visits every plane, row and column, in a fixed pattern.
    stride = math.ceil(data.size / _MAX_PERCENTILE_VOXELS)
    while math.gcd(stride, data.size) > 1:
        stride += 1
    sample = data.reshape(-1)[::stride]
    for voxels in (sample[sample != 0], sample):
        if voxels.size:
            table = _percentiles(voxels)
            if table[-1] - table[0] > _MAX_FLOAT32:
                raise RefusedScan("nonfinite", "the range of the voxels is beyond what 32-bit numbers hold")
            if is_percentile_table(table):
                return table
    raise RefusedScan(
        "constant",
        f"{name}: percentiles 0.5 and 99.5 of the voxels are equal, 99 of 100 voxels have one value: hardly any contrast; "
        "leave the scan out, or crop it to what it shows",
    )


def is_percentile_table(table: Sequence[float]) -> bool:
    """Tell whether intensities at `PERCENTILES` can normalise a scan in 32-bit numbers: they rise, and have a contrast."""
    return bool(
        len(table) == len(PERCENTILES)
        and all(math.isfinite(value) for value in table)
        and all(low <= high for low, high in pairwise(table))
        and table[-1] - table[0] <= _MAX_FLOAT32
        and table[PERCENTILES.index(99.5)] - table[PERCENTILES.index(0.5)] >= _LEAST_CONTRAST
    )


def _percentiles(voxels: NDArray[Any]) -> tuple[float, ...]:
    """What `np.percentile` gives for `PERCENTILES`; for so many of them one sort is several times faster."""
    ordered = np.sort(voxels.astype(np.float32))  # exact for all dtypes that a Volume has; numpy sorts them fastest
    places = np.asarray(PERCENTILES) / 100 * (len(ordered) - 1)
    below = np.floor(places).astype(np.int64)
    low, high = (ordered[index].astype(np.float64) for index in (below, np.minimum(below + 1, len(ordered) - 1)))
    return tuple((low + (high - low) * (places - below)).tolist())


def intensity_window(table: Sequence[float], percentiles: tuple[float, float]) -> tuple[float, float]:
    """Return the intensities that become 0 and 1.

    Args:
        table: From `percentile_table`.
        percentiles: Two of `PERCENTILES`. Where both fall on one value, the darkest and the brightest stand in.
    """
    low, high = (table[PERCENTILES.index(percentile)] for percentile in percentiles)
    return (low, high) if high - low >= _LEAST_CONTRAST else (table[0], table[-1])


def plane_spacing(spacing_mm: tuple[float, ...], axis: int) -> tuple[float, float]:
    """Return the row and column spacing of planes cut across `axis`, mm."""
    rows, columns = plane_axes(axis)
    return spacing_mm[rows], spacing_mm[columns]


def volume_to_planes(data: NDArray[Any], axis: int) -> NDArray[Any]:
    """Cut (X, Y, Z, T) across `axis` into (P, h, w), frame by frame; rows are the lower of the two remaining axes."""
    frames_first = np.moveaxis(data, (3, axis), (0, 1))  # (T, Z, h, w)
    return np.ascontiguousarray(frames_first.reshape(-1, *frames_first.shape[2:]))


def planes_to_volume(planes: NDArray[Any], axis: int, num_frames: int) -> NDArray[Any]:
    """Put planes (P, h, w, ...) together to (X, Y, Z, T, ...): undoes `volume_to_planes`; further axes come along."""
    if planes.shape[0] % num_frames:
        raise ValueError(f"{planes.shape[0]} planes do not make {num_frames} frames")
    frames_first = planes.reshape(num_frames, -1, *planes.shape[1:])  # (T, Z, h, w, ...)
    return np.ascontiguousarray(np.moveaxis(frames_first, (0, 1), (3, axis)))
