"""A finished job costs nothing when it is run again, and every change of its inputs or results makes it run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.table import Table

from p2r.fewshot.results import FailedTrial
from p2r.job import Job, read_job
from p2r.pipeline import finished
from p2r.pipeline.finished import digest_inputs, record_finished, recorded_outputs
from p2r.pipeline.outputs import Outputs
from p2r.storage import Storage


@pytest.fixture
def path(write_toy_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose storage is as after its last stage, by a commit without changes."""
    monkeypatch.setattr("p2r.pipeline.finished.code_version", lambda: "0123456789ab")
    path = write_toy_job(tmp_path)
    job = read_job(path)
    storage = Storage(job.storage)
    storage.write_json("report/report.json", {"rows": []})
    storage.write_bytes("models/disc/all/manifest.json", b"{}")
    record_finished(job, storage, made_of(job), inputs=digest_inputs(job))
    return path


def made_of(job: Job) -> Outputs:
    return Outputs(job.storage, report=f"{job.storage}/report/report.md", models={"disc": "url"}, table=Table())


def test_a_finished_job_gives_what_it_made_with_its_table(path: Path) -> None:
    made = recorded_outputs(read_job(path))
    assert made is not None and made.table is not None and made.table.row_count == 0
    assert made == made_of(read_job(path))


def test_any_change_of_job_code_task_or_result_makes_it_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = read_job(path)
    assert job.finetune is not None
    task = Path(job.finetune.tasks[0])
    storage = Path(job.storage.removeprefix("file://"))
    for changed in (next(iter(sorted((task.parent / "images").iterdir()))), task, storage / "report/report.json"):
        before = changed.stat()
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert recorded_outputs(job) is None, changed
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert recorded_outputs(job) is not None
    assert recorded_outputs(read_job(path, ("pretrain.steps=7",))) is None
    assert recorded_outputs(read_job(path, ("kind=ingest",))) is None, "there may be more scans"
    (storage / "models/disc/all/manifest.json").unlink()
    assert recorded_outputs(job) is None
    (storage / "finished.json").write_text("[]")
    assert recorded_outputs(job) is None, "a broken record is none"
    assert digest_inputs(read_job(path, ("kind=ingest",))) == ""


@pytest.mark.parametrize("version", ["0123456789ab-dirty", "unknown"])
def test_code_without_a_commit_is_identified_by_its_files(
    path: Path, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, committed = read_job(path), digest_inputs(read_job(path))
    monkeypatch.setattr("p2r.pipeline.finished.code_version", lambda: version)
    shutil.copytree(Path(finished.__file__).parents[1], tmp_path / "p2r", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(finished, "__file__", str(tmp_path / "p2r/pipeline/finished.py"))
    before = digest_inputs(job)
    assert committed != before == digest_inputs(job) != ""
    with (tmp_path / "p2r/loss/info_nce.py").open("a") as file:
        file.write("# changed")
    assert digest_inputs(job) != before


def test_what_is_unfinished_or_failed_has_no_record(path: Path) -> None:
    job = read_job(path)
    (Path(job.storage.removeprefix("file://")) / "finished.json").unlink()
    made = made_of(job)
    for partial in (replace(made, unfinished="pretrain"), replace(made, failed=(FailedTrial(trial="a", reason="b"),))):
        record_finished(job, Storage(job.storage), partial, inputs=digest_inputs(job))
        assert recorded_outputs(job) is None


def test_running_a_finished_job_again_does_not_import_torch(path: Path) -> None:
    code = "import runpy, sys; sys.argv[0] = 'p2r'; runpy.run_module('p2r', run_name='__main__')"
    probe = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    record = Path(read_job(path).storage.removeprefix("file://")) / "finished.json"
    environment = {**os.environ, "P2R_COMMIT": "0123456789ab"}
    command = [sys.executable, "-c", probe + code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert "this job is finished" in done.stderr and "disc: url" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert json.loads(record.read_text())["format"] == 1
