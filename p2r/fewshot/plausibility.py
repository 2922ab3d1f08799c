"""Label maps of labelled patients -> plausible positions and sizes of organs: a filter for pseudo-labels of other patients.

Three rules, learnt only from the labelled frames:

    place      foreground is within the box of all labelled foreground, about the scan's centre, widened by a margin in mm
    one piece  if the foreground of every labelled frame is in one piece, only the largest part of a frame's foreground counts
    size       the largest cross-section of each class (its volume, for a network of volumes) is within a factor of the labelled ones

Pixels that break one of the first two rules do not count: a student learns them neither as foreground nor as background. The
same holds for a class that is too large. A frame with a class that is too small does not count at all, because the missed part
would be learnt as background. The rules assume that scans show the organ at about the same position. For lesions, which may be
anywhere, widen the margin beyond the scan.

Letters: P images, slices frame by frame or one volume per frame; *S their sizes, padded about their centre; K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from p2r.data.preprocess import Frames, Planes

_MIN_LARGEST_PART = 0.95  # fraction of a frame's foreground in its largest part; resampling may split off a few pixels


@dataclass(frozen=True)
class Plausibility:
    """Place and size of labelled organs, with tolerances; in pixels of the network's grid."""

    low: tuple[float, ...]
    """First pixel along each axis at which foreground may be, from the image's centre."""
    high: tuple[float, ...]
    """Last pixel along each axis at which foreground may be."""
    smallest: tuple[float, ...]
    """Minimum size of each class except background."""
    largest: tuple[float, ...]
    """Maximum size of each class except background."""
    is_one_piece: bool
    """True if the foreground of every labelled frame is in one piece."""


def frames_of_scans(scans: Sequence[Planes | Frames]) -> list[slice]:
    """Return, for each frame, the slice of its images in the concatenated images of all scans."""
    frames: list[slice] = []
    start = 0
    for scan in scans:
        per_frame = len(scan.images) // scan.num_frames if isinstance(scan, Planes) else 1
        stop = start + len(scan.images)
        frames += [slice(first, first + per_frame) for first in range(start, stop, per_frame)]
        start = stop
    return frames


def learn_plausibility(
    labels: Tensor, frames: Sequence[slice], *, num_classes: int, size_factor: float, margin_pixels: float
) -> Plausibility:
    """Learn the rules from labelled frames.

    Args:
        labels: (P, *S) classes, with foreground in at least one image.
        frames: Images of each frame.
        num_classes: K.
        size_factor: Factor by which an organ may be larger or smaller than all labelled ones.
        margin_pixels: Distance by which an organ may extend beyond the labelled foreground.
    """
    found = labels.cpu().numpy()
    label_frames = [found[frame] for frame in frames]
    sizes = np.array([_class_sizes(frame, num_classes) for frame in label_frames])  # (frames, K - 1)
    places = np.argwhere(found > 0)[:, 1:] - _image_centre(found.shape[1:])
    largest_parts = [(_largest_part(frame > 0).sum(), (frame > 0).sum()) for frame in label_frames]
    return Plausibility(
        low=tuple((places.min(0) - margin_pixels).tolist()),
        high=tuple((places.max(0) + margin_pixels).tolist()),
        smallest=tuple((sizes.min(0) / size_factor).tolist()),
        largest=tuple((sizes.max(0) * size_factor).tolist()),
        is_one_piece=all(part >= _MIN_LARGEST_PART * whole for part, whole in largest_parts),
    )


def plausible(classes: Tensor, frames: Sequence[slice], rules: Plausibility) -> tuple[Tensor, list[bool]]:
    """Mark the pixels with a plausible class.

    Args:
        classes: (P, *S), on images that are padded about their centre.
        frames: Images of each frame.
        rules: Rules from `learn_plausibility`.

    Returns:
        (P, *S) bool; and for each frame, True if no class is too small.
    """
    found = classes.cpu().numpy()
    box = _foreground_box(found.shape[1:], rules)
    kept = np.ones(found.shape, dtype=np.bool_)
    verdicts = []
    for frame in frames:
        foreground = found[frame] > 0
        possible = foreground & box
        if rules.is_one_piece:
            possible = _largest_part(possible)
        sizes = _class_sizes(np.where(possible, found[frame], 0), 1 + len(rules.largest))
        too_large = [value for value, size in enumerate(sizes, start=1) if size > rules.largest[value - 1]]
        possible &= ~np.isin(found[frame], too_large)
        is_plausible = bool((sizes >= rules.smallest).all())
        kept[frame] = (possible | ~foreground) & is_plausible
        verdicts.append(is_plausible)
    return torch.from_numpy(kept).to(classes.device), verdicts


def _class_sizes(frame: NDArray[np.integer], num_classes: int) -> NDArray[np.float64]:
    """Return the size (K - 1,) of each class in a frame (n, *S): its largest number of pixels in one image."""
    flat = frame.reshape(len(frame), -1)
    return np.array([float((flat == value).sum(1).max()) for value in range(1, num_classes)])


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest connected component of a frame (n, *S); corners, and neighbouring images, connect pixels."""
    stack = mask[0] if len(mask) == 1 else mask
    parts, number = ndimage.label(stack, structure=np.ones((3,) * stack.ndim))
    if number < 2:
        return mask
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())
    part: NDArray[np.bool_] = (parts == largest).reshape(mask.shape)
    return part


def _image_centre(size: Sequence[int]) -> NDArray[np.float64]:
    return (np.array(size) - 1) / 2


def _foreground_box(size: Sequence[int], rules: Plausibility) -> NDArray[np.bool_]:
    box = np.ones(tuple(size), dtype=np.bool_)
    for axis, (length, low, high) in enumerate(zip(size, rules.low, rules.high, strict=True)):
        offsets = np.arange(length) - (length - 1) / 2
        along = [1] * len(size)
        along[axis] = length
        box &= ((offsets >= low) & (offsets <= high)).reshape(along)
    return box
