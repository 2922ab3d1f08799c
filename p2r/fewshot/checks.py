"""A task and a backbone -> a checked setup of trials, or a refusal before anything is trained."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from p2r.backbone import Backbone
from p2r.config import FinetuneConfig
from p2r.contrasts import describe
from p2r.data.contrasts import volumes_by_contrast
from p2r.data.label_maps import label_map_by_voxels
from p2r.data.preprocess import Preparation
from p2r.data.volume import read_volume
from p2r.errors import DataError
from p2r.evaluate.inference import size_read
from p2r.evaluate.mix_ups import MixUps
from p2r.evaluate.prepared import prepared_images, prepared_scan
from p2r.evaluate.tasks import (
    HELD_OUT,
    LabelledScan,
    Split,
    Task,
    TaskImages,
    TaskScan,
    acquired_sha256,
    check_classes_present,
    check_scans,
    classes_shown,
)
from p2r.fewshot.leaks import Known
from p2r.fewshot.protocol import (
    Settings,
    draw_of,
    final_trials,
    is_searched,
    numbers_of,
)
from p2r.fewshot.setup import TrialSetup, contrasts_read, subsets_of
from p2r.fewshot.trial_inputs import slices_of
from p2r.files import file_sha256
from p2r.model.contrasts import missing_contrasts
from p2r.modes import MODES

_INPUTS = {2: "slices", 3: "volumes"}


def check_task(task: Task, backbone: Backbone, setup: TrialSetup) -> TrialSetup:
    """Check that the task can be run with this backbone, before anything is trained.

    Returns:
        The setup with digests of the task's files. It is marked as transductive if a validation or test patient is in the
        backbone's corpus and the job allows it.

    Raises:
        DataError: if the backbone cannot read such scans, or a validation or test patient is in its corpus. Also as
            `check_data`.
    """
    config = setup.config
    url = backbone.manifest.url
    check_contrasts(task, config, of_backbone=backbone.preparation.contrasts, backbone=f"the backbone {url}")
    _check_backbone(task, backbone, config)
    known = Known(backbone, is_allowed=config.allow_transductive)
    for split in HELD_OUT:
        for subject in task.subjects[split]:
            known.see_subject(subject, split, task=task)

    def see(scan: LabelledScan, split: Split) -> None:
        if split in HELD_OUT:
            known.see_scan(scan.scan, scan.volumes, split)

    check_data(task, config, setup.preparation(backbone), see=see)
    test = set(task.subjects["test"])
    return replace(
        setup,
        is_transductive=setup.is_transductive or known.is_any,
        data_sha256=_files_sha256([*(scan for scan in task.scans if scan.subject not in test), *task.unlabelled]),
        test_sha256=_files_sha256([scan for scan in task.scans if scan.subject in test]),
    )


def check_data(
    task: Task,
    config: FinetuneConfig,
    preparation: Preparation,
    *,
    see: Callable[[LabelledScan, Split], None] = lambda scan, split: None,
) -> None:
    """Read every scan of a task, and check that it suffices for all trials of a section.

    Args:
        task: Task from `load_task`.
        config: Fine-tuning section.
        preparation: Preparation of scans for the trials' models.
        see: Called with every scan and its split; may refuse the scan.

    Raises:
        DataError: if there are too few patients, a file breaks the task's rules, or two label maps were exchanged. Also if
            a class is absent in all images of a draw's labelled patients.
    """
    draws = _list_draws(config, task)
    mix_ups = MixUps(task.name)

    held_out: dict[str, TaskScan] = {}

    def look(scan: LabelledScan, split: Split) -> None:
        see(scan, split)
        if split in HELD_OUT and task.unlabelled:
            held_out.update({acquired_sha256(volume): scan.scan for volume in scan.volumes})
        if task.config.find_mix_ups:
            mix_ups.see(scan)

    load = partial(prepared_scan, size=size_read(preparation))
    labels_by_subject = check_scans(task, preparation, load=load, see=look)
    mix_ups.check()
    for unlabelled in task.unlabelled:
        _check_unlabelled(unlabelled, task, preparation, held_out)
    for (num_labelled, draw), subjects in draws.items():
        check_classes_present(labels_by_subject, task, subjects=subjects)
        if config.protocol == "paper_compat":
            training, _ = slices_of(
                task, preparation, subjects, size=None, seed=config.seed, num_labelled=num_labelled, draw=draw
            )
            shown = classes_shown(crop.scan for crop in training)
            check_classes_present(dict.fromkeys(subjects, shown), task, subjects=subjects)


def _check_unlabelled(scan: TaskImages, task: Task, preparation: Preparation, held_out: Mapping[str, TaskScan]) -> None:
    """Refuse an unlabelled scan that cannot be prepared, is a label map, or is a copy of a validation or test patient's."""
    way_out = f"Leave {scan.subject} out (split_rule.leave_out), or move the file out of the task's folder"
    images = scan.contrasts or {"": scan.image}
    for name, volume in volumes_by_contrast(images, read_volume).items():
        image = images[name]
        if reason := label_map_by_voxels(volume.data):
            raise DataError(
                f"task {task.name}: {image} has no label map and {reason}, like a label map. Give it the name of its scan's label "
                f"map. {way_out}"
            )
        if (twin := held_out.get(acquired_sha256(volume))) is not None:
            raise DataError(
                f"task {task.name}: {image} has no label map and the voxels of {twin.image}, a scan of the validation or test patient "
                f"{twin.subject}, from which no mode may learn. {way_out}"
            )
    prepared_images(scan, task, preparation)


