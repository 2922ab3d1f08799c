"""`p2r check` and `p2r init`: a survey of a folder of scans, and a first job and task for it.

survey of the names -> some scans and label maps read -> facts, a contact sheet, the text of a job and a task
"""

import glob
import re
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from p2r.console import show
from p2r.data.label_maps import label_map_by_voxels
from p2r.data.names import scan_key
from p2r.data.preparation import percentile_table, slice_axis
from p2r.data.survey import NAMES, Form, Pairing, Survey, survey
from p2r.data.thumbnails import lot, thumbnail
from p2r.data.twins import twins_of
from p2r.data.volume import Volume, read_labels, read_volume
from p2r.errors import InputError, RefusedScan
from p2r.evaluate.drafts import (
    LICENCE,
    PROVENANCE,
    Voxels,
    draft_job,
    draft_task,
    labelled_subjects,
    name_for,
    problems_of,
)
from p2r.evaluate.task_files import load_task
from p2r.job import read_job
from p2r.storage import cache_folder

Item = TypeVar("Item")

_READ_S = 8.0
_LEAST_READ = 8  # scans
_CLOCK_S_PER_CPU_S = 4.0  # clock seconds allowed per second of work, for busy machines and remote files
_SHOWN = 24
_LABELS_READ = 12
_LEAST_LABELLED = 4  # one each to train, validate and test on, and one spare
Tile = tuple[NDArray[np.uint8] | None, str, str, bool]


@dataclass
class Found:
    """Findings about a folder."""

    names: Survey
    num_read: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Reason by path."""
    spacings_mm: list[tuple[float, ...]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    values: dict[int, int] = field(default_factory=dict)
    """Number of label maps, among those read, that contain each value."""
    twins: dict[str, str] = field(default_factory=dict)
    """Subjects that have a copy of another subject's scan -> that subject."""
    seconds: float = 0.0

    @property
    def voxels(self) -> Voxels | None:
        """Median sizes of the scans that were read; None if there are none."""
        if not self.spacings_mm:
            return None
        planes = [_plane_size(spacing, shape) for spacing, shape in zip(self.spacings_mm, self.shapes, strict=True)]
        return Voxels(*(float(np.median(values)) for values in zip(*planes, strict=True)))


def survey_folder(
    folder: str | Path,
    *,
    labels: Path | None = None,
    form: Form | None = None,
    contrast: str | None = None,
    read_s: float = _READ_S,
) -> Found:
    """Survey a folder, and read an even sample of its scans within a time limit.

    Raises:
        DataError: See `survey`.
    """
    found = Found(survey(folder, labels=labels, form=form, contrast=contrast, cache=cache_folder()))
    channels = list(found.names.fourth_axis)
    began, cpu_began = time.monotonic(), time.process_time()
    for scan in _shuffle(found.names.scans, lambda scan: scan.path):
        took_s = max(time.process_time() - cpu_began, (time.monotonic() - began) / _CLOCK_S_PER_CPU_S)
        if found.num_read >= _LEAST_READ and took_s > read_s:
            break
        found.num_read += 1
        below = scan.below or scan.name
        if scan.format == "dicom":
            continue
        try:
            volume = read_volume(scan.path, max_frames=None if channels else 1)
            if channels:
                from p2r.data.contrasts import split_contrasts  # imports torch

                volume = next(iter(split_contrasts(volume, channels).values()))
            if reason := label_map_by_voxels(volume.data):
                raise RefusedScan("label_map", f"{scan.path} {reason}")
            percentile_table(volume.data)
        except RefusedScan as error:
            found.refused[below] = str(error)
            _add_tile(found, None, below, error.code, is_refused=True)
            continue
        found.spacings_mm.append(volume.spacing_mm)
        found.shapes.append(volume.data.shape[:3])
        _add_tile(found, volume, below, " x ".join(f"{mm:.3g}" for mm in volume.spacing_mm) + " mm")
    found.twins = twins_of(found.names.subjects)
    pairing = found.names.pairing
    for _, path in _shuffle(pairing.pairs if pairing else (), lambda pair: str(pair[1]))[:_LABELS_READ]:
        try:
            for value in np.unique(read_labels(path).data).tolist():
                found.values[int(value)] = found.values.get(int(value), 0) + 1
        except RefusedScan as error:
            found.refused[str(path)] = str(error)
    found.seconds = time.monotonic() - began
    return found


