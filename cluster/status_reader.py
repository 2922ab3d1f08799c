"""Reader of a job's storage: builds its `Status` part by part, and reads a part again only if it may have changed."""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.status import (
    FailedTrial,
    FewShotCurve,
    SavedCheckpoint,
    ShownPicture,
    Stage,
    Status,
    Sweep,
    TrialState,
    Variant,
)
from cluster.status_files import (
    FAULTS,
    HISTORY,
    FaultFile,
    GrowingFile,
    HistoryFile,
    Training,
    step_of_row,
    thinned_points,
)
from cluster.status_values import (
    MAX_CHECKPOINTS,
    MAX_FAULTS,
    MAX_FILE_BYTES,
    MAX_PICTURES,
    MAX_TRIALS,
    MAX_VARIANTS,
    finite_number,
    list_or_empty,
    mapping_or_empty,
    masked_text,
    whole_number,
)
from p2r.data.manifest import describe_records, load_manifest
from p2r.errors import InputError, StorageError, error_text
from p2r.storage import FileFacts, Storage

_TRIALS_AT_ONCE, _THREADS = 400, 8
_LOCAL_SLOW_S, _REMOTE_SLOW_S = 2.0, 10.0
_TRIAL = re.compile(r"finetune/[^/]+/trials/[^/]+\.json")
_PICTURE = re.compile(r"(?:report/pictures|corpus/report)/[A-Za-z0-9][A-Za-z0-9._-]*\.png")
_FIRST_PICTURES = ("view-pairs", "embedding-", "few-shot-", "variants", "outlines-", "case-")
_BROKEN = (InputError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
Found = TypeVar("Found")
Other = TypeVar("Other")


@dataclass(frozen=True)
class _Slow:
    """Parts of a status that change seldom or need a listing."""

    corpus: str | None
    backbones: str | None
    checkpoints: tuple[SavedCheckpoint, ...]
    sweep: Sweep
    report: str | None
    failed: tuple[FailedTrial, ...]
    pictures: tuple[ShownPicture, ...]
    variants: tuple[Variant, ...]
    problems: tuple[str, ...]


class Reader:
    """Reads the status of a run repeatedly, each time only the changes. Not thread-safe."""

    def __init__(self, name: str, storage: Storage) -> None:
        self._name, self._storage = name, storage
        self._history = HistoryFile(storage, HISTORY)
        self._faults = FaultFile(storage, FAULTS)
        self._files: dict[str, tuple[FileFacts, Any]] = {}
        self._trials: dict[str, TrialState | None] = {}
        self._num_unread = 0
        self._slow: _Slow | None = None
        self._slow_at = -math.inf
        self._problems: list[str] = []

    def read(self) -> Status:
        """Return the current status.

        Raises:
            StorageError: The storage cannot be read, or holds no run.
        """
        self._problems = []
        self._history.refresh()
        self._faults.refresh()
        slow_s = _LOCAL_SLOW_S if self._storage.is_local else _REMOTE_SLOW_S
        if self._slow is None or time.monotonic() - self._slow_at > slow_s:
            self._slow = self._read_slow()
            self._slow_at = time.monotonic()
        slow, history = self._slow, self._history
        training = history.training()
        stages = (
            Stage("ingest", slow.corpus),
            Stage("pretrain", None if training is None else _training_line(training, len(slow.checkpoints))),
            Stage("publish", slow.backbones),
            Stage("finetune", _sweep_line(slow.sweep)),
            Stage("report", slow.report),
        )
        if not (any(stage.text for stage in stages) or slow.variants or slow.checkpoints or self._problems):
            raise StorageError(
                f"{self._storage.url} holds no run: neither a corpus, nor pretrain/history.jsonl, backbones, trials or a report. "
                "Give the job, or the storage that `p2r run` prints. A run that has just started may not have written anything yet"
            )
        return Status(
            name=self._name,
            url=self._storage.url,
            stages=stages,
            training=training,
            series={name: thinned_points(*points) for name, points in history.series.items()},
            resumed=tuple(history.resumed),
            faults=tuple(self._faults.faults[-MAX_FAULTS:]),
            checkpoints=slow.checkpoints,
            sweep=slow.sweep,
            failed=slow.failed,
            pictures=slow.pictures,
            variants=slow.variants,
            problems=(*history.problems(), *self._faults.problems(), *slow.problems),
        )

    def picture(self, path: str) -> bytes:
        """Return a picture listed by `read`.

        Raises:
            StorageError: It is not listed, or not a PNG of a reasonable size.
        """
        if self._slow is None or path not in {one.path for one in self._slow.pictures}:
            raise StorageError(f"{path} is not a picture of this run")
        facts = self._storage.facts(path)
        if facts is None or facts.num_bytes > MAX_FILE_BYTES:
            raise StorageError(f"{self._storage.at(path)} is gone, or larger than {MAX_FILE_BYTES >> 20} MiB")
        content = self._storage.read_bytes(path)
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise StorageError(f"{self._storage.at(path)} is not a PNG")
        return content

    def _read_slow(self) -> "_Slow":
        return _Slow(
            corpus=self._read_part("corpus/manifest.json", self._read_corpus, None),
            backbones=self._read_part("backbones", self._read_backbones, None),
            checkpoints=self._read_part("pretrain/checkpoints", self._read_checkpoints, ()),
            sweep=self._read_part("finetune", self._read_sweep, Sweep()),
            report=self._read_part("report", self._read_report, None),
            failed=self._read_part("report/report.json", self._read_failed, ()),
            pictures=self._read_part("report/pictures", self._read_pictures, ()),
            variants=self._read_part("variants", self._read_variants, ()),
            problems=tuple(self._problems),  # the arguments are evaluated in this order
        )

    def _read_part(self, path: str, read: Callable[[], Found], otherwise: Other) -> Found | Other:
        """Return the result of `read`; if it fails, record the problem and return `otherwise`."""
        try:
            return read()
        except StorageError as error:
            if "cannot " in str(error):  # the storage itself
                raise
            self._problems.append(masked_text(error))
        except _BROKEN as error:
            self._problems.append(masked_text(f"{self._storage.at(path)} cannot be used: {error_text(error)}"))
        return otherwise

    def _read_json(self, path: str) -> Any:
        """Return the JSON value in `path`, read again if the file changed; None if it is absent."""
        facts = self._storage.facts(path)
        if facts is None:
            self._files.pop(path, None)
            return None
        known = self._files.get(path)
        if known is None or known[0] != facts:
            if facts.num_bytes > MAX_FILE_BYTES:
                raise StorageError(f"{self._storage.at(path)} is larger than {MAX_FILE_BYTES >> 20} MiB")
            known = self._files[path] = (facts, self._storage.read_json(path))
        return known[1]

    def _read_corpus(self) -> str | None:
        if self._read_json("corpus/manifest.json") is None:
            num_built = len(self._storage.list("corpus/receipts"))
            return f"{num_built} shards built, no revision yet" if num_built else None
        state = self._files["corpus/manifest.json"][0]
        known = self._files.get("corpus")
        if known is None or known[0] != state:
            known = self._files["corpus"] = (state, load_manifest(self._storage.child("corpus")))
        manifest = known[1]
        facts = manifest.facts
        return (
            f"{describe_records(facts)}, {facts.num_samples} planes, {len(facts.shards)} shards, "
            f"revision {facts.revision}"
        )

    def _read_backbones(self) -> str | None:
        names = [name for name in self._storage.list("backbones") if name.endswith("/manifest.json")]
        return ", ".join(self._storage.at(name.removesuffix("/manifest.json")) for name in names[:5]) or None

    def _read_report(self) -> str | None:
        for name in ("report/report.html", "report/report.md"):
            if self._storage.exists(name):
                return self._storage.at(name)
        return None

    def _read_checkpoints(self) -> tuple[SavedCheckpoint, ...]:
        found = []
        names = [name for name in self._storage.list("pretrain/checkpoints") if name.endswith("/manifest.json")]
        for name in names[-MAX_CHECKPOINTS:]:
            manifest = self._read_part(name, lambda name=name: self._read_json(name), None)  # type: ignore[misc]
            if not isinstance(manifest, dict):
                continue
            files = manifest.get("files")
            sizes = [mapping_or_empty(entry).get("num_bytes") for entry in mapping_or_empty(files).values()]
            found.append(
                SavedCheckpoint(
                    step=whole_number(manifest.get("step")),
                    path=name.removesuffix("/manifest.json"),
                    num_bytes=sum(size for size in sizes if isinstance(size, int)),
                    world_size=whole_number(manifest.get("world_size")),
                    written_at_s=self._files[name][0].modified_s,
                )
            )
        return tuple(found)

    def _read_sweep(self) -> Sweep:
        names = [name for name in self._storage.list("finetune") if _TRIAL.fullmatch(name)]
        new = [name for name in names if name not in self._trials]
        if new:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="p2r-status") as pool:
                for name, trial in zip(new, pool.map(self._read_trial, new[:_TRIALS_AT_ONCE]), strict=False):
                    self._trials[name] = trial
        trials = [trial for name in names if (trial := self._trials.get(name)) is not None]
        bad = sum(name in self._trials and self._trials[name] is None for name in names)
        if bad:
            self._problems.append(f"{bad} files below {self._storage.at('finetune')} are not results of trials")
        finals = [trial for trial in trials if trial.purpose == "final"]
        return Sweep(
            num_search=sum(trial.purpose == "search" for trial in trials),
            num_final=len(finals),
            num_unread=max(0, len(new) - _TRIALS_AT_ONCE),
            trials=tuple(sorted(trials, key=_trial_order)[:MAX_TRIALS]),
            curves=tuple(_curves(finals)),
        )

    def _read_trial(self, name: str) -> TrialState | None:
        try:
            facts = self._storage.facts(name)
            if facts is None or facts.num_bytes > MAX_FILE_BYTES:
                return None
            return _trial_state(self._storage.read_json(name))
        except _BROKEN:
            return None

    def _read_failed(self) -> tuple[FailedTrial, ...]:
        context = mapping_or_empty(mapping_or_empty(self._read_json("report/report.json")).get("context"))
        rows = [mapping_or_empty(row) for row in list_or_empty(context.get("failed"))]
        return tuple(
            FailedTrial(
                trial=masked_text(row.get("trial")),
                reason=masked_text(row.get("failed", row.get("reason", row.get("error")))),
            )
            for row in rows[:MAX_TRIALS]
        )

    def _read_pictures(self) -> tuple[ShownPicture, ...]:
        """Return the existing pictures: training images first, the corpus last."""
        captions = mapping_or_empty(
            mapping_or_empty(mapping_or_empty(self._read_json("report/report.json")).get("context")).get("captions")
        )
        names = [*self._storage.list("report/pictures"), *self._storage.list("corpus/report")]

        def order(name: str) -> tuple[int, str]:
            stem = name.rsplit("/", 1)[-1]
            ranks = [rank for rank, first in enumerate(_FIRST_PICTURES) if stem.startswith(first)]
            return (100 if name.startswith("corpus/") else min(ranks, default=50)), name

        found = []
        for name in sorted((name for name in names if _PICTURE.fullmatch(name)), key=order)[:MAX_PICTURES]:
            facts = self._storage.facts(name)
            if facts is not None:
                stem = name.rsplit("/", 1)[-1].removesuffix(".png")
                otherwise = f"{'corpus: ' * name.startswith('corpus/')}{stem.replace('-', ' ')}"
                caption = masked_text(captions.get(stem)) or otherwise[:1].upper() + otherwise[1:]
                found.append(ShownPicture(name, re.sub(r"\W", "", facts.version), caption))
        return tuple(found)

    def _read_variants(self) -> tuple[Variant, ...]:
        names = [name for name in self._storage.list("variants") if name.endswith("/" + HISTORY)]
        found = []
        for name in names[:MAX_VARIANTS]:
            lines = GrowingFile(self._storage, name, most_bytes=2**16)
            lines.refresh()
            last: dict[str, object] = next((row for row in reversed(lines.rows) if step_of_row(row) is not None), {})
            found.append(
                Variant(
                    name=name.removeprefix("variants/").removesuffix("/" + HISTORY),
                    step=step_of_row(last),
                    num_steps=whole_number(last.get("num_steps")),
                    loss=finite_number(last.get("loss")),
                )
            )
        return tuple(found)


