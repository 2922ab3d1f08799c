"""A run that goes on with another number of ranks is the run that it would have been, on every ZeRO stage."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from p2r.config import PretrainConfig
from p2r.data.corpus import ingest_locally
from p2r.engine.build import join_process_group
from p2r.engine.pretrain import pretrain
from p2r.job import read_job
from p2r.storage import Storage

# DeepSpeed's stage 3 calls collectives by names that torch is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")

STAGES = (0, 1, 2, 3)
CPU = torch.device("cpu")


def config_of(job: Path, stage: int) -> PretrainConfig:
    config = read_job(job, ("pretrain.report_interval=1", "pretrain.steps=4")).pretrain
    assert config is not None
    return config.model_copy(update={"zero_stage": stage})


def train(folder: Path, name: str, config: PretrainConfig, *, until: int = 4) -> None:
    """Train in `folder/name`, to the end or until a step, from where its checkpoint stands."""
    storage = Storage(str(folder / name))
    run = pretrain(config, storage=storage, corpus=Storage(str(folder / "corpus")), device=CPU)
    for report in run:
        if report.step == until:
            break
    run.close()


def make_older(folder: Path, name: str) -> None:
    """Rewrite a checkpoint's manifest as an earlier version of p2r: another number and another commit."""
    path = folder / name / "checkpoints/step-00000002/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "code_version": "0.0.1", "code": "0123456789ab"}))


def train_as_rank(rank: int, folder: Path, world_size: int, script: list[tuple[str, int, int]]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    join_process_group(CPU)
    for name, stage, until in script:
        train(folder, name, config_of(folder / "toy.yaml", stage), until=until)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(write_toy_job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on each stage: one rank to the middle, by an older version, and two to the end; two and then one; and one throughout."""
    folder = tmp_path_factory.mktemp("ranks")
    path = write_toy_job(folder)
    ingest = read_job(path).ingest
    assert ingest is not None
    list(ingest_locally(ingest.model_copy(update={"subjects_of": None}), Storage(str(folder / "corpus"))))
    join_process_group(CPU)
    for stage in STAGES:
        train(folder, f"1-2 {stage}", config_of(path, stage), until=2)
        make_older(folder, f"1-2 {stage}")
    script = [task for stage in STAGES for task in ((f"1-2 {stage}", stage, 4), (f"2-1 {stage}", stage, 2))]
    train(folder, "1-1", config_of(path, 1))
    multiprocessing.spawn(train_as_rank, (folder, 2, script), nprocs=2)
    for stage in STAGES:
        train(folder, f"2-1 {stage}", config_of(path, stage))
    return folder


def losses(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / name / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["resumed_from"] is not None] == ([] if name == "1-1" else [3])
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", ["1-2", "2-1"])
def test_ranks_may_change_on_the_way(folder: Path, ranks: str, stage: int) -> None:
    assert losses(folder, f"{ranks} {stage}") == pytest.approx(losses(folder, "1-1"), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_two_ranks_holds_the_parts_of_both_and_the_whole_model(folder: Path, stage: int) -> None:
    storage = Storage(str(folder / f"1-2 {stage}"))
    manifest = storage.read_json("checkpoints/step-00000004/manifest.json")
    assert manifest["world_size"] == 2
    assert {"generators/rank-00000.safetensors", "generators/rank-00001.safetensors"} <= manifest["files"].keys()
    kept = {path.removeprefix("checkpoints/step-00000004/") for path in storage.list("checkpoints/step-00000004")}
    assert kept == {*manifest["files"], "manifest.json"}
    sizes = {
        manifest_of["files"]["model.safetensors"]["num_bytes"]
        for name in (f"1-2 {stage}", "1-1")
        for manifest_of in [Storage(str(folder / name)).read_json("checkpoints/step-00000004/manifest.json")]
    }
    assert len(sizes) == 1
