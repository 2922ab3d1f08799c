"""A task's YAML and the names of its files -> scans with label maps, split by patient. No data file is opened.

    jobs/tasks/acdc.yaml -> TaskConfig -> Task(scans, subjects by split)

Errors that would invalidate a metric and that names reveal are refused here: a patient in two splits, an image without its
label map, two scans of the same name. `tasks` reads the files.
"""

import hashlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from p2r.config import Fraction, Section
from p2r.config.section import in_order
from p2r.contrasts import Contrast, Contrasts, describe
from p2r.data.folders import files_of, images_below
from p2r.data.label_maps import label_map_by_name
from p2r.data.names import composed, local_path, scan_key, unquoted_hint
from p2r.data.pairs import key_of, label_finder
from p2r.data.preparation import Preparation, SliceAxis
from p2r.data.subjects import expand_subjects, subject_by_pattern
from p2r.documents import read_start
from p2r.errors import DataError, JobError
from p2r.evaluate.splits import (
    HELD_OUT,
    Patterns,
    SplitRule,
    Splits,
    assign_owners,
    expand_splits,
    join_few,
    split_by_rule,
)
from p2r.job import fill_in_variables, validated
from p2r.patterns import subject_pattern
from p2r.plain_yaml import MAX_YAML_BYTES, read_yaml
from p2r.storage import cache_folder, json_bytes

FileName = Annotated[str, Field(pattern=r"^[^{}/]*(\{key\})?[^{}/]*$", min_length=1)]

_TEXT_FIELDS = {"title", "licence", "citation", "caveat", "thirds"}  # for people, without effect on metrics


