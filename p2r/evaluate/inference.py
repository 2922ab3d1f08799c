"""A network and a whole scan -> a segmentation, or features, on a grid whose place in the patient is known.

A plane, or a volume for a network of volumes, is read at its full extent, or, where the model was trained for that
(`Preparation.planes`), about its centre; never about a label. What is larger than the training images is covered by
overlapping windows of that size, because instance normalisation would see another field of view otherwise;
probabilities, not logits, are blended, brought back to the scan's own voxels, and only there become labels. So an edge
is as sharp as the scan, not as the network's grid.

Shapes: *S an image's sides, H W or X Y Z; X Y Z T a volume; P = T * Z planes; h w and x y z a scan's own voxels; K
classes; F features
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from p2r.data.preprocess import (
    Preparation,
    cubic_to_voxel,
    frames_of,
    from_cubic,
    from_grid,
    plane_axes,
    planes_of,
    planes_to_volume,
)
from p2r.data.volume import Volume

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
) -> NDArray[np.uint8]:
    """Segment a scan.

    Args:
        segmenter: Image (B, 1, *S) -> logits (B, K, *S), already on `device`.
        volume: The scan; `to_source_grid` takes the result to its file's voxel order.
        preparation: What the segmenter expects of a scan; every side of S is its `image_size`.
        num_classes: K, with the background.
        device: Where the network runs.
        batch_size: Planes, and windows, at a time; None: 8 in planes, 1 in volumes.

    Returns:
        Labels (X, Y, Z, T) on the grid of `volume.data`.
    """
    batch_size = batch_size or _BATCH_SIZE[preparation.dimensions]
    size = preparation.image_size if preparation.planes == "centre" else None

    def probabilities(windows: Tensor) -> Tensor:
        logits: Tensor = segmenter(windows)
        if logits.shape[1] != num_classes:
            raise ValueError(f"the segmenter gives {logits.shape[1]} classes, {num_classes} were expected")
        return logits.float().softmax(dim=1)

    def blended(images: Tensor) -> Tensor:
        return _by_windows(probabilities, images.to(device), preparation=preparation, batch_size=batch_size)

    labels = []
    with _evaluating(segmenter):
        if preparation.dimensions == 3:
            frames = frames_of(volume, preparation=preparation, size=size)
            for image in torch.split(frames.images, 1):  # (1, 1, X, Y, Z)
                native = from_cubic(
                    blended(image), frames.shape, spacing_mm=frames.spacing_mm, target_mm=preparation.spacing_mm
                )
                labels.append(native.argmax(dim=1).to(torch.uint8).cpu())  # (1, x, y, z)
            return torch.cat(labels).permute(1, 2, 3, 0).contiguous().numpy()
        planes = planes_of(volume, preparation=preparation, size=size)
        for images in torch.split(planes.images, batch_size):  # (B, 1, H, W)
            native = from_grid(
                blended(images), planes.shape, spacing_mm=planes.spacing_mm, target_mm=preparation.spacing_mm
            )
            labels.append(native.argmax(dim=1).to(torch.uint8).cpu())  # (B, h, w)
    found: NDArray[np.uint8] = planes_to_volume(torch.cat(labels).numpy(), planes.axis, planes.num_frames)
    return found


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
    with _evaluating(backbone):
        found = torch.cat([read(part.to(device)).cpu() for part in torch.split(padded, at_once)])
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
