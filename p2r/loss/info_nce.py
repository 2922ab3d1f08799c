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
not fit into memory; the backward pass sends them around again.

Source: van den Oord et al. 2018, arXiv:1807.03748; Chen et al. 2020 (SimCLR), eq. 1, arXiv:2002.05709; Yeh et al. 2022
(decoupled), arXiv:2110.06848.

Shape letters: N pixel pairs of all ranks, n of this rank, E embedding channels, D spatial dimensions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from p2r.loss import tiles
from p2r.loss.ranks import (
    Findings,
    GradientScale,
    agree,
    all_gather_rows,
    circulate,
    own_columns,
    own_gradient_factor,
    postpones,
    rank_and_size,
    refuse_pair,
    refuse_values,
    refuse_weights,
)
from p2r.loss.tiles import Rows, Scale, sharpest, static_shift, static_shift_on_device

PANEL = 16_384
"""Number of rows of a panel, enough to fill a GPU. Similarities of two panels of one tower are computed once."""
Form = Literal["cross_view", "nt_xent"]
Exchange = Literal["all_gather", "ring"]


@dataclass(frozen=True)
class SameImage:
    """Pixels of one image to exclude from each other's negatives, because they show nearly the same anatomy."""

    image: Tensor
    """(n,) integers: image of each pixel pair, unique among all ranks."""
    position_mm: Tensor | None = None
    """(n, D) position of each pixel pair in its image, mm. None: all pixels of an image are excluded."""
    radius_mm: float = math.inf
    """Pixels within this distance are excluded."""


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
    problem: ValueError | None = None
    postponed = postpones(findings, queries)
    number: float | None = None
    if not (postponed and isinstance(temperature, Tensor) and postpones(findings, temperature)):
        number = number_in(temperature)
    present = None
    try:
        _refuse_arguments(queries, keys, temperature, number, form, weights, exclude, exchange, findings)
        if weights is not None and postponed:
            queries, keys, present = _replace_weightless(queries, keys, weights)
        elif weights is not None:
            queries, keys, weights, exclude = _drop_weightless(queries, keys, weights, exclude)
        refuse_values(queries=queries, keys=keys, findings=findings)
    except ValueError as error:
        problem = error
    if postponed:
        if problem is not None:
            raise problem
        counts = [len(queries)] * rank_and_size(group)[1]
    else:
        equal = (
            {}
            if problem or number is None
            else _equal_on_all_ranks(queries, number, form, decoupled, exclude, exchange)
        )
        counts = agree(problem, len(queries) if queries.ndim else 0, equal, device=queries.device, group=group)
    if sum(counts) < 2:
        if findings is None:
            raise ValueError(f"expected at least 2 pixel pairs of positive weight over all ranks, got {sum(counts)}")
        return _zero_loss(queries, keys, temperature)

    dtype = torch.promote_types(queries.dtype, torch.float32)
    product_dtype = _product_dtype(queries)
    num_candidates = sum(counts) * (2 if form == "nt_xent" else 1)
    k: float | Tensor = 1 / number if number is not None else 1.0
    if number is None and isinstance(temperature, Tensor):
        k = 1 / temperature.detach().to(dtype).reshape(())
    scale = _choose_scale(k, num_candidates, exclude, findings, product_dtype)
    contrast = _Contrast(
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
        findings if postponed else None,
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


@dataclass(frozen=True)
class _Contrast:
    """Settings of one call, for both passes."""

    form: Form
    decoupled: bool
    exchange: Exchange
    group: ProcessGroup | None
    counts: list[int]
    factor: float
    product_dtype: torch.dtype
    k: float | Tensor
    """1 / temperature; a scalar on the rows' device if the temperature is not read."""
    scale: Scale | None
    """None: no static shift exists, so each row needs its own maximum."""
    exclude: SameImage | None
    findings: Findings | None
    parts: dict[str, Tensor] | None

    @property
    def num_pairs(self) -> int:
        return sum(self.counts)

    def first(self, rank: int) -> int:
        """Return the index of a rank's first pair among all pairs."""
        return sum(self.counts[:rank])

    @property
    def own_first(self) -> int:
        return self.first(rank_and_size(self.group)[0])

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.product_dtype, torch.float32)

    @property
    def metadata(self) -> tuple[Tensor | None, Tensor | None]:
        """The parts of `exclude` for tiles: images, and positions if there is a radius."""
        if self.exclude is None:
            return None, None
        return self.exclude.image, self.exclude.position_mm if math.isfinite(self.exclude.radius_mm) else None

    @property
    def radius_mm(self) -> float:
        return math.inf if self.exclude is None else self.exclude.radius_mm

    @property
    def by_rows(self) -> bool:
        """Compute each direction separately, because rows arrive one rank at a time, or need a maximum each."""
        return self.exchange == "ring" or self.scale is None


