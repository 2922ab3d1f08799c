"""A survey of a folder -> draft files of a job and of a task, for a user's own data.

Both files are meant to be read and edited: each key that may need a change has a comment. Facts that the folder does not
reveal become variables, which a job requires by name: a licence and a source are never invented.
"""

import glob
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import yaml

from p2r.console import visible
from p2r.data.survey import Pairing, Survey

LICENCE, PROVENANCE = "${P2R_LICENCE}", "${P2R_PROVENANCE}"

_MIN_FOR_FRACTIONS = 60  # labelled patients; with fewer, splits by fraction are too uneven
_SIZES = (32, 48, 64, 96, 112, 128, 160)


@dataclass(frozen=True)
class Voxels:
    """Sizes of the scans read."""

    spacing_mm: float
    """Median in-plane voxel size."""
    extent_mm: float
    """Median of the larger in-plane extent."""

    def image(self) -> tuple[float, int]:
        """Return pixel size, mm, and edge of an image of up to 160 pixels that covers most of a scan about its centre."""
        spacing = max(self.spacing_mm, self.extent_mm / 224)
        rounded = round(spacing, 2 if spacing < 1 else 1)
        need = self.extent_mm / rounded
        return rounded, next((size for size in _SIZES if size >= need * 0.9), _SIZES[-1])


def draft_job(
    *, name: str, sources: str, licence: str, provenance: str, cohort: str, subject_pattern: str, task: str | None,
    voxels: Voxels | None, num_labelled: int, storage: str | None = None, exclude: Sequence[str] = (),
    copies: Sequence[str] = (), fourth_axis: Mapping[str, str] = MappingProxyType({}),
) -> str:  # fmt: skip
    """Return a job's YAML: the whole pipeline with a task, otherwise only pretraining.

    `exclude` and `copies` are patterns of files that are left out: test images, and copies of other subjects' scans. `fourth_axis`: names
    of the contrasts along the fourth axis of the images, and the data set's own words for them.
    """
    spacing, size = (1.5, 128) if voxels is None else voxels.image()
    kind = "pretrain" if task is None else "pipeline"
    reasons = ["the data set's own test images; without this line, pretraining uses them"] * bool(exclude)
    reasons += ["copies of other subjects' scans"] * bool(copies)
    left_out = ", ".join(map(quoted, [*exclude, *copies]))
    ingest = [
        f"  sources: [{quoted(sources)}] # label maps among them are left out",
        *([f"  exclude: [{left_out}] # {'; '.join(reasons)}"] if reasons else []),
        f"  licence: {quoted(licence)} # SPDX identifier or name; stored with everything made from the data",
        f"  provenance: {quoted(provenance)} # where the data come from, and how to cite them",
        f"  cohort: {quoted(cohort)} # as in the task: within a cohort, the same name is the same person",
        f"  subject_pattern: {quoted(subject_pattern)} # its first group is the subject",
    ]
    if task is not None:
        ingest.append(
            f"  subjects_of: {{task: {quoted(task)}, split: not_held_out}} # pretraining never sees validation or test patients"
        )
    contrasts = f"contrasts: [{', '.join(map(quoted, fourth_axis))}], " * bool(fourth_axis)
    if fourth_axis:
        words = ", ".join(f"{quoted(key)}: {quoted(glob.escape(channel))}" for key, channel in fourth_axis.items())
        ingest.append(
            f"  sessions: {{contrasts: {{{words}}}, fourth_axis: contrasts}} # each image holds them along its fourth axis"
        )
    lines = [
        f"kind: {kind}",
        f"name: {name}",
        *([f"storage: {quoted(storage)}"] if storage else []),
        "ingest:",
        *ingest,
        "pretrain:",
        f"  image: {{spacing_mm: {spacing:g}, size: {size}}} # slices; dimensions: 3 for volumes",
        f"  model: {{name: unet, {contrasts}channels: [16, 32, 64, 128, 256], feature_channels: 32}}",
        "  loss: {name: info_nce, pixel_pairs_per_image: 128, temperature: 0.2}",
        "  optimizer: {learning_rate: 2.0e-3}",
        "  steps: 300 # minutes on two cores; on a GPU 20000 or more, and precision: bf16",
        "  global_batch: 16",
        "  checkpoint_interval: 100",
        f'publish: {{name: {name}, description: "A backbone pretrained on own scans."}}',
    ]
    if task is not None:
        numbers = [1, 5, 10] if num_labelled > 10 else [1, 5] if num_labelled > 5 else [1]
        lines += [
            "finetune:",
            f"  tasks: [{quoted(task)}]",
            "  modes: [scratch, linear_probe, fine_tune] # compare with scratch to see the value of pretraining",
            f"  num_labelled: [{', '.join(map(str, numbers))}] # labelled patients; all: the whole train split",
            "  draws: 3 # random draws of the labelled patients",
            "  steps: 200",
            "  search: {learning_rates: {scratch: [2.0e-3], linear_probe: [2.0e-2], fine_tune: [1.0e-3]}} # add candidates to compare them",
        ]
    return "\n".join(lines) + "\n"


