"""Record of a finished job, so that running it again costs no import of torch and no drawing.

`record_finished` writes `<storage>/finished.json` after the last stage: a digest of all inputs, the results, and the state of every
file below `report/`, `backbones/` and `models/`. `recorded_outputs` returns the results if job, code, tasks, scans, label maps and
files are unchanged. After any change the stages run again, and do only the work that is missing.

A job of kind ingest is never finished, because its sources may have more scans. Code with changes that are not committed is
identified by the digest of its files.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from p2r.artefact import RESULTS
from p2r.errors import P2RError
from p2r.evaluate.rows import TrialRow
from p2r.evaluate.task_files import load_task, read_task_config
from p2r.job import Job
from p2r.pipeline.outputs import Outputs
from p2r.pointers import pointer_in, resolve
from p2r.reference import parse_reference
from p2r.report import table
from p2r.storage import Storage, json_bytes
from p2r.version import code_version

_RECORD = "finished.json"
_FOLDERS = ("report", "backbones", "models")
_KINDS = ("pipeline", "pretrain", "publish", "finetune")
_MAX_BYTES = 16 << 20


class _Record(BaseModel):
    """`finished.json`."""

    model_config = ConfigDict(strict=True)
    inputs: str
    made: dict[str, Any]
    files: dict[str, list[int | str]]


def recorded_outputs(job: Job) -> Outputs | None:
    """Return the result of a finished job, as `run_job` returns it; None if anything is left to do, or has changed."""
    if not _is_recorded(job):
        return None
    storage = Storage(job.storage)
    try:
        if not storage.exists(_RECORD):
            return None
        record = _Record.model_validate(storage.read_json(_RECORD, max_bytes=_MAX_BYTES))
        if record.inputs != digest_inputs(job) or record.files != _states(storage):
            return None
        made = Outputs(**record.made)
        if made.report is None:
            return made
        rows = storage.read_json("report/report.json")["rows"]
        return replace(made, table=table([TrialRow.model_validate(row) for row in rows]))
    except (P2RError, ValidationError, KeyError, TypeError):  # the stages will report the cause
        return None


def record_finished(job: Job, storage: Storage, made: Outputs, *, inputs: str) -> None:
    """Write the record of a finished job.

    Args:
        job: The job.
        storage: Its storage.
        made: The result of its stages; nothing is written if a part is unfinished or failed.
        inputs: `digest_inputs` of the job, from before its first stage.
    """
    if not _is_recorded(job) or made.unfinished is not None or made.failed:
        return
    content = json_bytes({"format": 1, "inputs": inputs, "made": made.outputs(), "files": _states(storage)})
    if not (storage.exists(_RECORD) and storage.read_bytes(_RECORD, max_bytes=_MAX_BYTES) == content):
        storage.write_bytes(_RECORD, content)


def digest_inputs(job: Job) -> str:
    """Return a digest of job, code, tasks, and size and time of every scan and label map of the tasks; empty if no record is kept.

    Raises:
        InputError: as `load_task`.
    """
    if not _is_recorded(job):
        return ""
    tasks = {path: list(_task_states(path)) for path in _tasks_of(job)}
    named = [str(resolve(parse_reference(url))) for url in _pointers_of(job)]
    inputs = [job.model_dump(mode="json"), _code(), tasks, *([named] if named else [])]
    return hashlib.sha256(json_bytes(inputs)).hexdigest()


def _pointers_of(job: Job) -> Iterator[str]:
    """Yield the references of a job whose version may have changed since."""
    named = None if job.finetune is None else job.finetune.backbone
    if named is not None and parse_reference(named).pointer is not None:
        yield named


def _is_recorded(job: Job) -> bool:
    return job.kind in _KINDS


def _code() -> str:
    """Return the commit of the code; if it is unknown or was changed, a digest of p2r's files."""
    version = code_version()
    if version != "unknown" and not version.endswith("-dirty"):
        return version
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(json_bytes([path.relative_to(package).as_posix(), path.read_bytes().hex()]))
    return digest.hexdigest()


def _tasks_of(job: Job) -> list[str]:
    tasks = list(job.finetune.tasks) if job.finetune is not None else []
    if job.ingest is not None and job.ingest.subjects_of is not None:
        tasks.append(job.ingest.subjects_of.task)
    if job.pretrain is not None and job.pretrain.probe is not None:
        tasks.append(job.pretrain.probe.task)
    return sorted(set(tasks))


def _task_states(path: str) -> Iterator[tuple[str, int, int]]:
    files = [Path(path)]
    folders = read_task_config(Path(path)).image_folders
    if not any(folder.startswith("template://") for folder in folders):  # those are generated, and never change
        task = load_task(Path(path))
        files += [file for scan in task.scans for file in scan.files]
        files += [file for scan in task.unlabelled for file in scan.files]
    for file in files:
        state = file.stat() if file.exists() else file.lstat()  # a link may lead nowhere: reading says so
        yield str(file), state.st_size, state.st_mtime_ns


def _states(storage: Storage) -> dict[str, list[int | str]]:
    """Return size and version of every file that a finished job is judged by."""
    paths = [path for folder in _FOLDERS for path in storage.list(folder) if not _changes_later(path)]
    return {path: list(storage.version(path)) for path in (*paths, *_existing(storage))}


def _changes_later(path: str) -> bool:
    """Return whether a file beside published versions is changed by other commands: pointers, and results of later jobs."""
    name = path.rpartition("/")[2]
    return name == RESULTS or pointer_in(name) is not None


def _existing(storage: Storage) -> Iterator[str]:
    yield from (path for path in ("corpus/manifest.json", "pretrain/history.jsonl") if storage.exists(path))
