"""A volume -> the same volume at another voxel size, for corpora with `ingest.resample_mm`.

Choices: the grid keeps its directions and its centre, so an oblique scan stays oblique. Where voxels grow, a Gaussian
first removes frequencies that the coarser grid cannot represent; its width matches the point spread of the two grids.
Interpolation is linear, which never leaves the range of the values. Integers are rounded back to integers.

Source: Cardoso et al., Scale factor point spread function matching, MICCAI 2015, for the Gaussian's width.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2r.data.volume import MAX_SCAN_MIB, Volume, voxels_sha256
from p2r.errors import RefusedScan

_FWHM_PER_SIGMA = 2 * math.sqrt(2 * math.log(2))
_SAME_SPACING = 1e-3


def resample(volume: Volume, spacing_mm: tuple[float, float, float], *, max_mib: float = MAX_SCAN_MIB) -> Volume:
    """Resample a volume to a voxel size along its axes (Right, Anterior, Superior), mm.

    Axes whose spacing is within 0.1 % of the requested one stay unchanged, and so does the axis of a single slice.
    Works frame by frame: in addition to both volumes, it takes 16 bytes per voxel of one frame.

    Raises:
        RefusedScan: `too_small` if fewer than two voxels would be left along an axis, `too_large` beyond `max_mib`.
    """
    factors = tuple(
        1.0 if size == 1 or abs(new / old - 1) < _SAME_SPACING else new / old
        for size, old, new in zip(volume.data.shape, volume.spacing_mm, spacing_mm, strict=False)
    )
    if factors == (1.0, 1.0, 1.0):
        return volume
    shape = tuple(round(size / factor) for size, factor in zip(volume.data.shape[:3], factors, strict=True))
    if any(size < 2 <= before for size, before in zip(shape, volume.data.shape, strict=False)):
        raise RefusedScan("too_small", f"{volume.key} has {list(shape)} voxels after resampling to {spacing_mm} mm")
    num_mib = math.prod(shape) * volume.data.shape[3] * volume.data.itemsize / 2**20
    if num_mib > max_mib:
        raise RefusedScan(
            "too_large",
            f"{volume.key} has {list(shape)} voxels, {num_mib:.0f} MiB, after resampling to {spacing_mm} mm; "
            f"ingest.max_scan_mib is {max_mib:g}",
        )
    data = np.empty((*shape, volume.data.shape[3]), volume.data.dtype)
    # Both grids have the same centre: voxel i of the new grid is at factor * i + offset of the old one.
    offset = [
        (old - 1) / 2 - factor * (new - 1) / 2
        for old, new, factor in zip(volume.data.shape[:3], shape, factors, strict=True)
    ]
    for frame in range(data.shape[3]):
        data[..., frame] = resample_frame(volume.data[..., frame], factors, offset, shape, data.dtype, factors=factors)
    new_spacing = tuple(old * factor for old, factor in zip(volume.spacing_mm, factors, strict=True))
    return replace(
        volume,
        data=data,
        affine=_resampled_affine(volume, (new_spacing[0], new_spacing[1], new_spacing[2]), shape),
        spacing_mm=(new_spacing[0], new_spacing[1], new_spacing[2]),
        resampled_from_mm=volume.spacing_mm,
        acquired_sha256=voxels_sha256(volume),
    )


def resample_frame(
    frame: NDArray[Any],
    matrix: tuple[float, ...] | NDArray[np.float64],
    offset: Sequence[float] | NDArray[np.float64],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    factors: tuple[float, ...],
) -> NDArray[np.float32]:
    """Resample one frame.

    Args:
        frame: (X, Y, Z).
        matrix: (3,) or (3, 3) from voxels of the new grid to voxels of the frame.
        offset: (3,) position of the new grid's first voxel.
        shape: Shape of the new grid.
        dtype: Integers are rounded.
        factors: Voxels of the frame along each of its axes per voxel of the new grid.
    """
    from scipy import ndimage  # imported here: it takes a second, and most jobs keep the acquired grid

    voxels: NDArray[np.float32] = frame.astype(np.float32)
    sigma = [math.sqrt(max(factor**2 - 1, 0)) / _FWHM_PER_SIGMA for factor in factors]
    if any(sigma):
        voxels = ndimage.gaussian_filter(voxels, sigma, mode="nearest")
    voxels = ndimage.affine_transform(voxels, matrix, offset, shape, order=1, mode="nearest")
    if dtype.kind in "iu":
        np.rint(voxels, out=voxels)
    return voxels


def _resampled_affine(
    volume: Volume, spacing_mm: tuple[float, float, float], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    directions = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing_mm
    centre = volume.affine @ [*((np.array(volume.data.shape[:3]) - 1) / 2), 1.0]
    affine[:3, 3] = centre[:3] - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine
