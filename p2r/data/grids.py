"""Images between a scan's own voxels and square or cubic pixels of one size: resampling by separable linear weights, and back."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
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
from p2r.device import to_device
from p2r.errors import RefusedScan

MAX_IMAGES_MIB = 8192.0
"""Largest memory for the images or maps of one scan, including intermediate arrays."""
_MAX_PLANE_MIB = 256.0
COARSER = "use larger voxels (pretrain.image.spacing_mm, or another backbone) or a part of the scan; its header's voxel size may be wrong"
_ROUNDING = 0.01  # of a voxel: tolerance for rounded spacings in a header


def check_room(num_values: float, content: str, advice: str, *, max_mib: float | None = None) -> None:
    """Refuse float32 arrays that would be too large, before any of them is allocated.

    Args:
        num_values: Total number of values.
        content: Content of the arrays, for the message.
        advice: Way to make them smaller, for the message.
        max_mib: Largest allowed memory; None: `MAX_IMAGES_MIB`.

    Raises:
        RefusedScan: `too_large`.
    """
    max_mib = MAX_IMAGES_MIB if max_mib is None else max_mib
    num_mib = num_values * 4 / 2**20
    if num_mib > max_mib:
        raise RefusedScan(
            "too_large",
            f"{content} would take {num_mib:,.0f} MiB of memory, up to {max_mib:,.0f} MiB are allowed: {advice}",
        )


def check_plane(shape: tuple[int, int], spacing_mm: tuple[float, float], *, target_mm: float, name: str) -> None:
    """Refuse slices that are too large to resample one by one; a training image is a crop of a resampled slice.

    Args:
        shape: (h, w) of a slice.
        spacing_mm: Spacing of rows and columns, mm.
        target_mm: Pixel size after resampling, mm.
        name: Name of the scan, for messages.

    Raises:
        RefusedScan: `too_large`.
    """
    check_planes(1, shape, spacing_mm, target_mm=target_mm, name=name, max_mib=_MAX_PLANE_MIB)


def check_planes(
    num_planes: int,
    shape: tuple[int, int],
    spacing_mm: tuple[float, float],
    *,
    target_mm: float,
    name: str,
    max_mib: float | None = None,
) -> None:
    """Refuse slices whose images would take more than `max_mib`, or `MAX_IMAGES_MIB`."""
    height, width = _resampled_shape(shape, spacing_mm, target_mm)
    check_room(
        num_planes * (shape[0] * width + height * width),  # columns are resampled first
        f"{name}: {num_planes:,} slices of {_describe_size(shape, spacing_mm)}, "
        f"{_describe_size((height, width), (target_mm,))} after resampling,",
        COARSER,
        max_mib=max_mib,
    )


def check_frames(
    num_frames: int,
    own: tuple[int, int, int],
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, ...],
    *,
    target_mm: float,
    name: str,
) -> None:
    """Refuse frames whose images would take more than `MAX_IMAGES_MIB`."""
    (_, y, z), (to_x, to_y, to_z) = own, shape
    images = to_x * y * z + to_x * to_y * z + to_x * to_y * to_z  # axes are resampled one after another
    weights = 8 * sum(n * to_n for n, to_n in zip(own, shape, strict=True))  # of `axis_weights`, in float64
    check_room(
        num_frames * images + weights,
        f"{name}: {num_frames:,} frames of {_describe_size(own, spacing_mm)}, {_describe_size(shape, (target_mm,))} after resampling,",
        COARSER,
    )


def _describe_size(shape: Sequence[int], spacing_mm: Sequence[float]) -> str:
    return f"{' x '.join(f'{n:,}' for n in shape)} voxels of {' x '.join(f'{mm:g}' for mm in spacing_mm)} mm"


def to_grid(
    planes: Tensor,
    spacing_mm: tuple[float, float],
    *,
    target_mm: float,
    size: int | None,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> tuple[Tensor, Tensor]:
    """Resample slices to square pixels, then crop or pad them about their centre.

    Args:
        planes: Slices, (B, C, h, w) float32.
        spacing_mm: Row and column spacing of `planes`, mm.
        target_mm: Pixel size of the result, mm.
        size: Height and width of the result; None: no cropping or padding.
        mode: bilinear for intensities (antialiased where pixels grow), nearest for labels.

    Returns:
        (B, C, H, W), and (B, H, W) bool: True inside the scan.
    """
    height, width = _resampled_shape(planes.shape[-2:], spacing_mm, target_mm)
    resampled = _resample_planes(planes, (height, width), mode)  # (B, C, H, W)
    inside = torch.ones(planes.shape[0], height, width, dtype=torch.bool, device=planes.device)
    if size is None:
        return resampled, inside
    padding = _centre_padding((height, width), (size, size))
    return F.pad(resampled, padding), F.pad(inside, padding)


def from_grid(maps: Tensor, shape: tuple[int, int], *, spacing_mm: tuple[float, float], target_mm: float) -> Tensor:
    """Resample maps of the network to the slices' own voxels: the inverse of `to_grid`.

    Args:
        maps: (B, C, H, W) on the grid of `to_grid`: cropped, padded or neither.
        shape: (h, w) of the slices before `to_grid`.
        spacing_mm: Row and column spacing of those slices, mm.
        target_mm: Pixel size of `maps`, mm.

    Returns:
        (B, C, h, w); zero where `to_grid` cropped the slice.
    """
    resampled = _resampled_shape(shape, spacing_mm, target_mm)
    whole = F.pad(maps, _centre_padding((maps.shape[-2], maps.shape[-1]), resampled, inverse=True))
    return _resample_planes(whole, shape, "bilinear")


def axis_weights(
    num_voxels: int, centre: float, *, spacing_mm: float, target_mm: float, size: int
) -> tuple[Tensor, Tensor]:
    """Compute the linear weights for resampling one axis to `size` samples about a centre, antialiased where voxels grow.

    Args:
        num_voxels: Number of voxels along the axis.
        centre: Centre of the samples, in voxels; 0 is the centre of the first voxel.
        spacing_mm: Spacing of the voxels.
        target_mm: Spacing of the samples.
        size: Number of samples.

    Returns:
        (size, num_voxels) float32, with rows that sum to 1, or to 0 for samples outside; and (size,) bool: inside.
    """
    scale = target_mm / spacing_mm
    places = sample_places(size, centre, scale)
    distance = (torch.arange(num_voxels, dtype=torch.float64) - places[:, None].clamp(0, num_voxels - 1)).abs()
    weights = (1 - distance / max(1.0, scale)).clamp_min(0)
    inside = are_inside(places, num_voxels)
    weights = weights / weights.sum(1, keepdim=True) * inside[:, None]
    return weights.float(), inside


def sample_places(size: int, centre: float, scale: float) -> Tensor:
    """Return the positions of `size` samples about a centre, in voxels (float64)."""
    return centre + (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * scale


def are_inside(places: Tensor, num_voxels: int) -> Tensor:
    """Return which places, in voxels, lie within a grid of this number of voxels along an axis."""
    return (places >= -0.5) & (places <= num_voxels - 0.5)


def to_patch(
    voxels: Tensor, centre: tuple[float, ...], *, spacing_mm: tuple[float, ...], target_mm: float, size: int
) -> tuple[Tensor, Tensor]:
    """Resample a box of a volume to a cube of isotropic voxels about a centre.

    Args:
        voxels: The box, (X, Y, Z) float32.
        centre: Centre of the cube, in voxels of the box.
        spacing_mm: Voxel size of the box.
        target_mm: Voxel size of the cube.
        size: Edge of the cube, in voxels.

    Returns:
        (size, size, size) float32, 0 outside the box; and bool: inside.
    """
    return resample_to_cubic(voxels, centre, spacing_mm=spacing_mm, target_mm=target_mm, shape=(size, size, size))


def resample_to_cubic(
    voxels: Tensor,
    centre: Sequence[float],
    *,
    spacing_mm: Sequence[float],
    target_mm: float,
    shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """Resample (..., x, y, z) to cubic voxels about a centre; return (..., X, Y, Z), and (X, Y, Z) bool: inside."""
    weights, inside = [], torch.ones((), dtype=torch.bool, device=voxels.device)
    for axis, size in enumerate(shape):
        matrix, within = axis_weights(
            voxels.shape[axis - 3], centre[axis], spacing_mm=spacing_mm[axis], target_mm=target_mm, size=size
        )
        weights.append(matrix)
        inside = inside[..., None] & to_device(within, voxels.device)
    return _apply_weights(voxels, weights), inside


def _apply_weights(maps: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Multiply each of the last three axes of `maps` by its matrix (samples, voxels)."""
    for axis, axis_matrix in enumerate(weights, start=maps.ndim - 3):
        matrix = to_device(axis_matrix, maps.device)
        maps = torch.movedim(torch.tensordot(matrix, maps, dims=([1], [axis])), 0, axis)
    return maps


