"""Exchange of objects and failures between the ranks of a run, beside training.

Training's collectives have a short timeout, so that a dead peer is found soon. Other work (fetching a checkpoint, waiting for
an upload) may take one rank minutes while the others wait. It uses its own process group: gloo, which needs no device, with
a long timeout.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from p2r.errors import InputError, P2RError, error_text

T = TypeVar("T")


class Peers:
    """All ranks of the current process group. Every method is collective.

    Args:
        timeout_s: Longest wait for the slowest rank.
    """

    def __init__(self, *, timeout_s: float = 7200.0) -> None:
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self._group = None
        if self.world_size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, ordered by rank."""
        if self._group is None:
            return [value]
        values: list[T] = [value] * self.world_size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank, and return the results ordered by rank.

        Raises:
            P2RError: `work` failed; every rank raises the error of the first that failed.
            RuntimeError: The same for any other exception, with its text, because not every exception can be sent.
        """
        mine: list[T] = []
        failure: P2RError | RuntimeError | None = None
        try:
            mine.append(work())
        except P2RError as error:
            failure = error
        except Exception as error:
            if self._group is None:
                raise
            failure = RuntimeError(f"rank {self.rank}: {error_text(error)}")
        found: list[T] = []
        for made, failed in self.gather((mine, failure)):
            if failed is not None:
                raise failed
            found += made
        return found

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` only on rank 0; every rank returns its result, or raises its error."""
        made = self.together(lambda: [work()] if self.rank == 0 else [])
        return made[0][0]

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None


def refuse_mixed_gpus(device: torch.device) -> None:
    """Refuse GPUs of different kinds: the slowest would limit every step, and each kind rounds differently. Collective.

    Raises:
        InputError: The kinds differ; raised on every rank.
    """
    names = [""] * distributed.get_world_size()
    if device.type == "cuda" and len(names) > 1:
        distributed.all_gather_object(names, torch.cuda.get_device_name(device))
        check_device_names(names)


def check_device_names(names: Sequence[str]) -> None:
    """Raise `InputError` unless all devices, named by rank, are of one kind."""
    kinds = {name: [rank for rank, other in enumerate(names) if other == name] for name in names}
    if len(kinds) > 1:
        found = "; ".join(f"{name} on {_list_ranks(ranks)}" for name, ranks in kinds.items())
        raise InputError(
            f"the workers of a run must have GPUs of one kind, got {found}: run the job on nodes with one kind of GPU"
        )


def _list_ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
