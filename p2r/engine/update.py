"""Optimizer update: gradient clipping, the check that everything is finite, and the moving average of the weights.

One sum over ranks gives both the norm of the gradient of all weights and whether it is finite on every rank. The consequences
stay on the device. torch's fused AdamW, made for mixed precision, takes a tensor that divides the gradients and one that
skips the update. No rank waits, and all decide alike. A skipped step leaves weights, their average and the optimizer's state
bitwise unchanged.

It reads the gradients that DeepSpeed has reduced, in the same way at every ZeRO stage. DeepSpeed itself checks and clips
differently from stage to stage, and does not check at stage 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from p2r.engine.build import inner_optimizer, masters, reduced_gradients


@dataclass(frozen=True)
class Update:
    """Outcome of an update, as device tensors."""

    is_skipped: Tensor
    """Scalar bool, equal on every rank: the loss or a gradient was not finite, and nothing was changed."""
    gradient_norm: Tensor
    """Scalar; norm of all gradients, before clipping."""


@torch.no_grad()
def update(engine: Any, loss: Tensor, *, clip_norm: float, averaging: float | None = None) -> Update:
    """Take the optimizer's step, after the last backward pass.

    Args:
        engine: Engine from `build_engine`.
        loss: Detached loss of the step.
        clip_norm: Norm above which gradients are scaled down to it; 0 disables.
        averaging: Weight of the new weights in their moving average; None: no average.
    """
    gradients = reduced_gradients(engine)
    norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
    world_size = torch.distributed.get_world_size()
    # At stage 0 every rank holds all gradients.
    times_counted = world_size if engine.zero_optimization_stage() == 0 else 1
    facts = torch.stack([norms.double().square().sum() / times_counted, (~torch.isfinite(loss)).double()])
    if world_size > 1:
        torch.distributed.all_reduce(facts)
    norm = facts[0].sqrt().float()
    is_skipped = ~torch.isfinite(norm) | (facts[1] > 0)

    optimizer: Any = inner_optimizer(engine)
    optimizer.found_inf = is_skipped.float()
    optimizer.grad_scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0) if clip_norm else None
    if engine.zero_optimization_stage() == 3:
        # DeepSpeed would check for itself, and then leave out the work after a step.
        for gradient in gradients:
            gradient.masked_fill_(is_skipped, 0)
    engine.step()
    if averaging is not None:
        weight = torch.where(is_skipped, 0.0, averaging)
        for mean, part in zip(engine.mean_weights, masters(engine), strict=True):
            mean.lerp_(part.detach(), weight)
    return Update(is_skipped, norm)
