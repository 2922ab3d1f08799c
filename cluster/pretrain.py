"""Pretraining on Ray Train: the engine's generator runs on every worker of a group; a failed group is replaced.

    room on the cluster -> worker group -> failure, notice or request -> decision (a line, a row) -> room ... -> last step

The driver decides. Each group is one `fit` of Ray Train (see `cluster.group`) without its own retries. Ray could restart a
failed group itself, but it counts faults over the whole run and also restarts after permanent errors. It reports neither the
step that the run resumes from nor the restarts left. Its elastic groups ignore which numbers of workers can share a batch. A
new group always resumes from the newest checkpoint; the same holds if driver or head are lost and the job is submitted again.

A group may have to end early: on SIGTERM, a notice of preemption, or room for more workers. A flag tells its workers, which
poll it; all save a checkpoint at the same step and exit in order.
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

from cluster.faults import Cause, Decision, Fault, FaultLog, cause_of, refusal_of
from cluster.group import DriverChannel, GroupState, Reason, TorchGroup, Trainer, WorkerSettings
from cluster.metrics import ExporterSettings
from cluster.pretrain_worker import POLL_S, WAIT_TO_SAVE_S, run_worker
from cluster.progress import relay
from cluster.session import (
    Places,
    credentials,
    draining_nodes,
    gpu_types,
    num_cpus,
    num_gpus,
    this_node,
    usable_nodes,
)
from cluster.stopping import StopRequest, catch_sigterm
from p2r.config import PretrainConfig
from p2r.data.order import allowed_world_sizes, check_world_size, sizes_for_micro_batch, world_sizes_between
from p2r.data.stream import order_of
from p2r.engine.checkpoint import newest_checkpoint, refuse_other_config, refuse_other_ranks
from p2r.engine.corpora import balance_of, corpora_of, refuse_other_stream
from p2r.errors import InputError, TrainingError, error_text
from p2r.job import Resources
from p2r.logs import Say
from p2r.storage import Storage

_WITHOUT_BF16 = ("K80", "P4", "P100", "V100", "T4")
_LOG = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    *,
    storage: Storage,
    corpus: Storage,
    resources: Resources,
    retries: int,
    say: Say,
    profile_steps: int = 0,
    metrics: ExporterSettings | None = None,
    on_fault: Callable[[Fault], None] | None = None,
    stop: StopRequest | None = None,
    places: Places | None = None,
) -> bool:
    """Train to the last step on the workers that `resources` asks for; rank 0 may profile some of its steps.

    `metrics` are the settings of every worker's `Exporter`; `on_fault` receives every row of faults.jsonl. A caller with several runs
    at a time passes `stop`, in place of SIGTERM, and the `places` that they share.

    Returns:
        True if the last step was reached; False if the run was asked to stop and saved a checkpoint.

    Raises:
        InputError: Corpus, number of workers, GPUs or checkpoint do not fit; raised before any worker starts.
        TrainingError: Training failed more than `retries` times in a row without a new checkpoint, or there was no room for
            `resources.node_wait_s`.
    """
    sizes, per_worker = allowed_sizes(config, resources)
    checkpoint = newest_checkpoint(storage)
    if checkpoint is None:
        corpora = corpora_of(config, corpus)
        balance = balance_of(config, corpora)
        order_of(corpora, image=config.image, seed=config.seed, global_batch=config.global_batch, balance=balance)
        if balance is not None:
            say(f"pretrain | {balance.line(config.global_batch)}")
    else:
        refuse_other_config(checkpoint.manifest, config, where=storage.at(checkpoint.path))
        if checkpoint.step >= config.steps:
            return True
        for size in sizes:
            refuse_other_ranks(checkpoint.manifest, config, world_size=size, where=storage.at(checkpoint.path))
        refuse_other_stream(config, corpus, checkpoint.manifest.state.stream)
    asked = nullcontext(stop) if stop is not None else catch_sigterm()
    with relay(say) as queue, _open_channel() as channel, asked as stop:
        run = GroupRun(
            config=config,
            storage=storage,
            resources=resources,
            retries=retries,
            per_worker=per_worker,
            sizes=sizes,
            settings=WorkerSettings(
                config=config,
                storage=storage.url,
                corpus=corpus.url,
                profile_steps=profile_steps,
                credentials=credentials(),
                metrics=metrics or ExporterSettings("", storage.url, None),
                queue=queue,
                channel=channel,
                timeout_s=resources.collective_timeout_s,
            ),
            channel=channel,
            stop=stop,
            places=places or Places(),
            faults=FaultLog(storage, say=say, on_fault=on_fault),
            say=say,
        )
        if checkpoint is not None and not run.faults.has_ended_at(checkpoint.step):
            run.faults.add(
                "driver",
                "the previous run ended without recording a cause",
                decision="restart",
                from_step=checkpoint.step,
            )
        return _train_to_end(run)


def ray_folder(storage: Storage) -> str:
    """Return the folder for Ray's own state, beside the job's. Resuming never reads it."""
    url = storage.url.rsplit("/", 1)[0] + "/.ray"
    return url.removeprefix("file://")


@dataclass(frozen=True)
class GroupRun:
    """Settings and state that stay the same across worker groups."""

    config: PretrainConfig
    storage: Storage
    resources: Resources
    retries: int
    per_worker: dict[str, float]
    """Resources of one worker, by Ray's names."""
    sizes: list[int]
    settings: WorkerSettings
    channel: Any
    """The `DriverChannel` actor."""
    stop: StopRequest
    places: Places
    faults: FaultLog
    say: Say

    @property
    def uses_gpu(self) -> bool:
        """True if the workers run on GPUs."""
        return "GPU" in self.per_worker

    def step(self) -> int | None:
        """Return the step of the newest checkpoint."""
        checkpoint = newest_checkpoint(self.storage)
        return None if checkpoint is None else checkpoint.step


