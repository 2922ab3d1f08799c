"""An ablation: one job, several variants on one corpus, side by side, and no test patient read."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from p2r.errors import JobError
from p2r.fewshot.protocol import Trial
from p2r.fewshot.results import TrialResult, failed_result
from p2r.fewshot.search import failure_message
from p2r.fewshot.setup import TrialSetup
from p2r.job import Job, read_job, variants_of
from p2r.logs import Say
from p2r.pipeline.local import LocalExecutor
from p2r.pipeline.stages import run_job
from p2r.storage import Storage

VARIANTS = "variants={few: {pretrain.loss.pixel_pairs_per_image: 4}, many: {pretrain.loss.pixel_pairs_per_image: 32}}"
ABLATION = ("kind=ablation", "finetune.score_on=validation", "finetune.modes=[linear_probe]")


@pytest.fixture
def ablation(write_toy_job: Callable[..., Path], tmp_path: Path) -> Callable[..., Job]:
    path = write_toy_job(tmp_path)
    return lambda *overrides: read_job(path, (*ABLATION, *overrides))


def test_variants_differ_in_what_they_name_and_share_the_corpus(ablation: Callable[..., Job]) -> None:
    job = ablation(VARIANTS)
    few, many = variants_of(job).values()
    assert few.pretrain is not None and many.pretrain is not None
    assert (few.pretrain.loss.pixel_pairs_per_image, many.pretrain.loss.pixel_pairs_per_image) == (4, 32)
    assert few.pretrain.corpus == many.pretrain.corpus == f"{job.storage}/corpus"
    assert few.storage == f"{job.storage}/variants/few"
    same = {"pretrain", "storage"}
    assert few.model_dump(exclude=same) == many.model_dump(exclude=same)


class OneFails(LocalExecutor):
    """A trial of one variant ends without a result."""

    def run_trials(self, trials: Sequence[tuple[TrialSetup, Trial]], *, say: Say) -> list[TrialResult]:
        results = super().run_trials(trials, say=say)
        is_bad = [trial.num_labelled == 3 and "/variants/many/" in setup.storage for setup, trial in trials]
        return [
            failed_result(trial, "the loss is nan | at step 3") if bad else result
            for (_, trial), result, bad in zip(trials, results, is_bad, strict=True)
        ]


def test_variants_are_run_and_put_side_by_side(ablation: Callable[..., Job]) -> None:
    job = ablation(VARIANTS, "finetune.steps=4", "trackers=[tensorboard]")
    lines: list[str] = []
    made = run_job(job, OneFails(torch.device("cpu"), None), say=lines.append)
    storage = Storage(job.storage)
    report = storage.read_json("report/report.json")
    assert [row["variant"] for row in report["rows"]] == ["few", "few", "many"]
    assert {row["split"] for row in report["rows"]} == {"validation"}
    assert len({row["backbone_sha256"] for row in report["rows"]}) == 2
    page = storage.read_bytes("report/report.md").decode()
    assert "Dice on validation patients" in page
    (failure,) = report["failed"]
    assert failure == {"trial": "many: disc-final-linear_probe-n3-d0", "reason": "the loss is nan | at step 3"}
    assert "1 trial failed" in page
    assert r"| many: disc-final-linear_probe-n3-d0 | the loss is nan \| at step 3 |" in page
    assert "| few | `pretrain.loss.pixel_pairs_per_image: 4` | [report](../variants/few/report/report.md) |" in page
    assert storage.exists("variants/few/report/report.md")
    (difference,) = report["differences"]  # with three patients, `many` has no result
    of = {row["variant"]: row["dice_by_subject"] for row in report["rows"] if row["num_labelled"] == 1}
    expected = np.mean([of["many"][name] - of["few"][name] for name in of["few"]])
    assert (difference["backbone"], difference["against_backbone"], difference["num_labelled"]) == ("many", "few", 1)
    assert difference["difference"] == pytest.approx(expected)
    assert "| variant | task | labelled patients | mode | minus few [95 %] | draws of its sign | p (Holm) |" in page
    assert storage.read_bytes("report/pictures/variants.png").startswith(b"\x89PNG")
    picture = " ".join(" ".join(ET.fromstring(storage.read_bytes("report/pictures/variants.svg")).itertext()).split())
    of_rows = [f"code {report['rows'][0]['code']}", *(row["backbone_sha256"][:12] for row in report["rows"])]
    for fact in ("variant", "task disc", "leak_free, validation patients", "n = 1, 3", "1 draw", "seed 0", *of_rows):
        assert fact in picture, fact
    assert made.report == storage.at("report/report.md") and made.failed
    curves = {path.rpartition("/")[0] for path in storage.list() if b"pretrain/loss" in storage.read_bytes(path)}
    assert curves == {"tensorboard/few", "tensorboard/many"}
    trials = [storage.read_json(path) for path in storage.list() if "/trials/" in path and path.endswith(".json")]
    assert trials
    assert "sub-07" not in json.dumps(trials) and "sub-08" not in json.dumps(trials)  # the test subjects

    lines.clear()
    run_job(job, LocalExecutor(torch.device("cpu"), None), say=lines.append)
    assert "failed" not in storage.read_json("report/report.json")
    assert "failed" not in storage.read_bytes("report/report.md").decode()
    assert not [line for line in lines if "| step " in line], lines


class Together(LocalExecutor):
    """Runs the trials of all variants as one pool, as Ray does."""

    runs_variants_together = True


def test_variants_of_fine_tuning_share_a_published_backbone_and_a_lost_one_is_named(
    ablation: Callable[..., Job], published: dict[str, str], tmp_path: Path
) -> None:
    given = (f"finetune.backbone={published['backbone']}", "ingest=null", "pretrain=null", "publish=null")
    variants = "variants={short: {finetune.steps: 1}, long: {finetune.steps: 2}}"
    job = ablation(variants, "finetune.num_labelled=[1]", *given)
    run_job(job, LocalExecutor(torch.device("cpu"), None), say=lambda line: None)
    rows = Storage(job.storage).read_json("report/report.json")["rows"]
    assert [(row["variant"], row["settings"]["steps"]) for row in rows] == [("short", 1), ("long", 2)]
    assert len({row["backbone_sha256"] for row in rows}) == 1

    lost = "lost: {finetune.backbone: file:///nowhere/backbones/lost/1}"
    variants = f"{variants[:-1]}, {lost}}}"
    job = ablation(variants, "finetune.num_labelled=[1]", *given, f"storage={tmp_path}/together")
    lines: list[str] = []
    made = run_job(job, Together(torch.device("cpu"), None), say=lines.append)
    assert [one.trial for one in made.failed] == ["variant lost"]
    assert "1 variant failed" in failure_message(made.failed) and "/nowhere/" in failure_message(made.failed)
    assert any("long | disc | linear_probe | the only candidate" in line for line in lines), "the trials are one pool"
    pooled = Storage(job.storage).read_json("report/report.json")["rows"]
    for row in (*rows, *pooled):
        row.pop("seconds")
    assert pooled == rows, "the same table as one variant after another gives"
    page = Storage(job.storage).read_bytes("report/report.md").decode()
    assert "| lost | `finetune.backbone: file:///nowhere/backbones/lost/1` | none |" in page
    assert "| variant lost | " in page and "1 variant failed; the results are without" in page


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "kind ablation needs variants"),
        (("kind=pipeline", VARIANTS), "no other kind has them"),
        ((VARIANTS, "finetune.score_on=test"), "proves nothing"),
        (("variants={a: {pretrain.loss.pixel_pairs: 4}}",), r"variants.a.*pixel_pairs: unknown key; did you mean"),
        (("variants={a: {pretrain.nothing.deep: 4}}",), "variants.a: pretrain.nothing.deep is not a key"),
        (("variants={a: {finetune: null}}",), "variants.a: finetune is not a key of a section"),
        (("variants={a: {finetune.score_on: test}}",), "variants.a: .*proves nothing"),
        (("variants={a: {pretrain.steps: none}}",), r"variants.a is not valid:\n  pretrain.steps"),
    ],
)
def test_an_ablation_that_makes_no_sense_is_refused(
    ablation: Callable[..., Job], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(JobError, match=f"(?s){message}"):
        ablation(*overrides)
