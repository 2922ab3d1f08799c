"""The sums of `tiles` as Triton kernels, for CUDA devices, and for Triton's interpreter on a CPU.

Each program holds a block of anchors and streams the candidates, like the forward pass of attention. There are no atomic
additions: programs write partial results to separate memory, which is summed in a fixed order, so runs are bitwise
reproducible.

Nearly all tiles contain only negatives. The other tiles need masks, and have a separate loop: those on the diagonal, those
whose rows have an image in common, and the last tile if incomplete. Elsewhere, excluded candidates cost nothing: in `sums`
their shift is infinite, in `push` their rows are zero.

Rows are multiplied in their own dtype (float32, and the second product of float16, as TF32); sums are float32. Weights of
bfloat16 rows are rounded to bfloat16. Weights of float16 rows would underflow in float16, and are rounded to TF32.

Shape letters: n anchors, m candidates, E channels (a power of two), D spatial dimensions.
"""

import math
import os
import shutil
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from p2r.loss import kernel_tiles
from p2r.loss.kernel_tiles import CHANNELS, PUSH_TILES, SUMS_TILES, Tile
from p2r.loss.tiles import Rows, Scale, blocks

_PANEL = 16384
"""Number of anchors whose column sums are kept separately at a time: m numbers for each block of anchors."""
_SPLIT = 8192
"""Candidates per program of `sums`; depends only on m, so that every rank sums in the same order."""
_PUSH_SPLIT = 16384
"""Minimum number of candidates per program of `push`; depends only on m for the same reason."""
_MAX_PUSH_SPLITS = 8
_PARTIAL_BYTES = 2**28
"""Memory limit for partial sums of `push`; larger problems take several launches."""
_MIN_CAPABILITY = (8, 0)
_LOG2_E = math.log2(math.e)


def fit(rows: Tensor) -> bool:
    """Return whether the kernels support these rows."""
    allows_tf32 = torch.get_float32_matmul_precision() != "highest"
    return unfit(rows.dtype, rows.shape[1], device=rows.device, allows_tf32=allows_tf32) is None


def unfit(dtype: torch.dtype, channels: int, *, device: torch.device, allows_tf32: bool) -> str | None:
    """Return why the kernels do not support these rows on this device, and the way out; None if they do."""
    if dtype not in CHANNELS:
        return f"they multiply bfloat16, float16 or TF32, got {dtype}: set pretrain.precision to bf16 or tf32"
    if dtype == torch.float32 and not allows_tf32:
        return "they multiply float32 as TF32, which is not allowed: set pretrain.precision to bf16 or tf32"
    if channels not in CHANNELS[dtype]:
        known = ", ".join(map(str, CHANNELS[dtype]))
        return f"they support {dtype} of {known} channels, got {channels}: set pretrain.model.embedding_channels"
    if device.type == "cuda" and not _has_compiler():
        return "Triton finds no C compiler: install gcc or clang, or name one in CC"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else _MIN_CAPABILITY
    if capability < _MIN_CAPABILITY:
        return f"they need a GPU of compute capability 8.0 or newer, this one has {'.'.join(map(str, capability))}"
    limit, descriptors = kernel_tiles.shared_limit(device), kernel_tiles.has_descriptors(device)
    if not all(
        kernel_tiles.fitting_tiles(table, dtype, channels, limit, has_image=True, descriptors=descriptors)
        for table in (SUMS_TILES, PUSH_TILES)
    ):
        return f"{channels} channels of {dtype} need more shared memory than this GPU's {limit} bytes: choose fewer"
    return None