def _train_to_end(run: GroupRun) -> bool:
    """Start groups until one reaches the last step, or the run is asked to stop; return the run's places in any case."""
    try:
        return _train_groups(run)
    finally:
        run.places.hold(run.storage.url, 0)


def _train_groups(run: GroupRun) -> bool:
    in_a_row, saved, group = 0, run.step(), 0
    while True:
        num_workers = _wait_for_room(run)
        if num_workers is None or run.stop.event.is_set():
            run.faults.add("stop", f"{run.stop.why} between two groups", decision="end", from_step=saved)
            return False
        workers = f"{num_workers} worker{'s' * (num_workers > 1)} on {'GPU' if run.uses_gpu else 'CPU'}"
        run.say(f"pretrain | {workers}, {run.config.steps} steps of {run.config.global_batch} images")
        group, failure = group + 1, None
        run.channel.begin.remote(group)
        with _watch_group(run, num_workers), tempfile.TemporaryDirectory(prefix="p2r-ray-train-") as folder:
            try:
                _new_trainer(run, group, num_workers, folder).fit()
            except (TrainingFailedError, RayError) as error:
                failure = error
            finally:
                run.places.hold(run.storage.url, 0)
        state: GroupState = ray.get(run.channel.state.remote())
        before, saved = saved, run.step()
        if saved is not None and saved >= run.config.steps:
            return True
        if failure is None and state.reason is not None:
            if not _record_planned_end(run, state, saved):
                return False
            in_a_row = 0
            continue
        if saved != before:
            in_a_row = 0
        in_a_row = _record_failure(run, failure, state, from_step=saved, in_a_row=in_a_row)


def _record_planned_end(run: GroupRun, state: GroupState, saved: int | None) -> bool:
    """Record why a group ended in order before the last step; return whether another follows."""
    if state.reason == "stop":
        run.faults.add("stop", run.stop.why, decision="end", from_step=saved)
        return False
    if state.reason == "preemption":
        run.faults.add("preemption", state.what, decision="restart", from_step=saved)
    else:
        run.faults.add("node", state.what, decision="resize", from_step=saved)
    return True


