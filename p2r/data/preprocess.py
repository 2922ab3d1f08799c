"""A volume -> the network's input images, and maps of the network -> the volume's grid. Pure functions.

Choices: slices are perpendicular to the axis with the largest spacing, where in-plane resolution is best. Intensities are
normalised between two percentiles of the whole volume, so that slices of one scan stay comparable. Slices are resampled to
one pixel size *before* they are cropped or padded about their centre, so that a pixel has the same length in every scan.
Training and inference use the same code, so the backbone always gets the input that it was trained on. A network that reads
volumes gets cubic voxels about the same centre, independent of the slice axis. A network of several contrasts gets the volumes
of a session, all on one grid, as channels; a missing contrast is a channel of zeros.

Shapes: X Y Z T a volume; C contrasts; P = T * Z slices, frame by frame; h w voxels of a slice; H W its pixels after resampling; where
X Y Z are voxels after resampling, x y z are the volume's own voxels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from p2r.contrasts import describe
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

Scans = Volume | Mapping[str, Volume]
"""A scan, or the scans of a session by contrast, all on one grid; missing contrasts are left out."""

MAX_IMAGES_MIB = 8192.0
"""Largest memory for the images or maps of one scan, including intermediate arrays."""

_MAX_PLANE_MIB = 256.0
_COARSER = "use larger voxels (pretrain.image.spacing_mm, or another backbone) or a part of the scan; its header's voxel size may be wrong"
_ROUNDING = 0.01  # of a voxel: tolerance for rounded spacings in a header


@dataclass(frozen=True)
class Planes:
    """All slices of one volume, ready for a network."""

    images: Tensor
    """(P, C, H, W) float32 in [0, 1]; missing contrasts are zero."""
    inside: Tensor
    """(P, H, W) bool: True in the scan, False in the padding."""
    axis: int
    """Axis of the volume perpendicular to the slices."""
    low: float
    """Intensity that became 0, of the first contrast."""
    high: float
    """Intensity that became 1, of the first contrast."""
    shape: tuple[int, int]
    """(h, w) of a slice on the volume's own grid."""
    spacing_mm: tuple[float, float]
    """In-plane voxel size on the volume's own grid, mm."""
    num_frames: int
    """T, the number of frames."""


@dataclass(frozen=True)
class Frames:
    """All frames of one volume, ready for a network that reads volumes."""

    images: Tensor
    """(T, C, X, Y, Z) float32 in [0, 1]; missing contrasts are zero."""
    inside: Tensor
    """(T, X, Y, Z) bool: True in the scan, False in the padding."""
    low: float
    """Intensity that became 0, of the first contrast."""
    high: float
    """Intensity that became 1, of the first contrast."""
    shape: tuple[int, int, int]
    """(x, y, z) on the volume's own grid."""
    spacing_mm: tuple[float, float, float]
    """Voxel size on the volume's own grid, mm."""


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
    _check_planes(1, shape, spacing_mm, target_mm=target_mm, name=name, max_mib=_MAX_PLANE_MIB)


def _check_planes(
    num_planes: int,
    shape: tuple[int, int],
    spacing_mm: tuple[float, float],
    *,
    target_mm: float,
    name: str,
    max_mib: float | None = None,
) -> None:
    height, width = _resampled_shape(shape, spacing_mm, target_mm)
    check_room(
        num_planes * (shape[0] * width + height * width),  # columns are resampled first
        f"{name}: {num_planes:,} slices of {_describe_size(shape, spacing_mm)}, "
        f"{_describe_size((height, width), (target_mm,))} after resampling,",
        _COARSER,
        max_mib=max_mib,
    )


def _check_frames(
    num_frames: int,
    own: tuple[int, int, int],
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, ...],
    *,
    target_mm: float,
    name: str,
) -> None:
    (_, y, z), (to_x, to_y, to_z) = own, shape
    images = to_x * y * z + to_x * to_y * z + to_x * to_y * to_z  # axes are resampled one after another
    weights = 8 * sum(n * to_n for n, to_n in zip(own, shape, strict=True))  # of `axis_weights`, in float64
    check_room(
        num_frames * images + weights,
        f"{name}: {num_frames:,} frames of {_describe_size(own, spacing_mm)}, {_describe_size(shape, (target_mm,))} after resampling,",
        _COARSER,
    )


