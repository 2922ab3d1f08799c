"""A run that is interrupted and goes on is, bit by bit, the run that was not interrupted."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from p2r.config import PretrainConfig
from p2r.data.corpus import ingest_locally
from p2r.engine.pretrain import pretrain
from p2r.job import read_job
from p2r.storage import Storage
from tests.ranks import join_ranks, start_ranks

STEPS = 5
STAGES = (0, 1, 2)
SIZES = (2, 4)


@pytest.fixture(scope="module")
def config(write_toy_job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """Of a run with everything that has a state, on a corpus that lies ready."""
    folder = tmp_path_factory.mktemp("exactness")
    overrides = (f"pretrain.steps={STEPS}", "pretrain.report_interval=1", "pretrain.checkpoint_interval=100")
    path, read = write_toy_job(folder), (*overrides, "pretrain.ema_decay=0.5", f"pretrain.corpus={folder}/corpus")
    making, job = read_job(path), read_job(path, ("ingest=null", "kind=pretrain", "finetune=null", *read))
    assert making.ingest is not None and job.pretrain is not None
    corpus = Storage(str(folder / "corpus"))
    list(ingest_locally(making.ingest.model_copy(update={"subjects_of": None}), corpus))
    return job.pretrain


def run(config: PretrainConfig, folder: Path, *, stops: Any = (), mine: bool = True) -> dict[str, Any]:
    """Run to the end, in as many pieces as there are stops and one; return losses by step, and digests of what was saved.

    Args:
        config: What to run.
        folder: Where.
        stops: Steps after which to stop.
        mine: Whether it is this rank that wishes to.
    """
    storage, storages = Storage(str(folder)), Storage(str(folder / "none"))
    pieces: list[int] = []
    for _ in range(len(stops) + 1):
        steps = itertools.count((pieces[-1] if pieces else 0) + 1)
        reports = pretrain(
            config,
            storage=storage,
            corpus=storages,
            device=torch.device("cpu"),
            should_stop=lambda steps=steps: next(steps) in stops and mine,  # type: ignore[misc]
        )
        pieces.append([report.step for report in reports][-1])
    assert pieces == [*sorted(stops), STEPS]
    rows = [json.loads(line) for line in storage.read_bytes("history.jsonl").decode().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    files = storage.read_json(f"checkpoints/step-{STEPS:08d}/manifest.json")["files"]
    told = ("loss", "learning_rate", "gradient_norm", "loss_parts", "health", "equivariance_error", "samples_seen")
    return {
        "losses": [row["loss"] for row in rows],
        "told": [[row[name] for name in told] for row in rows],
        "digests": [files[name]["sha256"] for name in ("model.safetensors", "ema.safetensors")],
    }


@pytest.mark.parametrize("stage", [*STAGES, 3])
def test_a_run_that_stops_after_every_step_is_bitwise_the_whole_run(
    config: PretrainConfig, stage: int, tmp_path: Path
) -> None:
    config = config.model_copy(update={"zero_stage": stage})
    whole = run(config, tmp_path / "whole")
    assert run(config, tmp_path / "broken", stops=range(1, STEPS)) == whole
    assert whole["digests"][0] != whole["digests"][1]


def run_rank(rank: int, folder: str, world_size: int, config: PretrainConfig, stops: tuple[int, ...]) -> None:
    found = {}
    for stage in STAGES:
        of_stage = config.model_copy(update={"zero_stage": stage})
        found[f"{stage} whole"] = run(of_stage, Path(folder, f"{world_size}-{stage}-whole"))
        # Only the last rank wishes to stop; all do.
        found[f"{stage} broken"] = run(
            of_stage, Path(folder, f"{world_size}-{stage}-broken"), stops=stops, mine=rank == world_size - 1
        )
    Path(folder, f"{world_size}-{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def by_ranks(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    stops = tuple(sorted(random.sample(range(1, STEPS), 2)))
    started = [start_ranks(size, folder, run_rank, str(folder), size, config, stops) for size in SIZES]
    found = {
        1: {
            f"{stage} whole": run(config.model_copy(update={"zero_stage": stage}), folder / f"1-{stage}")
            for stage in STAGES[:1]
        }
    }
    for size, ranks in zip(SIZES, started, strict=True):
        join_ranks(ranks)
        of_ranks = [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
        found[size] = of_ranks[0]
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_stop_at_two_random_steps_go_on_to_the_same_bits(
    by_ranks: dict[int, dict[str, Any]], size: int, stage: int
) -> None:
    assert by_ranks[size][f"{stage} broken"] == by_ranks[size][f"{stage} whole"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_one_rank_two_and_four_have_the_same_losses(by_ranks: dict[int, dict[str, Any]], size: int, stage: int) -> None:
    assert by_ranks[size][f"{stage} whole"]["losses"] == pytest.approx(by_ranks[1]["0 whole"]["losses"], rel=1e-5)
