"""Status of a run, read from its storage, for the terminal (`status_terminal`) and the browser (`status_server`).

    history.jsonl, faults.jsonl, manifests, trials, pictures  ->  `Status`: plain values, as small for a long run as for a short one

Only the storage is read, so this works from any machine, while the run continues or after it died, and without affecting it.
`Reader` caches what it has read and checks size and version before reading again; of growing files it reads only new rows.
Content is not trusted. An invalid row is counted and skipped, an unusable file is listed in `problems`, and the rest is shown.
Text is not escaped here: callers escape it for their output.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.status_files import Fault, Points, Resumption, Training
from p2r.errors import InputError
from p2r.job import find_job, read_job
from p2r.modes import MODES
from p2r.storage import Storage

FORMAT = "p2r-status/1"
_DEADLINE = "P2R_S3_DEADLINE_S"


@dataclass(frozen=True)
class Stage:
    """Result of one stage of a job."""

    name: str
    text: str | None
    """None: no result yet."""


@dataclass(frozen=True)
class TrialState:
    """A few-shot trial that has ended."""

    id: str
    task: str
    mode: str
    purpose: str
    num_labelled: int | None
    draw: int | None
    settings: str
    validation_dice: float | None
    test_dice: float | None
    seconds: float | None
    stopped_at_step: int | None


@dataclass(frozen=True)
class FewShotCurve:
    """Final trials of one task and mode."""

    task: str
    split: str
    mode: str
    points: list[tuple[int, float, int]]
    """Number of labelled patients, mean Dice over the draws so far, and number of these draws."""


@dataclass(frozen=True)
class Sweep:
    """Results of fine-tuning so far."""

    num_search: int = 0
    num_final: int = 0
    num_unread: int = 0
    """Trials that have ended but are not read yet."""
    trials: tuple[TrialState, ...] = ()
    curves: tuple[FewShotCurve, ...] = ()
    mode_titles: dict[str, str] = field(default_factory=lambda: {mode: facts.title for mode, facts in MODES.items()})
    """Title of every mode, in the order of `p2r.modes`."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint; None: its manifest does not state a valid number."""

    step: int | None
    path: str
    num_bytes: int
    world_size: int | None
    written_at_s: float


@dataclass(frozen=True)
class FailedTrial:
    """A trial that the report lists as failed."""

    trial: str
    reason: str


@dataclass(frozen=True)
class ShownPicture:
    """A picture of the report or of the corpus."""

    path: str
    version: str
    caption: str


@dataclass(frozen=True)
class Variant:
    """Progress of a variant of an ablation."""

    name: str
    step: int | None
    num_steps: int | None
    loss: float | None


@dataclass(frozen=True)
class Status:
    """Complete status of a run. Times are seconds since 1970; file names are relative to `url`."""

    name: str
    url: str
    stages: tuple[Stage, ...]
    training: Training | None
    series: dict[str, Points]
    """By name: step and value; long series keep the extremes of every interval."""
    resumed: tuple[Resumption, ...]
    faults: tuple[Fault, ...]
    checkpoints: tuple[SavedCheckpoint, ...]
    sweep: Sweep
    failed: tuple[FailedTrial, ...]
    pictures: tuple[ShownPicture, ...]
    variants: tuple[Variant, ...]
    problems: tuple[str, ...]
    format: str = FORMAT

    def to_json(self) -> dict[str, object]:
        """Return the status as JSON values, as `p2r status --json` prints it."""
        return asdict(self, dict_factory=lambda items: {name.rstrip("_"): value for name, value in items})


def target_of(job_or_url: str, overrides: Sequence[str] = ()) -> tuple[str, Storage]:
    """Return the name and the storage of a job file, a URL or a folder.

    Raises:
        InputError: It is none of these, or overrides were given without a job.
    """
    path = Path(job_or_url)
    path = path if path.is_dir() else find_job(path)
    if "://" not in job_or_url and path.suffix in (".yaml", ".yml") and not path.is_dir():
        job = read_job(path, tuple(overrides))
        return job.name, _open_with_short_deadline(job.storage)
    if overrides:
        raise InputError(
            f"--set overrides fields of a job file, and {job_or_url} is a storage: give the job, or leave --set out"
        )
    if "://" not in job_or_url and not path.expanduser().is_dir():
        raise InputError(f"{job_or_url} is neither a job file (.yaml) nor the folder or URL of a job's storage")
    storage = _open_with_short_deadline(job_or_url)
    return storage.url.rstrip("/").rsplit("/", 1)[-1], storage


def _open_with_short_deadline(url: str) -> Storage:
    """Return a storage with a short deadline, so that a viewer soon learns that the bucket does not answer."""
    before = os.environ.get(_DEADLINE)
    os.environ.setdefault(_DEADLINE, "20")
    try:
        return Storage(url)
    finally:
        if before is None:
            del os.environ[_DEADLINE]