def draft_task(
    found: Survey,
    pairing: Pairing,
    *,
    name: str,
    cohort: str,
    classes: Mapping[int, str],
    licence: str,
    provenance: str,
    folder: Path,
    twins: Mapping[str, str] = MappingProxyType({}),
    fourth_axis: Sequence[str] = (),
) -> str:
    """Return a task's YAML for the pairs found by a survey.

    Args:
        found: The survey.
        pairing: Its pairing rule.
        name: Name of the task.
        cohort: Cohort of its subjects, as in the corpus.
        classes: Names of the labels, from 1 on.
        licence: Licence of the data.
        provenance: Citation of the data.
        folder: Folder of the new file; data folders below it are written as relative paths.
        twins: Subjects to leave out, because they have a scan of another subject -> that subject.
        fourth_axis: Contrasts along the fourth axis of the images; empty if it is time.
    """
    subjects = labelled_subjects(found, pairing)
    left_out = {subject: owner for subject, owner in twins.items() if subject in subjects}
    num_subjects = len(subjects) - len(left_out)
    title = found.title or f"Segmentation of {', '.join(classes.values())}"
    lines = [
        f"name: {name}",
        f"title: {quoted(title)}",
        f"images: {quoted(_shorten_path(pairing.images, folder))}",
        f"labels: {quoted(_shorten_path(pairing.labels, folder))}",
        f"image_name: {quoted(pairing.image_name)} # a scan's name without its suffix; {{key}} is the part shared with its label map"
        + (f"; others here: {', '.join(pairing.others[:4])}" if pairing.others else ""),
        *(
            [f"fourth_axis: [{', '.join(map(quoted, fourth_axis))}] # contrasts in each image, in this order"]
            if fourth_axis
            else []
        ),
        f"label_name: {quoted(pairing.label_name)}",
        f"licence: {quoted(licence)}",
        f"citation: {quoted(provenance)}",
        f"cohort: {cohort}",
        f"subject_pattern: {quoted(found.subject_pattern)} # its first group is the patient, who is in one split only",
        "classes: # values of the label maps, from 1 on without a gap; correct their names",
        *(f"  {value}: {quoted(label)}" for value, label in sorted(classes.items())),
        *_draft_split(num_subjects, left_out),
    ]
    if pairing.num_unlabelled:
        lines.append(
            "unlabelled: leave_out # scans without a label map; pretraining still uses them. use: weak_to_strong learns from them, too"
        )
    return "\n".join(lines) + "\n"


def _draft_split(num_subjects: int, left_out: Mapping[str, str]) -> list[str]:
    rule, comment = _choose_split_sizes(num_subjects), f"# of {num_subjects} labelled patients; the others train"
    if not left_out:
        return [f"split_rule: {{seed: 0, {rule}}} {comment}"]
    copies = visible(", ".join(f"{subject} as {owner}" for subject, owner in list(left_out.items())[:5]))
    return [
        f"split_rule: {comment}",
        "  seed: 0",
        *(f"  {size}" for size in rule.split(", ")),
        f"  leave_out: [{', '.join(map(quoted, left_out))}] # the same voxels: {copies}",
    ]


def labelled_subjects(found: Survey, pairing: Pairing) -> set[str]:
    """Return the subjects that have a label map."""
    subject_by_path = {scan.path: subject for subject, scans in found.subjects.items() for scan in scans}
    return {subject_by_path[str(image)] for image, _ in pairing.pairs if subject_by_path.get(str(image))}


def name_for(path: str | Path) -> str:
    """Return a name for a job or task, derived from a folder or its URL."""
    found = re.sub(r"[^a-z0-9]+", "-", str(path).rstrip("/").rpartition("/")[2].lower()).strip("-")
    return found or "own"


def quoted(text: str) -> str:
    """Return a YAML scalar with this text, unquoted where YAML allows it."""
    written = yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    return (
        written
        if not re.search(r"[\[\]{},#]|\$\{", text) or written[0] in "'\""
        else f"'{text}'"
        if "'" not in text
        else repr(text)
    )


def problems_of(values: Sequence[int]) -> str | None:
    """Return why label values cannot be class numbers; None if they can."""
    missing = sorted(set(range(1, max(values, default=0) + 1)) - set(values))
    if not missing:
        return None
    return (
        f"label maps hold the values {', '.join(map(str, sorted(values)))}, but a task numbers its classes from 1 on without a gap: "
        f"renumber them (missing: {', '.join(map(str, missing[:5]))})"
    )


def _choose_split_sizes(num_subjects: int) -> str:
    if num_subjects >= _MIN_FOR_FRACTIONS:
        return "validation: 0.15, test: 0.25"
    return f"validation: {max(1, round(0.15 * num_subjects))}, test: {max(1, math.ceil(0.25 * num_subjects))}"


def _shorten_path(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if folder == path or folder in path.parents else str(path)
