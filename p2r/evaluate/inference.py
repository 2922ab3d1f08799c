"""A network and a whole scan -> a segmentation, or features, on a grid with a known position in the patient.

A slice (or a volume, for a network of volumes) is read at its full extent, or about its centre, if the model was trained for
that (`Preparation.planes`). It is never read about a label. Larger images are covered by overlapping windows of the training size,
because instance normalisation would otherwise get another field of view. Probabilities, not logits, are blended and resampled
to the scan's own voxels, where they become labels. So an edge is as sharp as the scan, not as the network's grid.

Shapes: *S an image's sides, H W or X Y Z; X Y Z T a volume; P = T * Z slices.
h w and x y z a scan's own voxels; K classes; F features.
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

from p2r.data.grids import check_room, cubic_to_voxel, from_cubic, from_grid
from p2r.data.preprocess import (
    Frames,
    Planes,
    Preparation,
    Scans,
    frames_of,
    plane_axes,
    planes_of,
    planes_to_volume,
    reference_of,
)
from p2r.evaluate.metrics import largest_components

SeeProbabilities = Callable[[Tensor, int], None]
"""Receives probabilities (B, K, h, w), or (1, K, x, y, z), on the scan's own voxels, and the index of their first image."""

_OVERLAP = 0.25
_BATCH_SIZE = {2: 8, 3: 1}


def predict_volume(
    segmenter: nn.Module,
    volume: Scans,
    *,
    preparation: Preparation,
    num_classes: int,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    largest_component: bool = False,
) -> NDArray[np.uint8]:
    """Segment a scan.

    Args:
        segmenter: Image (B, C, *S) -> logits (B, K, *S), already on `device`.
        volume: The scan, or the scans by contrast; `to_source_grid` reorders the result to its file's voxel order.
        preparation: Preparation of scans for the segmenter; every side of S is its `image_size`.
        num_classes: K, including background.
        device: Device of the network.
        batch_size: Number of slices, and of windows, at a time; None: 8 in 2D, 1 in 3D.
        largest_component: Keep only the largest connected component of each class.

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


def images_read(volume: Scans, preparation: Preparation) -> Planes | Frames:
    """Return the images of a scan for a segmentation model."""
    make = frames_of if preparation.dimensions == 3 else planes_of
    return make(volume, preparation=preparation, size=size_read(preparation))


def size_read(preparation: Preparation) -> int | None:
    """Return the side of a scan's images for a segmentation model; None: their whole extent."""
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
    """Segment a scan that is already cut into images: `predict_volume` after `planes_of` or `frames_of`.

    Args:
        segmenter: As in `predict_volume`, like the arguments that are not listed here.
        images: Images of the scan.
        see: Called with the probabilities of a few images at a time, so that they are never in memory all at once.

    Returns:
        Labels (X, Y, Z, T) on the scan's own grid.
    """

    def labels(native: Tensor, first: int) -> Tensor:
        if see is not None:
            see(_normalise_probabilities(native), first)
        return native.argmax(dim=1).to(torch.uint8)

    found = _map_native_probabilities(labels, segmenter, images, preparation, num_classes, device, batch_size)
    segmented: NDArray[np.uint8] = _assemble_volume(found, images)
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
    """Return the probabilities (X, Y, Z, T, K) of which `predict_images` takes the largest.

    They sum to 1 in every voxel. Where the network did not read the scan, the background has probability 1.
    """

    def classes_last(native: Tensor, first: int) -> Tensor:
        return _normalise_probabilities(native).movedim(1, -1)

    _check_map_memory(num_classes, len(images.images) * math.prod(images.shape), advice="leave out the probabilities, ")
    found = _map_native_probabilities(classes_last, segmenter, images, preparation, num_classes, device, batch_size)
    probabilities: NDArray[np.float32] = _assemble_volume(found, images)
    return probabilities


def probabilities_of_images(
    segmenter: nn.Module, images: Tensor, *, preparation: Preparation, batch_size: int | None = None
) -> Tensor:
    """Return probabilities (B, K, *S) of images (B, C, *S) of any size, on their own grid and device, read by windows."""

    def probabilities(windows: Tensor) -> Tensor:
        logits: Tensor = segmenter(windows)
        return logits.float().softmax(dim=1)

    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]
    with _evaluation_mode(segmenter):
        return _blend_windows(probabilities, images, preparation=preparation, batch_size=batch_size)


def _normalise_probabilities(native: Tensor) -> Tensor:
    """Normalise maps (B, K, ...) to sum to 1: interpolation rounds, and gives 0 outside the part that the network read."""
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
    """Compute features (P, F, *S), or coarser, on the images' grid, in windows as in prediction."""
    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]

    def features(windows: Tensor) -> Tensor:
        found: Tensor = backbone(windows)
        return found.float()

    with _evaluation_mode(backbone):
        return torch.cat(
            [
                _blend_windows(features, part.to(device), preparation=preparation, batch_size=batch_size).cpu()
                for part in torch.split(images.images, 1 if preparation.dimensions == 3 else batch_size)
            ]
        )