class TaskConfig(Section):
    """A file of `jobs/tasks/`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    """Short name: part of folders, trial ids and rows."""
    title: str
    """Title for headings: the organs and the images."""
    images: str | Annotated[dict[Contrast, str], Field(min_length=1)]
    """Folder of the scans: a path relative to this file (variables such as `${P2R_DATA}` are substituted), or `template://`. With several
    contrasts in several folders: the folder of each, as in `{flair: flair/, t1: t1/}`."""
    labels: str
    """Folder of the label maps; may be the folder of the scans."""
    image_name: FileName | Annotated[dict[Contrast, FileName], Field(min_length=1)] = "{key}"
    """Name of a scan without its suffix; `{key}` is the part shared with its label map. `{key}_0000` selects the first channel of nnU-Net's
    folders. A name without `{key}`, such as `t1`, selects the file of that name in each patient's folder. With several contrasts, the
    name of each: `{flair: "{key}_0000", t1: "{key}_0001"}`, or `{flair: "{key}_FLAIR", t1: "{key}_T1w"}` in BIDS. The files of one key
    in one folder are one case, which may lack contrasts. The first contrasts are preferred as the reference."""
    fourth_axis: Annotated[Contrasts, Field(min_length=2)] | None = None
    """Contrasts that each scan holds along its fourth axis, in their order, as in tasks of the Medical Segmentation Decathlon:
    `[flair, t1, t1gd, t2]`. None: a file is of one contrast, and its fourth axis is time."""
    min_coverage: Fraction = 0.9
    """Several contrasts: smallest fraction of the voxels of a case's grid that each contrast must cover. The grid is that of the first
    contrast with the grid of the label map; others are resampled to it by their headers' positions. Nothing is registered."""
    label_name: FileName = "{key}"
    """Name of a scan's label map without its suffix, such as `{key}_gt`. It is searched at the same relative path as the scan; if it is not
    there, the only label map of that name is used."""
    unlabelled: Literal["refuse", "leave_out", "use"] = "refuse"
    """Scans without a label map. refuse: a missing label map is an error. leave_out: the scan does not belong to the task; pretraining may
    use it. use: modes that learn from unlabelled patients also learn from it, unless its subject is a validation or test patient or in
    `split_rule.leave_out`. With several contrasts, files that continue the name of a case, such as `ce-GD`, are left out."""
    licence: Annotated[str, Field(min_length=1)]
    """SPDX identifier or name of the data's licence (`${P2R_LICENCE}` is substituted). Reports and models state it."""
    citation: str = ""
    """Citation of the data."""
    caveat: str = ""
    """Warning for readers of the results."""
    cohort: str = "default"
    """Namespace of the subjects, as in a corpus; both are compared to find leaks."""
    subject_pattern: str = r"^(sub-[A-Za-z0-9]+|[^_.]+)"
    """Regular expression, searched in a scan's file name, then in its path below `images`. Its first group is the patient; all scans of a
    patient belong to one split. Python's syntax; `p2r.patterns` lists the exceptions."""
    classes: Annotated[
        dict[PositiveInt, Annotated[str, Field(min_length=1)]],
        Field(min_length=1, max_length=255),
        AfterValidator(in_order),
    ]
    """Name of each foreground label, from 1 on; 0 is the background."""
    splits: Splits | None = None
    """Subjects of each split, by name; or use `split_rule`."""
    split_rule: SplitRule | None = None
    """Rule that determines the splits; or use `splits`."""
    strata: dict[Annotated[str, Field(min_length=1)], Patterns] = Field(default={})
    """Groups of subjects, such as pathologies, as names or ranges. Draws can be stratified by them, and results are listed by stratum."""
    thirds: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Names of the lower, the middle and the upper third along the slices, such as [base, middle, apex]; lower is left, posterior or
    inferior. Empty: lower, middle, upper."""
    dimensions: Literal[2, 3] | None = None
    """Dimensions of the task's networks: 2 for slices, 3 for volumes. None: either; 2 if `slice_axis` is set."""
    spacing_mm: PositiveFloat | None = None
    """Pixel size of scans for models of this task, mm. None: the pixel size of the backbone's pretraining."""
    find_mix_ups: bool = True
    """Refuse two scans of one grid whose label maps fit each other's images better than their own. False: for labels that do not follow
    intensities, such as territories."""
    slice_axis: SliceAxis | None = None
    """Axis perpendicular to the slices for models of this task. None: the backbone's rule."""

    @property
    def contrasts(self) -> tuple[str, ...] | None:
        """Names of the contrasts of a case; None: one scan, of any contrast."""
        return self.fourth_axis or self._contrasts_of_files()

    def _contrasts_of_files(self) -> tuple[str, ...] | None:
        named = next((value for value in (self.images, self.image_name) if isinstance(value, dict)), None)
        return None if named is None else tuple(named)

    def images_of(self, contrast: str | None) -> tuple[str, str]:
        """Return the folder and the name of a contrast's files."""
        folder, name = (
            value[contrast or ""] if isinstance(value, dict) else value for value in (self.images, self.image_name)
        )
        return folder, name

    @property
    def image_folders(self) -> tuple[str, ...]:
        """Folders of the scans, each once."""
        return tuple(dict.fromkeys(self.images_of(name)[0] for name in self.contrasts or (None,)))

    def preparation(self, of_backbone: Preparation) -> Preparation:
        """Return the preparation of scans for this task: the backbone's, with the settings and the contrasts of the task."""
        stated = {name: getattr(self, name) for name in ("spacing_mm", "slice_axis")}
        given = {name: value for name, value in stated.items() if value is not None}
        return of_backbone.model_copy(update={**given, "contrasts": self.contrasts})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.splits is None) == (self.split_rule is None):
            raise ValueError(
                "exactly one of splits and split_rule must be set: they determine the subjects of each split"
            )
        if self.split_rule is not None and self.split_rule.stratified and not self.strata:
            raise ValueError("split_rule.stratified needs strata")
        if sorted(self.classes) != list(range(1, len(self.classes) + 1)):
            raise ValueError(f"classes must number the labels 1, 2, ... without a gap, got {sorted(self.classes)}")
        self._check_contrasts()
        if self.dimensions == 3 and self.slice_axis is not None:
            raise ValueError("slice_axis is for slices, but dimensions: 3 is for volumes: leave one of both out")
        if len(set(self.classes.values())) < len(self.classes):
            raise ValueError(f"classes must have different names, got {list(self.classes.values())}")
        if self.thirds and (len(self.thirds) != 3 or len(set(self.thirds)) != 3):
            raise ValueError(
                f"thirds must be three different names, for the lower, the middle and the upper third, got {list(self.thirds)}"
            )
        try:
            subject_pattern(self.subject_pattern)
        except ValueError as error:
            raise ValueError(f"subject_pattern {error}") from None
        return self

    def _check_contrasts(self) -> None:
        both = [tuple(value) for value in (self.images, self.image_name) if isinstance(value, dict)]
        if len(both) == 2 and set(both[0]) != set(both[1]):
            raise ValueError(
                f"images and image_name must name the same contrasts, got {describe(both[0])} and {describe(both[1])}"
            )
        of_files = self._contrasts_of_files()
        if self.fourth_axis is not None and of_files is not None:
            raise ValueError(
                f"fourth_axis names the contrasts in each file, and images or image_name a file for each contrast ({describe(of_files)}): "
                "give one or the other"
            )
        files = [self.images_of(contrast) for contrast in of_files or ()]
        if twice := [name for name, place in zip(of_files or (), files, strict=True) if files.count(place) > 1]:
            raise ValueError(
                f"{' and '.join(twice)} would be the same files, {files[0][1]!r} in {files[0][0]}: give each contrast its own "
                "image_name, or its own folder in images"
            )


