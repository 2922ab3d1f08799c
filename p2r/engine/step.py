"""One optimizer step of pretraining: images -> two views -> N pixel pairs -> loss -> update.

If a rank cannot encode all its images at once, it uses micro-batches. The negatives are still the pixels of the whole global
batch. All images are encoded without a graph; the gradient of the loss is computed for all embeddings together. Each
micro-batch is then encoded again, with a graph, to propagate its part of that gradient to the weights. Splitting a step over
ranks and micro-batches therefore changes only rounding. Source: Gao et al. 2021 (GradCache), arXiv:2101.06983.

Nothing here waits for the device. The results of a step (its loss, whether it was skipped, images without pairs, values that
broke a rule) stay on the device until they are read.

`B` images of this rank, `H W` pixels, `n` pixel pairs per image, `E` embedding channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p2r.config import LossConfig, PretrainConfig
from p2r.data.batch import Batch
from p2r.device import on_device
from p2r.engine.build import DTYPES, gather_parameter
from p2r.engine.feed import Timed
from p2r.engine.health import sample_pairs
from p2r.engine.update import Update, update
from p2r.loss import (
    Findings,
    SameImage,
    barlow_twins,
    corresponding_points,
    info_nce,
    info_nce_within_images,
    without_kernels,
)
from p2r.randomness import keyed_generator
from p2r.views.geometric import apply_warp
from p2r.views.pair import make_views

COLDEST, _WARMEST = 0.013, 1.0
"""Bounds of a learnt temperature. Below, no static shift serves more than 10^8 candidates, and GPUs cannot use the loss kernels."""


@dataclass(frozen=True)
class Step:
    """Result of a step, as device tensors; reading them synchronises."""

    loss: Tensor
    """Scalar; the loss of the global batch, equal on every rank."""
    update: Update
    """Outcome of the optimizer's update."""
    num_images_without_pairs: Tensor
    """Scalar; number of this rank's images of which no pixel can be paired."""
    findings: Findings
    """Values of this rank that broke a rule."""
    parts: dict[str, Tensor]
    """Parts of the loss: each (2,), for `loss_parts`; empty if no pixel could be paired."""
    alignment: Tensor | None
    """(2E + 2,) of this rank, for `equivariance_error`; None if not requested."""
    pairs: Tensor | None
    """(m, 2E + 1) of this rank, for `embedding_health`; None if not requested."""


def pretrain_step(engine: Any, batch: Batch, *, config: PretrainConfig, learning_rate: float) -> Tensor:
    """Take one step, and return the detached loss of the global batch, equal on every rank."""
    return take_step(engine, batch, config=config, learning_rate=learning_rate).loss