@cache
def _has_compiler() -> bool:
    """Return whether Triton can build the stub that launches a kernel, with the same search as Triton."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return any(map(shutil.which, names))


def sums(anchors: Rows, candidates: Rows, scale: Scale, *, of_columns: bool) -> tuple[Tensor, Tensor]:
    """See `tiles.sums`."""
    n, m, device = len(anchors), len(candidates), anchors.values.device
    tile = kernel_tiles.choose_tile(SUMS_TILES, anchors)
    arguments = _common_arguments(anchors, candidates, scale, tile)
    shift = _to_log2(scale.shift, candidates.values).repeat(m)
    if candidates.present is not None:
        shift.masked_fill_(candidates.present == 0, math.inf)
    splits = max(1, math.ceil(m / _SPLIT))
    over_candidates = torch.zeros(splits, n, device=device)
    over_anchors = torch.zeros(num_panels(n) if of_columns else 0, m, device=device)
    for panel, rows in enumerate(blocks(n, _PANEL)):
        num_blocks = math.ceil((rows.stop - rows.start) / tile.block_anchors)
        partial = torch.empty(num_blocks if of_columns else 0, m, device=device)
        if m:
            _sums_kernel[(num_blocks, splits)](
                *arguments,
                _presence(anchors),
                shift,
                over_candidates,
                partial,
                rows.start,
                SPLIT=_SPLIT,
                OF_COLUMNS=of_columns,
                **tile.options(anchors.values.shape[1]),
                **_mask_options(anchors, candidates),
            )
        if of_columns:
            over_anchors[panel] = partial.sum(0)
    total = over_candidates.sum(0)
    return total if anchors.present is None else total.masked_fill_(anchors.present == 0, 0), over_anchors


def num_panels(num_anchors: int) -> int:
    """See `tiles.num_panels`."""
    return math.ceil(num_anchors / _PANEL)


def push(
    anchors: Rows, candidates: Rows, scale: Scale, *, to_anchors: bool = True, to_candidates: bool = False
) -> tuple[Tensor, Tensor]:
    """See `tiles.push`; two directions take two launches, because sharing tiles would require atomic additions."""
    return (
        _push_to_anchors(anchors, candidates, scale)
        if to_anchors
        else torch.zeros_like(anchors.values, dtype=torch.float32),
        _push_to_anchors(candidates, anchors, scale)
        if to_candidates
        else torch.zeros_like(candidates.values, dtype=torch.float32),
    )


def _push_to_anchors(anchors: Rows, candidates: Rows, scale: Scale) -> Tensor:
    assert anchors.weight is not None and candidates.weight is not None
    n, m = len(anchors), len(candidates)
    moved = torch.zeros_like(anchors.values, dtype=torch.float32)
    if not n or not m:
        return moved
    tile = kernel_tiles.choose_tile(PUSH_TILES, anchors)
    arguments = _common_arguments(anchors, candidates, scale, tile)
    if tile.by_descriptor:
        descriptor = TensorDescriptor.from_tensor(arguments[1], [tile.block_candidates, arguments[1].shape[1]])
        arguments = (arguments[0], descriptor, *arguments[2:])
    split = _PUSH_SPLIT * math.ceil(m / (_PUSH_SPLIT * _MAX_PUSH_SPLITS))
    at_once = max(1, _PARTIAL_BYTES // (moved.numel() * moved.element_size()))
    for splits in blocks(math.ceil(m / split), at_once):
        partial = torch.empty(splits.stop - splits.start, *moved.shape, device=moved.device)
        _push_kernel[(math.ceil(n / tile.block_anchors), len(partial))](
            *arguments,
            _presence(anchors),
            anchors.weight.contiguous(),
            candidates.weight.contiguous(),
            partial,
            splits.start,
            split,
            BY_DESCRIPTOR=tile.by_descriptor,
            **tile.options(anchors.values.shape[1]),
            **_mask_options(anchors, candidates),
        )
        for part in partial:
            moved += part
    return moved


def _presence(rows: Rows) -> Tensor:
    """Return (n,) float32: 1 for present rows, 0 for excluded ones."""
    if rows.present is None:
        return rows.values.new_ones(len(rows), dtype=torch.float32)
    return (rows.present != 0).float()


def _mask_options(anchors: Rows, candidates: Rows) -> dict[str, object]:
    has_image = anchors.image is not None and candidates.image is not None
    has_position = has_image and anchors.position_mm is not None and candidates.position_mm is not None
    dimensions = anchors.position_mm.shape[1] if has_position and anchors.position_mm is not None else 0
    return {"HAS_IMAGE": has_image, "D": dimensions}


def _common_arguments(anchors: Rows, candidates: Rows, scale: Scale, tile: Tile) -> tuple[Any, ...]:
    """Return the arguments that both kernels have in common."""
    unused = anchors.values  # passed for absent tensors, which the kernels do not read
    row_tensors = []
    for rows in (anchors, candidates):
        values = rows.values.contiguous()
        if rows.present is not None:
            values = values.masked_fill(rows.present[:, None] == 0, 0)
        row_tensors.append(
            (
                values,
                unused if rows.image is None else rows.image.contiguous(),
                unused if rows.position_mm is None else rows.position_mm.float().contiguous(),
            )
        )
    by_kind = [part for pair in zip(*row_tensors, strict=True) for part in pair]
    image_ranges = (unused, unused)
    if candidates.image is not None and anchors.image is not None and len(candidates):
        image_ranges = _image_range_per_block(candidates.image, tile.block_candidates)
    return (
        *by_kind,
        *image_ranges,
        len(anchors),
        len(candidates),
        anchors.first - candidates.first,
        _to_log2(scale.k, anchors.values),
        _to_log2(scale.shift, anchors.values),
        min(scale.radius_mm**2, 3e38),
    )


def _to_log2(value: float | Tensor, like: Tensor) -> Tensor:
    """Return value * log2(e) as a float32 scalar on the device of `like`, without reading a device value; kernels use exp2."""
    if isinstance(value, Tensor):
        return (value.double() * _LOG2_E).float()
    return like.new_full((), value * _LOG2_E, dtype=torch.float32)


def _image_range_per_block(image: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest image number of each block."""
    ragged = -len(image) % block
    padded = torch.cat((image, image[-1:].expand(ragged))).view(-1, block)
    return padded.amin(1), padded.amax(1)


