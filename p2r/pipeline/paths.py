"""Checks of a job or task before it runs: every path is followed, and no voxel is read.

    job -> its tasks -> their folders -> scans, label maps and splits; sources, corpora, backbones, storage; numbers of workers

`p2r validate`, `p2r run` and `python -m p2r` share these checks. Only sections that the job's kind uses are checked. Buckets are
not read: a job may be validated on a machine without its keys.
"""

import re
from collections.abc import Iterator, Set
from pathlib import Path

from p2r.data.names import local_path, unquoted_hint
from p2r.data.order import allowed_world_sizes, check_world_size, sizes_for_micro_batch, world_sizes_between
from p2r.documents import read_start
from p2r.engine.history import read_history
from p2r.engine.report import HISTORY
from p2r.errors import DataError, InputError, JobError
from p2r.evaluate.splits import HELD_OUT
from p2r.evaluate.task_files import Task, load_task, read_task_config
from p2r.job import Job, find_job, ignored_variables, nearest_file, read_job, variants_of
from p2r.logs import duration
from p2r.plain_yaml import MAX_YAML_BYTES, read_yaml
from p2r.pointers import file_of
from p2r.reference import names_weights_file, parse_reference
from p2r.stages import KINDS
from p2r.storage import Storage

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


def task_facts(path: Path, *, unset: dict[str, str] | None = None) -> Iterator[str]:
    """Look for the files of a task, and yield lines that describe it.

    Args:
        path: The task's YAML.
        unset: If given, collects environment variables that are not set, with their keys, instead of refusing them.

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
    if task.config.unlabelled == "use":
        yield f"task {task.name}: {len(task.unlabelled)} scans without label maps, for modes that learn from unlabelled patients"
    if config.contrasts is not None:
        counts = {name: sum(name in scan.contrasts for scan in task.scans) for name in config.contrasts}
        yield f"task {task.name}: cases by contrast: {', '.join(f'{name} {count}' for name, count in counts.items())}"


def job_facts(path: Path, overrides: tuple[str, ...]) -> tuple[Job, list[str], list[str]]:
    """Read a job, and follow every path that it uses.

    Returns:
        The job; names of unset variables; lines that describe the targets of its paths.

    Raises:
        InputError: A path leads nowhere, or a setting cannot work; names the key of the first.
    """
    unset: dict[str, str] = {}
    job = read_job(path, overrides, unset=unset)
    facts = [*_describe(path, job, unset)]
    facts += [f"note: {note}" for note in (*ignored_variables(path, job), *_gpu_notes(job))]
    if ranks := allowed_ranks(job):
        facts.append(f"pretrain on {', '.join(map(str, ranks))} workers")
    if job.kind == "ablation":
        facts.append(_variants_fact(job))
    return job, list(unset), facts


def _variants_fact(job: Job) -> str:
    """Return a line on the pretrainings that run at a time, and on their length."""
    runs = {name: one.pretrain for name, one in variants_of(job).items() if one.pretrain is not None}
    if not runs:
        return f"{len(job.variants)} variants without pretraining; p2r run runs the trials of all together"
    resources = job.resources
    gpus = "one GPU" if resources.gpus_per_worker in (1, "auto") else f"{resources.gpus_per_worker:g} GPU"
    cpus = f"{resources.cpus_per_worker:g} CPU{'s' * (resources.cpus_per_worker > 1)}"
    each = f"{cpus} each" if resources.gpus_per_worker == 0 else f"{cpus} each, with GPUs also {gpus}"
    wanted = resources.num_workers
    if isinstance(wanted, int):
        room = f"all at once on {len(runs) * wanted} workers ({each}), and in turns on fewer"
    else:
        room = f"all at once on {len(runs)} workers ({each}), and in turns on fewer; each gets an equal part of more"
    longest, total = max(run.steps for run in runs.values()), sum(run.steps for run in runs.values())
    length = f"{longest:,} steps at once, {total:,} one after another"
    seconds = _measured_step_s(job)
    if seconds is not None:
        length += (
            f" ({duration(longest * seconds)} and {duration(total * seconds)} at {seconds:.3g} s a step, measured)"
        )
    stopped = "; asha stops variants that fall behind" if job.asha is not None else ""
    return f"{len(runs)} variants: p2r run pretrains {room}: {length}{stopped}"


def _measured_step_s(job: Job) -> float | None:
    """Return the largest step time of the variants that have run in a local storage; None if there is none."""
    folder = local_path(f"{job.storage}/variants")
    if folder is None:
        return None
    found = []
    for file in folder.expanduser().glob(f"*/pretrain/{HISTORY}"):
        rows = read_history(Storage(str(file.parent)), file.name)
        found += [row.step_s for row in rows[-1:] if row.step_s is not None]
    return max(found, default=None)


def check_job(path: Path, job: Job) -> None:
    """Refuse a job that `p2r validate` would refuse.

    Args:
        path: Path of the job file, for messages.
        job: The job; none of its variables is unset.

    Raises:
        InputError: as `job_facts`.
    """
    for _ in _describe(path, job, None):
        pass
    allowed_ranks(job)


def allowed_ranks(job: Job) -> list[int]:
    """Return the numbers of workers that can share the job's global batch; empty for a job that does not pretrain.

    Raises:
        InputError: The number in the job cannot.
    """
    if job.pretrain is None or "pretrain" not in _used_sections(job):
        return []
    wanted, micro_batch = job.resources.num_workers, job.pretrain.micro_batch
    if isinstance(wanted, int):
        check_world_size(job.pretrain.global_batch, wanted)
        sizes_for_micro_batch(job.pretrain.global_batch, [wanted], micro_batch)
    sizes = allowed_world_sizes(job.pretrain.global_batch)
    if isinstance(wanted, tuple):
        sizes = world_sizes_between(job.pretrain.global_batch, *wanted)
    return sizes_for_micro_batch(job.pretrain.global_batch, sizes, micro_batch)


def _used_sections(job: Job) -> set[str]:
    kind = KINDS[job.kind]
    # Pretraining ingests if the corpus is absent.
    return {*kind.sections, *kind.stages, *(["ingest"] if "pretrain" in kind.sections else [])}


def _describe(path: Path, job: Job, unset: dict[str, str] | None) -> Iterator[str]:
    used = _used_sections(job)
    sources = [*job.ingest.sources] if job.ingest is not None and "ingest" in used else []
    artefacts, tasks = _list_artefacts(job, used), _list_tasks(job, used)
    for variant in variants_of(job).values():
        # The ablation makes this corpus before its variants start.
        artefacts += [(key, url) for key, url in _list_artefacts(variant, used) if url != f"{job.storage}/corpus"]
        tasks += _list_tasks(variant, used)
    for key, text in (("storage", job.storage), *(("ingest.sources", source) for source in sources), *artefacts):
        _refuse_placeholder(text, f"job {path}: {key}")
    for source in sources:
        yield from _source_facts(source, f"job {path}: ingest.sources")
    for key, url in artefacts:
        _check_artefact(url, f"job {path}: {key}")
    for key, task in {Path(task).resolve(): (key, task) for key, task in reversed(tasks)}.values():
        try:
            yield from task_facts(Path(task), unset=unset)
        except DataError as error:
            raise DataError(f"job {path}: {key}: {error}") from None
    _check_precision(path, job, used)


def _check_precision(path: Path, job: Job, used: Set[str]) -> None:
    """Refuse a precision that CPUs do not have."""
    is_tf32 = job.pretrain is not None and "pretrain" in used and job.pretrain.precision == "tf32"
    if is_tf32 and job.resources.gpus_per_worker == 0:
        raise InputError(
            f"job {path}: pretrain.precision tf32 needs GPUs, and resources.gpus_per_worker is 0: set the precision to fp32"
        )


def _gpu_notes(job: Job) -> Iterator[str]:
    """Yield a note on settings that make GPUs slow."""
    config, gpus = job.pretrain, job.resources.gpus_per_worker
    if config is None or "pretrain" not in _used_sections(job):
        return
    if gpus == 1 or (gpus == "auto" and config.precision != "fp32"):
        # Imported here: the engine takes seconds to import.
        import torch

        from p2r.engine.objectives import explain_missing_kernels

        if (reason := explain_missing_kernels(config, device=torch.device("cpu"))) is not None:
            yield f"on GPUs, {reason}"


def _split_facts(task: Task) -> Iterator[str]:
    for split in ("train", *HELD_OUT):
        subjects = task.subjects[split]
        scans = task.scans_of(subjects)
        more = f" ({len(scans)} scans)" * (len(scans) != len(subjects))
        yield f"{len(subjects)} patients {'to train' if split == 'train' else 'for ' + split}{more}"


def _list_artefacts(job: Job, used: Set[str]) -> list[tuple[str, str]]:
    """Return key and URL of every corpus or artefact that a job takes from elsewhere."""
    found: list[tuple[str, str]] = []
    if job.pretrain is not None and "pretrain" in used:
        corpus = job.pretrain.corpus
        urls = [corpus] if isinstance(corpus, str) else [share.url for share in corpus or ()]
        found += [("pretrain.corpus", url) for url in urls]
        if job.pretrain.init_from is not None:
            found.append(("pretrain.init_from", job.pretrain.init_from))
    if job.finetune is not None and job.finetune.backbone is not None and "finetune" in used:
        found.append(("finetune.backbone", job.finetune.backbone))
    return found


def _list_tasks(job: Job, used: Set[str]) -> list[tuple[str, str]]:
    """Return key and path of every task."""
    found = [("finetune.tasks", task) for task in (job.finetune.tasks if job.finetune and "finetune" in used else ())]
    if job.ingest is not None and job.ingest.subjects_of is not None and "ingest" in used:
        found.append(("ingest.subjects_of", job.ingest.subjects_of.task))
    if job.pretrain is not None and job.pretrain.probe is not None and "pretrain" in used:
        found.append(("pretrain.probe", job.pretrain.probe.task))
    return found


def _source_facts(source: str, where: str) -> Iterator[str]:
    if _VARIABLE.search(source) or source.startswith("template://"):
        return
    path = local_path(source)
    if path is None:
        yield f"not checked: {source}"
    elif not path.expanduser().exists():
        raise DataError(f"{where}: {source} does not exist; get the data, or correct the path{unquoted_hint(source)}")


def _check_artefact(url: str, where: str) -> None:
    path = local_path(url.partition("@sha256:")[0])
    if _VARIABLE.search(url) or path is None:
        return
    if names_weights_file(url):
        if not path.expanduser().is_file():
            raise DataError(f"{where}: {url} does not exist; correct the path of the weights file{unquoted_hint(url)}")
        return
    if (path.expanduser() / "manifest.json").is_file():
        return
    reference = parse_reference(url)
    versions = None if reference.pointer is None else local_path(reference.url)
    if reference.pointer is not None and versions is not None and versions.is_dir():
        if not (versions.expanduser() / file_of(reference.pointer)).is_file():
            raise DataError(
                f"{where}: {versions} has no pointer {reference.pointer}: p2r promote makes it; or name a version, as p2r list shows them"
            )
    else:
        raise DataError(
            f"{where}: {url} has no manifest.json: nothing was made or published there; correct the URL{unquoted_hint(url)}"
        )


def _refuse_placeholder(text: str, where: str) -> None:
    if match := _PLACEHOLDER.search(text):
        raise InputError(f"{where} is {text!r}: {match[0]} is a placeholder; write your own in its place")
