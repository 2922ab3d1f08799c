"""A network and a whole scan -> a segmentation, or features, on a grid whose place in the patient is known.

A plane, or a volume for a network of volumes, is read at its full extent, or, where the model was trained for that
(`Preparation.planes`), about its centre; never about a label. What is larger than the training images is covered by
overlapping windows of that size, because instance normalisation would see another field of view otherwise;
probabilities, not logits, are blended, brought back to the scan's own voxels, and only there become labels. So an edge
is as sharp as the scan, not as the network's grid.

Shapes: *S an image's sides, H W or X Y Z; X Y Z T a volume; P = T * Z planes; h w and x y z a scan's own voxels; K
classes; F features
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from p2r.data.preprocess import (
    Frames,
    Planes,
    Preparation,
    check_room,
    cubic_to_voxel,
    frames_of,
    from_cubic,
    from_grid,
    plane_axes,
    planes_of,
    planes_to_volume,
)
from p2r.data.volume import Volume
from p2r.evaluate.metrics import largest_components

SeeProbabilities = Callable[[Tensor, int], None]
"""Receives probabilities (B, K, h, w), or (1, K, x, y, z), on the scan's own voxels, and the index of their first image."""

_OVERLAP = 0.25
_BATCH_SIZE = {2: 8, 3: 1}


def predict_volume(
    segmenter: nn.Module,
    volume: Volume,
    *,
    preparation: Preparation,
    num_classes: int,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    largest_component: bool = False,
) -> NDArray[np.uint8]:
    """Segment a scan.

    Args:
        segmenter: Image (B, 1, *S) -> logits (B, K, *S), already on `device`.
        volume: The scan; `to_source_grid` takes the result to its file's voxel order.
        preparation: What the segmenter expects of a scan; every side of S is its `image_size`.
        num_classes: K, with the background.
        device: Where the network runs.
        batch_size: Planes, and windows, at a time; None: 8 in planes, 1 in volumes.
        largest_component: Keep the largest connected part of each class alone.

    Returns:
        Labels (X, Y, Z, T) on the grid of `volume.data`.
    """
    return predict_images(
        segmenter,
        images_read(volume, preparation),
        preparation=preparation,
        num_classes=num_classes,
        device=device,
        batch_size=batch_size,
        largest_component=largest_component,
    )


def images_read(volume: Volume, preparation: Preparation) -> Planes | Frames:
    """Return the images that a segmentation model reads of a scan."""
    make = frames_of if preparation.dimensions == 3 else planes_of
    return make(volume, preparation=preparation, size=size_read(preparation))


def size_read(preparation: Preparation) -> int | None:
    """Return the sides of the images that a segmentation model reads of a scan; None: their whole extent."""
    return preparation.image_size if preparation.planes == "centre" else None


def predict_images(
    segmenter: nn.Module,
    images: Planes | Frames,
    *,
    preparation: Preparation,
    num_classes: int,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    largest_component: bool = False,
    see: SeeProbabilities | None = None,
) -> NDArray[np.uint8]:
    """Segment a scan that is cut into images already: `predict_volume` after `planes_of` or `frames_of`.

    Args:
        segmenter: As in `predict_volume`, like the arguments that are not listed here.
        images: The scan's.
        see: Called with the probabilities of some images at a time, so that those of a whole scan need no memory at once.

    Returns:
        Labels (X, Y, Z, T) on the scan's own grid.
    """

    def labels(native: Tensor, first: int) -> Tensor:
        if see is not None:
            see(_completed(native), first)
        return native.argmax(dim=1).to(torch.uint8)

    found = _on_native_grid(labels, segmenter, images, preparation, num_classes, device, batch_size)
    segmented: NDArray[np.uint8] = _assembled(found, images)
    return largest_components(segmented, classes=range(1, num_classes)) if largest_component else segmented


