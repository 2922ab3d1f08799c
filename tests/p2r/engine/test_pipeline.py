"""The whole pipeline with everything it makes in a bucket of a real S3 server."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import p2r
from p2r.engine.__main__ import LocalExecutor
from p2r.engine.pipeline import run_job
from p2r.job import read_job
from p2r.storage import Storage


@pytest.mark.s3
def test_a_bucket_holds_everything_that_a_job_makes(
    write_toy_job: Callable[..., Path], s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    overrides = (f"storage={s3_url}/toy", "finetune.num_labelled=[1]", "finetune.steps=4", "pretrain.steps=4")
    job = read_job(write_toy_job(tmp_path), overrides)
    made = run_job(job, LocalExecutor(torch.device("cpu"), None), say=lambda line: None)
    assert made["report"] == f"{s3_url}/toy/report/report.md"
    storage = Storage(job.storage)
    assert storage.read_json("report/report.json")["rows"]
    assert storage.exists("report/pictures/few-shot-disc.png")
    assert p2r.load_backbone(made["backbone"])(torch.rand(1, 1, 32, 32)).shape == (1, 4, 32, 32)

    lines: list[str] = []
    run_job(job, LocalExecutor(torch.device("cpu"), None), say=lines.append)
    assert f"ingest | {s3_url}/toy/corpus is complete" in lines
    assert not [line for line in lines if "| step " in line], lines