@dataclass(frozen=True)
class _Pairs:
    """Pixel pairs of this rank, of another rank, or of all ranks."""

    queries: Tensor
    """(m, E) unit rows."""
    keys: Tensor
    """(m, E) unit rows."""
    image: Tensor | None
    """(m,) as in `SameImage`."""
    position_mm: Tensor | None
    """(m, D) as in `SameImage`."""
    present: Tensor | None
    """(m,) uint8: 0 for excluded pairs; they stay in place, because dropping them would synchronise with the device."""
    softmax: Tensor | None = None
    """(m, 2) weights of a query's and a key's entries in the gradient; set for the backward pass."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.queries, self.keys, self.image, self.position_mm, self.present, self.softmax

    def towers(self, first: int) -> tuple[Rows, Rows]:
        """Return queries and keys, numbered from `first`."""
        query_weights, key_weights = (None, None) if self.softmax is None else self.softmax.T.contiguous()
        return (
            Rows(self.queries, first, self.image, self.position_mm, query_weights, self.present),
            Rows(self.keys, first, self.image, self.position_mm, key_weights, self.present),
        )


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
        contrast: _Contrast,
    ) -> Tensor:
        own = _Pairs(queries.to(contrast.product_dtype), keys.to(contrast.product_dtype), *contrast.metadata, present)
        everyone = None if contrast.exchange == "ring" else _gather_pairs(own, contrast)
        positive = contrast.k * (own.queries.to(queries.dtype) * own.keys.to(queries.dtype)).sum(1)
        compute_log_sums = _compute_log_sums_by_rows if contrast.by_rows else _compute_log_sums
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
        contrast: _Contrast = ctx.contrast
        pull, total_weight, temperature, *tensors = ctx.saved_tensors
        own, everyone = _Pairs(*tensors[:6]), _Pairs(*tensors[6:]) if ctx.gathered else None
        push_rows = _push_by_rows if contrast.by_rows else _push_both_ways
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


def _refuse_without_negatives(num_pairs: Tensor, contrast: _Contrast) -> None:
    message = (
        f"the decoupled loss needs a negative for every pixel pair, {{count}} of {contrast.num_pairs} have none: "
        "exclude fewer, or draw pairs from more images"
    )
    if contrast.findings is not None:
        contrast.findings.add(message, num_pairs)
    elif count := int(num_pairs):
        raise ValueError(message.format(count=count))


def _compute_log_sums(own: _Pairs, everyone: _Pairs | None, contrast: _Contrast) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each own row's logits over its negatives, (n,) twice; one product serves both directions."""
    assert everyone is not None and contrast.scale is not None
    (queries, keys), (all_queries, all_keys) = own.towers(contrast.own_first), everyone.towers(0)
    scale, backend = contrast.scale, _backend(own.queries)
    sums = backend.sums
    query_sums, column_sums = sums(queries, all_keys, scale, of_columns=True)
    panels = [backend.num_panels(count) for count in contrast.counts]
    key_sums = own_columns(column_sums, contrast.counts, panels, contrast.group)
    if contrast.form == "nt_xent":
        query_sums += _sums_within_tower(queries, all_queries, contrast)
        key_sums += _sums_within_tower(keys, all_keys, contrast)
    return query_sums.log() + scale.shift, key_sums.log() + scale.shift


