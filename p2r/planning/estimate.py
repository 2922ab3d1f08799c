"""Plan of a pretraining job: memory, traffic, reads, time and cost on a given number of workers, before anything is spent.

Memory is the largest of three moments of a step, listed by owner:

    backward     weights, optimizer, batch and views, activations, temporaries of the backward pass
    loss         embeddings (of all ranks, if gathered) and tiles in place of the temporaries
    optimizer    gradients, and the buffers that reduce them; activations are freed

Activations are counted, not estimated. The job's own network runs forward and backward on meta tensors, which have shapes
but no memory, and `p2r.engine.counting` counts saved and live tensors. Activation checkpointing, bf16, micro-batches and
every architecture are thus included. The rest follows from the shapes, as DeepSpeed's ZeRO and the loss allocate it. Only
tensors are counted; a process also holds its libraries (a GPU's context, or 0.6 GiB of code on a CPU).

Network traffic is the minimum that a rank sends. An all-gather of n bytes sends n to each of the W - 1 others; an all-reduce
sends 2 n (W - 1) / W. The same amount leaves a node of a ring over nodes, whatever its number of workers.

Letters: W ranks, P weights, B images of a rank, n pixel pairs of a rank, N of all, E embedding channels.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from p2r.config import PretrainConfig
from p2r.data.order import allowed_world_sizes, check_micro_batch, check_world_size
from p2r.data.stream import Corpus, order_of
from p2r.engine.corpora import balance_of
from p2r.engine.history import HistoryRow
from p2r.engine.objectives import explain_missing_kernels
from p2r.errors import InputError
from p2r.planning.forecast import Pace, Plan, Rate
from p2r.planning.memory import count_step
from p2r.planning.roofline import loss_time, ways_to_shorten
from p2r.planning.traffic import traffic_of
from p2r.planning.tune_batch import HEADROOM

_MIB, _GIB = 2**20, 2**30


def plan(
    config: PretrainConfig,
    *,
    num_nodes: int,
    workers_per_node: int,
    device: str,
    memory_gib: float | None = None,
    corpora: Sequence[Corpus] | None = None,
    rate: Rate | None = None,
    cost_per_hour: float | None = None,
) -> Plan:
    """Plan a job's pretraining.

    Args:
        config: Configuration of the job.
        num_nodes: Number of machines.
        workers_per_node: Number of workers on each.
        device: Device of the workers, `cuda` or `cpu`. This machine need not have it.
        memory_gib: Memory of one worker, GiB.
        corpora: Corpora of the job, if they exist already.
        rate: Throughput of one worker.
        cost_per_hour: Cost of one worker, in any currency.

    Raises:
        DataError: This number of workers cannot share the global batch, or the corpus is smaller than the batch.
        InputError: The micro-batch does not divide a worker's part.
    """
    world_size = num_nodes * workers_per_node
    check_world_size(config.global_batch, world_size)
    check_micro_batch(config.global_batch, world_size, config.micro_batch)
    images = config.global_batch // world_size
    epoch = None
    if corpora is not None:
        order = order_of(
            corpora,
            image=config.image,
            seed=config.seed,
            global_batch=config.global_batch,
            balance=balance_of(config, corpora),
        )
        epoch = max(order.steps_per_epoch)
    counted = count_step(config, world_size=world_size, device=device)
    traffic = traffic_of(config, world_size=world_size, num_weights=counted.num_weights, device=device)
    bytes_per_image, images_in_corpus = _read_size(config, corpora)
    found = Plan(
        num_nodes=num_nodes,
        workers_per_node=workers_per_node,
        device=device,
        global_batch=config.global_batch,
        images_per_worker=images,
        micro_batch=config.micro_batch or images,
        pixel_pairs=config.global_batch * config.loss.pixel_pairs_per_image,
        negatives=config.negatives,
        num_weights=counted.num_weights,
        saved_bytes=counted.saved_bytes,
        memory=counted.memory,
        limit_bytes=None if memory_gib is None else round(memory_gib * _GIB),
        traffic=traffic,
        bytes_per_image=bytes_per_image,
        images_in_corpus=images_in_corpus,
        steps_per_epoch=epoch,
        pace=None,
        loss_time=loss_time(config, world_size=world_size, device=device),
        loss_without_kernels=_missing_kernels(config, device),
        world_sizes=tuple(allowed_world_sizes(config.global_batch)),
    )
    return found if rate is None else replace(found, pace=_estimate_pace(config, found, rate, cost_per_hour))


def _missing_kernels(config: PretrainConfig, device: str) -> str | None:
    """Return why GPUs like an H100 compute the loss without its kernels; None if they use them, or Triton is not installed here."""
    if device != "cuda" or find_spec("triton") is None:
        return None
    return explain_missing_kernels(config, device=torch.device("cpu"))


def _read_size(config: PretrainConfig, corpora: Sequence[Corpus] | None) -> tuple[float, int | None]:
    """Return the bytes read per image, and the number of images."""
    if corpora is None:
        return 2.0 * config.image.size**config.image.dimensions, None
    shards = [shard for corpus in corpora for shard in corpus.manifest.shards]
    num_images = sum(
        shard.num_samples if config.image.dimensions == 2 else shard.num_volumes * config.image.patches_per_volume
        for shard in shards
    )
    return sum(shard.num_bytes for shard in shards) / max(1, num_images), num_images


def measured_rate(rows: Sequence[HistoryRow], *, where: str) -> Rate | None:
    """Return the median throughput of a worker in the rows of a `history.jsonl`; None if there is none."""
    rates = [row.images_per_s / max(1, row.world_size or 1) for row in rows if row.images_per_s]
    return Rate(median(rates), f"median of {len(rates)} reports in {where}") if rates else None


def _estimate_pace(config: PretrainConfig, found: Plan, rate: Rate, cost_per_hour: float | None) -> Pace:
    images_per_s = rate.images_per_s * found.num_workers
    step_s = config.global_batch / images_per_s
    hours = step_s / 3600
    per_step = None if cost_per_hour is None else hours * found.num_workers * cost_per_hour
    epoch = found.steps_per_epoch
    return Pace(
        images_per_s=images_per_s,
        source=rate.source,
        step_s=step_s,
        network_mib_per_s=found.traffic.total / step_s / _MIB,
        storage_mib_per_s=found.bytes_per_image * images_per_s / _MIB,
        run_hours=config.steps * hours,
        epoch_hours=None if epoch is None else epoch * hours,
        run_cost=None if per_step is None else config.steps * per_step,
        epoch_cost=None if per_step is None or epoch is None else epoch * per_step,
        impossible=_explain_impossible(config, found, step_s),
    )


def _explain_impossible(config: PretrainConfig, found: Plan, step_s: float) -> str | None:
    time = found.loss_time
    if time is None or time.expected_s < step_s:
        return None
    ways = ways_to_shorten(config, world_size=found.num_workers, step_s=step_s)
    return (
        f"the loss takes about {time.expected_s:.2g} s, at the very least {time.least_s:.2g} s, of a step of {step_s:.2g} s: "
        f"{''.join(f'set {way}, or ' for way in ways)}take more workers"
    )


def refuse_what_does_not_fit(config: PretrainConfig, found: Plan) -> None:
    """Raise `InputError` if a plan does not fit, naming the fields that would make it fit."""
    if found.fits:
        return
    assert found.limit_bytes is not None
    allowed, peak = (1 - HEADROOM) * found.limit_bytes, found.peak
    parts = {name: value for name, value in asdict(peak).items() if isinstance(value, int)}
    largest = max(parts, key=lambda name: parts[name])
    message = (
        f"a worker would hold {_gib(peak.total)} of tensors (moment: {peak.name}; most of it {largest}, {_gib(parts[largest])}) and may "
        f"hold {_gib(allowed)}, since {HEADROOM:.0%} of {_gib(found.limit_bytes)} stay free"
    )
    tried = "the job as it is"
    for fields in _list_ways_out(config, found.images_per_worker):
        other = config
        for key, value in fields.items():
            other = _replace_field(other, key, value)
        counted = count_step(other, world_size=found.num_workers, device=found.device)
        total = max(moment.total for moment in counted.memory)
        tried = " ".join(f"pretrain.{key}={value}" for key, value in fields.items())
        if total <= allowed:
            raise InputError(f"{message}; set {tried}, which takes {_gib(total)}")
    raise InputError(
        f"{message}; even {tried} does not fit: take more workers, a smaller pretrain.image.size or pretrain.model.channels, or "
        "workers with more memory (--memory-gib)"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.3g} GiB"


def _list_ways_out(config: PretrainConfig, images: int) -> list[dict[str, object]]:
    """List changes that save memory without changing the training result, the mildest first."""
    micro_batches = [
        part for part in range(images - 1, 0, -1) if images % part == 0 and part < (config.micro_batch or images)
    ]
    if config.loss.negatives == "micro_batch":
        micro_batches = []  # they would have other negatives
    ways: list[dict[str, object]] = [{"micro_batch": part} for part in micro_batches]
    last: dict[str, object] = dict(ways[-1]) if ways else {}
    if config.zero_stage < 2:
        last = {**last, "zero_stage": 2}
        ways.append(last)
    if config.model.checkpoint_activations != "all":
        last = {**last, "model.checkpoint_activations": "all"}
        ways.append(last)
    if config.loss.name == "info_nce" and config.loss.exchange == "all_gather":
        ways.append({**last, "loss.exchange": "ring"})
    return ways


def _replace_field(config: PretrainConfig, key: str, value: Any) -> PretrainConfig:
    section, _, name = key.rpartition(".")
    if not section:
        return config.model_copy(update={name: value})
    changed = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: changed})
