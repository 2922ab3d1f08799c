"""Faults of pretraining: find the cause, and record cause and decision.

    Ray's error -> cause, what -> decision -> one line of the log, and one row of <storage>/pretrain/faults.jsonl

A cause is a problem that a user can act on: a lost worker or node, a notice of preemption, a hung collective, a request to stop.
Others are a damaged checkpoint, a loss that is not finite, and a vanished driver. When one worker dies, the others fail a moment
later as a consequence; the cause is the error that explains the rest.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import TypeAdapter
from ray.exceptions import RayActorError

from p2r.documents import JsonRow, checked
from p2r.errors import DamagedError, InputError, StorageError, TrainingError, error_text
from p2r.masking import masked
from p2r.storage import Storage

FAULTS = "faults.jsonl"

Cause = Literal["worker", "node", "preemption", "hang", "stop", "checkpoint", "divergence", "driver", "unknown"]
Decision = Literal["restart", "resize", "end", "fall back"]

_HANG = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_PEER_IS_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|remote process exited", re.IGNORECASE)
_NODE_IS_GONE = re.compile(r"node (has )?died|node failure|node is dead|raylet (has )?died|node was", re.IGNORECASE)


class Fault(JsonRow):
    """A row of `faults.jsonl`."""

    time: str | None = None
    """Time of recording: ISO 8601, UTC."""
    attempt: int | None = None
    """Number of the affected worker group, over all drivers of the run; 1 is the first."""
    cause: str
    """Cause that explains the fault: a `Cause`, or one that another version of p2r knows."""
    what: str
    """Observation, in one line."""
    decision: Decision
    """Reaction of the driver."""
    from_step: int | None = None
    """Step of the checkpoint from which the run resumes, or would; None: from the beginning."""
    count: int | None = None
    """Failures in a row, of all causes but preemption, without a new checkpoint in between; 1 for what is not counted."""
    limit: int | None = None
    """Largest allowed count; None: no limit."""

    def line(self) -> str:
        """Return the fault as one line of the log."""
        where = "the beginning" if self.from_step is None else f"step {self.from_step}"
        decided = {
            "restart": f"restart from {where}",
            "resize": f"another number of workers, from {where}",
            "end": f"end; running the job again resumes from {where}",
            "fall back": f"fall back to {where}",
        }[self.decision]
        counted = f" | {self.count} of {self.limit}" if self.limit is not None else ""
        return f"fault | {self.cause}: {self.what} | {decided}{counted}"


_FAULT = TypeAdapter(Fault)


def read_faults(storage: Storage) -> list[Fault]:
    """Return the faults of earlier starts of a run.

    Args:
        storage: `<storage>/pretrain`.

    Raises:
        DamagedError: A row is invalid; names the line, the key and the rule.
    """
    rows = storage.read_rows(FAULTS) if storage.exists(FAULTS) else []
    return [
        checked(_FAULT, row, where=f"{storage.at(FAULTS)}, row {number}:", error=DamagedError)
        for number, row in enumerate(rows, start=1)
    ]


class FaultLog:
    """`faults.jsonl` of one run, and its log lines. Only one driver writes at a time.

    Args:
        storage: `<storage>/pretrain`. Object storage cannot append, so the short file is rewritten.
        say: Receives the lines.
        on_fault: Receives every new fault.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        say: Callable[[str], None],
        on_fault: Callable[[Fault], None] | None = None,
    ) -> None:
        self._storage, self._say, self._on_fault = storage, say, on_fault
        self._faults = read_faults(storage)

    @property
    def attempt(self) -> int:
        """Number of the current or next worker group."""
        return 1 + sum(fault.decision != "fall back" for fault in self._faults)

    def has_ended_at(self, step: int) -> bool:
        """Return whether the last row records that the run ended, for a known cause, and a later start made no checkpoint since.

        Args:
            step: Step of the newest checkpoint.
        """
        last = self._faults[-1] if self._faults else None
        return last is not None and last.decision == "end" and step <= (last.from_step or 0)

    def add(
        self,
        cause: Cause,
        what: str,
        *,
        decision: Decision,
        from_step: int | None,
        count: int = 1,
        limit: int | None = None,
    ) -> Fault:
        """Record a fault and log it."""
        fault = Fault(
            time=_utc_now(),
            attempt=self.attempt,
            cause=cause,
            what=one_line(masked(what)),
            decision=decision,
            from_step=from_step,
            count=count,
            limit=limit,
        )
        self._faults.append(fault)
        text = "".join(json.dumps(each.to_json()) + "\n" for each in self._faults)
        self._storage.write_bytes(FAULTS, text.encode())
        if self._on_fault is not None:
            self._on_fault(fault)
        self._say(fault.line())
        return fault


