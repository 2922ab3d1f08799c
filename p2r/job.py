"""Job files: one YAML file is one job, validated into a frozen model.

    YAML + `--set key=value` -> no secrets -> environment variables filled in, in paths and URLs -> no secrets -> `Job`

Errors name the key's full path, the rule and the way out. The file is self-contained: the same job runs under Ray
(`p2r run`), as the entrypoint of a Ray job, and in one process (`python -m p2r`).
"""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from p2r.config import FilledIn, FinetuneConfig, IngestConfig, Location, PretrainConfig, PublishConfig, Section
from p2r.config.findings import child_annotations, explain_finding, flatten_annotation
from p2r.console import visible
from p2r.documents import MAX_DEPTH, read_start
from p2r.errors import JobError
from p2r.exports import reason_against
from p2r.masking import is_secret_name, looks_secret
from p2r.plain_yaml import MAX_YAML_BYTES, read_yaml
from p2r.stages import KINDS

Model = TypeVar("Model", bound=BaseModel)
Kind = Literal["ingest", "pretrain", "publish", "finetune", "pipeline", "ablation"]

FORK_HELP = (
    "start a new run at step 0 from the newest checkpoint's weights, in <storage>-NAME (or NAME, if a URL); the same command "
    "resumes it"
)

# Not "p2r": a folder of that name in the home directory may hide the package from Python started there.
_DEFAULT_FOLDER = "p2r-runs"
_ABLATION_RULE = (
    "kind ablation needs finetune.score_on: validation, since a recipe chosen on test patients proves nothing"
)
_ALLOW_TRANSDUCTIVE = "finetune.allow_transductive=true"
JOB_VARIABLES = {
    "P2R_SCANS": "ingest.sources",
    "P2R_LICENCE": "ingest.licence",
    "P2R_PROVENANCE": "ingest.provenance",
    "P2R_CORPUS": "pretrain.corpus",
    "P2R_BACKBONE": "finetune.backbone",
    "P2R_TASK": "finetune.tasks",
}
"""Environment variables that jobs read in place of a key, besides `P2R_DATA`, which is set for every job."""
_ARTEFACT_KEYS = ("pretrain.init_from", "finetune.backbone")
_SHOWN = 30  # findings of a model in a message
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class Resources(Section):
    """Resources that the job requests from the cluster. They do not affect its results."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] | Literal["auto"] = "auto"
    """Number of pretraining processes. auto: the cluster's GPUs (CPUs where it has none), reduced until the global batch is divisible.
    [min, max]: as many as fit in this range and can share the batch; the run shrinks when nodes are lost, and grows when they
    return."""
    resize_interval_s: PositiveFloat = 60
    """Interval at which a run with [min, max] workers checks for more room, s; growing costs a checkpoint and a restart."""
    node_wait_s: NonNegativeFloat = 1800
    """Longest wait for room on the cluster after nodes were lost, s; then pretraining fails."""
    collective_timeout_s: PositiveFloat = 600
    """Time after which a collective operation between workers counts as hung and the workers are restarted, s. Must exceed the longest
    delay by one worker: writing a checkpoint, compiling, slow storage."""
    network_interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Network interface between workers, such as eth0. None: NCCL and gloo choose. That fails on nodes with several interfaces if the
    first does not reach the other nodes."""
    nccl: dict[Annotated[str, Field(pattern=r"^(TORCH_)?NCCL_[A-Z0-9_]+$")], str] = Field(default={})
    """NCCL variables for the workers, such as {NCCL_IB_HCA: mlx5}. Those in the environment of `p2r run` are also passed on; these take
    precedence. Defaults: TORCH_NCCL_ASYNC_ERROR_HANDLING=1 (a hung collective ends the worker), NCCL_DEBUG=WARN."""
    cpus_per_worker: PositiveFloat = 1
    """CPU cores reserved for each pretraining process."""
    gpus_per_worker: Literal[0, 1, "auto"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """GPUs of each pretraining process. auto: one, if the cluster has any. A fraction lets variants of an ablation share a GPU and its
    memory: 0.25 puts four on one. It needs num_workers: 1, because NCCL has one rank on each GPU."""
    cpus_per_trial: PositiveFloat = 1
    """CPU cores of one fine-tuning trial."""
    gpus_per_trial: NonNegativeFloat | Literal["auto"] = "auto"
    """GPU share of one fine-tuning trial; 0.25 puts four on one GPU. auto: 0.25, if the cluster has any."""
    cpus_per_ingest_task: PositiveFloat = 1
    """CPU cores of one ingest task (one shard)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers [min, max] must not decrease, got {list(self.num_workers)}")
        if self.gpus_per_worker not in (0, 1, "auto") and self.num_workers != 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} needs num_workers: 1, because NCCL refuses two workers of a run on one GPU"
            )
        return self


class MetricsConfig(Section):
    """Prometheus endpoint of every process of the job. Metrics hold no secrets and no patient names, but need no password to read."""

    host: Annotated[str, Field(min_length=1)] | None = None
    """Address to listen on. 0.0.0.0: all of the node's addresses, for a Prometheus on another machine. None: each node's
    `$P2R_METRICS_HOST`, or 127.0.0.1."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port to listen on. 0: any free port, stated in the folder. Otherwise the first of 64 ports; every process of a node takes the next
    free one. None: each node's `$P2R_METRICS_PORT`, or 0."""
    folder: Location | None = None
    """Folder on each node with one file per process, for Prometheus (`file_sd_configs`). None: `$P2R_METRICS_FOLDER`, or
    `~/.cache/p2r/metrics`."""


class AshaConfig(Section):
    """Asynchronous successive halving (ASHA) of an ablation's variants by their online probes, under Ray (`p2r run`) only.

    At `grace_steps`, and at each multiple of it by a power of `reduction_factor`, a variant is stopped if its probe Dice is not among
    the best 1 / `reduction_factor` of the variants that have reached this step so far. Source: Li et al., MLSys 2020, algorithm 2.
    """

    grace_steps: PositiveInt | None = None
    """Steps before which no variant is stopped. None: the interval of the probe."""
    reduction_factor: Annotated[float, Field(gt=1, le=1000)] = 3
    """After each of these steps, about one of this many variants continues."""


class Job(Section):
    """A job file."""

    kind: Kind
    """Stage to run. pipeline: all stages and the report, in order. ablation: the same for every variant, on one corpus."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    """Name of the job; the last folder of the default storage."""
    storage: Location = ""
    """URL (`file://`, `s3://`) that holds everything the job makes. Default: `${P2R_STORAGE}/<name>`, or `~/p2r-runs/<name>`."""
    retries: NonNegativeInt = 2
    """Number of times a failed trial is restarted before the job fails. Pretraining: failures in a row without a new checkpoint, so that
    a long run is not stopped by machines that fail now and then. Preemption does not count."""
    resources: Resources = Resources()
    """Resources that the job requests from the cluster."""
    metrics: MetricsConfig | None = MetricsConfig()
    """Prometheus endpoints of the job's processes, under Ray (`p2r run`) only. null: no port is opened."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        default=(), exclude_if=lambda names: not names
    )
    """Trackers that the driver sends metrics, settings, and the report's table and pictures to; pictures show slices of patients. Addresses
    and keys come from the tools' environment variables. A resumed job continues its runs; a tracker that fails is switched off with a
    warning. Each pretrained variant of an ablation has a run of its own."""
    ingest: IngestConfig | None = None
    """Scans -> corpus. In a pretrain job: used if the corpus is absent."""
    pretrain: PretrainConfig | None = None
    """Corpus -> representation."""
    publish: PublishConfig | None = None
    """Checkpoint -> published backbone."""
    finetune: FinetuneConfig | None = None
    """Backbone -> few-shot results."""
    variants: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")], dict[str, object]] = Field(default={})
    """Ablation only: changes of each variant to the sections above, as dotted keys and values. `p2r run` pretrains as many at a time as
    the cluster has room for, and runs the trials of all together; `python -m p2r` runs one variant after another."""
    asha: AshaConfig | None = Field(default=None, exclude_if=lambda section: section is None)
    """Ablation under Ray only: stop the pretraining of variants whose online probe falls behind. The table names them with their last
    step. None: every variant is trained to its end. Needs `pretrain.probe`, the same for all variants."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = KINDS[self.kind].sections
        if self.kind == "ablation" and self.finetune and self.finetune.backbone is not None:
            needed = ("finetune",)  # all variants use one backbone
        missing = [stage for stage in needed if getattr(self, stage) is None]
        if missing:
            raise ValueError(f"kind {self.kind} needs the section{'s' * (len(missing) > 1)} {', '.join(missing)}")
        if self.kind == "finetune" and self.finetune and self.finetune.backbone is None and self.publish is None:
            raise ValueError(
                "kind finetune needs finetune.backbone (a URL), or a publish section that names a backbone of this storage"
            )
        if self.ingest is not None and self.pretrain is not None and self.pretrain.corpus is not None:
            raise ValueError(
                f"pretrain.corpus names a corpus ({self.pretrain.corpus}), and the section ingest would make another, unused one: "
                "leave out one of them (--set ingest=null, or --set pretrain.corpus=null)"
            )
        if (self.kind == "ablation") != bool(self.variants):
            raise ValueError("kind ablation needs variants, and no other kind has them")
        if self.kind == "ablation" and self.finetune and self.finetune.score_on != "validation":
            raise ValueError(_ABLATION_RULE)
        if self.asha is not None and (self.kind != "ablation" or self.pretrain is None or self.pretrain.probe is None):
            raise ValueError(
                "asha compares the online probes of an ablation's variants: it needs kind ablation and pretrain.probe"
            )
        if self.ingest is not None and self.pretrain is not None:
            self.pretrain.check_sessions(self.ingest.sessions)
        self._check_exports()
        return self

    def _check_exports(self) -> None:
        if self.publish is None or self.pretrain is None:
            return
        model = self.pretrain.model
        for name in self.publish.exports:
            reason = reason_against(
                name,
                network=model.name,
                level=model.level,
                normalisation=model.normalisation,
                num_contrasts=model.in_channels,
            )
            if reason is not None:
                raise ValueError(f"publish.exports {name}: {reason}")


def jobs_folder() -> Path:
    """Return the folder of the jobs that come with p2r: inside the package in a wheel, beside it in a clone."""
    package = Path(__file__).parent
    return package / "jobs" if (package / "jobs").is_dir() else package.parent / "jobs"


def find_job(path: Path) -> Path:
    """Return the path of a job file: `path`, or a job that comes with p2r if `demo` or `jobs/demo.yaml` is not a file."""
    brought = jobs_folder() / f"{path.name.removesuffix('.yaml')}.yaml"
    is_name = path.parent.as_posix() in (".", "jobs")
    return brought if is_name and not path.is_file() and brought.is_file() else path


def read_job(path: Path, overrides: tuple[str, ...] = (), *, unset: dict[str, str] | None = None) -> Job:
    """Read a job file and apply `key=value` overrides.

    Args:
        path: The YAML file, or the name of a job that comes with p2r (`find_job`). Task paths inside it are made absolute,
            relative to its folder.
        overrides: Dotted keys with YAML values, such as `pretrain.steps=20`.
        unset: If given, collects environment variables that are not set instead of refusing them: for validation on a
            machine without the data.

    Raises:
        JobError: The job is invalid; names the file, the key, the rule and the value.
    """
    path = find_job(path)
    try:
        content = read_start(path, max_bytes=MAX_YAML_BYTES)
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(brought.stem for brought in jobs_folder().glob("*.yaml")))
        raise JobError(
            f"job {path} cannot be read: {error}; give the path of a YAML file, or the name of a job that comes with p2r: "
            f"{names}{nearest_file(path)}"
        ) from None
    values = read_yaml(content, where=f"job {path}", error=JobError)
    if not isinstance(values, dict):
        raise JobError(f"job {path} must be a mapping that begins with `kind:`, found {type(values).__name__}")
    for override in overrides:
        if override == _ALLOW_TRANSDUCTIVE and not values.get("finetune"):
            raise JobError(f"job {path} has no finetune section: --allow-transductive does not apply")
        _apply_override(values, override)
    _refuse_secrets(values, path, ())
    missing: dict[str, str] = {}
    values = _fill_in_values(values, [Job], path, (), missing)
    if unset is not None:
        unset |= missing
    elif missing:
        keys = ", ".join(where.rpartition(": ")[2] for where in missing.values())
        one = len(missing) == 1
        raise JobError(
            f"job {path}: environment variable{'' if one else 's'} {', '.join(missing)} {'is' if one else 'are'} not set ({keys}); set "
            f"{'it' if one else 'them'}, as in {' '.join(f'{name}=...' for name in missing)} p2r run {path}"
        )
    _refuse_secrets(values, path, ())
    job = validated(Job, values, where=f"job {path}")
    storage = job.storage or f"{os.environ.get('P2R_STORAGE') or Path.home() / _DEFAULT_FOLDER}/{job.name}"
    _refuse_secrets({"storage": storage}, path, ())
    if "://" not in storage and not storage.startswith("~") and not Path(storage).is_absolute():
        raise JobError(
            f"job {path}: storage must be a URL or an absolute path, got {storage!r}: "
            "a relative folder would vanish with the job's working directory on a cluster"
        )
    job = _make_files_absolute(
        _make_tasks_absolute(job.model_copy(update={"storage": storage}), path.absolute().parent)
    )
    variants_of(job)
    return job


def ignored_variables(path: Path, job: Job) -> list[str]:
    """Return a note for each set variable that some job of p2r reads, but neither this job nor its tasks.

    Args:
        path: The job file.
        job: Result of `read_job`.
    """
    subjects = None if job.ingest is None else job.ingest.subjects_of
    tasks = [*(job.finetune.tasks if job.finetune else ()), *([subjects.task] if subjects else [])]
    texts = [file.read_text(encoding="utf-8") for file in (find_job(path), *map(Path, tasks)) if file.is_file()]
    read = {match[1] for text in texts for match in _VARIABLE.finditer(text)}
    return [
        f"{name} is set, but job {path} does not read it: give {key} by --set {key}=..., or use a job that reads it"
        for name, key in JOB_VARIABLES.items()
        if os.environ.get(name) and name not in read
    ]


def nearest_file(path: Path) -> str:
    """Return a question that names the YAML file closest to a missing path; empty if there is none."""
    folders = [path.parent, Path("jobs"), jobs_folder(), jobs_folder() / "tasks"]
    there = {str(file): file for folder in folders if folder.is_dir() for file in folder.glob("*.y*ml")}
    stems = {name: file.stem for name, file in there.items()}
    close = difflib.get_close_matches(path.stem, stems.values(), n=1, cutoff=0.5)
    found = [name for name, stem in stems.items() if close and stem == close[0]]
    return f"; did you mean {min(found, key=len)}?" if found else ""


def overrides_of(set_: Sequence[str] | None, *, allow_transductive: bool) -> tuple[str, ...]:
    """Return the overrides given by a command line's `--set` and `--allow-transductive`."""
    return (*(set_ or ()), *((_ALLOW_TRANSDUCTIVE,) if allow_transductive else ()))


