"""Few-shot segmentation as science: search on validation, freeze, read the test patients once.

    tasks -> search trials -> one learning rate per mode -> final trials (n x draw x mode) -> rows

How trials are run is the caller's: a loop here, Ray Tune on a cluster. Trials that are done already return at once, so
calling this again after a kill goes on where it stopped.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load

from p2r.backbone import MODEL_FORMAT, ArtefactConfig, Backbone, publish
from p2r.data.corpus import contains
from p2r.engine.finetune import WAYS_OUT, TrialSetup
from p2r.errors import DataError
from p2r.evaluate.protocol import Trial, choose_learning_rates, draw_subjects, final_trials, search_trials
from p2r.evaluate.tasks import Task, check_classes_present, check_scans, load_task
from p2r.storage import Storage

_TRANSDUCTIVE_CARD = """
Its backbone was pretrained on scans of validation or test patients (transductive): the figure is no estimate for others."""

RunTrials = Callable[[Sequence[tuple[TrialSetup, Trial]]], list[dict[str, Any]]]


def few_shot(
    setups: Sequence[TrialSetup], *, run_trials: RunTrials, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the whole protocol for every task and return the results of the final trials.

    Args:
        setups: One per task.
        run_trials: Runs trials in any order and returns their results in the given order.
        say: Receives a line when something was decided.
    """
    tasks = [load_task(Path(setup.task)) for setup in setups]
    searches = [
        (setup, trial) for setup, task in zip(setups, tasks, strict=True) for trial in search_trials(setup.config, task)
    ]
    found = run_trials(searches)
    finals: list[tuple[TrialSetup, Trial]] = []
    for setup, task in zip(setups, tasks, strict=True):
        of_task = [
            (trial, result["validation"]["dice_mean"])
            for (owner, trial), result in zip(searches, found, strict=True)
            if owner is setup
        ]
        rates = choose_learning_rates(of_task)
        say(
            f"{task.config.name} | learning rates chosen on validation: "
            + ", ".join(f"{mode} {rate:g}" for mode, rate in rates.items())
        )
        finals += [(setup, trial) for trial in final_trials(setup.config, task, rates)]
    return run_trials(finals)


def check_task(task: Task, backbone: Backbone, setup: TrialSetup) -> TrialSetup:
    """Check, before anything is trained, that the task can be run with this backbone.

    Returns:
        The setup; marked as transductive if a validation or test patient is in the backbone's corpus and the job allows it.

    Raises:
        DataError: if more patients are asked for than exist, a label breaks the task's rules, two subjects are one, all
            labelled patients of a draw lack a class, or a validation or test patient is in the backbone's corpus.
    """
    numbers = {*setup.config.num_labelled, *setup.config.search.num_labelled}
    for num_labelled in numbers:
        draw_subjects(task.subjects["train"], num_labelled=num_labelled, draw=0, seed=setup.config.seed)
    corpora = backbone.manifest.get("corpora", [])
    for split, corpus in itertools.product(("validation", "test"), corpora):
        for subject in task.subjects[split]:
            if contains(corpus, cohort=task.config.cohort, subject=subject):
                if not setup.config.allow_transductive:
                    raise DataError(
                        f"subject {subject} of the {split} split of task {task.config.name} is in the backbone's corpus {corpus['url']}: "
                        f"its figures would leak. {WAYS_OUT}"
                    )
                setup = replace(setup, is_transductive=True)
    labels_by_subject = check_scans(task, setup.preparation(backbone))
    for num_labelled, draw in itertools.product(sorted(numbers), range(setup.config.draws)):
        drawn = draw_subjects(task.subjects["train"], num_labelled=num_labelled, draw=draw, seed=setup.config.seed)
        check_classes_present(labels_by_subject, task, subjects=drawn)
    return setup


def publish_best(
    setup: TrialSetup, results: Sequence[dict[str, Any]], backbone: Backbone, storage: Storage
) -> dict[str, Any]:
    """Publish the model with the highest mean validation Dice below `storage` (`<storage>/models`), and return its manifest."""
    task = load_task(Path(setup.task))
    best = max(results, key=lambda result: result["validation"]["dice_mean"])
    trial = best["trial"]
    weights = load(Storage(setup.storage).read_bytes(best["weights"]))
    version = Path(best["weights"]).stem
    licence = " AND ".join(dict.fromkeys([backbone.manifest["licence"], task.config.licence]))
    patients = (
        f"{trial['num_labelled']} labelled patient{'s' * (trial['num_labelled'] > 1)} ({', '.join(trial['subjects'])})"
    )
    dice = best["validation"]["dice_mean"]
    trial_is_transductive = bool(best["row"].get("transductive"))
    classes = ", ".join(f"{value} {name}" for value, name in task.config.classes.items())
    card = f"""# {task.config.title}

Segments {classes} (0: background). Mode {trial["mode"]} with {patients}: the best validation Dice
({dice:.3f}) of {len(results)} models. Not a medical device.{_TRANSDUCTIVE_CARD * trial_is_transductive}

    p2r predict {storage.at(f"{task.config.name}/{version}")} scan.nii.gz -o segmentation.nii.gz

Licence of the weights: {licence}. {task.config.citation}
"""
    return publish(
        storage.child(f"{task.config.name}/{version}"),
        format=MODEL_FORMAT,
        weights=weights,
        config=ArtefactConfig(
            model=backbone.config.model, preparation=setup.preparation(backbone), classes=task.config.classes
        ),
        card=card,
        facts={
            "task": task.config.name,
            "licence": licence,
            "trial": trial,
            "validation": best["validation"],
            "transductive": trial_is_transductive,
            "backbone_sha256": backbone.manifest["sha256"],
            "corpora": backbone.manifest.get("corpora", []),
        },
    )
