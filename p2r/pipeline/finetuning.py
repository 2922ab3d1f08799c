"""The stage finetune: few-shot trials of every task -> published models and the report."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from p2r.backbone import Backbone, load_backbone
from p2r.config import FinetuneConfig, OtherConfig
from p2r.engine.history import read_history
from p2r.engine.report import HISTORY
from p2r.evaluate.tasks import load_task
from p2r.fewshot.checks import check_task
from p2r.fewshot.others import load_other
from p2r.fewshot.publishing import choose_model, publish_best, publish_on_all, publish_other_draws, trial_for_publishing
from p2r.fewshot.readings import merge_readings
from p2r.fewshot.results import FewShot, TrialResult, failures_of
from p2r.fewshot.search import TrialRunner, few_shot
from p2r.fewshot.setup import TrialSetup
from p2r.job import Job
from p2r.logs import Say, within
from p2r.modes import MODES
from p2r.pipeline.imported import publish_imported
from p2r.pipeline.outputs import Outputs
from p2r.pipeline.reporting import make_report
from p2r.reference import parse_reference
from p2r.report import table
from p2r.storage import Storage


@dataclass(frozen=True)
class Prepared:
    """A job whose trials can run."""

    backbone: Backbone
    setups: list[TrialSetup]
    """One for each task."""


def finetune(job: Job, made: Outputs, storage: Storage, runner: TrialRunner, say: Say) -> Outputs:
    """Run the trials of all tasks, publish their models, and write the report.

    Args:
        job: The job.
        made: Outputs of earlier stages.
        storage: Storage of the job.
        runner: Runs the trials.
        say: Receives lines of progress.

    Returns:
        The outputs with models, report and failed trials.
    """
    prepared = prepare_trials(job, storage, say)
    try:
        found = few_shot(prepared.setups, runner=runner, say=within(say, "finetune"))
    finally:  # readings of test patients are recorded, whatever the outcome
        merge_readings(storage)
    return finish_trials(job, made, storage, prepared, found, runner, say)


def prepare_trials(job: Job, storage: Storage, say: Say) -> Prepared:
    """Load the backbone, and check the scans of all tasks.

    Raises:
        InputError: Backbone, network or scans cannot be used.
    """
    config = job.finetune
    assert config is not None
    backbone = _load_backbone(job, storage, say)
    other_sha256 = "" if config.other is None else _digest_other(config.other, say)
    return Prepared(
        backbone, [_check_setup(path, config, backbone, storage, other_sha256, say) for path in config.tasks]
    )


def finish_trials(
    job: Job, made: Outputs, storage: Storage, prepared: Prepared, found: FewShot, runner: TrialRunner, say: Say
) -> Outputs:
    """Publish the models of finished trials, and write the report; return the outputs of `finetune`."""
    config = job.finetune
    assert config is not None
    backbone, setups, models = prepared.backbone, prepared.setups, dict[str, str]()
    rows = [result.reported() for result in found.results]
    for setup in setups if config.publish_model else ():
        models |= _publish_models(setup, found, backbone, runner, storage.child("models"), say)
    where = make_report(
        job,
        storage,
        backbone=backbone,
        setups=setups,
        rows=rows,
        models=models,
        facts={
            **found.facts(),
            "test_reads": [one.to_json() for one in merge_readings(storage)],
            "spent": _time_spent(storage, found),
        },
    )
    return replace(
        made,
        models=models,
        report=where.at("report.md"),
        page=where.at("report.html"),
        pictures=where.at("pictures"),
        table=table(rows),
        failed=tuple(found.failed),
    )


def _load_backbone(job: Job, storage: Storage, say: Say) -> Backbone:
    """Return the backbone that the job names, or the one that it has published."""
    config = job.finetune
    assert config is not None
    url = config.backbone
    if url is None:
        assert job.publish is not None
        url = storage.at(f"backbones/{job.publish.name}/{job.publish.version}")
    if config.imported is not None:
        url = publish_imported(url, config.imported, storage, say)
    backbone = load_backbone(url, key=config.backbone_signed_by)
    if parse_reference(url).pointer is not None:
        say(f"finetune | {url} is {backbone.manifest.pin}")
    return backbone


def _digest_other(config: OtherConfig, say: Say) -> str:
    """Return the digest of a network that is not one of p2r's, after checking it."""
    other = load_other(config)
    sha256 = other.manifest.sha256
    about = f"{config.name}, {other.config.model.feature_channels} features, sha256 {sha256[:12]}"
    say(f"finetune | other network: {about}; its pretraining patients are unknown, and its rows say so")
    return sha256


