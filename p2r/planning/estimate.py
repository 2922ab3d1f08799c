"""A job and a number of workers -> what its pretraining will hold, send, read, take and cost, before anything is spent.

Memory is that of the worst of three moments of a step, by what holds it:

    backward     weights, optimizer, batch and views, activations, what the backward pass makes on its way
    loss         the same with embeddings (all ranks', where they are gathered) and tiles instead
    optimizer    gradients, and the buffers that reduce them; activations are gone

Activations are not estimated: the job's own network runs forward and backward on meta tensors, which have shapes and no
memory, and what autograd keeps and what lives is counted (`p2r.engine.counting`). So blocks that are computed again, bf16,
micro-batches and every architecture count as they will. The rest follows from the shapes, as DeepSpeed's ZeRO and the loss
allocate it. Everything is tensors: a process holds its libraries as well (a GPU's context, or 0.6 GiB of code on a CPU).

Network traffic is what a rank must send at least: an all-gather of n bytes sends n to each of the W - 1 others, a reduction
to all sends 2 n (W - 1) / W. That is also what leaves a node of a ring over nodes, whatever its number of workers.

Letters: W ranks, P weights, B images of a rank, n pixel pairs of a rank, N of all, E embedding channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from p2r.config import LossConfig, PretrainConfig
from p2r.data.order import allowed_world_sizes, check_micro_batch, check_world_size
from p2r.data.stream import Corpus, order_of
from p2r.engine.build import DTYPES
from p2r.engine.counting import LiveTensors, SavedTensors, storages_of
from p2r.errors import InputError
from p2r.loss.info_nce import PANEL
from p2r.loss.tiles import TILE, num_panels
from p2r.loss.within_image import images_at_once
from p2r.model.pix2rep import Pix2Rep
from p2r.planning.roofline import LossTime, loss_time, ways_to_shorten
from p2r.planning.tune_batch import HEADROOM

_FP32 = 4
_PANEL_ON_CUDA = 16_384  # rows whose column sums the kernels keep apart
_SPLIT_ON_CUDA, _MOST_SPLITS_ON_CUDA, _PARTIAL_ON_CUDA = 16_384, 8, 2**28  # of the kernels' gradients
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment of a step, in bytes."""

    name: str
    weights: int = 0
    """What the network computes with."""
    optimizer: int = 0
    """Both moments of AdamW and, with ZeRO, the fp32 weights that it updates: this rank's part."""
    gradients: int = 0
    """With the buffers in which ranks reduce them."""
    activations: int = 0
    """What the forward pass keeps for the backward one."""
    working: int = 0
    """What else the moment makes: maps on their way through the network."""
    embeddings: int = 0
    """Of pixel pairs: this rank's and others', and what the loss makes of them."""
    batch: int = 0
    """Images, and the views made of them. Voxels as they were decoded, 2 bytes each, are left out."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))


@dataclass(frozen=True)
class Traffic:
    """What a rank must send in a step at least, in bytes."""

    gradients: int
    weights: int
    """What ZeRO gathers after the update."""
    embeddings: int
    """All ranks' rows, and the loss's sums over them."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.weights + self.embeddings


@dataclass(frozen=True)
class Rate:
    """Images a second of one worker, and where the number comes from."""

    images_per_s: float
    source: str


@dataclass(frozen=True)
class Pace:
    """How long it takes and what it costs, if all workers keep one worker's rate."""

    images_per_s: float
    """Of all workers."""
    source: str
    step_s: float
    network_mib_per_s: float
    """What a rank has to send in the time of a step."""
    storage_mib_per_s: float
    """What all workers read together."""
    run_hours: float
    epoch_hours: float | None
    """None: there is no corpus yet that could be passed over."""
    run_cost: float | None
    epoch_cost: float | None
    impossible: str | None
    """Why no worker can keep the rate, and the way out; None: nothing speaks against it."""


