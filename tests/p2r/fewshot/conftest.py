"""Fixtures of few-shot trials: the setup of the toy task, and a copy of its data."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import p2r
from p2r.config import FinetuneConfig
from p2r.evaluate.tasks import load_task
from p2r.fewshot.checks import check_task
from p2r.fewshot.setup import TrialSetup
from p2r.modes import MODES
from p2r.storage import Storage

Make = Callable[..., TrialSetup]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(own_cache: None, published: dict[str, str], toy_data: Path, tmp_path: Path) -> Make:
    """Return a function that makes a checked setup of the toy task; by default two steps of two images."""

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
