"""Warp and validity mask -> pixels of view b, and where they lie in view a.

Whole pixels are drawn in b; their positions in a are read from the very field that made b, so nothing is inverted and
b's features need no interpolation. Drawing is sorting by a random number per pixel, on the device: which pixels are valid
is known there, and the host does not have to ask.

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
    """The same anatomy in two views, n times per image."""

    a: Tensor
    """(B, n, D) float32 positions in view a, pixels along each axis; between pixels as a rule."""
    b: Tensor
    """(B, n, D) float32 positions in view b, always whole pixels."""
    weight: Tensor
    """(B, n) float32: 1, or 0 in an image without any valid pixel, whose pairs show nothing."""


def corresponding_points(
    warp: Tensor,
    valid: Tensor,
    *,
    num_points: int,
    generators: Sequence[np.random.Generator],
    foreground: Tensor | None = None,
    foreground_share: float = 0.0,
) -> PointPairs:
    """Draw pixel pairs that show the same anatomy: always exactly `num_points` per image, so that shapes never change.

    Pixels are drawn uniformly among an image's valid ones, without replacement; where fewer than `num_points` are valid,
    all of them, again and again. The same pixels are drawn on every device, and nothing waits for it. An image without
    any valid pixel shows nothing but padding (or folds everywhere): its pairs get weight 0, so that one odd image costs
    its pairs rather than the step.

    Args:
        warp: (B, *S, D) for each pixel of b, its position in a, pixels.
        valid: (B, *S) bool, pixels of b that may be drawn.
        num_points: n.
        generators: One per image; one number is taken of each.
        foreground: (B, *S) bool, pixels of b that are preferred.
        foreground_share: Part of the points that is drawn among preferred pixels, in [0, 1], as far as there are any;
            the others are drawn among all.

    Raises:
        ValueError: The shapes do not fit each other, or the share is out of range.
    """
    batch, *size = valid.shape
    dimensions = len(size)
    if warp.shape != (batch, *size, dimensions) or len(generators) != batch or dimensions not in (2, 3):
        raise ValueError(
            f"want warp {(batch, *size, dimensions)} and {batch} generators for valid {tuple(valid.shape)} (2D or 3D), "
            f"got {tuple(warp.shape)} and {len(generators)}"
        )
    if not 0 <= foreground_share <= 1:
        raise ValueError(f"foreground_share must be in [0, 1], got {foreground_share}")
    if foreground is None:
        foreground = torch.zeros_like(valid)
    if foreground.shape != valid.shape:
        raise ValueError(f"want foreground of valid's shape {tuple(valid.shape)}, got {tuple(foreground.shape)}")
    num_preferred = round(foreground_share * num_points)
    num_pixels = valid[0].numel() if batch else 0
    keys = np.array([generator.integers(2**64, dtype=np.uint64) for generator in generators], dtype=np.uint64)
    bits = random_bits(keys, num_pixels * (2 if num_preferred else 1), device=valid.device)
    shows = valid.flatten(1)
    group = 1 - shows.long()  # valid pixels come first
    if num_preferred:
        wanted = shows & foreground.flatten(1)
        first = _first_of_order(bits[:, num_pixels:], 1 - wanted.long(), num_preferred)
        group -= (torch.zeros_like(shows).scatter(1, first, True) & wanted).long()  # and these before all others
    order = _first_of_order(bits[:, :num_pixels], group, num_points)
    num_valid = shows.sum(1, keepdim=True)
    num_drawn = torch.where(num_valid > 0, num_valid, num_pixels).clamp(max=order.shape[1])
    index = order.gather(1, torch.arange(num_points, device=valid.device) % num_drawn)  # (B, n)
    points_a = warp.reshape(batch, -1, dimensions).gather(1, index[..., None].expand(-1, -1, dimensions)).float()
    # Not a number is no position either; the clamp only moves pairs that have weight 0 or lie on the border.
    along = zip(points_a.nan_to_num().unbind(-1), size, strict=True)
    points_a = torch.stack([of_axis.clamp(0, length - 1) for of_axis, length in along], -1)
    weight = (num_valid > 0).float().expand(-1, num_points)
    return PointPairs(points_a, _places(index, size).float(), weight)


def _first_of_order(bits: Tensor, group: Tensor, num: int) -> Tensor:
    """Put pixels (B, P) in order by group, in random order within one, and return the first `num` of them (B, min(num, P)).

    Group, random bits and the pixel's number make one integer: no two are equal, so every device gives the same order.
    """
    shift = (bits.shape[1] - 1).bit_length()
    keys = bits.long().bitwise_and_(0xFFFFFFFF).bitwise_left_shift_(shift)
    keys += torch.arange(bits.shape[1], device=bits.device)
    keys += group << (32 + shift)
    return keys.topk(min(num, bits.shape[1]), largest=False).values & ((1 << shift) - 1)


def _places(index: Tensor, size: Sequence[int]) -> Tensor:
    """Return the positions (..., D) of flat pixel numbers. `torch.unravel_index` would make a CUDA device wait."""
    of_axes = []
    for length in reversed(size):
        of_axes.append(index % length)
        index = index // length
    return torch.stack(of_axes[::-1], -1)
