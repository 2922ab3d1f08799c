"""Worker group for Ray Train that starts quickly: no needless processes, and no torch in the controller.

    trainer -> controller -> one process per rank -> a process group of torch

A group is restarted after every fault, so each process costs the run seconds, more where ranks share few cores. Ray Train's
own torch backend makes the controller import torch only to pass on an address. Ray Train also starts two actors without use
here. One serves data sets. The other removes placement groups of a dead controller, which Ray does anyway; on clusters
without a dashboard it delays the end of a group by up to 11 s.

Driver and workers communicate through a `DriverChannel`. This module imports neither torch nor the engine, because
controller and channel import it.
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

_LEAVE_S = 5  # a hung rank cannot leave its process group; it is killed after this time


class Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray's classes have no types
    """Ray Train's trainer without the callbacks that are not needed here."""

    def _create_default_callbacks(self) -> list[Any]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, without)]


@dataclass
class TorchGroup(BackendConfig):  # type: ignore[misc]
    """Configuration that joins the ranks into a process group of torch by `env://`, without torch in the controller."""

    backend: Literal["nccl", "gloo"]
    timeout_s: float

    @property
    def backend_cls(self) -> type[Backend]:
        """Backend that the controller runs."""
        return _TorchGroup


class _TorchGroup(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # as in Ray's backend: ranks of a node can access one another's GPUs

    def on_start(self, worker_group: Any, backend_config: TorchGroup) -> None:
        address, port = worker_group.execute_single(0, _find_address)
        worker_group.execute(
            _join_group, address, port, backend=backend_config.backend, timeout_s=backend_config.timeout_s
        )

    def on_shutdown(self, worker_group: Any, backend_config: TorchGroup) -> None:
        with suppress(GetTimeoutError):  # Ray kills the ranks next
            ray.get(worker_group.execute_async(_leave_group), timeout=_LEAVE_S)


def _find_address() -> tuple[str, int]:
    """Return this node's address and one of its free ports."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind(("", 0))
        return address, free.getsockname()[1]


def _join_group(address: str, port: int, *, backend: str, timeout_s: float) -> None:
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


def _leave_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class GroupState:
    """State of a worker group, as its workers last reported it."""

    reason: Reason | None
    """Reason to end in order; None: the group continues."""
    what: str
    """Description of the reason."""
    nodes: dict[int, tuple[str, str]]
    """Node and address by rank."""
    fallbacks: list[tuple[str, int]]
    """Checkpoints that could not be used since the last state: a description, and the step of the one used instead."""
    step: int | None
    """Step of the newest report."""


@dataclass(frozen=True)
class WorkerSettings:
    """Arguments of a pretraining worker, the same on every rank."""

    config: Any
    """`PretrainConfig`; this module does not import it."""
    storage: str
    corpus: str
    profile_steps: int
    credentials: Any
    """`cluster.session.Credentials` of the driver."""
    metrics: Any
    """`cluster.metrics.ExporterSettings` of the job."""
    queue: Any
    """Queue for log lines."""
    channel: Any
    """The `DriverChannel` actor."""
    timeout_s: float
    """Timeout of collectives."""
    group: int = 0
    """Number of the group."""


class DriverChannel:
    """Actor through which the driver talks to successive worker groups.

    Workers name their group, so that late messages from an earlier group are ignored.
    """

    def __init__(self) -> None:
        self._fallbacks: list[tuple[str, int]] = []
        self.begin(0)

    def begin(self, group: int) -> None:
        """Start a new group, and discard the state of the previous one."""
        self._group = group
        self._reason: Reason | None = None
        self._what = ""
        self._nodes: dict[int, tuple[str, str]] = {}
        self._step: int | None = None

    def ask_to_end(self, reason: Reason, what: str) -> None:
        """Ask the group to end. The first reason counts, except that `stop` overrides the others."""
        if self._reason is None or reason == "stop":
            self._reason, self._what = reason, what

    def is_to_end(self, group: int) -> bool:
        """Return whether this group should save a checkpoint and end."""
        return self._reason is not None or group != self._group

    def join(self, group: int, rank: int, node: str, address: str) -> None:
        """Record the node of a rank."""
        if group == self._group:
            self._nodes[rank] = (node, address)

    def reached(self, group: int, step: int) -> None:
        """Record the step of the newest report."""
        if group == self._group:
            self._step = step

    def note(self, what: str, from_step: int) -> None:
        """Record that a worker could not use a checkpoint, and the step of the one that it used instead."""
        self._fallbacks.append((what, from_step))

    def state(self) -> GroupState:
        """Return the state of the group, and forget the fallbacks."""
        fallbacks, self._fallbacks = self._fallbacks, []
        return GroupState(self._reason, self._what, self._nodes, fallbacks, self._step)
