"""Stages of a job: ingest -> pretrain -> publish -> fine-tune -> report.

An `Executor` does the heavy parts (reading scans, training, trials): a plain loop in `p2r.__main__`, Ray in `cluster`.
Everything else is implemented here, once. Each stage continues from what earlier calls stored, so a killed job is resumed
by running it again.
"""

import json
import math
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from p2r.artefact import CorpusFacts
from p2r.backbone import BACKBONE_FORMAT, ArtefactConfig, Backbone, load_backbone, publish
from p2r.config import ImageConfig, IngestConfig, PretrainConfig, PublishConfig
from p2r.data.corpus import check_selection, load_manifest, manifest_sha256, subjects_found, was_asked
from p2r.data.manifest import describe_records
from p2r.data.preprocess import Preparation, SliceAxis
from p2r.data.stream import Corpus
from p2r.engine.ancestry import added, ancestry, corpus_facts
from p2r.engine.checkpoint import newest_checkpoint
from p2r.engine.corpora import corpora_of
from p2r.engine.history import read_history
from p2r.engine.pretrain import finished_checkpoint
from p2r.engine.report import HISTORY
from p2r.engine.weights import backbone_weights, checked_weights
from p2r.errors import DataError, JobError, OutOfTime
from p2r.evaluate.rows import TrialRow
from p2r.evaluate.tasks import HELD_OUT, load_task
from p2r.fewshot.checks import check_contrasts, check_data, check_subsets, check_task
from p2r.fewshot.others import load_other
from p2r.fewshot.publishing import choose_model, publish_best, publish_on_all, publish_other_draws, trial_for_publishing
from p2r.fewshot.readings import merge_readings
from p2r.fewshot.results import FailedTrial, FewShot, TrialResult, failures_of
from p2r.fewshot.search import TrialRunner, few_shot
from p2r.fewshot.setup import TrialSetup, preparation_for
from p2r.fewshot.stored import read_report_rows
from p2r.job import Job, variants_of
from p2r.logs import Say, within
from p2r.model.backbones import cost_of
from p2r.modes import MODES
from p2r.pipeline.finished import digest_inputs, record_finished
from p2r.pipeline.imported import check_initial_weights, publish_imported, published_record
from p2r.pipeline.reporting import make_report, write_variants
from p2r.pipeline.tracking import tracked
from p2r.report import corpus_report_is_current, variants_table, write_corpus_report
from p2r.report.text import for_markdown
from p2r.stages import KINDS
from p2r.storage import Storage


class Executor(TrialRunner, Protocol):
    """Runs the heavy parts of a job."""

    def ingest(self, config: IngestConfig, storage: Storage, *, subjects: frozenset[str] | None, say: Say) -> None:
        """Make a corpus at `storage`, with its manifest."""

    def pretrain(self, config: PretrainConfig, *, storage: Storage, corpus: Storage, say: Say) -> bool:
        """Train to the end, or as far as time allows; return whether the end was reached."""


def run_job(job: Job, executor: Executor, *, say: Say) -> dict[str, Any]:
    """Run the stages of a job's kind, and return their outputs: URLs and results.

    Args:
        job: Job from `p2r.job.read_job`.
        executor: Runs the heavy parts.
        say: Receives lines of progress.

    Raises:
        InputError: Something in the job or data cannot be used; nothing is left half-written.
    """
    storage = Storage(job.storage)
    storage.check_writable()
    with tracked(job, storage, say) as tracked_say:
        return _run_stages(job, storage, executor, tracked_say)


def _run_stages(job: Job, storage: Storage, executor: Executor, say: Say) -> dict[str, Any]:
    made: dict[str, Any] = {"storage": storage.url}
    stages = KINDS[job.kind].stages
    inputs = digest_inputs(job)
    if "finetune" in stages or "variants" in stages:
        if "ingest" in stages:
            _check_selection(job, storage)
        _check_tasks(job, storage, say)
    if job.ingest is not None and ("ingest" in stages or "pretrain" in stages):  # a fork uses an existing corpus
        made["corpus"] = _ingest(job, storage, executor, say)
    if "variants" in stages:
        return {**made, **_run_variants(job, storage, executor, say)}
    made |= _train_and_score(job, storage, executor, stages, say)
    record_finished(job, storage, made, inputs=inputs)
    return made