def classes_of(found: Found) -> dict[int, str]:
    """Return the classes of a task: from its `dataset.json` or else from the label maps that were read."""
    names = found.names
    if names.dataset is not None and names.label_names:
        return dict(names.label_names)
    values = sorted(value for value in found.values if value > 0)
    # A mask is named by its entity: sub-01_label-lesion_mask.
    entity = re.search(r"_(?:label|desc)-([A-Za-z0-9]+)", names.pairing.label_name) if names.pairing else None
    single = {1: entity[1]} if entity and values == [1] else {}
    return {value: names.label_names.get(value) or single.get(value, f"label{value}") for value in values}


def lines_of(found: Found) -> Iterator[tuple[str, str]]:
    """Yield the facts to print: name and text."""
    names = found.names
    yield "folder", f"{names.root}: {NAMES[names.form]}{', by its dataset.json' * (names.dataset is not None)}"
    if (above := names.dataset_above) is not None:
        yield "not used", f"{above}: name {above.parent} instead, and its channels, labels and test images are used"
    yield from _lines_of_scans(found)
    if found.shapes:
        yield "voxels", _format_voxels(found)
    yield from _lines_of_left_out(names)
    yield from _lines_of_labels(found)
    yield "read", f"{found.num_read} of {len(names.scans)} scans in {found.seconds:.1f} s, {len(found.refused)} refused"
    for path, reason in list(found.refused.items())[:10]:
        yield "refused", f"{path}: {reason}"
    if names.dataset is not None and names.dataset.ignored:
        yield (
            "ignored",
            f"labels {', '.join(names.dataset.ignored)} of dataset.json are regions or ignored: not part of a task",
        )


def _lines_of_scans(found: Found) -> Iterator[tuple[str, str]]:
    names = found.names
    subjects = {subject: scans for subject, scans in names.subjects.items() if subject}
    first = next(iter(subjects), "none")
    yield (
        "scans",
        f"{len(names.scans)} of {len(subjects)} subjects, by the pattern {names.subject_pattern}, such as {first}"
        + (f" ({len(subjects[first])} scan{'s' * (len(subjects[first]) > 1)})" if subjects else ""),
    )
    if nameless := names.subjects.get(""):
        yield (
            "no subject",
            f"{len(nameless)} scans, such as {nameless[0].name}: left out; write another ingest.subject_pattern",
        )
    if len(names.scans) > 2 and len(subjects) == 1:
        yield (
            "one subject",
            "all scans seem to be of one person: write another ingest.subject_pattern, or ingest.one_subject: true",
        )
    for subject, owner in list(found.twins.items())[:10]:
        yield (
            "copy",
            f"{subject} has the voxels of {owner}: one person under two names would leak, so {subject} is left out",
        )
    if channels := names.fourth_axis:
        yield "fourth axis", f"each image holds {len(channels)} contrasts: {', '.join(channels.values())}"
    else:
        yield "contrasts", ", ".join(f"{name} {count}" for name, count in names.contrasts.items())


def _format_voxels(found: Found) -> str:
    largest = _format_range([max(spacing) for spacing in found.spacings_mm], "mm")
    in_plane = _format_range([_plane_size(s, n)[0] for s, n in zip(found.spacings_mm, found.shapes, strict=True)], "mm")
    extents = " x ".join(_format_range([shape[axis] for shape in found.shapes]) for axis in range(3))
    return f"{largest} at most, planes of {in_plane}; {extents} voxels"


