"""One optimizer step of pretraining: images -> two views -> N pixel pairs -> loss -> update.

With masked reconstruction, blocks of view b are masked, and the loss gains the mean over images of the error in these blocks.

If a rank cannot encode all its images at once, it uses micro-batches. The negatives are still the pixels of the whole global
batch. All images are encoded without a graph; the gradient of the loss is computed for all embeddings together. Each
micro-batch is then encoded again, with a graph, to propagate its part of that gradient to the weights. Splitting a step over
ranks and micro-batches therefore changes only rounding. Source: Gao et al. 2021 (GradCache), arXiv:2101.06983.

With negatives of the same image, one pass is enough: the micro-batches' means, weighted by their pixel pairs, have the same mean.

Nothing here waits for the device. The results of a step (its loss, whether it was skipped, images without pairs, values that
broke a rule) stay on the device until they are read.

`B` images of this rank, `H W` pixels, `n` pixel pairs per image, `E` embedding channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p2r.config import LossConfig, PretrainConfig
from p2r.data.batch import Batch
from p2r.device import on_device
from p2r.engine.build import DTYPES, gather_parameter
from p2r.engine.feed import Timed
from p2r.engine.health import sample_pairs, sampling_stride
from p2r.engine.objectives import COLDEST, PixelPairs, pixel_pair_loss
from p2r.engine.update import Update, update
from p2r.loss import Findings, corresponding_points
from p2r.loss.ranks import all_reduce_sum
from p2r.randomness import keyed_generator
from p2r.views.blocks import mask_view
from p2r.views.contrasts import number_pairs
from p2r.views.draws import Draws
from p2r.views.geometric import apply_warp
from p2r.views.pair import ViewPair, make_views

_WARMEST = 1.0
"""Largest learnt temperature; `COLDEST` is the smallest."""


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
    contrasts: Tensor | None = None
    """(m,) of this rank, the number of the pair of contrasts of each row of `pairs`; None if images have one contrast."""
    temperature: Tensor | None = None
    """Scalar, tau of InfoNCE; None if `pairs` is."""


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
    drawn = _draw_pairs(batch, engine.device, config=config, timed=timed)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    objective = _Objective(engine, config, aligns=aligns)
    finish = partial(update, engine, clip_norm=config.optimizer.clip_norm, averaging=averaging)
    size = config.micro_batch or len(drawn.a)
    run = _run_two_passes if size < len(drawn.a) and config.loss.negatives == "global_batch" else _accumulate
    loss, updated = run(engine, drawn, size, objective, finish, timed)
    return Step(
        loss,
        updated,
        (drawn.weights[:, 0] == 0).sum(),
        objective.findings,
        objective.parts,
        torch.stack(objective.alignments).sum(0) if aligns else None,
        torch.cat(objective.samples) if aligns else None,
        torch.cat(objective.contrasts) if objective.contrasts else None,
        objective.temperature,
    )


@dataclass(frozen=True)
class _Drawn:
    """Two views of B images, and n pixel pairs of each."""

    a: Tensor
    """(B, C, *S) view."""
    b: Tensor
    """(B, C, *S) view."""
    points_a: Tensor
    """(B, n, 2 or 3) places in view a."""
    points_b: Tensor
    """(B, n, 2 or 3) the same anatomy in view b."""
    weights: Tensor
    """(B, n) 0 for pairs without content."""
    image: Tensor
    """(B, n) sample that each pair comes from."""
    position_mm: Tensor
    """(B, n, 2 or 3) position in the sample."""
    contrasts: Tensor | None = None
    """(B, n) number of the pair of contrasts of the views; None: images of one contrast."""
    target: Tensor | None = None
    """(B, C, *S) intensities of view b to predict; None: no reconstruction."""
    scored: Tensor | None = None
    """(B, C, *S) bool, pixels whose prediction is scored."""

    def split(self, size: int) -> "list[_Drawn]":
        """Return micro-batches of `size` images."""
        whole = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: torch.split(tensor, size) for name, tensor in whole.items() if tensor is not None}
        return [_Drawn(**dict(zip(parts, of_batch, strict=True))) for of_batch in zip(*parts.values(), strict=True)]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the network."""
        views = (self.a, self.b, self.points_a, self.points_b)
        return views if self.target is None or self.scored is None else (*views, self.target, self.scored)

    def pairs(self, queries: Tensor, keys: Tensor) -> PixelPairs:
        """Return the pixel pairs with their embeddings (B * n, E)."""
        weights, image, position_mm = (fact.flatten(0, 1) for fact in (self.weights, self.image, self.position_mm))
        contrasts = None if self.contrasts is None else self.contrasts.flatten(0, 1)
        return PixelPairs(queries, keys, weights, image, position_mm, contrasts)