def variants_of(job: Job) -> dict[str, Job]:
    """Return the jobs of an ablation by name: each stored below `<storage>/variants`, on the corpus of the ablation.

    Raises:
        JobError: A variant is invalid; names the variant, the key and the rule.
    """
    found = {}
    for name, changes in job.variants.items():
        values = job.model_dump(exclude={"variants", "asha"})
        for key, value in changes.items():
            *parents, last = key.split(".")
            target = values
            if not parents:
                raise JobError(f"variants.{name}: {key} is not a key of a section, such as pretrain.steps")
            for parent in parents:
                target = target.get(parent)  # type: ignore[assignment]
                if not isinstance(target, dict):
                    raise JobError(f"variants.{name}: {key} is not a key of this job")
            target[last] = value
        values["kind"], values["ingest"] = "finetune", None  # the ablation itself makes the corpus
        values["storage"] = f"{job.storage}/variants/{name}"
        if values["pretrain"] is not None and values["pretrain"]["corpus"] is None:
            values["pretrain"]["corpus"] = f"{job.storage}/corpus"
        if values["finetune"]["score_on"] != "validation":
            raise JobError(f"variants.{name}: {_ABLATION_RULE}")
        found[name] = variant = validated(Job, values, where=f"variants.{name}")
        probes = [one.pretrain.probe for one in (job, variant) if one.pretrain is not None]
        if job.asha is not None and len(set(map(repr, probes))) > 1:
            raise JobError(f"variants.{name}: asha compares online probes, so no variant may change pretrain.probe")
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a job file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema(), "title": "p2r job"}


