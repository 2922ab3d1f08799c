"""Pretraining on Ray Train: the engine's generator on every worker of a group, and a new group when one fails.

    room on the cluster -> worker group -> failure, notice or wish -> decision (a line, a row) -> room ... -> last step

The driver decides; each group is one `fit` of Ray Train (see `cluster.group`) without retries of its own. Ray would start a failed
group again by itself, but it counts faults over the whole run, restarts what cannot succeed, says neither from which step it
goes on nor how many restarts are left, and its elastic groups know nothing of the numbers of workers that can share a batch. A
new group always goes on from the newest checkpoint, so the same happens when driver or head are lost and the job is submitted again.

A group that is to end early (SIGTERM, a notice of preemption, room for more workers) is told so by a flag that every worker
asks for; all save a checkpoint at the same step and end in order.
"""

import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.util.queue import Queue

from cluster.faults import Cause, FaultLog, cause_of, refusal_of
from cluster.group import Reason, TorchGroup, Trainer, Wire
from cluster.metrics import Exporter
from cluster.progress import Say, relay
from cluster.session import credentials, draining_nodes, gpu_types, num_cpus, num_gpus, this_node, usable_nodes
from p2r.config import PretrainConfig
from p2r.data.order import allowed_world_sizes, check_world_size, sizes_for_micro_batch, world_sizes_between
from p2r.data.stream import order_of
from p2r.engine.checkpoint import newest_checkpoint, refuse_other_config, refuse_other_ranks
from p2r.engine.corpora import corpora_of, refuse_other_stream
from p2r.errors import InputError, TrainingError, masked_errors
from p2r.job import Resources
from p2r.logs import Line, configure
from p2r.storage import Storage

_POLL_S = 0.5
_WITHOUT_BF16 = ("K80", "P4", "P100", "V100", "T4")
_WAIT_TO_SAVE_S = 30


def pretrain(
    config: PretrainConfig,
    *,
    storage: Storage,
    corpus: Storage,
    resources: Resources,
    retries: int,
    say: Say,
    profile_steps: int = 0,
    metrics: Mapping[str, Any] | None = None,
    on_fault: Callable[[Mapping[str, Any]], None] | None = None,
) -> bool:
    """Train to the end on as many workers as `resources` says; rank 0 may profile some of its steps.

    `metrics` are the arguments of every worker's `Exporter`, but for its rank; `on_fault` is given every row of faults.jsonl.

    Returns:
        Whether it came to the end; otherwise it was told to stop (SIGTERM), and has left a checkpoint.

    Raises:
        InputError: found before a worker is started: corpus, number of workers, GPUs or checkpoint do not fit.
        TrainingError: if it fails more than `retries` times in a row without a new checkpoint, or there was no room for
            `resources.node_wait_s`.
    """
    gpus = _gpus_per_worker(config, resources)
    sizes = _world_sizes(config, resources, uses_gpu=gpus > 0)
    checkpoint = newest_checkpoint(storage)
    if checkpoint is None:
        order_of(corpora_of(config, corpus), image=config.image, seed=config.seed, global_batch=config.global_batch)
    else:
        refuse_other_config(checkpoint, config, where=storage.at(checkpoint["path"]))
        if checkpoint["step"] >= config.steps:
            return True
        for size in sizes:
            refuse_other_ranks(checkpoint, config, world_size=size, where=storage.at(checkpoint["path"]))
        refuse_other_stream(config, corpus, checkpoint["state"]["stream"])
    with relay(say) as queue, _wire() as wire, _sigterm() as stop:
        run = _Run(
            config=config,
            storage=storage,
            resources=resources,
            retries=retries,
            gpus=gpus,
            sizes=sizes,
            settings={
                "config": config,
                "storage": storage.url,
                "corpus": corpus.url,
                "profile_steps": profile_steps,
                "credentials": credentials(),
                "metrics": metrics or {"run": "", "storage_url": storage.url, "endpoint": None},
            },
            queue=queue,
            wire=wire,
            stop=stop,
            faults=FaultLog(storage, say=say, on_fault=on_fault),
            say=say,
        )
        if checkpoint is not None and not run.faults.has_ended:
            run.faults.add(
                "driver",
                "the run before this one ended without a word",
                decision="restart",
                from_step=checkpoint["step"],
            )
        return _to_the_end(run)