@dataclass(frozen=True)
class TaskImages:
    """Images of one case: its scan, or its scans of several contrasts. The case may have no label map."""

    key: str
    subject: str
    image: Path
    """The scan; with several contrasts, the first of them that the case has."""
    contrasts: Mapping[str, Path] = field(default_factory=dict, kw_only=True)
    """Scans by contrast, without the missing ones; the same file for all that it holds along its fourth axis. Empty for a task of one
    scan without a name."""

    @property
    def images(self) -> tuple[Path, ...]:
        """All scans of the case, one for each contrast."""
        return tuple(self.contrasts.values()) or (self.image,)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case, each once."""
        return tuple(file for image in dict.fromkeys(self.images) for file in files_of(image))


@dataclass(frozen=True)
class TaskScan(TaskImages):
    """One case of a task: its images, and its reference."""

    label: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case, each once."""
        return (*super().files, *files_of(self.label))


@dataclass(frozen=True)
class Task:
    """A task with existing files and disjoint splits."""

    config: TaskConfig
    scans: tuple[TaskScan, ...]
    """Scans of all splits, sorted by key; scans of other subjects are left out."""
    subjects: dict[str, tuple[str, ...]]
    """Subjects by split, sorted."""
    strata: Mapping[str, str] = field(default_factory=dict)
    """Stratum of each subject that has one."""
    unlabelled: tuple[TaskImages, ...] = ()
    """Scans without a label map, sorted by key, if the task uses them."""

    @property
    def name(self) -> str:
        """The task's name."""
        return self.config.name

    @property
    def num_classes(self) -> int:
        """Number of classes, including background."""
        return len(self.config.classes) + 1

    def scans_of(self, subjects: tuple[str, ...]) -> tuple[TaskScan, ...]:
        """Return the scans of these subjects, sorted by key."""
        return tuple(scan for scan in self.scans if scan.subject in subjects)


@dataclass(frozen=True)
class _Case:
    """Files of one case."""

    name: str
    subject: str
    image: Path
    label: Path | None
    contrasts: Mapping[str, Path]


def load_task(path: Path, *, cache: Path | None = None, unset: dict[str, str] | None = None) -> Task:
    """Read a task's YAML and find its files.

    Args:
        path: The YAML file.
        cache: Folder for `template://` subjects; None: the user's cache.
        unset: As in `read_task_config`.

    Raises:
        DataError: naming the file or the subject, the rule, and the way out.
    """
    config = read_task_config(path, unset=unset)
    labels = _resolve_folder(config.labels, "labels", path, cache)
    cases = list(_pair_files(config, labels, path, cache))
    found = [case for case in cases if case.label is not None or config.unlabelled == "refuse"]
    strata = _expand_strata(config, path)
    if config.splits is not None:
        subjects = expand_splits(config.splits, path)
    else:
        assert config.split_rule is not None
        known = {case.subject for case in (cases if config.unlabelled == "use" else found)}
        subjects = split_by_rule(config.split_rule, {case.subject for case in found}, strata, path, known=known)
    wanted = {subject for split in subjects.values() for subject in split}
    scans = _list_scans([case for case in found if case.subject in wanted], labels, config, path)
    lacking = sorted(wanted - {scan.subject for scan in scans})
    if lacking:
        raise DataError(
            f"task {path}: no scan of {join_few(lacking)} in {', '.join(config.image_folders)}, although splits names "
            f"{'it' if len(lacking) == 1 else 'them'}; check splits and subject_pattern {config.subject_pattern!r}"
        )
    for name in config.contrasts or ():
        if not any(name in scan.contrasts for scan in scans):
            folder, image_name = config.images_of(name)
            raise DataError(
                f"task {path}: no case has the contrast {name}: no scan in {folder} is called {image_name!r}, in upper and lower case as "
                f"written; correct image_name, or leave {name} out"
            )
    used = {subject: stratum for subject, stratum in sorted(strata.items()) if subject in wanted}
    unlabelled = _list_unlabelled(cases, scans, subjects, config, path) if config.unlabelled == "use" else ()
    return Task(config, scans, subjects, used, unlabelled)