def _describe_size(shape: Sequence[int], spacing_mm: Sequence[float]) -> str:
    return f"{' x '.join(f'{n:,}' for n in shape)} voxels of {' x '.join(f'{mm:g}' for mm in spacing_mm)} mm"


def normalise(voxels: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Map [low, high] to [0, 1] in float32 and clip the rest; bounds given as tensors are broadcast."""
    return ((voxels.float() - low) / (high - low)).clamp_(0.0, 1.0)


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
    places = _sample_places(size, centre, scale)
    distance = (torch.arange(num_voxels, dtype=torch.float64) - places[:, None].clamp(0, num_voxels - 1)).abs()
    weights = (1 - distance / max(1.0, scale)).clamp_min(0)
    inside = _are_inside(places, num_voxels)
    weights = weights / weights.sum(1, keepdim=True) * inside[:, None]
    return weights.float(), inside


def _sample_places(size: int, centre: float, scale: float) -> Tensor:
    """Return the positions of `size` samples about a centre, in voxels (float64)."""
    return centre + (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * scale


def _are_inside(places: Tensor, num_voxels: int) -> Tensor:
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
    return _resample_to_cubic(voxels, centre, spacing_mm=spacing_mm, target_mm=target_mm, shape=(size, size, size))


def _resample_to_cubic(
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


def reference_of(scans: Scans) -> Volume:
    """Return a scan, or the first of a session, whose grid all have."""
    return scans if isinstance(scans, Volume) else next(iter(scans.values()))


def by_contrast(scans: Scans, preparation: Preparation) -> list[Volume | None]:
    """Return the volume of each channel of an image, in order; None: missing.

    Raises:
        RefusedScan: `no_contrast` if the contrast of a volume is not stated, is unknown, or none of them is there; names them.
        ValueError: if the volumes are on different grids.
    """
    names = preparation.contrasts
    if isinstance(scans, Volume):
        if names is not None and len(names) > 1:
            raise RefusedScan(
                "no_contrast",
                f"{scans.key} is one scan without the name of its contrast, the network reads {describe(names)}: name it, as in "
                f"{names[0]}={scans.key}.nii.gz, or in Python {{{names[0]!r}: scan}}",
            )
        return [scans]
    if unknown := [name for name in scans if name not in (names or ())]:
        raise RefusedScan(
            "no_contrast",
            f"the network never saw the contrast {', '.join(unknown)}, it reads {describe(names)}: leave it out, or name it as one of "
            "these, or use another network",
        )
    if not scans:
        raise RefusedScan("no_contrast", f"no scan of any contrast is given, the network reads {describe(names)}")
    if len({(volume.data.shape, volume.spacing_mm) for volume in scans.values()}) > 1:
        raise ValueError("the volumes of a session must be on one grid: see p2r.data.contrasts")
    return [scans.get(name) for name in names or ()]


def _stack(images: Sequence[Tensor | None]) -> Tensor:
    """Concatenate the channels (P, 1, *S) of an image; missing ones are zero."""
    if len(images) == 1 and images[0] is not None:
        return images[0]
    like = next(one for one in images if one is not None)
    check_room(len(images) * like.numel(), f"images of {len(images)} contrasts", _COARSER)
    return torch.cat([torch.zeros_like(like) if one is None else one for one in images], dim=1)


def frames_of(scans: Scans, *, preparation: Preparation, size: int | None) -> Frames:
    """Resample a volume, or those of a session, to cubic voxels.

    Args:
        scans: The scan, or the scans by contrast.
        preparation: Rules of the backbone.
        size: Edge of the central cube, usually `preparation.image_size`; None: the whole volume.

    Raises:
        RefusedScan: `not_3d` for a single slice; `constant` as `percentile_table`; `no_contrast` as `by_contrast`.
    """
    frames = [
        None if volume is None else _frames_of_volume(volume, preparation=preparation, size=size)
        for volume in by_contrast(scans, preparation)
    ]
    first = next(one for one in frames if one is not None)
    return replace(first, images=_stack([None if one is None else one.images for one in frames]))


def _frames_of_volume(volume: Volume, *, preparation: Preparation, size: int | None) -> Frames:
    own, spacing_mm, target_mm = volume.data.shape[:3], volume.spacing_mm, preparation.spacing_mm
    if 1 in own:
        raise RefusedScan(
            "not_3d",
            f"{volume.key} is a single slice of shape {list(own)}, but this network reads volumes: use one with dimensions: 2",
        )
    low, high = intensity_window(percentile_table(volume.data, name=volume.key), preparation.intensity_percentiles)
    shape = (size, size, size) if size is not None else cubic_shape(own, spacing_mm, target_mm=target_mm)
    _check_frames(volume.data.shape[3], own, shape, spacing_mm, target_mm=target_mm, name=volume.key)
    stored = torch.from_numpy(np.ascontiguousarray(np.moveaxis(volume.data, 3, 0), dtype=np.float32))
    images, inside = _resample_to_cubic(
        normalise(stored[:, None], low, high),  # (T, 1, x, y, z)
        [(n - 1) / 2 for n in own],
        spacing_mm=spacing_mm,
        target_mm=target_mm,
        shape=shape,
    )
    return Frames(images.contiguous(), inside.expand(len(images), *shape), low, high, own, spacing_mm)


def label_frames_of(labels: Volume, *, preparation: Preparation, size: int | None) -> Tensor:
    """Resample a label map to (T, X, Y, Z) int64, on the grid of `frames_of` for its scan; 0 outside."""
    own, spacing_mm, target_mm = labels.data.shape[:3], labels.spacing_mm, preparation.spacing_mm
    shape = (size, size, size) if size is not None else cubic_shape(own, spacing_mm, target_mm=target_mm)
    _check_frames(2 * labels.data.shape[3], own, shape, spacing_mm, target_mm=target_mm, name=labels.key)  # of int64
    maps = torch.from_numpy(np.ascontiguousarray(np.moveaxis(labels.data, 3, 0))).long()
    for axis in range(3):
        places = _sample_places(shape[axis], (own[axis] - 1) / 2, target_mm / spacing_mm[axis])
        nearest = places.add(0.5).floor().long().clamp(0, own[axis] - 1)
        outside = ~_are_inside(places, own[axis])
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
    """Turn stored slices (B, h, w) into images (B, 1, H, W) in [0, 1], and `inside` (B, H, W): `normalise`, then `to_grid`."""
    # Converted here because PyTorch has no arithmetic for uint16.
    stored = torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32))
    return to_grid(normalise(stored[:, None], *window), spacing_mm, target_mm=target_mm, size=size)


def planes_of(scans: Scans, *, preparation: Preparation, size: int | None) -> Planes:
    """Cut a volume, or those of a session, into images.

    Args:
        scans: The scan, or the scans by contrast.
        preparation: Rules of the backbone.
        size: Height and width of the images, usually `preparation.image_size`; None: the whole slices.

    Raises:
        RefusedScan: `constant` as `percentile_table`; `no_contrast` as `by_contrast`.
    """
    planes = [
        None if volume is None else _planes_of_volume(volume, preparation=preparation, size=size)
        for volume in by_contrast(scans, preparation)
    ]
    first = next(one for one in planes if one is not None)
    return replace(first, images=_stack([None if one is None else one.images for one in planes]))


def _planes_of_volume(volume: Volume, *, preparation: Preparation, size: int | None) -> Planes:
    axis = slice_axis(volume.spacing_mm, preparation.slice_axis, shape=volume.data.shape)
    window = intensity_window(percentile_table(volume.data, name=volume.key), preparation.intensity_percentiles)
    planes = volume_to_planes(volume.data, axis)  # (P, h, w)
    spacing = plane_spacing(volume.spacing_mm, axis)
    shape = (planes.shape[1], planes.shape[2])
    _check_planes(len(planes), shape, spacing, target_mm=preparation.spacing_mm, name=volume.key)
    images, inside = prepare(planes, window, spacing, target_mm=preparation.spacing_mm, size=size)
    return Planes(images, inside, axis, *window, shape, spacing, num_frames=volume.data.shape[3])


def label_planes_of(labels: Volume, *, preparation: Preparation, axis: int, size: int | None) -> Tensor:
    """Cut a label map into (P, H, W) int64, on the grid of `planes_of` for its scan."""
    planes = torch.from_numpy(volume_to_planes(labels.data, axis).astype(np.float32))[:, None]
    spacing = plane_spacing(labels.spacing_mm, axis)
    shape = (planes.shape[2], planes.shape[3])
    _check_planes(len(planes), shape, spacing, target_mm=preparation.spacing_mm, name=labels.key)
    resampled, _ = to_grid(planes, spacing, target_mm=preparation.spacing_mm, size=size, mode="nearest")
    return resampled[:, 0].long()


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
