"""View b -> the view with masked blocks, and the intensities that are to be predicted there.

The grid of blocks starts at the image's first pixel. Its last blocks may be cut off. The same blocks are masked in all contrasts,
because another contrast of the same anatomy would give the answer. Masked pixels are zero, like pixels outside the scan.

View b is masked, and not a third view: the backbone's passes dominate a step, and a third view would make it half as long again. Not
view a, because the pixel pairs are whole pixels of b: they can be drawn among its visible pixels.

Letters: B images, C contrasts, *S spatial. Sources: Xie et al. 2022 (SimMIM), arXiv:2111.09886; Wald et al. 2025 (masked
autoencoders for 3D U-Nets), arXiv:2410.23132.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2r.config import ReconstructionConfig
from p2r.device import on_device, random_bits
from p2r.views.draws import Draws
from p2r.views.pair import ViewPair

_LEAST_VARIANCE = 1e-6  # of intensities in [0, 1]: a nearly constant view must not turn rounding into a target


@dataclass(frozen=True)
class MaskedView:
    """View b with masked blocks."""

    image: Tensor
    """(B, C, *S) float32, zero in masked blocks."""
    visible: Tensor
    """(B, *S) bool: valid pixels outside masked blocks."""
    target: Tensor
    """(B, C, *S) float32: the view's intensities minus their mean, over their standard deviation; both over its valid pixels."""
    scored: Tensor
    """(B, C, *S) bool: valid pixels in masked blocks, in the contrasts that the view shows."""


def mask_view(views: ViewPair, draws: Draws, *, config: ReconstructionConfig, spacing_mm: float) -> MaskedView:
    """Mask blocks of view b.

    Args:
        views: Views of B images.
        draws: Random numbers of the images.
        config: Fraction and size of the blocks.
        spacing_mm: Pixel size.
    """
    masked = draw_blocks(draws, views.valid.shape[1:], config=config, spacing_mm=spacing_mm, device=views.b.device)
    inside = views.valid[:, None].expand_as(views.b)
    if views.shown_b is not None:
        shown = on_device(views.shown_b, views.b.device, dtype=torch.bool)
        inside = inside & shown.reshape(*shown.shape, *[1] * (inside.ndim - 2))
    return MaskedView(
        image=views.b.masked_fill(masked[:, None], 0),
        visible=views.valid & ~masked,
        target=_standardise(views.b, inside),
        scored=inside & masked[:, None],
    )


def draw_blocks(
    draws: Draws,
    size: Sequence[int],
    *,
    config: ReconstructionConfig,
    spacing_mm: float,
    device: torch.device | None = None,
) -> Tensor:
    """Draw the masked blocks of each image: (B, *S) bool."""
    edge = config.block_size(spacing_mm)
    grid = [math.ceil(length / edge) for length in size]
    bits = random_bits(draws.named("masked blocks").keys, math.prod(grid), device=device)
    rank = bits.argsort(stable=True, dim=1).argsort(1)  # a random order of the blocks
    masked: Tensor = (rank < config.num_masked(math.prod(grid))).reshape(len(draws), *grid)
    for axis, length in enumerate(size, start=1):
        masked = masked.repeat_interleave(edge, axis).narrow(axis, 0, length)
    return masked


def _standardise(view: Tensor, inside: Tensor) -> Tensor:
    """Give each contrast of each image the mean 0 and the variance 1 over pixels `inside`."""
    axes = tuple(range(2, view.ndim))
    num = inside.sum(axes, keepdim=True).clamp(min=1)
    centred = view - (view * inside).sum(axes, keepdim=True) / num
    variance = (centred * inside).square().sum(axes, keepdim=True) / num
    return centred / (variance + _LEAST_VARIANCE).sqrt()
