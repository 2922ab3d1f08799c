"""Scans with their references, one after another -> a refusal if two label maps of the same grid were mixed up.

An organ differs in intensity from its surroundings. So its own label map explains more of an image's intensities than the map
of another patient. Two pairs are refused if exchanging their label maps explains clearly more of the variance.

Measured on scans of equal shape (two different patients): all 464 exchanged pairs of ACDC are found, and 10 of 14 of the
hippocampus, whose label maps follow intensities less. No true pair is refused in either data set.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2r.errors import DataError
from p2r.evaluate.tasks import LabelledScan

_MIN_GAIN = 0.01  # in the sum of both explained fractions; true pairs of both data sets stay below 0.007
_BORDER = 5  # voxels around the labels
_MAX_BYTES = 2**30  # of voxels kept for comparison with later scans
_MAX_PARTNERS = 32  # per scan, so that many scans of one grid take minutes, not hours


@dataclass(frozen=True)
class _Pair:
    name: str
    image: NDArray[np.generic]
    labels: NDArray[np.int16]
    box: tuple[slice, ...]
    explained: float
    """Fraction of the image's variance in the box that the labels explain."""

    @property
    def num_bytes(self) -> int:
        return self.image.nbytes + self.labels.nbytes


class MixUps:
    """Comparison of each scan with earlier scans of the same shape, the latest first."""

    def __init__(self, task_name: str) -> None:
        self._task_name = task_name
        self._seen: OrderedDict[str, _Pair] = OrderedDict()
        self._gain, self._found = _MIN_GAIN, ""

    def see(self, scan: LabelledScan) -> None:
        """Compare an image and its label map with earlier pairs."""
        image, labels = scan.volume.data, scan.labels.data
        if not labels.any():
            return
        box = _find_box(labels)
        mine = _Pair(scan.scan.label.name, image, labels, box, _explained_fraction(image, labels, box))
        partners = [other for other in reversed(self._seen.values()) if other.image.shape == image.shape]
        for other in partners[:_MAX_PARTNERS]:
            exchanged = (
                _explained_fraction(image, other.labels, other.box),
                _explained_fraction(other.image, labels, box),
            )
            gain = sum(exchanged) - mine.explained - other.explained
            if gain > self._gain:
                self._gain = gain
                self._found = (
                    f"{other.name} and {mine.name} fit each other's images better than their own (exchanged, their classes explain "
                    f"{exchanged[1]:.0%} and {exchanged[0]:.0%} of the intensities' variance around them, instead of {other.explained:.0%} "
                    f"and {mine.explained:.0%})"
                )
        self._seen[scan.scan.key] = mine
        while sum(kept.num_bytes for kept in self._seen.values()) > _MAX_BYTES:
            self._seen.popitem(last=False)

    def check(self) -> None:
        """Refuse the largest gain found, after all scans were seen.

        A label map with a wrong image may appear mixed up with several others; only the pair with the largest gain is named.

        Raises:
            DataError: naming two label maps that fit each other's images better than their own.
        """
        if self._found:
            raise DataError(
                f"task {self._task_name}: {self._found}: their files were mixed up; restore the pairs, or set find_mix_ups: false "
                "in the task if its labels do not follow intensities"
            )


def _find_box(labels: NDArray[np.int16]) -> tuple[slice, ...]:
    """Return the box (X, Y, Z) around the labelled voxels of all frames, with a margin."""
    places = np.nonzero(labels.any(axis=3))
    return tuple(slice(max(0, int(found.min()) - _BORDER), int(found.max()) + 1 + _BORDER) for found in places)


def _explained_fraction(image: NDArray[np.generic], labels: NDArray[np.int16], box: tuple[slice, ...]) -> float:
    """Return the fraction of the image's variance in a box that is between the classes' means (eta squared)."""
    values, classes = image[box].ravel().astype(np.float64), labels[box].ravel()
    variance = float(values.var())
    if variance == 0:
        return 0.0
    counts, sums = np.bincount(classes), np.bincount(classes, values)
    present = counts > 0
    between = float((sums[present] ** 2 / counts[present]).sum()) / len(values) - float(values.mean()) ** 2
    return between / variance
