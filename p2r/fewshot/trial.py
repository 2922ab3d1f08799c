"""One few-shot trial: task, labelled patients, mode and settings -> Dice on validation patients, for final trials also on test.

Labels of validation and test patients are used only for scores. Training reads the drawn patients. In semi-supervised
modes it also reads the images of the other train patients, but does not open their label files. With the protocol leak_free,
scans are not cropped by the label. The result of a finished trial is read from the storage, without any repetition.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from p2r.backbone import ArtefactConfig, Backbone, load_backbone
from p2r.config import FinetuneConfig
from p2r.data.preprocess import Frames, Planes, Preparation
from p2r.errors import DamagedError, StorageError
from p2r.evaluate.inference import size_read
from p2r.evaluate.metrics import Summary
from p2r.evaluate.prepared import prepared_images, prepared_scan
from p2r.evaluate.rows import ContrastRow, CurvePoint, JsonModel, PseudoLabelRow, TrialRow, all_warnings
from p2r.evaluate.tasks import LabelledScan, Split, Task, load_task
from p2r.fewshot.frozen import FeaturesOfScan, frozen_features, plausibility_of, segmenter_by_prototypes
from p2r.fewshot.leaks import Known
from p2r.fewshot.odd_scans import odd_scans
from p2r.fewshot.paper_compat import Crop, cropped, split_by_slice
from p2r.fewshot.plausibility import frames_of_scans
from p2r.fewshot.protocol import Trial
from p2r.fewshot.readings import record_reading
from p2r.fewshot.results import TrialResult
from p2r.fewshot.rounds import Rounds, Unlabelled
from p2r.fewshot.saved_training import SavedTraining
from p2r.fewshot.scoring import Case, Scored, case_of_crop, cases_of, npz_bytes, score_cases
from p2r.fewshot.setup import TrialSetup
from p2r.fewshot.subsets import score_subsets
from p2r.fewshot.training import (
    Images,
    Look,
    Trained,
    labelled_images,
    train_head,
    train_segmenter,
    unlabelled_images,
)
from p2r.logs import Say
from p2r.model.backbones import build_backbone
from p2r.model.contrasts import adapt_contrasts, config_for
from p2r.model.heads import PrototypeHead
from p2r.model.pix2rep import Segmenter
from p2r.modes import MODES
from p2r.randomness import keyed_generator
from p2r.storage import Storage
from p2r.version import code_version

_NO_UNLABELLED_PATIENTS = (
    "no train patient is left without labels: the labelled patients' own images served as the unlabelled ones"
)

ReportDice = Callable[[int, float], None]
"""Called with the number of steps done and the mean validation Dice."""


@dataclass(frozen=True)
class _Prepared:
    """Inputs of training and scoring of a trial."""

    setup: TrialSetup
    trial: Trial
    task: Task
    backbone: Backbone
    preparation: Preparation
    known: Known
    """Held-out patients found in the backbone's corpora."""
    training: Callable[[int | None], list[LabelledScan]]
    """Function: image size (None: whole images) -> the labelled scans."""
    validation: Callable[[], Iterable[Case]]
    """Function -> the validation cases."""
    device: str

    @property
    def config(self) -> FinetuneConfig:
        return self.setup.config

    @property
    def reports_test(self) -> bool:
        return self.trial.purpose == "final" and self.config.score_on == "test"

    @property
    def reports_validation(self) -> bool:
        return self.trial.purpose == "final" and self.config.score_on == "validation"

    @property
    def unlabelled_subjects(self) -> tuple[str, ...]:
        """Train patients that were not drawn."""
        return tuple(sorted(set(self.task.subjects["train"]) - set(self.trial.subjects)))


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
    earlier = setup.scored_on_validation(trial) if MODES[trial.mode].trains != "nothing" else None
    saved = SavedTraining(Storage(setup.storage), setup.state_path(trial), deadline=deadline)
    prepared = _prepare(setup, trial, device=device)
    if earlier is not None:
        say(f"{trial.id} | already trained for validation scores; its weights are evaluated")
        saved.add_seconds(earlier.seconds or 0.0)
        segmenter, facts = _load_earlier(prepared, earlier)
        validation = _validate(prepared, segmenter)
    else:
        trained = _train(prepared, say=say, report=report, saved=saved)
        segmenter = trained.segmenter
        validation = _validate(prepared, segmenter)
        facts = _describe_training(prepared, trained, validation.summary)
    for warning in all_warnings(facts):
        say(f"{trial.id} | WARNING: {warning}")
    reported = _score_test_patients(prepared, segmenter) if prepared.reports_test else validation
    by_contrasts = _score_subsets(prepared, segmenter)
    return _store_result(prepared, segmenter, facts, validation, reported, by_contrasts, saved=saved)


