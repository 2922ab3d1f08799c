"""A task's YAML and its folders -> scans with references, split by patient; or a refusal before anything is trained.

    jobs/tasks/acdc.yaml -> TaskConfig -> Task(scans, subjects by split) -> LabelledScan

A task is a folder of images, a folder of label maps with matching names and grids, the meaning of each label, and the
subjects of each split. Splits are by name or by a seeded rule.

Every error that would invalidate a metric is refused here, by name:

- a patient in two splits, or one scan under two subjects;
- an image without its label map, or a label map on another grid;
- a label map with an undeclared value, or with labels where its image is empty;
- a class without any labelled patient.

`p2r.evaluate.mix_ups` finds two label maps of one grid that were exchanged. One error cannot be detected: a label map of
another patient that fits the image in name, grid, position and appearance.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from p2r.contrasts import describe
from p2r.data.contrasts import on_one_grid, read_contrasts, volumes_by_contrast
from p2r.data.preprocess import (
    Frames,
    Planes,
    Preparation,
    Scans,
    frames_of,
    label_frames_of,
    label_planes_of,
    planes_of,
)
from p2r.data.volume import Volume, read_labels, read_volume, voxels_sha256
from p2r.errors import DataError, RefusedScan
from p2r.evaluate.splits import HELD_OUT as HELD_OUT
from p2r.evaluate.splits import Split as Split
from p2r.evaluate.splits import join_few
from p2r.evaluate.task_files import Task as Task
from p2r.evaluate.task_files import TaskConfig as TaskConfig
from p2r.evaluate.task_files import TaskImages as TaskImages
from p2r.evaluate.task_files import TaskScan as TaskScan
from p2r.evaluate.task_files import load_task as load_task
from p2r.evaluate.task_files import read_task_config as read_task_config
from p2r.evaluate.task_files import task_sha256 as task_sha256

_AFFINE_TOLERANCE = 1e-3
_SPACING_TOLERANCE = 1e-3  # relative
_RESTORE = "where the files of two scans were mixed up, restore the pairs"
_MAX_EMPTY_FRACTION = 0.99  # of the labelled voxels, where the image has its minimum


@dataclass(frozen=True)
class LabelledScan:
    """A scan and its reference, read, checked, and cut into slices (or kept whole, for a network of volumes)."""

    scan: TaskScan
    volume: Volume
    """The scan; with several contrasts, the one whose grid all have."""
    labels: Volume
    """Label map on the grid of `volume`: (X, Y, Z, T) int16."""
    planes: Planes | Frames
    """Images (P, C, H, W), or (T, C, X, Y, Z)."""
    label_planes: Tensor
    """(P, H, W), or (T, X, Y, Z), int64, on the images' grid."""
    contrasts: Mapping[str, Volume] = field(default_factory=dict)
    """Volumes by contrast, on the grid of `volume`; empty for a scan without a name."""

    def scans_for(self, preparation: Preparation) -> Scans:
        """Return the input of a network: the volume, or the volumes of the contrasts that the network reads."""
        return self.volume if not self.contrasts else choose_contrasts(self.contrasts, preparation)

    @property
    def volumes(self) -> tuple[Volume, ...]:
        """All volumes of the case."""
        return tuple(self.contrasts.values()) or (self.volume,)


def check_scans(
    task: Task,
    preparation: Preparation,
    *,
    load: Callable[[TaskScan, Task, Preparation], LabelledScan] | None = None,
    see: Callable[[LabelledScan, Split], None] = lambda scan, split: None,
) -> dict[str, frozenset[int]]:
    """Read and check every scan of a task.

    Args:
        task: Task from `load_task`.
        preparation: Preparation of scans for the backbone.
        load: Function that reads a scan; None: `load_scan`.
        see: Called with every scan and its split; it may raise an error to refuse the scan.

    Returns:
        The labels in each subject's images, on the network's grid, for `check_classes_present`.

    Raises:
        DataError: as `load_scan`. Also if two subjects have the same image or the same non-empty label map. Also if the label
            maps of all validation or all test patients are empty.
        RefusedScan: if a file is unusable.
    """
    split_of = {subject: split for split in get_args(Split) for subject in task.subjects[split]}
    images: dict[str, tuple[Path, TaskScan]] = {}
    labels: dict[str, TaskScan] = {}
    classes: dict[str, frozenset[int]] = {}
    for scan in task.scans:
        loaded = (load or load_scan)(scan, task, preparation)
        see(loaded, split_of[scan.subject])
        for volume, image in zip(loaded.volumes, scan.images, strict=True):
            other, twin = images.setdefault(acquired_sha256(volume), (image, scan))
            if twin.subject != scan.subject:
                raise DataError(
                    f"task {task.name}: {other} of subject {twin.subject} ({split_of[twin.subject]}) and {image} of "
                    f"subject {scan.subject} ({split_of[scan.subject]}) have the same voxels: one patient under two names would "
                    f"leak between splits, or count twice. Leave {scan.subject} out: by splits, or split_rule.leave_out, in the "
                    "task, and by ingest.exclude in a job that pretrains on these files"
                )
        twin = labels.setdefault(voxels_sha256(loaded.labels), scan) if loaded.labels.data.any() else scan
        if twin.subject != scan.subject:
            raise DataError(
                f"task {task.name}: {twin.label} of subject {twin.subject} and {scan.label} of subject {scan.subject} are "
                "the same labels on different images: one of them belongs to another patient; restore it"
            )
        classes[scan.subject] = classes.get(scan.subject, frozenset()) | classes_shown([loaded])
    for split in HELD_OUT:
        if not any(classes[subject] for subject in task.subjects[split]):
            raise DataError(
                f"task {task.name}: all label maps of the {split} patients ({join_few(list(task.subjects[split]))}) are empty, so "
                "nothing can be evaluated; restore them, or choose other patients"
            )
    return classes


