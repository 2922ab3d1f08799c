"""The contrasts of a session -> the grid of a reference. Positions come from the headers; nothing is registered.

Volumes whose grids agree stay as they are. Others are resampled by the affines of both headers, with the filter of
`resample`. Voxels that a contrast does not cover get its minimum, and are described by `coverage`, so that training never
compares them.

Letters: X Y Z voxels of the reference; T frames.
"""

from dataclasses import dataclass, replace

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from p2r.data.index import covered_voxels
from p2r.data.resample import resample_frame
from p2r.data.volume import Volume, voxels_sha256
from p2r.errors import RefusedScan

_SAME_GRID_VOXELS = 0.05  # largest distance between corresponding corners
_SAME_SPACING = 1e-3
_COPY_CORRELATION = 0.99999
_MAX_COMPARED = 1 << 18


@dataclass(frozen=True)
class Aligned:
    """A volume on the grid of its session's reference."""

    volume: Volume
    coverage: tuple[float, ...] | None
    """See `IndexRow.coverage`."""
    covered: NDArray[np.bool_] | None
    """(X, Y, Z): voxels inside the scan as acquired; None: all."""
    covered_fraction: float
    is_resampled: bool


def align(
    volume: Volume,
    reference: Volume,
    *,
    min_coverage: float,
    contrast: str,
    setting: str = "ingest.sessions.min_coverage",
) -> Aligned:
    """Resample a volume to the grid of another, where their grids differ.

    Args:
        volume: A contrast of a session.
        reference: The contrast whose grid is kept.
        min_coverage: Smallest fraction of the reference's voxels that the volume must cover.
        contrast: Name of the reference's contrast, for messages.
        setting: Name of `min_coverage`, for messages.

    Raises:
        RefusedScan: `other_frames` or `other_extent`.
    """
    if volume.data.shape[3] != reference.data.shape[3]:
        raise RefusedScan(
            "other_frames",
            f"{volume.key} has {volume.data.shape[3]} frames, {contrast} of its session has {reference.data.shape[3]}; frames are not "
            "interpolated. If its fourth axis holds contrasts, not time, save a file of each contrast; for a corpus, "
            "set ingest.sessions.fourth_axis: contrasts",
        )
    if is_same_grid(volume, reference):
        return on_own_grid(replace(volume, affine=reference.affine, spacing_mm=reference.spacing_mm))
    if not (_has_position(volume) and _has_position(reference)):
        raise RefusedScan(
            "other_extent",
            f"{volume.key} has {_describe(volume)}, {contrast} of its session {_describe(reference)}, and their headers state no "
            "positions to resample them by; bring them to one grid, or set their sforms",
        )
    to_own = np.linalg.inv(volume.affine) @ reference.affine  # voxel of the reference -> voxel of the volume
    half = np.array(volume.data.shape[:3]) / 2
    coverage = to_own[:3] / half[:, None]
    coverage[:, 3] -= (half - 0.5) / half
    x, y, z = reference.data.shape[:3]
    covered = covered_voxels(coverage, (slice(0, x), slice(0, y), slice(0, z)))
    fraction = float(covered.mean())
    if fraction < min_coverage:
        raise RefusedScan(
            "other_extent",
            f"{volume.key} covers {fraction:.0%} of the voxels of {contrast} by the headers' positions, {setting} is "
            f"{min_coverage:.0%}; nothing is registered: register the scans of this session, or leave this one out",
        )
    is_whole = bool(covered.all())
    return Aligned(
        _resample_to(volume, reference, to_own, covered),
        None if is_whole else tuple(coverage.reshape(-1).tolist()),
        None if is_whole else covered,
        fraction,
        is_resampled=True,
    )


def on_own_grid(volume: Volume) -> Aligned:
    """Return a volume that stays as it is."""
    return Aligned(volume, None, None, 1.0, is_resampled=False)


def is_same_grid(volume: Volume, other: Volume) -> bool:
    """Return whether two volumes have the same voxels, up to rounding; without positions, the same shape, voxel size and axes."""
    if volume.data.shape[:3] != other.data.shape[:3]:
        return False
    if not (_has_position(volume) and _has_position(other)):
        # One file with a position and one without may have been turned to RAS in different ways.
        axes, other_axes = (io_orientation(one.source_affine) for one in (volume, other))
        is_same_spacing = np.allclose(volume.spacing_mm, other.spacing_mm, rtol=_SAME_SPACING)
        return bool(is_same_spacing and np.array_equal(axes, other_axes))
    shape = np.array(volume.data.shape[:3]) - 1
    corners = np.array([[*(np.array(corner) * shape), 1] for corner in np.ndindex(2, 2, 2)], dtype=np.float64)
    apart = np.linalg.inv(other.affine) @ volume.affine @ corners.T - corners.T
    return bool(np.abs(apart[:3]).max() <= _SAME_GRID_VOXELS)


def find_copy(volume: Volume, other: Volume, covered: NDArray[np.bool_] | None = None) -> bool:
    """Return whether two contrasts on one grid are the same image up to a linear change of intensities."""
    kept = np.ones(volume.data.shape[:3], np.bool_) if covered is None else covered
    pair = [one.data[..., 0][kept] for one in (volume, other)]
    stride = -(-pair[0].size // _MAX_COMPARED)
    first, second = (values[::stride].astype(np.float64) for values in pair)
    if first.size < 2 or not (first.std() and second.std()):
        return False
    return bool(np.corrcoef(first, second)[0, 1] >= _COPY_CORRELATION)


def _resample_to(volume: Volume, reference: Volume, to_own: NDArray[np.float64], covered: NDArray[np.bool_]) -> Volume:
    shape = reference.data.shape[:3]
    factors = tuple(float(step) for step in np.abs(to_own[:3, :3]).max(axis=1))  # own voxels per voxel of the reference
    data = np.empty((*shape, volume.data.shape[3]), volume.data.dtype)
    for frame in range(data.shape[3]):
        voxels = resample_frame(
            volume.data[..., frame], to_own[:3, :3], to_own[:3, 3], shape, data.dtype, factors=factors
        )
        voxels[~covered] = volume.data.min()
        data[..., frame] = voxels
    return replace(
        volume,
        data=data,
        affine=reference.affine,
        spacing_mm=reference.spacing_mm,
        resampled_from_mm=volume.spacing_mm,
        acquired_sha256=volume.acquired_sha256 or voxels_sha256(volume),
    )


def _has_position(volume: Volume) -> bool:
    """Return whether a header states a position: a form code, and an affine of the stated voxel size."""
    codes = [volume.placement.get(name, (1,))[0] for name in ("sform_code", "qform_code")]
    sizes = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return any(code > 0 for code in codes) and bool(np.allclose(sizes, volume.spacing_mm, rtol=_SAME_SPACING))


def _describe(volume: Volume) -> str:
    shape, spacing = " x ".join(map(str, volume.data.shape[:3])), " x ".join(f"{mm:.3g}" for mm in volume.spacing_mm)
    return f"{shape} voxels of {spacing} mm"
