"""The scans of a session by contrast -> volumes on one grid, or a refusal by name. Used where a scan is read for a model.

The grid is that of a reference, the first scan by default. Scans whose grid agrees stay as they are; others are resampled to
it by their headers' positions (`alignment`). Nothing is registered.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from p2r.data.alignment import align, find_copy
from p2r.data.volume import Volume, read_volume
from p2r.errors import RefusedScan

MIN_COVERAGE = 0.9
"""Default of the smallest fraction of the reference's voxels that each scan must cover."""


def read_contrasts(paths: Mapping[str, str | Path], *, min_coverage: float = MIN_COVERAGE) -> dict[str, Volume]:
    """Read the scans of a session, and bring them to the grid of the first.

    Raises:
        RefusedScan: as `read_volume` and `on_one_grid`.
    """
    return on_one_grid({name: read_volume(path) for name, path in paths.items()}, min_coverage=min_coverage)


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
    name = next(iter(volumes)) if reference is None else reference
    aligned = {
        contrast: volume
        if volume is volumes[name]
        else align(volume, volumes[name], min_coverage=min_coverage, contrast=name, setting="min_coverage").volume
        for contrast, volume in volumes.items()
    }
    for first, second in combinations(aligned, 2):
        if find_copy(aligned[first], aligned[second]):
            raise RefusedScan(
                "copy",
                f"{aligned[first].key} and {aligned[second].key} are one image, given as {first} and as {second}: leave the one out "
                "whose contrast it is not",
            )
    return aligned
