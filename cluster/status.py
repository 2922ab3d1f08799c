"""A job's storage -> how its run is doing, for the terminal (`status_terminal`) and for a browser (`status_server`).

    history.jsonl, faults.jsonl, manifests, trials, pictures  ->  `Status`: plain values, as small for a long run as for a short one

Only the storage is read, so it works from any machine, while the run goes on or after it died, and the run does not
notice: `Reader` keeps what it has read, and asks again by size and version; of files that only grow it reads what is new.
Nothing that lies there is trusted. A row that is not one is counted and left out, a file that is not what it should be is
named in `problems`, and the rest is shown. No text is escaped here: that is up to whoever shows it.
"""

import math
import os
import re
import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from p2r.data.manifest import load_manifest
from p2r.documents import read_json
from p2r.errors import InputError, StorageError, error_text
from p2r.job import find_job, read_job
from p2r.masking import masked
from p2r.storage import FileFacts, Storage

HISTORY = "pretrain/history.jsonl"
FAULTS = "pretrain/faults.jsonl"
FORMAT = "p2r-status/1"

SERIES = (
    *("loss", "images_per_s", "pixel_pairs_per_s", "wait_fraction", "gradient_norm", "learning_rate", "step_s"),
    *("memory_mib", "equivariance_error", "probe_dice", "skipped_steps", "checkpoint_s", "checkpoint_bytes"),
    *("world_size", "eta_s", "samples_seen", "num_replaced"),
)
"""Numbers of a report that are kept over the run."""
_NESTED = ("health", "loss_parts")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_MAX_NESTED = 8
_MAX_POINTS = 600
_MAX_STEP = 2**53
_MAX_HISTORY_BYTES = 2**28
_MAX_FILE_BYTES = 2**25
_OVERLAP_BYTES = 4096
_MAX_TEXT = 400
_MAX_FAULTS, _MAX_TRIALS, _MAX_CHECKPOINTS, _MAX_PICTURES, _MAX_VARIANTS, _MAX_COUNTERS = 200, 400, 50, 16, 50, 40
_TRIALS_AT_ONCE, _THREADS = 400, 8
_LOCAL_SLOW_S, _REMOTE_SLOW_S = 2.0, 10.0
_TRIAL = re.compile(r"finetune/[^/]+/trials/[^/]+\.json")
_PICTURE = re.compile(r"(?:report/pictures|corpus/report)/[A-Za-z0-9][A-Za-z0-9._-]*\.png")
_FIRST_PICTURES = ("view-pairs", "embedding-", "few-shot-", "variants", "outlines-", "case-")
_DEADLINE = "P2R_S3_DEADLINE_S"
_BROKEN = (InputError, ValueError, TypeError, KeyError, AttributeError, RecursionError)

Points = list[tuple[int, float]]
Found = TypeVar("Found")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Stage:
    """What is there of one stage of a job."""

    name: str
    text: str | None
    """None: nothing yet."""


@dataclass(frozen=True)
class Training:
    """How pretraining is doing."""

    step: int
    num_steps: int
    state: str
    """`running`, `silent` (no report for longer than was to be expected), or `done`."""
    written_at_s: float
    """When the newest report was written, by the storage's clock."""
    last: dict[str, float]
    """The newest value of every series."""
    negatives: str | None
    data: dict[str, float]
    """Counters of the first worker's stream."""


@dataclass(frozen=True)
class Trial:
    """One few-shot trial that has ended."""

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
class Sweep:
    """What fine-tuning has found so far."""

    num_search: int = 0
    num_final: int = 0
    num_unread: int = 0
    """Trials that have ended and are not read yet."""
    trials: tuple[Trial, ...] = ()
    curves: tuple[dict[str, Any], ...] = ()
    """Of final trials: task, split, mode, and points: labelled patients, mean Dice over draws, number of draws."""


@dataclass(frozen=True)
class Status:
    """All that there is to show. Times are seconds since 1970; names of files are relative to `url`."""

    name: str
    url: str
    stages: tuple[Stage, ...]
    training: Training | None
    series: dict[str, Points]
    """By name: step and value; long series keep the extremes of every interval."""
    resumed: tuple[dict[str, int], ...]
    """Where the run went on after a stop: `step` of the first report since, `from` the checkpoint's step."""
    faults: tuple[dict[str, Any], ...]
    checkpoints: tuple[dict[str, Any], ...]
    sweep: Sweep
    failed: tuple[dict[str, str], ...]
    """Trials that the report lists as failed, with reasons."""
    pictures: tuple[dict[str, str], ...]
    variants: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]
    format: str = FORMAT