def classes_shown(scans: Iterable[LabelledScan]) -> frozenset[int]:
    """Return the labels in the images of scans, on the network's grid."""
    return frozenset(label for scan in scans for label in np.unique(scan.label_planes.numpy()).tolist()) - {0}


def check_classes_present(
    labels_by_subject: Mapping[str, Iterable[int]], task: Task, *, subjects: Sequence[str]
) -> None:
    """Check that at least one labelled patient has each class, as a model cannot learn a class that it never gets.

    Args:
        labels_by_subject: Labels from `check_scans`.
        task: The task.
        subjects: Labelled patients of one draw.

    Raises:
        DataError: if a class is absent; names the class and the patients.
    """
    present = {label for subject in subjects for label in labels_by_subject[subject]}
    for label, name in task.config.classes.items():
        if label not in present:
            raise DataError(
                f"task {task.name}: class {label} {name} is empty in all labelled patients ({join_few(list(subjects))}) on the network's "
                "grid, so a model could not learn it; draw more patients (finetune.num_labelled) or others (finetune.seed)"
            )


def load_scan(scan: TaskScan, task: Task, preparation: Preparation, *, size: int | None = None) -> LabelledScan:
    """Read a scan and its reference, check that they match, and make images of both.

    Args:
        scan: One of `task.scans`.
        task: The scan's task.
        preparation: Preparation of scans for the backbone.
        size: Side of the images; None: their whole extent.

    Raises:
        DataError: if the label map is on another grid, or has a value that the task does not name.
        RefusedScan: if a file is unusable.
    """
    labels = read_labels(scan.label)
    volume, contrasts = _read_images(scan, task, labels)
    unknown = sorted(set(np.unique(labels.data).tolist()) - {0, *task.config.classes})
    if unknown:
        named = ", ".join(f"{value} {name}" for value, name in task.config.classes.items())
        raise DataError(
            f"task {task.name}: {scan.label} holds the value{'s' * (len(unknown) > 1)} {', '.join(map(str, unknown))}, "
            f"but the task names 0 background, {named}; add the class to the task, or correct the label map"
        )
    _refuse_labels_on_nothing(scan, task, labels, contrasts or {"": volume})
    if contrasts and not choose_contrasts(contrasts, preparation):
        _refuse_contrasts(scan, task, contrasts, preparation)
    scans: Scans = choose_contrasts(contrasts, preparation) or volume
    planes: Planes | Frames
    if preparation.dimensions == 3:
        planes = frames_of(scans, preparation=preparation, size=size)
        label_planes = label_frames_of(labels, preparation=preparation, size=size)
    else:
        planes = planes_of(scans, preparation=preparation, size=size)
        label_planes = label_planes_of(labels, preparation=preparation, axis=planes.axis, size=size)
    return LabelledScan(scan, volume, labels, planes, label_planes, contrasts)


def choose_contrasts(contrasts: Mapping[str, Volume], preparation: Preparation) -> dict[str, Volume]:
    """Return the volumes of the contrasts that a network reads, in its order."""
    return {name: contrasts[name] for name in preparation.contrasts or () if name in contrasts}


def read_images(scan: TaskImages, task: Task, preparation: Preparation) -> Scans:
    """Read the images of a case that a network reads, without its label map, on the grid of the first contrast.

    Raises:
        DataError: if the case has none of the contrasts.
        RefusedScan: if a file is unusable, or the contrasts do not fit together.
    """
    if not scan.contrasts:
        return read_volume(scan.image)
    contrasts = read_contrasts(scan.contrasts, min_coverage=task.config.min_coverage)
    return choose_contrasts(contrasts, preparation) or _refuse_contrasts(scan, task, contrasts, preparation)


