"""Few-shot trials on a real local Ray: a scheduler that stops candidates, a searcher that proposes them, and one that diverges."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import p2r
from cluster.finetune import num_concurrent, run_trials, suggest
from p2r.config import FinetuneConfig
from p2r.engine.fewshot import check_task
from p2r.engine.finetune import TrialSetup
from p2r.errors import JobError
from p2r.evaluate.protocol import choose_settings, search_trials
from p2r.evaluate.tasks import load_task
from p2r.job import Resources
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
        **{"scheduler": "asha", "report_steps": 2, "scheduler_options": {"reduction_factor": 2}},
    )
    trials = [(stopping, trial) for trial in search_trials(stopping.config, load_task(toy_data / "task.yaml"))]
    counts: list[Mapping[str, int]] = []
    results = run_trials(trials, resources=RESOURCES, retries=0, say=lines.append, count=counts.append)
    assert {sum(count.values()) for count in counts} >= {5} and counts[-1]["done"] == 5
    by_rate = {trial.settings.learning_rate: result for (_, trial), result in zip(trials, results, strict=True)}
    assert "diverged" in by_rate[1e30]["failed"]
    stopped = [result["stopped_at_step"] for result in results if "stopped_at_step" in result]
    assert stopped and all(step in (2, 4, 6) for step in stopped)
    best = choose_settings(
        (trial, None if {"failed", "stopped_at_step"} & result.keys() else result["validation"]["dice_mean"])
        for (_, trial), result in zip(trials, results, strict=True)
    )
    assert best["scratch"].learning_rate in (3e-2, 1e-2)
    # Run again: who was stopped stays stopped, and can never win against fewer rivals; who diverged is tried once more.
    said = len(lines)
    again = run_trials(trials, resources=RESOURCES, retries=0, say=lines.append)
    assert again == results and lines[said] == "1 trials to run, 4 done already"

    proposing, elsewhere = (
        make(
            *(published, toy_data, tmp_path / name),
            learning_rates={"scratch": {"loguniform": [1e-3, 1e-1]}},
            **{"searcher": "random", "num_samples": 2},
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

    again = suggest(elsewhere, "scratch", resources=RESOURCES, retries=0, say=lines.append)
    assert [trial for trial, _ in again] == [trial for trial, _ in found], "candidates depend on the seed alone"


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