def ray_folder(storage: Storage) -> str:
    """Where Ray keeps its own state, beside the job's: what resumes a run is never read from there."""
    url = storage.url.rsplit("/", 1)[0] + "/.ray"
    return url.removeprefix("file://")


@dataclass(frozen=True)
class _Run:
    """What stays the same from one worker group to the next."""

    config: PretrainConfig
    storage: Storage
    resources: Resources
    retries: int
    gpus: int
    sizes: list[int]
    settings: dict[str, Any]
    queue: Queue
    wire: Any
    """The actor of a `Wire`."""
    stop: threading.Event
    faults: FaultLog
    say: Say

    @property
    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.resources.cpus_per_worker} | ({"GPU": self.gpus} if self.gpus else {})

    def step(self) -> int | None:
        """Return the step of the newest checkpoint."""
        checkpoint = newest_checkpoint(self.storage)
        return None if checkpoint is None else checkpoint["step"]


def _to_the_end(run: _Run) -> bool:
    """Start groups until one has taken the last step, or the run is to end."""
    in_a_row, saved, group = 0, run.step(), 0
    while True:
        num_workers = _wait_for_room(run)
        if num_workers is None or run.stop.is_set():
            run.faults.add("stop", "SIGTERM between two groups", decision="end", from_step=saved)
            return False
        workers = f"{num_workers} worker{'s' * (num_workers > 1)} on {'GPU' if run.gpus else 'CPU'}"
        run.say(f"pretrain | {workers}, {run.config.steps} steps of {run.config.global_batch} images")
        group, failure = group + 1, None
        run.wire.begin.remote(group)
        with _watched(run, num_workers), tempfile.TemporaryDirectory(prefix="p2r-ray-train-") as folder:
            try:
                _trainer(run, group, num_workers, folder).fit()
            except (TrainingFailedError, RayError) as error:
                failure = error
        state: dict[str, Any] = ray.get(run.wire.state.remote())
        before, saved = saved, run.step()
        if saved is not None and saved >= run.config.steps:
            return True
        if failure is None and state["reason"] is not None:
            if not _went_as_asked(run, state, saved):
                return False
            in_a_row = 0
            continue
        in_a_row = 1 if saved != before else in_a_row + 1
        _decide(run, failure, state, from_step=saved, in_a_row=in_a_row)


def _went_as_asked(run: _Run, state: Mapping[str, Any], saved: int | None) -> bool:
    """Note why a group ended in order before the last step; tell whether another one follows."""
    reason: Reason = state["reason"]
    if reason == "stop":
        run.faults.add("stop", "SIGTERM", decision="end", from_step=saved)
        return False
    if reason == "preemption":
        run.faults.add("preemption", state["what"], decision="restart", from_step=saved)
    else:
        run.faults.add("node", state["what"], decision="resize", from_step=saved)
    return True