def predict_probabilities(
    segmenter: nn.Module,
    images: Planes | Frames,
    *,
    preparation: Preparation,
    num_classes: int,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
) -> NDArray[np.float32]:
    """Return the probabilities (X, Y, Z, T, K) whose largest is what `predict_images` names.

    They add up to 1 in every voxel. Where the network read nothing of the scan, the background has all of it.
    """

    def classes_last(native: Tensor, first: int) -> Tensor:
        return _completed(native).movedim(1, -1)

    _check_maps(num_classes, len(images.images) * math.prod(images.shape))
    found = _on_native_grid(classes_last, segmenter, images, preparation, num_classes, device, batch_size)
    probabilities: NDArray[np.float32] = _assembled(found, images)
    return probabilities


def probabilities_of_images(
    segmenter: nn.Module, images: Tensor, *, preparation: Preparation, batch_size: int | None = None
) -> Tensor:
    """Return probabilities (B, K, *S) of images (B, 1, *S) of any size, on their own grid and device, read by windows."""

    def probabilities(windows: Tensor) -> Tensor:
        logits: Tensor = segmenter(windows)
        return logits.float().softmax(dim=1)

    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]
    with _evaluating(segmenter):
        return _by_windows(probabilities, images, preparation=preparation, batch_size=batch_size)


def _completed(native: Tensor) -> Tensor:
    """Make maps (B, K, ...) add up to 1: interpolation rounds, and falls to zero beyond what the network read."""
    total = native.sum(1, keepdim=True)
    whole = native / total.clamp_min(torch.finfo(native.dtype).tiny)
    whole[:, :1] += total == 0
    return whole


def features_of_images(
    backbone: nn.Module,
    images: Planes | Frames,
    *,
    preparation: Preparation,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
) -> Tensor:
    """Return the features (P, F, *S), or fewer of them along each axis, on the images' grid, read by windows as in prediction."""
    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]

    def features(windows: Tensor) -> Tensor:
        found: Tensor = backbone(windows)
        return found.float()

    with _evaluating(backbone):
        return torch.cat(
            [
                _by_windows(features, part.to(device), preparation=preparation, batch_size=batch_size).cpu()
                for part in torch.split(images.images, 1 if preparation.dimensions == 3 else batch_size)
            ]
        )


def _on_native_grid(
    read: Callable[[Tensor, int], Tensor],
    segmenter: nn.Module,
    images: Planes | Frames,
    preparation: Preparation,
    num_classes: int,
    device: torch.device | str,
    batch_size: int | None,
) -> Tensor:
    """Return what `read` makes of the probabilities (B, K, h, w), or (1, K, x, y, z), on the scan's own voxels, of all images.

    `read` is called with those of B images, and the index of their first one.
    """
    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]
    at_once = batch_size if isinstance(images, Planes) else 1
    _check_maps(num_classes, at_once * (math.prod(images.shape) + math.prod(images.images.shape[2:])))

    def probabilities(windows: Tensor) -> Tensor:
        logits: Tensor = segmenter(windows)
        if logits.shape[1] != num_classes:
            raise ValueError(f"the segmenter gives {logits.shape[1]} classes, {num_classes} were expected")
        return logits.float().softmax(dim=1)

    found: list[Tensor] = []
    first = 0
    with _evaluating(segmenter):
        for part in torch.split(images.images, at_once):
            blended = _by_windows(probabilities, part.to(device), preparation=preparation, batch_size=batch_size)
            if isinstance(images, Planes):
                native = from_grid(
                    blended, images.shape, spacing_mm=images.spacing_mm, target_mm=preparation.spacing_mm
                )
            else:
                native = from_cubic(
                    blended, images.shape, spacing_mm=images.spacing_mm, target_mm=preparation.spacing_mm
                )
            found.append(read(native, first).cpu())
            first += len(part)
    return torch.cat(found)


def _check_maps(num_classes: int, num_voxels: int) -> None:
    check_room(
        num_classes * num_voxels,
        f"maps of {num_classes} classes on {num_voxels:,} voxels",
        "segment a part of the scan, or use a model of fewer classes",
    )


def _assembled(maps: Tensor, images: Planes | Frames) -> NDArray[Any]:
    """Put maps of planes (P, h, w, ...), or of frames (T, x, y, z, ...), together to (X, Y, Z, T, ...)."""
    if isinstance(images, Planes):
        return planes_to_volume(maps.numpy(), images.axis, images.num_frames)
    return maps.movedim(0, 3).contiguous().numpy()


