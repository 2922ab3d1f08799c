"""Memory of a worker in a step: states from the configuration, activations from a run on meta tensors."""

from dataclasses import dataclass

import torch

from p2r.config import PretrainConfig
from p2r.engine.build import DTYPES
from p2r.engine.counting import LiveTensors, SavedTensors, storages_of
from p2r.engine.objectives import FP32_BYTES, LossMemory, objective_of
from p2r.model.backbones import is_channels_last
from p2r.model.pix2rep import Pix2Rep
from p2r.planning.forecast import Moment


@dataclass(frozen=True)
class Counted:
    """Memory of one step."""

    num_weights: int
    saved_bytes: int
    memory: tuple[Moment, ...]


def count_step(config: PretrainConfig, *, world_size: int, device: str) -> Counted:
    """Count the memory of a rank in a step, without computing the step."""
    images = config.global_batch // world_size
    size = config.micro_batch or images
    in_two_passes = size < images and config.loss.negatives == "global_batch"
    network = _count_network(config, num_images=size, device=device)
    states = _state_bytes(config, network.num_weights, world_size=world_size)
    batch = _batch_bytes(config, images)
    pairs = config.loss.pixel_pairs_per_image
    rows = (images if in_two_passes else size) * pairs
    loss = objective_of(config.loss).memory(config, rows, world_size, device)
    # The losses of further levels are computed one after another, and keep what they save.
    others = len(config.loss.levels)
    loss = LossMemory((1 + others) * loss.saved_bytes, others * loss.saved_bytes + loss.peak_bytes)
    towers = (1 + others) * 2 * rows * config.model.embedding_channels * DTYPES[config.precision].itemsize
    accumulates = size < images

    in_backward = _gradients_in_backward(config, network, world_size=world_size, accumulates=accumulates)
    backward = Moment(
        "backward",
        **states,
        gradients=in_backward,
        activations=network.saved_bytes,
        working=network.peak_bytes - network.saved_bytes,
        embeddings=3 * towers if in_two_passes else 0,  # of all micro-batches, concatenated, and their gradients
        batch=batch,
    )
    in_loss = Moment(
        "loss",
        **states,
        gradients=in_backward if accumulates and not in_two_passes else 0,  # of earlier micro-batches
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
    # In the second pass autograd also keeps the gradients of all embeddings.
    of_second = network.saved_bytes + towers
    saved = max(of_second, loss.saved_bytes) if in_two_passes else network.saved_bytes + loss.saved_bytes
    return Counted(network.num_weights, saved, (backward, in_loss, update))


@dataclass(frozen=True)
class _Network:
    """Memory of one micro-batch through the network and back."""

    num_weights: int
    forward_bytes: int
    """Live tensors after the forward pass."""
    saved_bytes: int
    """Part of them that autograd saves."""
    peak_bytes: int
    """Peak of the backward pass, without completed gradients of weights."""
    peak_with_gradients_bytes: int
    """Peak of the backward pass with them, if there were none before."""


def _count_network(config: PretrainConfig, *, num_images: int, device: str) -> _Network:
    """Run forward and backward on meta tensors."""
    model_config, dimensions = config.model, config.image.dimensions
    # On meta tensors, "auto" would be decided for this machine.
    layout = is_channels_last(model_config.channels_last, on_gpu=device == "cuda", compiled=bool(config.compile))
    model_config = model_config.model_copy(update={"channels_last": layout})
    with torch.random.fork_rng(devices=[]):
        model = Pix2Rep.of(config.model_copy(update={"model": model_config}))
    dtype = DTYPES[config.precision]
    model = model.to(device="meta", dtype=dtype)
    image = (num_images, model_config.in_channels, *[config.image.size] * dimensions)
    points = (num_images, config.loss.pixel_pairs_per_image, dimensions)
    views = [torch.empty(image, dtype=dtype, device="meta") for _ in range(2)]
    places = [torch.empty(points, device="meta") for _ in range(2)]
    targets = []
    if config.loss.reconstruction is not None:
        targets = [torch.empty(image, dtype=kind, device="meta") for kind in (torch.float32, torch.bool)]
    of_weights = frozenset(storages_of([*model.parameters(), *views, *places, *targets]))
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
            found = model(*views, *places, *targets)
        forward_bytes, saved_bytes = live.num_bytes, saved.peak_bytes
        live.forget_peak()
        torch.autograd.backward(found, [torch.empty_like(rows) for rows in found])
        look()
    num_weights = sum(weight.numel() for weight in model.parameters())
    return _Network(
        num_weights, forward_bytes, saved_bytes, max(peak, saved_bytes), max(peak_with_gradients, saved_bytes)
    )


def _state_bytes(config: PretrainConfig, num_weights: int, *, world_size: int) -> dict[str, int]:
    """Return the bytes of the weights and of this rank's part of the optimizer's states."""
    part = -(-num_weights // world_size)
    number = DTYPES[config.precision].itemsize
    # Stage 3 keeps a part, and at its worst moment has gathered all weights of a network of this size.
    weights = number * (num_weights + (part if config.zero_stage == 3 else 0))
    mean = 0 if config.ema_decay is None else FP32_BYTES
    if config.zero_stage == 0:
        return {"weights": weights, "optimizer": (2 * FP32_BYTES + mean) * num_weights}
    return {
        "weights": weights,
        "optimizer": (3 * FP32_BYTES + mean) * part,
    }  # includes the fp32 weights that are updated


def _gradients_in_backward(config: PretrainConfig, network: _Network, *, world_size: int, accumulates: bool) -> int:
    number = DTYPES[config.precision].itemsize
    if config.zero_stage < 2:
        if not accumulates:  # gradients completed at the peak
            return network.peak_with_gradients_bytes - network.peak_bytes
        return number * network.num_weights
    # Gradients move into one bucket as they are completed; this rank's part is kept between micro-batches.
    part = -(-network.num_weights // world_size)
    return number * (network.num_weights + (part if accumulates else 0))


def _gradients_in_update(config: PretrainConfig, num_weights: int, *, world_size: int) -> int:
    number, part = DTYPES[config.precision].itemsize, -(-num_weights // world_size)
    # Gradients and their bucket, or the bucket and the flat copy that is sent.
    reduced = 2 * number * num_weights
    # Then this rank's part, and its fp32 copy for the optimizer.
    return reduced if config.zero_stage == 0 else max(reduced, (number + FP32_BYTES) * part)


def _batch_bytes(config: PretrainConfig, num_images: int) -> int:
    """Return the bytes of a rank's images on the network's grid: images, their views, and the warp between the views."""
    dimensions, contrasts = config.image.dimensions, config.model.in_channels
    pixels: int = num_images * config.image.size**dimensions
    of_views = 2 * FP32_BYTES + (2 * DTYPES[config.precision].itemsize if config.precision == "bf16" else 0)
    masks = 2 + 2  # inside and valid, and both again for the two views
    frames = 2 if config.views.frames_apart else 1
    of_targets = 0 if config.loss.reconstruction is None else FP32_BYTES + 1  # intensities to predict, and a mask
    return pixels * (contrasts * (frames * FP32_BYTES + of_views + of_targets) + FP32_BYTES * dimensions + masks)
