"""A volume -> images as the network sees them, and maps of the network -> back onto the volume's grid. Pure functions.

Choices: a plane is cut across the axis of the largest spacing, so that it is the sharpest cut there is; intensities are
stretched between two percentiles of the whole volume, so that planes of one scan stay comparable; planes are resampled
to one pixel size *before* they are cropped or padded about their centre, so that a pixel means the same length in every
scan. Training and use go through the same code: what the backbone saw is what it will see. A network that reads volumes
gets them on cubic voxels, about the same middle; which axis is the sharpest does not matter then.

Shapes: X Y Z T a volume; P = T * Z planes, frame by frame; h w a plane's voxels; H W its pixels after resampling; x y z a
volume's own voxels where X Y Z are those after resampling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from p2r.data.preparation import Preparation as Preparation
from p2r.data.preparation import SliceAxis as SliceAxis
from p2r.data.preparation import intensity_window as intensity_window
from p2r.data.preparation import is_percentile_table as is_percentile_table
from p2r.data.preparation import percentile_table as percentile_table
from p2r.data.preparation import plane_axes as plane_axes
from p2r.data.preparation import plane_spacing as plane_spacing
from p2r.data.preparation import planes_to_volume as planes_to_volume
from p2r.data.preparation import slice_axis as slice_axis
from p2r.data.preparation import volume_to_planes as volume_to_planes
from p2r.data.volume import Volume
from p2r.device import to_device
from p2r.errors import RefusedScan

_ROUNDING = 0.01  # of a voxel: what spacings in a header may be off


@dataclass(frozen=True)
class Planes:
    """All planes of one volume, ready for a network."""

    images: Tensor
    """(P, 1, H, W) float32 in [0, 1]."""
    inside: Tensor
    """(P, H, W) bool: pixels that are part of the scan, not padding."""
    axis: int
    """Axis of the volume across which the planes were cut."""
    low: float
    """Intensity that became 0."""
    high: float
    """Intensity that became 1."""
    shape: tuple[int, int]
    """(h, w) of a plane on the volume's own grid."""
    spacing_mm: tuple[float, float]
    """In-plane voxel size on the volume's own grid, mm."""
    num_frames: int
    """T."""


@dataclass(frozen=True)
class Frames:
    """All frames of one volume, whole, ready for a network that reads volumes."""

    images: Tensor
    """(T, 1, X, Y, Z) float32 in [0, 1]."""
    inside: Tensor
    """(T, X, Y, Z) bool: voxels that are part of the scan, not padding."""
    low: float
    """Intensity that became 0."""
    high: float
    """Intensity that became 1."""
    shape: tuple[int, int, int]
    """(x, y, z) on the volume's own grid."""
    spacing_mm: tuple[float, float, float]
    """Voxel size on the volume's own grid, mm."""