def target_of(job_or_url: str, overrides: Sequence[str] = ()) -> tuple[str, Storage]:
    """Return the name and the storage of a job file, a URL or a folder.

    Raises:
        InputError: It is none of these, or overrides were given without a job.
    """
    path = Path(job_or_url)
    path = path if path.is_dir() else find_job(path)
    if "://" not in job_or_url and path.suffix in (".yaml", ".yml") and not path.is_dir():
        job = read_job(path, tuple(overrides))
        return job.name, _impatient(job.storage)
    if overrides:
        raise InputError(
            f"--set overrides fields of a job file, and {job_or_url} is a storage: give the job, or leave --set out"
        )
    if "://" not in job_or_url and not path.expanduser().is_dir():
        raise InputError(f"{job_or_url} is neither a job file (.yaml) nor the folder or URL of a job's storage")
    storage = _impatient(job_or_url)
    return storage.url.rstrip("/").rsplit("/", 1)[-1], storage


def _impatient(url: str) -> Storage:
    """Return a storage that gives up within seconds: who watches a run wants to know that its bucket does not answer."""
    before = os.environ.get(_DEADLINE)
    os.environ.setdefault(_DEADLINE, "20")
    try:
        return Storage(url)
    finally:
        if before is None:
            del os.environ[_DEADLINE]