def _train_and_score(job: Job, storage: Storage, executor: Executor, stages: Sequence[str], say: Say) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if "pretrain" in stages:
        made["checkpoint"] = _pretrain(job, storage, executor, say)
        if made["checkpoint"] is None:
            return {**made, "unfinished": "pretrain"}
    if "publish" in stages:
        published = publish_backbone(job, storage, say)
        made["backbone"], made["backbone_pin"] = published["url"], published["pin"]
    if "finetune" in stages:
        try:
            made.update(_finetune(job, storage, executor, say))
        except OutOfTime as error:
            say(str(error))
            return {**made, "unfinished": "finetune"}
    return made


def _run_variants(job: Job, storage: Storage, executor: Executor, say: Say) -> dict[str, Any]:
    """Run every variant of an ablation in turn, and write a comparison of their results."""
    rows: list[TrialRow] = []
    failed: list[FailedTrial] = []
    for name, variant in variants_of(job).items():
        where = Storage(variant.storage)
        say(f"variant {name} | " + ", ".join(f"{key}: {value}" for key, value in job.variants[name].items()))
        stages = ("finetune",) if variant.pretrain is None else KINDS[job.kind].sections
        made = _train_and_score(variant, where, executor, stages, say)
        if "unfinished" in made:
            return {"unfinished": f"variant {name}"}
        rows += [row.replaced(variant=name) for row in read_report_rows(where, "report/report.json")]
        failed += [FailedTrial(trial=f"{name}: {one['trial']}", reason=one["reason"]) for one in made.get("failed", [])]
    found = {"report": write_variants(job, storage, rows, failed=failed), "table": variants_table(rows)}
    return {**found, "failed": [one.to_json() for one in failed]} if failed else found


def publish_backbone(job: Job, storage: Storage, say: Say) -> dict[str, Any]:
    """Publish the weights of the last checkpoint, without the projection head, and return the artefact's manifest.

    If a moving average of the weights was kept, it is published instead.
    """
    config = job.publish
    assert config is not None
    where = storage.child(f"backbones/{config.name}/{config.version}")
    if job.pretrain is None:
        raise JobError("kind publish needs the pretrain section of the run whose checkpoint it publishes")
    checkpoint = finished_checkpoint(storage.child("pretrain"), job.pretrain)
    corpora = corpora_of(job.pretrain, storage.child("corpus"), stream=checkpoint.manifest.state.stream)
    before = checkpoint.manifest.init_from
    inherited = ancestry(before)
    licence = _choose_licence(config, [*(corpus.manifest["licence"] for corpus in corpora), *inherited.licences])
    rules = {corpus.manifest["preprocessing"]["slice_axis"] for corpus in corpora}
    dimensions = job.pretrain.image.dimensions
    if len(rules) > 1 and dimensions == 2:
        raise DataError(
            f"the corpora cut planes across different axes (slice_axis {', '.join(map(str, sorted(rules, key=str)))}): "
            "a backbone has one rule; ingest them alike"
        )
    name = "model.safetensors" if job.pretrain.ema_decay is None else "ema.safetensors"
    weights = checked_weights(storage.child("pretrain"), f"{checkpoint.path}/{name}", checkpoint.manifest.files[name])
    published = publish(
        where,
        format=BACKBONE_FORMAT,
        weights=backbone_weights(weights),
        config=ArtefactConfig(
            model=job.pretrain.model,
            preparation=_preparation(
                job.pretrain.image,
                rules.pop() if dimensions == 2 else "auto",
                contrasts=job.pretrain.model.contrasts,
            ),
        ),
        card=_write_card(job, config, corpora, where.url, licence, step=checkpoint.step),
        facts={
            "licence": licence,
            "job": job.name,
            "step": checkpoint.step,
            "samples_seen": checkpoint.step * job.pretrain.global_batch,
            # Without the probe, which does not affect the weights and has a path of this machine.
            "pretrain": {key: value for key, value in checkpoint.manifest.config.to_json().items() if key != "probe"},
            "negatives": job.pretrain.negatives,
            "description": config.description,
            "initial_weights": published_record(before) if before and before.get("format") == "foreign" else None,
            "corpora": None
            if inherited.corpora is None
            else added(list(map(_corpus_facts, corpora)), inherited.corpora),
        },
    )
    if inherited.corpora is None:
        say(
            "publish | CORPORA UNKNOWN: the pretraining data of the initial weights cannot be read; evaluation will refuse this backbone"
        )
    say(f"publish | {published['pin']} | licence {licence}" + " | was published already" * (not published["is_new"]))
    if config.exports:
        from p2r.pipeline.exporting import write_exports  # ONNX takes seconds to import

        write_exports(config, storage, published, say)
    return published


