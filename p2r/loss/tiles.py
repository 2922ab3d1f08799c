"""Sums over all pairs of rows, tile by tile, in torch: on any device, in memory linear in the number of rows.

The entry for anchor i and candidate j, with cosine similarity s_ij and k = 1 / temperature:

    E_ij = exp(k s_ij - shift), or 0 if j is not a negative of i

`shift` is the same for all entries, chosen such that no sum overflows and no entry underflows (`static_shift`). So rows and
columns of a tile can be summed at once, where a running maximum would allow only one of them. Temperatures without such a
shift use the `online` functions, which keep a maximum per row.

Tiles depend only on the given rows: the same rows give the same arithmetic on every rank.

Shape letters: n anchors, m candidates, E channels, P panels, D spatial dimensions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from p2r.device import is_waited_for

TILE = 1024
"""Number of anchors and of candidates in a tile: its product runs at full speed, and needs only 4 MiB of float32."""
PANELS = 64
"""Approximate maximum number of groups of tiles with separate column sums; ranks exchange m numbers per group."""


@dataclass(frozen=True)
class Rows:
    """Unit embeddings of one view, and the data that determine their negatives."""

    values: Tensor
    """(n, E) unit rows."""
    first: int
    """Index of the first row's pixel pair among all ranks. Rows of the same pair are not negatives of each other."""
    image: Tensor | None = None
    """(n,) integers: the image of each row. None: only rows of the same pair are excluded."""
    position_mm: Tensor | None = None
    """(n, D) position of each row. None: all rows of an image are excluded from each other's negatives."""
    weight: Tensor | None = None
    """(n,) weight of a row's entries in `push`; for `online_push`, its negative logarithm."""
    present: Tensor | None = None
    """(n,) uint8: 0 for a row without negatives that is also never a negative. None: all rows are present."""

    def __len__(self) -> int:
        return len(self.values)

    def part(self, rows: slice) -> "Rows":
        """Return some of the rows, which keep their numbers."""
        image, position_mm, weight, present = (
            None if part is None else part[rows] for part in (self.image, self.position_mm, self.weight, self.present)
        )
        return Rows(self.values[rows], self.first + rows.start, image, position_mm, weight, present)


@dataclass(frozen=True)
class Scale:
    """Parameters that turn similarities into entries. For a learnt temperature, `k` and `shift` are scalars on the rows' device."""

    k: float | Tensor
    """1 / temperature."""
    radius_mm: float = math.inf
    """Rows of one image within this distance are not negatives of each other."""
    shift: float | Tensor = 0.0


_Number = TypeVar("_Number", float, Tensor)
_MAX_SIMILARITY = 1.01
"""Largest similarity: the norm of rows rounded to bfloat16 differs slightly from 1."""


def static_shift(k: float, num_candidates: int, dtype: torch.dtype) -> float | None:
    """Return a shift that keeps every sum of `num_candidates` entries in the range of `dtype`; None if none exists."""
    return None if k > sharpest(num_candidates, dtype) else max(0.0, _overflow_excess(k, num_candidates, dtype))


def static_shift_on_device(k: Tensor, num_candidates: int, dtype: torch.dtype) -> Tensor:
    """Compute `static_shift` for a scalar on a device without reading it; `k` must not exceed `sharpest`."""
    return _overflow_excess(k, num_candidates, dtype).clamp(min=0)


def sharpest(num_candidates: int, dtype: torch.dtype) -> float:
    """Return the largest k with a static shift, for which no sum overflows and no entry underflows."""
    largest, smallest = _log_limits(dtype)
    return min(-smallest, (largest - smallest - math.log(num_candidates)) / 2) / _MAX_SIMILARITY


def _overflow_excess(k: _Number, num_candidates: int, dtype: torch.dtype) -> _Number:
    """Return the log of the largest possible sum minus the log of the largest number."""
    return _MAX_SIMILARITY * k + (math.log(num_candidates) - _log_limits(dtype)[0])


def _log_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Return the log of the largest number, with a margin, and of the smallest positive number, in the type of sums."""
    limits = torch.finfo(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
    return math.log(limits.max) - 1, math.log(limits.tiny)


def sums(anchors: Rows, candidates: Rows, scale: Scale, *, of_columns: bool) -> tuple[Tensor, Tensor | None]:
    """Sum entries over candidates and, from the same tiles, over anchors.

    Returns:
        (n,) sums over candidates; and with `of_columns`, (P, m) sums over each panel of anchors.
    """
    panel = _panel_size(len(anchors))
    over_candidates = anchors.values.new_zeros(len(anchors))
    over_anchors = anchors.values.new_zeros(num_panels(len(anchors)), len(candidates)) if of_columns else None
    for rows, columns, entries in _compute_entries(anchors, candidates, scale):
        over_candidates[rows] += entries.sum(1)
        if over_anchors is not None:
            over_anchors[rows.start // panel, columns] += entries.sum(0)
    return over_candidates, over_anchors


def num_panels(num_anchors: int) -> int:
    """Return P, the number of groups of anchors with separate column sums."""
    return math.ceil(num_anchors / _panel_size(num_anchors))


def _panel_size(num_anchors: int) -> int:
    return TILE * max(1, math.ceil(num_anchors / (TILE * PANELS)))


def push(
    anchors: Rows, candidates: Rows, scale: Scale, *, to_anchors: bool = True, to_candidates: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum each row's negatives, weighted by W_ij = E_ij (weight_i + weight_j).

    Both directions together share the tiles, and are bitwise equal to separate calls.

    Returns:
        `W @ candidates` (n, E) if `to_anchors`, and `W.T @ anchors` (m, E) if `to_candidates`; otherwise zeros.
    """
    assert anchors.weight is not None and candidates.weight is not None
    moved_anchors, moved_candidates = torch.zeros_like(anchors.values), torch.zeros_like(candidates.values)
    weights = _Scratch(anchors.values)
    for rows, columns, entries in _compute_entries(anchors, candidates, scale):
        weight = weights.tile(*entries.shape)
        torch.add(anchors.weight[rows, None], candidates.weight[columns], out=weight)
        entries.mul_(weight)
        if to_anchors:
            moved_anchors[rows].addmm_(entries, candidates.values[columns])
        if to_candidates:
            moved_candidates[columns].addmm_(entries.T, anchors.values[rows])
    return moved_anchors, moved_candidates