def _decide(
    run: _Run,
    failure: Exception | None,
    state: Mapping[str, Any],
    *,
    from_step: int | None,
    in_a_row: int,
) -> None:
    """Note that a group has failed; return if another one is to follow.

    Raises:
        InputError: that a worker has found.
        TrainingError: The loss is no longer finite, or there were too many faults.
    """
    if failure is None:
        cause: Cause = "unknown"
        what = "the workers ended before the last step"
    else:
        if (refused := refusal_of(failure, was_running=state["step"] is not None)) is not None:
            raise refused
        usable = usable_nodes()
        addresses = {rank: address for rank, (_, address) in state["nodes"].items()}
        lost = {rank: addresses[rank] for rank, (node, _) in state["nodes"].items() if node not in usable}
        cause, what = cause_of(failure, lost=lost, addresses=addresses)
        if run.stop.is_set():
            run.faults.add("stop", f"SIGTERM; {what}", decision="end", from_step=from_step)
            raise TrainingError("stopped by SIGTERM while workers failed; run the job again to go on") from failure
    limit = None if cause == "preemption" else run.retries
    ends = cause == "divergence" or (limit is not None and in_a_row > limit)
    run.faults.add(cause, what, decision="end" if ends else "restart", from_step=from_step, count=in_a_row, limit=limit)
    if cause == "divergence":
        raise TrainingError(what) from failure
    if ends:
        raise TrainingError(
            f"pretraining failed {in_a_row} times in a row without a new checkpoint (retries: {run.retries}); "
            f"the last time: {cause}: {what}"
        ) from failure


def _trainer(run: _Run, group: int, num_workers: int, folder: str) -> Trainer:
    """One group. Its folder is for Ray alone and stays empty: checkpoints are ours, so that Ray's state cannot be lost."""
    timeout_s = run.resources.collective_timeout_s
    # Ray hands these on to its controller and the workers.
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(timeout_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout_s + 60)
    # The driver looks for notices itself (`_watched`), and needs no further process for it.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return Trainer(
        _worker,
        train_loop_config={
            **run.settings,
            "queue": run.queue,
            "wire": run.wire,
            "group": group,
            "timeout_s": timeout_s,
        },
        backend_config=TorchGroup(backend="nccl" if run.gpus else "gloo", timeout_s=timeout_s),
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=run.gpus > 0, resources_per_worker=run.per_worker
        ),
        run_config=RunConfig(
            name=f"pretrain-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": network_environment(run.resources)},
        ),
    )


def network_environment(resources: Resources) -> dict[str, str]:
    """Variables by which NCCL and gloo of the workers learn what the job says about its network."""
    name = resources.network_interface
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "NCCL_DEBUG": "WARN",
        **({"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name} if name else {}),
        **{key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "TORCH_NCCL_"))},
        **resources.nccl,
    }


@contextmanager
def _wire() -> Iterator[Any]:
    wire = ray.remote(num_cpus=0)(Wire).options(scheduling_strategy=this_node()).remote()
    try:
        yield wire
    finally:
        ray.kill(wire)


@contextmanager
def _watched(run: _Run, num_workers: int) -> Iterator[None]:
    """While a group runs, look for reasons to end it in order, and write down what its workers have noted."""
    ended = threading.Event()

    def watch() -> None:
        asked: Reason | None = None
        looked_at = time.monotonic()
        while True:
            is_last = ended.wait(_POLL_S)
            state = ray.get(run.wire.state.remote())
            for row in state["rows"]:
                run.faults.add_row(row)
            if is_last:
                return
            if run.stop.is_set() and asked != "stop":
                asked = "stop"
                ray.get(run.wire.ask_to_end.remote("stop", "SIGTERM"))
                run.say(_of_stopping(run, state["step"]))
            if asked is None and (what := _preempted(state["nodes"])):
                asked = "preemption"
                ray.get(run.wire.ask_to_end.remote("preemption", what))
                run.say(f"pretrain | {what}; a checkpoint after this step, then other nodes")
            is_time = time.monotonic() - looked_at > run.resources.resize_interval_s
            if asked is None and num_workers < max(run.sizes) and state["nodes"] and is_time:
                looked_at = time.monotonic()
                could_be = _fitting(run)
                if could_be is not None and could_be > num_workers:
                    asked = "resize"
                    ray.get(run.wire.ask_to_end.remote("resize", f"there is room for {could_be} workers"))

    thread = threading.Thread(target=watch, name="p2r-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=30)


def _of_stopping(run: _Run, step: int | None) -> str:
    """Say what a SIGTERM leads to, and what is lost if whoever sent it does not wait."""
    line = "pretrain | SIGTERM: a checkpoint after this step, then the end"
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return line
    wait_s = int(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))  # Ray's own default; set on the head, inherited here
    if wait_s >= _WAIT_TO_SAVE_S:
        return line
    saved = run.step() or 0
    at_most = run.config.checkpoint_interval if step is None else step + run.config.report_interval - saved
    return (
        f"{line}. The head kills the job after {wait_s} s (RAY_JOB_STOP_WAIT_TIME_S): if that is too short, at most "
        f"{max(1, min(at_most, run.config.checkpoint_interval))} steps since step {saved} are lost"
    )


