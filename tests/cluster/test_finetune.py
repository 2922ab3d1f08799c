"""Few-shot trials on a real local Ray: a scheduler that stops candidates, a searcher that proposes them, and a driver that is killed."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import p2r
from cluster.executor import RayExecutor
from cluster.finetune import _scheduler_of, num_concurrent, run_trials, suggest
from p2r.config import FinetuneConfig
from p2r.errors import JobError
from p2r.evaluate.tasks import load_task
from p2r.fewshot.checks import check_task
from p2r.fewshot.protocol import choose_settings, search_trials
from p2r.fewshot.setup import TrialSetup
from p2r.job import Resources, read_job
from p2r.pipeline.local import LocalExecutor
from p2r.pipeline.stages import run_job
from p2r.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RESOURCES = Resources(cpus_per_trial=4)  # one worker process, which imports torch once


def make(published: dict[str, str], data: Path, folder: Path, **search: Any) -> TrialSetup:
    config = {"tasks": ["x"], "modes": ["scratch"], "num_labelled": [1], "draws": 1, "steps": 8, "batch_size": 2}
    root = Storage(str(folder))
    backbone = p2r.load_backbone(published["backbone"])
    setup = TrialSetup(
        config=FinetuneConfig.model_validate({**config, "search": search}),
        task=str(data / "task.yaml"),
        backbone=published["backbone"],
        backbone_sha256=backbone.manifest["sha256"],
        architecture_sha256=backbone.config.sha256(),
        storage=root.at("finetune/disc"),
        root=root.url,
    )
    return check_task(load_task(data / "task.yaml"), backbone, setup)


def test_candidates_are_stopped_and_proposed_and_what_was_found_lies_on_the_storage(
    published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    stopping = make(
        *(published, toy_data, tmp_path / "asha"),
        learning_rates={"scratch": [3e-2, 1e-2, 1e-7, 1e-8, 1e30]},
        scheduler="asha",
        report_steps=2,
        scheduler_options={"reduction_factor": 2},
    )
    trials = [(stopping, trial) for trial in search_trials(stopping.config, load_task(toy_data / "task.yaml"))]
    counts: list[Mapping[str, int]] = []
    results = run_trials(trials, resources=RESOURCES, retries=0, say=lines.append, count=counts.append)
    assert {sum(count.values()) for count in counts} >= {5} and counts[-1]["done"] == 5
    by_rate = {trial.settings.learning_rate: result for (_, trial), result in zip(trials, results, strict=True)}
    assert "diverged" in by_rate[1e30]["failed"]
    stopped = [result.stopped_at_step for result in results if result.stopped_at_step is not None]
    assert stopped and all(step in (2, 4, 6) for step in stopped)
    best = choose_settings(
        (trial, result.validation_dice if result.is_whole else None)
        for (_, trial), result in zip(trials, results, strict=True)
    )
    assert best["scratch"].learning_rate in (3e-2, 1e-2)
    # Run again: who was stopped stays stopped, and can never win against fewer rivals; who diverged is tried once more.
    said = len(lines)
    again = run_trials(trials, resources=RESOURCES, retries=0, say=lines.append)
    assert again == results and lines[said] == "1 trial to run, 4 done already"

    proposing, elsewhere = (
        make(
            *(published, toy_data, tmp_path / name),
            learning_rates={"scratch": {"loguniform": [1e-3, 1e-1]}},
            searcher="random",
            num_samples=2,
        )
        for name in ("random", "elsewhere")
    )
    found = suggest(proposing, "scratch", resources=RESOURCES, retries=0, say=lines.append)
    assert len(found) == 2
    for trial, result in found:
        assert 1e-3 <= (trial.settings.learning_rate or 0) <= 1e-1
        assert (
            result["trial"]["learning_rate"] == trial.settings.learning_rate
            and 0 <= result["validation"]["dice_mean"] <= 1
        )
    began = time.monotonic()
    assert suggest(proposing, "scratch", resources=RESOURCES, retries=0, say=lines.append) == found
    assert time.monotonic() - began < 2, "what was searched lies on the storage"

    repeated = suggest(elsewhere, "scratch", resources=RESOURCES, retries=0, say=lines.append)
    assert [trial for trial, _ in repeated] == [trial for trial, _ in found], "candidates depend on the seed alone"


def test_a_sweep_whose_driver_was_killed_goes_on_to_the_report_of_one_that_was_not(
    published: dict[str, str], write_toy_job: Callable[..., Path], tmp_path: Path
) -> None:
    changes = (
        *("kind=finetune", "pretrain=null", f"finetune.backbone={published['backbone']}", "resources.cpus_per_trial=4"),
        *(
            "finetune.modes=[scratch, linear_probe]",
            "finetune.num_labelled=[1, 2]",
            "finetune.draws=1",
            "finetune.steps=60",
        ),
    )
    path = write_toy_job(tmp_path)
    command = [sys.executable, "-m", "cluster", "run", str(path)]
    command += [word for change in changes for word in ("--set", change)]
    address = ray.get_runtime_context().gcs_address
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": address}, stdout=log, stderr=log)
        trials = tmp_path / "storage/finetune/disc/trials"
        deadline = time.monotonic() + 300
        while len(done := list(trials.glob("*.json"))) < 2 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        driver.kill()
        driver.wait()
    assert len(done) == 2, (tmp_path / "driver.log").read_text()

    job = read_job(path, changes)
    lines: list[str] = []
    run_job(job, RayExecutor(job), say=lines.append)
    # A worker may end a third trial before it dies with its driver.
    assert re.search("2 trials to run, 2 done already|1 trial to run, 3 done already", "\n".join(lines))
    undisturbed = read_job(path, (*changes, f"storage={tmp_path}/undisturbed"))
    run_job(undisturbed, LocalExecutor(torch.device("cpu"), None), say=lines.append)

    resumed, whole = (
        json.loads((tmp_path / name / "report/report.json").read_text()) for name in ("storage", "undisturbed")
    )
    for row in (*resumed["rows"], *whole["rows"]):
        del row["seconds"]
    assert resumed["rows"] == whole["rows"] and resumed["statistics"] == whole["statistics"]
    assert resumed["context"]["chosen"] == whole["context"]["chosen"]
    assert len(resumed["context"]["test_reads"]) == len(whole["context"]["test_reads"]) == 4


@pytest.mark.parametrize("scheduler", ["asha", "hyperband"])
def test_a_scheduler_lets_modes_with_more_steps_end(
    published: dict[str, str], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    rates = {"scratch": [1e-2, 3e-2]}
    setup = make(published, toy_data, tmp_path, learning_rates=rates, scheduler=scheduler, report_steps=2)
    longer = replace(setup, config=setup.config.model_copy(update={"steps_by_mode": {"scratch": 40}}))
    trial, _ = search_trials(setup.config, load_task(toy_data / "task.yaml"))
    monkeypatch.setattr("cluster.finetune.create_scheduler", lambda name, **options: options["max_t"])
    assert [_scheduler_of(one, trial) for one in (setup, longer)] == [4, 20], "reports of 8 and of 40 steps"
    assert setup.stopped_path(trial) != longer.stopped_path(trial)


def test_a_searcher_or_scheduler_that_tune_does_not_have_is_refused(
    published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    unknown = make(published, toy_data, tmp_path, searcher="oracle")
    with pytest.raises(JobError, match=r"search\.searcher 'oracle'"):
        suggest(unknown, "scratch", resources=RESOURCES, retries=0, say=print)
    unknown = make(published, toy_data, tmp_path, learning_rates={"scratch": [1, 2]}, scheduler="fastest")
    trials = [(unknown, trial) for trial in search_trials(unknown.config, load_task(toy_data / "task.yaml"))]
    with pytest.raises(JobError, match=r"search\.scheduler 'fastest'"):
        run_trials(trials, resources=RESOURCES, retries=0, say=print)


def test_as_many_trials_run_at_a_time_as_there_is_room_for() -> None:
    assert [num_concurrent(count, RESOURCES) for count in (1, 5)] == [1, 1]
    assert [num_concurrent(count, Resources(cpus_per_trial=0.5)) for count in (1, 5, 50)] == [1, 5, 8]