class Reader:
    """Reads the status of a run again and again, each time only what has changed. One thread at a time may use it."""

    def __init__(self, name: str, storage: Storage) -> None:
        self._name, self._storage = name, storage
        self._history = _History(storage, HISTORY)
        self._faults = _Faults(storage, FAULTS)
        self._files: dict[str, tuple[FileFacts, Any]] = {}
        self._trials: dict[str, Trial | None] = {}
        self._num_unread = 0
        self._slow: dict[str, Any] = {}
        self._slow_at = -math.inf
        self._problems: list[str] = []

    def read(self) -> Status:
        """Return the status now.

        Raises:
            StorageError: The storage cannot be read, or nothing of a run lies there.
        """
        self._problems = []
        self._history.refresh()
        self._faults.refresh()
        slow_s = _LOCAL_SLOW_S if self._storage.is_local else _REMOTE_SLOW_S
        if time.monotonic() - self._slow_at > slow_s:
            self._slow = self._read_slow()
            self._slow_at = time.monotonic()
        slow, history = self._slow, self._history
        training = history.training()
        stages = (
            Stage("ingest", slow["corpus"]),
            Stage("pretrain", None if training is None else _training_line(training, len(slow["checkpoints"]))),
            Stage("publish", slow["backbones"]),
            Stage("finetune", _sweep_line(slow["sweep"])),
            Stage("report", slow["report"]),
        )
        if not (any(stage.text for stage in stages) or slow["variants"] or slow["checkpoints"] or self._problems):
            raise StorageError(
                f"{self._storage.url} holds no run: neither a corpus, nor pretrain/history.jsonl, backbones, trials or a report; "
                "give the job, or the storage that `p2r run` prints; a run that has just begun may not have written anything yet"
            )
        return Status(
            name=self._name,
            url=self._storage.url,
            stages=stages,
            training=training,
            series={name: _thinned(*points) for name, points in history.series.items()},
            resumed=tuple(history.resumed),
            faults=tuple(self._faults.rows[-_MAX_FAULTS:]),
            checkpoints=slow["checkpoints"],
            sweep=slow["sweep"],
            failed=slow["failed"],
            pictures=slow["pictures"],
            variants=slow["variants"],
            problems=(*history.problems(), *self._faults.problems(), *slow["problems"]),
        )

    def picture(self, path: str) -> bytes:
        """Return one of the pictures that `read` has listed.

        Raises:
            StorageError: It is not one of them, or no PNG of a reasonable size.
        """
        if path not in {one["path"] for one in self._slow.get("pictures", ())}:
            raise StorageError(f"{path} is not a picture of this run")
        facts = self._storage.facts(path)
        if facts is None or facts.num_bytes > _MAX_FILE_BYTES:
            raise StorageError(f"{self._storage.at(path)} is gone, or larger than {_MAX_FILE_BYTES >> 20} MiB")
        content = self._storage.read_bytes(path)
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise StorageError(f"{self._storage.at(path)} is no PNG")
        return content

    def _read_slow(self) -> dict[str, Any]:
        """What changes seldom, or takes a listing."""
        found = {
            "corpus": self._part("corpus/manifest.json", self._corpus, None),
            "backbones": self._part("backbones", self._backbones, None),
            "checkpoints": self._part("pretrain/checkpoints", self._checkpoints, ()),
            "sweep": self._part("finetune", self._sweep, Sweep()),
            "report": self._part("report", self._report, None),
            "failed": self._part("report/report.json", self._failed, ()),
            "pictures": self._part("report/pictures", self._pictures, ()),
            "variants": self._part("variants", self._variants, ()),
        }
        return {**found, "problems": tuple(self._problems)}

    def _part(self, path: str, read: Callable[[], Found], otherwise: Other) -> Found | Other:
        """Return what a part reads; of one that cannot be read, say so, and go on with the others."""
        try:
            return read()
        except StorageError as error:
            if "cannot " in str(error):  # the storage itself
                raise
            self._problems.append(_text(error))
        except _BROKEN as error:
            self._problems.append(_text(f"{self._storage.at(path)} cannot be used: {error_text(error)}"))
        return otherwise

    def _json(self, path: str) -> Any:
        """Return the JSON value in `path`, read again when it is another; None if it is absent."""
        facts = self._storage.facts(path)
        if facts is None:
            self._files.pop(path, None)
            return None
        known = self._files.get(path)
        if known is None or known[0] != facts:
            if facts.num_bytes > _MAX_FILE_BYTES:
                raise StorageError(f"{self._storage.at(path)} is larger than {_MAX_FILE_BYTES >> 20} MiB")
            known = self._files[path] = (facts, self._storage.read_json(path))
        return known[1]

    def _corpus(self) -> str | None:
        if self._json("corpus/manifest.json") is None:
            num_built = len(self._storage.list("corpus/receipts"))
            return f"{num_built} shards built, no revision yet" if num_built else None
        facts = self._files["corpus/manifest.json"][0]
        known = self._files.get("corpus")
        if known is None or known[0] != facts:
            known = self._files["corpus"] = (facts, load_manifest(self._storage.child("corpus")))
        manifest = known[1]
        return (
            f"{manifest['num_records']} scans, {manifest['num_samples']} planes, {len(manifest['shards'])} shards, "
            f"revision {manifest['revision']}"
        )

    def _backbones(self) -> str | None:
        names = [name for name in self._storage.list("backbones") if name.endswith("/manifest.json")]
        return ", ".join(self._storage.at(name.removesuffix("/manifest.json")) for name in names[:5]) or None

    def _report(self) -> str | None:
        for name in ("report/report.html", "report/report.md"):
            if self._storage.exists(name):
                return self._storage.at(name)
        return None

    def _checkpoints(self) -> tuple[dict[str, Any], ...]:
        found = []
        names = [name for name in self._storage.list("pretrain/checkpoints") if name.endswith("/manifest.json")]
        for name in names[-_MAX_CHECKPOINTS:]:
            manifest = self._part(name, lambda name=name: self._json(name), None)  # type: ignore[misc]
            if not isinstance(manifest, dict):
                continue
            files = manifest.get("files")
            sizes = [_mapping(entry).get("num_bytes") for entry in _mapping(files).values()]
            found.append(
                {
                    "step": _whole(manifest.get("step")),
                    "path": name.removesuffix("/manifest.json"),
                    "num_bytes": sum(size for size in sizes if isinstance(size, int)),
                    "world_size": _whole(manifest.get("world_size")),
                    "written_at_s": self._files[name][0].modified_s,
                }
            )
        return tuple(found)

    def _sweep(self) -> Sweep:
        names = [name for name in self._storage.list("finetune") if _TRIAL.fullmatch(name)]
        new = [name for name in names if name not in self._trials]
        if new:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="p2r-status") as pool:
                for name, trial in zip(new, pool.map(self._trial, new[:_TRIALS_AT_ONCE]), strict=False):
                    self._trials[name] = trial
        trials = [trial for name in names if (trial := self._trials.get(name)) is not None]
        bad = sum(name in self._trials and self._trials[name] is None for name in names)
        if bad:
            self._problems.append(f"{bad} files below {self._storage.at('finetune')} are no results of trials")
        finals = [trial for trial in trials if trial.purpose == "final"]
        return Sweep(
            num_search=sum(trial.purpose == "search" for trial in trials),
            num_final=len(finals),
            num_unread=max(0, len(new) - _TRIALS_AT_ONCE),
            trials=tuple(sorted(trials, key=_trial_order)[:_MAX_TRIALS]),
            curves=tuple(_curves(finals)),
        )

    def _trial(self, name: str) -> Trial | None:
        try:
            facts = self._storage.facts(name)
            if facts is None or facts.num_bytes > _MAX_FILE_BYTES:
                return None
            return _trial_of(self._storage.read_json(name))
        except _BROKEN:
            return None

    def _failed(self) -> tuple[dict[str, str], ...]:
        context = _mapping(_mapping(self._json("report/report.json")).get("context"))
        rows = [_mapping(row) for row in _listed(context.get("failed"))]
        return tuple(
            {"trial": _text(row.get("trial")), "reason": _text(row.get("failed", row.get("reason", row.get("error"))))}
            for row in rows[:_MAX_TRIALS]
        )

    def _pictures(self) -> tuple[dict[str, str], ...]:
        """The pictures that are there: first what the network sees, last the corpus."""
        captions = _mapping(_mapping(_mapping(self._json("report/report.json")).get("context")).get("captions"))
        names = [*self._storage.list("report/pictures"), *self._storage.list("corpus/report")]

        def order(name: str) -> tuple[int, str]:
            stem = name.rsplit("/", 1)[-1]
            ranks = [rank for rank, first in enumerate(_FIRST_PICTURES) if stem.startswith(first)]
            return (100 if name.startswith("corpus/") else min(ranks, default=50)), name

        found = []
        for name in sorted((name for name in names if _PICTURE.fullmatch(name)), key=order)[:_MAX_PICTURES]:
            facts = self._storage.facts(name)
            if facts is not None:
                stem = name.rsplit("/", 1)[-1].removesuffix(".png")
                otherwise = f"{'corpus: ' * name.startswith('corpus/')}{stem.replace('-', ' ')}"
                caption = _text(captions.get(stem)) or otherwise[:1].upper() + otherwise[1:]
                found.append({"path": name, "version": re.sub(r"\W", "", facts.version), "caption": caption})
        return tuple(found)

    def _variants(self) -> tuple[dict[str, Any], ...]:
        names = [name for name in self._storage.list("variants") if name.endswith("/" + HISTORY)]
        found = []
        for name in names[:_MAX_VARIANTS]:
            lines = _Lines(self._storage, name, most_bytes=2**16)
            lines.refresh()
            last: dict[str, Any] = next((row for row in reversed(lines.rows) if _step(row) is not None), {})
            found.append(
                {
                    "name": name.removeprefix("variants/").removesuffix("/" + HISTORY),
                    "step": _step(last),
                    "num_steps": _whole(last.get("num_steps")),
                    "loss": _number(last.get("loss")),
                }
            )
        return tuple(found)