def normalise(voxels: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Map [low, high] to [0, 1] in float32, and clip what lies outside; tensors of bounds are broadcast."""
    return ((voxels.float() - low) / (high - low)).clamp_(0.0, 1.0)


def to_grid(
    planes: Tensor,
    spacing_mm: tuple[float, float],
    *,
    target_mm: float,
    size: int | None,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> tuple[Tensor, Tensor]:
    """Resample planes to square pixels, then crop or pad them about their centre.

    Args:
        planes: (B, C, h, w) float32.
        spacing_mm: Row and column spacing of `planes`, mm.
        target_mm: Pixel size of the result, mm.
        size: Height and width of the result; None: whatever the resampling gives.
        mode: bilinear for intensities (with antialiasing where pixels grow), nearest for labels.

    Returns:
        (B, C, H, W), and (B, H, W) bool: True where a pixel comes from the scan.
    """
    height, width = _resampled_shape(planes.shape[-2:], spacing_mm, target_mm)
    resampled = _resample(planes, (height, width), mode)  # (B, C, H, W)
    inside = torch.ones(planes.shape[0], height, width, dtype=torch.bool, device=planes.device)
    if size is None:
        return resampled, inside
    padding = _centring((height, width), (size, size))
    return F.pad(resampled, padding), F.pad(inside, padding)


def from_grid(maps: Tensor, shape: tuple[int, int], *, spacing_mm: tuple[float, float], target_mm: float) -> Tensor:
    """Bring maps of the network back to the planes' own voxels: the way of `to_grid`, backwards.

    Args:
        maps: (B, C, H, W) on the grid that `to_grid` made, cropped, padded or neither.
        shape: (h, w) of the planes before `to_grid`.
        spacing_mm: Row and column spacing of those planes, mm.
        target_mm: Pixel size of `maps`, mm.

    Returns:
        (B, C, h, w); zero where `to_grid` had cropped the plane away.
    """
    resampled = _resampled_shape(shape, spacing_mm, target_mm)
    whole = F.pad(maps, _centring((maps.shape[-2], maps.shape[-1]), resampled, inverse=True))
    return _resample(whole, shape, "bilinear")


def axis_weights(
    num_voxels: int, centre: float, *, spacing_mm: float, target_mm: float, size: int
) -> tuple[Tensor, Tensor]:
    """Weights with which the voxels along one axis make `size` samples about a centre: linear, antialiased where voxels grow.

    Args:
        num_voxels: Along the axis.
        centre: Of the samples, in voxels; 0 is the middle of the first voxel.
        spacing_mm: Of the voxels.
        target_mm: Of the samples.
        size: Number of samples.

    Returns:
        (size, num_voxels) float32, rows add up to 1, or to 0 for samples outside; and (size,) bool: inside.
    """
    scale = target_mm / spacing_mm
    places = _places(size, centre, scale)
    distance = (torch.arange(num_voxels, dtype=torch.float64) - places[:, None].clamp(0, num_voxels - 1)).abs()
    weights = (1 - distance / max(1.0, scale)).clamp_min(0)
    inside = _within(places, num_voxels)
    weights = weights / weights.sum(1, keepdim=True) * inside[:, None]
    return weights.float(), inside


def _places(size: int, centre: float, scale: float) -> Tensor:
    """Return where `size` samples about a centre lie, in voxels (float64)."""
    return centre + (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * scale


def _within(places: Tensor, num_voxels: int) -> Tensor:
    return (places >= -0.5) & (places <= num_voxels - 0.5)


def to_patch(
    voxels: Tensor, centre: tuple[float, ...], *, spacing_mm: tuple[float, ...], target_mm: float, size: int
) -> tuple[Tensor, Tensor]:
    """Resample a box of a volume to a cube of isotropic voxels about a centre.

    Args:
        voxels: (X, Y, Z) float32.
        centre: In voxels of the box.
        spacing_mm: Of the box.
        target_mm: Voxel size of the result.
        size: Edge of the result.

    Returns:
        (size, size, size) float32, 0 outside of the box; and bool: inside.
    """
    return _to_cubic(voxels, centre, spacing_mm=spacing_mm, target_mm=target_mm, shape=(size, size, size))


def _to_cubic(
    voxels: Tensor,
    centre: Sequence[float],
    *,
    spacing_mm: Sequence[float],
    target_mm: float,
    shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """Resample (..., x, y, z) to cubic voxels (..., X, Y, Z) about a centre; and (X, Y, Z) bool: inside."""
    weights, inside = [], torch.ones((), dtype=torch.bool, device=voxels.device)
    for axis, size in enumerate(shape):
        of_axis, within = axis_weights(
            voxels.shape[axis - 3], centre[axis], spacing_mm=spacing_mm[axis], target_mm=target_mm, size=size
        )
        weights.append(of_axis)
        inside = inside[..., None] & to_device(within, voxels.device)
    return _along_axes(voxels, weights), inside


def _along_axes(maps: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Multiply the last three axes of `maps`, one after another, by a matrix (samples, voxels) each."""
    for axis, of_axis in enumerate(weights, start=maps.ndim - 3):
        matrix = to_device(of_axis, maps.device)
        maps = torch.movedim(torch.tensordot(matrix, maps, dims=([1], [axis])), 0, axis)
    return maps


def cubic_shape(
    shape: tuple[int, int, int], spacing_mm: tuple[float, ...], *, target_mm: float
) -> tuple[int, int, int]:
    """Return how many cubic voxels along each axis, about the middle, hold all voxels of a volume."""
    x, y, z = (max(1, math.ceil(n * mm / target_mm - _ROUNDING)) for n, mm in zip(shape, spacing_mm, strict=True))
    return x, y, z


def cubic_to_voxel(
    shape: tuple[int, int, int], cubic: tuple[int, int, int], *, spacing_mm: tuple[float, ...], target_mm: float
) -> tuple[tuple[float, float], ...]:
    """Return, for each axis, (scale, offset): the cubic voxel i lies at scale * i + offset on the volume's own grid."""
    scales = [target_mm / mm for mm in spacing_mm]
    return tuple(
        (scale, ((own - 1) - scale * (size - 1)) / 2) for own, size, scale in zip(shape, cubic, scales, strict=True)
    )


def from_cubic(maps: Tensor, shape: tuple[int, int, int], *, spacing_mm: tuple[float, ...], target_mm: float) -> Tensor:
    """Bring maps of the network back to the volume's own voxels: the way of `frames_of`, backwards.

    Args:
        maps: (..., X, Y, Z) on cubic voxels about the volume's middle, all of it or a part.
        shape: (x, y, z).
        spacing_mm: Of the volume's own voxels, mm.
        target_mm: Voxel size of `maps`, mm.

    Returns:
        (..., x, y, z); zero where `maps` do not reach.
    """
    weights = [
        axis_weights(cubic, (cubic - 1) / 2, spacing_mm=target_mm, target_mm=mm, size=own)[0]
        for cubic, own, mm in zip(maps.shape[-3:], shape, spacing_mm, strict=True)
    ]
    return _along_axes(maps, weights)


def frames_of(volume: Volume, *, preparation: Preparation, size: int | None) -> Frames:
    """Resample a volume to cubic voxels.

    Args:
        volume: The scan.
        preparation: Rules.
        size: Edge of the images, about the middle, usually `preparation.image_size`; None: all of the volume.

    Raises:
        RefusedScan: `not_3d` for a single plane, `constant` as `percentile_table`.
    """
    own, spacing_mm, target_mm = volume.data.shape[:3], volume.spacing_mm, preparation.spacing_mm
    if 1 in own:
        raise RefusedScan(
            "not_3d",
            f"{volume.key} is a single plane, its shape is {list(own)}; this network reads volumes: use one of planes (dimensions: 2)",
        )
    low, high = intensity_window(percentile_table(volume.data, name=volume.key), preparation.intensity_percentiles)
    shape = (size, size, size) if size is not None else cubic_shape(own, spacing_mm, target_mm=target_mm)
    stored = torch.from_numpy(np.ascontiguousarray(np.moveaxis(volume.data, 3, 0), dtype=np.float32))
    images, inside = _to_cubic(
        normalise(stored[:, None], low, high),  # (T, 1, x, y, z)
        [(n - 1) / 2 for n in own],
        spacing_mm=spacing_mm,
        target_mm=target_mm,
        shape=shape,
    )
    return Frames(images.contiguous(), inside.expand(len(images), *shape), low, high, own, spacing_mm)


def label_frames_of(labels: Volume, *, preparation: Preparation, size: int | None) -> Tensor:
    """Resample a label map to (T, X, Y, Z) int64, on the grid that `frames_of` gives its scan; 0 outside."""
    own, spacing_mm, target_mm = labels.data.shape[:3], labels.spacing_mm, preparation.spacing_mm
    shape = (size, size, size) if size is not None else cubic_shape(own, spacing_mm, target_mm=target_mm)
    maps = torch.from_numpy(np.ascontiguousarray(np.moveaxis(labels.data, 3, 0))).long()
    for axis in range(3):
        places = _places(shape[axis], (own[axis] - 1) / 2, target_mm / spacing_mm[axis])
        nearest = places.add(0.5).floor().long().clamp(0, own[axis] - 1)
        outside = ~_within(places, own[axis])
        maps = maps.index_select(axis + 1, nearest).index_fill(axis + 1, outside.nonzero()[:, 0], 0)
    return maps


def prepare(
    planes: NDArray[Any],
    window: tuple[float, float],
    spacing_mm: tuple[float, float],
    *,
    target_mm: float,
    size: int | None,
) -> tuple[Tensor, Tensor]:
    """Turn raw planes (B, h, w) into images (B, 1, H, W) in [0, 1], and `inside` (B, H, W): `normalise`, `to_grid`."""
    # PyTorch has no arithmetic for uint16.
    stored = torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32))
    return to_grid(normalise(stored[:, None], *window), spacing_mm, target_mm=target_mm, size=size)


