"""A job's lines of progress -> trackers, in the driver only. Workers run no code of a tracker.

    say(Line(..., step=, loss=, ...)) -> queue of each tracker -> its thread -> the tool

A tracker cannot delay or stop a job: its queue is bounded, it runs in a thread of its own, and its first error switches it off with
one warning. `<storage>/trackers.json` holds the identifier of each run and the last step sent. The next call of the job continues
this run, and first sends the rows of `history.jsonl` that the tracker lacks. Each pretrained variant of an ablation has a run of its own.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from p2r.engine.history import HistoryRow, read_history
from p2r.engine.report import HISTORY
from p2r.errors import P2RError, error_text
from p2r.evaluate.rows import TrialRow
from p2r.fewshot.stored import read_report_rows
from p2r.job import Job, variants_of
from p2r.logs import Say, fields_of
from p2r.pipeline.lines import METRICS
from p2r.pipeline.trackers import TRACKERS, Target, Tracker, check_packages, flat_parameters
from p2r.storage import Storage

_LOG = logging.getLogger(__name__)
_STATE = "trackers.json"
_MAX_STATE_BYTES = 2**16
_MAX_WAITING = 10_000
_CLOSE_S = 60.0
_SECTIONS = {"ingest", "pretrain", "finetune", "resources"}


class _Sent(BaseModel):
    """State of a tracker after a call."""

    model_config = ConfigDict(strict=True)
    run: Annotated[str, Field(max_length=200)]
    step: Annotated[int, Field(ge=0)] = 0


_STATES = TypeAdapter(dict[str, _Sent])


class _Worker:
    """A run in a tracker, and its thread."""

    def __init__(self, name: str, target: Target, *, last_step: int) -> None:
        self.key = _key(name, target.variant)
        self.run, self.step, self.sent = target.run, last_step, last_step
        self._open, self._target = TRACKERS[name][1], target
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MAX_WAITING)
        self._is_off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"p2r-{self.key}", daemon=True)
        self._thread.start()

    def send(self, task: Callable[[Tracker], None]) -> None:
        """Queue a call; return at once."""
        if self._is_off.is_set():
            return
        try:
            self._waiting.put_nowait(task)
        except queue.Full:
            self._switch_off(f"has not answered for {_MAX_WAITING:,} records")

    def send_step(self, values: Mapping[str, object], step: int) -> None:
        """Queue the metrics of a pretraining step, unless the tracker has them from an earlier call."""
        found = {f"pretrain/{name}": float(value) for name, value in values.items() if _is_number(value)}
        if not found or step <= self.step:
            return
        self.step = step

        def send(tracker: Tracker) -> None:
            tracker.metrics(found, step=step)
            if not tracker.sends_on_close:
                self.sent = step

        self.send(send)

    def end(self, *, is_done: bool) -> None:
        """Queue the end of the run."""

        def close(tracker: Tracker) -> None:
            tracker.close(is_done=is_done)
            self.sent = self.step

        self.send(close)
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._is_off.set()

    def join(self, *, timeout_s: float) -> None:
        """Wait for the end of the run, and give up after this time."""
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            self._switch_off(f"did not finish within {_CLOSE_S:.0f} s")

    def _work(self) -> None:
        try:
            tracker = self._open(self._target)
            self.run = tracker.run
            while (task := self._waiting.get()) is not None:
                if self._is_off.is_set():
                    return
                task(tracker)
        except BaseException as error:  # a tool may raise anything, also SystemExit
            self._switch_off(error_text(error).strip()[:300])

    def _switch_off(self, reason: str) -> None:
        if not self._is_off.is_set():
            self._is_off.set()
            _LOG.warning("tracker %s is off for the rest of this run: %s", self.key, reason)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def tracked(job: Job, storage: Storage, say: Say) -> Iterator[Say]:
    """Yield a logger that also sends a job's metrics to its trackers; pictures and the table follow at the end.

    Raises:
        InputError: A tracker's package is not installed.
    """
    if not job.trackers:
        yield say
        return
    check_packages(job.trackers)
    before = _read_state(storage)
    runs: dict[str | None, Job] = {None: job}
    runs |= {name: one for name, one in variants_of(job).items() if one.pretrain is not None}
    workers = {variant: _open_workers(job, storage, variant, before) for variant in runs}
    for variant, one in runs.items():
        _send_settings(workers[variant], one)
        _send_history(workers[variant], Storage(one.storage))
    is_done = False
    try:
        yield _sending(say, workers)
        is_done = True
        for variant, one in runs.items():
            with _warned("the report is not sent to trackers"):
                _send_report(workers[variant], Storage(one.storage))
    finally:
        everything = [worker for group in workers.values() for worker in group]
        _close(everything, is_done=is_done)
        found = before | {one.key: _Sent(run=one.run, step=one.sent) for one in everything if one.run is not None}
        with _warned("the next call begins new runs in its trackers"):
            storage.write_json(_STATE, {key: sent.model_dump() for key, sent in found.items()})


def _key(name: str, variant: str | None) -> str:
    """Return the name of a tracker's run in `trackers.json` and in warnings."""
    return name if variant is None else f"{name}/{variant}"


