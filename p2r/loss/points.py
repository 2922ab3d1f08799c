"""Warp and validity mask -> pixels of view b, and where they lie in view a.

Whole pixels are drawn in b; their positions in a are read from the very field that made b, so nothing is inverted and
b's features need no interpolation.

Shape letters: B images, n points per image, H W.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def corresponding_points(
    warp: Tensor, valid: Tensor, *, num_points: int, generators: Sequence[np.random.Generator]
) -> tuple[Tensor, Tensor]:
    """Draw pixel pairs that show the same anatomy.

    Pixels are drawn uniformly among an image's valid ones, without replacement; with replacement where fewer than
    `num_points` are valid. An image without any valid pixel shows nothing but padding (or folds everywhere): all its
    pixels then count as valid and their positions are moved into the image, so that one odd image costs n pairs of no
    worth rather than the step, and every rank still gives equally many.

    Args:
        warp: (B, H, W, 2) for each pixel of b, its position in a, pixels.
        valid: (B, H, W) bool, pixels of b that may be drawn.
        num_points: n.
        generators: One per image.

    Returns:
        Points in a and in b, (B, n, 2) float32 (row, col) each.
    """
    batch, height, width = valid.shape
    if warp.shape != (batch, height, width, 2) or len(generators) != batch:
        raise ValueError(
            f"want warp {(batch, height, width, 2)} and {batch} generators for valid {tuple(valid.shape)}, "
            f"got {tuple(warp.shape)} and {len(generators)}"
        )
    drawn = np.empty((batch, num_points), np.int64)
    for row, mask, generator in zip(drawn, valid.reshape(batch, -1).cpu().numpy(), generators, strict=True):
        candidates = np.flatnonzero(mask) if mask.any() else np.arange(mask.size)
        row[:] = generator.choice(candidates, num_points, replace=len(candidates) < num_points, shuffle=False)

    index = torch.from_numpy(drawn).to(warp.device)
    points_b = torch.stack((index // width, index % width), -1).float()
    points_a = warp.reshape(batch, -1, 2).gather(1, index[..., None].expand(-1, -1, 2)).float()
    last = torch.tensor([height - 1.0, width - 1.0], device=warp.device)
    return points_a.clamp(min=torch.zeros_like(last), max=last), points_b