def take_step(
    engine: Any,
    batch: Batch,
    *,
    config: PretrainConfig,
    learning_rate: float,
    averaging: float | None = None,
    aligns: bool = False,
    timed: Timed = torch.profiler.record_function,
) -> Step:
    """Take one step.

    Args:
        engine: Engine from `build_engine`.
        batch: This rank's part of the global batch.
        config: Configuration of the run.
        learning_rate: Learning rate of this step.
        averaging: Weight of the new weights in their moving average; None: no average.
        aligns: Also compare embeddings of pairs, for `equivariance_error` and `embedding_health`.
        timed: Context for each part: images, views, points, forward, loss, backward, optimizer.

    Raises:
        EmbeddingError: On a CPU: an embedding has no direction. Elsewhere this is one of the findings.
    """
    device = engine.device
    with timed("images"):
        image, inside = batch.images(device)
    with timed("views"):
        views = make_views(
            image,
            inside,
            config=config.views,
            spacing_mm=batch.spacing_mm,
            seed=config.seed,
            epochs=batch.epochs,
            positions=batch.positions,
        )
    with timed("points"):
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
    dtype = DTYPES[config.precision]
    size = config.micro_batch or len(image)
    inputs = tuple(
        zip(*(torch.split(x, size) for x in (views.a.to(dtype), views.b.to(dtype), pairs.a, pairs.b)), strict=True)
    )
    facts = {
        "weights": pairs.weight,
        "image": on_device(batch.positions, device, dtype=torch.int64)[:, None].expand_as(pairs.weight),
        "position_mm": pairs.a * batch.spacing_mm,
    }  # (B, n, ...)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    findings, alignments, samples = Findings(), [], []
    parts: dict[str, Tensor] = {}

    def loss_of(queries: Tensor, keys: Tensor, **of_pairs: Tensor) -> Tensor:
        if aligns:
            alignments.append(_alignment_sums(queries.detach(), keys.detach(), of_pairs["weights"]))
            samples.append(
                sample_pairs(
                    queries,
                    keys,
                    of_pairs["weights"],
                    pairs_per_image=config.loss.pixel_pairs_per_image,
                    global_batch=config.global_batch,
                )
            )
        of_batch: dict[str, Tensor] = {}
        loss = pixel_pair_loss(
            queries,
            keys,
            config.loss,
            temperature=_bounded_temperature(engine, config.loss),
            findings=findings,
            parts=of_batch,
            **of_pairs,
        )
        parts.update({name: parts[name] + part if name in parts else part for name, part in of_batch.items()})
        return loss

    def finish(loss: Tensor) -> Update:
        return update(engine, loss, clip_norm=config.optimizer.clip_norm, averaging=averaging)

    if len(inputs) > 1 and config.loss.negatives == "global_batch":
        loss, updated = _run_two_passes(engine, inputs, _flatten_pairs(facts), loss_of, finish, timed)
    else:
        losses: list[Tensor] = []
        for number, micro_batch in enumerate(inputs):
            with timed("forward"):
                queries, keys = engine(*micro_batch)  # (B*n, E) each
            of_images = slice(number * size, (number + 1) * size)
            with timed("loss"):
                part = loss_of(queries, keys, **_flatten_pairs({name: fact[of_images] for name, fact in facts.items()}))
            with timed("backward"):
                engine.backward(part)
            losses.append(part.detach())
            with timed("optimizer"):
                if number < len(inputs) - 1:
                    engine.step()  # only accumulates
                else:
                    loss = torch.stack(losses).mean()
                    updated = finish(loss)
    return Step(
        loss,
        updated,
        (pairs.weight[:, 0] == 0).sum(),
        findings,
        parts,
        torch.stack(alignments).sum(0) if aligns else None,
        torch.cat(samples) if aligns else None,
    )


