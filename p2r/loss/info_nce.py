r"""Embeddings of N pixel pairs -> InfoNCE over all pairs of all ranks, exact, in memory linear in N.

Each embedding must find its partner among all candidates by cosine similarity s, sharpened by k = 1 / temperature:

    cross_view  candidates of a query are all keys, and of a key all queries (N x N), mean over both directions
    nt_xent     candidates are all 2N embeddings but itself (SimCLR's form, which Pix2Rep uses)

The loss of one anchor is written over its negatives only, `softplus(lse_j(k s_ij) - k s_positive)`: as training
converges, the usual `lse - k s_positive` loses all its digits, and its gradient with them.

Similarities are computed tile by tile and never stored; the backward pass computes them again. Both forms share one
gradient, for s is symmetric between anchors and candidates:

    d loss / d z_i = k / 2N * ( sum over negatives j of (exp(k s_ij - l_i) + exp(k s_ij - l_j)) z_j
                                - (sigmoid(x_i) + sigmoid(x_partner)) z_partner )

with x_i the softplus's argument, and l_i = k s_positive + softplus(x_i) the log-sum-exp over all candidates of i.

Ranks gather embeddings and log-sums in the forward pass; each then has all it needs for its own rows' gradient, and
the backward pass does not communicate. Tiles follow a rank's own rows: where their number is a multiple of the tile,
every rank does the same arithmetic as one process would.

Source: van den Oord et al. 2018, arXiv:1807.03748; Chen et al. 2020 (SimCLR), eq. 1, arXiv:2002.05709.

Shape letters: N pixel pairs of all ranks, n of this rank, E embedding channels, M candidates (N or 2N).
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from p2r.loss.ranks import GradientScale, all_gather_rows, check_equal_rows, own_gradient_factor, rank_and_size

_TILE = 512
"""Rows of a tile; 512 x 1024 float32 stay in a core's cache."""

