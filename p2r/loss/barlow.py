"""Embeddings of N pixel pairs -> Barlow Twins over all pairs of all ranks.

Channels are standardised over the pixels of all ranks. The loss drives their E x E cross-correlation between the views
towards the identity. Ranks reduce sums (E and E x E numbers), so the communication cost does not depend on N.

Sums are centred about the global mean, which enters as a constant. To first order, centred moments do not change with the
mean, so this is exact, and each rank's part of the gradient depends only on its own rows.

Source: Zbontar et al. 2021, eq. 1 and 2, arXiv:2103.03230; over pixels: Pix2Rep-v2, arXiv:2609.01427.

Shape letters: N pixel pairs of all ranks, n of this rank, E embedding channels.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from p2r.loss.ranks import (
    Findings,
    GradientScale,
    agree,
    all_reduce_sum,
    own_gradient_factor,
    postpones,
    rank_and_size,
    refuse_pair,
    refuse_values,
    refuse_weights,
)

_MIN_VARIANCE = 1e-12
"""A channel with a smaller variance counts as constant and gets zero correlation, instead of a division by zero."""


def barlow_twins(
    a: Tensor,
    b: Tensor,
    *,
    off_diagonal_weight: float,
    weights: Tensor | None = None,
    group: ProcessGroup | None = None,
    gradient_scale: GradientScale = "mean",
    findings: Findings | None = None,
    parts: dict[str, Tensor] | None = None,
) -> Tensor:
    """Compute the Barlow Twins loss: each channel should agree between the views and be decorrelated from the others.

    Args:
        a: (n, E) embeddings of pixels in view a; computed in float32 or better.
        b: (n, E) embeddings of the same positions in view b.
        off_diagonal_weight: Weight of the redundancy term, >= 0.
        weights: (n,) weight of each pair in the moments, >= 0. Pairs of weight 0 are excluded.
        group: Ranks whose pairs are combined; they may hold different numbers of pairs.
        gradient_scale: Reduction of gradients over ranks by the caller.
        findings: Collects invalid values on a device without synchronising. Fewer than two pairs are then not an error:
            their loss and gradient are 0.
        parts: Receives the two terms, whose sum is the loss, each as (2,): the term, and a 1 to divide by after both are
            summed over ranks. "invariance": the diagonal term; "redundancy": the weighted off-diagonal term.

    Returns:
        Scalar `sum_i (1 - C_ii)^2 + weight * sum_{i != j} C_ij^2`, the same on every rank.

    Raises:
        ValueError: on every rank, if an argument on any rank breaks a rule, or fewer than two pairs are left.
        EmbeddingError: on every rank, if embeddings on any rank are not finite.
    """
    factor = own_gradient_factor(gradient_scale, group)
    problem: ValueError | None = None
    postponed = postpones(findings, a)
    try:
        if not (math.isfinite(off_diagonal_weight) and off_diagonal_weight >= 0):
            raise ValueError(f"off_diagonal_weight must be finite and not negative, got {off_diagonal_weight}")
        refuse_pair(a=a, b=b)
        if weights is not None:
            refuse_weights(weights, a, findings)
            kept = weights > 0
            if postponed:  # only the device knows the number of kept pairs
                a, b = (rows.masked_fill(~kept[:, None], 0) for rows in (a, b))
            else:
                a, b, weights = a[kept], b[kept], weights[kept]
        refuse_values(a=a, b=b, zeros=True, findings=findings)
    except ValueError as error:
        problem = error
    if postponed:
        if problem is not None:
            raise problem
        counts = [len(a)] * rank_and_size(group)[1]
    else:
        equal = {} if problem else {"embedding channels": float(a.shape[1]), "off_diagonal_weight": off_diagonal_weight}
        counts = agree(problem, len(a) if a.ndim else 0, equal, device=a.device, group=group)
    if sum(counts) < 2:
        if findings is None:
            raise ValueError(f"expected at least 2 pixel pairs of positive weight over all ranks, got {sum(counts)}")
        return (a.sum() + b.sum()) * 0

    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        weights = a.new_ones(len(a), dtype=dtype) if weights is None else weights.to(dtype)
        correlation, num_pairs = _correlate_channels(a.to(dtype), b.to(dtype), weights, group, factor)
        diagonal = correlation.diagonal()
        off_diagonal = correlation - torch.diag(diagonal)
        invariance, redundancy = (1 - diagonal).square().sum(), off_diagonal_weight * off_diagonal.square().sum()
        loss: Tensor = invariance + redundancy
        if parts is not None:
            for name, term in {"invariance": invariance, "redundancy": redundancy}.items():
                parts[name] = torch.stack((term.detach(), term.new_ones(())))
        return torch.where(num_pairs < 2, 0 * loss, loss)


def _correlate_channels(
    a: Tensor, b: Tensor, weights: Tensor, group: ProcessGroup | None, factor: float
) -> tuple[Tensor, Tensor]:
    """Return the correlation (E, E) of the channels of a and b over the pairs of all ranks, and the number of pairs."""
    channels = a.shape[1]
    column = weights[:, None]
    weight_sums = torch.stack((weights.sum(), (weights > 0).sum().to(weights.dtype)))
    sums = torch.cat(((column * a.detach()).sum(0), (column * b.detach()).sum(0), weight_sums))
    totals = all_reduce_sum(sums, group)
    # Without any pair the mean is 0, not 0 / 0.
    total_weight, num_pairs = torch.where(totals[-2] > 0, totals[-2], 1), totals[-1]
    a = a - totals[:channels] / total_weight
    b = b - totals[channels:-2] / total_weight
    moments = torch.cat(
        ((column * a.square()).sum(0)[None], (column * b.square()).sum(0)[None], (column * a).T @ b)
    )  # (2 + E, E)
    moments = _SumOverRanks.apply(moments, group, factor) / total_weight  # type: ignore[no-untyped-call]
    deviation_a, deviation_b = moments[:2].clamp_min(_MIN_VARIANCE).sqrt()
    return moments[2:] / (deviation_a[:, None] * deviation_b), num_pairs


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks without communication in backward: every rank computes the same loss from the same sums."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup | None, factor: float) -> Tensor:
        ctx.factor = factor
        return all_reduce_sum(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.factor, None, None
