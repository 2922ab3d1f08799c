"""`p2r validate`: follow every path that a job or task names, without reading a voxel.

    job -> its tasks -> their folders -> scans, label maps and splits; sources, corpora, backbones, storage

Buckets are not read: a job may be validated on a machine without its keys.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from p2r.documents import read_start
from p2r.errors import DataError, InputError, JobError
from p2r.evaluate.task_files import HELD_OUT, Task, load_task, read_task_config
from p2r.job import Job, find_job, ignored_variables, nearest_file, read_job
from p2r.plain_yaml import MAX_YAML_BYTES, read_yaml
from p2r.pointers import file_of
from p2r.reference import names_weights_file, parse_reference

_PLACEHOLDER = re.compile(
    r"your[-_ ]?(bucket|folder|path|data|name|scans)|^/?path/to/|<[^<>]+>|change[-_]?me|example\.(com|org)|\bTODO\b",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\$\{[A-Za-z_]\w*\}")


def is_task(path: Path) -> bool:
    """Return whether a file is a task rather than a job: a mapping with classes, and no kind.

    Raises:
        InputError: The file cannot be read, or is not YAML.
    """
    try:
        content = read_start(find_job(path), max_bytes=MAX_YAML_BYTES)
    except OSError as error:
        raise JobError(
            f"job {path} cannot be read: {error}; give the path of a YAML file{nearest_file(path)}"
        ) from None
    values = read_yaml(content, where=str(path), error=JobError)
    return isinstance(values, dict) and "classes" in values and "kind" not in values


def task_facts(path: Path, *, unset: dict[str, str]) -> Iterator[str]:
    """Look for the files of a task, and yield lines that describe it.

    Args:
        path: The task's YAML.
        unset: Environment variables that are not set are noted here, with their keys.

    Raises:
        DataError: See `load_task`.
    """
    config = read_task_config(path, unset=unset)
    for folder in config.image_folders:
        _refuse_placeholder(folder, f"task {path}: images")
    _refuse_placeholder(config.labels, f"task {path}: labels")
    if any(folder.startswith("template://") for folder in config.image_folders):
        yield f"task {config.name}: virtual subjects, made when they are needed"
        return
    if any(_VARIABLE.search(folder) for folder in (*config.image_folders, config.labels)):
        yield f"task {config.name}: not read: images {', '.join(config.image_folders)}, labels {config.labels}"
        return
    task = load_task(path, unset=unset)
    yield f"task {task.name}: {len(task.scans)} scans with label maps; " + "; ".join(_split_facts(task))
    if config.contrasts is not None:
        counts = {name: sum(name in scan.contrasts for scan in task.scans) for name in config.contrasts}
        yield f"task {task.name}: cases by contrast: {', '.join(f'{name} {count}' for name, count in counts.items())}"


def job_facts(path: Path, overrides: tuple[str, ...]) -> tuple[Job, list[str], list[str]]:
    """Follow every path of a job.

    Returns:
        The job; names of unset variables; lines that describe the targets of its paths.

    Raises:
        InputError: A path leads nowhere; names the key of the first.
    """
    unset: dict[str, str] = {}
    job = read_job(path, overrides, unset=unset)
    facts = [*_describe_paths(path, job, unset)]
    return job, list(unset), facts


def _describe_paths(path: Path, job: Job, unset: dict[str, str]) -> Iterator[str]:
    for key, text in _list_paths(job):
        _refuse_placeholder(text, f"job {path}: {key}")
    for source in job.ingest.sources if job.ingest else ():
        yield from _source_facts(source, f"job {path}: ingest.sources")
    for key, url in _list_artefacts(job):
        _check_artefact(url, f"job {path}: {key}")
    for key, task in _list_tasks(job):
        try:
            yield from task_facts(Path(task), unset=unset)
        except DataError as error:
            raise DataError(f"job {path}: {key}: {error}") from None
    yield from (f"note: {note}" for note in (*ignored_variables(path, job), *_gpu_notes(path, job)))


def _gpu_notes(path: Path, job: Job) -> Iterator[str]:
    """Yield a note on settings that make GPUs slow; refuse a precision that CPUs do not have."""
    config, gpus = job.pretrain, job.resources.gpus_per_worker
    if config is None:
        return
    if config.precision == "tf32" and gpus == 0:
        raise InputError(
            f"job {path}: pretrain.precision tf32 needs GPUs, and resources.gpus_per_worker is 0: set the precision to fp32"
        )
    if gpus == 1 or (gpus == "auto" and config.precision != "fp32"):
        # Imported here: the engine takes seconds to import.
        import torch

        from p2r.engine.step import explain_missing_kernels

        if (reason := explain_missing_kernels(config, device=torch.device("cpu"))) is not None:
            yield f"on GPUs, {reason}"


def _split_facts(task: Task) -> Iterator[str]:
    for split in ("train", *HELD_OUT):
        subjects = task.subjects[split]
        scans = task.scans_of(subjects)
        more = f" ({len(scans)} scans)" * (len(scans) != len(subjects))
        yield f"{len(subjects)} patients {'to train' if split == 'train' else 'for ' + split}{more}"


def _list_paths(job: Job) -> Iterator[tuple[str, str]]:
    yield "storage", job.storage
    for source in job.ingest.sources if job.ingest else ():
        yield "ingest.sources", source
    yield from _list_artefacts(job)


def _list_artefacts(job: Job) -> Iterator[tuple[str, str]]:
    """Yield key and URL of every corpus or artefact that a job takes from elsewhere."""
    if job.pretrain is not None:
        corpus = job.pretrain.corpus
        urls = [corpus] if isinstance(corpus, str) else [share.url for share in corpus or ()]
        yield from (("pretrain.corpus", url) for url in urls)
        if job.pretrain.init_from is not None:
            yield "pretrain.init_from", job.pretrain.init_from
    if job.finetune is not None and job.finetune.backbone is not None:
        yield "finetune.backbone", job.finetune.backbone


def _list_tasks(job: Job) -> list[tuple[str, str]]:
    """Return key and path of every task, without duplicate paths."""
    named = [("finetune.tasks", task) for task in (job.finetune.tasks if job.finetune else ())]
    if job.ingest is not None and job.ingest.subjects_of is not None:
        named.append(("ingest.subjects_of", job.ingest.subjects_of.task))
    if job.pretrain is not None and job.pretrain.probe is not None:
        named.append(("pretrain.probe", job.pretrain.probe.task))
    return list({Path(task).resolve(): (key, task) for key, task in reversed(named)}.values())[::-1]


def _source_facts(source: str, where: str) -> Iterator[str]:
    if _VARIABLE.search(source) or source.startswith("template://"):
        return
    if "://" in source and not source.startswith("file://"):
        yield f"not checked: {source}"
        return
    path = Path(source.removeprefix("file://")).expanduser()
    if not path.exists():
        raise DataError(f"{where}: {source} does not exist; get the data, or correct the path")


def _check_artefact(url: str, where: str) -> None:
    if _VARIABLE.search(url) or ("://" in url and not url.startswith("file://")):
        return
    reference = parse_reference(url)
    path = Path(reference.url.removeprefix("file://")).expanduser()
    if names_weights_file(url):
        if not path.is_file():
            raise DataError(f"{where}: {url} does not exist; correct the path of the weights file")
        return
    if reference.pointer is not None:
        if not (path / file_of(reference.pointer)).is_file():
            raise DataError(
                f"{where}: {path} has no pointer {reference.pointer}: p2r promote makes it; or name a version"
            )
        return
    if not (path / "manifest.json").is_file():
        raise DataError(f"{where}: {url} has no manifest.json: nothing was made or published there; correct the URL")


def _refuse_placeholder(text: str, where: str) -> None:
    if match := _PLACEHOLDER.search(text):
        raise InputError(f"{where} is {text!r}: {match[0]} is a placeholder; write your own in its place")
