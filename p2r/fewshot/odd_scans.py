"""Unlabelled scans beside labelled ones -> warnings about scans of another spacing or another contrast.

Every scan is resampled to the backbone's pixel size and stretched between its own percentiles, so that neither is refused: with one
labelled patient, an unlabelled scan that differs may be the reason to use it. But a localiser or a scan of another sequence in the folder
gives pseudo-labels of anatomy that the labelled patients never show, so it is named.

A scan's contrast is the distribution of its intensities after preparation, and its distance to another is the mean difference of their
quantiles (Wasserstein's, from 0 to 1). It is odd if it is `_FARTHER` times as far from the nearest labelled scan as half of the unlabelled
scans are, and at least `_LEAST_DISTANCE`. On ACDC, distances to one labelled patient are 0.21 at most, a scan of inverted intensities has
0.63.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from p2r.data.preprocess import Frames, Planes
from p2r.evaluate.task_files import few

_LARGER = 2.0  # times the largest labelled spacing, or smaller than the smallest
_FARTHER = 5.0
_LEAST_DISTANCE = 0.25
_EVERY = 7  # pixel is read: enough for quantiles, in a seventh of the time
_ADVICE = "pseudo-labels of them may be worth little, take them out of the task if they do not belong"
_QUANTILES = np.linspace(0.01, 0.99, 50)


def odd_scans(labelled: Sequence[Planes | Frames], unlabelled: Mapping[str, Planes | Frames]) -> list[str]:
    """Return a warning for each way in which unlabelled scans are unlike all labelled ones.

    Args:
        labelled: Images of the labelled scans.
        unlabelled: Images of the unlabelled scans, by name.
    """
    warnings = []
    spacings = np.array([_range(scan.spacing_mm) for scan in labelled])
    least, most = spacings.min() / _LARGER, spacings.max() * _LARGER
    coarse = [
        name
        for name, scan in unlabelled.items()
        if min(scan.spacing_mm) < least - 1e-6 or max(scan.spacing_mm) > most + 1e-6
    ]
    if coarse:
        sizes = " x ".join(f"{mm:g}" for mm in unlabelled[coarse[0]].spacing_mm)
        warnings.append(
            f"{_scans(coarse)} of another voxel size than the labelled ones, such as {sizes} mm against {spacings.min():g} to "
            f"{spacings.max():g} mm: {few(coarse)}; {_ADVICE}"
        )
    distances = _distances(labelled, unlabelled)
    limit = max(_LEAST_DISTANCE, _FARTHER * float(np.median(list(distances.values()))))
    if odd := [name for name, distance in distances.items() if distance >= limit]:
        warnings.append(
            f"{_scans(odd)} of other intensities than the labelled ones, as if of another contrast: {few(odd)}; {_ADVICE}"
        )
    return warnings


def _scans(names: Sequence[str]) -> str:
    return f"{len(names)} unlabelled scan{' is' if len(names) == 1 else 's are'}"


def _range(spacing_mm: Sequence[float]) -> tuple[float, float]:
    return min(spacing_mm), max(spacing_mm)


def _distances(labelled: Sequence[Planes | Frames], unlabelled: Mapping[str, Planes | Frames]) -> dict[str, float]:
    """Return how far each unlabelled scan is from the nearest labelled one."""
    ours = [_quantiles(scan) for scan in labelled]
    return {
        name: min(float(np.abs(found - other).mean()) for other in ours)
        for name, scan in unlabelled.items()
        for found in [_quantiles(scan)]
    }


def _quantiles(scan: Planes | Frames) -> NDArray[np.float64]:
    values = scan.images[:, 0][scan.inside][::_EVERY].numpy()
    present = values[values > 0]
    found: NDArray[np.float64] = np.quantile(present if present.size else np.zeros(1), _QUANTILES)
    return found
