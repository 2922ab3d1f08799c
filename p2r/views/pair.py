"""Images -> augmented images.

    for pretraining    an image -> two views of it, and the warp between them
    with a label       an image -> one augmented image, and its label
    without a label    an image -> the warped image, and two appearances of it

View a is the image with a new appearance; view b is the *warped* image with another appearance. Only b is warped, so its
warp is the correspondence, and no inverse is needed. Appearance is applied after the warp, so that interpolation does not
smooth the noise. Pixels outside the scan are zero in both views, like the padding at inference.

An image of several contrasts shows some of them in each view (see `contrasts`); the channels of the others are zero, as for
contrasts that the image lacks. The warp is one for all contrasts; appearance is drawn for each contrast of each view. A pixel is
compared if it is inside the scan of every contrast that a view shows.

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
from p2r.device import on_device
from p2r.views.contrasts import choose_contrasts
from p2r.views.cutmix import draw_boxes
from p2r.views.draws import Draws
from p2r.views.dropout import drop_contrasts
from p2r.views.geometric import apply_warp, sample_geometry, shown_mask, warp_of
from p2r.views.intensity import draw_intensity

_WHOLE = 0.9999  # 1 up to rounding

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
    shown_a: NDArray[np.bool_] | None = None
    """(B, C) contrasts that view a shows; None: images of one contrast."""
    shown_b: NDArray[np.bool_] | None = None
    """(B, C) contrasts that view b shows."""


def make_views(
    image: Tensor,
    inside: Tensor,
    *,
    config: ViewsConfig,
    spacing_mm: Spacing,
    seed: int,
    epochs: NDArray[np.int64],
    positions: NDArray[np.int64],
    present: NDArray[np.bool_] | None = None,
    covered: Tensor | None = None,
    other: Tensor | None = None,
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
        present: (B, C), contrasts that each image has; None: all.
        covered: (B, C, *S) bool, pixels inside the scan of each contrast; None: `inside` for all of them.
        other: (B, C, *S), images of the same anatomy that view b shows instead, such as another frame of a series; None: `image`.

    Raises:
        ValueError: if the shapes do not match.
    """
    _check_shapes(image, inside, "inside")
    if not len(positions) == len(epochs) == len(image):
        raise ValueError(
            f"expected one position and epoch per image, got {len(positions)} and {len(epochs)} for {len(image)} images"
        )
    shown_in_b = image if other is None else other
    if shown_in_b.shape != image.shape:
        raise ValueError(f"expected other of the image's shape {tuple(image.shape)}, got {tuple(shown_in_b.shape)}")
    draws = Draws.of_samples(seed, epochs=epochs, positions=positions)
    mm = _spacing_per_axis(spacing_mm, image)
    size = tuple(image.shape[2:])
    if image.shape[1] > 1:
        return _contrast_views(
            image, shown_in_b, inside, draws, config=config, spacing_mm=mm, present=present, covered=covered
        )
    warped, warp, valid = _warp_image(shown_in_b, inside, draws, geometry=config.geometry, size_out=size, spacing_mm=mm)
    shown_a, shown_b = inside, valid
    if config.shown_fraction is not None:
        boxes = _draw_view_boxes(draws, size, image.device, config.shown_fraction)
        shown_a, shown_b = inside & boxes[0], valid & boxes[1]
        valid = shown_b & _warp_mask(boxes[0], warp)
    # Both views in one batch: fewer and larger kernels.
    both_draws = Draws(np.concatenate([draws.named("view a").keys, draws.named("view b").keys]))
    masks = torch.cat([shown_a, shown_b])
    views = draw_intensity(torch.cat([image, warped]), both_draws, config=config.intensity, spacing_mm=mm, inside=masks)
    a, b = views.masked_fill_(~masks[:, None], 0).chunk(2)
    return ViewPair(a=a, b=b, warp=warp, valid=valid)


