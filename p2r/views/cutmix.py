"""CutMix for segmentation: a box of one image replaces the same box of another, along with its label and mask.

A box covers 2 to 40 % of the image's area or volume, as in UniMatch; its edges differ by a factor of up to about 3. Boxes
stay inside the image.

Letters: B images, C contrasts, D spatial dimensions (2 or 3), *S sizes along them. Sources: Yun et al. 2019 (CutMix); Yang et
al. 2023 (UniMatch); Bai et al. 2023 (BCP, in which labelled and unlabelled images are mixed both ways).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from p2r.device import on_device
from p2r.views.draws import Draws

BOX_FRACTION = (0.02, 0.4)
"""Smallest and largest fraction of the image's area or volume, before rounding to pixels."""
_MAX_ASPECT_RATIO = 1 / 0.3  # of a box's edges, each relative to the image's


@dataclass(frozen=True)
class Labelled:
    """Images with a class for every pixel: a true label or a pseudo-label."""

    images: Tensor
    """(B, C, *S) float32."""
    labels: Tensor
    """(B, *S) int64."""
    counts: Tensor
    """(B, *S) bool: pixels whose class counts in a loss."""

    def take(self, rows: Tensor) -> "Labelled":
        """Select images by index, in any order."""
        return Labelled(self.images[rows], self.labels[rows], self.counts[rows])


def draw_boxes(
    draws: Draws,
    *,
    size: tuple[int, ...],
    device: torch.device | None = None,
    fraction: tuple[float, float] = BOX_FRACTION,
) -> Tensor:
    """Draw a box in each image.

    Args:
        draws: Random numbers of B images.
        size: *S.
        device: Device of the result.
        fraction: Smallest and largest fraction of the image's area or volume, drawn uniformly.

    Returns:
        (B, *S) bool: the pixels of the box.
    """
    dimensions = len(size)
    part = draws.between(*fraction, "box's size")
    largest = math.log(_MAX_ASPECT_RATIO) / 2
    stretch = draws.between(-largest, largest, "box's shape", dimensions)
    stretch -= stretch.mean(1, keepdims=True)
    parts = np.minimum(1.0, part[:, None] ** (1 / dimensions) * np.exp(stretch))
    edges = np.clip(np.rint(parts * size), 1, size)
    starts = np.floor(draws.uniform("box's place", dimensions) * (np.array(size) - edges + 1))
    box = torch.ones((len(draws), *size), dtype=torch.bool, device=device)
    for axis, length in enumerate(size):
        along = (1, *[1] * axis, length, *[1] * (dimensions - 1 - axis))
        place = torch.arange(length, device=device).reshape(along)
        start, stop = (
            on_device(ends[:, axis], device).reshape(-1, *[1] * dimensions) for ends in (starts, starts + edges)
        )
        box &= (place >= start) & (place < stop)
    return box


def exchange(ground: Labelled, patch: Labelled, box: Tensor) -> Labelled:
    """Replace image, label and mask of `ground` by those of `patch` inside the box (B, *S)."""
    return Labelled(
        torch.where(box[:, None], patch.images, ground.images),
        torch.where(box, patch.labels, ground.labels),
        torch.where(box, patch.counts, ground.counts),
    )
