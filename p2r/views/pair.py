"""Images -> augmented images.

    for pretraining    an image -> two views of it, and the warp between them
    with a label       an image -> one augmented image, and its label
    without a label    an image -> the warped image, and two appearances of it

View a is the image with a new appearance; view b is the *warped* image with another appearance. Only b is warped, so its
warp is the correspondence, and no inverse is needed. Appearance is applied after the warp, so that interpolation does not
smooth the noise. Pixels outside the scan are zero in both views, like the padding at inference.

With `shown_fraction`, each view shows only its own box of the image; the rest is zero, as outside the scan. The distance to the
scan's edge is then no cue for the position. Otherwise a contrastive loss may learn this shortcut instead of anatomy, if the
scan is smaller than the image.

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
from p2r.views.dropout import drop_contrasts
from p2r.views.geometric import apply_warp, sample_geometry, shown_mask, warp_of
from p2r.views.intensity import draw_intensity

Spacing = float | Sequence[float]
"""Pixel size, mm: one number, or one for each of the D axes."""


@dataclass(frozen=True)
class ViewPair:
    """Two views of the same images, and the correspondence between them."""

    a: Tensor
    """(B, C, *S) float32 in [0, 1], on the image's own grid."""
    b: Tensor
    """(B, C, *S) float32 in [0, 1], warped."""
    warp: Tensor
    """(B, *S, D) float32: for each pixel of b, the position of the same anatomy in a, pixels along each axis."""
    valid: Tensor
    """(B, *S) bool: pixels of b inside the scan, where the warp does not fold."""


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

    An image's draws depend only on the seed, the epoch and its position in the corpus. Its views are bitwise identical for
    any batch, number of ranks and number of threads, and equal up to rounding on other devices. No call synchronises with
    the device.

    Args:
        image: (B, C, *S) float32 in [0, 1], slices or volumes.
        inside: (B, *S) bool, pixels inside the scan.
        config: Ranges of the draws.
        spacing_mm: Pixel size.
        seed: Seed of the run.
        epochs: (B,) completed passes over each image's corpus.
        positions: (B,) position of each image in the corpus.

    Raises:
        ValueError: if the shapes do not match.
    """
    _check_shapes(image, inside, "inside")
    if not len(positions) == len(epochs) == len(image):
        raise ValueError(
            f"expected one position and epoch per image, got {len(positions)} and {len(epochs)} for {len(image)} images"
        )
    draws = Draws.of_samples(seed, epochs=epochs, positions=positions)
    mm = _spacing_per_axis(spacing_mm, image)
    size = tuple(image.shape[2:])
    warped, warp, valid = _warp_image(image, inside, draws, geometry=config.geometry, size_out=size, spacing_mm=mm)
    shown_a, shown_b = inside, valid
    if config.shown_fraction is not None:
        boxes = [
            draw_boxes(draws.named(name), size=size, device=image.device, fraction=config.shown_fraction)
            for name in ("box a", "box b")
        ]
        shown_a, shown_b = inside & boxes[0], valid & boxes[1]
        valid = shown_b & (apply_warp(boxes[0][:, None].float(), warp)[:, 0] > 0.9999)  # all interpolated pixels
    # Both views in one batch: fewer and larger kernels.
    both_draws = Draws(np.concatenate([draws.named("view a").keys, draws.named("view b").keys]))
    masks = torch.cat([shown_a, shown_b])
    views = draw_intensity(torch.cat([image, warped]), both_draws, config=config.intensity, spacing_mm=mm, inside=masks)
    shown = views.masked_fill_(~masks[:, None], 0)
    a, b = drop_contrasts(shown, both_draws, probability=config.contrast_dropout).chunk(2)
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
    """Augment whole slices or volumes, with one draw of each kind per image, and crop them about their centre.

    Args:
        image: (B, C, *S) float32 in [0, 1].
        label: (B, *S) int64 classes.
        config: Ranges of the draws.
        size: Size of the result: pixels along every axis, or D numbers.
        spacing_mm: Pixel size, before and after.
        generators: B generators, one per image; exactly one number is taken from each.
        inside: (B, *S) bool, pixels inside the scan; None: all.

    Returns:
        Image (B, C, *s) and label (B, *s), with *s = `size`; both are 0 outside the scan.

    Raises:
        ValueError: if the shapes do not match.
    """
    _check_shapes(image, label, "label")
    if len(generators) != len(image):
        raise ValueError(f"expected one generator per image, got {len(generators)} for {len(image)} images")
    inside = torch.ones_like(label, dtype=torch.bool) if inside is None else inside
    size_out = (size,) * (image.ndim - 2) if isinstance(size, int) else tuple(size)
    draws = Draws.of_generators(generators)
    mm = _spacing_per_axis(spacing_mm, image)
    warped, warp, shown = _warp_image(image, inside, draws, geometry=config.geometry, size_out=size_out, spacing_mm=mm)
    warped = draw_intensity(warped, draws.named("view"), config=config.intensity, spacing_mm=mm, inside=shown)
    warped = drop_contrasts(
        warped.masked_fill_(~shown[:, None], 0), draws.named("view"), probability=config.contrast_dropout
    )
    classes = apply_warp(label[:, None].float(), warp, mode="nearest")[:, 0].long()
    return warped, classes.masked_fill_(~shown, 0)


@dataclass(frozen=True)
class WeakAndStrong:
    """Warped images with their own appearance and with two others, in the same geometry."""

    weak: Tensor
    """(B, C, *s) float32 in [0, 1], only warped."""
    strong: tuple[Tensor, Tensor]
    """Two appearances, (B, C, *s) each."""
    shown: Tensor
    """(B, *s) bool: pixels inside the scan. The images are 0 elsewhere."""
    labels: Tensor | None = None
    """(B, *s) int64, warped with the images; None if not given; undefined where `shown` is False."""


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
    contrast_dropout: float = 0.0,
) -> WeakAndStrong:
    """Augment and crop as `augment_labelled`, with one geometric draw per image and two draws of its appearance.

    Args:
        image: (B, C, *S) float32 in [0, 1].
        inside: (B, *S) bool, pixels inside the scan.
        geometry: Ranges of the geometric draw.
        intensity: Ranges of the two appearances.
        size: Size of the result: pixels along every axis, or D numbers.
        spacing_mm: Pixel size, before and after.
        generators: B generators, one per image; exactly one number is taken from each.
        labels: (B, *S) integers, warped with the images.
        contrast_dropout: Probability that a strong view loses a contrast, for each.

    Raises:
        ValueError: if the shapes do not match.
    """
    _check_shapes(image, inside, "inside")
    if len(generators) != len(image):
        raise ValueError(f"expected one generator per image, got {len(generators)} for {len(image)} images")
    size_out = (size,) * (image.ndim - 2) if isinstance(size, int) else tuple(size)
    draws = Draws.of_generators(generators)
    mm = _spacing_per_axis(spacing_mm, image)
    warped, warp, shown = _warp_image(image, inside, draws, geometry=geometry, size_out=size_out, spacing_mm=mm)
    both_draws = Draws(np.concatenate([draws.named("view a").keys, draws.named("view b").keys]))
    masks = torch.cat([shown, shown])
    views = draw_intensity(torch.cat([warped, warped]), both_draws, config=intensity, spacing_mm=mm, inside=masks)
    shown_views = views.masked_fill_(~masks[:, None], 0)
    a, b = drop_contrasts(shown_views, both_draws, probability=contrast_dropout).chunk(2)
    warped_labels = None if labels is None else apply_warp(labels[:, None].float(), warp, mode="nearest")[:, 0].long()
    return WeakAndStrong(warped.masked_fill_(~shown[:, None], 0), (a, b), shown, warped_labels)


def _warp_image(
    image: Tensor,
    inside: Tensor,
    draws: Draws,
    *,
    geometry: GeometryConfig,
    size_out: tuple[int, ...],
    spacing_mm: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the warped image, the warp, and the mask of pixels inside the scan; image and mask are warped together."""
    size_in = tuple(image.shape[2:])
    drawn = sample_geometry(draws.named("warp"), config=geometry, size=size_out, spacing_mm=spacing_mm)
    warp = warp_of(drawn, size_in=size_in, size_out=size_out, spacing_mm=spacing_mm, device=image.device)
    warped = apply_warp(torch.cat([image, inside[:, None].to(image.dtype)], dim=1), warp)
    return warped[:, :-1], warp, shown_mask(warp, warped[:, -1], size_in=size_in)


def _spacing_per_axis(spacing_mm: Spacing, image: Tensor) -> tuple[float, ...]:
    dimensions = image.ndim - 2
    per_axis = (float(spacing_mm),) * dimensions if isinstance(spacing_mm, int | float) else tuple(spacing_mm)
    if len(per_axis) != dimensions or not all(0 < mm < float("inf") for mm in per_axis):
        raise ValueError(f"spacing_mm must be one positive number or {dimensions}, got {spacing_mm}")
    return per_axis


def _check_shapes(image: Tensor, mask: Tensor, name: str) -> None:
    if image.ndim not in (4, 5) or mask.shape != (image.shape[0], *image.shape[2:]):
        raise ValueError(
            f"expected image (B, C, *S) in 2D or 3D and {name} (B, *S), got {tuple(image.shape)}, {tuple(mask.shape)}"
        )
