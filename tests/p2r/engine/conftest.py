"""Fixtures of pretraining: the toy job, and a corpus of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from p2r.data.corpus import ingest_locally
from p2r.job import Job, read_job
from p2r.storage import Storage

JobOf = Callable[..., Job]


@pytest.fixture(scope="module")
def job_of(write_toy_job: Callable[..., Path]) -> JobOf:
    """A function that gives the toy job, whose storage is a folder, with overrides."""
    return lambda folder, *overrides: read_job(write_toy_job(folder), overrides)


@pytest.fixture(scope="module")
def corpus(job_of: JobOf, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    job = job_of(tmp_path_factory.mktemp("job"))
    storage = Storage(str(tmp_path_factory.mktemp("corpus")))
    assert job.ingest is not None
    for _ in ingest_locally(job.ingest.model_copy(update={"subjects_of": None}), storage):
        pass
    return storage
