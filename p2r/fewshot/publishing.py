"""Results of final trials -> the model to publish, with its card and facts."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from p2r.artefact import Manifest, Published
from p2r.backbone import MODEL_FORMAT, ArtefactConfig, Backbone, publish
from p2r.config import FinetuneConfig
from p2r.errors import CheckpointError
from p2r.evaluate.tasks import Task, load_task
from p2r.fewshot.protocol import Settings, Trial, trial_on_all
from p2r.fewshot.results import TrialResult
from p2r.fewshot.setup import TrialSetup
from p2r.model.contrasts import config_for
from p2r.modes import MODES
from p2r.report.text import for_markdown, one_line
from p2r.storage import Storage, json_bytes

_TRANSDUCTIVE_CARD = """
Its backbone was pretrained on scans of validation or test patients (transductive): its scores do not hold for other patients."""
_UNKNOWN_CARD = """
The corpora of its backbone are unknown and may include validation or test patients: its scores may not hold for other patients."""
_PAPER_COMPAT_CARD = """
It was trained and scored on scans cropped by their labels (paper_compat): it is only for comparison with a paper."""

_MAX_NAMES = 10
"""Labelled patients whose names the card lists."""


def choose_model(config: FinetuneConfig, results: Sequence[TrialResult]) -> TrialResult:
    """Return the result of the model to publish: the best validation Dice among the modes of `published_mode`."""
    fine_tuned = [one for one in results if MODES[one.trial.mode].weights == "pretrained"]
    candidates = fine_tuned if config.published_mode == "fine_tuned" and fine_tuned else results
    return max(candidates, key=lambda result: result.validation_dice or 0.0)


def trial_for_publishing(setup: TrialSetup, best: TrialResult) -> Trial | None:
    """Return the trial that trains the best mode on all labelled patients; None if the best model already is."""
    task = load_task(Path(setup.task))
    trial = best.trial
    if setup.config.protocol != "leak_free" or trial.num_labelled == len(set(task.subjects["train"])):
        return None
    settings: dict[str, Any] = trial.settings
    return trial_on_all(setup.config, task, trial.mode, Settings(**settings))


def publish_best(
    setup: TrialSetup, results: Sequence[TrialResult], backbone: Backbone, storage: Storage
) -> Published[Manifest]:
    """Publish the best model below `storage` (`<storage>/models`), and return its manifest."""
    best = choose_model(setup.config, results)
    return _publish_result(setup, best, backbone, storage, why=reason_for(setup.config, best, results))


def reason_for(config: FinetuneConfig, best: TrialResult, results: Sequence[TrialResult]) -> str:
    """Return why `best` is published, for its card: its validation Dice, and the number of models compared."""
    num = sum(MODES[one.trial.mode].weights == MODES[best.trial.mode].weights for one in results)
    is_among_fine_tuned = config.published_mode == "fine_tuned" and num < len(results)
    among = f"{num} fine-tuned models" if is_among_fine_tuned else f"{len(results)} models"
    if (num if is_among_fine_tuned else len(results)) == 1:
        return f"validation Dice {_dice_of(best):.3f}; no other model was compared"
    return f"the best validation Dice ({_dice_of(best):.3f}) of {among}"


def publish_on_all(setup: TrialSetup, result: TrialResult, backbone: Backbone, storage: Storage) -> Published[Manifest]:
    """Publish the model trained on all labelled patients as `<task>/all`, and return its manifest.

    Published models never change: if `all` already is another model, this one is published as `all-<digest>`.
    """
    why = f"all labelled patients of the train split; validation Dice {_dice_of(result):.3f}, test patients not read"
    return _publish_result(setup, result, backbone, storage, why=why, name="all")


def publish_other_draws(
    setup: TrialSetup, results: Sequence[TrialResult], backbone: Backbone, storage: Storage
) -> dict[int, Published[Manifest]]:
    """Publish the other draws of the best model's mode and number of labelled patients; return their manifests by draw."""
    best, published = choose_model(setup.config, results).trial, {}
    for one in results:
        trial = one.trial
        if (trial.mode, trial.num_labelled) == (best.mode, best.num_labelled) and trial.draw != best.draw:
            why = f"draw {trial.draw}, published for ensembles; validation Dice {_dice_of(one):.3f}"
            published[trial.draw] = _publish_result(setup, one, backbone, storage, why=why)
    return published