def _prepare(setup: TrialSetup, trial: Trial, *, device: str) -> _Prepared:
    task = load_task(Path(setup.task))
    backbone = load_backbone(setup.backbone, sha256=setup.backbone_sha256)
    preparation = setup.preparation(backbone)
    known = Known(backbone, is_allowed=setup.config.allow_transductive)
    training, validation = _split_loaders(trial, task, preparation, seed=setup.config.seed)
    return _Prepared(setup, trial, task, backbone, preparation, known, training, validation, device)


def _score(
    prepared: _Prepared, segmenter: nn.Module, cases: Iterable[Case], split: Split, *, is_reported: bool = False
) -> Scored:
    def see(case: Case) -> None:
        if split == "test" or prepared.trial.protocol == "leak_free":  # paper_compat validates on labelled patients
            prepared.known.see_scan(case.scan, case.volumes, split)

    config = prepared.config
    return score_cases(
        segmenter,
        cases,
        prepared.task,
        prepared.preparation,
        # Only reported splits need more than Dice.
        nsd_tolerance_mm=config.nsd_tolerance_mm if split == "test" or prepared.reports_validation else None,
        largest_component=config.largest_component,
        device=prepared.device,
        is_calibrated=is_reported,
        see=see,
    )


def _validate(prepared: _Prepared, segmenter: nn.Module) -> Scored:
    cases = prepared.validation()
    return _score(prepared, segmenter, cases, "validation", is_reported=prepared.reports_validation)


def _score_test_patients(prepared: _Prepared, segmenter: nn.Module) -> Scored:
    """Score the test patients, after recording the evaluation."""
    setup, trial, task = prepared.setup, prepared.trial, prepared.task
    scans = task.scans_of(task.subjects["test"])
    record_reading(
        Storage(setup.root),
        {
            "task": task.name,
            "trial": trial.id,
            "num_scans": len(scans),
            "recipe_sha256": setup.recipe_sha256(trial),
            "backbone_sha256": _weights_sha256(prepared),
        },
    )
    cases = cases_of(scans, task, prepared.preparation, is_cropped=trial.protocol == "paper_compat")
    return _score(prepared, segmenter, cases, "test", is_reported=True)


def _score_subsets(prepared: _Prepared, segmenter: nn.Module) -> list[ContrastRow]:
    """Score the reported split with subsets of the contrasts, as a part of the same evaluation."""
    subsets, task = prepared.config.contrast_subsets, prepared.task
    if subsets is None or prepared.trial.purpose != "final":
        return []
    scans = task.scans_of(task.subjects[prepared.config.score_on])
    return score_subsets(
        segmenter,
        partial(cases_of, scans, task, prepared.preparation, is_cropped=False),
        task,
        prepared.preparation,
        subsets=subsets,
        largest_component=prepared.config.largest_component,
        device=prepared.device,
    )


def _weights_sha256(prepared: _Prepared) -> str | None:
    """Return the digest of the backbone that provides the initial weights; None: from scratch."""
    return None if MODES[prepared.trial.mode].is_from_scratch else prepared.setup.backbone_sha256


class _TrainingFacts(JsonModel):
    """Description of the training, part of both result and row."""

    train_loss: float | None
    training_code: str | None = None
    curve: list[CurvePoint] | None = None
    pseudo_labels: PseudoLabelRow | None = None
    warnings: list[str] | None = None