def loss_parts(parts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the parts of the loss by name: see `p2r.loss.info_nce` and `barlow_twins`.

    Args:
        parts: Sums over ranks of `Step.parts`.
    """
    return {name: total / weight for name, (total, weight) in parts.items() if weight}


def equivariance_error(alignment: Sequence[float]) -> float | None:
    """Return the deviation of the embeddings from the warp: 0 if they follow it perfectly, 1 if no better than chance.

    It is the mean of 1 - cos over embedding pairs of the same anatomy in the two views, divided by the mean over all pairs of
    different pixels. Since the views also differ in contrast, it includes the effect of contrast changes.

    Args:
        alignment: Sum over ranks (and micro-batches) of `Step.alignment`.

    Returns:
        The error, or None if there are fewer than two pixel pairs.
    """
    *sums, of_pairs, num_pairs = alignment
    if num_pairs < 2:
        return None
    channels = len(sums) // 2
    of_all = math.fsum(q * k for q, k in zip(sums[:channels], sums[channels:], strict=True))
    of_others = (of_all - of_pairs) / (num_pairs * (num_pairs - 1))
    by_chance = 1 - of_others
    if by_chance < 1e-6:  # every pixel has the same embedding
        return 1.0
    return max(0.0, 1 - of_pairs / num_pairs) / by_chance


def _alignment_sums(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Return the sums of unit queries and unit keys, of the pairs' cosines, and the number of pairs: (2E + 2,)."""
    absent = (weights == 0)[:, None]
    units = [F.normalize(rows.float().masked_fill(absent, 0), dim=1) for rows in (queries, keys)]
    of_pairs = (units[0] * units[1]).sum().reshape(1)
    return torch.cat([*(unit.sum(0) for unit in units), of_pairs, (weights > 0).sum().float().reshape(1)])


def pixel_pair_loss(
    queries: Tensor,
    keys: Tensor,
    config: LossConfig,
    *,
    temperature: float | Tensor,
    weights: Tensor,
    image: Tensor,
    position_mm: Tensor,
    findings: Findings | None = None,
    parts: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the objective of `config` over the pixel pairs of all ranks.

    Args:
        queries: (N, E).
        keys: (N, E).
        config: Configuration of the objective.
        temperature: tau of InfoNCE.
        weights: (N,) 0 for pairs without content.
        image: (N,) sample that each pair comes from.
        position_mm: (N, 2) position in the sample.
        findings: Collects invalid values, instead of waiting for the device; see `info_nce`.
        parts: Receives the parts of the loss.
    """
    if config.name == "barlow_twins":
        return barlow_twins(
            queries,
            keys,
            off_diagonal_weight=config.off_diagonal_weight,
            weights=weights,
            findings=findings,
            parts=parts,
        )
    if config.negatives == "image":
        return info_nce_within_images(
            queries,
            keys,
            num_images=len(queries) // config.pixel_pairs_per_image,
            temperature=temperature,
            form=config.form,
            decoupled=config.decoupled,
            weights=weights,
            position_mm=position_mm,
            radius_mm=config.exclude_within_mm or 0.0,
            findings=findings,
            parts=parts,
        )
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
        findings=findings,
        parts=parts,
    )


def explain_missing_kernels(config: PretrainConfig, *, device: torch.device) -> str | None:
    """Return why GPUs will compute the loss without its kernels, and the way out; None if they use them or need none.

    Args:
        config: Configuration of the run.
        device: The GPU. A CPU represents an H100.
    """
    loss = config.loss
    if loss.name != "info_nce" or loss.negatives == "image":
        return None
    return without_kernels(
        DTYPES[config.precision],
        config.model.embedding_channels,
        temperature=COLDEST if loss.learn_temperature else loss.temperature,
        num_pairs=config.global_batch * loss.pixel_pairs_per_image,
        device=device,
        allows_tf32=config.precision == "tf32",
    )


def _run_two_passes(
    engine: Any,
    inputs: tuple[tuple[Tensor, ...], ...],
    facts: dict[str, Tensor],
    loss_of: Callable[..., Tensor],
    finish: Callable[[Tensor], Update],
    timed: Timed,
) -> tuple[Tensor, Update]:
    towers, generators = [], []
    with torch.no_grad(), timed("forward"):
        for micro_batch in inputs:
            generators.append(_generator_states(engine.device))
            towers.append(engine.module(*micro_batch))
    queries, keys = (torch.cat(parts).requires_grad_() for parts in zip(*towers, strict=True))
    log_temperature = engine.module.log_temperature
    learnt = [] if log_temperature is None else [log_temperature]
    with timed("loss"):
        loss = loss_of(queries, keys, **facts)
        of_queries, of_keys, *of_learnt = torch.autograd.grad(loss, [queries, keys, *learnt])

    size = len(towers[0][0])
    # DeepSpeed averages over micro-batches; here their gradients must add up.
    gradients = [torch.split(len(inputs) * gradient, size) for gradient in (of_queries, of_keys)]
    for number, micro_batch in enumerate(inputs):
        _set_generator_states(generators[number], engine.device)  # repeats the random draws of the first pass
        of_micro_batch = (gradient[number] for gradient in gradients)
        with timed("forward"):
            carried = sum(
                (tower * gradient).sum() for tower, gradient in zip(engine(*micro_batch), of_micro_batch, strict=True)
            )
            if number == 0 and learnt:
                carried = carried + len(inputs) * (log_temperature * of_learnt[0]).sum()
        with timed("backward"):
            engine.backward(carried)
        with timed("optimizer"):
            if number < len(inputs) - 1:
                engine.step()  # only accumulates
            else:
                updated = finish(loss.detach())
    return loss.detach(), updated


def _bounded_temperature(engine: Any, config: LossConfig) -> float | Tensor:
    log_temperature = engine.module.log_temperature
    if log_temperature is None:
        return config.temperature
    gather_parameter(log_temperature)
    # Straight-through bounds: outside them the gradient still leads back.
    bounded = log_temperature.detach().float().clamp(math.log(COLDEST), math.log(_WARMEST))
    temperature: Tensor = (log_temperature.float() + (bounded - log_temperature.detach().float())).exp()
    return temperature


def _flatten_pairs(facts: dict[str, Tensor]) -> dict[str, Tensor]:
    """(B, n, ...) -> (B * n, ...)."""
    return {name: fact.flatten(0, 1) for name, fact in facts.items()}


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generator_states(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