def _record_failure(
    run: GroupRun,
    failure: Exception | None,
    state: GroupState,
    *,
    from_step: int | None,
    in_a_row: int,
) -> int:
    """Record that a group failed, and return the count of failures if another group should follow.

    Args:
        run: The run.
        failure: Exception from `trainer.fit()`; None: the workers ended early without one.
        state: The group's last state.
        from_step: Step of the newest checkpoint.
        in_a_row: Failures before this one since the last new checkpoint, without preemptions.

    Returns:
        The same count with this failure.

    Raises:
        InputError: A worker found invalid input.
        TrainingError: The loss is no longer finite, or there were too many faults.
    """
    if failure is None:
        cause: Cause = "unknown"
        what = "the workers ended before the last step"
    else:
        # A run with a checkpoint has trained before, even if this group could not fetch it.
        was_running = state.step is not None or from_step is not None
        if (refused := refusal_of(failure, was_running=was_running)) is not None:
            raise refused
        usable = usable_nodes()
        addresses = {rank: address for rank, (_, address) in state.nodes.items()}
        lost = {rank: addresses[rank] for rank, (node, _) in state.nodes.items() if node not in usable}
        cause, what = cause_of(failure, lost=lost, addresses=addresses)
        if run.stop.event.is_set():
            run.faults.add("stop", f"{run.stop.why}; {what}", decision="end", from_step=from_step)
            raise TrainingError(
                f"stopped ({run.stop.why}) while workers failed; run the job again to resume"
            ) from failure
    if cause == "preemption":
        run.faults.add(cause, what, decision="restart", from_step=from_step)
        return in_a_row
    in_a_row += 1
    ends = cause == "divergence" or in_a_row > run.retries
    decision: Decision = "end" if ends else "restart"
    run.faults.add(cause, what, decision=decision, from_step=from_step, count=in_a_row, limit=run.retries)
    if cause == "divergence":
        raise TrainingError(what) from failure
    if ends:
        raise TrainingError(
            f"pretraining failed {in_a_row} times in a row without a new checkpoint (retries: {run.retries}); "
            f"the last time: {cause}: {what}"
        ) from failure
    return in_a_row


def _new_trainer(run: GroupRun, group: int, num_workers: int, folder: str) -> Trainer:
    """Return the trainer of one group. Its folder stays empty: we save checkpoints ourselves, so Ray's state may be lost."""
    timeout_s = run.resources.collective_timeout_s
    # Ray passes these on to its controller and the workers.
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(timeout_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout_s + 60)
    # The driver watches for notices itself (`_watch_group`), so Ray's own process for this is not needed.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return Trainer(
        run_worker,
        train_loop_config={"settings": replace(run.settings, group=group)},
        backend_config=TorchGroup(backend="nccl" if run.uses_gpu else "gloo", timeout_s=timeout_s),
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=run.uses_gpu, resources_per_worker=run.per_worker
        ),
        run_config=RunConfig(
            name=f"pretrain-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": network_environment(run.resources)},
        ),
    )


def network_environment(resources: Resources) -> dict[str, str]:
    """Return the variables that give the job's network settings to NCCL and gloo in the workers."""
    name = resources.network_interface
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "NCCL_DEBUG": "WARN",
        **({"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name} if name else {}),
        **{key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "TORCH_NCCL_"))},
        **resources.nccl,
    }


@contextmanager
def _open_channel() -> Iterator[Any]:
    channel = ray.remote(num_cpus=0)(DriverChannel).options(scheduling_strategy=this_node()).remote()
    try:
        yield channel
    finally:
        ray.kill(channel)