def _corpus_facts(corpus: Corpus) -> CorpusFacts:
    sha256 = manifest_sha256(corpus.manifest)
    return corpus_facts(corpus.manifest, url=corpus.storage.url, sha256=sha256, weight=corpus.weight)


def _time_spent(storage: Storage, found: FewShot) -> dict[str, float]:
    """Return the time spent so far, by any call: seconds per worker of pretraining, and of all trials."""
    spent = {"search_s": math.fsum(one.seconds or 0.0 for one in found.searched)}
    if storage.exists(f"pretrain/{HISTORY}"):
        rows = read_history(storage, f"pretrain/{HISTORY}")
        before = [0, *(row["step"] for row in rows)]
        spent["pretraining_s"] = math.fsum(
            (row["step"] - step) * (row.get("step_s") or 0.0) for row, step in zip(rows, before, strict=False)
        )
        spent["num_pretraining_workers"] = max((row.get("world_size") or 1 for row in rows), default=0)
    return spent


def _check_tasks(job: Job, storage: Storage, say: Say) -> None:
    """Refuse a job with unusable tasks before pretraining, not after it."""
    config = job.finetune
    assert config is not None
    tasks = [load_task(Path(path)) for path in config.tasks]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise JobError(
            f"finetune.tasks: two tasks have one name, {', '.join(names)}; their results would share a folder"
        )
    check_subsets(tasks, config)
    if job.pretrain is not None and config.backbone is None:
        for task in tasks:
            check_contrasts(task, config, of_backbone=job.pretrain.model.contrasts, backbone="the job's backbone")
    if job.pretrain is None or job.ingest is None or storage.exists(f"pretrain/{HISTORY}"):
        return
    image = job.pretrain.image
    slice_axis = job.ingest.slice_axis if image.dimensions == 2 else "auto"
    of_backbone = _preparation(image, slice_axis, contrasts=job.pretrain.model.contrasts)
    for task in tasks:
        say(f"checking {len(task.scans)} scans of task {task.name}")
        check_data(task, config, preparation_for(task.config, config, of_backbone))


def _preparation(image: ImageConfig, slice_axis: SliceAxis, *, contrasts: tuple[str, ...] | None = None) -> Preparation:
    """Return the preprocessing of a backbone that is pretrained on such images."""
    return Preparation(
        dimensions=image.dimensions,
        slice_axis=slice_axis,
        intensity_percentiles=image.intensity_percentiles,
        spacing_mm=image.spacing_mm,
        image_size=image.size,
        contrasts=contrasts,
    )


def _select_subjects(config: IngestConfig) -> tuple[IngestConfig, frozenset[str] | None]:
    """Return an ingest section with its task's subject pattern and cohort, and the subjects of the chosen split.

    Raises:
        JobError: The section sets another cohort.
    """
    chosen = config.subjects_of
    if chosen is None:
        return config, None
    task = load_task(Path(chosen.task))
    defaults = {name: IngestConfig.model_fields[name].default for name in ("cohort", "subject_pattern")}
    inherited = {name: getattr(task.config, name) for name in defaults if getattr(config, name) == defaults[name]}
    if {"cohort": config.cohort, **inherited}["cohort"] != task.config.cohort:
        raise JobError(
            f"ingest.cohort is {config.cohort!r}, but task {task.name}, which names the subjects, has cohort "
            f"{task.config.cohort!r}. They must be equal, or fine-tuning could not tell that a patient is in the corpus; "
            "leave ingest.cohort out"
        )
    config = config.model_copy(update=inherited)
    if chosen.split != "not_held_out":
        return config, frozenset(task.subjects[chosen.split])
    found, labelled = subjects_found(config), {subject for split in task.subjects.values() for subject in split}
    if not found & labelled:
        raise DataError(
            f"ingest.subjects_of.split is not_held_out, but none of the {len(found)} subjects of ingest.sources is in task {task.name}. "
            f"By ingest.subject_pattern {config.subject_pattern!r} they are {_some_names(found)}, the task has {_some_names(labelled)}; "
            "make both patterns give a patient the same name"
        )
    return config, frozenset(found - {subject for split in HELD_OUT for subject in task.subjects[split]})


def _some_names(names: Set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)


def _check_selection(job: Job, storage: Storage) -> None:
    """Refuse sources from which the job selects nothing, or only one subject, before any scan is read."""
    if job.ingest is not None and not storage.exists("corpus/manifest.json"):
        config, subjects = _select_subjects(job.ingest)
        check_selection(config, allowed_subjects=subjects)