Form = Literal["cross_view", "nt_xent"]


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float,
    form: Form = "cross_view",
    group: ProcessGroup | None = None,
    gradient_scale: GradientScale = "mean",
) -> Tensor:
    """Contrast every pixel pair with all others.

    Args:
        queries: (n, E) embeddings of pixels in view a; any length, normalised inside, in float32 or better.
        keys: (n, E) embeddings of the same places in view b.
        temperature: Width of the softmax over cosine similarities, > 0.
        form: Which candidates an anchor has, see the module.
        group: Ranks whose pairs are contrasted together.
        gradient_scale: What the caller's reducer does with the ranks' gradients.

    Returns:
        Scalar, nats: the loss of all ranks' pairs together, the same on every rank.

    Raises:
        ValueError: Shapes differ, between queries and keys or between ranks, or temperature is not positive and finite.
    """
    if queries.ndim != 2 or queries.shape != keys.shape or len(queries) == 0:
        raise ValueError(f"want queries and keys (N, E) with N > 0, got {tuple(queries.shape)} and {tuple(keys.shape)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if form not in ("cross_view", "nt_xent"):
        raise ValueError(f"form must be 'cross_view' or 'nt_xent', got {form!r}")
    factor = own_gradient_factor(gradient_scale, group)
    check_equal_rows(queries, group)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    queries, keys = F.normalize(queries.to(dtype), dim=1), F.normalize(keys.to(dtype), dim=1)
    loss: Tensor = _InfoNCE.apply(queries, keys, 1 / temperature, form, group, factor)  # type: ignore[no-untyped-call]
    return loss


class _InfoNCE(torch.autograd.Function):
    """Unit rows of this rank -> the loss of all ranks; backward gives this rank's rows' gradient times `factor`."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, k: float, form: Form, group: ProcessGroup | None, factor: float
    ) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            first_row = rank_and_size(group)[0] * len(queries)
            all_queries, all_keys = all_gather_rows(queries, group), all_gather_rows(keys, group)
            num_pairs = len(all_queries)
            if form == "cross_view":
                query_candidates, key_candidates = all_keys, all_queries
                excluded: tuple[int, ...] = (first_row,)  # the partner
            else:
                query_candidates = key_candidates = torch.cat((all_queries, all_keys))
                excluded = (first_row, first_row + num_pairs)  # itself and the partner, in either order
            positive = k * (queries * keys).sum(1)
            x_queries = _log_sum(queries, query_candidates, k, excluded) - positive
            x_keys = _log_sum(keys, key_candidates, k, excluded) - positive
            losses = torch.stack((_softplus(x_queries), _softplus(x_keys)), 1)  # (n, 2)
            log_sums = positive[:, None] + losses
            all_losses, all_log_sums = all_gather_rows(losses, group), all_gather_rows(log_sums, group)
            if form == "cross_view":
                query_log_sums, key_log_sums = all_log_sums[:, 1], all_log_sums[:, 0]
            else:
                query_log_sums = key_log_sums = all_log_sums.T.flatten()
        pull_of_partner = torch.sigmoid(x_queries) + torch.sigmoid(x_keys)
        ctx.save_for_backward(
            queries, keys, query_candidates, key_candidates, log_sums, query_log_sums, key_log_sums, pull_of_partner
        )
        ctx.k, ctx.excluded, ctx.scale = k, excluded, factor * k / (2 * num_pairs)
        return all_losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, query_candidates, key_candidates, log_sums, query_log_sums, key_log_sums, partner = (
            ctx.saved_tensors
        )
        with torch.autocast(queries.device.type, enabled=False):
            of_queries = _push(queries, log_sums[:, 0], query_candidates, query_log_sums, ctx.k, ctx.excluded)
            of_keys = _push(keys, log_sums[:, 1], key_candidates, key_log_sums, ctx.k, ctx.excluded)
            of_queries.addcmul_(partner[:, None], keys, value=-1)
            of_keys.addcmul_(partner[:, None], queries, value=-1)
        scale = gradient * ctx.scale
        return of_queries.mul_(scale), of_keys.mul_(scale), None, None, None, None


def _log_sum(anchors: Tensor, candidates: Tensor, k: float, excluded: tuple[int, ...]) -> Tensor:
    """Log-sum-exp of each anchor's logits over its negatives: (n, E), (M, E) -> (n,); -inf where it has none."""
    result = torch.empty_like(anchors[:, 0])
    for rows in _blocks(len(anchors), _TILE):
        parts = [
            _logits(anchors, candidates, k, excluded, rows, columns).logsumexp(1)
            for columns in _blocks(len(candidates), 2 * _TILE)
        ]
        result[rows] = torch.stack(parts).logsumexp(0)
    return result


def _push(
    anchors: Tensor,
    log_sums: Tensor,
    candidates: Tensor,
    candidate_log_sums: Tensor,
    k: float,
    excluded: tuple[int, ...],
) -> Tensor:
    """Sum each anchor's negatives, weighted by their share in its own softmax and its share in theirs: -> (n, E)."""
    result = torch.zeros_like(anchors)
    for rows in _blocks(len(anchors), _TILE):
        for columns in _blocks(len(candidates), 2 * _TILE):
            logits = _logits(anchors, candidates, k, excluded, rows, columns)
            weight = (logits - log_sums[rows, None]).exp_()
            weight += logits.sub_(candidate_log_sums[columns]).exp_()
            result[rows].addmm_(weight, candidates[columns])
    return result


def _logits(
    anchors: Tensor, candidates: Tensor, k: float, excluded: tuple[int, ...], rows: slice, columns: slice
) -> Tensor:
    """One tile of k s_ij, -inf where candidate j is anchor i plus one of the `excluded` offsets."""
    tile = (k * anchors[rows]) @ candidates[columns].T
    height, width = tile.shape
    for offset in excluded:
        diagonal = rows.start + offset - columns.start
        if -height < diagonal < width:
            tile.diagonal(diagonal).fill_(-math.inf)
    return tile


def _blocks(length: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without the threshold of F.softplus, which costs float64 half its digits."""
    return torch.logaddexp(x, torch.zeros_like(x))