def planes_of(volume: Volume, *, preparation: Preparation, size: int | None) -> Planes:
    """Cut a volume into images.

    Args:
        volume: The scan.
        preparation: Rules.
        size: Height and width of the images, usually `preparation.image_size`; None: the planes' whole extent.
    """
    axis = slice_axis(volume.spacing_mm, preparation.slice_axis, shape=volume.data.shape)
    window = intensity_window(percentile_table(volume.data, name=volume.key), preparation.intensity_percentiles)
    planes = volume_to_planes(volume.data, axis)  # (P, h, w)
    spacing = plane_spacing(volume.spacing_mm, axis)
    images, inside = prepare(planes, window, spacing, target_mm=preparation.spacing_mm, size=size)
    shape = (planes.shape[1], planes.shape[2])
    return Planes(images, inside, axis, *window, shape, spacing, num_frames=volume.data.shape[3])


def label_planes_of(labels: Volume, *, preparation: Preparation, axis: int, size: int | None) -> Tensor:
    """Cut a label map into (P, H, W) int64, on the grid that `planes_of` gives its scan."""
    planes = torch.from_numpy(volume_to_planes(labels.data, axis).astype(np.float32))[:, None]
    spacing = plane_spacing(labels.spacing_mm, axis)
    resampled, _ = to_grid(planes, spacing, target_mm=preparation.spacing_mm, size=size, mode="nearest")
    return resampled[:, 0].long()


def _resampled_shape(shape: tuple[int, ...], spacing_mm: tuple[float, float], target_mm: float) -> tuple[int, int]:
    height, width = (max(1, round(n * mm / target_mm)) for n, mm in zip(shape, spacing_mm, strict=True))
    return height, width


def _resample(planes: Tensor, shape: tuple[int, int], mode: Literal["bilinear", "nearest"]) -> Tensor:
    if planes.shape[-2:] == shape:
        return planes
    if mode == "nearest":
        return F.interpolate(planes, size=shape, mode="nearest-exact")
    return F.interpolate(planes, size=shape, mode="bilinear", align_corners=False, antialias=True)


def _centring(shape: tuple[int, int], size: tuple[int, int], *, inverse: bool = False) -> list[int]:
    """Padding for `F.pad` (negative: cropping) that takes `shape` to `size`; `inverse` undoes the opposite way."""
    padding: list[int] = []
    for have, want in zip(reversed(shape), reversed(size), strict=True):  # F.pad starts at the last axis
        before = -((have - want) // 2) if inverse else (want - have) // 2
        padding += [before, want - have - before]
    return padding