def _preempted(nodes: Mapping[int, tuple[str, str]]) -> str | None:
    """Return a line on the nodes of this group that will be taken away."""
    deadlines = draining_nodes()
    leaving = {address: deadlines[node] for node, address in nodes.values() if node in deadlines}
    if not leaving:
        return None
    deadline_ms = min((at for at in leaving.values() if at), default=0)
    left = f" in {deadline_ms / 1000 - time.time():.0f} s" if deadline_ms else ""
    return f"node {', '.join(sorted(leaving))} will be taken away{left}"


def _wait_for_room(run: _Run) -> int | None:
    """Return how many workers to start; None if the run is told to stop while it waits.

    Raises:
        TrainingError: There was no room for `resources.node_wait_s`.
    """
    began, has_said = time.monotonic(), False
    while not run.stop.is_set():
        found = _fitting(run)
        if found is not None:
            return found
        wanted = f"{run.sizes[0]} worker{'s' * (run.sizes[0] > 1)} of " + ", ".join(
            f"{number:g} {name}" for name, number in run.per_worker.items()
        )
        if not has_said:
            run.say(f"pretrain | waiting for room for {wanted}, up to {run.resources.node_wait_s:.0f} s")
            has_said = True
        if time.monotonic() - began > run.resources.node_wait_s:
            raise TrainingError(
                f"there was no room for {wanted} for {run.resources.node_wait_s:.0f} s (resources.node_wait_s): "
                "add nodes, or let resources.num_workers=[min, max] begin lower"
            )
        run.stop.wait(1.0)
    return None


def _fitting(run: _Run) -> int | None:
    """Return the largest number of workers that nodes have room for now."""
    room = _room(list(usable_nodes().values()), run.per_worker)
    return max((size for size in run.sizes if size <= room), default=None)