def _draw_pairs(batch: Batch, device: torch.device, *, config: PretrainConfig, timed: Timed) -> _Drawn:
    """Draw two views of every image, and pixel pairs that show the same anatomy in both."""
    with timed("images"):
        image, inside, covered, other = batch.prepare_frames(device)
    with timed("views"):
        views = make_views(
            image,
            inside,
            config=config.views,
            spacing_mm=batch.spacing_mm,
            seed=config.seed,
            epochs=batch.epochs,
            positions=batch.positions,
            present=batch.present,
            covered=covered,
            other=other,
        )
        masked = None
        if config.loss.reconstruction is not None:
            draws = Draws.of_samples(config.seed, epochs=batch.epochs, positions=batch.positions)
            masked = mask_view(views, draws, config=config.loss.reconstruction, spacing_mm=batch.spacing_mm)
    with timed("points"):
        foreground = None
        if config.loss.foreground_share:
            bright = image.mean(1, keepdim=True) > image.mean(tuple(range(1, image.ndim)), keepdim=True)
            foreground = apply_warp(bright.float(), views.warp, mode="nearest")[:, 0] > 0
        pairs = corresponding_points(
            views.warp,
            views.valid if masked is None else masked.visible,
            num_points=config.loss.pixel_pairs_per_image,
            generators=[
                keyed_generator(config.seed, "points", int(epoch), int(position))
                for epoch, position in zip(batch.epochs, batch.positions, strict=True)
            ],
            foreground=foreground,
            foreground_share=config.loss.foreground_share,
        )
    dtype = DTYPES[config.precision]
    return _Drawn(
        a=views.a.to(dtype),
        b=(views.b if masked is None else masked.image).to(dtype),
        points_a=pairs.a,
        points_b=pairs.b,
        weights=pairs.weight,
        image=on_device(batch.positions, device, dtype=torch.int64)[:, None].expand_as(pairs.weight),
        position_mm=pairs.a * batch.spacing_mm,
        contrasts=_number_pairs(views, pairs.weight),
        target=None if masked is None else masked.target,
        scored=None if masked is None else masked.scored,
    )


def _number_pairs(views: ViewPair, like: Tensor) -> Tensor | None:
    """Return the number (B, n) of each pixel pair's pair of contrasts; None for images of one contrast."""
    if views.shown_a is None or views.shown_b is None:
        return None
    numbers = number_pairs(views.shown_a, views.shown_b)
    return on_device(numbers, like.device, dtype=torch.int64)[:, None].expand_as(like)


class _Objective:
    """Loss of a step over one or several sets of images, with the data of their pixel pairs that reports need."""

    def __init__(self, engine: Any, config: PretrainConfig, *, aligns: bool) -> None:
        self._engine, self._config, self._aligns = engine, config, aligns
        self.findings, self.parts = Findings(), dict[str, Tensor]()
        self.alignments, self.samples, self.contrasts = list[Tensor](), list[Tensor](), list[Tensor]()
        self.temperature: Tensor | None = None
        self.is_within_images = config.loss.negatives == "image"

    def __call__(
        self, drawn: _Drawn, queries: Tensor, keys: Tensor, *errors: Tensor, scale: Tensor | float = 1.0
    ) -> Tensor:
        """Return the loss of embeddings (B * n, E) of all ranks, plus the weighted mean of the errors (B,) of a reconstruction.

        The loss of the embeddings is multiplied by `scale`.
        """
        loss = scale * self._contrast(drawn.pairs(queries, keys))
        if self._config.loss.reconstruction is None:
            return loss
        return loss + self._config.loss.reconstruction.weight * self._reconstruction(*errors)

    def _reconstruction(self, errors: Tensor) -> Tensor:
        """Return the mean over the images of all ranks, with the gradient of this rank's images: the engine averages over ranks."""
        message = "the reconstruction errors of {count} images are not finite"
        self.findings.add(message, (~torch.isfinite(errors.detach())).sum(), may_pass=True)
        own = errors.mean()
        sums = torch.stack([errors.detach().sum(), torch.ones_like(errors).sum()])
        self.parts["reconstruction"] = self.parts.get("reconstruction", 0) + sums
        total, num = all_reduce_sum(sums, None)
        mean: Tensor = total / num + (own - own.detach())
        return mean

    def _contrast(self, pairs: PixelPairs) -> Tensor:
        config = self._config
        temperature = _bounded_temperature(self._engine, config.loss)
        pairs, *coarser = _split_levels(pairs, num_levels=1 + len(config.loss.levels))
        if self._aligns:
            self.temperature = torch.as_tensor(temperature).detach()
            self.alignments.append(_alignment_sums(pairs.queries.detach(), pairs.keys.detach(), pairs.weights))
            self.samples.append(
                sample_pairs(
                    pairs.queries,
                    pairs.keys,
                    pairs.weights,
                    pairs_per_image=config.loss.pixel_pairs_per_image,
                    global_batch=config.global_batch,
                )
            )
            if pairs.contrasts is not None:
                every = sampling_stride(config.loss.pixel_pairs_per_image, config.global_batch)
                self.contrasts.append(pairs.contrasts.view(-1, config.loss.pixel_pairs_per_image)[:, ::every].flatten())
        parts = dict[str, Tensor]()
        loss = pixel_pair_loss(pairs, config.loss, temperature=temperature, findings=self.findings, parts=parts)
        for name, part in parts.items():
            self.parts[name] = self.parts[name] + part if name in self.parts else part
        if not coarser:
            return loss
        losses = [pixel_pair_loss(one, config.loss, temperature=temperature, findings=self.findings) for one in coarser]
        return torch.stack([loss, *losses]).mean()


