"""Warp and validity mask -> pixels of view b, and their positions in view a.

Whole pixels are drawn in b; their positions in a are read from the warp that made b. So no inverse is needed, and b's
features need no interpolation. Pixels are drawn by sorting random numbers on the device, where the valid pixels are known:
the host does not synchronise.

Shape letters: B images, n points per image, D spatial dimensions (2 or 3), *S sizes along them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from p2r.device import random_bits


@dataclass(frozen=True)
class PointPairs:
    """Positions of the same anatomy in two views, n per image."""

    a: Tensor
    """(B, n, D) float32 positions in view a, pixels along each axis; generally between pixels."""
    b: Tensor
    """(B, n, D) float32 positions in view b, always whole pixels."""
    weight: Tensor
    """(B, n) float32: 1, or 0 in an image without valid pixels."""


def corresponding_points(
    warp: Tensor,
    valid: Tensor,
    *,
    num_points: int,
    generators: Sequence[np.random.Generator],
    foreground: Tensor | None = None,
    foreground_share: float = 0.0,
) -> PointPairs:
    """Draw pixel pairs that show the same anatomy: exactly `num_points` per image, so that shapes are constant.

    Pixels are drawn uniformly among an image's valid pixels, without replacement; if fewer than `num_points` are valid, all
    of them are repeated. Every device draws the same pixels, without synchronising. An image without valid pixels is all
    padding, or folds everywhere. Its pairs get weight 0, so that it does not fail the step.

    Args:
        warp: (B, *S, D) position in a of each pixel of b, in pixels.
        valid: (B, *S) bool, pixels of b that may be drawn.
        num_points: n.
        generators: One per image; exactly one number is taken from each.
        foreground: (B, *S) bool, preferred pixels of b.
        foreground_share: Fraction of the points drawn among preferred pixels, in [0, 1], up to their number; the other
            points are drawn among all valid pixels.

    Raises:
        ValueError: if the shapes do not match, or the share is out of range.
    """
    batch, *size = valid.shape
    dimensions = len(size)
    if warp.shape != (batch, *size, dimensions) or len(generators) != batch or dimensions not in (2, 3):
        raise ValueError(
            f"expected warp {(batch, *size, dimensions)} and {batch} generators for valid {tuple(valid.shape)} (2D or 3D), "
            f"got {tuple(warp.shape)} and {len(generators)}"
        )
    if not 0 <= foreground_share <= 1:
        raise ValueError(f"foreground_share must be in [0, 1], got {foreground_share}")
    if foreground is None:
        foreground = torch.zeros_like(valid)
    if foreground.shape != valid.shape:
        raise ValueError(f"expected foreground of valid's shape {tuple(valid.shape)}, got {tuple(foreground.shape)}")
    num_preferred = round(foreground_share * num_points)
    num_pixels = valid[0].numel() if batch else 0
    keys = np.array([generator.integers(2**64, dtype=np.uint64) for generator in generators], dtype=np.uint64)
    bits = random_bits(keys, num_pixels * (2 if num_preferred else 1), device=valid.device)
    is_valid = valid.flatten(1)
    group = 1 - is_valid.long()  # valid pixels come first
    if num_preferred:
        is_preferred = is_valid & foreground.flatten(1)
        first = _draw_first(bits[:, num_pixels:], 1 - is_preferred.long(), num_preferred)
        group -= (torch.zeros_like(is_valid).scatter(1, first, True) & is_preferred).long()  # these before all others
    order = _draw_first(bits[:, :num_pixels], group, num_points)
    num_valid = is_valid.sum(1, keepdim=True)
    num_drawn = torch.where(num_valid > 0, num_valid, num_pixels).clamp(max=order.shape[1])
    index = order.gather(1, torch.arange(num_points, device=valid.device) % num_drawn)  # (B, n)
    points_a = warp.reshape(batch, -1, dimensions).gather(1, index[..., None].expand(-1, -1, dimensions)).float()
    # Replacing NaN and clamping only affects pairs with weight 0 and pairs on the border.
    along = zip(points_a.nan_to_num().unbind(-1), size, strict=True)
    points_a = torch.stack([coordinate.clamp(0, length - 1) for coordinate, length in along], -1)
    weight = (num_valid > 0).float().expand(-1, num_points)
    return PointPairs(points_a, _unravel_index(index, size).float(), weight)


def _draw_first(bits: Tensor, group: Tensor, num: int) -> Tensor:
    """Sort pixels (B, P) by group, randomly within a group, and return the first `num` of them (B, min(num, P)).

    Group, random bits and pixel number form one integer. All are distinct, so every device gives the same order.
    """
    shift = (bits.shape[1] - 1).bit_length()
    keys = bits.long().bitwise_and_(0xFFFFFFFF).bitwise_left_shift_(shift)
    keys += torch.arange(bits.shape[1], device=bits.device)
    keys += group << (32 + shift)
    return keys.topk(min(num, bits.shape[1]), largest=False).values & ((1 << shift) - 1)


def _unravel_index(index: Tensor, size: Sequence[int]) -> Tensor:
    """Return the positions (..., D) of flat pixel indices, without the synchronisation of `torch.unravel_index` on CUDA."""
    coordinates = []
    for length in reversed(size):
        coordinates.append(index % length)
        index = index // length
    return torch.stack(coordinates[::-1], -1)