def _lines_of_left_out(names: Survey) -> Iterator[tuple[str, str]]:
    """Yield what pretraining leaves out."""
    if names.label_maps:
        one = names.label_maps[0]
        yield (
            "label maps",
            f"{len(names.label_maps)} left out of pretraining, such as {one.below or one.name}, which {one.label_map}",
        )
    for left_out in names.passed_over:
        folder, reason = Path(left_out.path), left_out.passed_over
        if names.pairing is not None and folder in (names.pairing.labels, *names.pairing.labels.parents):
            reason = f"{reason.partition(';')[0]}; the task reads its label maps"
        yield "passed over", f"{left_out.path}: {reason}"
    if names.test:
        yield (
            "test images",
            f"{len(names.test)} scans, {', '.join(names.test_patterns[:3])}: held out by the data set, so left out of pretraining",
        )


def _lines_of_labels(found: Found) -> Iterator[tuple[str, str]]:
    """Yield how label maps fit the scans, or why they are not used."""
    names, pairing = found.names, found.names.pairing
    if pairing is not None:
        classes = ", ".join(f"{value} {name}" for value, name in classes_of(found).items())
        yield (
            "labelled",
            f"{len(pairing.pairs)} scans of {len(labelled_subjects(names, pairing))} subjects: scans {pairing.image_name}, label maps "
            f"{pairing.label_name} in {pairing.labels}; {classes}",
        )
        if pairing.num_unlabelled:
            yield (
                "unlabelled",
                f"{pairing.num_unlabelled} scans called {pairing.image_name} have no label map: for pretraining; with "
                "unlabelled: use in the task, weak_to_strong learns from them, too",
            )
        if pairing.contrasts:
            yield from _contrast_lines(pairing)
        elif pairing.others:
            yield "also", f"label maps fit scans called {', '.join(pairing.others[:4])}, too: --contrast NAME chooses"
    elif names.label_maps and "://" in names.root:
        yield "labelled", "not read: tasks read scans and label maps from local folders; copy the data to one"
    elif names.label_maps:
        yield (
            "labelled",
            "no label map fits a scan by its name; give their folder by --labels, or rename them (jobs/tasks/folder.yaml)",
        )


def _contrast_lines(pairing: Pairing) -> Iterator[tuple[str, str]]:
    """Yield the changes by which a job and a task read all contrasts of a case."""
    names = ", ".join(pairing.contrasts)
    files = ", ".join(f'{name}: "{image_name}"' for name, (image_name, _) in pairing.contrasts.items())
    words = ", ".join(f'{name}: "{words}"' for name, (_, words) in pairing.contrasts.items())
    yield (
        "several",
        f"each case has up to {len(pairing.contrasts)} contrasts, {names}: the files below read one, {pairing.image_name}, which "
        "--contrast NAME changes. To read all:",
    )
    yield "", f"in the task: image_name: {{{files}}}"
    yield "", f"in the job: ingest.sessions: {{contrasts: {{{words}}}}}, and pretrain.model.contrasts: [{names}]"


@dataclass(frozen=True)
class Drafts:
    """Texts of a job and, if label maps were found, of its task."""

    job: str
    task: str | None
    why_no_task: str = ""