def _split_levels(pairs: PixelPairs, *, num_levels: int) -> list[PixelPairs]:
    """Return the pairs of each level, whose embeddings follow one another in a row."""
    if num_levels == 1:
        return [pairs]
    towers = (rows.chunk(num_levels, dim=1) for rows in (pairs.queries, pairs.keys))
    return [replace(pairs, queries=a.contiguous(), keys=b.contiguous()) for a, b in zip(*towers, strict=True)]


def _accumulate(
    engine: Any,
    drawn: _Drawn,
    size: int,
    objective: _Objective,
    finish: Callable[[Tensor], Update],
    timed: Timed,
) -> tuple[Tensor, Update]:
    """Take the step on the mean of the micro-batches' own losses; of pixel pairs within images, on the mean over all pairs."""
    losses, micro_batches = list[Tensor](), drawn.split(size)
    scales: Sequence[Tensor | float] = [1.0] * len(micro_batches)
    if objective.is_within_images and len(micro_batches) > 1:
        scales = _scale_by_pairs(micro_batches)
    for number, micro_batch in enumerate(micro_batches):
        with timed("forward"):
            found = engine(*micro_batch.inputs)  # embeddings (B*n, E), (B*n, E); errors (B,) of a reconstruction
        with timed("loss"):
            part = objective(micro_batch, *found, scale=scales[number])
        with timed("backward"):
            engine.backward(part)
        losses.append(part.detach())
        with timed("optimizer"):
            if number < len(micro_batches) - 1:
                engine.step()  # only accumulates
            else:
                loss = torch.stack(losses).mean()
                updated = finish(loss)
    return loss, updated


def _scale_by_pairs(micro_batches: Sequence[_Drawn]) -> Sequence[Tensor]:
    """Return the factors that turn the mean of the micro-batches' mean losses into the mean over the pixel pairs of all of them.

    Without them, an image without pairs would give the other images of its micro-batch a larger part.
    """
    weights = all_reduce_sum(torch.stack([one.weights.sum() for one in micro_batches]), None)
    total = weights.sum()
    return (len(micro_batches) * weights / torch.where(total > 0, total, 1)).unbind()


def loss_parts(parts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the parts of the loss by name: see `p2r.loss.info_nce` and `barlow_twins`.

    Args:
        parts: Sums over ranks of `Step.parts`.
    """
    return {name: total / weight for name, (total, weight) in parts.items() if weight}


def equivariance_error(alignment: Sequence[float]) -> float | None:
    """Return the deviation of the embeddings from the warp: 0 if they follow it perfectly, 1 if no better than chance.

    It is the mean of 1 - cos over embedding pairs of the same anatomy in both views, divided by the mean over all pairs of
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


def _run_two_passes(
    engine: Any,
    drawn: _Drawn,
    size: int,
    objective: _Objective,
    finish: Callable[[Tensor], Update],
    timed: Timed,
) -> tuple[Tensor, Update]:
    """Take the step on the loss over all micro-batches together: embeddings without a graph first, then gradients through each."""
    towers, generators, micro_batches = [], [], drawn.split(size)
    with torch.no_grad(), timed("forward"):
        for micro_batch in micro_batches:
            generators.append(_generator_states(engine.device))
            towers.append(engine.module(*micro_batch.inputs))
    found = [torch.cat(parts).requires_grad_() for parts in zip(*towers, strict=True)]
    log_temperature = engine.module.log_temperature
    learnt = [] if log_temperature is None else [log_temperature]
    with timed("loss"):
        loss = objective(drawn, *found)
        of_found = torch.autograd.grad(loss, [*found, *learnt])
        of_learnt = of_found[len(found) :]

    # DeepSpeed averages over micro-batches; here their gradients must add up.
    gradients = [
        torch.split(len(micro_batches) * gradient, len(part))
        for gradient, part in zip(of_found, towers[0], strict=False)  # a learnt temperature is no part of a tower
    ]
    for number, micro_batch in enumerate(micro_batches):
        _set_generator_states(generators[number], engine.device)  # repeats the random draws of the first pass
        of_micro_batch = (gradient[number] for gradient in gradients)
        with timed("forward"):
            carried = sum(
                (tower * gradient).sum()
                for tower, gradient in zip(engine(*micro_batch.inputs), of_micro_batch, strict=True)
            )
            if number == 0 and learnt:
                carried = carried + len(micro_batches) * (log_temperature * of_learnt[0]).sum()
        with timed("backward"):
            engine.backward(carried)
        with timed("optimizer"):
            if number < len(micro_batches) - 1:
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


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generator_states(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
