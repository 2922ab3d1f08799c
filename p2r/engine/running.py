"""State of a run between two reports: step results still on the device, sums, the clock, the history."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from p2r.config import PretrainConfig
from p2r.engine.health import embedding_health, health_by_contrasts
from p2r.engine.history import history_bytes, read_history
from p2r.engine.report import HISTORY, PretrainReport
from p2r.engine.step import Step, equivariance_error, loss_parts
from p2r.errors import EmbeddingError
from p2r.storage import Storage
from p2r.views.contrasts import pair_names


@dataclass
class Sums:
    """Sums since the last report and since the start; part of the checkpoint, so that a resumed run continues the same curve."""

    total: float = 0.0
    count: int = 0
    num_images_without_pairs: int = 0
    mean_before: float = 0.0
    gradient_norm: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def add(self, loss: float, gradient_norm: float) -> None:
        """Add the results of a step."""
        self.total += loss
        self.count += 1
        self.gradient_norm = gradient_norm
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """Count a skipped step."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def mean(self) -> float:
        """Return the mean loss since the last report; if all steps were skipped, the previous mean."""
        return self.total / self.count if self.count else self.mean_before

    def reset(self) -> None:
        """Start the next interval."""
        self.mean_before = self.mean()
        self.total, self.count, self.num_images_without_pairs = 0.0, 0, 0


class BadStep(EmbeddingError):
    """Failure of a step."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class UnreadSteps:
    """Results of steps that are still on the device."""

    def __init__(self, max_skipped: int) -> None:
        self._steps: list[tuple[int, Step]] = []
        self._max_skipped = max_skipped

    def add(self, step: int, taken: Step) -> None:
        """Keep the results of a step on the device."""
        self._steps.append((step, taken))

    def read_into(self, running: Sums) -> None:
        """Wait once for the device, and add the results of all steps to `running`. Collective.

        Raises:
            BadStep: A step failed on some rank other than by being skipped, or too many were skipped in a row. Raised on
                every rank for the first such step.
        """
        values = torch.stack(
            [torch.stack([value.double() for value in _results_of(taken)]) for _, taken in self._steps]
        )
        of_ranks = torch.stack(gather_values(values)).tolist()  # (ranks, steps, 4 + findings)
        for number, (step, taken) in enumerate(self._steps):
            reasons = []
            loss, skipped, norm, *_ = of_ranks[0][number]
            for rank, (*_, without_pairs, counts) in enumerate((*row[number][:4], row[number][4:]) for row in of_ranks):
                where = f"rank {rank}: " if len(of_ranks) > 1 else ""
                found = [int(count) for count in counts]
                try:
                    taken.findings.refuse(found, may_pass=bool(skipped))
                except EmbeddingError as error:
                    raise BadStep(step, f"{where}{error}") from error
                broken = taken.findings.broken(found)
                reasons += [f"{where}{broken}"] if broken else []
                running.num_images_without_pairs += int(without_pairs)
            if not skipped:
                running.add(loss, norm)
                continue
            running.skip()
            if running.skipped_in_a_row > self._max_skipped:
                reason = next(iter(reasons), f"the loss is {loss}, the norm of its gradient {norm}")
                in_a_row = running.skipped_in_a_row
                raise BadStep(
                    step,
                    f"{reason}; "
                    + (f"skipped steps in a row: {in_a_row}, " if in_a_row > 1 else "")
                    + f"pretrain.max_skipped_steps allows {self._max_skipped}",
                )
        self._steps.clear()


def _results_of(taken: Step) -> list[Tensor]:
    updated = taken.update
    return [
        taken.loss,
        updated.is_skipped,
        updated.gradient_norm,
        taken.num_images_without_pairs,
        *taken.findings.counts(),
    ]


class Clock:
    """Time, steps and waiting for data since the last report."""

    def __init__(self) -> None:
        self.steps, self.wait_s, self._began = 0, 0.0, time.monotonic()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time of this block."""
        before = time.monotonic()
        yield
        self._began += time.monotonic() - before

    def add(self, wait_s: float) -> None:
        """Count a step and the time that it waited for data."""
        self.steps += 1
        self.wait_s += wait_s

    def lap(self) -> float:
        """Return the seconds since the last report."""
        return max(1e-9, time.monotonic() - self._began)


class HistoryRows:
    """`history.jsonl`: one JSON object per report. Object storage cannot append, so the file is rewritten, at limited intervals."""

    def __init__(self, storage: Storage, rank: int, *, first_step: int) -> None:
        self._storage, self._rank, self._written_at = storage, rank, 0.0
        self._rows: list[dict[str, object]] = []
        if rank == 0 and first_step and storage.exists(HISTORY):
            self._rows = [row.to_json() for row in read_history(storage, HISTORY) if row.step <= first_step]

    def add(self, report: PretrainReport, *, flush: bool) -> None:
        """Add the row of a report; the file is written at most every 10 s unless `flush` is set."""
        self._rows.append(asdict(report))
        if self._rank == 0 and (flush or time.monotonic() - self._written_at > 10):
            self._storage.write_bytes(HISTORY, history_bytes(self._rows))
            self._written_at = time.monotonic()


def gather_loss_parts(taken: Step) -> dict[str, float]:
    """Return the parts of the loss over all ranks."""
    if not taken.parts:
        return {}
    sums = torch.stack(gather_values(torch.stack(list(taken.parts.values())).double())).sum(0).tolist()
    found = loss_parts(dict(zip(taken.parts, sums, strict=True)))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def gather_health(taken: Step) -> dict[str, float] | None:
    """Return the health of the embeddings over all ranks."""
    if taken.pairs is None:
        return None
    return embedding_health(torch.cat(gather_values(taken.pairs)).cpu())


def gather_contrast_health(taken: Step, config: PretrainConfig) -> dict[str, dict[str, float]] | None:
    """Return the health of each pair of contrasts over all ranks; None for images of one contrast."""
    if taken.pairs is None or taken.contrasts is None or config.model.contrasts is None:
        return None
    pairs, numbers = (torch.cat(gather_values(part)).cpu() for part in (taken.pairs, taken.contrasts))
    is_info_nce = config.loss.name == "info_nce" and taken.temperature is not None
    return health_by_contrasts(
        pairs,
        numbers,
        names=pair_names(config.model.contrasts),
        temperature=float(taken.temperature) if is_info_nce and taken.temperature is not None else None,
    )


def gather_equivariance_error(taken: Step) -> float | None:
    """Return the equivariance error over all ranks."""
    if taken.alignment is None:
        return None
    alignment = torch.stack(gather_values(taken.alignment.double())).sum(0).tolist()
    return equivariance_error(alignment) if all(map(math.isfinite, alignment)) else None


def gather_values(values: Tensor) -> list[Tensor]:
    """Return every rank's values."""
    if torch.distributed.get_world_size() == 1:
        return [values]
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return parts


def never() -> bool:
    """Return False."""
    return False


class OnAnyRank:
    """Tells whether a condition holds on any rank. On GPUs it uses a host process group, so that no rank waits for its device.

    Args:
        holds: Condition on this rank.
        device: Device of this rank.
    """

    def __init__(self, holds: Callable[[], bool], device: torch.device) -> None:
        self._holds, self._alone = holds, torch.distributed.get_world_size() == 1
        self._group = None
        if device.type == "cuda" and not self._alone:
            self._group = torch.distributed.new_group(backend="gloo")

    def __call__(self) -> bool:
        """Return whether the condition holds on any rank. Collective."""
        if self._alone:
            return self._holds()
        value = torch.tensor([int(self._holds())])
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(value.item())