def online_log_sums(anchors: Rows, candidates: Rows, k: float | Tensor, radius_mm: float) -> Tensor:
    """Return the log of each anchor's sum of exp(k s_ij), (n,): -inf for an anchor without negatives."""
    result = anchors.values.new_full((len(anchors),), -math.inf)
    for rows, _, logits in _compute_logits(anchors, candidates, k, radius_mm):
        result[rows] = torch.logaddexp(result[rows], logits.logsumexp(1))
    return result


def online_push(anchors: Rows, candidates: Rows, k: float | Tensor, radius_mm: float) -> Tensor:
    """Compute `push` for anchors from the weights' negative logarithms, such that products with entries are at most 1."""
    assert anchors.weight is not None and candidates.weight is not None
    moved = torch.zeros_like(anchors.values)
    for rows, columns, logits in _compute_logits(anchors, candidates, k, radius_mm):
        weight = (logits - anchors.weight[rows, None]).exp_()
        weight += logits.sub_(candidates.weight[columns]).exp_()
        moved[rows].addmm_(weight, candidates.values[columns])
    return moved


def _compute_entries(anchors: Rows, candidates: Rows, scale: Scale) -> Iterator[tuple[slice, slice, Tensor]]:
    for rows, columns, tile in _compute_logits(anchors, candidates, scale.k, scale.radius_mm):
        is_shifted = isinstance(scale.shift, Tensor) or scale.shift != 0
        yield rows, columns, (tile.sub_(scale.shift) if is_shifted else tile).exp_()


def _compute_logits(
    anchors: Rows, candidates: Rows, k: float | Tensor, radius_mm: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield tiles of k s_ij, -inf where j is not a negative of i. Each tile overwrites the memory of the previous one."""
    scratch = _Scratch(anchors.values)
    images = _ImageRanges(anchors, candidates)
    for rows in blocks(len(anchors), TILE):
        sharpened = k * anchors.values[rows]
        for columns in blocks(len(candidates), TILE):
            tile = scratch.tile(rows.stop - rows.start, columns.stop - columns.start)
            torch.mm(sharpened, candidates.values[columns].T, out=tile)
            diagonal = anchors.first + rows.start - candidates.first - columns.start
            if -tile.shape[0] < diagonal < tile.shape[1]:
                tile.diagonal(diagonal).fill_(-math.inf)
            if images.may_overlap(rows, columns):
                tile.masked_fill_(_mark_near_rows(anchors, candidates, rows, columns, radius_mm), -math.inf)
            if anchors.present is not None and candidates.present is not None:
                tile.masked_fill_((anchors.present[rows, None] & candidates.present[columns]) == 0, -math.inf)
            yield rows, columns, tile


def _mark_near_rows(anchors: Rows, candidates: Rows, rows: slice, columns: slice, radius_mm: float) -> Tensor:
    assert anchors.image is not None and candidates.image is not None
    near = anchors.image[rows, None] == candidates.image[columns]
    if anchors.position_mm is not None and candidates.position_mm is not None and math.isfinite(radius_mm):
        squared = torch.zeros_like(near, dtype=anchors.position_mm.dtype)
        for anchor_place, candidate_place in zip(
            anchors.position_mm[rows].unbind(1), candidates.position_mm[columns].unbind(1), strict=True
        ):
            squared += (anchor_place[:, None] - candidate_place).square_()
        near &= squared <= radius_mm**2
    return near


class _ImageRanges:
    """Smallest and largest image number of every block; blocks with disjoint ranges have no image in common.

    Rows come image by image, so two comparisons decide for nearly all tiles. On CUDA reading the numbers would synchronise,
    so all tiles count as overlapping.
    """

    def __init__(self, anchors: Rows, candidates: Rows) -> None:
        self._masks = anchors.image is not None
        self._ranges: tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]] | None = None
        if anchors.image is not None and candidates.image is not None and not is_waited_for(anchors.image.device):
            self._ranges = (_image_range_per_block(anchors.image, TILE), _image_range_per_block(candidates.image, TILE))

    def may_overlap(self, rows: slice, columns: slice) -> bool:
        if self._ranges is None:
            return self._masks
        (low, high), (other_low, other_high) = self._ranges[0][rows.start], self._ranges[1][columns.start]
        return low <= other_high and other_low <= high


def _image_range_per_block(image: Tensor, block: int) -> dict[int, tuple[int, int]]:
    return {rows.start: (int(image[rows].min()), int(image[rows].max())) for rows in blocks(len(image), block)}


class _Scratch:
    """Memory of one tile, reused by the next, because allocating it again costs more than filling it."""

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(TILE**2)

    def tile(self, height: int, width: int) -> Tensor:
        return self._memory[: height * width].view(height, width)


def blocks(length: int, block: int) -> Iterator[slice]:
    """Yield slices that cover `length` in steps of `block`."""
    return (slice(start, min(start + block, length)) for start in range(0, length, block))
