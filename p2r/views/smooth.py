"""Coarse control values -> a smooth field at every pixel, by uniform cubic B-splines, in 2D and 3D.

B-splines, because their weights are positive and add up to 1: a field never leaves the range of its control values, and
its first two derivatives are continuous. Only a few numbers are drawn per image, whatever its size.

Everything per pixel is written as sums over the four taps of the spline instead of a matrix product: what a matrix
library returns for one image may depend on how many others are multiplied beside it, and a view must not.

Letters: B images, K fields, *s pixels along each axis, *k control points along each axis.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.device import on_device


def num_controls(num_pixels: int, spacing_px: float) -> int:
    """Return how many control points, at most `spacing_px` apart, span `num_pixels`: one per patch, and 3 more."""
    return max(int(np.ceil((num_pixels - 1) / spacing_px)), 1) + 3


def spline_field(controls: NDArray[np.float64], *, size: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Spread control values over a map.

    Args:
        controls: (B, K, *k), at least 4 along each axis. The first patch of the spline starts at the map's first pixel,
            and the last one ends at its last.
        size: *s.
        device: Where the field is computed.

    Returns:
        (B, K, *s) float32.
    """
    field = on_device(controls, device)
    for axis in range(len(size) + 1, 1, -1):  # the last axis first, while the others are short
        field = _spread(field.movedim(axis, 2), size[axis - 2]).movedim(2, axis).contiguous()
    return field


def _spread(field: Tensor, num_pixels: int) -> Tensor:
    """Evaluate splines along dimension 2: (B, K, k, *) -> (B, K, num_pixels, *).

    It goes from patch to patch, for all pixels of a patch share their four control values.
    """
    num_patches = field.shape[2] - 3
    position = np.linspace(0.0, num_patches, num_pixels) if num_pixels > 1 else np.zeros(1)
    patches = np.minimum(position.astype(np.int64), num_patches - 1)
    t = position - patches
    taps = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    weights = on_device(taps, field.device).reshape(4, num_pixels, *[1] * (field.ndim - 3))
    edges = np.searchsorted(patches, np.arange(num_patches + 1)).tolist()
    spread = field.new_zeros((*field.shape[:2], num_pixels, *field.shape[3:]))
    for patch, (start, stop) in enumerate(pairwise(edges)):
        for tap in range(4):
            spread[:, :, start:stop].addcmul_(field[:, :, patch + tap, None], weights[tap, start:stop])
    return spread
