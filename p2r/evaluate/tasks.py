"""A task's YAML and its folders -> scans with references, split by patient; or a refusal before anything is trained.

    jobs/tasks/acdc.yaml -> TaskConfig -> Task(scans, subjects by split) -> LabelledScan

A task is a folder of images, a folder of label maps with names and grids to match, the meaning of each label, and the
subjects of each split, by name or by a seeded rule. Whatever would make a figure mean something else is refused here, by
name: a patient in two splits, an image without its label, a label on another grid, with a value that nobody explained
or where its image is empty, one scan under two subjects, a class that no labelled patient has.

Two label maps of one grid that were exchanged are found by `p2r.evaluate.mix_ups`. What cannot be known is whether a label
map that fits its image in name, grid, place and look was drawn on another patient.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from torch import Tensor

from p2r.data.preprocess import (
    Frames,
    Planes,
    Preparation,
    frames_of,
    label_frames_of,
    label_planes_of,
    planes_of,
)
from p2r.data.shards import voxels_sha256
from p2r.data.volume import Volume, read_labels, read_volume
from p2r.errors import DataError
from p2r.evaluate.task_files import HELD_OUT as HELD_OUT
from p2r.evaluate.task_files import Split as Split
from p2r.evaluate.task_files import Task as Task
from p2r.evaluate.task_files import TaskConfig as TaskConfig
from p2r.evaluate.task_files import TaskScan as TaskScan
from p2r.evaluate.task_files import few
from p2r.evaluate.task_files import load_task as load_task
from p2r.evaluate.task_files import read_task_config as read_task_config
from p2r.evaluate.task_files import task_sha256 as task_sha256

_AFFINE_TOLERANCE = 1e-3
_SPACING_TOLERANCE = 1e-3  # relative
_RESTORE = "where the files of two scans were mixed up, restore the pairs"
_MAX_SHARE_ON_NOTHING = 0.99  # of the labelled voxels, where the image has its least value


@dataclass(frozen=True)
class LabelledScan:
    """A scan read, checked, and cut into planes, or kept whole for a network of volumes, together with its reference."""

    scan: TaskScan
    volume: Volume
    labels: Volume
    """On the grid of `volume`: (X, Y, Z, T) int16."""
    planes: Planes | Frames
    """Images (P, 1, H, W), or (T, 1, X, Y, Z)."""
    label_planes: Tensor
    """(P, H, W), or (T, X, Y, Z), int64, on the images' grid."""


def check_scans(
    task: Task,
    preparation: Preparation,
    *,
    load: Callable[[TaskScan, Task, Preparation], LabelledScan] | None = None,
    see: Callable[[LabelledScan, Split], None] = lambda scan, split: None,
) -> dict[str, frozenset[int]]:
    """Read every scan of a task and refuse whatever breaks a rule.

    Args:
        task: From `load_task`.
        preparation: What the backbone expects of a scan.
        load: Reads a scan; None: `load_scan`.
        see: Called with every scan and its split; it may refuse it.

    Returns:
        The labels that each subject's images show, on the network's grid, for `check_classes_present`.

    Raises:
        DataError: as `load_scan`; if one image, or one label map with content, is there under two subjects; if the label maps of
            validation or test patients are all empty.
        RefusedScan: if a file cannot be used at all.
    """
    split_of = {subject: split for split in get_args(Split) for subject in task.subjects[split]}
    images: dict[str, TaskScan] = {}
    labels: dict[str, TaskScan] = {}
    classes: dict[str, frozenset[int]] = {}
    for scan in task.scans:
        loaded = (load or load_scan)(scan, task, preparation)
        see(loaded, split_of[scan.subject])
        twin = images.setdefault(voxels_sha256(loaded.volume), scan)
        if twin.subject != scan.subject:
            raise DataError(
                f"task {task.name}: {twin.image} of subject {twin.subject} ({split_of[twin.subject]}) and {scan.image} of "
                f"subject {scan.subject} ({split_of[scan.subject]}) are the same voxels: one patient under two names would "
                "leak from split to split, or count twice; take one of both out of the splits"
            )
        twin = labels.setdefault(voxels_sha256(loaded.labels), scan) if loaded.labels.data.any() else scan
        if twin.subject != scan.subject:
            raise DataError(
                f"task {task.name}: {twin.label} of subject {twin.subject} and {scan.label} of subject {scan.subject} are "
                "the same labels on different images: one of both belongs to another patient; restore it"
            )
        classes[scan.subject] = classes.get(scan.subject, frozenset()) | classes_shown([loaded])
    for split in HELD_OUT:
        if not any(classes[subject] for subject in task.subjects[split]):
            raise DataError(
                f"task {task.name}: no label map of the {split} patients ({few(list(task.subjects[split]))}) holds any class: there is "
                "nothing to compare with; restore them, or choose other patients"
            )
    return classes