def _ingest(job: Job, storage: Storage, executor: Executor, say: Say) -> str:
    assert job.ingest is not None
    corpus = storage.child("corpus")
    config, subjects = _select_subjects(job.ingest)
    # Training accepts an existing corpus made with the same settings; a job of kind ingest looks for new scans.
    is_asked = job.kind != "ingest" and corpus.exists("manifest.json")
    if is_asked and was_asked(load_manifest(corpus), config, subjects):
        say(f"ingest | {corpus.url} is complete")
    else:
        executor.ingest(config, corpus, subjects=subjects, say=say)
        manifest = load_manifest(corpus)
        facts = manifest.facts
        counts = ", ".join(f"{count} {reason}" for reason, count in facts.reasons.items())
        say(
            f"ingest | {describe_records(manifest)} of {facts.num_subjects} subjects, {facts.num_samples} planes in "
            f"{len(facts.shards)} shards | revision {facts.revision} | ledger: {counts} | {corpus.url}"
        )
    if not corpus_report_is_current(corpus):
        say(f"ingest | report: {write_corpus_report(corpus, say=lambda line: say(f'ingest | {line}'))}")
    return corpus.url


def _pretrain(job: Job, storage: Storage, executor: Executor, say: Say) -> str | None:
    assert job.pretrain is not None
    where = storage.child("pretrain")
    say(f"pretrain | {_describe_network(job.pretrain)}")
    if newest_checkpoint(where) is None:
        check_initial_weights(job.pretrain, say)
    if not executor.pretrain(job.pretrain, storage=where, corpus=storage.child("corpus"), say=say):
        return None
    checkpoint = finished_checkpoint(where, job.pretrain)
    say(f"pretrain | done at step {checkpoint.step} | {where.at(checkpoint.path)}")
    return where.at(checkpoint.path)


def _describe_network(config: PretrainConfig) -> str:
    model, image = config.model, config.image
    cost = cost_of(model, dimensions=image.dimensions, size=image.size)
    return f"{model.name}, channels {', '.join(map(str, model.channels))}; {cost}"


def _finetune(job: Job, storage: Storage, executor: Executor, say: Say) -> dict[str, Any]:
    assert job.finetune is not None
    url = job.finetune.backbone
    if url is None:
        assert job.publish is not None
        url = storage.at(f"backbones/{job.publish.name}/{job.publish.version}")
    if job.finetune.imported is not None:
        url = publish_imported(url, job.finetune.imported, storage, say)
    backbone = load_backbone(url, key=job.finetune.backbone_signed_by)
    other_sha256 = ""
    if job.finetune.other is not None:
        other = load_other(job.finetune.other)
        other_sha256 = str(other.manifest["sha256"])
        about = f"{job.finetune.other.name}, {other.config.model.feature_channels} features, sha256 {other_sha256[:12]}"
        say(f"finetune | other network: {about}; its pretraining patients are unknown, and its rows say so")
    setups = []
    for path in job.finetune.tasks:
        task = load_task(Path(path))
        setup = TrialSetup(
            config=job.finetune,
            task=path,
            backbone=backbone.manifest["url"],
            backbone_sha256=backbone.manifest["sha256"],
            architecture_sha256=backbone.config.sha256(),
            storage=storage.at(f"finetune/{task.name}"),
            root=storage.url,
            other_sha256=other_sha256,
        )
        say(f"finetune | checking {len(task.scans)} scans of task {task.name}")
        setup = check_task(task, backbone, setup)
        if setup.is_transductive:
            are = "may be" if backbone.manifest["corpora"] is None else "are"
            say(
                f"finetune | task {task.name}: TRANSDUCTIVE, validation or test patients {are} in the backbone's corpus"
            )
        setups.append(setup)
    try:
        found = few_shot(setups, runner=executor, say=within(say, "finetune"))
    finally:  # readings of test patients are recorded, whatever the outcome
        test_reads = merge_readings(storage)
    models: dict[str, str] = {}
    if job.finetune.publish_model:
        for setup in setups:
            name = load_task(Path(setup.task)).name
            of_task = [
                result
                for result in found.results
                if result.trial.task == name and MODES[result.trial.mode].weights != "other"
            ]
            if not of_task:
                continue
            models |= _publish_models(
                setup, name, of_task, backbone, executor, storage.child("models"), say, found.failed
            )
    report = make_report(
        job,
        storage,
        backbone=backbone,
        setups=setups,
        rows=[result.reported() for result in found.results],
        models=models,
        facts={
            **found.facts(),
            "test_reads": [one.to_json() for one in test_reads],
            "spent": _time_spent(storage, found),
        },
    )
    failed = [one.to_json() for one in found.failed]
    return {"models": models, **report, **({"failed": failed} if failed else {})}


