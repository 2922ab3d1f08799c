"""Gradients and a loss -> a step of the optimizer, or none: clipping, the check that all is finite, a mean of the weights.

One sum over ranks says both how long the gradient of all weights is and whether everything in it, on any rank, is finite.
What follows from it stays on the device: torch's fused AdamW takes a tensor to divide gradients by and one that says
whether to do nothing at all (they are there for mixed precision), so that no rank waits, and all decide alike. A step that
is not taken leaves weights, their mean and the optimizer's state as they were, to the bit.

It reads what DeepSpeed has reduced, at every ZeRO stage the same way, because DeepSpeed itself checks and clips differently
from stage to stage, and at stage 0 does not check.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from p2r.engine.build import inner_optimizer, masters, reduced_gradients


@dataclass(frozen=True)
class Update:
    """What became of a step; tensors on its device."""

    is_skipped: Tensor
    """Scalar, bool, the same on every rank: the loss or a gradient was not finite, and nothing was changed."""
    gradient_norm: Tensor
    """Scalar: norm of all gradients, before clipping."""


@torch.no_grad()
def update(engine: Any, loss: Tensor, *, clip_norm: float, averaging: float | None = None) -> Update:
    """Take the optimizer's step, after the last backward pass of the step.

    Args:
        engine: From `build_engine`.
        loss: Of the step, detached.
        clip_norm: Norm above which gradients are scaled down to it; 0: never.
        averaging: Weight of the new weights in their running mean; None: there is none.
    """
    gradients = reduced_gradients(engine)
    norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
    world_size = torch.distributed.get_world_size()
    # At stage 0 every rank holds everything.
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
        # DeepSpeed would look for itself, and leave out what must be done after a step.
        for gradient in gradients:
            gradient.masked_fill_(is_skipped, 0)
    engine.step()
    if averaging is not None:
        weight = torch.where(is_skipped, 0.0, averaging)
        for mean, part in zip(engine.mean_weights, masters(engine), strict=True):
            mean.lerp_(part.detach(), weight)
    return Update(is_skipped, norm)
