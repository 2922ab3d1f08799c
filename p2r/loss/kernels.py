"""The sums of `tiles`, as Triton kernels: for CUDA devices, and in Triton's interpreter on a CPU.

One program holds a block of anchors and streams the candidates past it, as the forward pass of attention does. Nothing
is added atomically: what programs share is written apart and added up in a fixed order, so two runs agree to the bit.

Rows are multiplied in their own dtype (float32: as `torch.set_float32_matmul_precision` says), sums are float32. Weights
of bfloat16 rows are rounded to bfloat16, those of float16 rows are not: they would vanish in its range.

Shape letters: n anchors, m candidates, E channels (a power of two), D spatial dimensions.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from p2r.loss.tiles import Rows, Scale, blocks

CHANNELS = (16, 32, 64, 128, 256, 512)
"""E that the kernels are written for; others take the torch tiles."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PANEL = 16384
"""Anchors whose column sums are kept apart at a time: m numbers for each block of them."""
_SPLIT = 8192
"""Candidates of one program of `sums`; a function of m alone, so that every rank adds up in the same order."""
_LOG2_E = math.log2(math.e)


def fit(rows: Tensor) -> bool:
    """Return whether the kernels are written for these rows."""
    return rows.dtype in _DTYPES and rows.shape[1] in CHANNELS


def sums(anchors: Rows, candidates: Rows, scale: Scale, *, of_columns: bool) -> tuple[Tensor, Tensor]:
    """See `tiles.sums`."""
    n, m, device = len(anchors), len(candidates), anchors.values.device
    launch = _Launch(anchors, candidates, scale)
    splits = max(1, math.ceil(m / _SPLIT))
    over_candidates = torch.zeros(splits, n, device=device)
    panels = list(blocks(n, _PANEL))
    over_anchors = torch.zeros(len(panels) if of_columns else 0, m, device=device)
    for panel, rows in enumerate(panels):
        num_blocks = math.ceil((rows.stop - rows.start) / launch.block_anchors)
        partial = torch.empty(num_blocks if of_columns else 0, m, device=device)
        if m:
            _sums_kernel[(num_blocks, splits)](
                *launch.arguments,
                over_candidates,
                partial,
                rows.start,
                SPLIT=_SPLIT,
                OF_COLUMNS=of_columns,
                **launch.options,
            )
        if of_columns:
            over_anchors[panel] = partial.sum(0)
    return over_candidates.sum(0), over_anchors


def num_panels(num_anchors: int) -> int:
    """See `tiles.num_panels`."""
    return math.ceil(num_anchors / _PANEL)


def push(
    anchors: Rows, candidates: Rows, scale: Scale, *, to_anchors: bool = True, to_candidates: bool = False
) -> tuple[Tensor, Tensor]:
    """See `tiles.push`; two directions are two launches, for sharing a tile would take atomic additions."""
    return (
        _push(anchors, candidates, scale) if to_anchors else torch.zeros_like(anchors.values, dtype=torch.float32),
        _push(candidates, anchors, scale)
        if to_candidates
        else torch.zeros_like(candidates.values, dtype=torch.float32),
    )


def _push(anchors: Rows, candidates: Rows, scale: Scale) -> Tensor:
    assert anchors.weight is not None and candidates.weight is not None
    moved = torch.zeros_like(anchors.values, dtype=torch.float32)
    launch = _Launch(anchors, candidates, scale)
    if len(anchors) and len(candidates):
        grid = (math.ceil(len(anchors) / launch.block_anchors),)
        _push_kernel[grid](
            *launch.arguments, anchors.weight.contiguous(), candidates.weight.contiguous(), moved, **launch.options
        )
    return moved


class _Launch:
    """Arguments that both kernels take, and tiles that fit E: accumulator in registers, two or three tiles in flight."""

    def __init__(self, anchors: Rows, candidates: Rows, scale: Scale) -> None:
        channels = anchors.values.shape[1]
        wide = anchors.values.dtype == torch.float32
        self.block_anchors = 64 if channels > 256 else 128
        block_candidates = (128 if channels <= 128 else 64) // (2 if wide else 1)
        has_image = anchors.image is not None and candidates.image is not None
        dimensions = 0
        if has_image and anchors.position_mm is not None and candidates.position_mm is not None:
            dimensions = anchors.position_mm.shape[1]
        has_present = anchors.present is not None and candidates.present is not None
        nothing = anchors.values
        anchors, candidates = (
            replace(
                rows,
                values=rows.values.contiguous(),
                image=rows.image.contiguous() if rows.image is not None else nothing,
                position_mm=rows.position_mm.float().contiguous() if rows.position_mm is not None else nothing,
                present=rows.present.contiguous() if rows.present is not None else nothing,
            )
            for rows in (anchors, candidates)
        )
        self.arguments: tuple[Any, ...] = (
            anchors.values,
            candidates.values,
            anchors.image,
            candidates.image,
            anchors.position_mm,
            candidates.position_mm,
            anchors.present,
            candidates.present,
            len(anchors),
            len(candidates),
            anchors.first - candidates.first,
            scale.k * _LOG2_E,
            scale.shift * _LOG2_E,
            min(scale.radius_mm**2, 3e38),
        )
        self.options: dict[str, Any] = {
            "E": channels,
            "D": dimensions,
            "HAS_IMAGE": has_image,
            "HAS_PRESENT": has_present,
            "BLOCK_A": self.block_anchors,
            "BLOCK_C": block_candidates,
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "num_warps": 8,
            "num_stages": 3 if channels <= 128 and not wide else 2,
        }