def _open_workers(job: Job, storage: Storage, variant: str | None, before: Mapping[str, _Sent]) -> list[_Worker]:
    """Open a run in every tracker, or continue the run of an earlier call."""
    found = []
    for name in job.trackers:
        sent = before.get(_key(name, variant))
        target = Target(job.name, storage, None if sent is None else sent.run, variant)
        found.append(_Worker(name, target, last_step=0 if sent is None else sent.step))
    return found


def _close(workers: list[_Worker], *, is_done: bool) -> None:
    """End all runs at once; give up after a minute."""
    deadline = time.monotonic() + _CLOSE_S
    for worker in workers:
        worker.end(is_done=is_done)
    for worker in workers:
        worker.join(timeout_s=deadline - time.monotonic())


def _send_settings(workers: list[_Worker], job: Job) -> None:
    parameters = flat_parameters(job.model_dump(mode="json", include=_SECTIONS, exclude=_PRIVATE))
    for worker in workers:
        worker.send(lambda tracker: tracker.parameters(parameters))


@contextmanager
def _warned(consequence: str) -> Iterator[None]:
    """Turn an error of p2r's own files into a warning: tracking never fails a job."""
    try:
        yield
    except (P2RError, OSError, ValueError) as error:
        _LOG.warning("trackers: %s: %s", consequence, error)


_PRIVATE: Any = {
    "ingest": {"sources", "subjects_of", "subjects"},
    "pretrain": {"corpus", "probe", "init_from"},
    "finetune": {"tasks", "backbone"},
}
"""Paths, URLs and names of patients are not sent to a tracker."""


def _read_state(storage: Storage) -> dict[str, _Sent]:
    with _warned("new runs begin"):
        if storage.exists(_STATE):
            found: dict[str, _Sent] = _STATES.validate_python(storage.read_json(_STATE, max_bytes=_MAX_STATE_BYTES))
            return found
    return {}


def _sending(say: Say, workers: Mapping[str | None, list[_Worker]]) -> Say:
    trials = 0

    def send(line: str) -> None:
        nonlocal trials
        say(line)
        fields = fields_of(line)
        step, dice, variant = fields.get("step"), fields.get("validation_dice"), fields.get("variant")
        if "loss" in fields and isinstance(step, int) and fields.get("rank", 0) == 0:
            values = {name: fields[name] for name in METRICS if name in fields}
            for worker in workers.get(variant if isinstance(variant, str) else None, ()):
                worker.send_step(values, step)
        elif "trial" in fields and _is_number(dice):
            trials += 1
            found, number = {"finetune/validation_dice": float(dice)}, trials
            for worker in workers[None]:  # the trials of all variants are one pool
                worker.send(lambda tracker: tracker.metrics(found, step=number))

    return send


def _send_history(workers: list[_Worker], storage: Storage) -> None:
    """Send the steps of earlier calls that a tracker lacks, because it was down or not asked for."""
    path, rows = f"pretrain/{HISTORY}", list[HistoryRow]()
    with _warned("the steps of earlier calls are not sent"):
        rows = read_history(storage, path) if storage.exists(path) else rows
    for row in rows:
        for worker in workers:
            values = row.to_json()
            worker.send_step({name: values[name] for name in METRICS if name in values}, row.step)


def _send_report(workers: list[_Worker], storage: Storage) -> None:
    """Send the table and pictures of the report, if the job made one."""
    if not storage.exists("report/report.json"):
        return
    rows = [row for row in read_report_rows(storage, "report/report.json") if row.dice_mean is not None]
    columns = ("task", "mode", "labelled patients", "draw", "split", "Dice", "HD95 (mm)", "backbone")
    lines = [_line_of(row) for row in rows]
    folder = storage.child("report/pictures")
    pictures = {path.removesuffix(".png"): folder.read_bytes(path) for path in folder.list() if path.endswith(".png")}
    for worker in workers:
        worker.send(lambda tracker: tracker.table("few-shot", columns, lines))
        for name, png in pictures.items():
            worker.send(lambda tracker, name=name, png=png: tracker.picture(f"report/{name}", png))  # type: ignore[misc]


def _line_of(row: TrialRow) -> tuple[Any, ...]:
    numbers = (None if value is None else round(value, 4) for value in (row.dice_mean, row.hd95_mm))
    return (row.task, row.mode, row.num_labelled, row.draw, row.split, *numbers, (row.backbone_sha256 or "none")[:12])
