"""Runs that stop and resume: equal digits, and checkpoints of other runs that are refused."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from p2r.data.corpus import ingest_locally
from p2r.data.manifest import load_manifest, manifest_sha256
from p2r.errors import CheckpointError
from p2r.job import Job
from p2r.storage import Storage
from tests.engine_runs import losses, train

JobOf = Callable[..., Job]


@pytest.fixture
def job(job_of: JobOf, tmp_path: Path) -> Job:
    return job_of(tmp_path)


def test_a_run_that_stops_after_a_checkpoint_goes_on_to_the_same_digits(
    job: Job, corpus: Storage, tmp_path: Path
) -> None:
    whole, broken = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "broken"))
    train(job, whole, corpus)
    train(job, broken, corpus, most=1)
    resumed = train(job, broken, corpus)
    assert resumed[0].resumed_from == 2
    assert losses(broken) == losses(whole)
    assert _weights(broken, "step-00000006") == _weights(whole, "step-00000006")


def test_a_checkpoint_between_two_reports_keeps_the_running_mean(
    job_of: JobOf, corpus: Storage, tmp_path: Path
) -> None:
    job = job_of(tmp_path, "pretrain.report_interval=3", "pretrain.checkpoint_interval=2")
    whole, broken = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "broken"))
    train(job, whole, corpus)
    train(job, broken, corpus, most=1)  # at step 2, in the middle of a report's interval
    train(job, broken, corpus)
    assert losses(broken)[3] == losses(whole)[3]
    assert losses(broken)[6] == losses(whole)[6]


def test_slices_of_time_add_up_to_the_same_run(job: Job, corpus: Storage, tmp_path: Path) -> None:
    whole, sliced = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "sliced"))
    train(job, whole, corpus)
    for _ in range(6):
        assert len(train(job, sliced, corpus, seconds=0.0)) == 1  # every slice: one step, one checkpoint
    assert train(job, sliced, corpus) == []
    assert _weights(sliced, "step-00000006") == _weights(whole, "step-00000006")


def test_a_run_keeps_the_revision_of_the_corpus_that_it_began_with(job: Job, corpus: Storage, tmp_path: Path) -> None:
    mine = Storage(str(tmp_path / "corpus"))
    whole, broken = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "broken"))
    assert job.ingest is not None
    few = job.ingest.model_copy(update={"subjects_of": None, "subjects": ("sub-[01-05]",)})
    list(ingest_locally(few, mine))
    train(job, whole, mine)
    train(job, broken, mine, most=1)
    before = manifest_sha256(load_manifest(mine))
    list(ingest_locally(few.model_copy(update={"subjects": None}), mine))
    assert manifest_sha256(load_manifest(mine)) != before
    train(job, broken, mine)
    assert losses(broken) == losses(whole)


def test_a_finished_run_is_left_as_it_is(job: Job, corpus: Storage, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "pretrain"))
    train(job, storage, corpus)
    assert train(job, storage, corpus) == []


def test_a_checkpoint_of_another_configuration_is_refused_key_by_key(
    job_of: JobOf, job: Job, corpus: Storage, tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path / "pretrain"))
    train(job, storage, corpus, most=1)
    other = job_of(tmp_path, "pretrain.loss.temperature=0.5", "pretrain.seed=3")
    with pytest.raises(CheckpointError) as caught:
        train(other, storage, corpus)
    assert "pretrain.loss.temperature: 0.2 in the checkpoint, 0.5 in the job" in str(caught.value)
    assert "pretrain.seed: 0 in the checkpoint, 3 in the job" in str(caught.value)


def test_the_intervals_of_reports_and_checkpoints_may_change_on_the_way(
    job_of: JobOf, job: Job, corpus: Storage, tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path / "pretrain"))
    train(job, storage, corpus, most=1)
    other = job_of(tmp_path, "pretrain.report_interval=1", "pretrain.checkpoint_interval=3")
    assert [report.step for report in train(other, storage, corpus)] == [3, 4, 5, 6]


@pytest.mark.parametrize("negatives", ["global_batch", "image"])
def test_so_may_the_micro_batch_and_the_limit_of_damage(
    job_of: JobOf, corpus: Storage, tmp_path: Path, negatives: str
) -> None:
    loss = f"pretrain.loss.negatives={negatives}"
    whole, changed = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "changed"))
    train(job_of(tmp_path, loss), whole, corpus)
    train(job_of(tmp_path, loss), changed, corpus, most=1)
    train(job_of(tmp_path, loss, "pretrain.micro_batch=2", "pretrain.max_replaced=7"), changed, corpus)
    assert losses(changed) == pytest.approx(losses(whole), rel=1e-4)


def test_so_may_what_makes_a_network_fast_and_small(
    job_of: JobOf, job: Job, corpus: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    storage = Storage(str(tmp_path / "pretrain"))
    train(job, storage, corpus, most=1)
    faster = job_of(
        tmp_path,
        *("pretrain.compile=true", "pretrain.model.channels_last=true", "pretrain.model.checkpoint_activations=1"),
    )
    reports = train(faster, storage, corpus)
    assert [report.step for report in reports] == [4, 6]
    assert "not compiled: no compiler (no-such-compiler)" in reports[0].line()
    assert reports[1].compiled is None


def test_a_micro_batch_that_decides_the_negatives_may_not(job_of: JobOf, corpus: Storage, tmp_path: Path) -> None:
    storage, loss = Storage(str(tmp_path / "pretrain")), "pretrain.loss.negatives=micro_batch"
    train(job_of(tmp_path, loss, "pretrain.micro_batch=2"), storage, corpus, most=1)
    with pytest.raises(CheckpointError, match=r"pretrain\.micro_batch: 2 in the checkpoint, 1 in the job"):
        train(job_of(tmp_path, loss, "pretrain.micro_batch=1"), storage, corpus)


def test_nor_may_the_contrast_of_a_corpus(job_of: JobOf, corpus: Storage, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "pretrain"))

    def job_with(contrasts: tuple[str, str], url: str = corpus.url) -> Job:
        shares = ", ".join(f"{{url: {url}, contrast: {name}}}" for name in contrasts)
        model = f"pretrain.corpus=[{shares}]", "pretrain.model.contrasts=[t1, t2]", "pretrain.model.in_channels=2"
        return job_of(tmp_path, "kind=pretrain", "ingest=null", *model)

    train(job_with(("t1", "t2")), storage, corpus, most=1)
    with pytest.raises(CheckpointError) as caught:
        train(job_with(("t2", "t1")), storage, corpus)
    assert "pretrain.corpus[0].contrast: 't1' in the checkpoint, 't2' in the job" in str(caught.value)
    assert "pretrain.corpus[1].contrast: 't2' in the checkpoint, 't1' in the job" in str(caught.value)
    moved = shutil.copytree(corpus.url.removeprefix("file://"), tmp_path / "moved")
    assert train(job_with(("t1", "t2"), str(moved)), storage, corpus)


def test_a_checkpoint_of_an_optimizer_that_could_not_leave_out_a_step_is_refused(
    job: Job, corpus: Storage, tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path / "pretrain"))
    train(job, storage, corpus, most=1)
    manifest = storage.read_json("checkpoints/step-00000002/manifest.json")
    manifest["state"]["running"] = {"total": 0.0, "count": 0, "num_images_without_pairs": 0}
    storage.write_json("checkpoints/step-00000002/manifest.json", manifest)
    with pytest.raises(CheckpointError, match=r"could not skip steps\. Use the version of p2r that wrote it"):
        train(job, storage, corpus)


def test_a_run_killed_at_a_random_moment_ends_with_the_same_digits(
    job_of: JobOf, tmp_path: Path, repository: Path
) -> None:
    def start(folder: Path) -> subprocess.Popen[str]:
        job_of(folder)
        overrides = ["--set", "kind=pretrain", "--set", "pretrain.steps=60", "--set", "pretrain.report_interval=1"]
        command = [sys.executable, "-m", "p2r", str(folder / "toy.yaml"), *overrides]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command, cwd=repository, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    process = start(whole)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    process = start(broken)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 10/60" in line:
            time.sleep(random.uniform(0, 1))
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    history = broken / "storage/pretrain/history.jsonl"
    assert len(history.read_text().splitlines()) < 60, "it was too fast to be killed"
    process = start(broken)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "resumed from step" in log
    assert losses(Storage(str(broken / "storage/pretrain"))) == losses(Storage(str(whole / "storage/pretrain")))


def _weights(storage: Storage, checkpoint: str) -> str:
    manifest = storage.read_json(f"checkpoints/{checkpoint}/manifest.json")
    digest: str = manifest["files"]["model.safetensors"]["sha256"]
    return digest
