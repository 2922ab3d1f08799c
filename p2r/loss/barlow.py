"""Embeddings of N pixel pairs -> Barlow Twins over all pairs of all ranks.

Channels are standardised over the pixels of all ranks, then their E x E cross-correlation between the views is pushed
to the identity. Ranks add up sums (E and E x E numbers), so the cost of communication does not depend on N.

Sums are centred about the global mean, which enters as a constant: centred moments do not change, to first order, when
the mean moves, so this is exact, and each rank's part of the gradient depends on its own rows alone.

Source: Zbontar et al. 2021, eq. 1 and 2, arXiv:2103.03230; over pixels: Pix2Rep-v2, arXiv:2609.01427.

Shape letters: N pixel pairs of all ranks, n of this rank, E embedding channels.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from p2r.loss.ranks import GradientScale, all_reduce_sum, own_gradient_factor

_SMALLEST_VARIANCE = 1e-12
"""A channel that varies less is constant; it correlates with nothing, rather than dividing by zero."""


def barlow_twins(
    a: Tensor,
    b: Tensor,
    *,
    off_diagonal_weight: float,
    group: ProcessGroup | None = None,
    gradient_scale: GradientScale = "mean",
) -> Tensor:
    """Make each channel agree between the views, and differ from all other channels.

    Args:
        a: (n, E) embeddings of pixels in view a; computed in float32 or better.
        b: (n, E) embeddings of the same places in view b.
        off_diagonal_weight: Weight of the redundancy term, >= 0.
        group: Ranks whose pairs are taken together.
        gradient_scale: What the caller's reducer does with the ranks' gradients.

    Returns:
        Scalar `sum_i (1 - C_ii)^2 + weight * sum_{i != j} C_ij^2`, the same on every rank.

    Raises:
        ValueError: Shapes differ, or the weight is negative or not finite.
    """
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        raise ValueError(f"want a and b (N, E) with N > 0, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (math.isfinite(off_diagonal_weight) and off_diagonal_weight >= 0):
        raise ValueError(f"off_diagonal_weight must be finite and not negative, got {off_diagonal_weight}")
    factor = own_gradient_factor(gradient_scale, group)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        a, b = a.to(dtype), b.to(dtype)
        channels = a.shape[1]
        sums = torch.cat((a.detach().sum(0), b.detach().sum(0), a.new_tensor([len(a)])))
        totals = all_reduce_sum(sums, group)
        num_pairs = totals[-1]
        a = a - totals[:channels] / num_pairs
        b = b - totals[channels:-1] / num_pairs
        moments = torch.cat((a.square().sum(0)[None], b.square().sum(0)[None], a.T @ b))  # (2 + E, E)
        moments = _SumOverRanks.apply(moments, group, factor) / num_pairs  # type: ignore[no-untyped-call]
        deviation_a, deviation_b = moments[:2].clamp_min(_SMALLEST_VARIANCE).sqrt()
        correlation = moments[2:] / (deviation_a[:, None] * deviation_b)
        diagonal = correlation.diagonal()
        off_diagonal = correlation - torch.diag(diagonal)
        loss: Tensor = (1 - diagonal).square().sum() + off_diagonal_weight * off_diagonal.square().sum()
        return loss


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose backward does not communicate: every rank computes the same loss from the same sums."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup | None, factor: float) -> Tensor:
        ctx.factor = factor
        return all_reduce_sum(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.factor, None, None
