"""Unlabelled and labelled scans -> warnings about unlabelled scans of another spacing or another contrast.

Such scans are not refused: every scan is resampled to the backbone's pixel size and normalised between its own percentiles.
With one labelled patient, the variety of unlabelled scans may even be their benefit. But a localiser or a scan of another
sequence gives pseudo-labels of anatomy that the labelled patients never show, so a warning names it.

The contrast of a scan is the distribution of its intensities after preparation. The distance between two scans is the mean
difference of their quantiles (Wasserstein distance, from 0 to 1). A scan is odd if its distance to the nearest labelled scan is
at least `_MIN_DISTANCE`, and `_MIN_RATIO` times the median of all unlabelled scans; if the median itself reaches
`_MIN_DISTANCE`, most scans are odd, and the ratio is left out. On ACDC, distances to one labelled patient are at most 0.21; a
scan with inverted intensities has 0.63.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from p2r.data.preprocess import Frames, Planes
from p2r.evaluate.splits import join_few

_SPACING_FACTOR = 2.0  # beyond the range of labelled spacings
_MIN_RATIO = 5.0
_MIN_DISTANCE = 0.25
_STRIDE = 7  # every seventh pixel suffices for quantiles, in a seventh of the time
_ADVICE = "their pseudo-labels may be poor, remove them from the task if they do not belong to it"
_QUANTILES = np.linspace(0.01, 0.99, 50)


def odd_scans(labelled: Sequence[Planes | Frames], unlabelled: Mapping[str, Planes | Frames]) -> list[str]:
    """Return a warning for each property in which unlabelled scans differ from all labelled ones.

    Args:
        labelled: Images of the labelled scans.
        unlabelled: Images of the unlabelled scans, by name.
    """
    warnings = []
    spacings = np.array([_spacing_range(scan.spacing_mm) for scan in labelled])
    least, most = spacings.min() / _SPACING_FACTOR, spacings.max() * _SPACING_FACTOR
    coarse = [
        name
        for name, scan in unlabelled.items()
        if min(scan.spacing_mm) < least - 1e-6 or max(scan.spacing_mm) > most + 1e-6
    ]
    if coarse:
        sizes = " x ".join(f"{mm:g}" for mm in unlabelled[coarse[0]].spacing_mm)
        ours = " to ".join(dict.fromkeys(f"{mm:g}" for mm in (spacings.min(), spacings.max())))
        warnings.append(
            f"{_count_scans(coarse)} another voxel size than the labelled ones, such as {sizes} mm instead of {ours} mm: "
            f"{join_few(coarse)}; {_ADVICE}"
        )
    distances = _measure_distances(labelled, unlabelled)
    median = float(np.median(list(distances.values())))
    limit = _MIN_DISTANCE if median >= _MIN_DISTANCE else max(_MIN_DISTANCE, _MIN_RATIO * median)
    if odd := [name for name, distance in distances.items() if distance >= limit]:
        warnings.append(
            f"{_count_scans(odd)} other intensities than the labelled ones, like another contrast: {join_few(odd)}; {_ADVICE}"
        )
    return warnings


def _count_scans(names: Sequence[str]) -> str:
    return f"{len(names)} unlabelled scan{' has' if len(names) == 1 else 's have'}"


def _spacing_range(spacing_mm: Sequence[float]) -> tuple[float, float]:
    return min(spacing_mm), max(spacing_mm)


def _measure_distances(
    labelled: Sequence[Planes | Frames], unlabelled: Mapping[str, Planes | Frames]
) -> dict[str, float]:
    """Return the distance of each unlabelled scan to the nearest labelled one."""
    ours = [_compute_quantiles(scan) for scan in labelled]
    return {
        name: min(_distance(found, other) for other in ours)
        for name, scan in unlabelled.items()
        for found in [_compute_quantiles(scan)]
    }


def _distance(found: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the distance of two scans: of several contrasts, the largest of those that both have; 0 without such."""
    apart = np.abs(found - other).mean(1)
    return float(np.nanmax(apart)) if not np.isnan(apart).all() else 0.0


def _compute_quantiles(scan: Planes | Frames) -> NDArray[np.float64]:
    """Return the quantiles (C, number of quantiles) of each contrast; NaN for missing ones."""
    found = []
    for channel in range(scan.images.shape[1]):
        values = scan.images[:, channel][scan.inside][::_STRIDE].numpy()
        present = values[values > 0]
        is_missing = scan.images.shape[1] > 1 and not present.size
        nothing = np.full(1, np.nan if is_missing else 0.0)
        found.append(np.quantile(present if present.size else nothing, _QUANTILES))
    return np.array(found)
