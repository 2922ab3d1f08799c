"""One few-shot trial: task, labelled patients, mode and settings -> Dice on validation patients, for final trials also on test.

Labels of validation and test patients are used only for scores. Training reads the drawn patients. In semi-supervised
modes it also reads the images of the other train patients, but does not open their label files. With the protocol leak_free,
scans are not cropped by the label. The result of a finished trial is read from the storage, without any repetition.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from p2r.allocator import keep_freed_memory
from p2r.data.preprocess import Frames, Planes
from p2r.evaluate.inference import size_read
from p2r.evaluate.prepared import prepared_images
from p2r.evaluate.rows import ContrastRow, CurvePoint, all_warnings
from p2r.evaluate.tasks import LabelledScan, Split
from p2r.fewshot.frozen import FeaturesOfScan, frozen_features, plausibility_of, segmenter_by_prototypes
from p2r.fewshot.images import Images, labelled_images, unlabelled_images
from p2r.fewshot.odd_scans import odd_scans
from p2r.fewshot.plausibility import frames_of_scans
from p2r.fewshot.protocol import Trial
from p2r.fewshot.readings import record_reading
from p2r.fewshot.results import TrialResult
from p2r.fewshot.rounds import Rounds, Unlabelled
from p2r.fewshot.saved_training import SavedTraining
from p2r.fewshot.scoring import Case, Scored, cases_of, score_cases
from p2r.fewshot.setup import TrialSetup, subsets_of
from p2r.fewshot.subsets import score_subsets
from p2r.fewshot.training import Look, Trained, train_head, train_segmenter
from p2r.fewshot.trial_inputs import TrialInputs, build_segmenter, prepare_trial, weights_sha256
from p2r.fewshot.trial_outcome import describe_training, load_earlier, store_result
from p2r.logs import Say
from p2r.model.contrasts import config_for
from p2r.model.pix2rep import Segmenter
from p2r.modes import MODES
from p2r.storage import Storage

_NO_UNLABELLED_PATIENTS = (
    "no train patient is left without labels: the labelled patients' own images served as the unlabelled ones"
)

ReportDice = Callable[[int, float], None]
"""Called with the number of steps done and the mean validation Dice."""


def run_trial(
    setup: TrialSetup,
    trial: Trial,
    *,
    device: str,
    say: Say = lambda line: None,
    report: ReportDice | None = None,
    deadline: float | None = None,
) -> TrialResult:
    """Train and score one trial, or return its stored result. A killed trial resumes.

    Search trials are scored on validation patients, final trials also on the reported split. Final and published trials store
    weights and predictions next to their results.

    Args:
        setup: Properties shared by the task's trials.
        trial: The trial.
        device: `cpu` or `cuda`.
        say: Called with each progress line.
        report: Called with the validation result every `search.report_steps`, for a scheduler.
        deadline: Time of `time.monotonic` at which to save the training state and end; None: never.

    Raises:
        TrainingError: if it diverges.
        OutOfTime: if the deadline passes.
    """
    if (finished := setup.finished(trial)) is not None:
        return finished
    if device == "cpu":
        keep_freed_memory()
    earlier = setup.scored_on_validation(trial) if MODES[trial.mode].trains != "nothing" else None
    saved = SavedTraining(Storage(setup.storage), setup.state_path(trial), deadline=deadline)
    inputs = prepare_trial(setup, trial, device=device)
    if earlier is not None:
        say(f"{trial.id} | already trained for validation scores; its weights are evaluated")
        saved.add_seconds(earlier.seconds or 0.0)
        segmenter, facts = load_earlier(inputs, earlier)
        validation = _validate(inputs, segmenter)
    else:
        trained = _train(inputs, say=say, report=report, saved=saved)
        segmenter = trained.segmenter
        validation = _validate(inputs, segmenter)
        facts = describe_training(inputs, trained, validation.summary)
    for warning in all_warnings(facts):
        say(f"{trial.id} | WARNING: {warning}")
    reported = _score_test_patients(inputs, segmenter) if inputs.reports_test else validation
    by_contrasts = _score_subsets(inputs, segmenter)
    return store_result(inputs, segmenter, facts, validation, reported, by_contrasts=by_contrasts, saved=saved)


def _score(
    inputs: TrialInputs, segmenter: nn.Module, cases: Iterable[Case], split: Split, *, is_reported: bool = False
) -> Scored:
    def see(case: Case) -> None:
        if split == "test" or inputs.trial.protocol == "leak_free":  # paper_compat validates on labelled patients
            inputs.known.see_scan(case.scan, case.volumes, split)

    config = inputs.config
    return score_cases(
        segmenter,
        cases,
        inputs.task,
        inputs.preparation,
        # Only reported splits need more than Dice.
        nsd_tolerance_mm=config.nsd_tolerance_mm if split == "test" or inputs.reports_validation else None,
        largest_component=config.largest_component,
        device=inputs.device,
        is_calibrated=is_reported,
        see=see,
    )


def _validate(inputs: TrialInputs, segmenter: nn.Module) -> Scored:
    cases = inputs.validation()
    return _score(inputs, segmenter, cases, "validation", is_reported=inputs.reports_validation)


def _score_test_patients(inputs: TrialInputs, segmenter: nn.Module) -> Scored:
    """Score the test patients, after recording the evaluation."""
    setup, trial, task = inputs.setup, inputs.trial, inputs.task
    scans = task.scans_of(task.subjects["test"])
    record_reading(
        Storage(setup.root),
        {
            "task": task.name,
            "trial": trial.id,
            "num_scans": len(scans),
            "recipe_sha256": setup.recipe_sha256(trial),
            "backbone_sha256": weights_sha256(inputs),
        },
    )
    cases = cases_of(scans, task, inputs.preparation, is_cropped=trial.protocol == "paper_compat")
    return _score(inputs, segmenter, cases, "test", is_reported=True)


def _score_subsets(inputs: TrialInputs, segmenter: nn.Module) -> list[ContrastRow]:
    """Score the reported split with subsets of the contrasts, as a part of the same evaluation."""
    task = inputs.task
    subsets = subsets_of(task.config, inputs.config)
    if not subsets or inputs.trial.purpose != "final":
        return []
    scans = task.scans_of(task.subjects[inputs.config.score_on])
    return score_subsets(
        segmenter,
        partial(cases_of, scans, task, inputs.preparation, is_cropped=False),
        task,
        inputs.preparation,
        subsets=subsets,
        largest_component=inputs.config.largest_component,
        device=inputs.device,
    )


def _train(inputs: TrialInputs, *, say: Say, report: ReportDice | None, saved: SavedTraining) -> Trained:
    """Train the segmenter of a trial."""
    trial, config, num_classes = inputs.trial, inputs.config, inputs.task.num_classes
    segmenter = build_segmenter(
        trial, inputs.backbone, inputs.preparation, num_classes=num_classes, seed=config.seed
    ).to(inputs.device)
    steps = config.curve_steps if report is None else config.search.report_steps
    look = None if steps is None else partial(_validate_at_step, inputs=inputs, say=say, report=report)
    trains = MODES[trial.mode].trains
    if trains == "nothing":
        return Trained(_prototype_segmenter(inputs, segmenter.backbone), None)
    if trains == "head" and config.probe_augmentation == "none":
        return _train_probe(inputs, segmenter, say=say, look=look, look_steps=steps or 1)
    labelled = inputs.training(None)
    unlabelled, rounds, warnings = None, None, list[str]()
    if MODES[trial.mode].unlabelled != "none":
        # Images without labels: of patients that were not drawn, or of the labelled patients if all were drawn.
        others = inputs.unlabelled_scans
        scans = others or inputs.task.scans_of(trial.subjects)
        images = [prepared_images(scan, inputs.task, inputs.preparation) for scan in scans]
        if not others:
            warnings.append(_NO_UNLABELLED_PATIENTS)
        else:
            by_name = {scan.key: image for scan, image in zip(scans, images, strict=True)}
            warnings += odd_scans([scan.planes for scan in labelled], by_name)
        unlabelled = _to_device(unlabelled_images(images), inputs.device)
        if MODES[trial.mode].has_rounds:
            rounds = _make_rounds(inputs, segmenter.backbone, labelled, images, unlabelled)
    trained = train_segmenter(
        segmenter,
        _to_device(labelled_images(labelled), inputs.device),
        unlabelled,
        trial=trial,
        config=config,
        preparation=inputs.preparation,
        num_classes=num_classes,
        device=inputs.device,
        say=say,
        look=look,
        look_steps=steps or 1,
        saved=saved if report is None else None,  # trials of a scheduler are short and depend on other trials
        rounds=rounds,
    )
    return replace(trained, warnings=(*warnings, *trained.warnings))


def _validate_at_step(
    step: int, segmenter: nn.Module, *, inputs: TrialInputs, say: Say, report: ReportDice | None
) -> CurvePoint:
    """Validate during training."""
    summary = _score(inputs, segmenter, inputs.validation(), "validation").summary
    point = CurvePoint(step=step, dice_mean=summary.dice_mean, dice=summary.dice)
    say(f"{inputs.trial.id} | step {step} | {point.text()}")
    if report is not None:
        report(step, summary.dice_mean or 0.0)
    return point


def _train_probe(inputs: TrialInputs, segmenter: Segmenter, *, say: Say, look: Look | None, look_steps: int) -> Trained:
    """Train a linear head on features computed once."""
    loss, curve = train_head(
        segmenter.head,
        _compute_features(inputs, segmenter.backbone),
        trial=inputs.trial,
        config=inputs.config,
        device=inputs.device,
        say=say,
        look=None if look is None else lambda step: look(step, segmenter),
        look_steps=look_steps,
    )
    return Trained(segmenter.eval(), loss, curve)


def _compute_features(inputs: TrialInputs, network: nn.Module) -> list[FeaturesOfScan]:
    return frozen_features(
        inputs.training(size_read(inputs.preparation)),
        network,
        inputs.trial,
        backbone_sha256=inputs.backbone.manifest.sha256,
        preparation=inputs.preparation,
        device=inputs.device,
    )


def _prototype_segmenter(inputs: TrialInputs, network: nn.Module) -> Segmenter:
    return segmenter_by_prototypes(
        network,
        _compute_features(inputs, network),
        inputs.trial,
        model=config_for(inputs.backbone.config.model, inputs.preparation.contrasts),
        preparation=inputs.preparation,
        num_classes=inputs.task.num_classes,
        seed=inputs.config.seed,
    )


def _make_rounds(
    inputs: TrialInputs,
    network: nn.Module,
    labelled: Sequence[LabelledScan],
    images: Sequence[Planes | Frames],
    unlabelled: Images,
) -> Rounds:
    """Return the rounds of self-training, which start from class prototypes of the backbone before training."""
    trial, num_classes, preparation = inputs.trial, inputs.task.num_classes, inputs.preparation
    return Rounds(
        Unlabelled(unlabelled.images, unlabelled.inside, frames_of_scans(images)),
        _prototype_segmenter(inputs, copy.deepcopy(network)),
        plausibility_of(labelled, trial, num_classes=num_classes, preparation=preparation),
        trial=trial,
        config=inputs.config,
        preparation=preparation,
        names=["background", *inputs.task.config.classes.values()],
    )


def _to_device(images: Images, device: str) -> Images:
    labels = None if images.labels is None else images.labels.to(device)
    return Images(images.images.to(device), images.inside.to(device), labels)