@triton.jit
def _masked_tiles(
    image_a, first_of_image, last_of_image, rows, n, offset, begin, end,
    HAS_IMAGE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the range of the tiles [begin, end) that may contain pairs of rows other than negatives."""
    own = tl.min(rows, 0)
    low = (own + offset) // BLOCK_C
    high = (own + offset + BLOCK_A - 1) // BLOCK_C + 1
    if own + offset + BLOCK_A <= 0:  # because division rounds towards zero
        high = low
    if HAS_IMAGE:
        of_anchors = tl.load(image_a + tl.minimum(rows, n - 1))
        smallest, largest = tl.min(of_anchors, 0), tl.max(of_anchors, 0)
        for start in range(begin, end, 1024):
            tiles = start + tl.arange(0, 1024)
            below = tl.load(first_of_image + tiles, mask=tiles < end, other=0)
            above = tl.load(last_of_image + tiles, mask=tiles < end, other=0)
            meets = (below <= largest) & (above >= smallest) & (tiles < end)
            low = tl.minimum(low, tl.min(tl.where(meets, tiles, 2147483647), 0))
            high = tl.maximum(high, tl.max(tl.where(meets, tiles + 1, 0), 0))
    low = tl.minimum(tl.maximum(low, begin), end)
    return low, tl.maximum(tl.minimum(high, end), low)


@triton.jit
def _is_no_negative(
    i, j, rows_i, rows_j, num_i, num_j, image_i, image_j, position_i, position_j, radius_squared,
    D: tl.constexpr, HAS_IMAGE: tl.constexpr,
):  # fmt: skip
    """Return the mask of one tile: rows of the same pair, or within the radius in one image. `i` and `j` are pair indices."""
    excluded = i[:, None] == j[None, :]
    if HAS_IMAGE:
        of_i = tl.load(image_i + rows_i, mask=rows_i < num_i, other=-1)
        of_j = tl.load(image_j + rows_j, mask=rows_j < num_j, other=-2)
        near = of_i[:, None] == of_j[None, :]
        if D > 0:
            squared = tl.zeros(near.shape, tl.float32)
            for d in tl.static_range(D):
                place_i = tl.load(position_i + rows_i * D + d, mask=rows_i < num_i, other=0.0)
                place_j = tl.load(position_j + rows_j * D + d, mask=rows_j < num_j, other=0.0)
                difference = place_i[:, None] - place_j[None, :]
                squared += difference * difference
            near = near & (squared <= radius_squared)
        excluded = excluded | near
    return excluded


@triton.jit
def _sums_kernel(
    anchors,
    candidates,
    image_a,
    image_c,
    position_a,
    position_c,
    first_of_image,
    last_of_image,
    n,
    m,
    offset,
    k_at,
    shift_at,
    radius_squared,
    kept_a,
    shift_c,
    over_candidates,
    partial,
    first_row,
    SPLIT: tl.constexpr,
    OF_COLUMNS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum a block of anchors over a split of candidates, and each of these candidates over the block.

    Candidates are the rows of the tile, so a candidate's sum stays within four lanes. The anchors' sums are kept separately
    for each row of the tile until the end.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    k_log2 = tl.load(k_at)
    channels, within = tl.arange(0, E), tl.arange(0, BLOCK_C)
    rows = first_row + block * BLOCK_A + tl.arange(0, BLOCK_A)
    at = rows.to(tl.int64)[:, None] * E + channels[None, :]
    anchor = tl.trans(tl.load(anchors + at, mask=rows[:, None] < n, other=0.0))
    kept = tl.load(kept_a + rows, mask=rows < n, other=0.0)
    begin, stop = split * SPLIT // BLOCK_C, tl.minimum((split + 1) * SPLIT, m)
    end = stop // BLOCK_C
    low, high = _masked_tiles(
        image_a, first_of_image, last_of_image, rows, n, offset, begin, end, HAS_IMAGE, BLOCK_A, BLOCK_C
    )
    in_tile = within[:, None] * E + channels[None, :]
    partial += block.to(tl.int64) * m
    total = tl.zeros([BLOCK_C, BLOCK_A], tl.float32)
    for number in range(begin, end - high + low):
        tile = tl.where(number < low, number, number + high - low)
        candidate = tl.load(candidates + tile.to(tl.int64) * (BLOCK_C * E) + in_tile)
        shift = tl.load(shift_c + tile * BLOCK_C + within)
        entries = tl.exp2(tl.dot(candidate, anchor, input_precision="tf32") * k_log2 - shift[:, None])
        total += entries
        if OF_COLUMNS:
            tl.store(partial + tile * BLOCK_C + within, tl.sum(entries * kept[None, :], 1))
    for number in tl.range(low, high + (end * BLOCK_C < stop).to(tl.int32), num_stages=1):
        tile = tl.where(number < high, number, end)
        columns = tile * BLOCK_C + within
        inside = columns < m
        candidate = tl.load(candidates + tile.to(tl.int64) * (BLOCK_C * E) + in_tile, mask=inside[:, None], other=0.0)
        shift = tl.load(shift_c + columns, mask=inside, other=float("inf"))
        entries = tl.exp2(tl.dot(candidate, anchor, input_precision="tf32") * k_log2 - shift[:, None])
        excluded = _is_no_negative(
            columns, rows + offset, columns, rows, m, n, image_c, image_a, position_c, position_a, radius_squared,
            D, HAS_IMAGE,
        )  # fmt: skip
        entries = tl.where(excluded, 0.0, entries)
        total += entries
        if OF_COLUMNS:
            tl.store(partial + columns, tl.sum(entries * kept[None, :], 1), mask=inside)
    tl.store(over_candidates + split.to(tl.int64) * n + rows, tl.sum(total, 0), mask=rows < n)


@triton.jit
def _push_kernel(
    anchors,
    candidates,
    image_a,
    image_c,
    position_a,
    position_c,
    first_of_image,
    last_of_image,
    n,
    m,
    offset,
    k_at,
    shift_at,
    radius_squared,
    kept_a,
    weight_a,
    weight_c,
    moved,
    first_split,
    split_size,
    BY_DESCRIPTOR: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum a split of the candidates with weights, for a block of anchors."""
    part, split = tl.program_id(1), first_split + tl.program_id(1)
    k_log2, shift_log2 = tl.load(k_at), tl.load(shift_at)
    channels, within = tl.arange(0, E), tl.arange(0, BLOCK_C)
    rows = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    at = rows.to(tl.int64)[:, None] * E + channels[None, :]
    anchor = tl.load(anchors + at, mask=rows[:, None] < n, other=0.0)
    of_anchor = tl.load(weight_a + rows, mask=rows < n, other=0.0)
    begin, stop = split * (split_size // BLOCK_C), tl.minimum((split + 1) * split_size, m)
    end = stop // BLOCK_C
    low, high = _masked_tiles(
        image_a, first_of_image, last_of_image, rows, n, offset, begin, end, HAS_IMAGE, BLOCK_A, BLOCK_C
    )
    in_tile = within[:, None] * E + channels[None, :]
    total = tl.zeros([BLOCK_A, E], tl.float32)
    for number in range(begin, end - high + low):
        tile = tl.where(number < low, number, number + high - low)
        if BY_DESCRIPTOR:
            candidate = candidates.load([tile * BLOCK_C, 0])
        else:
            candidate = tl.load(candidates + tile.to(tl.int64) * (BLOCK_C * E) + in_tile)
        of_candidate = tl.load(weight_c + tile * BLOCK_C + within)
        entries = tl.exp2(tl.dot(anchor, tl.trans(candidate), input_precision="tf32") * k_log2 - shift_log2)
        weights = entries * (of_anchor[:, None] + of_candidate[None, :])
        total = _add_product(weights, candidate, total)
    for number in tl.range(low, high + (end * BLOCK_C < stop).to(tl.int32), num_stages=1):
        tile = tl.where(number < high, number, end)
        columns = tile * BLOCK_C + within
        inside = columns < m
        if BY_DESCRIPTOR:
            candidate = candidates.load([tile * BLOCK_C, 0])  # zeros beyond the last row
        else:
            at_rows = candidates + tile.to(tl.int64) * (BLOCK_C * E) + in_tile
            candidate = tl.load(at_rows, mask=inside[:, None], other=0.0)
        of_candidate = tl.load(weight_c + columns, mask=inside, other=0.0)
        entries = tl.exp2(tl.dot(anchor, tl.trans(candidate), input_precision="tf32") * k_log2 - shift_log2)
        excluded = _is_no_negative(
            rows + offset, columns, rows, columns, n, m, image_a, image_c, position_a, position_c, radius_squared,
            D, HAS_IMAGE,
        )  # fmt: skip
        weights = tl.where(excluded, 0.0, entries * (of_anchor[:, None] + of_candidate[None, :]))
        total = _add_product(weights, candidate, total)
    kept = tl.load(kept_a + rows, mask=rows < n, other=0.0)
    tl.store(moved + part.to(tl.int64) * n * E + at, total * kept[:, None], mask=rows[:, None] < n)


@triton.jit
def _add_product(weights, candidate, total):
    if candidate.dtype == tl.bfloat16:
        total = tl.dot(weights.to(tl.bfloat16), candidate, total)
    else:
        total = tl.dot(weights, candidate.to(tl.float32), total, input_precision="tf32")
    return total
