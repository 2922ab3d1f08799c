"""A change that should not touch the numbers does not: a short run's losses are those that lie beside this file.

Discs in noise, a tiny network, 20 steps on a CPU. After a change that is meant to change the numbers, write them again,
and say in the commit why they changed:

    P2R_WRITE_GOLDEN=1 pytest tests/golden
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from p2r.data.corpus import ingest_locally
from p2r.engine.pretrain import pretrain
from p2r.job import read_job
from p2r.storage import Storage

GOLDEN = Path(__file__).parent / "first_losses.json"
TOLERANCE = 1e-4


def test_the_first_losses_are_those_that_were_recorded(write_toy_job: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ("pretrain.steps=20", "pretrain.report_interval=1", "pretrain.checkpoint_interval=20")
    job = read_job(write_toy_job(tmp_path), overrides)
    assert job.ingest is not None and job.pretrain is not None
    corpus = Storage(str(tmp_path / "corpus"))
    list(ingest_locally(job.ingest.model_copy(update={"subjects_of": None}), corpus))
    run = pretrain(job.pretrain, storage=Storage(str(tmp_path / "run")), corpus=corpus, device=torch.device("cpu"))
    losses = [report.loss for report in run]
    made_with = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
    }
    if os.environ.get("P2R_WRITE_GOLDEN"):
        rounded = [round(loss, 6) for loss in losses]
        GOLDEN.write_text(json.dumps({**made_with, "losses": rounded}, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert losses == pytest.approx(golden["losses"], abs=TOLERANCE), (
        f"recorded with { ({name: golden[name] for name in made_with}) }, found with {made_with}; "
        "if the numbers were meant to change: P2R_WRITE_GOLDEN=1 pytest tests/golden"
    )
