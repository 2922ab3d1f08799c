"""Growing files of a run: each refresh reads only the rows appended since the last one."""

import re
import statistics
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.status_values import (
    MAX_COUNTERS,
    MAX_FILE_BYTES,
    finite_number,
    mapping_or_empty,
    masked_text,
    whole_number,
)
from p2r.documents import read_json
from p2r.errors import InputError, StorageError
from p2r.storage import FileFacts, Storage

HISTORY = "pretrain/history.jsonl"
FAULTS = "pretrain/faults.jsonl"

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
_MAX_HISTORY_BYTES = 2**28
_OVERLAP_BYTES = 4096

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Training:
    """State of pretraining."""

    step: int
    num_steps: int
    state: str
    """`running`, `silent` (no report for longer than expected), or `done`."""
    written_at_s: float
    """Time of the newest report, by the storage's clock."""
    last: dict[str, float]
    """The newest value of every series."""
    negatives: str | None
    data: dict[str, float]
    """Counters of the first worker's stream."""


@dataclass(frozen=True)
class Resumption:
    """A resumption of pretraining."""

    step: int
    """Step of the first report afterwards."""
    from_: int
    """Step of the checkpoint; called `from` in JSON."""


@dataclass(frozen=True)
class Fault:
    """A row of `faults.jsonl`, shortened and without secrets; see `cluster.faults`."""

    time: str
    cause: str
    what: str
    decision: str
    attempt: int | None
    from_step: int | None
    count: int | None
    limit: int | None


class GrowingFile:
    """Complete lines of a file of JSON objects. Appended lines are read incrementally; a rewritten file is read again."""

    def __init__(self, storage: Storage, path: str, *, most_bytes: int = _MAX_HISTORY_BYTES) -> None:
        self._storage, self._path, self._most_bytes = storage, path, most_bytes
        self.rows: list[dict[str, object]] = []
        self.facts: FileFacts | None = None
        self._clear()

    def _clear(self) -> None:
        self.rows = []
        self._start, self._end, self._last, self._num_bad, self._is_half = 0, 0, b"", 0, False

    def refresh(self) -> None:
        """Read changes.

        Raises:
            StorageError: The storage cannot be read.
        """
        facts = self._storage.facts(self._path)
        if facts == self.facts:
            return
        if facts is None:
            self._clear()
        elif (added := self._read_appended(facts)) is not None:
            self._take_lines(added)
        else:
            self._clear()
            self._start = self._end = max(0, facts.num_bytes - self._most_bytes)
            if self._start:
                content = self._storage.read_range(self._path, self._start, facts.num_bytes)
                before, _, content = content.partition(b"\n")
                self._end += len(before) + 1
            else:
                content = self._storage.read_bytes(self._path)
            self._take_lines(content)
        self.facts = facts

    def problems(self) -> Iterator[str]:
        """Yield descriptions of the rows that were left out."""
        where = self._storage.at(self._path)
        if self._num_bad:
            rows = "1 row is" if self._num_bad == 1 else f"{self._num_bad} rows are"
            yield f"{where}: {rows} damaged and left out"
        if self._is_half:
            yield f"{where}: its last row is half-written and left out"
        if self._start:
            yield f"{where}: only its last {self._most_bytes >> 20} MiB are shown"

    def _read_appended(self, facts: FileFacts) -> bytes | None:
        """Return the appended bytes; None if the earlier content has changed."""
        if not self._last or facts.num_bytes < self._end:
            return None
        try:
            content = self._storage.read_range(self._path, self._end - len(self._last), facts.num_bytes)
        except StorageError:  # the file has become shorter
            return None
        return content[len(self._last) :] if content.startswith(self._last) else None

    def _take_lines(self, content: bytes) -> None:
        whole, newline, rest = content.rpartition(b"\n")
        self._is_half = bool(rest.strip())
        whole += newline
        self._end += len(whole)
        self._last = (self._last + whole)[-_OVERLAP_BYTES:]
        for line in whole.splitlines():
            if line.strip():
                row = _parse_object(line)
                if row is None or not self._add_row(row):
                    self._num_bad += 1

    def _add_row(self, row: dict[str, object]) -> bool:
        self.rows.append(row)
        return True


