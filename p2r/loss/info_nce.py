r"""Embeddings of N pixel pairs -> InfoNCE over all pairs of all ranks, exact, in memory linear in N.

Each embedding has to identify its partner among all candidates by cosine similarity s, scaled by k = 1 / temperature:

    cross_view  candidates of a query are all keys, and of a key all queries (N x N), mean over both directions
    nt_xent     candidates are all 2N embeddings except itself (SimCLR's form, used by Pix2Rep)

The loss of one anchor is `softplus(lse_j(k s_ij) - k s_positive)`, with j over its negatives only. As training converges,
the usual `lse - k s_positive` and its gradient lose all significant digits. The decoupled variant, with the positive left
out of the denominator, has no softplus.

Similarities are computed tile by tile and never stored; the backward pass recomputes them:

    d loss / d z_i = k / (2 sum w) * ( sum over negatives j of (w_i exp(k s_ij - l_i) + w_j exp(k s_ij - l_j)) z_j
                                       - w_i (sigmoid(x_i) + sigmoid(x_partner)) z_partner )

with x_i the softplus's argument, l_i = k s_positive + softplus(x_i) the log-sum-exp over all candidates of i, and w the
pairs' weights. The loss depends on k only through k s, so its derivative is a dot product of rows and their gradients.

Ranks exchange embeddings and log-sums in the forward pass, so the backward pass needs no communication for the gradient of
a rank's own rows. Tiles start at a rank's own rows: if their number is a multiple of the tile, every rank does the same
arithmetic as a single process. With `ring`, a rank holds the rows of one other rank at a time, for rows of all ranks that do
not fit into memory. The backward pass sends them around again.

Source: van den Oord et al. 2018, arXiv:1807.03748; Chen et al. 2020 (SimCLR), eq. 1, arXiv:2002.05709; Yeh et al. 2022
(decoupled), arXiv:2110.06848.

Shape letters: N pixel pairs of all ranks, n of this rank, E embedding channels, D spatial dimensions.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from p2r.loss import backends
from p2r.loss.arguments import (
    drop_weightless,
    equal_on_all_ranks,
    number_in,
    refuse_arguments,
    replace_weightless,
)
from p2r.loss.contrast import (
    Contrast,
    Exchange,
    Form,
    Pairs,
    SameImage,
    compute_log_sums,
    gather_pairs,
    push_rows,
)
from p2r.loss.ranks import (
    Findings,
    GradientScale,
    agree,
    all_gather_rows,
    own_gradient_factor,
    postpones,
    rank_and_size,
    refuse_values,
)
from p2r.loss.tiles import Scale, sharpest, static_shift, static_shift_on_device


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    form: Form = "cross_view",
    decoupled: bool = False,
    weights: Tensor | None = None,
    exclude: SameImage | None = None,
    exchange: Exchange = "all_gather",
    group: ProcessGroup | None = None,
    gradient_scale: GradientScale = "mean",
    findings: Findings | None = None,
    parts: dict[str, Tensor] | None = None,
) -> Tensor:
    """Contrast every pixel pair with all other pairs.

    On CUDA, products are computed in the dtype of the embeddings (bfloat16 runs at full speed), elsewhere in float32 or
    better. Sums are in float32, or in float64 for float64 embeddings. Autocast has no effect inside.

    Args:
        queries: (n, E) embeddings of pixels in view a; normalised inside.
        keys: (n, E) embeddings of the same positions in view b.
        temperature: Temperature of the softmax over cosine similarities, > 0. A tensor of one element is learnt. With findings,
            a value on a device is not read: values that are too small for a static shift are counted as findings.
        form: Candidates of an anchor, see the module.
        decoupled: Leave the positive out of the denominator.
        weights: (n,) weight of each pair in the mean, >= 0. Pairs of weight 0 are excluded, also as negatives.
        exclude: Negatives to leave out. A pair without any negatives has zero loss.
        exchange: Hold the rows of all ranks at once (`all_gather`), or of one other rank at a time (`ring`).
        group: Ranks whose pairs are contrasted with each other; they may hold different numbers of pairs.
        gradient_scale: Reduction of gradients over ranks by the caller.
        findings: Collects invalid values on a device without synchronising. Fewer than two pairs are then not an error:
            their loss and gradient are 0.
        parts: Receives the components of the loss, each as (2,): a sum over this rank's pairs, and the weight to divide by
            after both are summed over ranks. "positive": cosine similarity of a pair; "negatives": log-sum-exp of an
            anchor's logits over its negatives, nats.

    Returns:
        Scalar, nats: the loss over the pairs of all ranks, the same on every rank.

    Raises:
        ValueError: on every rank, if an argument on any rank breaks a rule, or fewer than two pairs are left.
        EmbeddingError: on every rank, if embeddings on any rank are not finite or all zeros.
    """
    factor = own_gradient_factor(gradient_scale, group)
    postponed = findings if postpones(findings, queries) else None
    is_unread = postponed is not None and isinstance(temperature, Tensor) and postpones(findings, temperature)
    number = None if is_unread else number_in(temperature)
    problem: ValueError | None = None
    present = None
    try:
        refuse_arguments(queries, keys, temperature, number, form, weights, exclude, exchange, findings)
        if weights is not None and postponed is not None:
            queries, keys, present = replace_weightless(queries, keys, weights)
        elif weights is not None:
            queries, keys, weights, exclude = drop_weightless(queries, keys, weights, exclude)
        refuse_values(queries=queries, keys=keys, findings=findings)
    except ValueError as error:
        problem = error
    if postponed is not None:
        counts = _assume_equal_counts(problem, queries, group)
    else:
        equal = {}
        if problem is None and number is not None:
            equal = equal_on_all_ranks(queries, number, form, decoupled, exclude, exchange)
        counts = agree(problem, len(queries) if queries.ndim else 0, equal, device=queries.device, group=group)
    if sum(counts) < 2:
        if findings is None:
            raise ValueError(f"expected at least 2 pixel pairs of positive weight over all ranks, got {sum(counts)}")
        return _zero_loss(queries, keys, temperature)

    dtype = torch.promote_types(queries.dtype, torch.float32)
    product_dtype = backends.product_dtype(queries)
    k = _inverse(temperature, number, dtype)
    scale = _choose_scale(k, sum(counts) * (2 if form == "nt_xent" else 1), exclude, findings, product_dtype)
    contrast = Contrast(
        form,
        decoupled,
        exchange,
        group,
        counts,
        factor,
        dtype if scale is None else product_dtype,  # half precision cannot resolve logits with such a large k
        k,
        scale,
        exclude,
        postponed,
        parts,
    )
    if weights is None:
        weights = torch.ones(len(queries), dtype=dtype, device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        loss: Tensor = _InfoNCE.apply(  # type: ignore[no-untyped-call]
            _normalise_rows(queries.to(dtype)),
            _normalise_rows(keys.to(dtype)),
            temperature if isinstance(temperature, Tensor) else None,
            weights.to(dtype),
            present,
            contrast,
        )
    return loss


def _assume_equal_counts(problem: ValueError | None, queries: Tensor, group: ProcessGroup | None) -> list[int]:
    """Return the number of pairs of each rank without communication, or raise this rank's error."""
    if problem is not None:
        raise problem
    return [len(queries)] * rank_and_size(group)[1]


