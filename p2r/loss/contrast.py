"""Own pixel pairs against the pairs of all ranks: log-sums of their similarities, and the sums of the backward pass.

Panels of a tower, directions and ranks are iterated here; the sums of two blocks of rows are in `p2r.loss.tiles` and
`p2r.loss.kernels`.

Shape letters: as in `p2r.loss.info_nce`; m pairs of some ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from p2r.loss import backends, tiles
from p2r.loss.ranks import Findings, all_gather_rows, circulate, own_columns, rank_and_size
from p2r.loss.tiles import Rows, Scale

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


@dataclass(frozen=True)
class Contrast:
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
        """N, the pairs of all ranks."""
        return sum(self.counts)

    def first(self, rank: int) -> int:
        """Return the index of a rank's first pair among all pairs."""
        return sum(self.counts[:rank])

    @property
    def own_first(self) -> int:
        """Index of this rank's first pair among all pairs."""
        return self.first(rank_and_size(self.group)[0])

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type of the sums: float32 or better."""
        return torch.promote_types(self.product_dtype, torch.float32)

    @property
    def metadata(self) -> tuple[Tensor | None, Tensor | None]:
        """The parts of `exclude` for tiles: images, and positions if there is a radius."""
        if self.exclude is None:
            return None, None
        return self.exclude.image, self.exclude.position_mm if math.isfinite(self.exclude.radius_mm) else None

    @property
    def radius_mm(self) -> float:
        """Distance of `exclude`; infinite without one."""
        return math.inf if self.exclude is None else self.exclude.radius_mm

    @property
    def by_rows(self) -> bool:
        """Compute each direction separately, because rows arrive one rank at a time, or need a maximum each."""
        return self.exchange == "ring" or self.scale is None


@dataclass(frozen=True)
class Pairs:
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
        """Return the fields, in their order."""
        return self.queries, self.keys, self.image, self.position_mm, self.present, self.softmax

    def towers(self, first: int) -> tuple[Rows, Rows]:
        """Return queries and keys, numbered from `first`."""
        query_weights, key_weights = (None, None) if self.softmax is None else self.softmax.T.contiguous()
        return (
            Rows(self.queries, first, self.image, self.position_mm, query_weights, self.present),
            Rows(self.keys, first, self.image, self.position_mm, key_weights, self.present),
        )


def gather_pairs(own: Pairs, contrast: Contrast) -> Pairs:
    """Return the pairs of all ranks, in the order of the ranks."""
    return Pairs(
        *(
            None if tensor is None else all_gather_rows(tensor, contrast.counts, contrast.group)
            for tensor in own.tensors()
        )  # type: ignore[arg-type]
    )


def compute_log_sums(own: Pairs, everyone: Pairs | None, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each own query's and key's logits over its negatives, (n,) twice.

    Args:
        own: This rank's pairs.
        everyone: The pairs of all ranks; None: they arrive around the ring.
        contrast: Settings of the call.
    """
    compute = _compute_log_sums_by_rows if contrast.by_rows else _compute_log_sums_both_ways
    return compute(own, everyone, contrast)


def push_rows(own: Pairs, everyone: Pairs | None, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Sum each own row's negatives, weighted by their probability in its softmax plus its probability in theirs: (n, E) twice."""
    push = _push_by_rows if contrast.by_rows else _push_both_ways
    return push(own, everyone, contrast)


def _compute_log_sums_both_ways(own: Pairs, everyone: Pairs | None, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Compute the log-sums of both directions from one product."""
    assert everyone is not None and contrast.scale is not None
    (queries, keys), (all_queries, all_keys) = own.towers(contrast.own_first), everyone.towers(0)
    scale, backend = contrast.scale, backends.choose_backend(own.queries)
    sums = backend.sums
    query_sums, column_sums = sums(queries, all_keys, scale, of_columns=True)
    panels = [backend.num_panels(count) for count in contrast.counts]
    key_sums = own_columns(column_sums, contrast.counts, panels, contrast.group)
    if contrast.form == "nt_xent":
        query_sums += _sums_within_tower(queries, all_queries, contrast)
        key_sums += _sums_within_tower(keys, all_keys, contrast)
    return query_sums.log() + scale.shift, key_sums.log() + scale.shift


def _sums_within_tower(own: Rows, everyone: Rows, contrast: Contrast) -> Tensor:
    """Return the sums over all rows of a tower for own rows, (n,). The matrix is symmetric, so each pair of panels is computed once.

    Panels are in a ring. Each computes its similarities with the following half of the ring, so that ranks share the work
    evenly; column sums supply the other half. Ranks whose rows do not divide into whole panels compute everything.
    """
    assert contrast.scale is not None
    backend, scale = backends.choose_backend(own.values), contrast.scale
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


def _compute_log_sums_by_rows(own: Pairs, everyone: Pairs | None, contrast: Contrast) -> tuple[Tensor, Tensor]:
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
                sums, _ = backends.choose_backend(own.queries).sums(
                    anchors, candidates, contrast.scale, of_columns=False
                )
                log_sums = sums.log() + contrast.scale.shift
            torch.logaddexp(total, log_sums, out=total)
    return query_sums, key_sums


def _push_both_ways(own: Pairs, everyone: Pairs | None, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Compute both directions from one product."""
    assert everyone is not None and contrast.scale is not None
    (queries, keys), (all_queries, all_keys) = own.towers(contrast.own_first), everyone.towers(0)
    scale, push = contrast.scale, backends.choose_backend(own.queries).push
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


def _push_by_rows(own: Pairs, everyone: Pairs | None, contrast: Contrast) -> tuple[Tensor, Tensor]:
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
                total += backends.choose_backend(own.queries).push(anchors, candidates, contrast.scale)[0]
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


def _iterate_ranks(own: Pairs, everyone: Pairs | None, contrast: Contrast) -> Iterator[tuple[Rows, Rows]]:
    """Yield queries and keys of all ranks: all at once, or rank by rank around the ring."""
    if everyone is not None:
        yield everyone.towers(0)
        return
    sent = [tensor for tensor in own.tensors() if tensor is not None]
    for rank, tensors in circulate(sent, contrast.counts, contrast.group):
        arrived = iter(tensors)
        pairs = Pairs(*(None if tensor is None else next(arrived) for tensor in own.tensors()))  # type: ignore[arg-type]
        yield pairs.towers(contrast.first(rank))
