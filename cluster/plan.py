"""`p2r plan`: estimates for a job on a cluster that may not exist yet, as tables or JSON; starts and writes nothing."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from rich.table import Table

from p2r.config import PretrainConfig
from p2r.console import console, show_json
from p2r.data.stream import Corpus
from p2r.engine.corpora import corpora_of
from p2r.engine.history import read_history
from p2r.errors import InputError
from p2r.job import Job
from p2r.planning.estimate import measured_rate, plan, refuse_what_does_not_fit
from p2r.planning.forecast import Plan, Rate
from p2r.planning.roofline import EFFICIENCY
from p2r.planning.tune_batch import HEADROOM
from p2r.storage import Storage

_HISTORY = "pretrain/history.jsonl"
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def show_plan(
    job: Job,
    config: PretrainConfig,
    *,
    num_nodes: int,
    workers_per_node: int | None,
    device: str | None,
    memory_gib: float | None,
    images_per_s: float | None,
    cost_per_hour: float | None,
    as_json: bool,
    say: Callable[[str], None],
) -> None:
    """Print the plan of a job; afterwards raise `InputError` if the job does not fit."""
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {device!r}")
    device = device or _choose_device(job)
    if memory_gib is None and device == "cuda" and torch.cuda.is_available():
        memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    storage = Storage(job.storage)
    rate = Rate(images_per_s, "stated") if images_per_s is not None else _measured_rate(storage, say)
    found = plan(
        config,
        num_nodes=num_nodes,
        workers_per_node=workers_per_node or _workers_per_node(job, num_nodes, device),
        device=device,
        memory_gib=memory_gib,
        corpora=_open_corpora(config, storage, say),
        rate=rate,
        cost_per_hour=cost_per_hour,
    )
    if as_json:
        show_json(found.to_dict())
    else:
        terminal = console()
        for table in tables(found, config):
            terminal.print(table)
            terminal.print()
    refuse_what_does_not_fit(config, found)


def tables(found: Plan, config: PretrainConfig) -> tuple[Table, Table]:
    """Return a table of a worker's memory over the moments of a step, and a table of everything else."""
    memory = Table("memory of a worker", box=None)
    for moment in found.memory:
        memory.add_column(moment.name, justify="right")
    rows = [{name: value for name, value in asdict(moment).items() if name != "name"} for moment in found.memory]
    for name in rows[0]:
        memory.add_row(name, *(_bytes_text(row[name]) for row in rows))
    memory.add_row("total", *(_bytes_text(moment.total) for moment in found.memory), style="bold")

    facts = Table(box=None, show_header=False)
    for name, value in _list_facts(found, config):
        facts.add_row(name, value)
    return memory, facts


def _list_facts(found: Plan, config: PretrainConfig) -> Sequence[tuple[str, str]]:
    nodes = f"{found.num_nodes} node{'s' * (found.num_nodes > 1)}"
    micro = "" if found.micro_batch == found.images_per_worker else f", {found.micro_batch} at once"
    rows = [
        ("workers", f"{found.num_workers} on {found.device}: {nodes} of {found.workers_per_node}"),
        ("global batch", f"{found.global_batch:,} images, {found.images_per_worker} of each worker{micro}"),
        ("pixel pairs", f"{found.pixel_pairs:,} of a step, {config.loss.name}, negatives {found.negatives}"),
        ("weights", f"{found.num_weights / 1e6:.2f} M, {config.precision}, ZeRO stage {config.zero_stage}"),
        ("kept for backward", _bytes_text(found.saved_bytes)),
    ]
    if found.limit_bytes is not None:
        rows.append(
            (
                "fits" if found.fits else "does not fit",
                f"{_bytes_text(found.peak.total)} of {_bytes_text(round((1 - HEADROOM) * found.limit_bytes))} (moment: {found.peak.name})",
            )
        )
    sent = found.traffic
    rows.append(
        (
            "sent by a worker in a step",
            f"{_bytes_text(sent.total)}: gradients {_bytes_text(sent.gradients)}, weights {_bytes_text(sent.weights)}, "
            f"embeddings {_bytes_text(sent.embeddings)}",
        )
    )
    in_corpus = "no corpus yet: voxels of 2 bytes, not compressed"
    if found.images_in_corpus is not None:
        in_corpus = f"{found.images_in_corpus:,} images, {found.steps_per_epoch} steps an epoch"
    rows.append(("read for an image", f"{_bytes_text(found.bytes_per_image)} ({in_corpus})"))
    if found.loss_time is not None:
        time = found.loss_time
        rows.append(
            (
                "loss of a step",
                f"{time.operations / 1e12:.3g} TFLOP of each worker: about {time.expected_s:.2g} s (modelled: {EFFICIENCY:.0%} of "
                "an H100's rate)",
            )
        )
    elif found.loss_without_kernels is not None:
        rows.append(("loss of a step", f"slow, and its time is unknown: {found.loss_without_kernels}"))
    rows += _pace_rows(found) if found.pace is not None else [("speed", "not measured: give --images-per-s-per-worker")]
    rows.append(("allowed workers", ", ".join(map(str, found.world_sizes))))
    return rows


def _pace_rows(found: Plan) -> list[tuple[str, str]]:
    pace = found.pace
    assert pace is not None
    rows = [
        (
            "speed",
            f"{pace.images_per_s:,.1f} img/s, {pace.step_s:.3g} s a step (if all keep one worker's rate: {pace.source})",
        ),
        *([] if pace.impossible is None else [("not possible", pace.impossible)]),
        ("network", f"{pace.network_mib_per_s:,.1f} MiB/s from each worker, to be done within the step"),
        ("storage", f"{pace.storage_mib_per_s:,.1f} MiB/s read by all workers"),
    ]
    for name, hours, cost in (
        ("an epoch", pace.epoch_hours, pace.epoch_cost),
        ("the run", pace.run_hours, pace.run_cost),
    ):
        if hours is not None:
            time = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
            rows.append((name, time + (f", costs {cost:,.2f}" if cost is not None else "")))
    return rows


def _bytes_text(value: float) -> str:
    for size, unit in _UNITS:
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def _choose_device(job: Job) -> str:
    gpus = job.resources.gpus_per_worker
    return "cuda" if gpus == 1 or (gpus == "auto" and torch.cuda.is_available()) else "cpu"


def _workers_per_node(job: Job, num_nodes: int, device: str) -> int:
    workers = job.resources.num_workers
    if workers == "auto":
        return max(1, torch.cuda.device_count()) if device == "cuda" else 1
    most = workers if isinstance(workers, int) else max(workers)
    if most % num_nodes:
        raise InputError(
            f"{most} workers (resources.num_workers) cannot be spread evenly over {num_nodes} nodes: give --workers-per-node"
        )
    return most // num_nodes


def _measured_rate(storage: Storage, say: Callable[[str], None]) -> Rate | None:
    """Return the measured rate of the job's own run; None, with a log line, if its storage cannot be read."""
    try:
        if not storage.exists(_HISTORY):
            return None
        rows = read_history(storage, _HISTORY)
    except InputError as error:
        say(f"plan | no measured rate: {error}")
        return None
    return measured_rate(rows, where=storage.at(_HISTORY))


def _open_corpora(config: PretrainConfig, storage: Storage, say: Callable[[str], None]) -> list[Corpus] | None:
    """Return the job's corpora; None, with a log line, if they do not exist."""
    try:
        return corpora_of(config, storage.child("corpus"))
    except InputError as error:
        say(f"plan | no epochs: {error}")
        return None
