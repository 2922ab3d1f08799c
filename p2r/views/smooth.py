"""Coarse control values -> a smooth field at every pixel, by uniform cubic B-splines, in 2D and 3D.

The weights of B-splines are positive and sum to 1, so a field never leaves the range of its control values, and its first
two derivatives are continuous. Few numbers are drawn per image, independent of its size.

Pixels are sums over the four taps of the spline, not a matrix product. With a matrix library, the result for one image may
depend on the batch size; a view must not.

Letters: B images, K fields, *s pixels along each axis, *k control points along each axis.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.device import on_device


def num_controls(num_pixels: int, spacing_px: float) -> int:
    """Return the number of control points, at most `spacing_px` apart, for `num_pixels`: one per spline patch, plus 3."""
    return max(int(np.ceil((num_pixels - 1) / spacing_px)), 1) + 3


def spline_field(controls: NDArray[np.float64], *, size: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Evaluate splines at every pixel of a map.

    Args:
        controls: (B, K, *k), at least 4 along each axis. The first patch of the spline starts at the first pixel of the
            map, and the last patch ends at the last pixel.
        size: *s.
        device: Device of the computation.

    Returns:
        (B, K, *s) float32.
    """
    field = on_device(controls, device)
    for axis in range(len(size) + 1, 1, -1):  # the last axis first, while the others are still short
        field = _evaluate_axis(field.movedim(axis, 2), size[axis - 2]).movedim(2, axis).contiguous()
    return field


def _evaluate_axis(field: Tensor, num_pixels: int) -> Tensor:
    """Evaluate splines along dimension 2: (B, K, k, *) -> (B, K, num_pixels, *).

    It proceeds patch by patch, because all pixels of a patch have the same four control values.
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