def _sums_within_tower(own: Rows, everyone: Rows, contrast: _Contrast) -> Tensor:
    """Return the sums over all rows of a tower for own rows, (n,). The matrix is symmetric, so each pair of panels is computed once.

    Panels are in a ring. Each computes its similarities with the following half of the ring, so that ranks share the work
    evenly; column sums supply the other half. Ranks whose rows do not divide into whole panels compute everything.
    """
    assert contrast.scale is not None
    backend, scale = _backend(own.values), contrast.scale
    num_panels = contrast.num_pairs // PANEL
    if num_panels < 3 or any(count % PANEL for count in contrast.counts):
        total: Tensor = backend.sums(own, everyone, scale, of_columns=False)[0]
        return total
    parts = backend.num_panels(PANEL)
    over_rows = own.values.new_zeros(len(own), dtype=contrast.sum_dtype)
    over_columns = over_rows.new_zeros(len(own) // PANEL * parts, len(everyone))
    for number, rows in enumerate(tiles.blocks(len(own), PANEL)):
        anchors = own.part(rows)
        itself = slice(anchors.first, anchors.first + PANEL)
        over_rows[rows] = backend.sums(anchors, everyone.part(itself), scale, of_columns=False)[0]
        for others in _following_panels(anchors.first // PANEL, num_panels):
            over, apart = backend.sums(anchors, everyone.part(others), scale, of_columns=True)
            over_rows[rows] += over
            over_columns[number * parts : (number + 1) * parts, others] = apart
    of_ranks = [count // PANEL * parts for count in contrast.counts]
    return over_rows + own_columns(over_columns, contrast.counts, of_ranks, contrast.group)


def _following_panels(panel: int, num_panels: int) -> Iterator[slice]:
    """Yield the rows of the half of the other panels that follows a panel in the ring.

    Of any two panels, exactly one follows the other.
    """
    opposite = num_panels % 2 == 0 and panel < num_panels // 2
    stop = panel + 1 + (num_panels - 1) // 2 + opposite
    for first, last in ((panel + 1, min(stop, num_panels)), (0, stop - num_panels)):
        if first < last:
            yield slice(first * PANEL, last * PANEL)


def _compute_log_sums_by_rows(own: _Pairs, everyone: _Pairs | None, contrast: _Contrast) -> tuple[Tensor, Tensor]:
    """Compute the log-sums of each direction separately, as the rows of other ranks arrive."""
    queries, keys = own.towers(contrast.own_first)
    query_sums, key_sums = (torch.full_like(own.queries[:, 0], -math.inf, dtype=contrast.sum_dtype) for _ in range(2))
    for other_queries, other_keys in _iterate_ranks(own, everyone, contrast):
        for total, anchors, candidates in _iterate_directions(
            (query_sums, queries), (key_sums, keys), other_queries, other_keys, contrast.form
        ):
            if contrast.scale is None:
                log_sums = tiles.online_log_sums(anchors, candidates, contrast.k, contrast.radius_mm)
            else:
                sums, _ = _backend(own.queries).sums(anchors, candidates, contrast.scale, of_columns=False)
                log_sums = sums.log() + contrast.scale.shift
            torch.logaddexp(total, log_sums, out=total)
    return query_sums, key_sums


def _push_both_ways(own: _Pairs, everyone: _Pairs | None, contrast: _Contrast) -> tuple[Tensor, Tensor]:
    """Sum each own row's negatives, weighted by their probability in its softmax plus its probability in theirs: (n, E) twice."""
    assert everyone is not None and contrast.scale is not None
    (queries, keys), (all_queries, all_keys) = own.towers(contrast.own_first), everyone.towers(0)
    scale, push = contrast.scale, _backend(own.queries).push
    if len(contrast.counts) == 1:
        pushed_queries, pushed_keys = push(queries, keys, scale, to_candidates=True)
    else:
        pushed_queries, _ = push(queries, all_keys, scale)
        # Queries stay the rows of a tile, for the same arithmetic as in one process.
        _, pushed_keys = push(all_queries, keys, scale, to_anchors=False, to_candidates=True)
    if contrast.form == "nt_xent":
        pushed_queries += push(queries, all_queries, scale)[0]
        pushed_keys += push(keys, all_keys, scale)[0]
    return pushed_queries, pushed_keys


def _push_by_rows(own: _Pairs, everyone: _Pairs | None, contrast: _Contrast) -> tuple[Tensor, Tensor]:
    """Compute `_push_both_ways` for each direction separately, as the rows of other ranks arrive."""
    queries, keys = own.towers(contrast.own_first)
    pushed_queries, pushed_keys = (torch.zeros_like(own.queries, dtype=contrast.sum_dtype) for _ in range(2))
    for other_queries, other_keys in _iterate_ranks(own, everyone, contrast):
        for total, anchors, candidates in _iterate_directions(
            (pushed_queries, queries), (pushed_keys, keys), other_queries, other_keys, contrast.form
        ):
            if contrast.scale is None:
                total += tiles.online_push(anchors, candidates, contrast.k, contrast.radius_mm)
            else:
                total += _backend(own.queries).push(anchors, candidates, contrast.scale)[0]
    return pushed_queries, pushed_keys


def _iterate_directions(
    queries: tuple[Tensor, Rows], keys: tuple[Tensor, Rows], other_queries: Rows, other_keys: Rows, form: Form
) -> Iterator[tuple[Tensor, Rows, Rows]]:
    """Yield (result, its anchors, candidates of these anchors)."""
    yield *queries, other_keys
    yield *keys, other_queries
    if form == "nt_xent":
        yield *queries, other_queries
        yield *keys, other_keys


def _iterate_ranks(own: _Pairs, everyone: _Pairs | None, contrast: _Contrast) -> Iterator[tuple[Rows, Rows]]:
    """Yield queries and keys of all ranks: all at once, or rank by rank around the ring."""
    if everyone is not None:
        yield everyone.towers(0)
        return
    sent = [tensor for tensor in own.tensors() if tensor is not None]
    for rank, tensors in circulate(sent, contrast.counts, contrast.group):
        arrived = iter(tensors)
        pairs = _Pairs(*(None if tensor is None else next(arrived) for tensor in own.tensors()))  # type: ignore[arg-type]
        yield pairs.towers(contrast.first(rank))


def _gather_pairs(own: _Pairs, contrast: _Contrast) -> _Pairs:
    return _Pairs(
        *(
            None if tensor is None else all_gather_rows(tensor, contrast.counts, contrast.group)
            for tensor in own.tensors()
        )  # type: ignore[arg-type]
    )


def without_kernels(
    dtype: torch.dtype, channels: int, *, temperature: float, num_pairs: int, device: torch.device, allows_tf32: bool
) -> str | None:
    """Return why a loss on a GPU has to use torch tiles, many times slower, and the way out; None if it can use the kernels.

    Args:
        dtype: Type of the embeddings.
        channels: E.
        temperature: Temperature; of a learnt one, the smallest.
        num_pairs: N.
        device: The GPU; for a CPU, the answer is that of an H100.
        allows_tf32: True if products of float32 may be rounded to TF32.
    """
    if find_spec("triton") is None:
        return "the loss has no kernels: Triton is not installed"
    most = sharpest(2 * num_pairs, dtype)
    if 1 / temperature > most:
        return (
            f"the loss has no kernels for a temperature of {temperature} and {num_pairs} pairs, whose sums would overflow or vanish in "
            f"float32: set pretrain.loss.temperature to {math.ceil(1e4 / most) / 1e4} or more"
        )
    from p2r.loss import kernels

    reason = kernels.unfit(dtype, channels, device=device, allows_tf32=allows_tf32)
    return None if reason is None else f"the loss has no kernels for these embeddings: {reason}"


def _backend(rows: Tensor) -> Any:
    """Return the module whose `sums` and `push` support these rows: Triton kernels if possible, otherwise torch tiles."""
    if rows.device.type == "cuda" and find_spec("triton") is not None:
        from p2r.loss import kernels

        if kernels.fit(rows):
            return kernels
    return tiles


def _product_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype for products of rows."""
    return torch.promote_types(rows.dtype, torch.float32) if _backend(rows) is tiles else rows.dtype


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


def number_in(value: float | Tensor) -> float:
    """Return the value of a number or a one-element tensor; NaN for other tensors."""
    if not isinstance(value, Tensor):
        return float(value)
    return float(value.detach()) if value.numel() == 1 else math.nan


def _softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)) without the threshold of F.softplus, which costs float64 half its digits."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _zero_loss(*arguments: Tensor | float) -> Tensor:
    """Return a loss of 0 with zero gradients."""
    return torch.stack([argument.sum() * 0 for argument in arguments if isinstance(argument, Tensor)]).sum()


def _replace_weightless(queries: Tensor, keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace rows of weight 0, which may hold anything, by ones; return a mask of the other rows.

    The rows cannot be dropped: only the device knows their number, and reading it would synchronise.
    """
    is_present = weights > 0
    queries, keys = (torch.where(is_present[:, None], rows, torch.ones_like(rows)) for rows in (queries, keys))
    return queries, keys, is_present.to(torch.uint8)


def _drop_weightless(
    queries: Tensor, keys: Tensor, weights: Tensor, exclude: SameImage | None
) -> tuple[Tensor, Tensor, Tensor, SameImage | None]:
    kept = weights > 0
    if kept.all():
        return queries, keys, weights, exclude
    if exclude is not None:
        position_mm = None if exclude.position_mm is None else exclude.position_mm[kept]
        exclude = SameImage(exclude.image[kept], position_mm, exclude.radius_mm)
    return queries[kept], keys[kept], weights[kept], exclude


def _equal_on_all_ranks(
    queries: Tensor,
    temperature: float,
    form: Form,
    decoupled: bool,
    exclude: SameImage | None,
    exchange: Exchange,
) -> dict[str, float]:
    return {
        "the number of embedding channels": float(queries.shape[1]),
        "bytes per number of the embeddings": float(queries.element_size()),
        "temperature": temperature,
        "form (1: nt_xent)": float(form == "nt_xent"),
        "decoupled": float(decoupled),
        "exchange (1: ring)": float(exchange == "ring"),
        "spatial dimensions of exclude (0: none)": 0.0
        if exclude is None
        else float(1 if exclude.position_mm is None else 1 + exclude.position_mm.shape[1]),
        "exclude.radius_mm": 0.0 if exclude is None else exclude.radius_mm,
    }


def refuse_form_and_temperature(form: str, temperature: float | Tensor, number: float | None) -> None:
    """Raise ValueError for an unknown form, or for a temperature other than one positive number.

    Args:
        form: Candidates of an anchor.
        temperature: The temperature as passed to the loss.
        number: Its value; None if reading it would synchronise with the device.
    """
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")
    if number is not None and not (math.isfinite(number) and number > 0):
        raise ValueError(f"temperature must be positive and finite, got {number}")
    if form not in ("cross_view", "nt_xent"):
        raise ValueError(f"form must be 'cross_view' or 'nt_xent', got {form!r}")


def _refuse_arguments(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    number: float | None,
    form: str,
    weights: Tensor | None,
    exclude: SameImage | None,
    exchange: str,
    findings: Findings | None,
) -> None:
    refuse_form_and_temperature(form, temperature, number)
    if exchange not in ("all_gather", "ring"):
        raise ValueError(f"exchange must be 'all_gather' or 'ring', got {exchange!r}")
    refuse_pair(queries=queries, keys=keys)
    num, device = len(queries), queries.device
    if weights is not None:
        refuse_weights(weights, queries, findings)
    if exclude is None:
        return
    image, position_mm = exclude.image, exclude.position_mm
    if image.shape != (num,) or image.dtype.is_floating_point or image.device != device:
        raise ValueError(
            f"expected exclude.image ({num},) of integers on {device}, got {tuple(image.shape)} of {image.dtype} on {image.device}"
        )
    if not exclude.radius_mm > 0:
        raise ValueError(f"exclude.radius_mm must be positive, got {exclude.radius_mm}")
    if position_mm is None:
        if math.isfinite(exclude.radius_mm):
            raise ValueError("exclude.position_mm is needed for a radius")
        return
    if position_mm.ndim != 2 or len(position_mm) != num or position_mm.device != device:
        raise ValueError(
            f"expected exclude.position_mm ({num}, D) on {device}, got {tuple(position_mm.shape)} on {position_mm.device}"
        )
    bad = ~torch.isfinite(position_mm)
    if postpones(findings, position_mm):
        findings.add("{count} numbers of exclude.position_mm are not finite", bad.sum())
    elif bad.any():
        raise ValueError("exclude.position_mm must be finite")