def _list_scans(cases: Iterable[_Case], labels: Path, config: TaskConfig, path: Path) -> tuple[TaskScan, ...]:
    """Return the scans of the splits' subjects by key; refuse two of one key, and images without a label map."""
    scans: dict[str, TaskScan] = {}
    unlabelled = []
    for case in cases:
        key = case.name.replace("/", "_")
        if case.label is None:
            unlabelled.append(case.image.name)
        elif key in scans:
            raise DataError(
                f"task {path}: {scans[key].image} and {case.image} would have the same key {key}; rename one of them"
            )
        else:
            scans[key] = TaskScan(key, case.subject, case.image, case.label, contrasts=case.contrasts)
    if unlabelled:
        raise DataError(
            f"task {path}: {join_few(unlabelled)} in {', '.join(config.image_folders)} "
            f"ha{'s' if len(unlabelled) == 1 else 've'} no label map of "
            f"the same name in {labels} (label_name {config.label_name!r}); add it, remove the subject from the splits, or set "
            "unlabelled: leave_out (or use, for modes that learn from unlabelled patients)"
        )
    return tuple(scans[key] for key in sorted(scans))


def _list_unlabelled(
    cases: Iterable[_Case],
    labelled: Iterable[TaskScan],
    subjects: Mapping[str, tuple[str, ...]],
    config: TaskConfig,
    path: Path,
) -> tuple[TaskImages, ...]:
    """Return the cases without a label map; those of held-out patients are left out, and label maps of no scan."""
    excluded = {subject for split in HELD_OUT for subject in subjects[split]}
    if config.split_rule is not None:
        excluded |= set(expand_subjects(config.split_rule.leave_out))
    names = {scan.key: scan.image for scan in labelled}
    cases = tuple(cases)
    names_of_cases = {case.name for case in cases}
    found = []
    for case in cases:
        if len(case.contrasts) < len(config.contrasts or ()) and _extends_another(case.name, names_of_cases):
            continue  # sub-01_ce-GD_T1w beside sub-01_T1w: another contrast, or a repeat
        is_label_map = label_map_by_name(case.image.name) is not None or (
            config.label_name != "{key}" and key_of(case.image.name, config.label_name) is not None
        )
        if case.label is not None or case.subject in excluded or is_label_map:
            continue
        key = case.name.replace("/", "_")
        if (other := names.setdefault(key, case.image)) != case.image:
            raise DataError(f"task {path}: {other} and {case.image} would have the same key {key}; rename one of them")
        found.append(TaskImages(key, case.subject, case.image, contrasts=case.contrasts))
    return tuple(sorted(found, key=lambda scan: scan.key))


def _extends_another(name: str, names: Set[str]) -> bool:
    """Return whether a case's name continues another one's by words after an underscore."""
    folder, slash, last = name.rpartition("/")
    words = last.split("_")
    return any(f"{folder}{slash}{'_'.join(words[:n])}" in names for n in range(1, len(words)))


def task_sha256(path: Path) -> str:
    """Return the digest of everything in a task that affects metrics: its YAML, and the subjects of the splits if a rule sets them.

    Texts for people are left out, and so are the folders, whose files have their own digests.

    Raises:
        DataError: as `load_task`.
    """
    config = read_task_config(path)
    decides: dict[str, object] = config.model_dump(
        mode="json", exclude=_TEXT_FIELDS | {"images", "labels", "find_mix_ups"}
    )
    for newer in ("unlabelled", "min_coverage", "fourth_axis"):
        if getattr(config, newer) == TaskConfig.model_fields[newer].default:
            del decides[newer]  # left out at its default to keep older digests
    if isinstance(config.images, dict):
        decides["contrasts"] = config.contrasts
    if config.split_rule is not None:
        decides["subjects"] = load_task(path).subjects
    return hashlib.sha256(json_bytes(decides)).hexdigest()


def read_task_config(path: Path, *, unset: dict[str, str] | None = None) -> TaskConfig:
    """Read a task's YAML without searching its files.

    Args:
        path: The YAML file.
        unset: If given, receives unset environment variables with their keys, instead of an error.

    Raises:
        DataError: with one line for each invalid key.
    """
    try:
        content = read_start(path, max_bytes=MAX_YAML_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"task {path} cannot be read: {error}; give the path of a task's YAML") from None
    values = read_yaml(content, where=f"task {path}", error=DataError)
    try:
        if isinstance(values, dict):
            missing: dict[str, str] = {}
            for key in ("images", "labels", "licence", "citation"):
                if isinstance(values.get(key), str):
                    values[key] = fill_in_variables(values[key], where=key, unset=missing)
            if isinstance(values.get("images"), dict):
                values["images"] = {
                    name: fill_in_variables(folder, where=f"images.{name}", unset=missing)
                    if isinstance(folder, str)
                    else folder
                    for name, folder in values["images"].items()
                }
            if unset is not None:
                unset |= missing
            elif missing:
                verb = "variable {} is" if len(missing) == 1 else "variables {} are"
                raise DataError(
                    f"task {path}: {', '.join(missing.values())}: environment {verb.format(', '.join(missing))} not set; "
                    "set them"
                )
        return validated(TaskConfig, values, where=f"task {path}")
    except JobError as error:
        raise DataError(str(error)) from None


