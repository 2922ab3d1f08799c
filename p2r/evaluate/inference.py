"""A network and a whole scan -> a segmentation, or features, on a grid whose place in the patient is known.

A plane is read at its full extent, or, where the model was trained for that (`Preparation.planes`), about its centre;
never about a label. A plane larger than the training images is covered by overlapping windows of that size, because
instance normalisation would see another field of view otherwise; probabilities, not logits, are blended, brought back
to the scan's own voxels, and only there become labels. So an edge is as sharp as the scan, not as the network's grid.

Shapes: X Y Z T a volume; P = T * Z planes; h w a plane's voxels; H W its pixels after resampling; K classes; F features
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from p2r.data.preprocess import Preparation, from_grid, plane_axes, planes_of, planes_to_volume
from p2r.data.volume import Volume

_DIVISOR = 16
_OVERLAP = 0.25


def predict_volume(
    segmenter: nn.Module,
    volume: Volume,
    *,
    preparation: Preparation,
    num_classes: int,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
) -> NDArray[np.uint8]:
    """Segment a scan.

    Args:
        segmenter: Image (B, 1, S, S) -> logits (B, K, S, S), already on `device`.
        volume: The scan; `to_source_grid` takes the result to its file's voxel order.
        preparation: What the segmenter expects of a scan; its `image_size` is S.
        num_classes: K, with the background.
        device: Where the network runs.
        batch_size: Planes, and windows, at a time.

    Returns:
        Labels (X, Y, Z, T) on the grid of `volume.data`.
    """
    size = preparation.image_size if preparation.planes == "centre" else None
    planes = planes_of(volume, preparation=preparation, size=size)

    def probabilities(windows: Tensor) -> Tensor:
        logits: Tensor = segmenter(windows)
        if logits.shape[1] != num_classes:
            raise ValueError(f"the segmenter gives {logits.shape[1]} classes, {num_classes} were expected")
        return logits.float().softmax(dim=1)

    labels = []
    with _evaluating(segmenter):
        for images in torch.split(planes.images, batch_size):  # (B, 1, H, W)
            blended = sliding_window_inference(
                images.to(device),
                roi_size=(preparation.image_size, preparation.image_size),
                sw_batch_size=batch_size,
                predictor=probabilities,
                overlap=_OVERLAP,
                mode="gaussian",
            )
            assert isinstance(blended, Tensor)
            native = from_grid(blended, planes.shape, spacing_mm=planes.spacing_mm, target_mm=preparation.spacing_mm)
            labels.append(native.argmax(dim=1).to(torch.uint8).cpu())  # (B, h, w)
    found: NDArray[np.uint8] = planes_to_volume(torch.cat(labels).numpy(), planes.axis, planes.num_frames)
    return found


def embed_volume(
    backbone: nn.Module,
    volume: Volume,
    *,
    preparation: Preparation,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Compute the features of every pixel of a scan, on the network's grid.

    Args:
        backbone: Image (B, 1, H, W) -> features (B, F, H, W), already on `device`.
        volume: The scan.
        preparation: What the backbone expects of a scan.
        device: Where the network runs.
        batch_size: Planes at a time.

    Returns:
        Features (X', Y', Z', T, F), where the two axes in the planes are resampled, and the affine (4, 4) of that grid:
        voxel (centre) -> mm, in the world of `volume.affine`.
    """
    planes = planes_of(volume, preparation=preparation, size=None)
    height, width = planes.images.shape[-2:]
    padding = (0, -width % _DIVISOR, 0, -height % _DIVISOR)
    features = []
    with _evaluating(backbone):
        for images in torch.split(planes.images, batch_size):  # (B, 1, H, W)
            found: Tensor = backbone(F.pad(images.to(device), padding))[..., :height, :width]
            features.append(found.float().permute(0, 2, 3, 1).cpu())  # (B, H, W, F)
    embedded = planes_to_volume(torch.cat(features).numpy(), planes.axis, planes.num_frames)
    return embedded, volume.affine @ _resampled_to_voxel(planes.axis, planes.shape, (height, width))


def _resampled_to_voxel(axis: int, shape: tuple[int, int], resampled: tuple[int, int]) -> NDArray[np.float64]:
    """Return the matrix that takes an index on the resampled grid to one on the volume's own grid.

    The corners of both grids coincide, so pixel i, whose centre lies at i + 1/2, lies at (i + 1/2) h / H - 1/2.
    """
    matrix = np.eye(4)
    for row, before, after in zip(plane_axes(axis), shape, resampled, strict=True):
        matrix[row, row] = before / after
        matrix[row, 3] = (before / after - 1) / 2
    return matrix


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(was_training)
