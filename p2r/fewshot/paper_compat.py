"""The evaluation protocol of the released code of Pix2Rep, for comparison with the paper only.

It crops every volume, also of test patients, to the box of the *reference* + 10 px, and drops slices with an empty reference.
So the label leaks into the input, and false positives elsewhere never count. It separates validation from training by slices,
not by patients, and averages a soft Dice that includes the background. All of this is reproduced here, to measure its effect
compared with `leak_free`. Three details are not in the paper, and chosen here. The margin is in voxels of the scan, a scan with
several frames is cropped frame by frame, and a fifth of the slices is for validation.

Shapes: X Y Z T a volume; P slices; K classes
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from p2r.data.preprocess import Planes, Preparation, label_planes_of, plane_axes, planes_of
from p2r.data.volume import Volume
from p2r.errors import DataError
from p2r.evaluate.tasks import LabelledScan

_MARGIN_PX = 10
_VALIDATION_FRACTION = 0.2


@dataclass(frozen=True)
class Crop:
    """One frame of a scan, cropped by its label, and its position in the whole scan."""

    scan: LabelledScan
    """Volume, reference, images and labels after cropping: one frame."""
    frame: int
    places: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    """Remaining voxel indices along each axis of the whole volume."""
    whole: Volume
    """The volume before cropping."""


def cropped(scan: LabelledScan, preparation: Preparation, *, size: int | None) -> list[Crop]:
    """Crop every frame of a scan to the box of its label + 10 px, without the slices with an empty label.

    Args:
        scan: Scan cut into slices.
        preparation: Preparation of scans for the backbone.
        size: Side of the images; None: their whole extent.

    Returns:
        The frames with any label.
    """
    assert isinstance(scan.planes, Planes)
    axis = scan.planes.axis
    crops = []
    for frame in range(scan.labels.data.shape[3]):
        is_class = scan.labels.data[..., frame] > 0
        if not is_class.any():
            continue
        places: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * 3
        places[axis] = np.flatnonzero(is_class.any(plane_axes(axis)))
        for side in plane_axes(axis):
            held = np.flatnonzero(is_class.any(tuple(other for other in range(3) if other != side)))
            low, high = held[0] - _MARGIN_PX, held[-1] + 1 + _MARGIN_PX
            places[side] = np.arange(max(0, low), min(is_class.shape[side], high))
        x, y, z = places
        volume, labels = (_crop_volume(part, (x, y, z), frame) for part in (scan.volume, scan.labels))
        planes = planes_of(volume, preparation=preparation, size=size)
        label_planes = label_planes_of(labels, preparation=preparation, axis=axis, size=size)
        crops.append(Crop(LabelledScan(scan.scan, volume, labels, planes, label_planes), frame, (x, y, z), scan.volume))
    return crops


def _crop_volume(whole: Volume, places: tuple[NDArray[np.int64], ...], frame: int) -> Volume:
    affine = whole.affine.copy()
    affine[:3, 3] = (whole.affine @ [*(indices[0] for indices in places), 1])[:3]
    data = np.ascontiguousarray(whole.data[..., frame][np.ix_(*places)][..., None])
    return replace(whole, data=data, affine=affine)


def split_by_slice(crops: Sequence[Crop], generator: np.random.Generator) -> tuple[list[Crop], list[Crop]]:
    """Split slices, independent of patient, into training and validation, which gets a fifth, and at least one.

    Raises:
        DataError: if there are fewer than two slices.
    """
    owners = [(index, plane) for index, crop in enumerate(crops) for plane in range(len(crop.scan.label_planes))]
    if len(owners) < 2:
        raise DataError(
            f"finetune.protocol paper_compat splits the labelled slices into training and validation, and there "
            f"{'is one' if owners else 'are none'}; label more patients"
        )
    order = generator.permutation(len(owners))
    held_out = {owners[int(index)] for index in order[: max(1, round(_VALIDATION_FRACTION * len(owners)))]}
    sides: list[list[Crop]] = []
    for is_validation in (False, True):
        side = []
        for index, crop in enumerate(crops):
            planes = [
                plane for plane in range(len(crop.scan.label_planes)) if ((index, plane) in held_out) == is_validation
            ]
            if planes:
                side.append(_select_planes(crop, planes))
        sides.append(side)
    return sides[0], sides[1]


def _select_planes(crop: Crop, planes: list[int]) -> Crop:
    """Select slices, without normalising their intensities again."""
    scan = crop.scan
    assert isinstance(scan.planes, Planes)
    axis = scan.planes.axis
    volume, labels = (replace(part, data=np.take(part.data, planes, axis=axis)) for part in (scan.volume, scan.labels))
    images = replace(scan.planes, images=scan.planes.images[planes], inside=scan.planes.inside[planes])
    places = list(crop.places)
    places[axis] = places[axis][planes]
    x, y, z = places
    left = LabelledScan(scan.scan, volume, labels, images, scan.label_planes[planes])
    return Crop(left, crop.frame, (x, y, z), crop.whole)
