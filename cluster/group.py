"""A group of workers of Ray Train that starts in as little time as it can: only the processes that pretraining needs, without torch where
none is needed.

    trainer -> controller -> one process per rank -> a process group of torch

A group is started anew after every fault, so each process costs the run seconds, twice as many where ranks share few cores. Ray
Train's own torch backend makes the controller import torch, which then only passes an address on; besides, it starts an actor for
data sets that there are none of, and one that removes placement groups of a dead controller, which Ray does by itself as
the controller owns them. That one also makes a group's end wait, up to 11 s, where the cluster has no dashboard to ask.

`Wire` is what driver and workers talk by. This module imports neither torch nor the engine: controller and wire import it.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

Reason = Literal["stop", "preemption", "resize"]

_LEAVE_S = 5  # a rank that hangs cannot leave its process group; it is killed after this time


class Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray's classes have no types
    """Ray Train's trainer, with only those callbacks that do something here."""

    def _create_default_callbacks(self) -> list[Any]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, without)]


@dataclass
class TorchGroup(BackendConfig):  # type: ignore[misc]
    """Makes the ranks a process group of torch, by `env://`; the controller does not import torch for it."""

    backend: Literal["nccl", "gloo"]
    timeout_s: float

    @property
    def backend_cls(self) -> type[Backend]:
        """What the controller does with it."""
        return _TorchGroup


class _TorchGroup(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # as Ray's own: ranks of a node reach one another's GPUs

    def on_start(self, worker_group: Any, backend_config: TorchGroup) -> None:
        address, port = worker_group.execute_single(0, _meeting_point)
        worker_group.execute(_join, address, port, backend=backend_config.backend, timeout_s=backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: TorchGroup) -> None:
        with suppress(GetTimeoutError):  # killed next
            ray.get(worker_group.execute_async(_leave), timeout=_LEAVE_S)


def _meeting_point() -> tuple[str, int]:
    """Return this node's address, and a port of it that is free."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind(("", 0))
        return address, free.getsockname()[1]


def _join(address: str, port: int, *, backend: str, timeout_s: float) -> None:
    from datetime import timedelta

    import torch

    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Wire:
    """An actor beside the driver, by which it and the workers of one group after the other talk.

    A worker names its group: what one of a former group says late is not taken for news of this one.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self.begin(0)

    def begin(self, group: int) -> None:
        """Forget the group before."""
        self._group = group
        self._reason: Reason | None = None
        self._what = ""
        self._nodes: dict[int, tuple[str, str]] = {}
        self._step: int | None = None

    def ask_to_end(self, reason: Reason, what: str) -> None:
        """Raise the flag; the first reason counts, but for a wish to stop."""
        if self._reason is None or reason == "stop":
            self._reason, self._what = reason, what

    def is_to_end(self, group: int) -> bool:
        """Whether this group is to save a checkpoint and end."""
        return self._reason is not None or group != self._group

    def join(self, group: int, rank: int, node: str, address: str) -> None:
        """Say where a rank runs."""
        if group == self._group:
            self._nodes[rank] = (node, address)

    def reached(self, group: int, step: int) -> None:
        """Say which step was reported."""
        if group == self._group:
            self._step = step

    def note(self, row: dict[str, Any]) -> None:
        """Take a row for the log of faults, from a worker that has mended something by itself."""
        self._rows.append(row)

    def state(self) -> dict[str, Any]:
        """Return what is known, and hand over the rows."""
        rows, self._rows = self._rows, []
        return {"reason": self._reason, "what": self._what, "nodes": self._nodes, "rows": rows, "step": self._step}
