"""Two nodes with addresses of their own: what a dead worker does to a run, and what it does not."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from p2r.config import IngestConfig, SessionsConfig
from p2r.data.corpus import ingest_locally
from p2r.data.shards import read_index
from p2r.job import read_job
from p2r.storage import Storage
from tests.nodes import Cluster, cluster, refusal
from tests.toy import write_toy_sessions

pytestmark = pytest.mark.ray

STEPS = 60
OVERRIDES = (
    "kind=pretrain",
    "retries=2",
    "ingest=null",
    "publish=null",
    "finetune=null",
    f"pretrain.steps={STEPS}",
    "pretrain.report_interval=1",
    "pretrain.checkpoint_interval=10",
    "pretrain.model.contrasts=[flair, t1, t1ce]",
    "pretrain.views={contrasts: mixed, contrast_dropout: 0.3}",
    "resources.network_interface=eth0",
)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("nodes"), num_cpus=(1, 1)) as made:
        yield made


def _write_sessions(folder: Path, corpus: Path) -> None:
    """Write a corpus of three contrasts in which some are missing and some are damaged."""
    scans = write_toy_sessions(folder, missing={"sub-03": ["t1"], "sub-05": ["flair", "t1ce"]})
    sessions = SessionsConfig(contrasts={"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-*"})
    config = IngestConfig(sources=(str(scans),), licence="CC0-1.0", shard_size_mib=0.02, sessions=sessions)
    list(ingest_locally(config, Storage(str(corpus))))
    index = min(corpus.glob("shard-*.idx"))
    shard = bytearray(index.with_suffix(".tar").read_bytes())
    rows = [row for row in read_index(index) if row.contrast == "t1ce"]
    assert rows
    for row in rows:
        shard[row.chunk_offsets[1] + 40] ^= 1
    index.with_suffix(".tar").write_bytes(shard)


def _rank(rank: int, job_file: str, overrides: tuple[str, ...], folder: str, corpus: str) -> None:
    """One of two processes that train without Ray and without faults."""
    from p2r.engine.pretrain import pretrain

    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    config = read_job(Path(job_file), overrides).pretrain
    assert config is not None
    storage = Storage(folder)
    for _ in pretrain(config, storage=storage, corpus=Storage(corpus), device=torch.device("cpu")):
        pass


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def test_a_worker_that_is_killed_changes_nothing_of_the_curve_across_three_contrasts(
    nodes: Cluster, write_toy_job: Callable[..., Path], tmp_path: Path
) -> None:
    job_file = write_toy_job(tmp_path, num_workers=2)
    corpus = tmp_path / "corpus"
    _write_sessions(tmp_path / "scans", corpus)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    overrides = (*OVERRIDES, f"pretrain.corpus={corpus.as_uri()}")
    multiprocessing.spawn(_rank, (str(job_file), overrides, str(undisturbed), str(corpus)), nprocs=2)

    arguments = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "cluster", "run", str(job_file), *arguments]
    driver = nodes.popen(nodes.head, command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said: list[str] = []

    def kill_once() -> None:
        assert driver.stderr is not None
        killed = False
        for raw in driver.stderr:
            said.append(raw.decode().rstrip())
            if not killed and re.search(r"step (1[1-9]|[2-5]\d)/", said[-1]):
                killed = True
                os.kill(nodes.nodes[1].pids_of("RayTrainWorker")[0], signal.SIGKILL)

    with driver:
        reader = threading.Thread(target=kill_once)
        reader.start()
        code = driver.wait(300)
        reader.join()
    assert code == 0, said

    storage = tmp_path / "storage/pretrain"
    assert _losses(storage) == _losses(undisturbed)  # the same bits
    last = json.loads((storage / "history.jsonl").read_text().splitlines()[-1])
    assert last["num_replaced"] > 0 and last["contrast_pairs"]
    damaged = [json.loads(path.read_text())["error"] for path in (storage / "quarantine").iterdir()]
    assert damaged and all("chunk 1" in error for error in damaged)
    (fault,) = [json.loads(line) for line in (storage / "faults.jsonl").read_text().splitlines()]
    assert (fault["cause"], fault["decision"], fault["count"], fault["limit"]) == ("worker", "restart", 1, 2)
    assert fault["from_step"] in range(10, STEPS, 10)
    assert nodes.nodes[1].address in fault["what"]
    assert any(line.startswith("fault | worker: rank ") for line in said)
    assert _gone(nodes, "RayTrainWorker", "TrainController")


def _gone(nodes: Cluster, *words: str) -> bool:
    deadline = time.monotonic() + 20
    while any(node.pids_of(*words) for node in nodes.nodes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
