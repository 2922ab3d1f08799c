"""A pretraining worker: joins its group, trains, and passes reports to the driver."""

import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from cluster.group import WorkerSettings
from p2r.errors import masked_errors
from p2r.logs import Line, configure
from p2r.storage import Storage

POLL_S = 0.5
WAIT_TO_SAVE_S = 30


def run_worker(loop_config: dict[str, WorkerSettings]) -> None:
    """Train in this process with the driver's credentials; errors are masked.

    Args:
        loop_config: The settings by the name `settings`: Ray Train passes on a mapping.
    """
    settings = loop_config["settings"]
    settings.credentials.take()
    with masked_errors():
        _train(settings)


def _train(settings: WorkerSettings) -> None:
    began = time.monotonic()
    # Imported here, because the driver does not need DeepSpeed.
    from p2r.engine.pretrain import pretrain as run
    from p2r.engine.profile import profile_text
    from p2r.pipeline.lines import report_lines

    imported = time.monotonic()
    channel, group = settings.channel, settings.group
    rank, lines_of = ray.train.get_context().get_world_rank(), uuid.uuid4().hex
    configure(rank=rank)
    node = ray.get_runtime_context().get_node_id()
    ray.get(channel.join.remote(group, rank, node, ray.util.get_node_ip_address()))
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ray sets OMP_NUM_THREADS by the worker's CPUs; torch reads it on import, which may have happened before.
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    _limit_collectives(settings.timeout_s)
    storage = Storage(settings.storage)
    reports = run(
        settings.config,
        storage=storage,
        corpus=Storage(settings.corpus),
        device=device,
        profile_steps=settings.profile_steps,
        should_stop=_poll_end_flag(channel, group),
        note=channel.note.remote,
    )
    with closing(settings.metrics.open(rank=rank)) as exporter:
        for report in reports:
            exporter.observe(report)
            if rank == 0:
                channel.reached.remote(group, report.step)
                for line in report_lines(report):
                    settings.queue.put(Line(line, group=lines_of))
                if report.resumed_from is not None:
                    first_s = time.monotonic() - imported
                    took = f"pretrain | imports {imported - began:.1f} s, load and first report {first_s:.1f} s"
                    settings.queue.put(Line(took, group=lines_of, rank=rank, step=report.step))
                if report.profile is not None:
                    settings.queue.put(profile_text(storage))
            # Ray fetches a report when it polls, every 2 s, and the next report waits for that: report rarely, and on all ranks alike.
            if report.step % settings.config.checkpoint_interval == 0:
                where = None if report.checkpoint is None else storage.at(report.checkpoint)
                ray.train.report({"step": report.step, "loss": report.loss, "checkpoint": where})


def _poll_end_flag(channel: Any, group: int) -> Callable[[], bool]:
    """Return a function that tells at once whether the group should end; a thread polls the channel in the background."""
    is_to_end = threading.Event()

    def ask() -> None:
        while not is_to_end.wait(POLL_S):
            try:
                if ray.get(channel.is_to_end.remote(group), timeout=30):
                    is_to_end.set()
            except (GetTimeoutError, ActorUnavailableError):
                continue  # the network may come back
            except RayError:
                return  # the driver is gone, so Ray ends this worker

    threading.Thread(target=ask, name="p2r-flag", daemon=True).start()
    return is_to_end.is_set


def _limit_collectives(timeout_s: float) -> None:
    """Give the groups that DeepSpeed creates the same timeout as Ray's group; DeepSpeed does not pass one on."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(torch.distributed.distributed_c10d, name, timedelta(seconds=timeout_s))
