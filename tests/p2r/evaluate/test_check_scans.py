"""Scans and label maps of a whole task: mixed up, copied, empty or without a class."""

import shutil
from functools import partial
from typing import Any

import nibabel
import numpy as np
import pytest

from p2r.data.preprocess import Preparation
from p2r.data.volume import write_nifti
from p2r.errors import DataError
from p2r.evaluate.tasks import Task, check_classes_present, check_scans, load_scan, load_task
from tests.p2r.evaluate.conftest import MakeTask

PREPARATION = Preparation(spacing_mm=2.0, image_size=32)


# Errors that would invalidate metrics, over all scans.


def replace_scan(task: Task, number: int, part: str, array: np.ndarray[Any, Any]) -> None:
    write_nifti(getattr(task.scans[number], part), array, np.diag([1.0, 1.0, 4.0, 1.0]))


def test_all_scans_are_read_and_tell_who_has_which_class(make_task: MakeTask) -> None:
    task = load_task(make_task())
    replace_scan(task, 1, "label", np.zeros((20, 24, 6), np.uint8))
    replace_scan(task, 2, "label", np.ones((20, 24, 6), np.uint8))
    assert check_scans(task, PREPARATION) == {"sub-01": {1, 2}, "sub-02": set(), "sub-03": {1}, "sub-04": {1, 2}}


@pytest.mark.parametrize(("other", "splits"), [(2, r"train.*validation"), (1, r"train.*train")])
def test_one_image_under_two_subjects_is_refused_with_both(make_task: MakeTask, other: int, splits: str) -> None:
    task = load_task(make_task())
    image = np.asanyarray(nibabel.load(task.scans[0].image).dataobj)
    replace_scan(task, other, "image", image.astype(np.int32))  # other bytes, the same voxels
    with pytest.raises(DataError, match=rf"sub-01 \(.*sub-0{other + 1} \(.* have the same voxels") as refusal:
        check_scans(task, PREPARATION)
    assert [word in str(refusal.value) for word in splits.split(".*")] == [True, True]


def test_one_subject_may_have_the_same_scan_twice(make_task: MakeTask) -> None:
    path = make_task()
    for part in ("images", "labels"):
        shutil.copy(path.parent / part / "sub-01_T1w.nii.gz", path.parent / part / "sub-01_T2w.nii.gz")
    assert check_scans(load_task(path), PREPARATION)["sub-01"] == {1, 2}


def test_a_label_map_that_was_copied_to_another_patient_is_refused(make_task: MakeTask) -> None:
    task = load_task(make_task())
    shutil.copy(task.scans[0].label, task.scans[3].label)
    with pytest.raises(DataError, match=r"labels/sub-01.*of subject sub-01 and .*labels/sub-04.* the same labels"):
        check_scans(task, PREPARATION)


def test_empty_label_maps_are_no_copies(make_task: MakeTask) -> None:
    task = load_task(make_task())
    for number in (0, 1):
        replace_scan(task, number, "label", np.zeros((20, 24, 6), np.uint8))
    assert check_scans(task, PREPARATION)["sub-02"] == frozenset()


@pytest.mark.parametrize(("number", "split"), [(2, "validation"), (3, "test")])
def test_patients_to_compare_with_must_have_a_class(make_task: MakeTask, number: int, split: str) -> None:
    task = load_task(make_task())
    replace_scan(task, number, "label", np.zeros((20, 24, 6), np.uint8))
    with pytest.raises(DataError, match=rf"all label maps of the {split} patients \(sub-0{number + 1}\) are empty"):
        check_scans(task, PREPARATION)


def test_what_the_network_does_not_see_of_a_class_is_not_there(make_task: MakeTask) -> None:
    task = load_task(make_task())
    label = np.ones((20, 24, 6), np.uint8)
    label[:2] = 2
    replace_scan(task, 0, "label", label)
    centre = partial(load_scan, size=8)  # 16 of 20 voxels along the first axis
    assert check_scans(task, PREPARATION)["sub-01"] == {1, 2}
    assert check_scans(task, PREPARATION, load=centre)["sub-01"] == {1}


def test_labels_where_the_image_is_empty_are_refused(make_task: MakeTask) -> None:
    task = load_task(make_task())
    image, label = np.zeros((20, 24, 6), np.int16), np.zeros((20, 24, 6), np.uint8)
    image[:10] = np.random.default_rng(0).integers(1, 900, size=(10, 24, 6))
    label[12:] = 1
    replace_scan(task, 0, "image", image)
    replace_scan(task, 0, "label", label)
    with pytest.raises(DataError, match=r"the labels of .*labels/sub-01.* are where its image .*sub-01.* is empty"):
        load_scan(task.scans[0], task, PREPARATION)
    label[9] = 1  # a tenth of it is on the body
    replace_scan(task, 0, "label", label)
    load_scan(task.scans[0], task, PREPARATION)


def test_a_class_that_no_labelled_patient_has_is_refused_by_name(make_task: MakeTask) -> None:
    task = load_task(make_task())
    labels = {"sub-01": {1}, "sub-02": {1, 2}}
    check_classes_present(labels, task, subjects=["sub-02"])
    check_classes_present(labels, task, subjects=["sub-01", "sub-02"])
    with pytest.raises(DataError, match=r"class 2 brightest is empty in all labelled patients \(sub-01\)"):
        check_classes_present(labels, task, subjects=["sub-01"])
