"""Pretraining across three contrasts through a kill, damaged voxels and a bucket that answers 503."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from p2r.config import IngestConfig, SessionsConfig
from p2r.data.corpus import ingest_locally
from p2r.data.shards import read_index
from p2r.job import read_job
from p2r.storage import Storage
from tests.engine_runs import losses, train_config
from tests.fault_proxy import Fault, FaultProxy
from tests.toy import write_toy_sessions

pytestmark = pytest.mark.s3

STEPS = 40


def ingest(scans: Path, url: str) -> None:
    sessions = SessionsConfig(contrasts={"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-*"})
    config = IngestConfig(sources=(str(scans),), licence="CC0-1.0", shard_size_mib=0.02, sessions=sessions)
    list(ingest_locally(config, Storage(url)))


def damage(folder: Path) -> None:
    """Change a byte in the last contrast of every session of the first shard."""
    index = min(folder.glob("shard-*.idx"))
    content = bytearray(index.with_suffix(".tar").read_bytes())
    rows = [row for row in read_index(index) if row.contrast == "t1ce"]
    for row in rows:
        content[row.chunk_offsets[1] + 40] ^= 1
    index.with_suffix(".tar").write_bytes(content)
    assert rows


def run(command: list[str], environment: dict[str, str], *, until: str | None = None) -> tuple[int, list[str]]:
    """Run a job, and kill it at the line with some text; return the exit code and the log."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        log = list[str]()
        for raw in process.stderr:
            log.append(raw.decode().rstrip())
            if until is not None and until in log[-1]:
                process.kill()
        return process.wait(300), log


def test_a_kill_damaged_voxels_and_503_change_nothing_of_a_run_across_contrasts(
    write_toy_job: Callable[..., Path],
    proxy: FaultProxy,
    s3_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scans = write_toy_sessions(tmp_path / "scans", missing={"sub-03": ["t1"], "sub-05": ["flair", "t1ce"]})
    ingest(scans, f"{s3_url}/corpus")
    ingest(scans, str(tmp_path / "damaged"))
    damage(tmp_path / "damaged")
    settings = (
        "kind=pretrain",
        "ingest=null",
        "finetune=null",
        "publish=null",
        f"pretrain.corpus=[{{url: '{s3_url}/corpus'}}, {{url: '{tmp_path}/damaged'}}]",
        "pretrain.model.contrasts=[flair, t1, t1ce]",
        "pretrain.views={contrasts: mixed, contrast_dropout: 0.3}",
        f"pretrain.steps={STEPS}",
        "pretrain.report_interval=1",
        "pretrain.checkpoint_interval=5",
    )
    job = write_toy_job(tmp_path)
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    config = read_job(job, settings).pretrain
    assert config is not None
    undisturbed = Storage(str(tmp_path / "undisturbed"))
    train_config(config, undisturbed, Storage(str(tmp_path / "none")))

    proxy.clear()
    proxy.add(Fault("status", on="GET .*tar", times=2, status=503))
    command = [sys.executable, "-m", "p2r", str(job)]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "P2R_CACHE": str(tmp_path / "cold")}
    code, log = run(command, environment, until=f"step 7/{STEPS}")
    assert code == -signal.SIGKILL, log
    code, log = run(command, environment)
    assert code == 0 and "resumed from step" in "\n".join(log), log

    storage = Storage(str(tmp_path / "storage/pretrain"))
    expected = losses(undisturbed)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(storage) == expected
    rows = [json.loads(line) for line in storage.read_bytes("history.jsonl").decode().splitlines()]
    assert rows[-1]["num_replaced"] > 0 and any(row["contrast_pairs"] for row in rows)
    assert any(row["data"].get('retries{cause="503"}') for row in rows)
    assert all("is damaged" in path.read_text() for path in (tmp_path / "storage/pretrain/quarantine").iterdir())