def _describe_training(prepared: _Prepared, trained: Trained, validation: Summary) -> _TrainingFacts:
    trial, task = prepared.trial, prepared.task
    facts: dict[str, Any] = {}
    if prepared.config.curve_steps is not None and "steps" in MODES[trial.mode].settings:
        last = CurvePoint(step=trial.settings.steps, dice_mean=validation.dice_mean, dice=validation.dice)
        facts["curve"] = [*trained.curve, last.to_json()]
    if trained.pseudo_labels is not None:
        names = ["background", *task.config.classes.values()]
        threshold = trial.settings.confidence_threshold or 0.0
        row = trained.pseudo_labels.to_row(names, threshold=threshold)
        facts["pseudo_labels"] = {**row, **({"rounds": trained.rounds} if trained.rounds else {})}
    if trained.warnings:
        facts["warnings"] = list(trained.warnings)
    return _TrainingFacts.model_validate({"train_loss": trained.loss, **facts})


def _load_earlier(prepared: _Prepared, earlier: TrialResult) -> tuple[Segmenter, _TrainingFacts]:
    """Return the network of an earlier trial with the same training, and the description of that training.

    Raises:
        DamagedError: if the weights are absent, or do not fit the network.
    """
    storage, row = Storage(prepared.setup.storage), earlier.reported()
    segmenter = build_segmenter(
        prepared.trial,
        prepared.backbone,
        prepared.preparation,
        num_classes=prepared.task.num_classes,
        seed=prepared.config.seed,
    )
    assert earlier.weights is not None
    try:
        segmenter.load_state_dict(load(storage.read_bytes(earlier.weights)))
    except (RuntimeError, SafetensorError, StorageError) as error:
        raise DamagedError(
            f"{storage.at(earlier.weights)} does not contain the weights of trial {prepared.trial.id}: {error!s:.300}; "
            "delete the trial's three files of this name to train it again"
        ) from error
    training = {
        "training_code": row.code,
        "curve": row.curve,
        "pseudo_labels": row.pseudo_labels,
        "warnings": row.warnings,
    }
    facts = {"train_loss": earlier.train_loss, **{name: value for name, value in training.items() if value is not None}}
    return segmenter.to(prepared.device).eval(), _TrainingFacts.model_validate(facts)


def _store_result(
    prepared: _Prepared,
    segmenter: Segmenter,
    facts: _TrainingFacts,
    validation: Scored,
    reported: Scored,
    by_contrasts: Sequence[ContrastRow],
    *,
    saved: SavedTraining,
) -> TrialResult:
    """Store weights and predictions, except for search trials; then the result."""
    setup, trial, storage = prepared.setup, prepared.trial, Storage(prepared.setup.storage)
    path, row = setup.result_path(trial), None
    files: dict[str, str] = {}
    if trial.purpose != "search":
        stem = path.removesuffix(".json")
        files = {"weights": f"{stem}.safetensors", "predictions": f"{stem}.npz"}
        weights = {key: value.cpu().contiguous() for key, value in segmenter.state_dict().items()}
        storage.write_bytes(files["weights"], save(weights))
        storage.write_bytes(files["predictions"], npz_bytes(reported.predictions))
    seconds = round(saved.seconds, 3)
    if files:
        row = _make_row(
            prepared,
            facts,
            validation.summary,
            reported,
            by_contrasts,
            predictions=files["predictions"],
            seconds=seconds,
        )
    result = TrialResult.model_validate(
        {
            "trial": trial.to_row(),
            "validation": validation.summary.to_row(),
            "device": _device_name(prepared.device),
            "seconds": seconds,
            **facts.to_json(),
            **(
                {"num_prototypes": list(segmenter.head.num_prototypes)}
                if isinstance(segmenter.head, PrototypeHead)
                else {}
            ),
            **({"weights": files["weights"], "row": row} if row is not None else {}),
        }
    )
    storage.write_json(path, result.to_json())
    saved.delete()
    return result


