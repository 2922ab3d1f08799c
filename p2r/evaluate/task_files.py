"""A task's YAML and the names of its files -> scans with label maps, split by patient. Nothing of a file is read.

    jobs/tasks/acdc.yaml -> TaskConfig -> Task(scans, subjects by split)

Whatever would make a figure mean something else, and can be told from names, is refused here: a patient in two splits, an image
without its label map, two scans of one name. `tasks` reads the files.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlparse

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from p2r.config import Section
from p2r.data.folders import images_below
from p2r.data.names import composed, scan_key
from p2r.data.pairs import key_of, label_finder
from p2r.data.preparation import Preparation, SliceAxis
from p2r.data.subjects import expand_subjects
from p2r.documents import read_start
from p2r.errors import DataError, JobError
from p2r.job import fill_in_variables, validated
from p2r.patterns import subject_pattern
from p2r.plain_yaml import MAX_YAML_BYTES, read_yaml
from p2r.randomness import keyed_number
from p2r.storage import cache_folder, json_bytes

Split = Literal["train", "validation", "test"]
HELD_OUT: tuple[Split, ...] = ("validation", "test")
Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
FileName = Annotated[str, Field(pattern=r"^[^{}/]*(\{key\})?[^{}/]*$", min_length=1)]

_WORDS = {"title", "licence", "citation", "caveat", "thirds"}  # for people


def _whole_or_fraction(share: float) -> float:
    if share <= 0 or (share >= 1 and not share.is_integer()):
        raise ValueError("must be a number of subjects, or a fraction of them between 0 and 1")
    return share


Share = Annotated[float, AfterValidator(_whole_or_fraction)]


class Splits(Section):
    """Subjects of each split, as names or ranges such as `patient[001-014]`."""

    train: Patterns
    """Labelled patients are drawn from these."""
    validation: Patterns
    """Learning rates and the published model are chosen on these."""
    test: Patterns
    """Read once per frozen recipe."""


class SplitRule(Section):
    """Splits by a seeded rule: test subjects, then validation subjects, and the others train.

    A subject's place in the draw is a digest of the seed and its own name. Fractions without strata compare it with a
    bound: sizes are about what was asked for, and subjects that join later move nobody. Numbers of subjects, and strata,
    take the first places: sizes are exact, and a subject that joins can push another one into another split.
    """

    seed: int = 0
    """Another seed makes other splits."""
    validation: Share
    """Number of validation subjects, or the fraction of subjects that validate, as in 10 or 0.1."""
    test: Share
    """Number of test subjects, or the fraction of subjects that are tested on."""
    stratified: bool = False
    """Take each split from all strata in proportion to their size."""
    leave_out: tuple[str, ...] = ()
    """Subjects that are in no split, as names or ranges."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.test < 1 and self.validation < 1 and self.test + self.validation >= 1:
            raise ValueError(
                f"validation and test take {self.validation:g} + {self.test:g} of the subjects; some must train"
            )
        return self


