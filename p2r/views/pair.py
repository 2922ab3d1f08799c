"""An image -> two views of it and the warp between them; a labelled image -> one augmented image and its label; an
unlabelled one -> the moved image, and two appearances of it.

View a is the image in a new appearance; view b is the *warped* image in another one. Only b is moved: so the warp that
made b is the correspondence, and nothing needs to be inverted. Appearance is drawn after the warp, so that noise is not
smoothed by interpolation, and what lies outside the scan is zero in both views, as the padding is in use.

With `shown_fraction`, either view shows a box of its own, and the rest is zero as if outside the scan. The distance to an edge then says
nothing about the place, which a contrast would learn instead of anatomy where the scan is smaller than the image.

Letters: B images, C contrasts, D spatial dimensions (2 or 3), *S sizes along them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import GeometryConfig, IntensityConfig, ViewsConfig
from p2r.views.cutmix import draw_boxes
from p2r.views.draws import Draws
from p2r.views.geometric import apply_warp, sample_geometry, shown_mask, warp_of
from p2r.views.intensity import draw_intensity

Spacing = float | Sequence[float]
"""Edge of a pixel, mm, or D of them."""


@dataclass(frozen=True)
class ViewPair:
    """Two views of the same images, and where they show the same anatomy."""

    a: Tensor
    """(B, C, *S) float32 in [0, 1], on the image's own grid."""
    b: Tensor
    """(B, C, *S) float32 in [0, 1], warped."""
    warp: Tensor
    """(B, *S, D) float32: the position in a, pixels along each axis, of what each pixel of b shows."""
    valid: Tensor
    """(B, *S) bool: pixels of b that show a place of the scan, once."""


