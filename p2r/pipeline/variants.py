"""Variants of an ablation: pretrained, published, scored and compared.

    variants -> pretrainings -> backbones -> trials of all variants -> one report each -> comparison

An executor decides how many pretrainings run at a time. If it runs variants together, all trials form one pool, too. A variant that
fails is named in the comparison, and the others are finished.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from p2r.engine.checkpoint import newest_checkpoint
from p2r.errors import InputError, OutOfTime, P2RError, error_text
from p2r.evaluate.rows import TrialRow
from p2r.fewshot.results import FailedTrial, FewShot, failures_text
from p2r.fewshot.search import few_shot_together
from p2r.fewshot.stored import read_report_rows
from p2r.job import Job, variants_of
from p2r.logs import Say, within
from p2r.pipeline.executor import Executor, VariantOutcome, VariantRun
from p2r.pipeline.finetuning import Prepared, finish_trials, prepare_trials
from p2r.pipeline.imported import check_initial_weights
from p2r.pipeline.lines import say_for_variant
from p2r.pipeline.outputs import Outputs
from p2r.pipeline.publishing import describe_network, publish_backbone
from p2r.report import (
    differences_of_variants,
    label_of,
    markdown_differences,
    markdown_variants,
    source_line,
    split_of,
    variants_picture,
    variants_table,
)
from p2r.report.text import for_markdown, for_markdown_code
from p2r.storage import Storage


@dataclass
class _Found:
    """Results of the variants so far."""

    rows: dict[str, list[TrialRow]] = field(default_factory=dict)
    failed: list[FailedTrial] = field(default_factory=list)
    errors: dict[str, P2RError] = field(default_factory=dict)
    """Variants without results, and the reasons."""
    stopped: dict[str, str] = field(default_factory=dict)
    """Variants that fell behind, and their last states."""
    unfinished: list[str] = field(default_factory=list)

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Record an error of a variant, so that the others continue."""
        try:
            yield
        except OutOfTime:
            raise
        except P2RError as error:
            self.errors[name] = error


def run_variants(job: Job, made: Outputs, executor: Executor, say: Say) -> Outputs:
    """Run the variants of an ablation, and write a comparison of their results.

    Args:
        job: The ablation.
        made: Its corpus.
        executor: Runs the heavy parts.
        say: Receives lines of progress.

    Raises:
        P2RError: No variant has a result; the error of the first.
    """
    variants = variants_of(job)
    for name in variants:
        say(f"variant {name} | " + ", ".join(f"{key}: {value}" for key, value in job.variants[name].items()))
    groups = [variants] if executor.runs_variants_together else [{name: one} for name, one in variants.items()]
    found = _Found()
    for group in groups:
        _run_group(job, group, found, executor, say)
        if found.unfinished:
            return replace(made, unfinished=f"variant {', '.join(found.unfinished)}")
    if not found.rows and found.errors:
        raise next(iter(found.errors.values()))
    rows = [row for name in variants for row in found.rows.get(name, ())]
    failed = [
        *(FailedTrial(trial=f"variant {name}", reason=error_text(error)) for name, error in found.errors.items()),
        *found.failed,
    ]
    report = _write_comparison(job, Storage(job.storage), rows, failed=failed, stopped=found.stopped)
    return replace(made, report=report, table=variants_table(rows, stopped=found.stopped), failed=tuple(failed))


def _run_group(job: Job, variants: Mapping[str, Job], found: _Found, executor: Executor, say: Say) -> None:
    """Run all stages of some variants, and add their results to `found`."""
    trained = _pretrain(job, variants, found, executor, say)
    prepared: dict[str, Prepared] = {}
    for name in trained:
        variant, say_one = variants[name], say_for_variant(say, name, len(variants))
        with found.naming(name):
            if variant.pretrain is not None:
                publish_backbone(variant, Storage(variant.storage), say_one)
            prepared[name] = prepare_trials(variant, Storage(variant.storage), say_one)
    try:
        results = _run_trials(job, prepared, found, executor, say)
        for name, result in results.items():
            with found.naming(name):
                storage, say_one = Storage(variants[name].storage), say_for_variant(say, name, len(variants))
                made = finish_trials(
                    variants[name], Outputs(storage.url), storage, prepared[name], result, executor, say_one
                )
                rows = read_report_rows(storage, "report/report.json")
                found.rows[name] = [row.replaced(variant=name) for row in rows]
                found.failed += [FailedTrial(trial=f"{name}: {one.trial}", reason=one.reason) for one in made.failed]
    except OutOfTime as error:
        say(str(error))
        found.unfinished += [name for name in prepared if name not in found.rows]


