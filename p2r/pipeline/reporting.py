"""Last stage of a job: writes report.json, report.md and the page from the rows of results, the backbone and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from p2r.artefact import BackboneManifest, open_artefact
from p2r.backbone import Backbone
from p2r.evaluate.rows import TrialRow
from p2r.evaluate.splits import join_few
from p2r.evaluate.statistics import few_shot_statistics
from p2r.evaluate.tasks import Task, load_task
from p2r.fewshot.setup import TrialSetup
from p2r.job import Job
from p2r.pipeline.report_pictures import draw_pictures
from p2r.published.results import add_results, results_from
from p2r.reference import parse_reference
from p2r.report import write_report
from p2r.report.context import context_of
from p2r.storage import Storage
from p2r.version import code_version

_CORPUS_KEYS = {"url", "sha256", "weight", "licence", "provenance", "num_samples", "num_subjects"}


def make_report(
    job: Job,
    storage: Storage,
    *,
    backbone: Backbone,
    setups: Sequence[TrialSetup],
    rows: Sequence[TrialRow],
    models: dict[str, str],
    facts: Mapping[str, object],
) -> Storage:
    """Write the report to `<storage>/report`, and return this folder.

    Args:
        job: The job.
        storage: Storage of the job.
        backbone: Backbone of the trials.
        setups: One for each task.
        rows: Rows of all finished final trials.
        models: URL of each task's published model.
        facts: Facts that rows do not contain. Lists of mappings: `searched` (trials of the search), `chosen` (winners), `failed`
            (trial and reason), `test_reads` (evaluations of test patients). A mapping: `overhead`.
    """
    tasks = [load_task(Path(setup.task)) for setup in setups]
    where = storage.child("report")
    code = code_version()
    pictures = draw_pictures(job, storage, backbone, setups, tasks, rows, models, code=code)
    context = context_of(
        {
            **_report_context(job, backbone, tasks, models, code),
            **facts,
            "caveats": [*(task.config.caveat for task in tasks if task.config.caveat), *_warnings(rows)],
            "captions": pictures.captions,
            "places": pictures.places,
            **({"left_out": pictures.left_out} if pictures.left_out else {}),
        }
    )
    assert job.finetune is not None
    statistics = few_shot_statistics(rows, seed=job.finetune.seed) if rows else None
    write_report(where, rows=list(rows), context=context, pictures=pictures.drawn, statistics=statistics)
    if statistics is not None and backbone.manifest.url.startswith(storage.at("backbones/")):
        # Backbones of other storages get them by `p2r promote --report`.
        artefact = open_artefact(parse_reference(backbone.manifest.pin), is_fresh=True)
        add_results(artefact, results_from(statistics, report=where.at("report.json")))
    return where


def _report_context(
    job: Job, backbone: Backbone, tasks: Sequence[Task], models: dict[str, str], code: str
) -> dict[str, object]:
    assert job.finetune is not None
    published = backbone.manifest
    facts, corpora = published.facts, published.facts.corpora or []
    assert isinstance(facts, BackboneManifest)
    return {
        "title": f"Few-shot report of {job.name}",
        "job": job.name,
        "backbone": {
            "url": published.url,
            "sha256": published.sha256,
            "pin": published.pin,
            "step": facts.step,
            "negatives": facts.negatives,
            "code": facts.code,
        },
        **{
            "corpus" if len(corpora) == 1 else f"corpus {number}": corpus.model_dump(include=_CORPUS_KEYS)
            for number, corpus in enumerate(corpora, start=1)
        },
        "initial_weights": facts.initial_weights,
        "licence": facts.licence,
        "code": code,
        "seed": job.finetune.seed,
        "finetune": job.finetune.model_dump(mode="json", exclude={"tasks", "backbone"}),
        "models": models,
        "tasks": {
            task.name: {
                "title": task.config.title,
                "licence": task.config.licence,
                "citation": task.config.citation,
                "thirds": list(task.config.thirds),
                "classes": list(task.config.classes.values()),
                "splits": _list_splits(task),
            }
            for task in tasks
        },
    }


def _list_splits(task: Task) -> dict[str, list[str]]:
    """Return the subjects of each split, and of the scans without a label map that the task uses."""
    splits = {split: list(subjects) for split, subjects in task.subjects.items()}
    unlabelled = sorted({scan.subject for scan in task.unlabelled})
    return {**splits, "without label maps": unlabelled} if unlabelled else splits


def _warnings(rows: Sequence[TrialRow]) -> list[str]:
    """Return warnings that did not end a trial, each once, with the trials that it concerns."""
    trials: dict[str, list[str]] = {}
    for row in rows:
        for warning in row.all_warnings:
            trials.setdefault(warning, []).append(row.id)
    return [f"{join_few(names)}: {warning}." for warning, names in trials.items()]