def cause_of(error: Exception, *, lost: Mapping[int, str], addresses: Mapping[int, str]) -> tuple[Cause, str]:
    """Return the cause of a worker group's failure, and a line that describes it.

    Args:
        error: Exception from `trainer.fit()`, by Ray Train or because its controller died.
        lost: Ranks whose node is gone, with the node's address.
        addresses: Address of each rank's node.
    """
    found = dict(_unwrap_errors(error))
    for rank, failure in found.items():
        if isinstance(failure, TrainingError):
            return "divergence", f"rank {rank}: {failure}"
    if _is_preempted(error, found.values()):
        return "preemption", _describe_ranks("node", lost or addresses) + " was removed"
    if lost:
        return "node", _describe_ranks("node", lost) + " is gone"
    died = {rank: addresses.get(rank, "?") for rank, failure in found.items() if isinstance(failure, RayActorError)}
    for failure in found.values():
        if isinstance(failure, RayActorError) and _NODE_IS_GONE.search(str(failure)):
            return "node", _describe_ranks("node", died) + " is gone"
    if died:
        return "worker", _describe_ranks("worker", died) + " died"
    return _cause_by_message(found) or ("unknown", error_text(error))


def _cause_by_message(found: Mapping[int, BaseException]) -> tuple[Cause, str] | None:
    """Return cause and description by the messages of the ranks' exceptions; None without any exception."""
    for rank, failure in found.items():
        if _HANG.search(str(failure)):
            return "hang", f"rank {rank}: {failure}"
    for rank, failure in found.items():
        if _PEER_IS_GONE.search(str(failure)):
            return "worker", f"rank {rank} lost another one: {failure}"
    return next((("unknown", f"rank {rank}: {error_text(failure)}") for rank, failure in found.items()), None)


def refusal_of(error: Exception, *, was_running: bool) -> InputError | None:
    """Return a worker's input error, if any. Storage errors after a successful start do not count: the storage may recover."""
    for _, failure in _unwrap_errors(error):
        if isinstance(failure, InputError) and not (was_running and isinstance(failure, StorageError)):
            return failure
    return None


def one_line(text: str, *, most: int = 300) -> str:
    """Return the first non-empty line, truncated to a length."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else "no message"
    return line if len(line) <= most else line[: most - 1] + "…"


def _unwrap_errors(error: Exception) -> Iterator[tuple[int, BaseException]]:
    """Yield each rank's error, unwrapped from Ray's."""
    for rank, wrapped in sorted((getattr(error, "worker_failures", None) or {}).items()):
        failure: BaseException = wrapped
        while True:
            inner = getattr(failure, "health_check_failure", None) or getattr(failure, "cause", None)
            if not isinstance(inner, BaseException):
                break
            failure = inner
        yield rank, failure


def _is_preempted(error: Exception, failures: Iterable[BaseException]) -> bool:
    return hasattr(error, "preemption_info") or any(
        isinstance(failure, RayActorError) and failure.preempted for failure in failures
    )


def _describe_ranks(kind: Literal["worker", "node"], places: Mapping[int, str]) -> str:
    ranks = ", ".join(map(str, sorted(places)))
    nodes = ", ".join(sorted(set(places.values())))
    if kind == "node":
        return f"node {nodes} with rank{'s' * (len(places) > 1)} {ranks}"
    return f"rank{'s' * (len(places) > 1)} {ranks} on {nodes}"


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
