"""One optimizer step of pretraining: images -> two views -> N pixel pairs -> loss -> update.

A rank that cannot encode all its images at once does so in micro-batches. The negatives are still the pixels of the whole
global batch: all images are encoded without a graph, the loss's gradient is taken on all embeddings together, and each
micro-batch is encoded again, with a graph, to carry its part of that gradient to the weights. So how a step is cut over
ranks and micro-batches changes rounding alone. Source: Gao et al. 2021 (GradCache), arXiv:2101.06983.

`B` images of this rank, `H W` pixels, `n` pixel pairs per image, `E` embedding channels.
"""

import math
from typing import Any

import torch
from torch import Tensor

from p2r.config import LossConfig, PretrainConfig
from p2r.data.batch import Batch
from p2r.loss import SameImage, barlow_twins, corresponding_points, info_nce
from p2r.randomness import keyed_generator
from p2r.views.geometric import apply_warp
from p2r.views.pair import make_views

_COLDEST, _WARMEST = 0.01, 1.0
"""Bounds of a learnt temperature."""


def pretrain_step(engine: Any, batch: Batch, *, config: PretrainConfig, learning_rate: float) -> Tensor:
    """Take one step and return the loss of the global batch, detached, the same on every rank."""
    device = engine.device
    image, inside = batch.images(device)
    views = make_views(
        image,
        inside,
        config=config.views,
        spacing_mm=batch.spacing_mm,
        seed=config.seed,
        epochs=batch.epochs,
        positions=batch.positions,
    )
    foreground = None
    if config.loss.foreground_share:
        bright = image.mean(1, keepdim=True) > image.mean(tuple(range(1, image.ndim)), keepdim=True)
        foreground = apply_warp(bright.float(), views.warp, mode="nearest")[:, 0] > 0
    pairs = corresponding_points(
        views.warp,
        views.valid,
        num_points=config.loss.pixel_pairs_per_image,
        generators=[
            keyed_generator(config.seed, "points", int(epoch), int(position))
            for epoch, position in zip(batch.epochs, batch.positions, strict=True)
        ],
        foreground=foreground,
        foreground_share=config.loss.foreground_share,
    )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    size = config.micro_batch or len(image)
    inputs = tuple(
        zip(*(torch.split(x, size) for x in (views.a.to(dtype), views.b.to(dtype), pairs.a, pairs.b)), strict=True)
    )
    facts = {
        "weights": pairs.weight,
        "image": torch.from_numpy(batch.positions).to(device)[:, None].expand_as(pairs.weight),
        "position_mm": pairs.a * batch.spacing_mm,
    }  # (B, n, ...)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    if len(inputs) > 1 and config.loss.negatives == "global_batch":
        return _step_in_two_passes(engine, inputs, _of_pairs(facts), config.loss)
    losses = []
    for number, micro_batch in enumerate(inputs):
        queries, keys = engine(*micro_batch)  # (B*n, E) each
        of_images = slice(number * size, (number + 1) * size)
        of_these = _of_pairs({name: fact[of_images] for name, fact in facts.items()})
        loss = pixel_pair_loss(queries, keys, config.loss, temperature=_temperature(engine, config.loss), **of_these)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def pixel_pair_loss(
    queries: Tensor,
    keys: Tensor,
    config: LossConfig,
    *,
    temperature: float | Tensor,
    weights: Tensor,
    image: Tensor,
    position_mm: Tensor,
) -> Tensor:
    """Return the objective that `config` names, over the pixel pairs of all ranks.

    Args:
        queries: (N, E).
        keys: (N, E).
        config: Which objective.
        temperature: tau of InfoNCE.
        weights: (N,) 0 for pairs that show nothing.
        image: (N,) the sample that a pair comes from.
        position_mm: (N, 2) where in it.
    """
    if config.name == "barlow_twins":
        return barlow_twins(queries, keys, off_diagonal_weight=config.off_diagonal_weight, weights=weights)
    exclude = None
    if config.exclude_within_mm is not None:
        exclude = SameImage(image, position_mm, config.exclude_within_mm)
    return info_nce(
        queries,
        keys,
        temperature=temperature,
        form=config.form,
        decoupled=config.decoupled,
        weights=weights,
        exclude=exclude,
        exchange=config.exchange,
    )


def _step_in_two_passes(
    engine: Any, inputs: tuple[tuple[Tensor, ...], ...], facts: dict[str, Tensor], config: LossConfig
) -> Tensor:
    towers, generators = [], []
    with torch.no_grad():
        for micro_batch in inputs:
            generators.append(_generator_states(engine.device))
            towers.append(engine.module(*micro_batch))
    queries, keys = (torch.cat(parts).requires_grad_() for parts in zip(*towers, strict=True))
    log_temperature = engine.module.log_temperature
    loss = pixel_pair_loss(queries, keys, config, temperature=_temperature(engine, config), **facts)
    learnt = [] if log_temperature is None else [log_temperature]
    of_queries, of_keys, *of_learnt = torch.autograd.grad(loss, [queries, keys, *learnt])

    size = len(towers[0][0])
    # DeepSpeed takes the mean over micro-batches; here they add up.
    gradients = [torch.split(len(inputs) * gradient, size) for gradient in (of_queries, of_keys)]
    for number, micro_batch in enumerate(inputs):
        _set_generator_states(generators[number], engine.device)  # what was drawn in the first pass is drawn again
        of_micro_batch = (gradient[number] for gradient in gradients)
        carried = sum(
            (tower * gradient).sum() for tower, gradient in zip(engine(*micro_batch), of_micro_batch, strict=True)
        )
        if number == 0 and learnt:
            carried = carried + len(inputs) * (log_temperature * of_learnt[0]).sum()
        engine.backward(carried)
        engine.step()
    return loss.detach()


def _temperature(engine: Any, config: LossConfig) -> float | Tensor:
    log_temperature = engine.module.log_temperature
    if log_temperature is None:
        return config.temperature
    # Straight through the bounds: a gradient can lead back from beyond them.
    bounded = log_temperature.detach().float().clamp(math.log(_COLDEST), math.log(_WARMEST))
    temperature: Tensor = (log_temperature.float() + (bounded - log_temperature.detach().float())).exp()
    return temperature


def _of_pairs(facts: dict[str, Tensor]) -> dict[str, Tensor]:
    """(B, n, ...) -> (B * n, ...)."""
    return {name: fact.flatten(0, 1) for name, fact in facts.items()}


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generator_states(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