def validated(model: type[Model], values: object, *, where: str) -> Model:
    """Validate `values`, and report pydantic's findings in one message.

    Raises:
        JobError: One line per finding: the key's full path, the rule, the value, and the nearest valid name.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        findings = error.errors(include_url=False)
        lines = [explain_finding(model, finding) for finding in findings[:_SHOWN]]
        lines += [f"and {len(findings) - _SHOWN:,} more"] if len(findings) > _SHOWN else []
        raise JobError(f"{where} is not valid:\n" + "\n".join(f"  {line}" for line in lines)) from None


def fill_in_variables(text: str, *, where: str, unset: dict[str, str] | None = None) -> str:
    """Replace `${NAME}` and `${NAME:-default}` by environment variables; collect unset ones in `unset` if it is given.

    Raises:
        JobError: A variable is not set, or is a secret by its name or value.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        if is_secret_name(name) or looks_secret(os.environ.get(name, "")):
            raise JobError(f"{where}: environment variable {name} holds a secret and is not filled in; {_SECRET_RULE}")
        found = os.environ.get(name) or default
        if found is None and unset is not None:
            unset[name] = where
            return match.group()
        if found is None:
            raise JobError(f"{where}: environment variable {name} is not set; set it, or write ${{{name}:-default}}")
        return found

    return _VARIABLE.sub(value, text)


