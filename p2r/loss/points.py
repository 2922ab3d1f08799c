"""Warp and validity mask -> pixels of view b, and where they lie in view a.

Whole pixels are drawn in b; their positions in a are read from the very field that made b, so nothing is inverted and
b's features need no interpolation.

Shape letters: B images, n points per image, D spatial dimensions (2 or 3), *S sizes along them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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

    Pixels are drawn uniformly among an image's valid ones, without replacement; with replacement where fewer than
    `num_points` are valid. An image without any valid pixel shows nothing but padding (or folds everywhere): its pairs
    get weight 0, so that one odd image costs its pairs rather than the step.

    Args:
        warp: (B, *S, D) for each pixel of b, its position in a, pixels.
        valid: (B, *S) bool, pixels of b that may be drawn.
        num_points: n.
        generators: One per image.
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
    masks = torch.stack((valid, foreground)).flatten(2).cpu().numpy()  # (2, B, pixels)
    drawn = np.empty((batch, num_points), np.int64)
    for row, mask, preferred, generator in zip(drawn, *masks, generators, strict=True):
        row[:] = _draw(mask, preferred, num_points, num_preferred, generator)

    index = torch.from_numpy(drawn).to(warp.device)
    points_b = torch.stack(torch.unravel_index(index, size), -1).float()
    points_a = warp.reshape(batch, -1, dimensions).gather(1, index[..., None].expand(-1, -1, dimensions)).float()
    last = torch.tensor([float(length - 1) for length in size], device=warp.device)
    shows = valid.flatten(1).any(1).float()
    # Not a number is no position either; the clamp only moves pairs that have weight 0 or lie on the border.
    points_a = points_a.nan_to_num().clamp(min=torch.zeros_like(last), max=last)
    return PointPairs(points_a, points_b, shows[:, None].expand(-1, num_points))


def _draw(
    valid: NDArray[np.bool_],
    preferred: NDArray[np.bool_],
    num_points: int,
    num_preferred: int,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    candidates = np.flatnonzero(valid) if valid.any() else np.arange(valid.size)
    first = np.flatnonzero(valid & preferred)
    first = generator.choice(first, min(num_preferred, len(first)), replace=False) if num_preferred else first[:0]
    others = np.setdiff1d(candidates, first, assume_unique=True)
    missing = num_points - len(first)
    if missing > len(others):
        others = candidates
    rest = generator.choice(others, missing, replace=missing > len(others), shuffle=False)
    return np.concatenate((first, rest)).astype(np.int64)