def make_views(
    image: Tensor,
    inside: Tensor,
    *,
    config: ViewsConfig,
    spacing_mm: Spacing,
    seed: int,
    epochs: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> ViewPair:
    """Make two views of every image.

    What is drawn for an image depends on the seed, the epoch and its position in the corpus alone, and what comes out
    is the same to the bit whichever images are beside it, on however many ranks and threads; on another device, to
    rounding. Nothing waits for the device.

    Args:
        image: (B, C, *S) float32 in [0, 1], a plane or a volume.
        inside: (B, *S) bool, pixels that belong to the scan.
        config: Ranges of the draws.
        spacing_mm: Pixel size.
        seed: Of the run.
        epochs: (B,) passes over each image's corpus before.
        positions: (B,) each image's place in the corpus.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    _check_shapes(image, inside, "inside")
    if not len(positions) == len(epochs) == len(image):
        raise ValueError(
            f"expected one position and epoch per image, got {len(positions)} and {len(epochs)} for {len(image)} images"
        )
    draws = Draws.of_samples(seed, epochs=epochs, positions=positions)
    mm = _edges(spacing_mm, image)
    size = tuple(image.shape[2:])
    warped, warp, valid = _move(image, inside, draws, geometry=config.geometry, size_out=size, spacing_mm=mm)
    shown_a, shown_b = inside, valid
    if config.shown_fraction is not None:
        boxes = [
            draw_boxes(draws.named(name), size=size, device=image.device, fraction=config.shown_fraction)
            for name in ("box a", "box b")
        ]
        shown_a, shown_b = inside & boxes[0], valid & boxes[1]
        valid = shown_b & (apply_warp(boxes[0][:, None].float(), warp)[:, 0] > 0.9999)  # all that is interpolated from
    # Both views in one go: half as many, larger steps for the device.
    of_both = Draws(np.concatenate([draws.named("view a").keys, draws.named("view b").keys]))
    masks = torch.cat([shown_a, shown_b])
    views = draw_intensity(torch.cat([image, warped]), of_both, config=config.intensity, spacing_mm=mm, inside=masks)
    a, b = views.masked_fill_(~masks[:, None], 0).chunk(2)
    return ViewPair(a=a, b=b, warp=warp, valid=valid)


def augment_labelled(
    image: Tensor,
    label: Tensor,
    *,
    config: ViewsConfig,
    size: int | Sequence[int],
    spacing_mm: Spacing,
    generators: Sequence[np.random.Generator],
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Augment whole planes or volumes and cut them to the network's size about their centre: one draw of each kind per image.

    Args:
        image: (B, C, *S) float32 in [0, 1].
        label: (B, *S) int64 classes.
        config: Ranges of the draws.
        size: Of the result, pixels along every axis, or D numbers.
        spacing_mm: Pixel size, before and after.
        generators: B, one per image; one number is taken of each, whatever is drawn.
        inside: (B, *S) bool, pixels that belong to the scan; None: all.

    Returns:
        Image (B, C, *s) and label (B, *s), *s being `size`; both are 0 outside the scan.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    _check_shapes(image, label, "label")
    if len(generators) != len(image):
        raise ValueError(f"expected one generator per image, got {len(generators)} for {len(image)} images")
    inside = torch.ones_like(label, dtype=torch.bool) if inside is None else inside
    size_out = (size,) * (image.ndim - 2) if isinstance(size, int) else tuple(size)
    draws = Draws.of_generators(generators)
    mm = _edges(spacing_mm, image)
    warped, warp, shown = _move(image, inside, draws, geometry=config.geometry, size_out=size_out, spacing_mm=mm)
    warped = draw_intensity(warped, draws.named("view"), config=config.intensity, spacing_mm=mm, inside=shown)
    classes = apply_warp(label[:, None].float(), warp, mode="nearest")[:, 0].long()
    return warped.masked_fill_(~shown[:, None], 0), classes.masked_fill_(~shown, 0)


@dataclass(frozen=True)
class WeakAndStrong:
    """Images in their own appearance, and in two others, in one geometry."""

    weak: Tensor
    """(B, C, *s) float32 in [0, 1], moved alone."""
    strong: tuple[Tensor, Tensor]
    """Two of (B, C, *s)."""
    shown: Tensor
    """(B, *s) bool: pixels that show the scan. The images are 0 elsewhere."""
    labels: Tensor | None = None
    """(B, *s) int64, moved with the images, if there are any; not meant where `shown` is False."""


def augment_weakly_and_strongly(
    image: Tensor,
    inside: Tensor,
    *,
    geometry: GeometryConfig,
    intensity: IntensityConfig,
    size: int | Sequence[int],
    spacing_mm: Spacing,
    generators: Sequence[np.random.Generator],
    labels: Tensor | None = None,
) -> WeakAndStrong:
    """Augment and cut as `augment_labelled` does, by one geometric draw per image and two draws of its appearance.

    Args:
        image: (B, C, *S) float32 in [0, 1].
        inside: (B, *S) bool, pixels that belong to the scan.
        geometry: Ranges of the geometric draw.
        intensity: Ranges of the two appearances.
        size: Of the result, pixels along every axis, or D numbers.
        spacing_mm: Pixel size, before and after.
        generators: B, one per image; one number is taken of each, whatever is drawn.
        labels: (B, *S) integers that move along.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    _check_shapes(image, inside, "inside")
    if len(generators) != len(image):
        raise ValueError(f"expected one generator per image, got {len(generators)} for {len(image)} images")
    size_out = (size,) * (image.ndim - 2) if isinstance(size, int) else tuple(size)
    draws = Draws.of_generators(generators)
    mm = _edges(spacing_mm, image)
    warped, warp, shown = _move(image, inside, draws, geometry=geometry, size_out=size_out, spacing_mm=mm)
    of_both = Draws(np.concatenate([draws.named("view a").keys, draws.named("view b").keys]))
    masks = torch.cat([shown, shown])
    views = draw_intensity(torch.cat([warped, warped]), of_both, config=intensity, spacing_mm=mm, inside=masks)
    a, b = views.masked_fill_(~masks[:, None], 0).chunk(2)
    moved = None if labels is None else apply_warp(labels[:, None].float(), warp, mode="nearest")[:, 0].long()
    return WeakAndStrong(warped.masked_fill_(~shown[:, None], 0), (a, b), shown, moved)


def _move(
    image: Tensor,
    inside: Tensor,
    draws: Draws,
    *,
    geometry: GeometryConfig,
    size_out: tuple[int, ...],
    spacing_mm: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the warped image, the warp, and the mask of what shows the scan; image and mask are read together."""
    size_in = tuple(image.shape[2:])
    moves = sample_geometry(draws.named("warp"), config=geometry, size=size_out, spacing_mm=spacing_mm)
    warp = warp_of(moves, size_in=size_in, size_out=size_out, spacing_mm=spacing_mm, device=image.device)
    warped = apply_warp(torch.cat([image, inside[:, None].to(image.dtype)], dim=1), warp)
    return warped[:, :-1], warp, shown_mask(warp, warped[:, -1], size_in=size_in)


def _edges(spacing_mm: Spacing, image: Tensor) -> tuple[float, ...]:
    dimensions = image.ndim - 2
    edges = (float(spacing_mm),) * dimensions if isinstance(spacing_mm, int | float) else tuple(spacing_mm)
    if len(edges) != dimensions or not all(0 < mm < float("inf") for mm in edges):
        raise ValueError(f"spacing_mm must be one positive number or {dimensions}, got {spacing_mm}")
    return edges


def _check_shapes(image: Tensor, mask: Tensor, name: str) -> None:
    if image.ndim not in (4, 5) or mask.shape != (image.shape[0], *image.shape[2:]):
        raise ValueError(
            f"expected image (B, C, *S) in 2D or 3D and {name} (B, *S), got {tuple(image.shape)}, {tuple(mask.shape)}"
        )