@triton.jit
def _entries(
    anchor,
    image_anchor,
    is_anchor,
    rows,
    columns,
    candidate,
    image_c,
    position_a,
    position_c,
    present_c,
    n,
    m,
    offset,
    k_log2,
    shift_log2,
    radius_squared,
    D: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_PRESENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of exp(k s_ij - shift), 0 where j is no negative of i or one of them lies outside."""
    logits = tl.dot(anchor, tl.trans(candidate), input_precision=PRECISION)
    entries = tl.exp2(logits * k_log2 - shift_log2)
    is_candidate = columns < m
    if HAS_PRESENT:
        is_candidate = tl.load(present_c + columns, mask=columns < m, other=0) != 0
    excluded = (rows[:, None] + offset == columns[None, :]) | ~is_anchor[:, None] | ~is_candidate[None, :]
    if HAS_IMAGE:
        near = image_anchor[:, None] == tl.load(image_c + columns, mask=columns < m, other=-1)[None, :]
        if D > 0:
            squared = tl.zeros(entries.shape, tl.float32)
            for d in tl.static_range(D):
                of_anchor = tl.load(position_a + rows * D + d, mask=rows < n, other=0.0)
                of_candidate = tl.load(position_c + columns * D + d, mask=columns < m, other=0.0)
                difference = of_anchor[:, None] - of_candidate[None, :]
                squared += difference * difference
            near = near & (squared <= radius_squared)
        excluded = excluded | near
    return tl.where(excluded, 0.0, entries)


@triton.jit
def _sums_kernel(
    anchors,
    candidates,
    image_a,
    image_c,
    position_a,
    position_c,
    present_a,
    present_c,
    n,
    m,
    offset,
    k_log2,
    shift_log2,
    radius_squared,
    over_candidates,
    partial,
    first_row,
    SPLIT: tl.constexpr,
    OF_COLUMNS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_PRESENT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of a block of anchors over a split of candidates, and of each of these candidates over the block."""
    block, split = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, E)
    rows = first_row + block * BLOCK_A + tl.arange(0, BLOCK_A)
    anchor = tl.load(anchors + rows.to(tl.int64)[:, None] * E + channels[None, :], mask=rows[:, None] < n, other=0.0)
    image_anchor = rows
    if HAS_IMAGE:
        image_anchor = tl.load(image_a + rows, mask=rows < n, other=-2)
    is_anchor = rows < n
    if HAS_PRESENT:
        is_anchor = tl.load(present_a + rows, mask=rows < n, other=0) != 0
    total = tl.zeros([BLOCK_A], tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, m), BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = columns[:, None] < m
        candidate = tl.load(candidates + columns.to(tl.int64)[:, None] * E + channels[None, :], mask=inside, other=0.0)
        entries = _entries(
            anchor, image_anchor, is_anchor, rows, columns, candidate, image_c, position_a, position_c, present_c,
            n, m, offset, k_log2, shift_log2, radius_squared, D, HAS_IMAGE, HAS_PRESENT, PRECISION,
        )  # fmt: skip
        total += tl.sum(entries, 1)
        if OF_COLUMNS:
            tl.store(partial + block.to(tl.int64) * m + columns, tl.sum(entries, 0), mask=columns < m)
    tl.store(over_candidates + split.to(tl.int64) * n + rows, total, mask=rows < n)


@triton.jit
def _push_kernel(
    anchors,
    candidates,
    image_a,
    image_c,
    position_a,
    position_c,
    present_a,
    present_c,
    n,
    m,
    offset,
    k_log2,
    shift_log2,
    radius_squared,
    weight_a,
    weight_c,
    moved,
    E: tl.constexpr,
    D: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    HAS_PRESENT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weighted sum of all candidates, for a block of anchors."""
    channels = tl.arange(0, E)
    rows = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    at = rows.to(tl.int64)[:, None] * E + channels[None, :]
    anchor = tl.load(anchors + at, mask=rows[:, None] < n, other=0.0)
    of_anchor = tl.load(weight_a + rows, mask=rows < n, other=0.0)
    image_anchor = rows
    if HAS_IMAGE:
        image_anchor = tl.load(image_a + rows, mask=rows < n, other=-2)
    is_anchor = rows < n
    if HAS_PRESENT:
        is_anchor = tl.load(present_a + rows, mask=rows < n, other=0) != 0
    total = tl.zeros([BLOCK_A, E], tl.float32)
    for start in range(0, m, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = columns[:, None] < m
        candidate = tl.load(candidates + columns.to(tl.int64)[:, None] * E + channels[None, :], mask=inside, other=0.0)
        of_candidate = tl.load(weight_c + columns, mask=columns < m, other=0.0)
        entries = _entries(
            anchor, image_anchor, is_anchor, rows, columns, candidate, image_c, position_a, position_c, present_c,
            n, m, offset, k_log2, shift_log2, radius_squared, D, HAS_IMAGE, HAS_PRESENT, PRECISION,
        )  # fmt: skip
        weights = entries * (of_anchor[:, None] + of_candidate[None, :])
        if candidate.dtype == tl.bfloat16:
            total = tl.dot(weights.to(tl.bfloat16), candidate, total)
        else:
            total = tl.dot(weights, candidate.to(tl.float32), total, input_precision=PRECISION)
    tl.store(moved + at, total, mask=rows[:, None] < n)
