"""Stages of a job: ingest -> pretrain -> publish -> fine-tune -> report.

An `Executor` does the heavy parts (reading scans, training, trials): a plain loop in `p2r.__main__`, Ray in `cluster`.
Everything else is implemented here, once. Each stage continues from what earlier calls stored, so a killed job is resumed
by running it again.
"""

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from p2r.config import IngestConfig
from p2r.data.corpus import check_selection, load_manifest, subjects_found, was_asked
from p2r.data.manifest import describe_records
from p2r.engine.checkpoint import newest_checkpoint
from p2r.engine.pretrain import finished_checkpoint
from p2r.engine.report import HISTORY
from p2r.errors import DataError, JobError, OutOfTime
from p2r.evaluate.tasks import HELD_OUT, load_task
from p2r.fewshot.checks import check_contrasts, check_data, check_subsets
from p2r.fewshot.setup import preparation_for
from p2r.job import Job
from p2r.logs import Say
from p2r.pipeline.executor import Executor
from p2r.pipeline.finetuning import finetune
from p2r.pipeline.finished import digest_inputs, record_finished
from p2r.pipeline.imported import check_initial_weights
from p2r.pipeline.outputs import Outputs
from p2r.pipeline.publishing import describe_network, preparation_of_backbone, publish_backbone
from p2r.pipeline.tracking import tracked
from p2r.pipeline.variants import run_variants
from p2r.report import corpus_report_is_current, write_corpus_report
from p2r.stages import KINDS
from p2r.storage import Storage


def run_job(job: Job, executor: Executor, *, say: Say) -> Outputs:
    """Run the stages of a job's kind, and return their outputs.

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


def _run_stages(job: Job, storage: Storage, executor: Executor, say: Say) -> Outputs:
    made = Outputs(storage.url)
    stages = KINDS[job.kind].stages
    inputs = digest_inputs(job)
    if "finetune" in stages or "variants" in stages:
        if "ingest" in stages:
            _check_selection(job, storage)
        _check_tasks(job, storage, say)
    if job.ingest is not None and ("ingest" in stages or "pretrain" in stages):  # a fork uses an existing corpus
        made = replace(made, corpus=_ingest(job, storage, executor, say))
    if "variants" in stages:
        return run_variants(job, made, executor, say)
    made = _train_and_score(job, made, executor, stages, say)
    record_finished(job, storage, made, inputs=inputs)
    return made


def _train_and_score(job: Job, made: Outputs, executor: Executor, stages: Sequence[str], say: Say) -> Outputs:
    """Run the stages after ingest; return their outputs with those of ingest."""
    storage = Storage(job.storage)
    if "pretrain" in stages:
        made = replace(made, checkpoint=_pretrain(job, storage, executor, say))
        if made.checkpoint is None:
            return replace(made, unfinished="pretrain")
    if "publish" in stages:
        published = publish_backbone(job, storage, say)
        made = replace(made, backbone=published.url, backbone_pin=published.pin)
    if "finetune" in stages:
        try:
            return finetune(job, made, storage, executor, say)
        except OutOfTime as error:
            say(str(error))
            return replace(made, unfinished="finetune")
    return made


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
    of_backbone = preparation_of_backbone(image, slice_axis, contrasts=job.pretrain.model.contrasts)
    for task in tasks:
        say(f"checking {len(task.scans)} scans of task {task.name}")
        check_data(task, config, preparation_for(task.config, config, of_backbone))


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
            f"ingest | {describe_records(facts)} of {facts.num_subjects} subjects, {facts.num_samples} planes in "
            f"{len(facts.shards)} shards | revision {facts.revision} | ledger: {counts} | {corpus.url}"
        )
    if not corpus_report_is_current(corpus):
        say(f"ingest | report: {write_corpus_report(corpus, say=lambda line: say(f'ingest | {line}'))}")
    return corpus.url


def _pretrain(job: Job, storage: Storage, executor: Executor, say: Say) -> str | None:
    assert job.pretrain is not None
    where = storage.child("pretrain")
    say(f"pretrain | {describe_network(job.pretrain)}")
    if newest_checkpoint(where) is None:
        check_initial_weights(job.pretrain, say)
    if not executor.pretrain(job.pretrain, storage=where, corpus=storage.child("corpus"), say=say):
        return None
    checkpoint = finished_checkpoint(where, job.pretrain)
    say(f"pretrain | done at step {checkpoint.step} | {where.at(checkpoint.path)}")
    return where.at(checkpoint.path)