def _pretrain(job: Job, variants: Mapping[str, Job], found: _Found, executor: Executor, say: Say) -> list[str]:
    """Pretrain variants, and return the names of those that are ready for trials."""
    runs: dict[str, VariantRun] = {}
    for name, variant in variants.items():
        if variant.pretrain is None:
            continue
        storage = Storage(variant.storage)
        where, say_one = storage.child("pretrain"), say_for_variant(say, name, len(variants))
        with found.naming(name):
            say_one(f"pretrain | {describe_network(variant.pretrain)}")
            if newest_checkpoint(where) is None:
                check_initial_weights(variant.pretrain, say_one)
            # A corpus that the variant names takes precedence over this one.
            runs[name] = VariantRun(config=variant.pretrain, storage=where, corpus=storage.child("corpus"))
    outcomes = executor.pretrain_variants(runs, asha=job.asha, say=say) if runs else {}
    for name, outcome in outcomes.items():
        _record_outcome(name, outcome, found, say_for_variant(say, name, len(variants)))
    return [
        name
        for name, variant in variants.items()
        if name not in found.errors and (variant.pretrain is None or outcomes[name].is_done)
    ]


def _record_outcome(name: str, outcome: VariantOutcome, found: _Found, say: Say) -> None:
    if outcome.error is not None:
        found.errors[name] = outcome.error
        say(f"FAILED: {error_text(outcome.error)}")
    elif outcome.stopped is not None:
        found.stopped[name] = outcome.stopped.text()
        say(f"pretrain | {outcome.stopped.text()}: it fell behind the other variants (asha)")
    elif not outcome.is_done:
        found.unfinished.append(name)


def _run_trials(
    job: Job, prepared: Mapping[str, Prepared], found: _Found, executor: Executor, say: Say
) -> dict[str, FewShot]:
    """Run the trials of all variants as one pool; if one has unusable input, run them by variant to find which."""
    groups = {name: one.setups for name, one in prepared.items()}
    storage = Storage(job.storage)
    if len(groups) > 1:
        try:
            return few_shot_together(groups, runner=executor, storage=storage, say=within(say, "finetune"))
        except InputError as error:
            say(f"finetune | {error_text(error)}; running the trials of one variant after another")
    results: dict[str, FewShot] = {}
    for name, setups in groups.items():
        with found.naming(name):
            results |= few_shot_together(
                {name: setups}, runner=executor, storage=Storage(setups[0].root), say=within(say, "finetune")
            )
    return results


def _write_comparison(
    job: Job,
    storage: Storage,
    rows: Sequence[TrialRow],
    *,
    failed: Sequence[FailedTrial],
    stopped: Mapping[str, str],
) -> str:
    """Write the comparison to `<storage>/report`, and return the URL of the page."""
    where = storage.child("report")
    # Two variants share their draws, so the variant replaces the backbone's name.
    source = source_line([row.replaced(backbone=row.variant) for row in rows], None)
    picture = variants_picture(rows, title=f"{job.name}: Dice of each variant", source=source)
    where.write_bytes("pictures/variants.png", picture.png)
    where.write_bytes("pictures/variants.svg", picture.svg)
    seed = job.finetune.seed if job.finetune else None
    facts: dict[str, object] = {"job": job.name, "variants": job.variants, "seed": seed}
    differences = differences_of_variants(rows, seed=seed or 0)
    if differences:
        facts["differences"] = [one.to_json() for one in differences]
    if failed:
        facts["failed"] = [one.to_json() for one in failed]
    if stopped:
        facts["stopped"] = dict(stopped)
    where.write_json("report.json", {"format": "p2r-ablation/1", **facts, "rows": [row.to_json() for row in rows]})
    lines = [
        f"# {for_markdown(job.name)}",
        "",
        f"Dice on {split_of(rows)} patients, mean ± standard deviation over draws{label_of(rows)}.",
        "",
    ]
    if failed:
        lines += [f"> **Note.** {failures_text(failed)} failed; the results are without.", ""]
    lines += markdown_variants(rows, stopped=stopped)
    lines += ["", "![Dice of each variant](pictures/variants.png)", ""]
    lines += markdown_differences(differences)
    lines += ["| variant | changes | report |", "| --- | --- | --- |"]
    with_report = {row.variant for row in rows}
    for name, changes in job.variants.items():
        settings = ", ".join(for_markdown_code(f"{key}: {value}") for key, value in changes.items())
        report = f"[report](../variants/{name}/report/report.md)" if name in with_report else "none"
        lines.append(f"| {for_markdown(name)} | {settings} | {report} |")
    if failed:
        lines += ["", "| failed | reason |", "| --- | --- |"]
        lines += [f"| {for_markdown(one.trial)} | {for_markdown(one.reason)} |" for one in failed]
    where.write_bytes("report.md", ("\n".join(lines) + "\n").encode())
    return where.at("report.md")