def _refuse_contrasts(
    scan: TaskImages, task: Task, contrasts: Mapping[str, Volume], preparation: Preparation
) -> NoReturn:
    raise DataError(
        f"task {task.name}: case {scan.key} has none of the contrasts {describe(preparation.contrasts)}, only "
        f"{describe(tuple(contrasts))}: add its scans, take its subject out of the splits, or read more contrasts"
    )


def _read_images(scan: TaskScan, task: Task, labels: Volume) -> tuple[Volume, dict[str, Volume]]:
    """Read the images of a case; return the one with the grid of the label map, and all by contrast on that grid.

    Raises:
        DataError: if no image has the grid of the label map.
    """
    if not scan.contrasts:
        volume = read_volume(scan.image)
        if problem := _grid_problem(scan, scan.image, volume, labels):
            raise DataError(f"task {task.name}: {problem}{_hint_at_contrasts([volume], labels)}")
        return volume, {}
    volumes = volumes_by_contrast(scan.contrasts, read_volume)
    problems = {name: _grid_problem(scan, scan.contrasts[name], volume, labels) for name, volume in volumes.items()}
    reference = next((name for name, problem in problems.items() if problem is None), None)
    if reference is None:
        hint = _hint_at_contrasts(volumes.values(), labels)
        raise DataError(f"task {task.name}: {next(iter(problems.values()))}{hint}")
    try:
        aligned = on_one_grid(volumes, reference=reference, min_coverage=task.config.min_coverage)
    except RefusedScan as error:
        raise DataError(f"task {task.name}: case {scan.key}: {error}") from None
    return aligned[reference], aligned


def _hint_at_contrasts(volumes: Iterable[Volume], labels: Volume) -> str:
    """Return the end of a message if images have more frames than their label map."""
    is_longer = any(volume.data.shape[3] > labels.data.shape[3] for volume in volumes)
    return "; if the fourth axis holds contrasts, name them in the task, as in fourth_axis: [flair, t1]" * is_longer


def _grid_problem(scan: TaskScan, image: Path, volume: Volume, labels: Volume) -> str | None:
    """Return why a label map is not on the grid of an image; None if it is."""
    grids = f"{scan.label} has {_describe_grid(labels)}, its image {image} {_describe_grid(volume)}"
    if volume.data.shape != labels.data.shape:
        return f"the grids differ: {grids}; {_RESTORE}, or resample the label map to its image"
    # A label map that was saved in another orientation is on the same grid if it is in RAS order.
    is_turned = not np.array_equal(_turn_of(volume), _turn_of(labels))
    ours, theirs = (one.affine if is_turned else one.source_affine for one in (volume, labels))
    difference = float(np.abs(ours - theirs).max())
    if difference > _AFFINE_TOLERANCE:
        return (
            f"the affines differ by up to {difference:.3g} (allowed: {_AFFINE_TOLERANCE}): {grids}; "
            f"{_RESTORE}, or copy the image's affine if the voxels do match"
        )
    if not np.allclose(volume.spacing_mm, labels.spacing_mm, rtol=_SPACING_TOLERANCE, atol=0):
        return (
            f"{scan.label} states voxels of {_describe_spacing(labels)} mm, its image {image} {_describe_spacing(volume)}; "
            f"{_RESTORE}, or copy the image's header if the voxels do match"
        )
    return None


def _turn_of(volume: Volume) -> NDArray[np.float64]:
    """Return the axes of a file (3, 3) by which RAS order goes: one of 1 or -1 in each column."""
    turn: NDArray[np.float64] = np.rint(np.linalg.solve(volume.source_affine[:3, :3], volume.affine[:3, :3]))
    return turn


def _refuse_labels_on_nothing(scan: TaskScan, task: Task, labels: Volume, volumes: Mapping[str, Volume]) -> None:
    """Refuse labels where every image of the case is empty."""
    for frame in range(labels.data.shape[3]):
        is_labelled = labels.data[..., frame] > 0
        if not is_labelled.any():
            continue
        images = [volume.data[..., frame] for volume in volumes.values()]
        if all((image[is_labelled] == image.min()).mean() > _MAX_EMPTY_FRACTION for image in images):
            raise DataError(
                f"task {task.name}: the labels of {scan.label}{f' in frame {frame}' * (labels.data.shape[3] > 1)} are where its "
                f"image {scan.image} is empty (its minimum, {images[0].min():g}). They belong to different scans, or one is "
                "rotated or shifted; restore the pair"
            )


def acquired_sha256(volume: Volume) -> str:
    """Return the digest of a scan's voxels as acquired, by which corpora know it."""
    return volume.acquired_sha256 or voxels_sha256(volume)


def _describe_spacing(volume: Volume) -> str:
    return " x ".join(f"{mm:g}" for mm in volume.spacing_mm)


def _describe_grid(volume: Volume) -> str:
    rows = "; ".join(" ".join(f"{number:.6g}" for number in row) for row in volume.source_affine[:3])
    return f"shape {volume.source_shape} x {volume.data.shape[3]} frames, affine [{rows}]"
