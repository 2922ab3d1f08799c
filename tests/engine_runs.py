"""Pretraining runs of tests, and their losses by step."""

import json

import torch

from p2r.config import PretrainConfig
from p2r.engine.pretrain import pretrain
from p2r.engine.report import PretrainReport
from p2r.job import Job
from p2r.storage import Storage


def train(
    job: Job, storage: Storage, corpus: Storage, *, most: int | None = None, seconds: float | None = None
) -> list[PretrainReport]:
    """Run the pretraining of a job on the CPU; with `most`, stop after this number of reports."""
    assert job.pretrain is not None
    return train_config(job.pretrain, storage, corpus, most=most, seconds=seconds)


def train_config(
    config: PretrainConfig, storage: Storage, corpus: Storage, *, most: int | None = None, seconds: float | None = None
) -> list[PretrainReport]:
    """Pretrain as `train` does, by a section of a job."""
    reports = []
    run = pretrain(config, storage=storage, corpus=corpus, device=torch.device("cpu"), max_seconds=seconds)
    for report in run:
        reports.append(report)
        if len(reports) == most:
            run.close()
            break
    return reports


def losses(storage: Storage) -> dict[int, float]:
    """Return the losses in a history."""
    rows = [json.loads(line) for line in storage.read_bytes("history.jsonl").decode().splitlines()]
    return {row["step"]: row["loss"] for row in rows}