def _publish_models(
    setup: TrialSetup,
    name: str,
    results: Sequence[TrialResult],
    backbone: Backbone,
    executor: Executor,
    storage: Storage,
    say: Say,
    failed: list[FailedTrial],
) -> dict[str, str]:
    """Publish a task's best model, and a model trained in the same mode on all labelled patients; return their URLs by name."""
    best = choose_model(setup.config, results)
    mode = MODES[best.trial.mode].title
    models = {name: str(publish_best(setup, results, backbone, storage)["url"])}
    say(f"finetune | published model of {name}: {mode}, best by validation Dice | {models[name]}")
    if setup.config.publish_draws:
        others = publish_other_draws(setup, results, backbone, storage)
        models |= {f"{name}/draw-{draw}": str(manifest["url"]) for draw, manifest in sorted(others.items())}
        urls = [url for key, url in models.items() if key != name]
        say(
            f"finetune | ensemble of {name}: p2r predict {models[name]} SCAN -o OUT {' '.join(f'--ensemble {url}' for url in urls)}"
        )
    trial = trial_for_publishing(setup, best)
    result = best
    if trial is not None:
        say(f"finetune | training {mode} on all {trial.num_labelled} labelled patients of {name}, to be published")
        (result,) = executor.run_trials([(setup, trial)], say=within(say, "finetune"))
    if failures := failures_of([result]):
        failed += failures
        return models
    models[f"{name}/all"] = str(publish_on_all(setup, result, backbone, storage)["url"])
    say(f"finetune | model of {name} by all labelled patients: {models[f'{name}/all']}")
    return models


def _choose_licence(config: PublishConfig, of_corpora: Sequence[str]) -> str:
    corpus_licence = " AND ".join(sorted(set(of_corpora)))
    if config.licence is None or config.licence == corpus_licence:
        return corpus_licence
    if any(word in corpus_licence.upper() for word in ("NC", "SA", "ND")):
        raise JobError(
            f"publish.licence is {config.licence!r}, but the corpus is under {corpus_licence!r}, which forbids other terms: leave it out"
        )
    return config.licence


def _write_card(
    job: Job, config: PublishConfig, corpora: Sequence[Corpus], url: str, licence: str, *, step: int
) -> str:
    assert job.pretrain is not None
    model, loss, image = job.pretrain.model, job.pretrain.loss, job.pretrain.image
    batch = job.pretrain.global_batch
    pixel, scan = ("pixel", "slice") if image.dimensions == 2 else ("voxel", "scan")
    block = "" if model.level == 0 else f"{' x '.join([str(model.stride)] * image.dimensions)} "
    facts = {
        "method": f"{loss.name} over {loss.pixel_pairs_per_image * batch} pixel pairs a step, {step} steps of {batch} images",
        "negatives": job.pretrain.negatives,
        "network": _describe_network(job.pretrain),
        "input": f"one contrast, {' x '.join([str(image.size)] * image.dimensions)} {pixel}s of {image.spacing_mm:g} mm; intensities "
        "as in config.json",
        **{
            f"corpus{f' {number}' if len(corpora) > 1 else ''}": f"{corpus.manifest['num_subjects']} subjects, "
            f"{describe_records(corpus.manifest)}, {corpus.manifest['num_samples']} planes; sha256 {manifest_sha256(corpus.manifest)}"
            for number, corpus in enumerate(corpora, start=1)
        },
        "licence": licence,
    }
    rows = "\n".join(f"| {name} | {for_markdown(value)} |" for name, value in facts.items())
    sources = "\n\n".join(for_markdown(corpus.manifest["provenance"]) for corpus in corpora)
    return f"""# {config.name} {config.version}

A backbone that gives {model.feature_channels} features for every {block}{pixel}{"s" * bool(block)} of an MRI {scan}, pretrained without
labels by p2r.
{for_markdown(config.description)}

    import p2r
    backbone = p2r.load_backbone({json.dumps(url)})
    features = backbone(backbone.prepare("scan.nii.gz").images)

| | |
|---|---|
{rows}

{sources}

Not a medical device. Its results depend on the test patients: see the report of the job that made this backbone.
"""