def _trial_state(result: Any) -> TrialState:
    trial, row = mapping_or_empty(result["trial"]), mapping_or_empty(result.get("row"))
    settings = mapping_or_empty(trial.get("settings"))
    return TrialState(
        id=masked_text(trial["id"]),
        task=masked_text(trial["task"]),
        mode=masked_text(trial["mode"]),
        purpose=masked_text(trial.get("purpose")),
        num_labelled=whole_number(trial.get("num_labelled")),
        draw=whole_number(trial.get("draw")),
        settings=masked_text(", ".join(f"{name} {value}" for name, value in settings.items())),
        validation_dice=finite_number(mapping_or_empty(result.get("validation")).get("dice_mean")),
        test_dice=finite_number(row.get("dice_mean")) if row.get("split") == "test" else None,
        seconds=finite_number(result.get("seconds")),
        stopped_at_step=whole_number(result.get("stopped_at_step")),
    )


def _trial_order(trial: TrialState) -> tuple[Any, ...]:
    return trial.task, trial.purpose, trial.num_labelled or 0, trial.mode, trial.draw or 0, trial.id


def _curves(finals: Sequence[TrialState]) -> Iterator[FewShotCurve]:
    """Yield mean Dice over the available draws for each task and mode; on test patients if any trial read them."""
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
                yield FewShotCurve(task, split, mode, points)


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