def _apply_override(values: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise JobError(f"--set {override}: write KEY=VALUE, as in --set pretrain.steps=20")
    target = values
    *parents, last = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise JobError(f"--set {override:.80}...: a key has at most {MAX_DEPTH} parts, got {len(parents) + 1:,}")
    for depth, parent in enumerate(parents):
        child = target.setdefault(parent, {}) or {}
        if not isinstance(child, dict):
            raise JobError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value and has no keys below it")
        target[parent] = target = child
    target[last] = read_yaml(text, where=f"--set {key}", error=JobError)


def _refuse_secrets(value: Any, path: Path, key: tuple[str, ...]) -> None:
    where = ".".join(key)
    if isinstance(value, dict):
        for name, child in value.items():
            if is_secret_name(str(name)):
                shown = visible(".".join((*key, str(name))))
                raise JobError(f"job {path}: key {shown} looks like a secret; {_SECRET_RULE}")
            _refuse_secrets(child, path, (*key, str(name)))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _refuse_secrets(child, path, (*key, str(index)))
    elif isinstance(value, str) and looks_secret(value):
        raise JobError(f"job {path}: the value of {visible(where)} looks like a secret; {_SECRET_RULE}")


_SECRET_RULE = "credentials come from the environment only (AWS_ACCESS_KEY_ID and the like), never from a job file"


def _fill_in_values(
    value: Any, annotations: Sequence[Any], path: Path, key: tuple[str, ...], unset: dict[str, str] | None
) -> Any:
    """Return a job's values with variables filled in; `annotations` are the model's type annotations of this value.

    Raises:
        JobError: A variable is not set or is a secret, or the field is neither a path nor a URL.
    """
    if isinstance(value, dict):
        return {
            name: _fill_in_values(child, _annotations_at(annotations, key, str(name)), path, (*key, str(name)), unset)
            for name, child in value.items()
        }
    if isinstance(value, list):
        below = [annotation for one in annotations for annotation in child_annotations(one, None)]
        return [_fill_in_values(child, below, path, (*key, str(index)), unset) for index, child in enumerate(value)]
    if not isinstance(value, str) or not annotations or not (match := _VARIABLE.search(value)):
        return value
    where = f"job {path}: {visible('.'.join(key))}"
    if not any(isinstance(part, FilledIn) for annotation in annotations for part in flatten_annotation(annotation)):
        raise JobError(
            f"{where}: ${{{match[1]}}} is not filled in here, because this field is published. Variables are allowed in paths, "
            "URLs, and a corpus's licence and provenance. "
            f"Write the value itself, or give it with --set {visible('.'.join(key))}=VALUE"
        )
    return fill_in_variables(value, where=where, unset=unset)


def _annotations_at(annotations: Sequence[Any], key: tuple[str, ...], name: str) -> list[Any]:
    """Return the annotations of a key; for a key of a variant, those that the changed field has in its section."""
    if len(key) != 2 or key[0] != "variants":
        return [annotation for one in annotations for annotation in child_annotations(one, name)]
    found: list[Any] = [Job]
    for part in name.split("."):
        found = [annotation for one in found for annotation in child_annotations(one, part)]
    return found


def _make_tasks_absolute(job: Job, folder: Path) -> Job:
    update: dict[str, object] = {}
    if job.finetune is not None:
        tasks = tuple(str(folder / task) for task in job.finetune.tasks)
        update["finetune"] = job.finetune.model_copy(update={"tasks": tasks})
    if job.pretrain is not None and job.pretrain.probe is not None:
        probe = job.pretrain.probe.model_copy(update={"task": str(folder / job.pretrain.probe.task)})
        update["pretrain"] = job.pretrain.model_copy(update={"probe": probe})
    if job.ingest is not None and job.ingest.subjects_of is not None:
        chosen = job.ingest.subjects_of.model_copy(update={"task": str(folder / job.ingest.subjects_of.task)})
        update["ingest"] = job.ingest.model_copy(update={"subjects_of": chosen})
    return job.model_copy(update=update)


def _make_files_absolute(job: Job) -> Job:
    """Resolve relative paths of backbones and weights against the current folder; workers run in folders of their own."""
    update: dict[str, object] = {}
    if job.pretrain is not None and job.pretrain.init_from is not None:
        update["pretrain"] = job.pretrain.model_copy(update={"init_from": _absolute(job.pretrain.init_from)})
    if job.finetune is not None and job.finetune.backbone is not None:
        update["finetune"] = job.finetune.model_copy(update={"backbone": _absolute(job.finetune.backbone)})
    update["variants"] = {
        name: {key: _absolute(value) if key in _ARTEFACT_KEYS else value for key, value in changes.items()}
        for name, changes in job.variants.items()
    }
    return job.model_copy(update=update)


def _absolute(value: Any) -> Any:
    if not isinstance(value, str) or not value or "://" in value or value.startswith(("/", "~")) or "${" in value:
        return value
    return str(Path(value).absolute())