def _check_setup(
    path: str, config: FinetuneConfig, backbone: Backbone, storage: Storage, other_sha256: str, say: Say
) -> TrialSetup:
    """Return the setup of a task's trials, after checking its scans."""
    task = load_task(Path(path))
    setup = TrialSetup(
        config=config,
        task=path,
        backbone=backbone.manifest.url,
        backbone_sha256=backbone.manifest.sha256,
        architecture_sha256=backbone.config.sha256(),
        storage=storage.at(f"finetune/{task.name}"),
        root=storage.url,
        other_sha256=other_sha256,
    )
    say(f"finetune | checking {len(task.scans)} scans of task {task.name}")
    setup = check_task(task, backbone, setup)
    if setup.is_transductive:
        are = "may be" if backbone.manifest.facts.corpora is None else "are"
        say(f"finetune | task {task.name}: TRANSDUCTIVE, validation or test patients {are} in the backbone's corpus")
    return setup


def _time_spent(storage: Storage, found: FewShot) -> dict[str, float]:
    """Return the time spent so far, by any call: seconds per worker of pretraining, and of all trials."""
    spent = {"search_s": math.fsum(one.seconds or 0.0 for one in found.searched)}
    if storage.exists(f"pretrain/{HISTORY}"):
        rows = read_history(storage, f"pretrain/{HISTORY}")
        before = [0, *(row.step for row in rows)]
        spent["pretraining_s"] = math.fsum(
            (row.step - step) * (row.step_s or 0.0) for row, step in zip(rows, before, strict=False)
        )
        spent["num_pretraining_workers"] = max((row.world_size or 1 for row in rows), default=0)
    return spent


def _publish_models(
    setup: TrialSetup, found: FewShot, backbone: Backbone, runner: TrialRunner, storage: Storage, say: Say
) -> dict[str, str]:
    """Publish a task's best model, and a model trained in the same mode on all labelled patients; return their URLs by name.

    If the second training fails, it is added to `found.failed`.
    """
    name = load_task(Path(setup.task)).name
    results = [one for one in found.results if one.trial.task == name and MODES[one.trial.mode].weights != "other"]
    if not results:
        return {}
    best = choose_model(setup.config, results)
    mode = MODES[best.trial.mode].title
    models = {name: publish_best(setup, results, backbone, storage).url}
    say(f"finetune | published model of {name}: {mode}, best by validation Dice | {models[name]}")
    if setup.config.publish_draws:
        others = publish_other_draws(setup, results, backbone, storage)
        models |= {f"{name}/draw-{draw}": manifest.url for draw, manifest in sorted(others.items())}
        say(f"finetune | {_describe_ensemble(name, models, best)}")
    trial = trial_for_publishing(setup, best)
    result = best
    if trial is not None:
        say(f"finetune | training {mode} on all {trial.num_labelled} labelled patients of {name}, to be published")
        (result,) = runner.run_trials([(setup, trial)], say=within(say, "finetune"))
    if failures := failures_of([result]):
        found.failed += failures
        return models
    models[f"{name}/all"] = publish_on_all(setup, result, backbone, storage).url
    say(f"finetune | model of {name} by all labelled patients: {models[f'{name}/all']}")
    return models


def _describe_ensemble(name: str, models: Mapping[str, str], best: TrialResult) -> str:
    """Return the command that averages the published draws of a task, or why there is none."""
    first, *others = map(shlex.quote, models.values())
    if not others:
        trial = best.trial
        labelled = f"{trial.num_labelled} labelled patient{'s' * (trial.num_labelled > 1)}"
        return f"no ensemble of {name}: {trial.mode} with {labelled} has one draw (finetune.draws)"
    return (
        f"ensemble of {name}: p2r predict {first} SCAN -o OUT.nii.gz {' '.join(f'--ensemble {url}' for url in others)}"
    )
