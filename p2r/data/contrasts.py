"""The scans of a session by contrast -> volumes on one grid, or a refusal by name. Used where a scan is read for a model.

The grid is the one of a reference, by default of the first scan. Scans whose grid agrees stay as they are; others are resampled to
it by their headers' positions (`alignment`). Nothing is registered. A file that is given for several contrasts holds them along its
fourth axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from p2r.data.accepted import ScanLike, volume_from
from p2r.data.alignment import align, find_copy
from p2r.data.preprocess import Scans
from p2r.data.volume import Volume, read_volume
from p2r.errors import RefusedScan

MIN_COVERAGE = 0.9
"""Default of the smallest fraction of the reference's voxels that each scan must cover."""


Given = TypeVar("Given")

ScansLike = ScanLike | Mapping[str, ScanLike]
"""A scan in any form, or scans by contrast, as in `{"flair": "flair.nii.gz", "t1": volume}`."""


def scans_from(
    scan: ScansLike, *, spacing_mm: float | Sequence[float] | None = None, affine: ArrayLike | None = None
) -> Scans:
    """Convert a scan, or scans by contrast, of any accepted form; several are brought to the grid of the first.

    Raises:
        InputError: as `volume_from`.
        RefusedScan: as `volume_from`, `split_contrasts` and `on_one_grid`.
    """
    convert = partial(volume_from, spacing_mm=spacing_mm, affine=affine)
    if isinstance(scan, Mapping) and not hasattr(scan, "affine"):  # images of TorchIO are mappings, too
        return on_one_grid(volumes_by_contrast(scan, convert))
    return convert(scan)


def read_contrasts(paths: Mapping[str, str | Path], *, min_coverage: float = MIN_COVERAGE) -> dict[str, Volume]:
    """Read the scans of a session, and bring them to the grid of the first.

    Raises:
        RefusedScan: as `read_volume`, `split_contrasts` and `on_one_grid`.
    """
    return on_one_grid(volumes_by_contrast(paths, read_volume), min_coverage=min_coverage)


def volumes_by_contrast(scans: Mapping[str, Given], read: Callable[[Given], Volume]) -> dict[str, Volume]:
    """Read each scan of a session once. A file that is given for several contrasts holds them along its fourth axis, in this order.

    Raises:
        RefusedScan: as `read` and `split_contrasts`.
    """
    names: dict[str | int, list[str]] = {}
    for name, scan in scans.items():
        names.setdefault(str(scan) if isinstance(scan, str | Path) else id(scan), []).append(name)
    found: dict[str, Volume] = {}
    for first, *others in names.values():
        volume = read(scans[first])
        found |= split_contrasts(volume, [first, *others]) if others else {first: volume}
    return {name: found[name] for name in scans}


def split_contrasts(volume: Volume, names: Sequence[str]) -> dict[str, Volume]:
    """Return the images along the fourth axis of a volume, (X, Y, Z, 1) each, by the names of their contrasts.

    Raises:
        RefusedScan: `other_frames` if there are not as many images as names.
    """
    number = volume.data.shape[3]
    if number != len(names):
        raise RefusedScan(
            "other_frames",
            f"{volume.key} has {number} image{'s' * (number > 1)} along its fourth axis, which {len(names)} contrasts are to share, "
            f"{', '.join(names)}: name as many as it has, in their order, or give each contrast its own file",
        )
    return {
        name: replace(volume, data=volume.data[..., index, None].copy(), key=f"{volume.key}_{name}", frames=None)
        for index, name in enumerate(names)
    }


def on_one_grid(
    volumes: Mapping[str, Volume], *, reference: str | None = None, min_coverage: float = MIN_COVERAGE
) -> dict[str, Volume]:
    """Bring the volumes of a session to one grid.

    Args:
        volumes: Volumes by contrast.
        reference: Contrast whose grid is kept; None: the first.
        min_coverage: Smallest fraction of the reference's voxels that each volume must cover.

    Raises:
        RefusedScan: `other_extent` or `other_frames` as `align`; `copy` if two contrasts are the same image.
    """
    if not volumes:
        raise RefusedScan("no_contrast", "no scan of any contrast is given: give at least one")
    name = next(iter(volumes)) if reference is None else reference
    aligned = {
        contrast: volume
        if volume is volumes[name]
        else align(volume, volumes[name], min_coverage=min_coverage, contrast=name, setting="min_coverage").volume
        for contrast, volume in volumes.items()
    }
    for first, second in combinations(aligned, 2):
        # Equal voxels are a copy even if the headers state other positions.
        is_same = np.array_equal(volumes[first].data, volumes[second].data)
        if is_same or find_copy(aligned[first], aligned[second]):
            raise RefusedScan(
                "copy",
                f"{aligned[first].key} and {aligned[second].key} are one image, given as {first} and as {second}: leave the one out "
                "whose contrast it is not",
            )
    return aligned