def _dice_of(result: TrialResult) -> float:
    return result.validation_dice or 0.0


def _publish_result(
    setup: TrialSetup, best: TrialResult, backbone: Backbone, storage: Storage, *, why: str, name: str | None = None
) -> Published[Manifest]:
    task = load_task(Path(setup.task))
    trial = best.trial
    row = best.reported()
    assert best.weights is not None and best.validation is not None
    weights = load(Storage(setup.storage).read_bytes(best.weights))
    # A model from scratch has only the backbone's architecture, so its licence and corpora do not apply.
    is_scratch = MODES[trial.mode].is_from_scratch
    licences = [task.config.licence] if is_scratch else [backbone.manifest.facts.licence, task.config.licence]
    licence = " AND ".join(dict.fromkeys(licences))
    preparation = setup.preparation(backbone)
    about = _card_template(best, task, storage, why=why, licence=licence, contrasts=preparation.contrasts)
    config = ArtefactConfig(
        model=config_for(backbone.config.model, preparation.contrasts),
        preparation=preparation,
        classes=task.config.classes,
        largest_component=setup.config.largest_component,
        **_prototype_settings(best, weights),
    )
    facts = {
        "task": task.config.name,
        "licence": licence,
        "trial": trial.to_json(),
        "validation": best.validation.to_json(),
        "transductive": row.transductive,
        "backbone_sha256": row.backbone_sha256,
        "corpora": [] if is_scratch else backbone.manifest["corpora"],
    }
    # Published models never change: with another description, such as a corrected licence, a model is another version.
    description = hashlib.sha256(json_bytes([about, facts, config.model_dump(mode="json")])).hexdigest()
    own_version = f"{Path(best.weights).stem}-{description[:12]}"

    def publish_as(version: str) -> Published[Manifest]:
        where = storage.child(f"{task.config.name}/{version}")
        card = about.replace("%s", version)
        return publish(where, format=MODEL_FORMAT, weights=weights, config=config, card=card, facts=facts)

    if name is None:
        return publish_as(own_version)
    try:
        return publish_as(name)
    except CheckpointError:  # the name is taken; if this model cannot be published at all, the next line fails, too
        return publish_as(f"{name}-{description[:12]}")


def _card_template(
    best: TrialResult, task: Task, storage: Storage, *, why: str, licence: str, contrasts: Sequence[str] | None
) -> str:
    """Return the card of a model in Markdown, with `%s` in place of the version."""
    trial, row = best.trial, best.reported()
    number = trial.num_labelled
    names = ", ".join(map(for_markdown, trial.subjects)) if number <= _MAX_NAMES else "named in manifest.json"
    patients = f"{number} labelled patient{'s' * (number > 1)} ({names})"
    classes = ", ".join(f"{value} {for_markdown(name)}" for value, name in task.config.classes.items())
    seen = _UNKNOWN_CARD if row.corpora == "unknown" else _TRANSDUCTIVE_CARD
    warnings = seen * row.transductive + _PAPER_COMPAT_CARD * (trial.protocol == "paper_compat")
    scans = " ".join(f"{name}={name}.nii.gz" for name in contrasts or ()) or "scan.nii.gz"
    return f"""# {for_markdown(task.config.title)}

Segments {classes} (0: background). Mode {trial.mode} ({MODES[trial.mode].title}) with {patients}: {why}.
Not a medical device.{warnings}

    p2r predict {one_line(storage.at(task.config.name))}/%s {scans} -o segmentation.nii.gz

Licence of the weights: {for_markdown(licence)}. {for_markdown(task.config.citation)}
"""


def _prototype_settings(best: TrialResult, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of the configuration that describe a prototype head; none for other heads."""
    if not best.num_prototypes:
        return {}
    settings = best.trial.settings
    return {
        "num_prototypes": tuple(best.num_prototypes),
        "prototype_clusterings": settings.get("prototype_clusterings", 1),
        "prototype_smoothing_pixels": settings.get("prototype_smoothing_pixels", 0.0),
        "prototypes_are_centred": "head.centre" in weights,
    }