@dataclass(frozen=True)
class Plan:
    """What a job's pretraining comes to on so many workers."""

    num_nodes: int
    workers_per_node: int
    device: str
    global_batch: int
    images_per_worker: int
    micro_batch: int
    """Images encoded at once."""
    pixel_pairs: int
    """Of a step, over all workers: N."""
    negatives: str
    num_weights: int
    saved_bytes: int
    """What autograd keeps at most: of the network and, where they are there together, of the loss."""
    memory: tuple[Moment, ...]
    limit_bytes: int | None
    """What a worker may hold, if it is known."""
    traffic: Traffic
    bytes_per_image: float
    """That are read for an image."""
    images_in_corpus: int | None
    steps_per_epoch: float | None
    pace: Pace | None
    """None: no rate was measured or stated."""
    loss_time: LossTime | None
    """Of a worker and step; None where it is not known."""
    world_sizes: tuple[int, ...]
    """Numbers of workers that can share the global batch."""

    @property
    def num_workers(self) -> int:
        """W."""
        return self.num_nodes * self.workers_per_node

    @property
    def peak(self) -> Moment:
        """The worst moment."""
        return max(self.memory, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        """Whether the worst moment leaves the headroom free; True where no limit is known."""
        return self.limit_bytes is None or self.peak.total <= (1 - HEADROOM) * self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        memory = {moment.name: {**asdict(moment), "total": moment.total} for moment in self.memory}
        for moment in memory.values():
            del moment["name"]
        traffic = {**asdict(self.traffic), "total": self.traffic.total}
        own = {"num_workers": self.num_workers, "memory_bytes": memory, "peak_bytes": self.peak.total}
        rest = {key: value for key, value in asdict(self).items() if key not in ("memory", "traffic")}
        return {**rest, **own, "traffic_bytes": traffic, "fits": self.fits}


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
        config: Of the job.
        num_nodes: How many machines.
        workers_per_node: How many workers on each.
        device: `cuda` or `cpu`: what workers will run on. This machine need not have it.
        memory_gib: Of one worker.
        corpora: What it streams, if that is there already.
        rate: Of one worker.
        cost_per_hour: Of one worker, in any currency.

    Raises:
        DataError: The global batch cannot be shared by so many workers, the corpus is smaller than it, or the micro-batch does
            not divide a worker's part.
    """
    world_size = num_nodes * workers_per_node
    check_world_size(config.global_batch, world_size)
    check_micro_batch(config.global_batch, world_size, config.micro_batch)
    images = config.global_batch // world_size
    epoch = None
    if corpora is not None:
        order = order_of(corpora, image=config.image, seed=config.seed, global_batch=config.global_batch)
        epoch = max(order.steps_per_epoch)
    counted = count_step(config, world_size=world_size, device=device)
    traffic = traffic_of(config, world_size=world_size, num_weights=counted.num_weights, device=device)
    bytes_per_image, images_in_corpus = _of_an_image(config, corpora)
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
        world_sizes=tuple(allowed_world_sizes(config.global_batch)),
    )
    return found if rate is None else replace(found, pace=_pace(config, found, rate, cost_per_hour))


@dataclass(frozen=True)
class Counted:
    """What one step holds."""

    num_weights: int
    saved_bytes: int
    memory: tuple[Moment, ...]


def count_step(config: PretrainConfig, *, world_size: int, device: str) -> Counted:
    """Count what a rank holds in a step, without computing any."""
    images = config.global_batch // world_size
    size = config.micro_batch or images
    in_two_passes = size < images and config.loss.negatives == "global_batch"
    network = _count_network(config, num_images=size, device=device)
    states = _states(config, network.num_weights, world_size=world_size)
    batch = _batch_bytes(config, images)
    pairs = config.loss.pixel_pairs_per_image
    rows = (images if in_two_passes else size) * pairs
    loss = _loss_bytes(config, rows=rows, world_size=world_size, device=device)
    towers = 2 * rows * config.model.embedding_channels * DTYPES[config.precision].itemsize
    accumulates = size < images

    in_backward = _gradients_in_backward(config, network, world_size=world_size, accumulates=accumulates)
    backward = Moment(
        "backward",
        **states,
        gradients=in_backward,
        activations=network.saved_bytes,
        working=network.peak_bytes - network.saved_bytes,
        embeddings=3 * towers if in_two_passes else 0,  # of all micro-batches, put together, and their gradients
        batch=batch,
    )
    in_loss = Moment(
        "loss",
        **states,
        gradients=in_backward if accumulates and not in_two_passes else 0,  # of the micro-batches before
        activations=0 if in_two_passes else network.saved_bytes,
        working=0 if in_two_passes else network.forward_bytes - network.saved_bytes,
        embeddings=loss.peak_bytes + (2 * towers if in_two_passes else 0),
        batch=batch,
    )
    update = Moment(
        "optimizer",
        **states,
        gradients=_gradients_in_update(config, network.num_weights, world_size=world_size),
        embeddings=(3 if in_two_passes else 1) * towers,
        batch=batch,
    )
    saved = max(network.saved_bytes, loss.saved_bytes) if in_two_passes else network.saved_bytes + loss.saved_bytes
    return Counted(network.num_weights, saved, (backward, in_loss, update))


@dataclass(frozen=True)
class _Network:
    """One micro-batch through the network and back."""

    num_weights: int
    forward_bytes: int
    """That live when the forward pass is over."""
    saved_bytes: int
    """That autograd keeps of them."""
    peak_bytes: int
    """The most that lives in the backward pass, without gradients of weights that are complete."""
    peak_with_gradients_bytes: int
    """The most that lives there with them, if there were none before."""


def _count_network(config: PretrainConfig, *, num_images: int, device: str) -> _Network:
    """Run forward and backward on meta tensors."""
    model_config, dimensions = config.model, config.image.dimensions
    if device == "cuda" and model_config.channels_last == "auto":  # which looks at the device of the image
        model_config = model_config.model_copy(update={"channels_last": True})
    learnt_temperature = config.loss.temperature if config.loss.learn_temperature else None
    with torch.random.fork_rng(devices=[]):
        model = Pix2Rep(model_config, dimensions=dimensions, learnt_temperature=learnt_temperature)
    dtype = DTYPES[config.precision]
    model = model.to(device="meta", dtype=dtype)
    image = (num_images, 1, *[config.image.size] * dimensions)
    points = (num_images, config.loss.pixel_pairs_per_image, dimensions)
    views = [torch.empty(image, dtype=dtype, device="meta") for _ in range(2)]
    places = [torch.empty(points, device="meta") for _ in range(2)]
    of_weights = frozenset(storages_of([*model.parameters(), *views, *places]))
    saved, live = SavedTensors(of_weights), LiveTensors(meta=True, apart=of_weights)
    complete, peak, peak_with_gradients = 0, 0, 0

    def look() -> None:
        nonlocal peak, peak_with_gradients
        peak = max(peak, live.peak_bytes)
        peak_with_gradients = max(peak_with_gradients, live.peak_bytes + complete)
        live.forget_peak()

    def is_complete(weight: torch.Tensor) -> None:
        nonlocal complete
        look()
        complete += weight.nbytes
        weight.grad = None

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(is_complete)  # type: ignore[no-untyped-call]
    with live:
        with saved.hooks():
            queries, keys = model(*views, *places)
        forward_bytes, saved_bytes = live.num_bytes, saved.peak_bytes
        live.forget_peak()
        torch.autograd.backward([queries, keys], [torch.empty_like(rows) for rows in (queries, keys)])
        look()
    num_weights = sum(weight.numel() for weight in model.parameters())
    return _Network(
        num_weights, forward_bytes, saved_bytes, max(peak, saved_bytes), max(peak_with_gradients, saved_bytes)
    )


def _states(config: PretrainConfig, num_weights: int, *, world_size: int) -> dict[str, int]:
    """Return the bytes of weights and of the optimizer's states, this rank's part of them."""
    part = -(-num_weights // world_size)
    number = DTYPES[config.precision].itemsize
    # Stage 3 keeps a part, and at the worst moment has gathered all of a network of this size.
    weights = number * (num_weights + (part if config.zero_stage == 3 else 0))
    mean = 0 if config.ema_decay is None else _FP32
    if config.zero_stage == 0:
        return {"weights": weights, "optimizer": (2 * _FP32 + mean) * num_weights}
    return {"weights": weights, "optimizer": (3 * _FP32 + mean) * part}  # with the fp32 weights that are updated


def _gradients_in_backward(config: PretrainConfig, network: _Network, *, world_size: int, accumulates: bool) -> int:
    number = DTYPES[config.precision].itemsize
    if config.zero_stage < 2:
        if not accumulates:  # those that are complete at the worst moment
            return network.peak_with_gradients_bytes - network.peak_bytes
        return number * network.num_weights
    # They move into one bucket as they come; this rank's part is kept from one micro-batch to the next.
    part = -(-network.num_weights // world_size)
    return number * (network.num_weights + (part if accumulates else 0))


def _gradients_in_update(config: PretrainConfig, num_weights: int, *, world_size: int) -> int:
    number, part = DTYPES[config.precision].itemsize, -(-num_weights // world_size)
    # As they are and in the bucket, or in the bucket and in a flat copy that is sent.
    reduced = 2 * number * num_weights
    # Then this rank's part, and the same in fp32 for the optimizer.
    return reduced if config.zero_stage == 0 else max(reduced, (number + _FP32) * part)


def _batch_bytes(config: PretrainConfig, num_images: int) -> int:
    """Return what a rank's images hold in the network's grid: they, their views, and the warp between these."""
    dimensions = config.image.dimensions
    pixels: int = num_images * config.image.size**dimensions
    of_views = 2 * _FP32 + (2 * DTYPES[config.precision].itemsize if config.precision == "bf16" else 0)
    masks = 2 + 2  # inside and valid, and both once more for the two views
    return pixels * (_FP32 + of_views + _FP32 * dimensions + masks)


@dataclass(frozen=True)
class _Loss:
    saved_bytes: int
    peak_bytes: int


def _loss_bytes(config: PretrainConfig, *, rows: int, world_size: int, device: str) -> _Loss:
    """Return what the loss over `rows` pixel pairs of this rank holds."""
    loss, tower = config.loss, rows * config.model.embedding_channels
    if loss.name == "barlow_twins":
        # Both views centred, and one of them weighted; on the way, both as they were, and gradients.
        return _Loss(_FP32 * 3 * tower, _FP32 * 8 * tower)
    is_gpu, on_kernels = device == "cuda", _has_kernels(config, device)
    product = DTYPES[config.precision].itemsize if is_gpu else _FP32
    tile = 0 if on_kernels else _FP32 * TILE**2
    others = tower * world_size if world_size > 1 and loss.exchange == "all_gather" else 0
    if loss.negatives == "image":
        # Rows of length 1, and some images' similarities, of which softmax and its gradient want a few copies.
        pairs = loss.pixel_pairs_per_image
        at_once = min(rows // pairs, images_at_once(pairs, is_gpu=is_gpu))
        square = _FP32 * at_once * pairs**2 * (4 if loss.form == "nt_xent" else 2)
        return _Loss(2 * _FP32 * 2 * tower, 2 * _FP32 * 3 * tower + 5 * square)
    # Rows over their longest number, rows of length 1; the same in the dtype of products; everybody's.
    saved = 2 * _FP32 * 2 * tower + 2 * product * (tower if product != _FP32 else 0) + 2 * product * others
    forward = max(
        product * others, tile + _FP32 * _num_panels(rows, on_kernels=_has_kernels(config, device)) * rows * world_size
    )
    travelling = 4 * product * tower if loss.exchange == "ring" and world_size > 1 else 0
    splits = min(_MOST_SPLITS_ON_CUDA, math.ceil(rows * world_size / _SPLIT_ON_CUDA)) if on_kernels else 0
    parts = min(splits * _FP32 * tower, max(_PARTIAL_ON_CUDA, _FP32 * tower))
    backward = 2 * tile + 2 * _FP32 * tower + _FP32 * max(others + tower, 2 * tower) + travelling + parts
    return _Loss(saved, saved + max(forward, backward))


def _has_kernels(config: PretrainConfig, device: str) -> bool:
    """Return whether the loss takes the kernels. In fp32, GPUs compute it in torch's tiles."""
    return device == "cuda" and config.precision != "fp32"


def _num_panels(rows: int, *, on_kernels: bool) -> int:
    """Return into how many groups of anchors the sums over them are cut."""
    return math.ceil(rows / _PANEL_ON_CUDA) if on_kernels else num_panels(rows)


def traffic_of(config: PretrainConfig, *, world_size: int, num_weights: int, device: str) -> Traffic:
    """Return what a rank sends in a step."""
    if world_size == 1:
        return Traffic(0, 0, 0)
    others = world_size - 1
    images = config.global_batch // world_size
    num_passes = images // (config.micro_batch or images)
    number = DTYPES[config.precision].itemsize
    gradients = round(2 * others / world_size * number * num_weights)
    if config.zero_stage >= 2:
        gradients *= num_passes  # every micro-batch is reduced
    weights = others * number * -(-num_weights // world_size) if config.zero_stage else 0
    if config.zero_stage == 3:
        weights *= 2 * num_passes  # gathered before each forward and each backward pass
    losses = num_passes if config.loss.negatives != "global_batch" else 1
    rows = images * config.loss.pixel_pairs_per_image // losses
    return Traffic(gradients, weights, losses * _loss_traffic(config, rows, world_size=world_size, device=device))


def _loss_traffic(config: PretrainConfig, rows: int, *, world_size: int, device: str) -> int:
    loss, channels, others = config.loss, config.model.embedding_channels, world_size - 1
    # On a CPU, ranks agree on what they are about to do: 18 numbers.
    agreement = 0 if device == "cuda" else others * 18 * 8
    if loss.name == "barlow_twins":
        sums = _FP32 * (2 * channels + 2 + (2 + channels) * channels)
        return agreement + round(2 * others / world_size * sums)
    if loss.negatives == "image":
        return agreement + round(2 * others / world_size * 2 * _FP32)  # the sum of costs, and of weights
    product = DTYPES[config.precision].itemsize if device == "cuda" else _FP32
    of_a_row = 2 * channels * product + _metadata(loss, config.image.dimensions) + (device == "cuda")
    of_sums = 3 * _FP32  # both losses, and the weight
    if loss.exchange == "ring":
        # Around the ring once in each pass, in the second one with the rows' softmax weights.
        return agreement + others * rows * (2 * of_a_row + 2 * _FP32 + of_sums)
    softmax, column = 2 * _FP32, _FP32 * _num_panels(rows, on_kernels=_has_kernels(config, device))
    if loss.form == "nt_xent" and rows % PANEL == 0 and rows * world_size >= 3 * PANEL:
        column *= 3  # sums over columns within both towers, too
    return agreement + others * rows * (of_a_row + of_sums + softmax + column)


def _metadata(loss: LossConfig, dimensions: int) -> int:
    """Return the bytes that tell which pixels of a row's image are no negatives."""
    if loss.exclude_within_mm is None:
        return 0
    return 8 + (_FP32 * dimensions if math.isfinite(loss.exclude_within_mm) else 0)


def _of_an_image(config: PretrainConfig, corpora: Sequence[Corpus] | None) -> tuple[float, int | None]:
    """Return the bytes that are read for an image, and how many images there are."""
    if corpora is None:
        return 2.0 * config.image.size**config.image.dimensions, None
    name, times = (
        ("num_samples", 1) if config.image.dimensions == 2 else ("num_volumes", config.image.patches_per_volume)
    )
    shards = [shard for corpus in corpora for shard in corpus.manifest["shards"]]
    num_images = sum(shard[name] * times for shard in shards)
    return sum(shard["num_bytes"] for shard in shards) / max(1, num_images), num_images


def measured_rate(rows: Sequence[Mapping[str, Any]], *, where: str) -> Rate | None:
    """Return the median rate of a worker in the rows of a `history.jsonl`; None if it has none."""
    rates = [row["images_per_s"] / max(1, row.get("world_size") or 1) for row in rows if row.get("images_per_s")]
    return Rate(median(rates), f"median of {len(rates)} reports in {where}") if rates else None


def _pace(config: PretrainConfig, found: Plan, rate: Rate, cost_per_hour: float | None) -> Pace:
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
        impossible=_impossible(config, found, step_s),
    )


def _impossible(config: PretrainConfig, found: Plan, step_s: float) -> str | None:
    time = found.loss_time
    if time is None or time.expected_s < step_s:
        return None
    ways = ways_to_shorten(config, world_size=found.num_workers, step_s=step_s)
    return (
        f"the loss takes about {time.expected_s:.2g} s, at the very least {time.least_s:.2g} s, of a step of {step_s:.2g} s: "
        f"{''.join(f'set {way}, or ' for way in ways)}take more workers"
    )


def refuse_what_does_not_fit(config: PretrainConfig, found: Plan) -> None:
    """Raise `InputError` for a plan that does not fit, with the fields that would make it fit."""
    if found.fits:
        return
    assert found.limit_bytes is not None
    allowed, peak = (1 - HEADROOM) * found.limit_bytes, found.peak
    parts = {name: value for name, value in asdict(peak).items() if isinstance(value, int)}
    largest = max(parts, key=lambda name: parts[name])
    message = (
        f"a worker would hold {_gib(peak.total)} of tensors (moment: {peak.name}; most of it {largest}, {_gib(parts[largest])}) and may "
        f"hold {_gib(allowed)}, for {HEADROOM:.0%} of {_gib(found.limit_bytes)} stay free"
    )
    tried = "the job as it is"
    for fields in _ways_out(config, found.images_per_worker):
        other = config
        for key, value in fields.items():
            other = _with(other, key, value)
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


def _ways_out(config: PretrainConfig, images: int) -> list[dict[str, Any]]:
    """List what may be changed, without changing what is learnt, the mildest first."""
    micro_batches = [
        part for part in range(images - 1, 0, -1) if images % part == 0 and part < (config.micro_batch or images)
    ]
    ways: list[dict[str, Any]] = [{"micro_batch": part} for part in micro_batches]
    last: dict[str, Any] = dict(ways[-1]) if ways else {}
    if config.zero_stage < 2:
        last = {**last, "zero_stage": 2}
        ways.append(last)
    if config.model.checkpoint_activations != "all":
        last = {**last, "model.checkpoint_activations": "all"}
        ways.append(last)
    if config.loss.name == "info_nce" and config.loss.exchange == "all_gather":
        ways.append({**last, "loss.exchange": "ring"})
    return ways


def _with(config: PretrainConfig, key: str, value: Any) -> PretrainConfig:
    section, _, name = key.rpartition(".")
    if not section:
        return config.model_copy(update={name: value})
    changed = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: changed})
