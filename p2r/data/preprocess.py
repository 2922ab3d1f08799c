"""A volume -> the network's input images, and maps of the network -> the volume's grid. Pure functions.

Choices: slices are perpendicular to the axis with the largest spacing, where in-plane resolution is best. Intensities are
normalised between two percentiles of the whole volume, so that slices of one scan stay comparable. Slices are resampled to
one pixel size *before* they are cropped or padded about their centre, so that a pixel has the same length in every scan.
Training and inference use the same code, so the backbone always gets the input that it was trained on. A network that reads
volumes gets cubic voxels about the same centre, independent of the slice axis. A network of several contrasts gets the volumes
of a session, all on one grid, as channels; a missing contrast is a channel of zeros.

Shapes: X Y Z T a volume; C contrasts; P = T * Z slices, frame by frame. h w voxels of a slice; H W its pixels after resampling; where
X Y Z are voxels after resampling, x y z are the volume's own voxels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.contrasts import describe
from p2r.data.grids import (
    COARSER,
    are_inside,
    check_frames,
    check_planes,
    check_room,
    cubic_shape,
    resample_to_cubic,
    sample_places,
    to_grid,
)
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
from p2r.errors import RefusedScan

Scans = Volume | Mapping[str, Volume]
"""A scan, or the scans of a session by contrast, all on one grid; missing contrasts are left out."""


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


def normalise(voxels: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Map [low, high] to [0, 1] in float32 and clip the rest; bounds given as tensors are broadcast."""
    return ((voxels.float() - low) / (high - low)).clamp_(0.0, 1.0)


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
                f"{scans.key} is one scan without the name of its contrast, the network reads {describe(names)}: name its contrast, as in "
                f"{names[0]}=scan.nii.gz, or in Python {{{names[0]!r}: scan}}",
            )
        return [scans]
    check_names(list(scans), preparation)
    if not scans:
        raise RefusedScan("no_contrast", f"no scan of any contrast is given, the network reads {describe(names)}")
    if len({(volume.data.shape, volume.spacing_mm) for volume in scans.values()}) > 1:
        raise ValueError("the volumes of a session must be on one grid: see p2r.data.contrasts")
    return [scans.get(name) for name in names or ()]


def check_names(contrasts: Sequence[str], preparation: Preparation) -> None:
    """Refuse names of contrasts that a network does not read.

    Raises:
        RefusedScan: `no_contrast`; names them.
    """
    names = preparation.contrasts
    if contrasts and names is None:
        raise RefusedScan(
            "no_contrast",
            f"the network reads one contrast without a name, not {', '.join(contrasts)}: give one scan without a name",
        )
    if unknown := [name for name in contrasts if name not in (names or ())]:
        raise RefusedScan(
            "no_contrast",
            f"the network never saw the contrast {', '.join(unknown)}, it reads {describe(names)}: leave it out, or name it as one of "
            "these, or use another network",
        )


def _stack(images: Sequence[Tensor | None]) -> Tensor:
    """Concatenate the channels (P, 1, *S) of an image; missing ones are zero."""
    if len(images) == 1 and images[0] is not None:
        return images[0]
    like = next(one for one in images if one is not None)
    check_room(len(images) * like.numel(), f"images of {len(images)} contrasts", COARSER)
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
    check_frames(volume.data.shape[3], own, shape, spacing_mm, target_mm=target_mm, name=volume.key)
    stored = torch.from_numpy(np.ascontiguousarray(np.moveaxis(volume.data, 3, 0), dtype=np.float32))
    images, inside = resample_to_cubic(
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
    check_frames(2 * labels.data.shape[3], own, shape, spacing_mm, target_mm=target_mm, name=labels.key)  # of int64
    maps = torch.from_numpy(np.ascontiguousarray(np.moveaxis(labels.data, 3, 0))).long()
    for axis in range(3):
        places = sample_places(shape[axis], (own[axis] - 1) / 2, target_mm / spacing_mm[axis])
        nearest = places.add(0.5).floor().long().clamp(0, own[axis] - 1)
        outside = ~are_inside(places, own[axis])
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
    check_planes(len(planes), shape, spacing, target_mm=preparation.spacing_mm, name=volume.key)
    images, inside = prepare(planes, window, spacing, target_mm=preparation.spacing_mm, size=size)
    return Planes(images, inside, axis, *window, shape, spacing, num_frames=volume.data.shape[3])


def label_planes_of(labels: Volume, *, preparation: Preparation, axis: int, size: int | None) -> Tensor:
    """Cut a label map into (P, H, W) int64, on the grid of `planes_of` for its scan."""
    planes = torch.from_numpy(volume_to_planes(labels.data, axis).astype(np.float32))[:, None]
    spacing = plane_spacing(labels.spacing_mm, axis)
    shape = (planes.shape[2], planes.shape[3])
    check_planes(len(planes), shape, spacing, target_mm=preparation.spacing_mm, name=labels.key)
    resampled, _ = to_grid(planes, spacing, target_mm=preparation.spacing_mm, size=size, mode="nearest")
    return resampled[:, 0].long()
