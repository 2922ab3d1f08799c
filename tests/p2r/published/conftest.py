"""Toy backbones with metrics and results, published as versions of one name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from p2r.artefact import Artefact, open_artefact
from p2r.backbone import BACKBONE_FORMAT, ArtefactConfig, publish
from p2r.model.backbones import build_backbone
from p2r.published.metrics import TrainingMetrics
from p2r.published.results import Result, add_results
from p2r.reference import parse_reference
from p2r.storage import Storage, json_bytes
from tests.publishing import MODEL, PREPARATION

HEALTHY = {"effective_rank": 5.0, "dead_dimensions_fraction": 0.0}


def result(
    mean: float, *, half: float = 0.05, task: str = "disc", num_labelled: int = 1, transductive: bool = False
) -> Result:
    return Result(
        task=task,
        protocol="leak_free",
        split="test",
        transductive=transductive,
        mode="linear_probe",
        num_labelled=num_labelled,
        draws=3,
        patients=5,
        mean=mean,
        lower=max(0.0, mean - half),
        upper=min(1.0, mean + half),
    )


def publish_version(
    url: str,
    *,
    seed: int = 0,
    health: dict[str, float] | None = HEALTHY,
    dice: float | None = None,
    **facts: Any,
) -> Artefact:
    """Publish a tiny backbone, with the health of its training and the Dice of a job that fine-tuned it."""
    torch.manual_seed(seed)
    made = publish(
        Storage(url),
        format=BACKBONE_FORMAT,
        weights=build_backbone(MODEL).state_dict(),
        config=ArtefactConfig(model=MODEL, preparation=PREPARATION),
        card="# toy\n",
        facts={"licence": "CC0-1.0", "corpora": [], "step": 10, **facts},
        documents={"metrics": json_bytes(TrainingMetrics(step=10, health=health).model_dump(mode="json"))},
    )
    artefact = open_artefact(parse_reference(made["pin"]))
    if dice is not None:
        add_results(artefact, [result(dice)])
    return artefact


@pytest.fixture(params=["a folder", "a bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """An empty folder, and one in a bucket of a real S3 server."""
    url: str = str(tmp_path) if request.param == "a folder" else request.getfixturevalue("s3_url")
    return f"{url}/backbones/toy"


@pytest.fixture
def said() -> Callable[[str], None]:
    """A receiver of progress lines that keeps them in `lines`."""
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)

    say.lines = lines  # type: ignore[attr-defined]
    return say