def drafts_of(
    found: Found,
    folder: Path,
    *,
    name: str | None = None,
    licence: str | None = None,
    provenance: str | None = None,
    storage: str | None = None,
) -> Drafts:
    """Return the job and the task that would be written into `folder`."""
    names, pairing = found.names, found.names.pairing
    cohort = name_for(names.root)
    name = name or cohort
    stated = {"licence": licence or names.licence or LICENCE, "provenance": provenance or names.reference or PROVENANCE}
    classes = classes_of(found)
    labelled = labelled_subjects(names, pairing) if pairing is not None else set()
    why = ""
    if pairing is None:
        why = (
            "a task reads label maps from folders: copy the data to one"
            if "://" in names.root
            else "no label maps were found"
        )
    elif not classes:
        why = "the label maps that were read are empty"
    elif problem := problems_of(list(classes)):
        why = problem
    elif len(labelled) < _LEAST_LABELLED:
        why = f"{len(labelled)} labelled subjects are too few to train, validate and test on"
    task = None
    if pairing is not None and not why:
        task = draft_task(
            names, pairing, name=name, cohort=cohort, classes=classes, folder=folder, twins=found.twins,
            fourth_axis=tuple(names.fourth_axis), **stated,
        )  # fmt: skip
    copies = [glob.escape(scan.below) for subject in found.twins for scan in names.subjects[subject]]
    job = draft_job(
        name=name, sources=names.root, cohort=cohort, exclude=names.test_patterns, copies=copies, subject_pattern=names.subject_pattern,
        task="task.yaml" if task else None,
        voxels=found.voxels, num_labelled=len(labelled) // 2, storage=storage, fourth_axis=names.fourth_axis, **stated,
    )  # fmt: skip
    return Drafts(_add_header(job, "job", found), None if task is None else _add_header(task, "task", found), why)


def check(
    folder: str, *, labels: Path | None, form: Form | None, contrast: str | None, output: Path, read_all: bool
) -> None:
    """Print how p2r reads a folder, and draw some of its scans."""
    from p2r.report.canvas import CLASS_COLOURS, FAINT
    from p2r.report.corpus_report import contact_sheet

    found = survey_folder(
        folder, labels=labels, form=form, contrast=contrast, read_s=float("inf") if read_all else _READ_S
    )
    drafts = drafts_of(found, Path.cwd())
    _print_facts(lines_of(found))
    tiles = [(picture, name, line, CLASS_COLOURS[5] if bad else FAINT) for picture, name, line, bad in found.tiles]
    output.write_bytes(contact_sheet(tiles, f"{len(tiles)} of {len(found.names.scans)} scans", found.names.root))
    show(f"picture     {output}")
    _show_text("job.yaml, as p2r init would write it:", drafts.job)
    if drafts.task is None:
        show(f"no task.yaml: {drafts.why_no_task}")
    else:
        _show_text("task.yaml:", drafts.task)


def init(
    folder: Path,
    *,
    scans: str,
    labels: Path | None,
    form: Form | None,
    contrast: str | None,
    name: str | None,
    licence: str | None,
    provenance: str | None,
) -> None:
    """Write `job.yaml` and, if there are label maps, `task.yaml` for a folder of scans; print the next commands.

    Raises:
        InputError: One of the files already exists.
    """
    targets = {kind: folder / f"{kind}.yaml" for kind in ("job", "task")}
    if there := [str(path) for path in targets.values() if path.exists()]:
        raise InputError(
            f"{', '.join(there)} exist{'s' * (len(there) == 1)} already: give another folder, or move them"
        )
    found = survey_folder(scans, labels=labels, form=form, contrast=contrast, read_s=3.0)
    folder.mkdir(parents=True, exist_ok=True)
    name = name or name_for(folder.absolute())
    drafts = drafts_of(found, folder.absolute(), name=name, licence=licence, provenance=provenance)
    _print_facts(lines_of(found))
    try:
        lines = list(_write_drafts(targets, drafts, found))
    except InputError:  # a file that cannot be used would be in the way of the next call
        for path in targets.values():
            path.unlink(missing_ok=True)
        raise
    for line in lines:
        show(line)


