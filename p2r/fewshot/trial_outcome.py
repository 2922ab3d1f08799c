"""The outcome of a few-shot trial: description of the training, result and row, weights and predictions on the storage."""

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from p2r.errors import DamagedError, StorageError
from p2r.evaluate.metrics import Summary
from p2r.evaluate.rows import ContrastRow, CurvePoint, JsonModel, PseudoLabelRow, TrialRow
from p2r.fewshot.results import TrialResult
from p2r.fewshot.saved_training import SavedTraining
from p2r.fewshot.scoring import Scored, npz_bytes
from p2r.fewshot.training import Trained
from p2r.fewshot.trial_inputs import TrialInputs, build_segmenter, weights_sha256
from p2r.model.heads import PrototypeHead
from p2r.model.pix2rep import Segmenter
from p2r.modes import MODES
from p2r.storage import Storage
from p2r.version import code_version


class TrainingFacts(JsonModel):
    """Description of the training, part of both result and row."""

    train_loss: float | None
    training_code: str | None = None
    curve: list[CurvePoint] | None = None
    pseudo_labels: PseudoLabelRow | None = None
    warnings: list[str] | None = None


def describe_training(inputs: TrialInputs, trained: Trained, validation: Summary) -> TrainingFacts:
    """Describe a training that has just ended, with the validation scores of its last weights."""
    trial, task = inputs.trial, inputs.task
    facts: dict[str, object] = {}
    if inputs.config.curve_steps is not None and "steps" in MODES[trial.mode].settings:
        last = CurvePoint(step=trial.settings.steps, dice_mean=validation.dice_mean, dice=validation.dice)
        facts["curve"] = [*trained.curve, last]
    if trained.pseudo_labels is not None:
        names = ["background", *task.config.classes.values()]
        threshold = trial.settings.confidence_threshold or 0.0
        row = trained.pseudo_labels.to_row(names, threshold=threshold)
        facts["pseudo_labels"] = row.model_copy(update={"rounds": list(trained.rounds)}) if trained.rounds else row
    if trained.warnings:
        facts["warnings"] = list(trained.warnings)
    return TrainingFacts.model_validate({"train_loss": trained.loss, **facts})


def load_earlier(inputs: TrialInputs, earlier: TrialResult) -> tuple[Segmenter, TrainingFacts]:
    """Return the network of an earlier trial with the same training, and the description of that training.

    Raises:
        DamagedError: if the weights are absent, or do not fit the network.
    """
    storage, row = Storage(inputs.setup.storage), earlier.reported()
    segmenter = build_segmenter(
        inputs.trial,
        inputs.backbone,
        inputs.preparation,
        num_classes=inputs.task.num_classes,
        seed=inputs.config.seed,
    )
    assert earlier.weights is not None
    try:
        segmenter.load_state_dict(load(storage.read_bytes(earlier.weights)))
    except (RuntimeError, SafetensorError, StorageError) as error:
        raise DamagedError(
            f"{storage.at(earlier.weights)} does not contain the weights of trial {inputs.trial.id}: {error!s:.300}; "
            "delete the trial's three files of this name to train it again"
        ) from error
    training = {
        "training_code": row.code,
        "curve": row.curve,
        "pseudo_labels": row.pseudo_labels,
        "warnings": row.warnings,
    }
    facts = {"train_loss": earlier.train_loss, **{name: value for name, value in training.items() if value is not None}}
    return segmenter.to(inputs.device).eval(), TrainingFacts.model_validate(facts)


def store_result(
    inputs: TrialInputs,
    segmenter: Segmenter,
    facts: TrainingFacts,
    validation: Scored,
    reported: Scored,
    *,
    by_contrasts: Sequence[ContrastRow],
    saved: SavedTraining,
) -> TrialResult:
    """Store weights and predictions, except for search trials; then the result."""
    setup, trial, storage = inputs.setup, inputs.trial, Storage(inputs.setup.storage)
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
            inputs,
            facts,
            validation.summary,
            reported,
            by_contrasts=by_contrasts,
            predictions=files["predictions"],
            seconds=seconds,
        )
    result = TrialResult.model_validate(
        {
            "trial": trial.to_row(),
            "validation": validation.summary.to_row(),
            "device": _device_name(inputs.device),
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
    inputs: TrialInputs,
    facts: TrainingFacts,
    validation: Summary,
    reported: Scored,
    *,
    by_contrasts: Sequence[ContrastRow],
    predictions: str,
    seconds: float,
) -> TrialRow:
    training = {name: value for name, value in facts.to_json().items() if name != "train_loss"}
    contrasts = inputs.preparation.contrasts
    optional = {
        "calibration": reported.calibration,
        "soft_dice_with_background": reported.soft_dice_with_background,
        "contrasts": None if contrasts is None else list(contrasts),
        "by_contrasts": [row.to_json() for row in by_contrasts] or None,
    }
    return TrialRow.model_validate(
        {
            **inputs.trial.to_row(),
            "transductive": inputs.setup.is_transductive or inputs.known.is_any,
            **({"corpora": "unknown"} if inputs.known.is_unknown else {}),
            "seed": inputs.config.seed,
            "split": "test" if inputs.reports_test else "validation",
            "validation_dice_mean": validation.dice_mean,
            "backbone_sha256": weights_sha256(inputs),
            "code": code_version(),
            **reported.summary.to_row(),
            "cases": list(reported.cases),
            "predictions": predictions,
            "device": _device_name(inputs.device),
            "seconds": seconds,
            **training,
            **{name: value for name, value in optional.items() if value is not None},
        }
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
