"""Variants of an ablation on a real local Ray: side by side, after a kill of the driver, with a failure, and with ASHA."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch

from cluster.executor import RayExecutor
from cluster.variants import _Halving, _share_out
from p2r.config import PretrainConfig
from p2r.engine.checkpoint import newest_checkpoint
from p2r.engine.checkpoint_manifest import FORMAT
from p2r.errors import CheckpointError
from p2r.job import AshaConfig, Job, Resources, read_job
from p2r.pipeline.executor import VariantRun
from p2r.pipeline.local import LocalExecutor
from p2r.pipeline.outputs import Outputs
from p2r.pipeline.stages import run_job
from p2r.storage import Storage

ABLATION = (
    "kind=ablation",
    "finetune.score_on=validation",
    "finetune.modes=[linear_probe]",
    "finetune.num_labelled=[1]",
    "finetune.publish_model=false",
    "resources.cpus_per_trial=4",  # one process for all trials, which imports torch once
)
VARIANTS = "few: {pretrain.loss.pixel_pairs_per_image: 4}, many: {pretrain.loss.pixel_pairs_per_image: 32}"


def _run(job: Job) -> tuple[Outputs, list[str]]:
    lines: list[str] = []
    with RayExecutor(job) as executor:
        return run_job(job, executor, say=lines.append), lines


def _saved_step(job: Job, variant: str) -> int:
    """Return the step of a variant's newest checkpoint; 0 if there is none. A row of the history says less: it comes first."""
    newest = newest_checkpoint(Storage(f"{job.storage}/variants/{variant}/pretrain"))
    return 0 if newest is None else newest.step


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_variants_train_side_by_side_one_fails_and_the_table_is_the_table_of_one_process(
    write_toy_job: Callable[..., Path], tmp_path: Path
) -> None:
    lost = "lost: {pretrain.corpus: file:///nowhere/corpus}"
    path = write_toy_job(tmp_path)
    job = read_job(path, (*ABLATION, f"variants={{{VARIANTS}, {lost}}}"))
    made, lines = _run(job)
    assert "pretrain | 3 variants, 3 at a time; workers of each: 1" in lines
    of_steps = [line.split(" | ")[1] for line in lines if line.startswith("pretrain | ") and "| loss" in line]
    assert sorted(set(of_steps)) == ["few", "many"]
    assert [one.trial for one in made.failed] == ["variant lost"]
    assert "/nowhere/corpus" in made.failed[0].reason
    assert "finetune | 2 trials to run, 0 done already" in lines, "the trials of both are one pool"

    local = read_job(path, (*ABLATION, f"variants={{{VARIANTS}, {lost}}}", f"storage={tmp_path}/local"))
    same = run_job(local, LocalExecutor(torch.device("cpu"), None), say=lambda line: None)
    assert [(one.trial, one.reason) for one in same.failed] == [(one.trial, one.reason) for one in made.failed]
    tables = [json.loads((Path(one.storage) / "report/report.json").read_text())["rows"] for one in (job, local)]
    same_keys = ("variant", "task", "mode", "num_labelled", "draw", "subjects", "settings", "split")
    assert [[row[key] for key in same_keys] for row in tables[0]] == [
        [row[key] for key in same_keys] for row in tables[1]
    ]
    for here, there in zip(*tables, strict=True):
        assert here["dice_mean"] == pytest.approx(there["dice_mean"], abs=0.02)
    pages = [(Path(one.storage) / "report/report.md").read_text().splitlines() for one in (job, local)]
    assert [line.count("|") for line in pages[0]] == [line.count("|") for line in pages[1]]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_after_a_kill_of_the_driver_finished_variants_stay_and_half_ones_resume(
    write_toy_job: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = (*ABLATION, "variants={short: {pretrain.steps: 4}, long: {pretrain.steps: 400}}")
    path = write_toy_job(tmp_path)
    job = read_job(path, overrides)
    command = [
        sys.executable,
        "-m",
        "cluster",
        "run",
        str(path),
        *(part for one in overrides for part in ("--set", one)),
    ]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(Path.cwd())}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 500
        while not (_saved_step(job, "short") == 4 and _saved_step(job, "long") >= 8):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    at_kill = _saved_step(job, "long")
    assert at_kill < 400, "the variant was too short for this test"
    short = Path(job.storage) / "variants/short/pretrain/history.jsonl"
    before = short.stat().st_mtime_ns

    made, lines = _run(job)
    assert made.unfinished is None and not made.failed
    assert short.stat().st_mtime_ns == before
    assert not [line for line in lines if line.startswith("pretrain | short") and "| loss" in line]
    (resumed,) = [line for line in lines if line.startswith("pretrain | long | resumed from step ")]
    assert at_kill <= int(resumed.rpartition(" ")[2]) < 400
    rows = json.loads((Path(job.storage) / "report/report.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["short", "long"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_asha_stops_a_variant_behind_and_the_table_names_it_with_its_step(
    write_toy_job: Callable[..., Path], toy_data: Path, tmp_path: Path
) -> None:
    probe = f"pretrain.probe={{task: {toy_data}/task.yaml, interval: 2, num_validation: 1}}"
    path = write_toy_job(tmp_path)
    first = "first: {pretrain.steps: 4}"
    leader = read_job(path, (*ABLATION, probe, f"variants={{{first}}}"))
    run_job(leader, LocalExecutor(torch.device("cpu"), None), say=lambda line: None)
    history = Path(read_job(path).storage) / "variants/first/pretrain/history.jsonl"
    rows = [json.loads(line) | {"probe_dice": 1.0} for line in history.read_text().splitlines()]
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))  # a variant that leads by far

    overrides = (
        *ABLATION,
        probe,
        f"variants={{{first}, behind: {{pretrain.steps: 5000}}}}",
        "asha={reduction_factor: 2}",
    )
    job = read_job(path, overrides)
    made, lines = _run(job)
    assert made.unfinished is None and not made.failed
    report = json.loads((Path(job.storage) / "report/report.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["first"]
    state = report["stopped"]["behind"]
    stored = json.loads((Path(job.storage) / "variants/behind/pretrain/stopped.json").read_text())
    assert state == f"stopped at step {stored['step']}, probe Dice {stored['probe_dice']:.3f}"
    assert 0 < stored["step"] < 5000
    page = (Path(job.storage) / "report/report.md").read_text()
    assert f"| behind |  |  |  | {state} |" in page and "| behind | `pretrain.steps: 5000` | none |" in page

    again, lines = _run(read_job(path, overrides))
    assert again.to_json() == made.to_json()
    assert not [line for line in lines if "| loss" in line]


def test_a_probe_is_compared_with_the_stored_probes_of_all_variants_at_the_same_step(tmp_path: Path) -> None:
    config = PretrainConfig.model_validate(
        {"steps": 90, "global_batch": 4, "probe": {"task": "task.yaml", "interval": 10}}
    )
    runs = {}
    for number, dice in enumerate((0.2, 0.5, 0.8, None)):
        storage = Storage(str(tmp_path / str(number)))
        if dice is not None:
            row = (
                json.dumps({"step": 10, "probe_dice": dice})
                + "\n"
                + json.dumps({"step": 12, "probe_dice": None})
                + "\n"
            )
            storage.write_bytes("history.jsonl", row.encode())
        runs[str(number)] = VariantRun(config=config, storage=storage, corpus=storage)
    halving = _Halving(AshaConfig(reduction_factor=3), runs)
    # The best third at step 10 is above 0.6.
    assert not halving._is_behind("3", 5, 0.1)
    assert halving._is_behind("3", 10, 0.59)
    assert not _Halving(AshaConfig(reduction_factor=3), runs)._is_behind("3", 10, 0.61)
    assert not halving._is_behind("2", 30, 0.3), "the first at a step is never stopped"
    assert not _Halving(AshaConfig(grace_steps=20), runs)._is_behind("3", 10, 0.1)


def test_auto_gives_every_variant_an_equal_part_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.pretrain.num_gpus", lambda: 0)
    monkeypatch.setattr("cluster.pretrain.num_cpus", lambda: 8)
    monkeypatch.setattr("cluster.pretrain.usable_nodes", lambda: {"node": {"CPU": 8.0}})
    storage = Storage(str(tmp_path))

    def workers(num_variants: int, **config: object) -> list[int]:
        made = PretrainConfig.model_validate({"steps": 1, "global_batch": 24, **config})
        runs = {str(number): VariantRun(config=made, storage=storage, corpus=storage) for number in range(num_variants)}
        refused, shares = _share_out(runs, Resources(num_workers="auto", cpus_per_worker=1))
        assert not refused and all(share.num_workers == share.resources.num_workers for share in shares.values())
        return [share.num_workers for share in shares.values()]

    assert workers(1) == [8]
    assert workers(2) == [4, 4]
    assert workers(3) == [2, 2, 2]
    assert workers(2, micro_batch=8) == [3, 3], "the micro-batch divides no part of four"
    assert workers(9) == [1] * 9


def test_a_stopped_variant_that_was_changed_since_is_refused_and_one_with_another_probe_is_compared_again(
    tmp_path: Path,
) -> None:
    storage, asha = Storage(str(tmp_path)), AshaConfig()
    config = PretrainConfig.model_validate(
        {"steps": 90, "global_batch": 4, "probe": {"task": "task.yaml", "interval": 10}}
    )
    manifest = {
        "format": FORMAT,
        "step": 10,
        "state": {},
        "config": config.model_dump(mode="json"),
        "world_size": 1,
        "files": {"model.safetensors": {"sha256": "0" * 64, "num_bytes": 1}},
    }
    storage.write_json("checkpoints/step-00000010/manifest.json", manifest)

    def halving(**changes: object) -> _Halving:
        changed = PretrainConfig.model_validate(config.model_dump(mode="json") | changes)
        return _Halving(asha, {"a": VariantRun(config=changed, storage=storage, corpus=storage)})

    first = halving()
    first._behind["a"] = 0.25
    stopped = first.record("a")
    assert stopped is not None and halving().stopped_before("a") == stopped
    with pytest.raises(CheckpointError, match=r"pretrain\.global_batch: 4 in the checkpoint, 8 in the job"):
        halving(global_batch=8).stopped_before("a")
    other_probe = halving(probe={"task": "task.yaml", "interval": 10, "num_labelled": 3})
    assert other_probe.stopped_before("a") is None
    old = storage.read_json("stopped.json")
    del old["probe"]
    storage.write_json("stopped.json", old)
    assert other_probe.stopped_before("a") == stopped, "a file of an older version does not name the probe"