def classes_shown(scans: Iterable[LabelledScan]) -> frozenset[int]:
    """Return the labels that the images of some scans show, on the network's grid."""
    return frozenset(label for scan in scans for label in np.unique(scan.label_planes.numpy()).tolist()) - {0}


def check_classes_present(
    labels_by_subject: Mapping[str, Iterable[int]], task: Task, *, subjects: Sequence[str]
) -> None:
    """Refuse labelled patients of whom none has one of the classes: a model would never see it.

    Args:
        labels_by_subject: From `check_scans`.
        task: The task.
        subjects: Labelled patients of one draw.

    Raises:
        DataError: naming the class and the patients.
    """
    present = {label for subject in subjects for label in labels_by_subject[subject]}
    for label, name in task.config.classes.items():
        if label not in present:
            raise DataError(
                f"task {task.name}: class {label} {name} is empty in all labelled patients ({few(list(subjects))}), as the network "
                "reads them: it would never see it; draw more patients (finetune.num_labelled) or others (finetune.seed)"
            )


def load_scan(scan: TaskScan, task: Task, preparation: Preparation, *, size: int | None = None) -> LabelledScan:
    """Read a scan and its reference, check that they fit, and make images of both.

    Args:
        scan: One of `task.scans`.
        task: Its task.
        preparation: What the backbone expects of a scan.
        size: Sides of the images; None: their whole extent.

    Raises:
        DataError: if the label map lies on another grid, or holds a value that the task does not name.
        RefusedScan: if a file cannot be used at all.
    """
    volume, labels = read_volume(scan.image), read_labels(scan.label)
    grids = f"{scan.label} has {_grid_of(labels)}, its image {scan.image} {_grid_of(volume)}"
    if volume.data.shape != labels.data.shape or volume.source_shape != labels.source_shape:
        raise DataError(
            f"task {task.name}: the grids differ: {grids}; {_RESTORE}, or resample the label map to its image"
        )
    difference = float(np.abs(volume.source_affine - labels.source_affine).max())
    if difference > _AFFINE_TOLERANCE:
        raise DataError(
            f"task {task.name}: the affines differ by up to {difference:.3g} ({_AFFINE_TOLERANCE} is allowed): {grids}; "
            f"{_RESTORE}, or copy the image's affine if the voxels do match"
        )
    if not np.allclose(volume.spacing_mm, labels.spacing_mm, rtol=_SPACING_TOLERANCE, atol=0):
        raise DataError(
            f"task {task.name}: {scan.label} states voxels of {_mm(labels)} mm, its image {scan.image} {_mm(volume)}; "
            f"{_RESTORE}, or copy the image's header if the voxels do match"
        )
    unknown = sorted(set(np.unique(labels.data).tolist()) - {0, *task.config.classes})
    if unknown:
        named = ", ".join(f"{value} {name}" for value, name in task.config.classes.items())
        raise DataError(
            f"task {task.name}: {scan.label} holds the value{'s' * (len(unknown) > 1)} {', '.join(map(str, unknown))}, "
            f"the task names 0 background, {named}; add the class to the task, or correct the label map"
        )
    for frame in range(labels.data.shape[3]):
        image, is_labelled = volume.data[..., frame], labels.data[..., frame] > 0
        if is_labelled.any() and (image[is_labelled] == image.min()).mean() > _MAX_SHARE_ON_NOTHING:
            raise DataError(
                f"task {task.name}: what {scan.label} labels{f' in frame {frame}' * (labels.data.shape[3] > 1)} lies where its "
                f"image {scan.image} is empty (its least value, {image.min():g}): the two belong to different scans, or one "
                "of them is turned or shifted; restore the pair"
            )
    planes: Planes | Frames
    if preparation.dimensions == 3:
        planes = frames_of(volume, preparation=preparation, size=size)
        label_planes = label_frames_of(labels, preparation=preparation, size=size)
    else:
        planes = planes_of(volume, preparation=preparation, size=size)
        label_planes = label_planes_of(labels, preparation=preparation, axis=planes.axis, size=size)
    return LabelledScan(scan, volume, labels, planes, label_planes)


def _mm(volume: Volume) -> str:
    return " x ".join(f"{mm:g}" for mm in volume.spacing_mm)


def _grid_of(volume: Volume) -> str:
    rows = "; ".join(" ".join(f"{number:.6g}" for number in row) for row in volume.source_affine[:3])
    return f"shape {volume.source_shape} x {volume.data.shape[3]} frames, affine [{rows}]"