def _inverse(temperature: float | Tensor, number: float | None, dtype: torch.dtype) -> float | Tensor:
    """Return 1 / temperature: a number, or a scalar on the device if the temperature is not read."""
    if number is not None:
        return 1 / number
    assert isinstance(temperature, Tensor)
    return 1 / temperature.detach().to(dtype).reshape(())


class _InfoNCE(torch.autograd.Function):
    """Unit rows of this rank -> the loss over all ranks; backward returns the gradient of this rank's rows times the factor."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        temperature: Tensor | None,
        weights: Tensor,
        present: Tensor | None,
        contrast: Contrast,
    ) -> Tensor:
        own = Pairs(queries.to(contrast.product_dtype), keys.to(contrast.product_dtype), *contrast.metadata, present)
        everyone = None if contrast.exchange == "ring" else gather_pairs(own, contrast)
        positive = contrast.k * (own.queries.to(queries.dtype) * own.keys.to(queries.dtype)).sum(1)
        negatives = torch.stack(compute_log_sums(own, everyone, contrast), 1)  # (n, 2)
        x = negatives - positive[:, None]
        if contrast.parts is not None:
            contrast.parts["positive"] = _sum_with_weight(positive / contrast.k, weights, present)
            contrast.parts["negatives"] = _sum_with_weight(negatives.mean(1), weights, present)
        losses = x if contrast.decoupled else _softplus(x)
        if present is not None:
            losses = losses.masked_fill(present[:, None] == 0, 0)
        weighted = torch.cat((losses * weights[:, None], weights[:, None]), 1)
        all_weighted = all_gather_rows(weighted, contrast.counts, contrast.group)
        if contrast.decoupled:
            _refuse_without_negatives(torch.isinf(all_weighted).any(1).sum(), contrast)
        total_queries, total_keys, total_weight = all_weighted.sum(0)
        if present is not None:
            total_weight = torch.where(total_weight > 0, total_weight, 1)  # without any pair the mean is 0, not 0 / 0
        log_norms = positive[:, None] + losses
        if contrast.scale is None:
            softmax = log_norms - weights.log()[:, None]
        else:
            softmax = weights[:, None] * torch.exp(contrast.scale.shift - log_norms)
        own = replace(own, softmax=softmax)
        if everyone is not None:
            everyone = replace(everyone, softmax=all_gather_rows(softmax, contrast.counts, contrast.group))
        pull = weights * (2.0 if contrast.decoupled else torch.sigmoid(x).sum(1))
        ctx.contrast, ctx.gathered = contrast, everyone is not None
        ctx.save_for_backward(
            pull, total_weight, temperature, *own.tensors(), *(() if everyone is None else everyone.tensors())
        )
        loss: Tensor = (total_queries + total_keys) / (2 * total_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        contrast: Contrast = ctx.contrast
        pull, total_weight, temperature, *tensors = ctx.saved_tensors
        own, everyone = Pairs(*tensors[:6]), Pairs(*tensors[6:]) if ctx.gathered else None
        query_gradient, key_gradient = push_rows(own, everyone, contrast)
        query_gradient.addcmul_(pull[:, None], own.keys.to(pull.dtype), value=-1)
        key_gradient.addcmul_(pull[:, None], own.queries.to(pull.dtype), value=-1)
        scale = gradient * contrast.factor * contrast.k / (2 * total_weight)
        query_gradient *= scale
        key_gradient *= scale
        temperature_gradient = None
        if temperature is not None:
            dots = (own.queries * query_gradient).sum() + (own.keys * key_gradient).sum()
            temperature_gradient = (-contrast.k / 2 * dots).to(temperature.dtype).reshape(temperature.shape)
        return query_gradient, key_gradient, temperature_gradient, None, None, None


def _sum_with_weight(values: Tensor, weights: Tensor, present: Tensor | None) -> Tensor:
    """Return the weighted sum of values (n,) and the sum of weights, (2,); pairs with value -inf (no negatives) do not count."""
    counts = ~torch.isneginf(values) if present is None else ~torch.isneginf(values) & (present > 0)
    return torch.stack(((values * weights).masked_fill(~counts, 0).sum(), (weights * counts).sum()))


def _refuse_without_negatives(num_pairs: Tensor, contrast: Contrast) -> None:
    message = (
        f"the decoupled loss needs a negative for every pixel pair, {{count}} of {contrast.num_pairs} have none: "
        "exclude fewer, or draw pairs from more images"
    )
    if contrast.findings is not None:
        contrast.findings.add(message, num_pairs)
    elif count := int(num_pairs):
        raise ValueError(message.format(count=count))


def _normalise_rows(rows: Tensor) -> Tensor:
    """Normalise rows of any norm, without overflow or underflow of their squares."""
    longest = rows.detach().abs().amax(1, keepdim=True) if len(rows) else 1
    unit: Tensor = F.normalize(rows / longest, dim=1)
    return unit


def _choose_scale(
    k: float | Tensor, num_candidates: int, exclude: SameImage | None, findings: Findings | None, dtype: torch.dtype
) -> Scale | None:
    """Return the scale of the entries; None without a static shift. A `k` on a device is assumed to have one, and checked there."""
    radius_mm = math.inf if exclude is None else exclude.radius_mm
    if not isinstance(k, Tensor):
        shift = static_shift(k, num_candidates, dtype)
        return None if shift is None else Scale(k, radius_mm, shift)
    assert findings is not None
    most = sharpest(num_candidates, dtype)
    message = f"temperature must be at least {1 / most:.3g} for {num_candidates} candidates, the learnt one is smaller"
    findings.add(message, (~((k > 0) & (k <= most))).sum())
    return Scale(k, radius_mm, static_shift_on_device(k, num_candidates, dtype))


def _softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)) without the threshold of F.softplus, which costs float64 half its digits."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _zero_loss(*arguments: Tensor | float) -> Tensor:
    """Return a loss of 0 with zero gradients."""
    return torch.stack([argument.sum() * 0 for argument in arguments if isinstance(argument, Tensor)]).sum()
