"""Scans with their references, one after the other -> a refusal, where two of one grid were mixed up.

An organ differs from what surrounds it, so its own label map explains more of an image's intensities than another patient's.
Two pairs are refused if, with their label maps exchanged, classes explain clearly more of the variance than as they are.

Measured on scans of one shape (two different patients): of ACDC all 464 pairs that were exchanged are found, of the
hippocampus, whose label maps follow intensities less, 10 of 14; of the true pairs none is refused, on either.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2r.errors import DataError
from p2r.evaluate.tasks import LabelledScan

_MARGIN = 0.01  # of the sum of both shares; the true pairs of both data sets stay below 0.007
_BORDER = 5  # voxels around the labels
_MAX_BYTES = 2**30  # of voxels that are kept to be compared with later ones
_MAX_PARTNERS = 32  # per scan, so that many scans of one grid take minutes and not hours


@dataclass(frozen=True)
class _Pair:
    name: str
    image: NDArray[np.generic]
    labels: NDArray[np.int16]
    box: tuple[slice, ...]
    share: float
    """Of the image's variance in the box, explained by the labels' classes."""

    @property
    def num_bytes(self) -> int:
        return self.image.nbytes + self.labels.nbytes


class MixUps:
    """Compares each scan with those of its shape that it has seen before, the latest first."""

    def __init__(self, task_name: str) -> None:
        self._task_name = task_name
        self._seen: OrderedDict[str, _Pair] = OrderedDict()
        self._gain, self._found = _MARGIN, ""

    def see(self, scan: LabelledScan) -> None:
        """Compare an image and its label map with earlier ones."""
        image, labels = scan.volume.data, scan.labels.data
        if not labels.any():
            return
        box = _box(labels)
        mine = _Pair(scan.scan.label.name, image, labels, box, _explained(image, labels, box))
        partners = [other for other in reversed(self._seen.values()) if other.image.shape == image.shape]
        for other in partners[:_MAX_PARTNERS]:
            exchanged = _explained(image, other.labels, other.box), _explained(other.image, labels, box)
            gain = sum(exchanged) - mine.share - other.share
            if gain > self._gain:
                self._gain = gain
                self._found = (
                    f"{other.name} and {mine.name} fit each other's images better than their own (exchanged, their classes explain "
                    f"{exchanged[1]:.0%} and {exchanged[0]:.0%} of the intensities' variance about them, as they are {other.share:.0%} and "
                    f"{mine.share:.0%})"
                )
        self._seen[scan.scan.key] = mine
        while sum(kept.num_bytes for kept in self._seen.values()) > _MAX_BYTES:
            self._seen.popitem(last=False)

    def check(self) -> None:
        """Refuse, once all scans were seen.

        A label map that lies with a wrong image seems mixed up with several others; the two that gain most are named.

        Raises:
            DataError: naming two label maps that fit each other's images better than their own.
        """
        if self._found:
            raise DataError(
                f"task {self._task_name}: {self._found}: the files of the two were mixed up; restore the pairs, or say find_mix_ups: false "
                "in the task, where labels do not follow what is seen"
            )


def _box(labels: NDArray[np.int16]) -> tuple[slice, ...]:
    """The voxels (X, Y, Z) of any frame that are labelled, and some around them."""
    places = np.nonzero(labels.any(axis=3))
    return tuple(slice(max(0, int(found.min()) - _BORDER), int(found.max()) + 1 + _BORDER) for found in places)


def _explained(image: NDArray[np.generic], labels: NDArray[np.int16], box: tuple[slice, ...]) -> float:
    """Return the share, in [0, 1], of the image's variance in a box that lies between the classes' means (eta squared)."""
    values, classes = image[box].ravel().astype(np.float64), labels[box].ravel()
    variance = float(values.var())
    if variance == 0:
        return 0.0
    counts, sums = np.bincount(classes), np.bincount(classes, values)
    is_there = counts > 0
    between = float((sums[is_there] ** 2 / counts[is_there]).sum()) / len(values) - float(values.mean()) ** 2
    return between / variance
