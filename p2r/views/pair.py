"""An image -> two views of it and the warp between them; a labelled image -> one augmented image and its label.

View a is the image in a new appearance; view b is the *warped* image in another one. Only b is moved: so the warp that
made b is the correspondence, and nothing needs to be inverted. Appearance is drawn after the warp, so that noise is not
smoothed by interpolation, and what lies outside the scan is zero in both views, as the padding is in use.

Letters: B images, C contrasts, H W rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import ViewsConfig
from p2r.randomness import keyed_generator
from p2r.views.geometric import apply_warp, inside_mask, sample_warps
from p2r.views.intensity import draw_intensity


@dataclass(frozen=True)
class ViewPair:
    """Two views of the same images, and where they show the same anatomy."""

    a: Tensor
    """(B, C, H, W) float32 in [0, 1], on the image's own grid."""
    b: Tensor
    """(B, C, H, W) float32 in [0, 1], warped."""
    warp: Tensor
    """(B, H, W, 2) float32: the row and column in a, pixels, of what each pixel of b shows."""
    valid: Tensor
    """(B, H, W) bool: pixels of b that show a place of the scan, once."""


def make_views(
    image: Tensor,
    inside: Tensor,
    *,
    config: ViewsConfig,
    spacing_mm: float,
    seed: int,
    epochs: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> ViewPair:
    """Make two views of every image.

    What is drawn for an image depends on the seed, the epoch and its position in the corpus alone, and what comes out
    is the same to the bit whichever images are beside it, on however many ranks.

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        inside: (B, H, W) bool, pixels that belong to the scan.
        config: Ranges of the draws.
        spacing_mm: Pixel size.
        seed: Of the run.
        epochs: (B,) passes over each image's corpus before.
        positions: (B,) each image's place in the corpus.
    """
    _check_shapes(image, inside, "inside")
    if not len(positions) == len(epochs) == len(image):
        raise ValueError(
            f"expected one position and epoch per image, got {len(positions)} and {len(epochs)} for {len(image)} images"
        )
    generators = [
        keyed_generator(seed, "views", int(epoch), int(position))
        for epoch, position in zip(epochs, positions, strict=True)
    ]
    size = (image.shape[-2], image.shape[-1])
    warp = sample_warps(
        generators, config=config.geometry, size_in=size, size_out=size, spacing_mm=spacing_mm, device=image.device
    )
    valid = inside_mask(warp, inside)
    a = draw_intensity(image, generators, config=config.intensity, spacing_mm=spacing_mm)
    b = draw_intensity(apply_warp(image, warp), generators, config=config.intensity, spacing_mm=spacing_mm)
    return ViewPair(a=a * inside[:, None], b=b * valid[:, None], warp=warp, valid=valid)


def augment_labelled(
    image: Tensor,
    label: Tensor,
    *,
    config: ViewsConfig,
    size: int,
    spacing_mm: float,
    generators: Sequence[np.random.Generator],
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Augment whole planes and cut them to the network's size about their centre: one draw of each kind per plane.

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        label: (B, H, W) int64 classes.
        config: Ranges of the draws.
        size: Height and width of the result, pixels.
        spacing_mm: Pixel size, before and after.
        generators: B, one per image.
        inside: (B, H, W) bool, pixels that belong to the scan; None: all.

    Returns:
        Image (B, C, size, size) and label (B, size, size); both are 0 outside the scan.
    """
    _check_shapes(image, label, "label")
    inside = torch.ones_like(label, dtype=torch.bool) if inside is None else inside
    warp = sample_warps(
        generators,
        config=config.geometry,
        size_in=(image.shape[-2], image.shape[-1]),
        size_out=(size, size),
        spacing_mm=spacing_mm,
        device=image.device,
    )
    shown = inside_mask(warp, inside)
    warped = draw_intensity(apply_warp(image, warp), generators, config=config.intensity, spacing_mm=spacing_mm)
    classes = apply_warp(label[:, None].float(), warp, mode="nearest")[:, 0].long()
    return warped * shown[:, None], classes * shown


def _check_shapes(image: Tensor, plane: Tensor, name: str) -> None:
    if image.ndim != 4 or plane.shape != (image.shape[0], *image.shape[2:]):
        raise ValueError(
            f"expected image (B, C, H, W) and {name} (B, H, W), got {tuple(image.shape)}, {tuple(plane.shape)}"
        )