@contextmanager
def _watch_group(run: GroupRun, num_workers: int) -> Iterator[None]:
    """While a group runs, watch for reasons to end it in order, and record the checkpoints that its workers could not use."""
    ended = threading.Event()
    asked: Reason | None = None
    looked_at = time.monotonic()

    def look(*, is_last: bool) -> None:
        nonlocal asked, looked_at
        state: GroupState = ray.get(run.channel.state.remote())
        for told, from_step in state.fallbacks:
            run.faults.add("checkpoint", told, decision="fall back", from_step=from_step)
        if is_last:
            return
        if run.stop.event.is_set() and asked != "stop":
            ray.get(run.channel.ask_to_end.remote("stop", run.stop.why))
            asked = "stop"
            run.say(_stop_message(run, state.step))
        if asked is None and (what := _preemption_message(state.nodes)):
            ray.get(run.channel.ask_to_end.remote("preemption", what))
            asked = "preemption"
            run.say(f"pretrain | {what}; saving a checkpoint after this step, then moving to other nodes")
        is_time = time.monotonic() - looked_at > run.resources.resize_interval_s
        if asked is None and num_workers < max(run.sizes) and state.nodes and is_time:
            looked_at = time.monotonic()
            could_be = _largest_fitting(run)
            if could_be is not None and could_be > num_workers:
                ray.get(run.channel.ask_to_end.remote("resize", f"there is room for {could_be} workers"))
                asked = "resize"

    def watch() -> None:
        is_last, last_error = False, ""
        while not is_last:
            is_last = ended.wait(POLL_S)
            try:
                look(is_last=is_last)
            except Exception as error:  # the storage or Ray may answer again, and a stop must not be missed
                text = error_text(error)
                if text != last_error:  # not twice a second
                    _LOG.warning("an error while the worker group was watched; watching continues: %s", text)
                last_error = text

    thread = threading.Thread(target=watch, name="p2r-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=30)


def _stop_message(run: GroupRun, step: int | None) -> str:
    """Return the log line for a request to stop; for SIGTERM, also the steps lost if the sender does not wait long enough."""
    line = f"pretrain | {run.stop.why}: saving a checkpoint after this step, then ending"
    if run.stop.why != "SIGTERM" or "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return line
    wait_s = int(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))  # Ray's default; set on the head and inherited here
    if wait_s >= WAIT_TO_SAVE_S:
        return line
    saved = run.step() or 0
    at_most = run.config.checkpoint_interval if step is None else step + run.config.report_interval - saved
    return (
        f"{line}. The head kills the job after {wait_s} s (RAY_JOB_STOP_WAIT_TIME_S): if that is too short, at most "
        f"{max(1, min(at_most, run.config.checkpoint_interval))} steps since step {saved} are lost"
    )


def _preemption_message(nodes: Mapping[int, tuple[str, str]]) -> str | None:
    """Return a line on the nodes of this group that are about to be removed; None if there are none."""
    deadlines = draining_nodes()
    leaving = {address: deadlines[node] for node, address in nodes.values() if node in deadlines}
    if not leaving:
        return None
    deadline_ms = min((at for at in leaving.values() if at), default=0)
    left = f" in {deadline_ms / 1000 - time.time():.0f} s" if deadline_ms else ""
    return f"node {', '.join(sorted(leaving))} will be removed{left}"


def _wait_for_room(run: GroupRun) -> int | None:
    """Return the number of workers to start, and hold their places; None if the run is asked to stop while it waits.

    Raises:
        TrainingError: There was no room for `resources.node_wait_s`. While other runs of this driver train, it waits for them.
    """
    began, has_said = time.monotonic(), False
    while not run.stop.event.is_set():
        with run.places.lock:
            found = _largest_fitting(run)
            if found is not None:
                run.places.hold(run.storage.url, found)
                return found
        if run.places.held_by_others(run.storage.url):
            began = time.monotonic()
        wanted = f"{run.sizes[0]} worker{'s' * (run.sizes[0] > 1)} of " + ", ".join(
            f"{number:g} {name}" for name, number in run.per_worker.items()
        )
        if not has_said:
            run.say(f"pretrain | waiting for room for {wanted}, up to {run.resources.node_wait_s:.0f} s")
            has_said = True
        if time.monotonic() - began > run.resources.node_wait_s:
            raise TrainingError(
                f"there was no room for {wanted} for {run.resources.node_wait_s:.0f} s (resources.node_wait_s): "
                "add nodes, or lower the minimum of resources.num_workers=[min, max]"
            )
        run.stop.event.wait(1.0)
    return None


