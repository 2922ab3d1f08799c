"""What tests of training share: the toy job, and a corpus of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import p2r
from p2r.config import FinetuneConfig
from p2r.data.corpus import ingest_locally
from p2r.engine.fewshot import check_task
from p2r.engine.finetune import TrialSetup
from p2r.evaluate.tasks import load_task
from p2r.job import Job, read_job
from p2r.modes import MODES
from p2r.storage import Storage

JobOf = Callable[..., Job]
Make = Callable[..., TrialSetup]


@pytest.fixture(scope="module")
def job_of(write_toy_job: Callable[..., Path]) -> JobOf:
    """A function that gives the toy job, whose storage is a folder, with overrides."""
    return lambda folder, *overrides: read_job(write_toy_job(folder), overrides)


@pytest.fixture(scope="module")
def corpus(job_of: JobOf, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    job = job_of(tmp_path_factory.mktemp("job"))
    storage = Storage(str(tmp_path_factory.mktemp("corpus")))
    for _ in ingest_locally(job.ingest.model_copy(update={"subjects_of": None}), storage):
        pass
    return storage


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(own_cache: None, published: dict[str, str], toy_data: Path, tmp_path: Path) -> Make:
    """A function that makes the setup of the toy task, checked, with two steps of two images unless told otherwise."""

    def make(*, data: Path = toy_data, storage: str = "storage", **values: Any) -> TrialSetup:
        rates = {mode: [1e-2] for mode, facts in MODES.items() if "steps" in facts.settings}
        given = {"modes": ["scratch"], "num_labelled": [1], "draws": 1, "steps": 2, "batch_size": 2, **values}
        given["search"] = {"learning_rates": rates, **given.get("search", {})}
        backbone = p2r.load_backbone(published["backbone"])
        root = Storage(str(tmp_path / storage))
        setup = TrialSetup(
            config=FinetuneConfig.model_validate({"tasks": ["task.yaml"], **given}),
            task=str(data / "task.yaml"),
            backbone=published["backbone"],
            backbone_sha256=backbone.manifest["sha256"],
            architecture_sha256=backbone.config.sha256(),
            storage=root.at("finetune/disc"),
            root=root.url,
        )
        return check_task(load_task(data / "task.yaml"), backbone, setup)

    return make


@pytest.fixture
def copy(toy_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_data, tmp_path / "copy"))