class TaskConfig(Section):
    """A file of `jobs/tasks/`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    """Short name: part of folders, trial ids and rows."""
    title: str
    """What is segmented, in what, for headings."""
    images: str
    """Folder with the scans: a path (relative to this file; `${P2R_DATA}` and the like are filled in) or `template://`."""
    labels: str
    """Folder with the label maps; it may be the scans' own."""
    image_name: FileName = "{key}"
    """Name of a scan without its suffix; `{key}` stands for what it shares with its label map. `{key}_0000` takes the first channel of
    nnU-Net's folders. A name without `{key}`, such as `t1`: the one of that name in each patient's folder."""
    label_name: FileName = "{key}"
    """Name of a scan's label map without its suffix, as in `{key}_gt`. It is looked for in the folder of the same path as the scan's; if it
    is not there, the only label map of that name is taken."""
    unlabelled: Literal["refuse", "leave_out"] = "refuse"
    """Scans without a label map. refuse: a label map that is missing is a mistake. leave_out: they are no part of the task; pretraining
    may take them."""
    licence: Annotated[str, Field(min_length=1)]
    """SPDX identifier or name of the data's licence (`${P2R_LICENCE}` is filled in). It travels into reports and models."""
    citation: str = ""
    """What must be cited."""
    caveat: str = ""
    """What a reader of the figures must know first."""
    cohort: str = "default"
    """Name space of the subjects, as in a corpus: the two are compared to find a leak."""
    subject_pattern: str = r"^(sub-[A-Za-z0-9]+|[^_.]+)"
    """Regular expression searched in a scan's file name, then in its path below `images`; its first group is the patient, all of whose
    scans belong to one split. Python's syntax; see `p2r.patterns` for what it may not have."""
    classes: Annotated[dict[PositiveInt, Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=255)]
    """Name of each foreground label, from 1 on; 0 is the background."""
    splits: Splits | None = None
    """Who is trained, chosen and tested on, by name."""
    split_rule: SplitRule | None = None
    """Or a rule that decides it."""
    strata: dict[Annotated[str, Field(min_length=1)], Patterns] = Field(default={})
    """Groups of subjects, such as pathologies, as names or ranges: draws can be stratified by them, and results are shown by them."""
    thirds: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """What the lower, the middle and the upper third along the slices are called, as in [base, middle, apex]; lower is left, posterior or
    inferior. Empty: lower, middle, upper."""
    dimensions: Literal[2, 3] | None = None
    """Networks that the task is for: 2 of planes, 3 of volumes. None: either, but of planes where `slice_axis` is stated."""
    spacing_mm: PositiveFloat | None = None
    """Pixel size at which models of this task read scans, mm. None: the one of the backbone's pretraining, which is what it knows."""
    find_mix_ups: bool = True
    """Refuse two scans of one grid whose label maps fit each other's images better than their own. False: where labels do not follow what
    is seen, such as territories."""
    slice_axis: SliceAxis | None = None
    """Axis across which planes are cut for models of this task. None: the backbone's rule."""

    def preparation(self, of_backbone: Preparation) -> Preparation:
        """Return how models of this task read a scan: the backbone's way, but for what the task states."""
        stated = {name: getattr(self, name) for name in ("spacing_mm", "slice_axis")}
        return of_backbone.model_copy(update={name: value for name, value in stated.items() if value is not None})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.splits is None) == (self.split_rule is None):
            raise ValueError("who is trained and tested on is said by splits or by split_rule, by exactly one of them")
        if self.split_rule is not None and self.split_rule.stratified and not self.strata:
            raise ValueError("split_rule.stratified needs strata")
        if sorted(self.classes) != list(range(1, len(self.classes) + 1)):
            raise ValueError(f"classes must number the labels 1, 2, ... without a gap, got {sorted(self.classes)}")
        if self.dimensions == 3 and self.slice_axis is not None:
            raise ValueError("slice_axis says how planes are cut, dimensions: 3 wants volumes: leave one of both out")
        if len(set(self.classes.values())) < len(self.classes):
            raise ValueError(f"classes must have different names, got {list(self.classes.values())}")
        if self.thirds and (len(self.thirds) != 3 or len(set(self.thirds)) != 3):
            raise ValueError(
                f"thirds must be three different names, of the lower, the middle and the upper third, got {list(self.thirds)}"
            )
        try:
            subject_pattern(self.subject_pattern)
        except ValueError as error:
            raise ValueError(f"subject_pattern {error}") from None
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
    strata: Mapping[str, str] = field(default_factory=dict)
    """Stratum of each subject that has one."""

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


def load_task(path: Path, *, cache: Path | None = None, unset: dict[str, str] | None = None) -> Task:
    """Read a task's YAML and find its files.

    Args:
        path: The YAML file.
        cache: Where `template://` subjects are made; None: the user's cache.
        unset: As for `read_task_config`.

    Raises:
        DataError: naming the file or the subject, the rule, and the way out.
    """
    config = read_task_config(path, unset=unset)
    images = _folder(config.images, "images", path, cache)
    labels = _folder(config.labels, "labels", path, cache)
    found = [
        pair for pair in _pairs(config, images, labels, path) if pair[3] is not None or config.unlabelled == "refuse"
    ]
    strata = _strata(config, path)
    if config.splits is not None:
        subjects = _named_splits(config.splits, path)
    else:
        subjects = _splits_by_rule(config, {subject for _, subject, _, _ in found}, strata, path)
    wanted = {subject for split in subjects.values() for subject in split}
    scans: dict[str, TaskScan] = {}
    unlabelled = []
    for name, subject, image, label in found:
        key = name.replace("/", "_")
        if subject not in wanted:
            continue
        if label is None:
            unlabelled.append(image.name)
        elif key in scans:
            raise DataError(
                f"task {path}: {scans[key].image} and {image} would both be called {key}; rename one of them"
            )
        else:
            scans[key] = TaskScan(key=key, subject=subject, image=image, label=label)
    if unlabelled:
        raise DataError(
            f"task {path}: {few(unlabelled)} in {images} ha{'s' if len(unlabelled) == 1 else 've'} no label map of "
            f"the same name in {labels} (label_name {config.label_name!r}); add it, take the subject out of the splits, or write "
            "unlabelled: leave_out"
        )
    lacking = sorted(wanted - {scan.subject for scan in scans.values()})
    if lacking:
        raise DataError(
            f"task {path}: no scan of {few(lacking)} in {images}, though splits names "
            f"{'it' if len(lacking) == 1 else 'them'}; check splits and subject_pattern {config.subject_pattern!r}"
        )
    return Task(
        config,
        tuple(scans[key] for key in sorted(scans)),
        subjects,
        {subject: stratum for subject, stratum in sorted(strata.items()) if subject in wanted},
    )


