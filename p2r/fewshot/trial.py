"""One few-shot trial: labelled patients of a task x mode x settings -> Dice on validation, and, once frozen, on test.

The labels of validation and test patients enter nowhere but the scores: training sees the drawn patients only, and, with
a semi-supervised mode, the images of the other train patients, whose label files are not opened. With the protocol leak_free every
scan is whole (no crop by the label). What a finished trial found is read from the storage; it trains and reads nothing again.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from p2r.backbone import ArtefactConfig, Backbone, load_backbone
from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation
from p2r.evaluate.inference import size_read
from p2r.evaluate.prepared import prepared_images, prepared_scan
from p2r.evaluate.tasks import LabelledScan, Split, Task, TaskConfig, load_task, read_task_config, task_sha256
from p2r.fewshot.frozen import FeaturesOfScan, frozen_features, plausibility_of, segmenter_by_prototypes
from p2r.fewshot.leaks import Known
from p2r.fewshot.odd_scans import odd_scans
from p2r.fewshot.paper_compat import Crop, cropped, split_by_slice
from p2r.fewshot.plausibility import frames_of_scans
from p2r.fewshot.protocol import Trial
from p2r.fewshot.readings import record_reading
from p2r.fewshot.rounds import Rounds, Unlabelled
from p2r.fewshot.saved_training import SavedTraining
from p2r.fewshot.scoring import Case, Scored, case_of_crop, cases_of, npz_bytes, score_cases
from p2r.fewshot.stored import read_result
from p2r.fewshot.training import (
    Images,
    Look,
    Trained,
    labelled_images,
    train_head,
    train_segmenter,
    unlabelled_images,
)
from p2r.model.backbones import build_backbone
from p2r.model.heads import PrototypeHead
from p2r.model.pix2rep import Segmenter
from p2r.modes import MODES
from p2r.randomness import keyed_generator
from p2r.storage import Storage, json_bytes
from p2r.version import code_version

_NONE_LEFT = "no train patient is left without labels: the labelled patients' own images served as the unlabelled ones"

Say = Callable[[str], None]
Report = Callable[[int, float], None]
"""Steps done, mean validation Dice so far."""


@dataclass(frozen=True)
class TrialSetup:
    """What all trials of one task share; plain values, so that it travels to another machine."""

    config: FinetuneConfig
    task: str
    """Path of the task's YAML."""
    backbone: str
    """URL of the published backbone."""
    backbone_sha256: str
    """Its pin, the digest of its manifest: a trial that finds another one under the URL refuses."""
    architecture_sha256: str
    """Digest of its network's shape and its way to prepare a scan: all that a trial from scratch takes of it."""
    storage: str
    """URL of `<storage>/finetune/<task>`."""
    root: str
    """URL of `<storage>`."""
    is_transductive: bool = False
    """Whether validation or test patients of the task are known to be in the backbone's corpus."""
    data_sha256: str = ""
    """Digest of the files of train and validation patients."""
    test_sha256: str = ""
    """Digest of the files of test patients: part of what their figures depend on, and of nothing else."""

    def preparation(self, backbone: Backbone) -> Preparation:
        """What the trials' models do to a scan: the backbone's way, how much of a plane they read, and what the task states."""
        return preparation_for(read_task_config(Path(self.task)), self.config, backbone.preparation)

    def recipe_sha256(self, trial: Trial) -> str:
        """Return a digest of everything that the trial's result depends on."""
        config = self.config.model_dump(
            mode="json",
            include={"seed", "batch_size", "views", "planes", "nsd_tolerance_mm", "largest_component"},
            exclude={"views": {"shown_fraction"}},  # of pretraining only
        )
        if MODES[trial.mode].unlabelled == "pseudo_labels":
            config |= self.config.model_dump(mode="json", include={"strong_intensity"})
        if self.config.compile:
            config["compile"] = True
        if trial.mode == "linear_probe":
            config["probe_augmentation"] = self.config.probe_augmentation
        recipe: dict[str, Any] = {
            "config": config,
            "trial": trial.to_recipe(),
            "task": task_sha256(Path(self.task)),
            "data": self.data_sha256,
            "backbone": self._backbone_of(trial),
        }
        if trial.purpose == "final":
            recipe["score_on"] = self.config.score_on
            if self.config.score_on == "test":
                recipe["test"] = self.test_sha256
        if self.config.allow_transductive:
            recipe["transductive"] = True
        return hashlib.sha256(json_bytes(recipe)).hexdigest()

    def _backbone_of(self, trial: Trial) -> str:
        """Return the digest of what the trial takes of the backbone."""
        # Whether a row is labelled as transductive hangs on the backbone's corpus, not on its shape alone.
        if MODES[trial.mode].is_from_scratch and not self.config.allow_transductive:
            return self.architecture_sha256
        return self.backbone_sha256

    def result_path(self, trial: Trial) -> str:
        """Where the trial's result lies below `storage`: its name holds a digest of everything that it depends on."""
        return f"trials/{trial.id}-{self.recipe_sha256(trial)[:12]}.json"

    def state_path(self, trial: Trial) -> str:
        """Where the trial's training state is stored below `storage` until it is done."""
        return f"unfinished/{trial.id}-{self.recipe_sha256(trial)[:12]}.safetensors"

    def stopped_path(self, trial: Trial) -> str:
        """Where it is noted below `storage` that a scheduler stopped the trial: that depends on its rivals, too."""
        of = {"recipe": self.recipe_sha256(trial), "search": self.config.search.model_dump(mode="json")}
        return f"searches/{trial.id}-{hashlib.sha256(json_bytes(of)).hexdigest()[:12]}.json"

    def is_done(self, trial: Trial) -> bool:
        """Whether the storage has the trial's result, or knows that it was stopped."""
        return self._stored_path(trial) is not None

    def is_begun(self, trial: Trial) -> bool:
        """Whether the storage has the training state of the trial, which an earlier run left."""
        return Storage(self.storage).exists(self.state_path(trial))

    def stored(self, trial: Trial) -> dict[str, Any] | None:
        """Return what the storage holds of the trial: its result, or how far it came before it was stopped."""
        path = self._stored_path(trial)
        return None if path is None else read_result(Storage(self.storage), path)

    def _stored_path(self, trial: Trial) -> str | None:
        storage = Storage(self.storage)
        return next(
            (path for path in (self.result_path(trial), self.stopped_path(trial)) if storage.exists(path)), None
        )


