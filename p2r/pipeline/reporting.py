"""Last stage of a job: writes report.json, report.md and the page from the rows of results, the backbone and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from p2r.artefact import BackboneManifest, open_artefact
from p2r.backbone import Backbone
from p2r.evaluate.rows import TrialRow
from p2r.evaluate.statistics import few_shot_statistics
from p2r.evaluate.tasks import Task, load_task
from p2r.fewshot.results import FailedTrial
from p2r.fewshot.setup import TrialSetup
from p2r.job import Job
from p2r.pipeline.report_pictures import draw_pictures
from p2r.published.results import add_results, results_from
from p2r.reference import parse_reference
from p2r.report import label_of, markdown_variants, source_line, split_of, variants_picture, write_report
from p2r.report.context import context_of
from p2r.report.text import for_markdown, for_markdown_code
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


def write_variants(job: Job, storage: Storage, rows: Sequence[TrialRow], *, failed: Sequence[FailedTrial] = ()) -> str:
    """Write the comparison of an ablation's variants to `<storage>/report`, and return the URL of the page.

    Args:
        job: The ablation.
        storage: Storage of the ablation.
        rows: Rows of all variants' final trials, each with its `variant`.
        failed: Trials without a result, with reasons.
    """
    where = storage.child("report")
    # Two variants share their draws, so the variant replaces the backbone's name.
    source = source_line([row.replaced(backbone=row.variant) for row in rows], None)
    picture = variants_picture(rows, title=f"{job.name}: Dice of each variant", source=source)
    where.write_bytes("pictures/variants.png", picture.png)
    where.write_bytes("pictures/variants.svg", picture.svg)
    facts: dict[str, object] = {
        "job": job.name,
        "variants": job.variants,
        "seed": job.finetune.seed if job.finetune else None,
    }
    if failed:
        facts["failed"] = [one.to_json() for one in failed]
    where.write_json("report.json", {"format": "p2r-ablation/1", **facts, "rows": [row.to_json() for row in rows]})
    lines = [
        f"# {for_markdown(job.name)}",
        "",
        f"Dice on {split_of(rows)} patients, mean ± standard deviation over draws{label_of(rows)}.",
        "",
    ]
    if failed:
        lines += [f"> **Note.** {len(failed)} trial{'s' * (len(failed) > 1)} failed; the results are without.", ""]
    lines += markdown_variants(rows)
    lines += ["", "![Dice of each variant](pictures/variants.png)", ""]
    lines += ["| variant | changes | report |", "| --- | --- | --- |"]
    for name, changes in job.variants.items():
        settings = ", ".join(for_markdown_code(f"{key}: {value}") for key, value in changes.items())
        lines.append(f"| {for_markdown(name)} | {settings} | [report](../variants/{name}/report/report.md) |")
    if failed:
        lines += ["", "| failed trial | reason |", "| --- | --- |"]
        lines += [f"| {for_markdown(one.trial)} | {for_markdown(one.reason)} |" for one in failed]
    where.write_bytes("report.md", ("\n".join(lines) + "\n").encode())
    return where.at("report.md")


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
                "splits": {split: list(subjects) for split, subjects in task.subjects.items()},
            }
            for task in tasks
        },
    }


def _warnings(rows: Sequence[TrialRow]) -> list[str]:
    """Return warnings of single trials, which did not end them."""
    return [f"{row.id}: {warning}." for row in rows for warning in row.all_warnings]