def _make_row(
    prepared: _Prepared,
    facts: _TrainingFacts,
    validation: Summary,
    reported: Scored,
    by_contrasts: Sequence[ContrastRow],
    *,
    predictions: str,
    seconds: float,
) -> TrialRow:
    training = {name: value for name, value in facts.to_json().items() if name != "train_loss"}
    contrasts = prepared.preparation.contrasts
    optional = {
        "calibration": reported.calibration,
        "soft_dice_with_background": reported.soft_dice_with_background,
        "contrasts": None if contrasts is None else list(contrasts),
        "by_contrasts": [row.to_json() for row in by_contrasts] or None,
    }
    return TrialRow.model_validate(
        {
            **prepared.trial.to_row(),
            "transductive": prepared.setup.is_transductive or prepared.known.is_any,
            **({"corpora": "unknown"} if prepared.known.is_unknown else {}),
            "seed": prepared.config.seed,
            "split": "test" if prepared.reports_test else "validation",
            "validation_dice_mean": validation.dice_mean,
            "backbone_sha256": _weights_sha256(prepared),
            "code": code_version(),
            **reported.summary.to_row(),
            "cases": list(reported.cases),
            "predictions": predictions,
            "device": _device_name(prepared.device),
            "seconds": seconds,
            **training,
            **{name: value for name, value in optional.items() if value is not None},
        }
    )


def _split_loaders(
    trial: Trial, task: Task, preparation: Preparation, *, seed: int
) -> tuple[Callable[[int | None], list[LabelledScan]], Callable[[], Iterable[Case]]]:
    """Return two functions: image size -> labelled scans, and () -> validation cases."""
    chosen = task.scans_of(trial.subjects)
    if trial.protocol == "leak_free":
        validation = task.scans_of(task.subjects["validation"])
        return (
            lambda size: [prepared_scan(scan, task, preparation, size=size) for scan in chosen],
            lambda: cases_of(validation, task, preparation, is_cropped=False),
        )

    slices = partial(
        slices_of, task, preparation, trial.subjects, seed=seed, num_labelled=trial.num_labelled, draw=trial.draw
    )
    return (
        lambda size: [crop.scan for crop in slices(size=size)[0]],
        lambda: [case_of_crop(crop) for crop in slices(size=size_read(preparation))[1]],
    )


def slices_of(
    task: Task,
    preparation: Preparation,
    subjects: tuple[str, ...],
    *,
    size: int | None,
    seed: int,
    num_labelled: int,
    draw: int,
) -> tuple[list[Crop], list[Crop]]:
    """Return the training slices and the validation slices of labelled patients, for paper_compat.

    Raises:
        DataError: as `split_by_slice`.
    """
    scans = [prepared_scan(scan, task, preparation) for scan in task.scans_of(subjects)]
    crops = [crop for scan in scans for crop in cropped(scan, preparation, size=size)]
    return split_by_slice(crops, keyed_generator(seed, "slices", num_labelled, draw))


def _train(prepared: _Prepared, *, say: Say, report: ReportDice | None, saved: SavedTraining) -> Trained:
    """Train the segmenter of a trial."""
    trial, config, num_classes = prepared.trial, prepared.config, prepared.task.num_classes
    segmenter = build_segmenter(
        trial, prepared.backbone, prepared.preparation, num_classes=num_classes, seed=config.seed
    ).to(prepared.device)
    steps = config.curve_steps if report is None else config.search.report_steps
    look = None if steps is None else partial(_validate_at_step, prepared=prepared, say=say, report=report)
    trains = MODES[trial.mode].trains
    if trains == "nothing":
        return Trained(_prototype_segmenter(prepared, segmenter.backbone), None)
    if trains == "head" and config.probe_augmentation == "none":
        return _train_probe(prepared, segmenter, say=say, look=look, look_steps=steps or 1)
    labelled = prepared.training(None)
    unlabelled, rounds, warnings = None, None, list[str]()
    if MODES[trial.mode].unlabelled != "none":
        # Images without labels: of patients that were not drawn, or of the labelled patients if all were drawn.
        others = prepared.unlabelled_subjects or trial.subjects
        scans = prepared.task.scans_of(others)
        images = [prepared_images(scan, prepared.task, prepared.preparation) for scan in scans]
        if others == trial.subjects:
            warnings.append(_NO_UNLABELLED_PATIENTS)
        else:
            by_name = {scan.key: image for scan, image in zip(scans, images, strict=True)}
            warnings += odd_scans([scan.planes for scan in labelled], by_name)
        unlabelled = _to_device(unlabelled_images(images), prepared.device)
        if MODES[trial.mode].has_rounds:
            rounds = _make_rounds(prepared, segmenter.backbone, labelled, images, unlabelled)
    trained = train_segmenter(
        segmenter,
        _to_device(labelled_images(labelled), prepared.device),
        unlabelled,
        trial=trial,
        config=config,
        preparation=prepared.preparation,
        num_classes=num_classes,
        device=prepared.device,
        say=say,
        look=look,
        look_steps=steps or 1,
        saved=saved if report is None else None,  # trials of a scheduler are short and depend on other trials
        rounds=rounds,
    )
    return replace(trained, warnings=(*warnings, *trained.warnings))


