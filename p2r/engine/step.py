"""One optimizer step of pretraining: images -> two views -> N pixel pairs -> loss -> update.

`B` images of this rank, `H W` pixels, `n` pixel pairs per image, `E` embedding channels.
"""

from typing import Any

import torch
from torch import Tensor

from p2r.config import LossConfig, PretrainConfig
from p2r.data.stream import Batch
from p2r.loss import barlow_twins, corresponding_points, info_nce
from p2r.randomness import keyed_generator
from p2r.views.pair import make_views


def pretrain_step(engine: Any, batch: Batch, *, config: PretrainConfig, learning_rate: float) -> Tensor:
    """Take one step and return the loss of the global batch, detached, the same on every rank."""
    device = engine.device
    views = make_views(
        batch.image.to(device),
        batch.inside.to(device),
        config=config.views,
        spacing_mm=batch.spacing_mm,
        seed=config.seed,
        epoch=batch.epoch,
        positions=batch.positions,
    )
    points_a, points_b = corresponding_points(
        views.warp,
        views.valid,
        num_points=config.loss.pixel_pairs_per_image,
        generators=[keyed_generator(config.seed, "points", batch.epoch, int(position)) for position in batch.positions],
    )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    queries, keys = engine(views.a.to(dtype), views.b.to(dtype), points_a, points_b)  # (B*n, E) each
    loss = pixel_pair_loss(queries, keys, config.loss)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.backward(loss)
    engine.step()
    return loss.detach()


def pixel_pair_loss(queries: Tensor, keys: Tensor, config: LossConfig) -> Tensor:
    """Return the objective that `config` names, over the pixel pairs of all ranks."""
    if config.name == "barlow_twins":
        return barlow_twins(queries, keys, off_diagonal_weight=config.off_diagonal_weight)
    return info_nce(queries, keys, temperature=config.temperature, form=config.form)
