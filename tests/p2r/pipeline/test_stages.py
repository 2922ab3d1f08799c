"""The whole pipeline with everything it makes in a bucket of a real S3 server."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import p2r
from p2r.data.corpus import check_selection
from p2r.errors import DataError, JobError
from p2r.job import Job, read_job
from p2r.pipeline.local import LocalExecutor
from p2r.pipeline.stages import _select_subjects, run_job
from p2r.storage import Storage


@pytest.mark.s3
def test_a_bucket_holds_everything_that_a_job_makes(
    write_toy_job: Callable[..., Path], s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    overrides = (f"storage={s3_url}/toy", "finetune.num_labelled=[1]", "finetune.steps=4", "pretrain.steps=4")
    job = read_job(write_toy_job(tmp_path), overrides)
    made = run_job(job, LocalExecutor(torch.device("cpu"), None), say=lambda line: None)
    assert made.report == f"{s3_url}/toy/report/report.md"
    storage = Storage(job.storage)
    assert storage.read_json("report/report.json")["rows"]
    assert storage.exists("report/pictures/few-shot-disc.png")
    assert p2r.load_backbone(made.backbone or "")(torch.rand(1, 1, 32, 32)).shape == (1, 4, 32, 32)

    lines: list[str] = []
    run_job(job, LocalExecutor(torch.device("cpu"), None), say=lines.append)
    assert f"ingest | {s3_url}/toy/corpus is complete" in lines
    assert not [line for line in lines if "| step " in line], lines


def _job(folder: Path, **ingest: object) -> Job:
    """A job on eight scans that the default pattern would take for one subject's, and a task whose pattern tells them apart."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(1, 9):
            (folder / kind / f"scan_{number:02d}.nii.gz").write_bytes(b"not read")
    (folder / "images/scan_30.nii.gz").write_bytes(b"without labels")
    (folder / "task.yaml").write_text(
        "name: t\ntitle: T\nimages: images\nlabels: labels\nlicence: CC0-1.0\nclasses: {1: x}\ncohort: ours\nunlabelled: leave_out\n"
        "subject_pattern: ^scan_(\\d+)\nsplit_rule: {validation: 2, test: 2}\n"
    )
    section = {"sources": [str(folder / "images")], "licence": "CC0-1.0", **ingest}
    values = {"kind": "ingest", "name": "x", "storage": str(folder / "storage"), "ingest": section}
    return Job.model_validate(values)


def test_the_task_that_chooses_the_subjects_gives_pattern_and_cohort(tmp_path: Path) -> None:
    chosen = {"task": str(tmp_path / "task.yaml"), "split": "train"}
    config, subjects = _select_subjects(_job(tmp_path, subjects_of=chosen).ingest)  # type: ignore[arg-type]
    assert (config.subject_pattern, config.cohort) == (r"^scan_(\d+)", "ours")
    assert subjects is not None and len(subjects) == 4
    check_selection(config, allowed_subjects=subjects)
    config, everybody = _select_subjects(_job(tmp_path, subjects_of={**chosen, "split": "not_held_out"}).ingest)  # type: ignore[arg-type]
    assert everybody == subjects | {"30"}  # who has no labels is pretrained on; who is held out is not
    with pytest.raises(JobError, match=r"ingest\.cohort is 'theirs'.*leave ingest\.cohort out"):
        _select_subjects(_job(tmp_path, subjects_of=chosen, cohort="theirs").ingest)  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match=r"none of the 9 scans .*ingest\.subject_pattern '\^\(scan\)'.*scan.*selected: 0"
    ):
        run_job(
            _job(tmp_path, subjects_of=chosen, subject_pattern="^(scan)"),
            LocalExecutor(torch.device("cpu"), None),
            say=lambda line: None,
        )
