"""Crop and split of the released code, compared with explicit pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from p2r.data.preprocess import Planes, Preparation, label_planes_of, planes_of
from p2r.data.volume import Volume
from p2r.errors import DataError
from p2r.evaluate.tasks import LabelledScan, TaskScan
from p2r.fewshot.paper_compat import cropped, split_by_slice

PREPARATION = Preparation(spacing_mm=1.0, image_size=32, slice_axis=1)


def scan_of(labels: np.ndarray) -> LabelledScan:
    """Return a scan (X, Y, Z, T) with slices perpendicular to the second axis, each voxel with a unique value."""
    values = (1 + np.arange(labels.size)).reshape(labels.shape).astype(np.float32)
    affine = np.diag([1.0, 4.0, 1.0, 1.0])
    volume, reference = (
        Volume(data, affine, affine, labels.shape[:3], (1.0, 4.0, 1.0), "scan") for data in (values, labels)
    )
    planes = planes_of(volume, preparation=PREPARATION, size=None)
    label_planes = label_planes_of(reference, preparation=PREPARATION, axis=1, size=None)
    return LabelledScan(TaskScan("scan", "sub-01", Path(), Path()), volume, reference, planes, label_planes)


def labelled(shape: tuple[int, ...] = (60, 6, 50, 2)) -> np.ndarray:
    labels = np.zeros(shape, np.int16)
    labels[25:31, 1, 20:22, 0], labels[28:33, 4, 4:24, 0] = 1, 2
    labels[0:3, 2, 45:50, 1] = 2
    return labels


def test_a_frame_is_cropped_to_its_labels_box_without_empty_slices() -> None:
    scan = scan_of(labelled())
    first, second = cropped(scan, PREPARATION, size=None)
    assert (first.frame, second.frame) == (0, 1)
    assert [of_axis.tolist() for of_axis in first.places] == [[*range(15, 43)], [1, 4], [*range(0, 34)]]
    assert [of_axis.tolist() for of_axis in second.places] == [[*range(0, 13)], [2], [*range(35, 50)]]
    for crop in (first, second):
        for part, whole in ((crop.scan.volume, scan.volume), (crop.scan.labels, scan.labels)):
            for x, at_x in enumerate(crop.places[0]):
                for y, at_y in enumerate(crop.places[1]):
                    expected = whole.data[at_x, at_y, crop.places[2], crop.frame]
                    assert np.array_equal(part.data[x, y, :, 0], expected)
        origin = crop.scan.volume.affine @ [0, 0, 0, 1]
        assert np.allclose(origin, scan.volume.affine @ [*(of_axis[0] for of_axis in crop.places), 1])
        assert isinstance(crop.scan.planes, Planes) and crop.scan.planes.axis == 1
        assert crop.scan.planes.images.shape[2:] == crop.scan.label_planes.shape[1:]
        assert (crop.scan.label_planes > 0).any((1, 2)).all()


def test_a_frame_without_any_label_is_dropped() -> None:
    labels = labelled()
    labels[..., 1] = 0
    assert [crop.frame for crop in cropped(scan_of(labels), PREPARATION, size=None)] == [0]


def test_a_fifth_of_all_slices_is_for_validation() -> None:
    crops = [crop for _ in range(5) for crop in cropped(scan_of(labelled()), PREPARATION, size=32)]  # 15 slices
    training, validation = split_by_slice(crops, np.random.default_rng(0))
    sizes = [sum(len(crop.scan.label_planes) for crop in side) for side in (training, validation)]
    assert sizes == [12, 3]
    for crop in (*training, *validation):
        axis_places = crop.places[1]
        assert crop.scan.volume.data.shape[1] == crop.scan.planes.images.shape[0] == len(axis_places)
        assert np.array_equal(crop.scan.labels.data[..., 0], crop_of(crop.whole, labelled(), crop.places, crop.frame))
    again, _ = split_by_slice(crops, np.random.default_rng(0))
    assert all(torch.equal(a.scan.planes.images, b.scan.planes.images) for a, b in zip(training, again, strict=True))


def crop_of(whole: Volume, labels: np.ndarray, places: tuple[np.ndarray, ...], frame: int) -> np.ndarray:
    assert whole.data.shape == labels.shape
    return labels[..., frame][np.ix_(*places)]


def test_one_slice_cannot_be_split() -> None:
    labels = labelled()
    labels[..., 0] = 0
    with pytest.raises(DataError, match=r"splits the labelled slices into training and validation, and there is one"):
        split_by_slice(cropped(scan_of(labels), PREPARATION, size=None), np.random.default_rng(0))