def _contrast_views(
    image: Tensor,
    shown_in_b: Tensor,
    inside: Tensor,
    draws: Draws,
    *,
    config: ViewsConfig,
    spacing_mm: tuple[float, ...],
    present: NDArray[np.bool_] | None,
    covered: Tensor | None,
) -> ViewPair:
    """Make two views of images of several contrasts; only the contrasts that a view shows are warped and changed."""
    batch, num_contrasts = image.shape[:2]
    present = np.ones((batch, num_contrasts), dtype=np.bool_) if present is None else present
    if present.shape != (batch, num_contrasts) or (covered is not None and covered.shape != image.shape):
        raise ValueError(
            f"expected present {(batch, num_contrasts)} and covered {tuple(image.shape)}, got {present.shape}"
        )
    shown_a, shown_b = choose_contrasts(present, draws.named("contrasts"), config=config)
    of_a, of_b = np.argwhere(shown_a), np.argwhere(shown_b)  # (rows, 2): image, contrast
    size = tuple(image.shape[2:])
    # A pixel is compared if every contrast shown in either view covers it.
    shared = inside if covered is None else inside & _cover_all(covered, shown_a | shown_b)
    slots, place = _slots_of(shown_b)
    stack = _take_channels(shown_in_b, slots)
    if covered is not None:
        stack = torch.cat([stack, _take_channels(covered, slots).to(image.dtype)], dim=1)
    warped, warp, valid = _warp_image(
        stack, shared, draws, geometry=config.geometry, size_out=size, spacing_mm=spacing_mm
    )
    inside_b = valid if covered is None else shown_mask(warp, _warp_plainly(inside, warp), size_in=size)
    box_a = box_b = torch.ones((), dtype=torch.bool, device=image.device).expand_as(inside)
    if config.shown_fraction is not None:
        box_a, box_b = _draw_view_boxes(draws, size, image.device, config.shown_fraction)
        valid = valid & box_b & _warp_mask(box_a, warp)
    rows_a, rows_b = (_take_rows(image, of_a), _take_rows(warped, np.stack([of_b[:, 0], place], 1)))
    mask_a, mask_b = (
        (inside & box_a)[_host_index(of_a[:, 0], image)],
        (inside_b & box_b)[_host_index(of_b[:, 0], image)],
    )
    if covered is not None:
        mask_a = mask_a & _take_rows(covered, of_a)
        mask_b = mask_b & (_take_rows(warped, np.stack([of_b[:, 0], place + slots.shape[1]], 1)) > _WHOLE)
    keys = [
        draws.named(name).named_rows([f"contrast {number}" for number in range(num_contrasts)], rows)
        for name, rows in (("view a", of_a), ("view b", of_b))
    ]
    masks, rows = torch.cat([mask_a, mask_b]), torch.cat([rows_a, rows_b])[:, None]
    if len(rows):
        appearance = Draws(np.concatenate(keys))
        rows = draw_intensity(rows, appearance, config=config.intensity, spacing_mm=spacing_mm, inside=masks)
    rows = rows.masked_fill(~masks[:, None], 0)[:, 0]
    a, b = _put_rows(rows[: len(of_a)], of_a, image), _put_rows(rows[len(of_a) :], of_b, image)
    return ViewPair(a=a, b=b, warp=warp, valid=valid, shown_a=shown_a, shown_b=shown_b)


def _slots_of(shown: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the contrasts to warp of each image (B, m), and the place among them of each shown contrast, row by row."""
    most = max(1, int(shown.sum(1).max(initial=0)))
    slots = np.argsort(~shown, axis=1, kind="stable")[:, :most]
    places = (shown.cumsum(1) - 1)[shown]
    return slots.astype(np.int64), places.astype(np.int64)


def _take_channels(image: Tensor, slots: NDArray[np.int64]) -> Tensor:
    """Return the channels (B, m, *S) of images (B, C, *S)."""
    rows = np.repeat(np.arange(len(slots)), slots.shape[1])
    taken = _take_rows(image, np.stack([rows, slots.reshape(-1)], 1))
    return taken.reshape(len(slots), slots.shape[1], *image.shape[2:])


def _take_rows(image: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Return the channels (rows, *S) of images (B, C, *S), by image and channel."""
    flat = rows[:, 0] * image.shape[1] + rows[:, 1]
    return image.flatten(0, 1)[_host_index(flat, image)]


def _put_rows(values: Tensor, rows: NDArray[np.int64], like: Tensor) -> Tensor:
    """Return images (B, C, *S) with these channels (rows, *S), and zeros elsewhere."""
    image = torch.zeros_like(like)
    image.flatten(0, 1)[_host_index(rows[:, 0] * like.shape[1] + rows[:, 1], like)] = values
    return image


def _host_index(numbers: NDArray[np.int64], like: Tensor) -> Tensor:
    return on_device(numbers, like.device, dtype=torch.int64)


def _cover_all(covered: Tensor, shown: NDArray[np.bool_]) -> Tensor:
    """Return the pixels (B, *S) that every shown contrast covers."""
    ignored = on_device(~shown, covered.device, dtype=torch.bool)
    return (covered | ignored.reshape(*shown.shape, *[1] * (covered.ndim - 2))).all(1)


def _warp_plainly(mask: Tensor, warp: Tensor) -> Tensor:
    return apply_warp(mask[:, None].float(), warp)[:, 0]


def _warp_mask(mask: Tensor, warp: Tensor) -> Tensor:
    """Warp a mask (B, *S); a pixel counts if all interpolated pixels do."""
    return _warp_plainly(mask, warp) > _WHOLE


def _draw_view_boxes(
    draws: Draws, size: tuple[int, ...], device: torch.device, fraction: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Draw the box that each of the two views shows."""
    a, b = (draw_boxes(draws.named(name), size=size, device=device, fraction=fraction) for name in ("box a", "box b"))
    return a, b


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