def _validate_at_step(
    step: int, segmenter: nn.Module, *, prepared: _Prepared, say: Say, report: ReportDice | None
) -> dict[str, Any]:
    """Validate during training."""
    summary = _score(prepared, segmenter, prepared.validation(), "validation").summary
    point = CurvePoint(step=step, dice_mean=summary.dice_mean, dice=summary.dice)
    say(f"{prepared.trial.id} | step {step} | {point.text()}")
    if report is not None:
        report(step, summary.dice_mean or 0.0)
    return point.to_json()


def _train_probe(prepared: _Prepared, segmenter: Segmenter, *, say: Say, look: Look | None, look_steps: int) -> Trained:
    """Train a linear head on features computed once."""
    loss, curve = train_head(
        segmenter.head,
        _compute_features(prepared, segmenter.backbone),
        trial=prepared.trial,
        config=prepared.config,
        device=prepared.device,
        say=say,
        look=None if look is None else lambda step: look(step, segmenter),
        look_steps=look_steps,
    )
    return Trained(segmenter.eval(), loss, curve)


def _compute_features(prepared: _Prepared, network: nn.Module) -> list[FeaturesOfScan]:
    return frozen_features(
        prepared.training(size_read(prepared.preparation)),
        network,
        prepared.trial,
        backbone_sha256=prepared.setup.backbone_sha256,
        preparation=prepared.preparation,
        device=prepared.device,
    )


def _prototype_segmenter(prepared: _Prepared, network: nn.Module) -> Segmenter:
    features, num_classes = _compute_features(prepared, network), prepared.task.num_classes
    return segmenter_by_prototypes(
        network, features, prepared.trial, num_classes=num_classes, seed=prepared.config.seed
    )


def _make_rounds(
    prepared: _Prepared,
    network: nn.Module,
    labelled: Sequence[LabelledScan],
    images: Sequence[Planes | Frames],
    unlabelled: Images,
) -> Rounds:
    """Return the rounds of self-training, which start from class prototypes of the backbone before training."""
    trial, num_classes, preparation = prepared.trial, prepared.task.num_classes, prepared.preparation
    return Rounds(
        Unlabelled(unlabelled.images, unlabelled.inside, frames_of_scans(images)),
        _prototype_segmenter(prepared, copy.deepcopy(network)),
        plausibility_of(labelled, trial, num_classes=num_classes, preparation=preparation),
        trial=trial,
        config=prepared.config,
        preparation=preparation,
        names=["background", *prepared.task.config.classes.values()],
    )


def _to_device(images: Images, device: str) -> Images:
    labels = None if images.labels is None else images.labels.to(device)
    return Images(images.images.to(device), images.inside.to(device), labels)


def build_segmenter(
    trial: Trial, backbone: Backbone, preparation: Preparation, *, num_classes: int, seed: int
) -> Segmenter:
    """Return the network of a mode, with the backbone's architecture, for the contrasts of the task.

    It has the backbone's weights unless the mode is from scratch. They are frozen for a linear probe.
    """
    torch.manual_seed(seed)
    dimensions, contrasts = preparation.dimensions, preparation.contrasts
    model = config_for(backbone.config.model, contrasts)
    network: nn.Module = build_backbone(model, dimensions=dimensions)
    if not MODES[trial.mode].is_from_scratch:
        weights = backbone.network.state_dict()
        network.load_state_dict(adapt_contrasts(weights, backbone.config.model, to=contrasts, dimensions=dimensions))
    if MODES[trial.mode].weights == "frozen":
        network.requires_grad_(False)
    classes = {value: str(value) for value in range(1, num_classes)}
    return Segmenter(network, ArtefactConfig(model=model, preparation=preparation, classes=classes).head())


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