def _room(nodes: list[dict[str, float]], per_worker: Mapping[str, float]) -> int:
    return sum(
        min(int(node.get(name, 0) / number + 1e-6) for name, number in per_worker.items() if number) for node in nodes
    )


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """Turn the first SIGTERM into an event; a second one ends the process as if there were no handler."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # Ray installs its own in ray.init, which is over by now.
    signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _worker(settings: dict[str, Any]) -> None:
    settings["credentials"].take()
    with masked_errors():
        _train(settings)


def _train(settings: dict[str, Any]) -> None:
    began = time.monotonic()
    # Imported here: the driver has no use for DeepSpeed.
    from p2r.engine.pretrain import pretrain as run
    from p2r.engine.profile import profile_text
    from p2r.pipeline.lines import report_lines

    imported = time.monotonic()
    wire, group = settings["wire"], settings["group"]
    rank, lines_of = ray.train.get_context().get_world_rank(), uuid.uuid4().hex
    configure(rank=rank)
    node = ray.get_runtime_context().get_node_id()
    ray.get(wire.join.remote(group, rank, node, ray.util.get_node_ip_address()))
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ray sets the number of threads by CPUs of the worker; torch reads it when it is imported, which may have been before.
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    _limit_collectives(settings["timeout_s"])
    storage = Storage(settings["storage"])
    reports = run(
        settings["config"],
        storage=storage,
        corpus=Storage(settings["corpus"]),
        device=device,
        profile_steps=settings["profile_steps"],
        should_stop=_flag(wire, group),
        note=lambda row: wire.note.remote(dict(row)),
    )
    with closing(Exporter(**settings["metrics"], rank=rank)) as exporter:
        for report in reports:
            exporter.observe(report)
            if rank == 0:
                wire.reached.remote(group, report.step)
                for line in report_lines(report):
                    settings["queue"].put(Line(line, group=lines_of))
                if report.resumed_from is not None:
                    first_s = time.monotonic() - imported
                    took = f"pretrain | imports {imported - began:.1f} s, load and first report {first_s:.1f} s"
                    settings["queue"].put(Line(took, group=lines_of, rank=rank, step=report.step))
                if report.profile is not None:
                    settings["queue"].put(profile_text(storage))
            # Ray takes a report in when it polls, every 2 s, and the next one waits for that: seldom enough, and on all ranks alike.
            if report.step % settings["config"].checkpoint_interval == 0:
                where = None if report.checkpoint is None else storage.at(report.checkpoint)
                ray.train.report({"step": report.step, "loss": report.loss, "checkpoint": where})


def _flag(wire: Any, group: int) -> Callable[[], bool]:
    """Return what tells at once whether the group is to end; a thread asks the driver's actor in the background."""
    is_to_end = threading.Event()

    def ask() -> None:
        while not is_to_end.wait(_POLL_S):
            try:
                if ray.get(wire.is_to_end.remote(group), timeout=30):
                    is_to_end.set()
            except GetTimeoutError:
                continue  # the network may come back
            except RayError:
                return  # the driver is gone, and Ray ends this worker

    threading.Thread(target=ask, name="p2r-flag", daemon=True).start()
    return is_to_end.is_set


def _limit_collectives(timeout_s: float) -> None:
    """Let groups that DeepSpeed makes beside Ray's hang no longer than that one; it passes no timeout on."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(torch.distributed.distributed_c10d, name, timedelta(seconds=timeout_s))


def _gpus_per_worker(config: PretrainConfig, resources: Resources) -> int:
    """Return how many GPUs each worker gets, 0 or 1.

    Raises:
        InputError: They are not there, or do not have the job's precision.
    """
    there = num_gpus()
    gpus = int(there > 0) if resources.gpus_per_worker == "auto" else resources.gpus_per_worker
    if gpus and not there:
        raise InputError(
            "resources.gpus_per_worker asks for a GPU, and the cluster has none: set resources.gpus_per_worker=auto, "
            "or add nodes with GPUs"
        )
    if gpus and config.precision == "bf16":
        lacking = sorted(gpu_types().intersection(_WITHOUT_BF16))
        if lacking:
            raise InputError(
                f"pretrain.precision is bf16, which GPUs of this cluster do not have ({', '.join(lacking)}): "
                "set pretrain.precision=fp32, or use GPUs since Ampere (A10, A100, H100, ...)"
            )
    return gpus


def _world_sizes(config: PretrainConfig, resources: Resources, *, uses_gpu: bool) -> list[int]:
    """Return the numbers of workers that this run may have.

    Raises:
        InputError: There is none that can share the batch, or the cluster has no room for it.
    """
    wanted = resources.num_workers
    if isinstance(wanted, tuple):
        sizes = world_sizes_between(config.global_batch, *wanted)
    elif wanted == "auto":
        room = max(1, num_gpus() if uses_gpu else int(num_cpus() / resources.cpus_per_worker))
        sizes = [max(size for size in allowed_world_sizes(config.global_batch) if size <= room)]
    else:
        check_world_size(config.global_batch, wanted)
        sizes = [wanted]
    fitting = sizes_for_micro_batch(config.global_batch, sizes, config.micro_batch)
    available = num_gpus() if uses_gpu else num_cpus() / resources.cpus_per_worker
    if fitting[0] > available:
        raise InputError(
            f"resources.num_workers asks for {fitting[0]} workers, the cluster has room for {int(available)}: "
            "ask for fewer, or add nodes"
        )
    return fitting