def _write_drafts(targets: Mapping[str, Path], drafts: Drafts, found: Found) -> Iterator[str]:
    """Write and check the files, and yield the lines to print.

    Raises:
        InputError: A file that was written is not valid.
    """
    targets["job"].write_text(drafts.job, encoding="utf-8")
    targets["job"].chmod(0o755)
    yield f"wrote       {targets['job']}"
    if drafts.task is None:
        yield f"no task     {drafts.why_no_task}: the job only pretrains, without scores"
    else:
        targets["task"].write_text(drafts.task, encoding="utf-8")
        splits = load_task(targets["task"], unset={}).subjects
        counts = ", ".join(f"{len(subjects)} {split}" for split, subjects in splits.items())
        yield f"wrote       {targets['task']}: {counts} patients"
    yield from ("", "next:", *(f"    {line}" for line in next_commands(targets, drafts, found)))


def next_commands(targets: Mapping[str, Path], drafts: Drafts, found: Found) -> list[str]:
    """Return the commands to run after `p2r init`. Every file that one of them reads is there already, or an earlier one writes it."""
    job, files = (
        targets["job"],
        " ".join(str(targets[kind]) for kind in ("job", "task") if kind == "job" or drafts.task),
    )
    asked = [name for name in ("P2R_LICENCE", "P2R_PROVENANCE") if f"${{{name}}}" in drafts.job]
    given = (
        "export " + " ".join(f'{name}="..."' for name in asked) + "  # required: they travel with the data"
        if asked
        else ""
    )
    contrasts = ",".join(found.names.fourth_axis)
    scan = shlex.quote(f"{contrasts}=" * bool(contrasts) + (found.names.test or found.names.scans)[0].path)
    written = read_job(job, unset={})
    storage = shlex.quote(written.storage.removeprefix("file://"))
    after = (
        [f"p2r predict {storage}/models/{written.name}/all {scan} -o segmentation.nii.gz"]
        if drafts.task
        else [  # the job only pretrains
            f"p2r publish {job}",
            f"p2r embed {storage}/backbones/{written.name}/1 {scan} -o features.nii.gz",
        ]
    )
    return [*([given] if given else []), f"p2r validate {files}", f"p2r run {job}", *after]


def _add_tile(found: Found, volume: Volume | None, below: str, line: str, *, is_refused: bool = False) -> None:
    if len(found.tiles) < _SHOWN or is_refused:
        picture = None if volume is None else thumbnail(volume)
        found.tiles.append((picture, scan_key(below), line, is_refused))


def _shuffle(items: Sequence[Item], key: Callable[[Item], str]) -> list[Item]:
    """Return the items in a random but fixed order, so that the first n are a fair sample."""
    return sorted(items, key=lambda item: lot(key(item)))


def _plane_size(spacing_mm: Sequence[float], shape: Sequence[int]) -> tuple[float, float]:
    """Return voxel size and larger extent in the plane, mm."""
    axis = slice_axis(tuple(spacing_mm), shape=tuple(shape))
    others = [other for other in range(3) if other != axis]
    return max(spacing_mm[a] for a in others), max(spacing_mm[a] * shape[a] for a in others)


def _format_range(values: Sequence[float], unit: str = "") -> str:
    low, high = min(values), max(values)
    return (f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}") + f" {unit}" * bool(unit)


def _add_header(text: str, kind: str, found: Found) -> str:
    facts = [
        line
        for name, fact in lines_of(found)
        if name in ("folder", "scans", "contrasts", "labelled")
        for line in textwrap.wrap(
            f"{name}: {fact}",
            130,
            initial_indent="# ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
    opening = {
        "job": "#!/usr/bin/env -S python -m cluster run\n# Own scans -> corpus -> backbone -> few-shot table and model, written by "
        "`p2r init`. Correct what is wrong and run it again:\n# finished parts are kept.",
        "task": "# A task: scans, label maps, meaning of the labels, and the patients for training, validation and test.",
    }[kind]
    return "\n".join([opening, "#", *facts, text])


def _show_text(title: str, text: str) -> None:
    for line in ("", title, "", *(f"    {line}" for line in text.split("\n"))):
        show(line)


def _print_facts(facts: Iterator[tuple[str, str]]) -> None:
    for name, fact in facts:
        show(f"{name:<11} {fact}")