class _Lines:
    """The whole lines of a file of JSON objects. What is appended is read alone; a file that was written anew is read anew."""

    def __init__(self, storage: Storage, path: str, *, most_bytes: int = _MAX_HISTORY_BYTES) -> None:
        self._storage, self._path, self._most_bytes = storage, path, most_bytes
        self.rows: list[dict[str, Any]] = []
        self.facts: FileFacts | None = None
        self._clear()

    def _clear(self) -> None:
        self.rows = []
        self._start, self._end, self._last, self._num_bad, self._is_half = 0, 0, b"", 0, False

    def refresh(self) -> None:
        """Read what has changed.

        Raises:
            StorageError: The storage cannot be read.
        """
        facts = self._storage.facts(self._path)
        if facts == self.facts:
            return
        if facts is None:
            self._clear()
        elif (added := self._added(facts)) is not None:
            self._take(added)
        else:
            self._clear()
            self._start = self._end = max(0, facts.num_bytes - self._most_bytes)
            if self._start:
                content = self._storage.read_range(self._path, self._start, facts.num_bytes)
                before, _, content = content.partition(b"\n")
                self._end += len(before) + 1
            else:
                content = self._storage.read_bytes(self._path)
            self._take(content)
        self.facts = facts

    def problems(self) -> Iterator[str]:
        """Say what was left out."""
        where = self._storage.at(self._path)
        if self._num_bad:
            rows = "1 row is" if self._num_bad == 1 else f"{self._num_bad} rows are"
            yield f"{where}: {rows} damaged and left out"
        if self._is_half:
            yield f"{where}: its last row is half-written and left out"
        if self._start:
            yield f"{where}: only its last {self._most_bytes >> 20} MiB are shown"

    def _added(self, facts: FileFacts) -> bytes | None:
        """Return what was appended; None if what was there before is not there any more."""
        if not self._last or facts.num_bytes < self._end:
            return None
        try:
            content = self._storage.read_range(self._path, self._end - len(self._last), facts.num_bytes)
        except StorageError:  # it has become shorter since
            return None
        return content[len(self._last) :] if content.startswith(self._last) else None

    def _take(self, content: bytes) -> None:
        whole, newline, rest = content.rpartition(b"\n")
        self._is_half = bool(rest.strip())
        whole += newline
        self._end += len(whole)
        self._last = (self._last + whole)[-_OVERLAP_BYTES:]
        for line in whole.splitlines():
            if line.strip():
                row = _object(line)
                if row is None or not self._use(row):
                    self._num_bad += 1

    def _use(self, row: dict[str, Any]) -> bool:
        self.rows.append(row)
        return True