def embed_volume(
    backbone: nn.Module,
    volume: Volume,
    *,
    preparation: Preparation,
    size_divisor: int = 16,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Compute the features of every pixel of a scan, on the network's grid.

    Planes are read whole. Volumes are read by overlapping windows, whose features are blended.

    Args:
        backbone: Image (B, 1, *S) -> features (B, F, *S), or fewer of them along each axis, already on `device`.
        volume: The scan.
        preparation: What the backbone expects of a scan.
        size_divisor: What the backbone's image must be divisible by (`ModelConfig.size_divisor`).
        device: Where the network runs.
        batch_size: Planes, or windows, at a time; None: 8 in planes, 1 in volumes.

    Returns:
        Features (X', Y', Z', T, F), where axes that the network reads are resampled, and the affine (4, 4) of that grid:
        voxel (centre) -> mm, in the world of `volume.affine`.
    """
    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]

    def features(windows: Tensor) -> Tensor:
        found: Tensor = backbone(windows)
        return found.float()

    read: Callable[[Tensor], Tensor] = features
    if preparation.dimensions == 3:
        frames = frames_of(volume, preparation=preparation, size=None)
        images, at_once = frames.images, 1
        read = partial(_by_windows, features, preparation=preparation, batch_size=batch_size)
    else:
        planes = planes_of(volume, preparation=preparation, size=None)
        images, at_once = planes.images, batch_size
    padded, sides = _padded(images, size_divisor), images.shape[2:]
    parts: list[Tensor] = []
    with _evaluating(backbone):
        for part in torch.split(padded, at_once):
            parts.append(read(part.to(device)).cpu())
            check_room(
                2 * parts[0][0].numel() * len(padded),
                f"{volume.key}: {parts[0].shape[1]} features of {' x '.join(map(str, padded.shape[2:]))} pixels of {len(padded)} images",
                "embed a part of the scan",
            )
    found = torch.cat(parts)
    stride = padded.shape[2] // found.shape[2]
    maps = found[(slice(None), slice(None), *(slice(-(-side // stride)) for side in sides))]

    if preparation.dimensions == 3:
        embedded = maps.permute(2, 3, 4, 0, 1).contiguous().numpy()
        axes: tuple[int, ...] = (0, 1, 2)
        cubic = (sides[0], sides[1], sides[2])
        grid = cubic_to_voxel(frames.shape, cubic, spacing_mm=frames.spacing_mm, target_mm=preparation.spacing_mm)
    else:
        embedded = planes_to_volume(maps.permute(0, 2, 3, 1).numpy(), planes.axis, planes.num_frames)
        axes = plane_axes(planes.axis)
        # The corners of both grids coincide: pixel i, whose centre lies at i + 1/2, lies at (i + 1/2) h / H - 1/2.
        scales = [own / side for own, side in zip(planes.shape, sides, strict=True)]
        grid = tuple((scale, (scale - 1) / 2) for scale in scales)
    to_voxel = np.eye(4)
    for axis, (scale, offset) in zip(axes, grid, strict=True):
        to_voxel[axis, axis] = scale * stride
        to_voxel[axis, 3] = offset + scale * (stride - 1) / 2  # the middle of the first `stride` pixels
    return embedded, volume.affine @ to_voxel


def _by_windows(
    network: Callable[[Tensor], Tensor], images: Tensor, *, preparation: Preparation, batch_size: int
) -> Tensor:
    blended = sliding_window_inference(
        images,
        roi_size=[preparation.image_size] * preparation.dimensions,
        sw_batch_size=batch_size,
        predictor=network,
        overlap=_OVERLAP,
        mode="gaussian",
    )
    assert isinstance(blended, Tensor)
    return blended


def _padded(images: Tensor, divisor: int) -> Tensor:
    """Add zeros behind every side of (B, C, *S) up to a size that the network takes."""
    sides = [-(-side // divisor) * divisor for side in images.shape[2:]]
    if all(side == divisor for side in sides):
        sides[-1] *= 2  # one pixel would be left at the coarsest level
    padding = [(0, side - have) for side, have in zip(sides, images.shape[2:], strict=True)]
    return F.pad(images, [amount for pair in reversed(padding) for amount in pair])


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(was_training)
