"""The whole job on a real local Ray cluster, with two workers: once, run again, and after damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.executor import RayExecutor
from p2r.errors import CheckpointError, InputError
from p2r.job import Job, read_job
from p2r.logs import fields_of
from p2r.pipeline.outputs import Outputs
from p2r.pipeline.stages import run_job

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def job_file(write_toy_job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_job(tmp_path_factory.mktemp("ray"), num_workers=2)


def _run(job: Job) -> tuple[Outputs, list[str]]:
    lines: list[str] = []
    return run_job(job, RayExecutor(job), say=lines.append), lines


@pytest.fixture(scope="module")
def first(job_file: Path, ray_cluster: None) -> tuple[Outputs, list[str]]:
    """What the job made when it ran for the first time, and what it said."""
    return _run(read_job(job_file))


def test_scans_become_a_report_and_running_again_repeats_nothing(
    job_file: Path, first: tuple[Outputs, list[str]]
) -> None:
    job = read_job(job_file)
    made, lines = first
    storage = Path(job.storage)
    said = "\n".join(lines)
    assert "2 workers on CPU" in said
    assert "step 6/6" in said
    assert "6 trials to run, 0 done already" in said
    reports = [fields_of(line) for line in lines if "| loss" in line]
    assert [(fields["attempt"], fields["rank"], fields["step"]) for fields in reports] == [
        (1, 0, 2),
        (1, 0, 4),
        (1, 0, 6),
    ]
    report = json.loads((storage / "report/report.json").read_text())
    assert len(report["rows"]) == 6
    backbone = json.loads((storage / "backbones/toy/1/manifest.json").read_text())
    for row in report["rows"]:
        assert row["split"] == "test"
        assert row["num_test_subjects"] == 2
        assert set(row["subjects"]) <= {f"sub-{number:02d}" for number in range(1, 6)}
        assert (row["backbone_sha256"] is None) == (row["mode"] == "scratch")
    same_patients: dict[tuple[Any, Any], set[Any]] = {
        (row["num_labelled"], row["draw"]): set() for row in report["rows"]
    }
    for row in report["rows"]:
        same_patients[row["num_labelled"], row["draw"]].add(tuple(row["subjects"]))
    assert all(len(subjects) == 1 for subjects in same_patients.values())
    assert backbone["licence"] == "CC0-1.0"
    for picture in report["pictures"]:
        assert (storage / "report" / picture).read_bytes().startswith(b"\x89PNG")

    before = {
        path: path.stat().st_mtime_ns
        for path in storage.rglob("*.json")
        if not {"report", "finished.json"} & set(path.parts)
    }
    again, lines = _run(job)
    assert again == made
    assert not any("trials to run" in line or ("step " in line and "/6 |" in line) for line in lines)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.usefixtures("first")
def test_a_zero_stage_that_cannot_go_on_from_the_checkpoint_is_refused_before_a_worker_is_started(
    job_file: Path,
) -> None:
    job = read_job(job_file, ("kind=pretrain", "pretrain.zero_stage=0", "pretrain.steps=6"))
    checkpoints = Path(job.storage) / "pretrain/checkpoints"
    newest = max(checkpoints.glob("step-*/manifest.json"))
    manifest = json.loads(newest.read_text())
    newest.write_text(json.dumps({**manifest, "step": 5}))  # as if the run had not ended
    try:
        with pytest.raises(CheckpointError, match=r"zero_stage 1, this run has 0.*Set pretrain\.zero_stage=1.*--fork"):
            _run(job)
    finally:
        newest.write_text(json.dumps(manifest))


def test_more_workers_than_the_cluster_has_room_for_are_refused(job_file: Path, tmp_path: Path) -> None:
    job = read_job(
        job_file, ("kind=pretrain", "resources.num_workers=40", "pretrain.global_batch=40", f"storage={tmp_path}")
    )
    with pytest.raises(InputError, match=r"asks for 40 workers, but the cluster has room for 4"):
        _run(job)