class _Faults(_Lines):
    """`faults.jsonl`: what failed, what was decided, and from which step it went on."""

    def _use(self, row: dict[str, Any]) -> bool:
        texts = {name: _text(row.get(name)) for name in ("time", "cause", "what", "decision")}
        if not (texts["cause"] or texts["what"]):
            return False
        numbers = {name: _whole(row.get(name)) for name in ("attempt", "from_step", "count", "limit")}
        self.rows.append({**texts, **numbers})
        return True


class _History(_Lines):
    """`history.jsonl` as series of numbers; of rows only the newest is kept."""

    def _clear(self) -> None:
        super()._clear()
        self.series: dict[str, tuple[array[int], array[float]]] = {}
        self.resumed: list[dict[str, int]] = []
        self._newest: dict[str, Any] = {}
        self._gaps: deque[int] = deque(maxlen=20)

    def training(self) -> Training | None:
        """Return how pretraining is doing; None before the first report."""
        step = _step(self._newest)
        if step is None or self.facts is None:
            return None
        num_steps = _whole(self._newest.get("num_steps")) or 0
        age_s = max(0.0, time.time() - self.facts.modified_s)
        left, eta_s = num_steps - step, _number(self._newest.get("eta_s"))
        gap = statistics.median(self._gaps) if self._gaps else max(1, step)
        expected_s = gap * eta_s / left if eta_s is not None and left > 0 else 0.0
        is_silent = age_s > max(60.0, 5 * expected_s)
        negatives = self._newest.get("negatives")
        data = {
            name: number
            for name, value in list(_mapping(self._newest.get("data")).items())[:_MAX_COUNTERS]
            if (number := _number(value)) is not None
        }
        return Training(
            step=step,
            num_steps=num_steps,
            state="done" if step >= num_steps else "silent" if is_silent else "running",
            written_at_s=self.facts.modified_s,
            last=dict(_numbers(self._newest)),
            negatives=None if negatives is None else _text(negatives),
            data={_text(name): number for name, number in data.items()},
        )

    def _use(self, row: dict[str, Any]) -> bool:
        step = _step(row)
        if step is None:
            return False
        for name, value in _numbers(row):
            if name not in self.series and len(self.series) >= len(SERIES) + len(_NESTED) * _MAX_NESTED:
                continue
            steps, values = self.series.setdefault(name, (array("q"), array("d")))
            steps.append(step)
            values.append(value)
        resumed_from = _whole(row.get("resumed_from"))
        if resumed_from is not None:
            self.resumed.append({"step": step, "from": resumed_from})
        before = _step(self._newest)
        if before is not None and step > before:
            self._gaps.append(step - before)
        self._newest = row
        return True


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a report by name; nested ones as `health.alignment`."""
    for name in SERIES:
        if (number := _number(row.get(name))) is not None:
            yield name, number
    for group in _NESTED:
        for name, value in list(_mapping(row.get(group)).items())[:_MAX_NESTED]:
            if _NAME.fullmatch(name) and (number := _number(value)) is not None:
                yield f"{group}.{name}", number


def _thinned(steps: Sequence[int], values: Sequence[float]) -> Points:
    """Return at most `_MAX_POINTS` points: of every interval its lowest and its highest, so that no spike is lost."""
    num = len(steps)
    if num <= _MAX_POINTS:
        return list(zip(steps, values, strict=True))
    chosen = {0, num - 1}
    num_intervals = _MAX_POINTS // 2 - 1
    for interval in range(num_intervals):
        inside = range(num * interval // num_intervals, num * (interval + 1) // num_intervals)
        chosen |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    return [(steps[index], values[index]) for index in sorted(chosen)]


def _trial_of(result: Any) -> Trial:
    trial, row = _mapping(result["trial"]), _mapping(result.get("row"))
    settings = _mapping(trial.get("settings"))
    return Trial(
        id=_text(trial["id"]),
        task=_text(trial["task"]),
        mode=_text(trial["mode"]),
        purpose=_text(trial.get("purpose")),
        num_labelled=_whole(trial.get("num_labelled")),
        draw=_whole(trial.get("draw")),
        settings=_text(", ".join(f"{name} {value}" for name, value in settings.items())),
        validation_dice=_number(_mapping(result.get("validation")).get("dice_mean")),
        test_dice=_number(row.get("dice_mean")) if row.get("split") == "test" else None,
        seconds=_number(result.get("seconds")),
        stopped_at_step=_whole(result.get("stopped_at_step")),
    )


def _trial_order(trial: Trial) -> tuple[Any, ...]:
    return trial.task, trial.purpose, trial.num_labelled or 0, trial.mode, trial.draw or 0, trial.id


def _curves(finals: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    """Yield, for each task and mode, mean Dice over the draws that are there; on test patients if any trial read them."""
    for task in sorted({trial.task for trial in finals}):
        of_task = [trial for trial in finals if trial.task == task]
        split = "test" if any(trial.test_dice is not None for trial in of_task) else "validation"
        for mode in sorted({trial.mode for trial in of_task}):
            dice: dict[int, list[float]] = {}
            for trial in of_task:
                value = trial.test_dice if split == "test" else trial.validation_dice
                if trial.mode == mode and trial.num_labelled is not None and value is not None:
                    dice.setdefault(trial.num_labelled, []).append(value)
            points = [(number, statistics.fmean(found), len(found)) for number, found in sorted(dice.items())]
            if points:
                yield {"task": task, "split": split, "mode": mode, "points": points}


def _training_line(training: Training, num_checkpoints: int) -> str:
    loss = training.last.get("loss")
    return (
        f"step {training.step}/{training.num_steps}"
        + (f" | loss {loss:.4f}" if loss is not None else "")
        + f" | {num_checkpoints} checkpoints"
    )


def _sweep_line(sweep: Sweep) -> str | None:
    if not (sweep.num_search or sweep.num_final or sweep.num_unread):
        return None
    unread = f", {sweep.num_unread} not read yet" if sweep.num_unread else ""
    return f"{sweep.num_search} search and {sweep.num_final} final trials done{unread}"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = read_json(line, where="a row", max_bytes=_MAX_FILE_BYTES, nan_as_none=True)
    except InputError:
        return None
    return value if isinstance(value, dict) else None


def _step(row: Mapping[str, Any]) -> int | None:
    return _whole(row.get("step"))


def _whole(value: Any) -> int | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_STEP
    return value if is_whole else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return "" if value is None else _shortened(masked(str(value)))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