def task_sha256(path: Path) -> str:
    """Return a digest of what of a task decides figures: its YAML without words for people and without the folders, whose files have
    digests of their own; and, where a rule decides the splits, who is in them.

    Raises:
        DataError: as `load_task`.
    """
    config = read_task_config(path)
    decides: dict[str, Any] = config.model_dump(mode="json", exclude=_WORDS | {"images", "labels", "find_mix_ups"})
    if config.unlabelled == TaskConfig.model_fields["unlabelled"].default:
        del decides["unlabelled"]  # a field that came later: digests of earlier readings stay
    if config.split_rule is not None:
        decides["subjects"] = load_task(path).subjects
    return hashlib.sha256(json_bytes(decides)).hexdigest()


def read_task_config(path: Path, *, unset: dict[str, str] | None = None) -> TaskConfig:
    """Read a task's YAML without looking for its files.

    Args:
        path: The YAML file.
        unset: If given, environment variables that are not set are noted here, with their keys, instead of refused.

    Raises:
        DataError: with one line for each key that is wrong.
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
            if unset is not None:
                unset |= missing
            elif missing:
                verb = "variable {} is" if len(missing) == 1 else "variables {} are"
                raise DataError(
                    f"task {path}: {', '.join(missing.values())}: environment {verb.format(', '.join(missing))} not set; "
                    "set what is missing"
                )
        return validated(TaskConfig, values, where=f"task {path}")
    except JobError as error:
        raise DataError(str(error)) from None


def _named_splits(splits: Splits, path: Path) -> dict[str, tuple[str, ...]]:
    patterns: dict[str, tuple[str, ...]] = splits.model_dump()
    owner = _owners(patterns, "splits", "the figures would count what was trained on", path)
    return {split: tuple(sorted(subject for subject in owner if owner[subject] == split)) for split in patterns}


def _strata(config: TaskConfig, path: Path) -> dict[str, str]:
    return _owners(config.strata, "strata", "figures by stratum would count it twice", path)


def _owners(patterns: Mapping[str, tuple[str, ...]], key: str, reason: str, path: Path) -> dict[str, str]:
    """Return which entry of `key` each subject is in; it may be in one only."""
    owner: dict[str, str] = {}
    for name, of_name in patterns.items():
        try:
            subjects = expand_subjects(of_name)
        except DataError as error:
            raise DataError(f"task {path}: {key}.{name}: {error}") from None
        for subject in subjects:
            if owner.setdefault(subject, name) != name:
                raise DataError(
                    f"task {path}: {subject} is in the {key} {owner[subject]} and {name}; a subject belongs to one, or {reason}"
                )
    return owner


def _splits_by_rule(
    config: TaskConfig, subjects: set[str], strata: Mapping[str, str], path: Path
) -> dict[str, tuple[str, ...]]:
    rule = config.split_rule
    assert rule is not None
    try:
        left_out = set(expand_subjects(rule.leave_out))
    except DataError as error:
        raise DataError(f"task {path}: split_rule.leave_out: {error}") from None
    if unknown := sorted(left_out - subjects):
        raise DataError(f"task {path}: split_rule.leave_out names {few(unknown)}, of whom there is no scan; correct it")
    subjects = subjects - left_out
    if rule.stratified and (without := sorted(subjects - strata.keys())):
        raise DataError(
            f"task {path}: split_rule.stratified needs a stratum of every subject, {few(without)} ha"
            f"{'s' if len(without) == 1 else 've'} none; name it in strata, or in split_rule.leave_out"
        )
    by_bound = not rule.stratified and rule.test < 1
    test = (
        _below(rule.test, subjects, "test", rule)
        if by_bound
        else _first(_number(rule.test, subjects), subjects, "test", rule, strata)
    )
    validation = (
        _below(rule.validation / (1 - rule.test), subjects - test, "validation", rule)
        if by_bound and rule.validation < 1
        else _first(_number(rule.validation, subjects), subjects - test, "validation", rule, strata)
    )
    found = {"train": subjects - test - validation, "validation": validation, "test": test}
    if empty := [split for split, members in found.items() if not members]:
        raise DataError(
            f"task {path}: split_rule leaves nobody in {', '.join(empty)}, of {len(subjects)} subjects; ask for other numbers "
            "of subjects"
        )
    return {split: tuple(sorted(members)) for split, members in found.items()}


def _number(share: float, subjects: set[str]) -> int:
    return int(share) if share >= 1 else round(share * len(subjects))


def _place(subject: str, split: str, rule: SplitRule) -> float:
    """Where in [0, 1) a subject stands, whoever else there is."""
    return keyed_number(rule.seed, "split", split, subject) / 2**128


def _below(bound: float, pool: set[str], split: str, rule: SplitRule) -> set[str]:
    return {subject for subject in pool if _place(subject, split, rule) < bound}


def _first(number: int, pool: set[str], split: str, rule: SplitRule, strata: Mapping[str, str]) -> set[str]:
    """The first `number` of the pool, from each stratum in proportion to its size (largest remainders) if the rule says so."""
    stratum_of = {subject: strata[subject] if rule.stratified else "" for subject in pool}
    members = {
        stratum: sorted(
            (subject for subject in pool if stratum_of[subject] == stratum),
            key=lambda subject: _place(subject, split, rule),
        )
        for stratum in sorted(set(stratum_of.values()))
    }
    number = min(number, len(pool))
    shares = {stratum: number * len(of_it) / len(pool) for stratum, of_it in members.items()}
    by_remainder = sorted(shares, key=lambda stratum: math.floor(shares[stratum]) - shares[stratum])
    one_more = by_remainder[: number - sum(math.floor(share) for share in shares.values())]
    return {
        subject
        for stratum, of_it in members.items()
        for subject in of_it[: math.floor(shares[stratum]) + (stratum in one_more)]
    }


def _pairs(config: TaskConfig, images: Path, labels: Path, path: Path) -> Iterable[tuple[str, str, Path, Path | None]]:
    """Yield name, subject, image and label map of each scan; files that name no subject are no scans."""
    maps = {path.relative_to(labels).as_posix(): path for path in _files(labels).values()}
    find = label_finder(maps, config.label_name)
    scans = []
    scan_of: dict[Path, Path] = {}
    for name, image in _files(images).items():
        key = key_of(name, config.image_name)
        if key is None:
            continue
        label = find(name, key)
        if label is not None and (other := scan_of.setdefault(label, image)) != image:
            raise DataError(
                f"task {path}: {other} and {image} have one label map, {label}, by label_name {config.label_name!r}; name label "
                "maps as their scans, or put them into folders of the same path"
            )
        scans.append((Path(name).with_name(key).as_posix() if "{key}" in config.image_name else key, image, label))
    pattern = subject_pattern(config.subject_pattern)
    for key, image, label in scans:
        below = composed(image.relative_to(images).as_posix())
        subject = pattern.first_group(composed(image.name)) or pattern.first_group(below)
        # In a folder that holds both, a label map is no scan.
        if subject is not None and not (label is None and image in scan_of):
            yield key, subject, image, label


def _folder(source: str, key: str, path: Path, cache: Path | None) -> Path:
    scheme = urlparse(source).scheme
    if scheme == "template":
        from p2r.data.phantom import resolve_source  # SciPy takes a second to import

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
    """Return NIfTI files by their path below `folder` without the suffix, so that `.nii` and `.NII.GZ` pair up."""
    files: dict[str, Path] = {}
    for path in sorted(images_below(folder)):
        name = composed(path.relative_to(folder).with_name(scan_key(path)).as_posix())
        if name in files:
            raise DataError(f"{folder} holds {files[name].name} and {path.name}: one name, two files; remove one")
        files[name] = path
    return files


def few(names: list[str]) -> str:
    """Return up to five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