def _expand_strata(config: TaskConfig, path: Path) -> dict[str, str]:
    return assign_owners(config.strata, "strata", "results by stratum would count it twice", path)


def _pair_files(config: TaskConfig, labels: Path, path: Path, cache: Path | None) -> Iterable[_Case]:
    """Yield the cases with their label maps; files whose names contain no subject are ignored."""
    maps = {path.relative_to(labels).as_posix(): path for path in _list_files(labels).values()}
    find = label_finder(maps, config.label_name)
    found = []
    image_of: dict[Path, Path] = {}
    for (_, key), files in _group_files(config, path, cache).items():
        name, image, folder = next(iter(files.values()))
        label = find(name, key)
        if label is not None and (other := image_of.setdefault(label, image)) != image:
            raise DataError(
                f"task {path}: {other} and {image} have the same label map, {label}, by label_name {config.label_name!r}; name label "
                "maps like their scans, or put them into folders with the same relative path"
            )
        found.append((key, files, name, image, folder, label))
    pattern = subject_pattern(config.subject_pattern)
    for key, files, name, image, folder, label in found:
        subject = subject_by_pattern(pattern, composed(image.name), composed(image.relative_to(folder).as_posix()))
        # In a folder of scans and label maps, a label map does not count as a scan.
        if subject is not None and not (label is None and image in image_of):
            has_key = "{key}" in config.images_of(next(iter(files)))[1]
            contrasts = {contrast: file for contrast, (_, file, _) in files.items() if contrast is not None}
            contrasts |= dict.fromkeys(config.fourth_axis or (), image)
            yield _Case(Path(name).with_name(key).as_posix() if has_key else key, subject, image, label, contrasts)


_File = tuple[str, Path, Path]
"""Relative path without the suffix, path, and the folder that it is relative to."""


def _group_files(config: TaskConfig, path: Path, cache: Path | None) -> dict[tuple[str, str], dict[str | None, _File]]:
    """Return the files of each case, by relative folder and key; then by contrast, in the task's order."""
    names: tuple[str | None, ...] = (None,) if config.fourth_axis else config.contrasts or (None,)
    folders = {name: _resolve_folder(config.images_of(name)[0], "images", path, cache) for name in names}
    cases: dict[tuple[str, str], dict[str | None, _File]] = {}
    for folder in dict.fromkeys(folders.values()):
        patterns = {name: config.images_of(name)[1] for name in names if folders[name] == folder}
        for below, file in _list_files(folder).items():
            keys = {name: key for name, pattern in patterns.items() if (key := key_of(below, pattern)) is not None}
            if keys:
                # Of several patterns, the one with the longest fixed part: {key}_T1w also matches sub-01_ce-GD_T1w.
                name, key = min(keys.items(), key=lambda item: len(item[1]))
                cases.setdefault((below.rpartition("/")[0], key), {})[name] = (below, file, folder)
    return {case: {name: files[name] for name in names if name in files} for case, files in cases.items()}


def _resolve_folder(source: str, key: str, path: Path, cache: Path | None) -> Path:
    if source.startswith("template:"):
        from p2r.data.phantom import resolve_source  # imported here: SciPy takes a second

        return resolve_source(source, cache or cache_folder())
    found = local_path(source)
    if found is None:
        raise DataError(
            f"task {path}: {key} is {source!r}; a task's folders must be paths, file:// or template:// URLs"
        )
    folder = path.absolute().parent / found.expanduser()
    if not folder.is_dir():
        raise DataError(
            f"task {path}: {key} is {source}, but there is no folder {folder}; get the data, or correct the path{unquoted_hint(source)}"
        )
    return folder


def _list_files(folder: Path) -> dict[str, Path]:
    """Return NIfTI files by their relative path without the suffix, so that `.nii` and `.NII.GZ` can be paired."""
    files: dict[str, Path] = {}
    for path in sorted(images_below(folder)):
        name = composed(path.relative_to(folder).with_name(scan_key(path)).as_posix())
        if name in files:
            raise DataError(
                f"{folder} holds {files[name].name} and {path.name}, two files of the same name; remove one"
            )
        files[name] = path
    return files