def cubic_shape(
    shape: tuple[int, int, int], spacing_mm: tuple[float, ...], *, target_mm: float
) -> tuple[int, int, int]:
    """Return the number of cubic voxels along each axis, about the centre, that cover a volume."""
    x, y, z = (max(1, math.ceil(n * mm / target_mm - _ROUNDING)) for n, mm in zip(shape, spacing_mm, strict=True))
    return x, y, z


def cubic_to_voxel(
    shape: tuple[int, int, int], cubic: tuple[int, int, int], *, spacing_mm: tuple[float, ...], target_mm: float
) -> tuple[tuple[float, float], ...]:
    """Return (scale, offset) for each axis: cubic voxel i is at scale * i + offset on the volume's own grid."""
    scales = [target_mm / mm for mm in spacing_mm]
    return tuple(
        (scale, ((own - 1) - scale * (size - 1)) / 2) for own, size, scale in zip(shape, cubic, scales, strict=True)
    )


def from_cubic(maps: Tensor, shape: tuple[int, int, int], *, spacing_mm: tuple[float, ...], target_mm: float) -> Tensor:
    """Resample maps of the network to the volume's own voxels: the inverse of `frames_of`.

    Args:
        maps: (..., X, Y, Z) on cubic voxels about the volume's centre, covering all or part of it.
        shape: (x, y, z) of the volume.
        spacing_mm: Size of the volume's own voxels, mm.
        target_mm: Voxel size of `maps`, mm.

    Returns:
        (..., x, y, z); zero outside `maps`.
    """
    weights = [
        axis_weights(cubic, (cubic - 1) / 2, spacing_mm=target_mm, target_mm=mm, size=own)[0]
        for cubic, own, mm in zip(maps.shape[-3:], shape, spacing_mm, strict=True)
    ]
    return _apply_weights(maps, weights)


def _resampled_shape(shape: tuple[int, ...], spacing_mm: tuple[float, float], target_mm: float) -> tuple[int, int]:
    height, width = (max(1, round(n * mm / target_mm)) for n, mm in zip(shape, spacing_mm, strict=True))
    return height, width


def _resample_planes(planes: Tensor, shape: tuple[int, int], mode: Literal["bilinear", "nearest"]) -> Tensor:
    if planes.shape[-2:] == shape:
        return planes
    if mode == "nearest":
        return F.interpolate(planes, size=shape, mode="nearest-exact")
    return F.interpolate(planes, size=shape, mode="bilinear", align_corners=False, antialias=True)


def _centre_padding(shape: tuple[int, int], size: tuple[int, int], *, inverse: bool = False) -> list[int]:
    """Return the padding for `F.pad` (negative: cropping) from `shape` to `size`; `inverse` undoes that from `size` to `shape`."""
    padding: list[int] = []
    for have, want in zip(reversed(shape), reversed(size), strict=True):  # F.pad starts at the last axis
        before = -((have - want) // 2) if inverse else (want - have) // 2
        padding += [before, want - have - before]
    return padding