def _largest_fitting(run: GroupRun) -> int | None:
    """Return the largest allowed number of workers that the nodes have room for now; None if there is none."""
    room = room_for(run.per_worker) - run.places.held_by_others(run.storage.url)
    return max((size for size in run.sizes if size <= room), default=None)


def room_for(per_worker: Mapping[str, float]) -> int:
    """Return the number of workers with these resources that all usable nodes have room for."""
    return _count_room(list(usable_nodes().values()), per_worker)


def _count_room(nodes: list[dict[str, float]], per_worker: Mapping[str, float]) -> int:
    return sum(
        min(int(node.get(name, 0) / number + 1e-6) for name, number in per_worker.items() if number) for node in nodes
    )


def allowed_sizes(config: PretrainConfig, resources: Resources) -> tuple[list[int], dict[str, float]]:
    """Return the numbers of workers that a run may use, in increasing order, and the resources of one worker by Ray's names.

    Raises:
        InputError: No number can share the batch, the cluster has no room for the smallest, or its GPUs do not fit.
    """
    gpus = _gpus_per_worker(config, resources)
    per_worker = {"CPU": resources.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    return _allowed_world_sizes(config, resources, gpus=gpus), per_worker


def _gpus_per_worker(config: PretrainConfig, resources: Resources) -> float:
    """Return the number of GPUs of each worker: 0, 1, or a fraction.

    Raises:
        InputError: The cluster has no GPUs, or they lack the job's precision.
    """
    there = num_gpus()
    gpus = int(there > 0) if resources.gpus_per_worker == "auto" else resources.gpus_per_worker
    if gpus and not there:
        raise InputError(
            "resources.gpus_per_worker asks for a GPU, but the cluster has none: set resources.gpus_per_worker=auto, "
            "or add nodes with GPUs"
        )
    if gpus and config.precision == "bf16":
        lacking = sorted(gpu_types().intersection(_WITHOUT_BF16))
        if lacking:
            raise InputError(
                f"pretrain.precision is bf16, which some GPUs of this cluster do not support ({', '.join(lacking)}): "
                "set pretrain.precision=fp32, or use GPUs since Ampere (A10, A100, H100, ...)"
            )
    return gpus


def _allowed_world_sizes(config: PretrainConfig, resources: Resources, *, gpus: float) -> list[int]:
    """Return the numbers of workers that this run may use.

    Raises:
        InputError: No number can share the batch, or the cluster has no room for the smallest.
    """
    wanted = resources.num_workers
    if isinstance(wanted, tuple):
        sizes = world_sizes_between(config.global_batch, *wanted)
    elif wanted == "auto":
        room = max(1, int(num_gpus() / gpus if gpus else num_cpus() / resources.cpus_per_worker))
        sizes = [max(size for size in allowed_world_sizes(config.global_batch) if size <= room)]
    else:
        check_world_size(config.global_batch, wanted)
        sizes = [wanted]
    fitting = sizes_for_micro_batch(config.global_batch, sizes, config.micro_batch)
    available = num_gpus() / gpus if gpus else num_cpus() / resources.cpus_per_worker
    if fitting[0] > available:
        raise InputError(
            f"resources.num_workers asks for {fitting[0]} workers, but the cluster has room for {int(available)}: "
            "ask for fewer, or add nodes"
        )
    return fitting