def _check_backbone(task: Task, backbone: Backbone, config: FinetuneConfig) -> None:
    if config.image_size is not None:
        try:
            backbone.config.model.check_size(config.image_size, what="finetune.image_size")
        except ValueError as error:
            raise DataError(str(error)) from error
    dimensions = backbone.preparation.dimensions
    asked = task.config.dimensions or (2 if task.config.slice_axis is not None else dimensions)
    if dimensions != asked:
        field = "dimensions" if task.config.dimensions else "slice_axis"
        raise DataError(
            f"task {task.name} is for networks of {_INPUTS[asked]} ({field}), the backbone {backbone.manifest['url']} reads "
            f"{_INPUTS[dimensions]}; use a backbone of {_INPUTS[asked]}, or change the task's {field}"
        )
    if config.protocol == "paper_compat" and dimensions != 2:
        raise DataError(
            f"finetune.protocol paper_compat crops and splits slices, the backbone {backbone.manifest['url']} reads volumes: "
            "use a backbone of slices, or leak_free"
        )


def check_subsets(tasks: Sequence[Task], config: FinetuneConfig) -> None:
    """Refuse a subset of contrasts with a name that the models of no task read, or that no reported patient has.

    Raises:
        DataError: naming the contrast.
    """
    known = sorted({name for task in tasks for name in contrasts_read(task.config, config) or ()})
    if others := [name for subset in config.contrast_subsets or () for name in subset if name not in known]:
        raise DataError(
            f"finetune.contrast_subsets names {', '.join(others)}, but the models read {', '.join(known) or describe(None)}: correct it"
        )
    for task in tasks:
        reported = task.scans_of(task.subjects[config.score_on])
        for subset in subsets_of(task.config, config):
            if not any(name in scan.contrasts for scan in reported for name in subset):
                raise DataError(
                    f"finetune.contrast_subsets: no {config.score_on} patient of task {task.name} has {' or '.join(subset)}, so there is "
                    "nothing to score: leave this subset out"
                )


def check_contrasts(task: Task, config: FinetuneConfig, *, of_backbone: Sequence[str] | None, backbone: str) -> None:
    """Refuse contrasts that the task does not have, or that the backbone never saw.

    Args:
        task: The task.
        config: Fine-tuning section.
        of_backbone: Contrasts of the backbone; None: one, of any kind.
        backbone: Name of the backbone, for messages.

    Raises:
        DataError: naming the contrast, and the way out.
    """
    read = contrasts_read(task.config, config)
    if others := [name for name in config.contrasts or () if name not in (task.config.contrasts or ())]:
        raise DataError(
            f"finetune.contrasts names {', '.join(others)}, the task {task.name} has {describe(task.config.contrasts)}: correct the "
            "names, or the task's image_name"
        )
    if read is None and len(of_backbone or ("",)) > 1:
        raise DataError(
            f"task {task.name}: the contrast of its scans has no name, {backbone} reads {describe(of_backbone)}: name it, as in "
            f"image_name: {{{(of_backbone or ('t1',))[0]}: {task.config.images_of(None)[1]!r}}}, or use a backbone of one contrast"
        )
    if unseen := missing_contrasts(of_backbone, read):
        raise DataError(
            f"task {task.name} wants the contrast {', '.join(unseen)}, which {backbone} never saw: it reads {describe(of_backbone)}. "
            "Leave it out (finetune.contrasts), or use a backbone of these contrasts or of one"
        )
    train = task.scans_of(task.subjects["train"])
    if untrained := [name for name in read or () if not any(name in scan.contrasts for scan in train)]:
        raise DataError(
            f"task {task.name}: no train case has the contrast {', '.join(untrained)}, so a model could not learn to read it: leave it out "
            "(finetune.contrasts), or choose other splits"
        )
    if len(read or ("",)) < 2:
        return
    if others := [mode for mode in config.modes if MODES[mode].weights == "other"]:
        raise DataError(
            f"finetune.modes has {', '.join(others)}, whose network reads images of one contrast, task {task.name} {describe(read)}: "
            "name one in finetune.contrasts, or leave the mode out"
        )
    if config.protocol == "paper_compat":
        raise DataError(
            f"finetune.protocol paper_compat reads one contrast, task {task.name} {describe(read)}: use leak_free"
        )


def _list_draws(config: FinetuneConfig, task: Task) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return the labelled patients of every draw of the protocol, by number of patients and index."""
    finals = final_trials(config, task, dict.fromkeys(config.modes, Settings()))  # draws do not depend on settings
    draws = {(trial.num_labelled, trial.draw): trial.subjects for trial in finals}
    if any(is_searched(config, mode) for mode in config.modes):
        for number in numbers_of(config.search.num_labelled, task):
            draws[number, 0] = draw_of(config, task, num_labelled=number, draw=0)
    return dict(sorted(draws.items()))


def _files_sha256(scans: Sequence[TaskImages]) -> str:
    digest = hashlib.sha256()
    for scan in scans:
        files = " ".join(file_sha256(file) for file in scan.files)
        digest.update(f"{scan.key} {scan.subject} {' '.join([*scan.contrasts, files])}\n".encode())
    return digest.hexdigest()