def preparation_for(task: TaskConfig, config: FinetuneConfig, of_backbone: Preparation) -> Preparation:
    """Return what models of a task do to a scan: the backbone's way, but for how much they read of it, and what the task states."""
    return task.preparation(of_backbone.model_copy(update={"planes": config.planes}))


def run_trial(
    setup: TrialSetup,
    trial: Trial,
    *,
    device: str,
    say: Say = lambda line: None,
    report: Report | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Train and score one trial, or return the result that the storage already holds. One that was killed resumes.

    A search trial is scored on validation patients. A final one is scored on the split that is reported too. It and the trial of
    a model to be published leave their weights and their predictions beside their results.

    Args:
        setup: What the task's trials share.
        trial: Which one.
        device: `cpu` or `cuda`.
        say: Receives a line of progress now and then.
        report: Receives an intermediate validation every `search.report_steps`, for a scheduler.
        deadline: Of `time.monotonic`: when to save the training state and end. None: never.

    Raises:
        TrainingError: if it diverges.
        OutOfTime: if the deadline passes.
    """
    storage, path = Storage(setup.storage), setup.result_path(trial)
    if storage.exists(path):
        return read_result(storage, path)
    saved = SavedTraining(storage, setup.state_path(trial), deadline=deadline)
    config, task = setup.config, load_task(Path(setup.task))
    backbone = load_backbone(setup.backbone, sha256=setup.backbone_sha256)
    preparation = setup.preparation(backbone)
    known = Known(backbone, is_allowed=config.allow_transductive)

    def see(case: Case, split: Split) -> None:
        if split == "test" or trial.protocol == "leak_free":  # else these are slices of the labelled patients
            known.see_scan(case.scan, case.volume, split)

    reports_validation = trial.purpose == "final" and config.score_on == "validation"

    def score(segmenter: nn.Module, cases: Iterable[Case], split: Split, *, is_reported: bool = False) -> Scored:
        return score_cases(
            segmenter,
            cases,
            task,
            preparation,
            # What is only chosen by needs Dice alone.
            nsd_tolerance_mm=config.nsd_tolerance_mm if split == "test" or reports_validation else None,
            largest_component=config.largest_component,
            device=device,
            is_calibrated=is_reported,
            see=lambda case: see(case, split),
        )

    training, validation_cases = _labelled(trial, task, preparation, seed=config.seed)

    def look(step: int, segmenter: nn.Module) -> dict[str, Any]:
        summary = score(segmenter, validation_cases(), "validation").summary
        point = {"step": step, "dice_mean": summary.dice_mean, "dice": summary.dice}
        say(f"{trial.id} | step {step} | {_dice_text(point)}")
        if report is not None:
            report(step, summary.dice_mean or 0.0)
        return point

    look_steps = config.curve_steps if report is None else config.search.report_steps
    trained = _fit(
        setup,
        trial,
        task,
        backbone,
        training,
        device=device,
        say=say,
        look=None if look_steps is None else look,
        look_steps=look_steps or 1,
        saved=saved if report is None else None,  # a scheduler's trials are short, and hang on their rivals
    )
    segmenter = trained.segmenter
    validation = score(segmenter, validation_cases(), "validation", is_reported=reports_validation)
    result: dict[str, Any] = {
        "trial": trial.to_row(),
        "train_loss": trained.loss,
        "validation": validation.summary.to_row(),
        "device": _device_name(device),
    }
    told: dict[str, Any] = {}
    if config.curve_steps is not None and "steps" in MODES[trial.mode].settings:
        last = {
            "step": trial.settings.steps,
            "dice_mean": validation.summary.dice_mean,
            "dice": validation.summary.dice,
        }
        told["curve"] = [*trained.curve, last]
    if trained.pseudo_labels is not None:
        names = ["background", *task.config.classes.values()]
        threshold = trial.settings.confidence_threshold or 0.0
        told["pseudo_labels"] = trained.pseudo_labels.to_row(names, threshold=threshold)
        if trained.rounds:
            told["pseudo_labels"]["rounds"] = trained.rounds
    if trained.warnings:
        told["warnings"] = list(trained.warnings)
    for warning in warnings_of(told):
        say(f"{trial.id} | WARNING: {warning}")
    result |= told
    if isinstance(segmenter.head, PrototypeHead):
        result["num_prototypes"] = list(segmenter.head.num_prototypes)
    if trial.purpose != "search":
        stem = path.removesuffix(".json")
        reported = validation
        # From scratch, nothing of the backbone is used but its architecture and its way to prepare a scan.
        backbone_sha256 = None if MODES[trial.mode].is_from_scratch else setup.backbone_sha256
        reports_test = trial.purpose == "final" and config.score_on == "test"
        if reports_test:
            scans = task.scans_of(task.subjects["test"])
            reading = {"recipe_sha256": setup.recipe_sha256(trial), "backbone_sha256": backbone_sha256}
            record_reading(
                Storage(setup.root), {"task": task.name, "trial": trial.id, "num_scans": len(scans), **reading}
            )
            cases = cases_of(scans, task, preparation, is_cropped=trial.protocol == "paper_compat")
            reported = score(segmenter, cases, "test", is_reported=True)
        result["weights"], predictions = f"{stem}.safetensors", f"{stem}.npz"
        storage.write_bytes(
            result["weights"], save({key: value.cpu().contiguous() for key, value in segmenter.state_dict().items()})
        )
        storage.write_bytes(predictions, npz_bytes(reported.predictions))
        result["row"] = {
            **trial.to_row(),
            "transductive": setup.is_transductive or known.is_any,
            **({"corpora": "unknown"} if known.is_unknown else {}),
            "seed": config.seed,
            "split": "test" if reports_test else "validation",
            "validation_dice_mean": validation.summary.dice_mean,
            "backbone_sha256": backbone_sha256,
            "code": code_version(),
            **reported.summary.to_row(),
            "cases": list(reported.cases),
            "predictions": predictions,
            "device": result["device"],
            **told,
        }
        if reported.calibration is not None:
            result["row"]["calibration"] = reported.calibration
        if reported.soft_dice_with_background is not None:
            result["row"]["soft_dice_with_background"] = reported.soft_dice_with_background
    result["seconds"] = round(saved.seconds, 3)
    if "row" in result:
        result["row"]["seconds"] = result["seconds"]
    storage.write_json(path, result)
    saved.delete()
    return result


def _labelled(
    trial: Trial, task: Task, preparation: Preparation, *, seed: int
) -> tuple[Callable[[int | None], list[LabelledScan]], Callable[[], Iterable[Case]]]:
    """Return what gives the labelled scans at some size of their images, and what gives the cases of validation."""
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
    """Return the slices of labelled patients that paper_compat trains on, and those that validate.

    Raises:
        DataError: as `split_by_slice`.
    """
    scans = [prepared_scan(scan, task, preparation) for scan in task.scans_of(subjects)]
    crops = [crop for scan in scans for crop in cropped(scan, preparation, size=size)]
    return split_by_slice(crops, keyed_generator(seed, "slices", num_labelled, draw))


def _fit(
    setup: TrialSetup,
    trial: Trial,
    task: Task,
    backbone: Backbone,
    training: Callable[[int | None], list[LabelledScan]],
    *,
    device: str,
    say: Say,
    look: Look | None,
    look_steps: int,
    saved: SavedTraining | None,
) -> Trained:
    """Make the segmenter of a trial."""
    config, preparation = setup.config, setup.preparation(backbone)
    segmenter = build_segmenter(trial, backbone, num_classes=task.num_classes, seed=config.seed).to(device)
    num_classes = task.num_classes

    def features() -> list[FeaturesOfScan]:
        return frozen_features(
            training(size_read(preparation)),
            segmenter.backbone,
            trial,
            backbone_sha256=setup.backbone_sha256,
            preparation=preparation,
            device=device,
        )

    if trial.mode == "prototype":
        by_prototypes = segmenter_by_prototypes(
            segmenter.backbone, features(), trial, num_classes=num_classes, seed=config.seed
        )
        return Trained(by_prototypes, None)
    if trial.mode == "linear_probe" and config.probe_augmentation == "none":
        loss, curve = train_head(
            segmenter.head,
            features(),
            trial=trial,
            config=config,
            device=device,
            say=say,
            look=None if look is None else lambda step: look(step, segmenter),
            look_steps=look_steps,
        )
        return Trained(segmenter.eval(), loss, curve)
    labelled = training(None)
    unlabelled, rounds, warnings = None, None, list[str]()
    if MODES[trial.mode].unlabelled != "none":
        # Of those who were not drawn, the images alone; if all were drawn, theirs.
        others = _without_labels(task, trial) or trial.subjects
        scans = task.scans_of(others)
        images = [prepared_images(scan, preparation) for scan in scans]
        if others == trial.subjects:
            warnings.append(_NONE_LEFT)
        else:
            by_name = {scan.key: image for scan, image in zip(scans, images, strict=True)}
            warnings += odd_scans([scan.planes for scan in labelled], by_name)
        unlabelled = _on(unlabelled_images(images), device)
        if MODES[trial.mode].has_rounds:
            rounds = Rounds(
                Unlabelled(unlabelled.images, unlabelled.inside, frames_of_scans(images)),
                segmenter_by_prototypes(
                    copy.deepcopy(segmenter.backbone), features(), trial, num_classes=num_classes, seed=config.seed
                ),
                plausibility_of(labelled, trial, num_classes=num_classes, preparation=preparation),
                trial=trial,
                config=config,
                preparation=preparation,
                names=["background", *task.config.classes.values()],
            )
    trained = train_segmenter(
        segmenter,
        _on(labelled_images(labelled), device),
        unlabelled,
        trial=trial,
        config=config,
        preparation=preparation,
        num_classes=num_classes,
        device=device,
        say=say,
        look=look,
        look_steps=look_steps,
        saved=saved,
        rounds=rounds,
    )
    return replace(trained, warnings=(*warnings, *trained.warnings))


def warnings_of(row: Mapping[str, Any]) -> list[str]:
    """Return the problems of a trial that did not end it, as its row states them."""
    return [*row.get("warnings", ()), *(row.get("pseudo_labels") or {}).get("warnings", ())]


def _without_labels(task: Task, trial: Trial) -> tuple[str, ...]:
    """Return the train patients who were not drawn."""
    return tuple(sorted(set(task.subjects["train"]) - set(trial.subjects)))


def _on(images: Images, device: str) -> Images:
    labels = None if images.labels is None else images.labels.to(device)
    return Images(images.images.to(device), images.inside.to(device), labels)


def build_segmenter(trial: Trial, backbone: Backbone, *, num_classes: int, seed: int) -> Segmenter:
    """Return the network of a mode: the backbone's architecture, its weights unless from scratch, frozen for a linear probe."""
    torch.manual_seed(seed)
    config = backbone.config
    network: nn.Module = build_backbone(config.model, dimensions=config.preparation.dimensions)
    if not MODES[trial.mode].is_from_scratch:
        network.load_state_dict(backbone.network.state_dict())
    if MODES[trial.mode].weights == "frozen":
        network.requires_grad_(False)
    classes = {value: str(value) for value in range(1, num_classes)}
    return Segmenter(
        network, ArtefactConfig(model=config.model, preparation=config.preparation, classes=classes).head()
    )


def _dice_text(point: Mapping[str, Any]) -> str:
    classes = ", ".join(f"{name} {dice:.3f}" for name, dice in point["dice"].items() if dice is not None)
    mean = point["dice_mean"]
    return f"validation Dice {'none' if mean is None else f'{mean:.3f}'} ({classes})"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
