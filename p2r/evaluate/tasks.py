"""A task's YAML and its folders -> scans with references, split by patient; or a refusal before anything is trained.

    jobs/tasks/acdc.yaml -> TaskConfig -> Task(scans, subjects by split) -> LabelledScan

A task is a folder of images, a folder of label maps with the same file names and grids, the meaning of each label, and
the subjects of each split. Whatever would make a figure mean something else is refused here, by name: a patient in two
splits, an image without its label, a label on another grid or with a value that nobody explained.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import unquote, urlparse

import numpy as np
import yaml
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from p2r.config import Section
from p2r.data.corpus import expand_subjects
from p2r.data.phantom import resolve_source
from p2r.data.preprocess import (
    Frames,
    Planes,
    Preparation,
    frames_of,
    label_frames_of,
    label_planes_of,
    planes_of,
)
from p2r.data.volume import SUFFIXES, Volume, read_labels, read_volume, scan_key
from p2r.errors import DataError, JobError
from p2r.job import fill_in_variables, validated
from p2r.storage import cache_folder

Split = Literal["train", "validation", "test"]
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]

_AFFINE_TOLERANCE = 1e-3


class Splits(Section):
    """Subjects of each split, as names or ranges such as `patient[001-014]`."""

    train: Patterns
    """Labelled patients are drawn from these."""
    validation: Patterns
    """Learning rates and the published model are chosen on these."""
    test: Patterns
    """Read once per frozen recipe."""


class TaskConfig(Section):
    """A file of `jobs/tasks/`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    """Short name: part of folders, trial ids and rows."""
    title: str
    """What is segmented, in what, for headings."""
    images: str
    """Folder with the scans: a path (relative to this file; `${P2R_DATA}` and the like are filled in) or `template://`."""
    labels: str
    """Folder with the label maps, under the scans' names."""
    licence: Annotated[str, Field(min_length=1)]
    """SPDX identifier or name of the data's licence. It travels into reports and models."""
    citation: str = ""
    """What must be cited."""
    caveat: str = ""
    """What a reader of the figures must know first."""
    cohort: str = "default"
    """Name space of the subjects, as in a corpus: the two are compared to find a leak."""
    subject_pattern: str = r"^(sub-[A-Za-z0-9]+|[^_.]+)"
    """Regular expression searched in a scan's file name; its first group is the subject."""
    classes: Annotated[dict[PositiveInt, Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Name of each foreground label, from 1 on; 0 is the background."""
    splits: Splits
    """Who is trained, chosen and tested on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sorted(self.classes) != list(range(1, len(self.classes) + 1)):
            raise ValueError(f"classes must number the labels 1, 2, ... without a gap, got {sorted(self.classes)}")
        if len(set(self.classes.values())) < len(self.classes):
            raise ValueError(f"classes must have different names, got {list(self.classes.values())}")
        try:
            groups = re.compile(self.subject_pattern).groups
        except re.error as error:
            raise ValueError(f"subject_pattern is not a regular expression: {error}") from None
        if groups < 1:
            raise ValueError(f"subject_pattern needs a group around the subject, got {self.subject_pattern!r}")
        return self


@dataclass(frozen=True)
class TaskScan:
    """One scan of a task and its reference."""

    key: str
    subject: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Task:
    """A task whose files are there and whose splits are disjoint."""

    config: TaskConfig
    scans: tuple[TaskScan, ...]
    """Scans of all splits, by key; scans of other subjects are left out."""
    subjects: dict[str, tuple[str, ...]]
    """Subjects by split, sorted."""

    @property
    def name(self) -> str:
        """The task's name."""
        return self.config.name

    @property
    def num_classes(self) -> int:
        """Classes with the background."""
        return len(self.config.classes) + 1

    def scans_of(self, subjects: tuple[str, ...]) -> tuple[TaskScan, ...]:
        """Return the scans of these subjects, by key."""
        return tuple(scan for scan in self.scans if scan.subject in subjects)


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


def load_task(path: Path, *, cache: Path | None = None) -> Task:
    """Read a task's YAML and find its files.

    Args:
        path: The YAML file.
        cache: Where `template://` subjects are made; None: the user's cache.

    Raises:
        DataError: naming the file or the subject, the rule, and the way out.
    """
    config = _read_config(path)
    subjects = _split_subjects(config, path)
    images = _folder(config.images, "images", path, cache)
    labels = _folder(config.labels, "labels", path, cache)
    wanted = {subject for split in subjects.values() for subject in split}
    scans, unlabelled = [], []
    label_of = _files(labels)
    for name, image in _files(images).items():
        match = re.search(config.subject_pattern, image.name)
        if match is None or match.group(1) not in wanted:
            continue
        if name in label_of:
            scans.append(
                TaskScan(key=name.replace("/", "_"), subject=match.group(1), image=image, label=label_of[name])
            )
        else:
            unlabelled.append(image.name)
    if unlabelled:
        raise DataError(
            f"task {path}: {_few(unlabelled)} in {images} ha{'s' if len(unlabelled) == 1 else 've'} no label map of "
            f"the same name in {labels}; add it, or take the subject out of splits"
        )
    lacking = sorted(wanted - {scan.subject for scan in scans})
    if lacking:
        raise DataError(
            f"task {path}: no scan of {_few(lacking)} in {images}, though splits names "
            f"{'it' if len(lacking) == 1 else 'them'}; check splits and subject_pattern {config.subject_pattern!r}"
        )
    return Task(config, tuple(sorted(scans, key=lambda scan: scan.key)), subjects)


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
    if volume.data.shape != labels.data.shape or volume.source_shape != labels.source_shape:
        raise DataError(
            f"task {task.name}: {scan.label} has the grid {labels.source_shape} x {labels.data.shape[3]} frames, its "
            f"image {scan.image} {volume.source_shape} x {volume.data.shape[3]}; resample the label map to its image"
        )
    difference = float(np.abs(volume.source_affine - labels.source_affine).max())
    if difference > _AFFINE_TOLERANCE:
        raise DataError(
            f"task {task.name}: the affine of {scan.label} differs by up to {difference:.3g} from that of its image "
            f"{scan.image} ({_AFFINE_TOLERANCE} is allowed); copy the image's affine if the voxels do match"
        )
    unknown = sorted(set(np.unique(labels.data).tolist()) - {0, *task.config.classes})
    if unknown:
        named = ", ".join(f"{value} {name}" for value, name in task.config.classes.items())
        raise DataError(
            f"task {task.name}: {scan.label} holds the value{'s' * (len(unknown) > 1)} {', '.join(map(str, unknown))}, "
            f"the task names 0 background, {named}; add the class to the task, or correct the label map"
        )
    planes: Planes | Frames
    if preparation.dimensions == 3:
        planes = frames_of(volume, preparation=preparation, size=size)
        label_planes = label_frames_of(labels, preparation=preparation, size=size)
    else:
        planes = planes_of(volume, preparation=preparation, size=size)
        label_planes = label_planes_of(labels, preparation=preparation, axis=planes.axis, size=size)
    if label_planes.shape[1:] != planes.images.shape[2:]:
        # Grids agree by now, so only the voxel sizes in the two headers can differ.
        raise DataError(
            f"task {task.name}: {scan.label} states voxels of {labels.spacing_mm} mm, its image {scan.image} "
            f"{volume.spacing_mm}; copy the image's header"
        )
    return LabelledScan(scan, volume, labels, planes, label_planes)


def _read_config(path: Path) -> TaskConfig:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task {path} cannot be read: {error}; give the path of a task's YAML") from None
    except yaml.YAMLError as error:
        raise DataError(f"task {path} is not YAML: {str(error).strip()}") from None
    try:
        if isinstance(values, dict):
            for key in ("images", "labels"):
                if isinstance(values.get(key), str):
                    values[key] = fill_in_variables(values[key], where=f"task {path}: {key}")
        return validated(TaskConfig, values, where=f"task {path}")
    except JobError as error:
        raise DataError(str(error)) from None


def _split_subjects(config: TaskConfig, path: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for split, patterns in config.splits.model_dump().items():
        try:
            subjects = sorted(expand_subjects(patterns))
        except DataError as error:
            raise DataError(f"task {path}: splits.{split}: {error}") from None
        for subject in subjects:
            if owner.setdefault(subject, split) != split:
                raise DataError(
                    f"task {path}: {subject} is in the splits {owner[subject]} and {split}; a subject belongs to one, "
                    "or the figures would count what was trained on"
                )
        found[split] = tuple(subjects)
    return found


def _folder(source: str, key: str, path: Path, cache: Path | None) -> Path:
    scheme = urlparse(source).scheme
    if scheme == "template":
        return resolve_source(source, cache or cache_folder())
    if scheme not in ("", "file"):
        raise DataError(f"task {path}: {key} is {source!r}; a task's folders are paths, file:// or template:// URLs")
    found = Path(unquote(urlparse(source).path) if scheme == "file" else source).expanduser()
    folder = path.absolute().parent / found
    if not folder.is_dir():
        raise DataError(
            f"task {path}: {key} is {source}, but there is no folder {folder}; get the data, or correct the path"
        )
    return folder


def _files(folder: Path) -> dict[str, Path]:
    """Return NIfTI files by their path below `folder` without the suffix, so that `.nii` and `.nii.gz` pair up."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(SUFFIXES) and not path.name.startswith("."):
            name = path.relative_to(folder).with_name(scan_key(path)).as_posix()
            if name in files:
                raise DataError(f"{folder} holds {files[name].name} and {path.name}: one name, two files; remove one")
            files[name] = path
    return files


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