class FaultFile(GrowingFile):
    """`faults.jsonl`: each fault with its cause, the decision, and the step that the run resumed from."""

    def _clear(self) -> None:
        super()._clear()
        self.faults: list[Fault] = []

    def _add_row(self, row: dict[str, object]) -> bool:
        fault = Fault(
            time=masked_text(row.get("time")),
            cause=masked_text(row.get("cause")),
            what=masked_text(row.get("what")),
            decision=masked_text(row.get("decision")),
            attempt=whole_number(row.get("attempt")),
            from_step=whole_number(row.get("from_step")),
            count=whole_number(row.get("count")),
            limit=whole_number(row.get("limit")),
        )
        if not (fault.cause or fault.what):
            return False
        self.faults.append(fault)
        return True


class HistoryFile(GrowingFile):
    """`history.jsonl` as series of numbers; only the newest row is kept."""

    def _clear(self) -> None:
        super()._clear()
        self.series: dict[str, tuple[array[int], array[float]]] = {}
        self.resumed: list[Resumption] = []
        self._newest: dict[str, object] = {}
        self._gaps: deque[int] = deque(maxlen=20)

    def training(self) -> Training | None:
        """Return the state of pretraining; None before the first report."""
        step = step_of_row(self._newest)
        if step is None or self.facts is None:
            return None
        num_steps = whole_number(self._newest.get("num_steps")) or 0
        age_s = max(0.0, time.time() - self.facts.modified_s)
        left, eta_s = num_steps - step, finite_number(self._newest.get("eta_s"))
        gap = statistics.median(self._gaps) if self._gaps else max(1, step)
        expected_s = gap * eta_s / left if eta_s is not None and left > 0 else 0.0
        is_silent = age_s > max(60.0, 5 * expected_s)
        negatives = self._newest.get("negatives")
        data = {
            name: number
            for name, value in list(mapping_or_empty(self._newest.get("data")).items())[:MAX_COUNTERS]
            if (number := finite_number(value)) is not None
        }
        return Training(
            step=step,
            num_steps=num_steps,
            state="done" if step >= num_steps else "silent" if is_silent else "running",
            written_at_s=self.facts.modified_s,
            last=dict(_numbers_of_row(self._newest)),
            negatives=None if negatives is None else masked_text(negatives),
            data={masked_text(name): number for name, number in data.items()},
        )

    def _add_row(self, row: dict[str, object]) -> bool:
        step = step_of_row(row)
        if step is None:
            return False
        for name, value in _numbers_of_row(row):
            if name not in self.series and len(self.series) >= len(SERIES) + len(_NESTED) * _MAX_NESTED:
                continue
            steps, values = self.series.setdefault(name, (array("q"), array("d")))
            steps.append(step)
            values.append(value)
        resumed_from = whole_number(row.get("resumed_from"))
        if resumed_from is not None:
            self.resumed.append(Resumption(step, resumed_from))
        before = step_of_row(self._newest)
        if before is not None and step > before:
            self._gaps.append(step - before)
        self._newest = row
        return True


def _numbers_of_row(row: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a report by name; nested ones as `health.alignment`."""
    for name in SERIES:
        if (number := finite_number(row.get(name))) is not None:
            yield name, number
    for group in _NESTED:
        for name, value in list(mapping_or_empty(row.get(group)).items())[:_MAX_NESTED]:
            if _NAME.fullmatch(name) and (number := finite_number(value)) is not None:
                yield f"{group}.{name}", number


def thinned_points(steps: Sequence[int], values: Sequence[float]) -> Points:
    """Return at most `_MAX_POINTS` points: the lowest and highest of every interval, so that no spike is lost."""
    num = len(steps)
    if num <= _MAX_POINTS:
        return list(zip(steps, values, strict=True))
    chosen = {0, num - 1}
    num_intervals = _MAX_POINTS // 2 - 1
    for interval in range(num_intervals):
        inside = range(num * interval // num_intervals, num * (interval + 1) // num_intervals)
        chosen |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    return [(steps[index], values[index]) for index in sorted(chosen)]


def _parse_object(line: bytes) -> dict[str, object] | None:
    try:
        value = read_json(line, where="a row", max_bytes=MAX_FILE_BYTES, nan_as_none=True)
    except InputError:
        return None
    return value if isinstance(value, dict) else None


def step_of_row(row: Mapping[str, object]) -> int | None:
    """Return the step of a row, or None."""
    return whole_number(row.get("step"))