def _map_native_probabilities(
    read: Callable[[Tensor, int], Tensor],
    segmenter: nn.Module,
    images: Planes | Frames,
    preparation: Preparation,
    num_classes: int,
    device: torch.device | str,
    batch_size: int | None,
) -> Tensor:
    """Apply `read` to the probabilities of all images on the scan's own voxels, and concatenate the results.

    `read` gets the probabilities of B slices (B, K, h, w), or of a volume (1, K, x, y, z), and the index of the first image.
    """
    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]
    at_once = batch_size if isinstance(images, Planes) else 1
    _check_map_memory(num_classes, at_once * (math.prod(images.shape) + math.prod(images.images.shape[2:])))

    def probabilities(windows: Tensor) -> Tensor:
        logits: Tensor = segmenter(windows)
        if logits.shape[1] != num_classes:
            raise ValueError(f"the segmenter has {logits.shape[1]} classes, expected {num_classes}")
        return logits.float().softmax(dim=1)

    found: list[Tensor] = []
    first = 0
    with _evaluation_mode(segmenter):
        for part in torch.split(images.images, at_once):
            blended = _blend_windows(probabilities, part.to(device), preparation=preparation, batch_size=batch_size)
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


def _check_map_memory(num_classes: int, num_voxels: int, *, advice: str = "") -> None:
    check_room(
        num_classes * num_voxels,
        f"maps of {num_classes} classes on {num_voxels:,} voxels",
        f"{advice}segment a part of the scan, or use a model with fewer classes",
    )


def _assemble_volume(maps: Tensor, images: Planes | Frames) -> NDArray[Any]:
    """Put maps of planes (P, h, w, ...), or of frames (T, x, y, z, ...), together to (X, Y, Z, T, ...)."""
    if isinstance(images, Planes):
        return planes_to_volume(maps.numpy(), images.axis, images.num_frames)
    return maps.movedim(0, 3).contiguous().numpy()


def embed_volume(
    backbone: nn.Module,
    volume: Scans,
    *,
    preparation: Preparation,
    size_divisor: int = 16,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Compute the features of every pixel of a scan, on the network's grid.

    Slices are read whole. Volumes are read in overlapping windows, whose features are blended.

    Args:
        backbone: Image (B, C, *S) -> features (B, F, *S), or coarser, already on `device`.
        volume: The scan, or the scans by contrast.
        preparation: Preparation of scans for the backbone.
        size_divisor: Divisor of the sides of the backbone's image (`ModelConfig.size_divisor`).
        device: Device of the network.
        batch_size: Number of slices, or of windows, at a time; None: 8 in 2D, 1 in 3D.

    Returns:
        Features (X', Y', Z', T, F), resampled along the axes that the network reads; and the affine (4, 4) of that grid,
        voxel (centre) -> mm, in the world of the scan's affine.
    """
    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]

    def features(windows: Tensor) -> Tensor:
        found: Tensor = backbone(windows)
        return found.float()

    read: Callable[[Tensor], Tensor] = features
    reference = reference_of(volume)
    if preparation.dimensions == 3:
        frames = frames_of(volume, preparation=preparation, size=None)
        images, at_once = frames.images, 1
        read = partial(_blend_windows, features, preparation=preparation, batch_size=batch_size)
    else:
        planes = planes_of(volume, preparation=preparation, size=None)
        images, at_once = planes.images, batch_size
    padded, sides = _pad_to_divisor(images, size_divisor), images.shape[2:]
    parts: list[Tensor] = []
    with _evaluation_mode(backbone):
        for part in torch.split(padded, at_once):
            parts.append(read(part.to(device)).cpu())
            check_room(
                2 * parts[0][0].numel() * len(padded),
                f"{reference.key}: {parts[0].shape[1]} features of {' x '.join(map(str, padded.shape[2:]))} pixels of {len(padded)} images",
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
        # The corners of both grids coincide: pixel i, with its centre at i + 1/2, is at (i + 1/2) h / H - 1/2.
        scales = [own / side for own, side in zip(planes.shape, sides, strict=True)]
        grid = tuple((scale, (scale - 1) / 2) for scale in scales)
    to_voxel = np.eye(4)
    for axis, (scale, offset) in zip(axes, grid, strict=True):
        to_voxel[axis, axis] = scale * stride
        to_voxel[axis, 3] = offset + scale * (stride - 1) / 2  # the centre of the first `stride` pixels
    return embedded, reference.affine @ to_voxel


def _blend_windows(
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


def _pad_to_divisor(images: Tensor, divisor: int) -> Tensor:
    """Pad the end of every side of (B, C, *S) with zeros, up to a size that the network supports."""
    sides = [-(-side // divisor) * divisor for side in images.shape[2:]]
    if all(side == divisor for side in sides):
        sides[-1] *= 2  # otherwise one pixel would be left at the coarsest level
    padding = [(0, side - have) for side, have in zip(sides, images.shape[2:], strict=True)]
    return F.pad(images, [amount for pair in reversed(padding) for amount in pair])


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(was_training)
