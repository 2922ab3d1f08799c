"""A batch as stored in the shards -> the network's input, on the device.

Samples arrive as integers, each scan on its own grid. Intensities are normalised and grids resampled on the network's
device: this costs almost nothing on a GPU, and only a quarter of the bytes cross the bus.

Shapes: B samples of this rank; S = H W pixels of slices, or X Y Z voxels of patches; S' on a scan's own grid.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import ImageConfig
from p2r.data.preprocess import normalise, to_grid, to_patch
from p2r.device import to_device


@dataclass(frozen=True)
class Group:
    """Samples of a batch that share one grid, as stored."""

    index: Tensor
    """(b,) positions in the batch."""
    voxels: Tensor
    """(b, *S') in the dtype of the scans; pinned where the device is a GPU."""
    low: Tensor
    """(b,) float32 intensity that becomes 0."""
    high: Tensor
    """(b,) float32 intensity that becomes 1."""
    spacing_mm: tuple[float, ...]
    """Voxel size along the axes of `voxels`."""
    centre: tuple[float, ...] = ()
    """Centre of a patch, in voxels; empty for slices, which are centred already."""


@dataclass(frozen=True)
class Replaced:
    """A damaged sample and its replacement."""

    shard: str
    sample: int
    by: int
    error: str


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    groups: tuple[Group, ...]
    """The samples as stored."""
    positions: NDArray[np.int64]
    """(B,) positions of the samples in the corpora: keys for augmentation."""
    epochs: NDArray[np.int64]
    """(B,) completed passes over the sample's corpus: also keys for augmentation."""
    image: ImageConfig
    """The network's grid."""
    wait_s: float = 0.0
    """Time that the consumer waited for this batch."""
    num_ready: int = 0
    """Further batches that were ready at that moment."""
    replaced: tuple[Replaced, ...] = field(default=(), compare=False)
    """Samples that were damaged and replaced."""

    @property
    def spacing_mm(self) -> float:
        """Pixel size of `images`."""
        return self.image.spacing_mm

    def images(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Compute the network's input on a device.

        Returns:
            (B, 1, *S) float32 in [0, 1]; and (B, *S) bool, True inside the scan.
        """
        device = torch.device(device)
        size, target_mm = self.image.size, self.image.spacing_mm
        shape = [size] * self.image.dimensions
        images = torch.zeros(len(self.positions), 1, *shape, device=device)
        insides = torch.zeros(len(self.positions), *shape, dtype=torch.bool, device=device)
        for group in self.groups:
            voxels, low, high = (to_device(tensor, device) for tensor in (group.voxels, group.low, group.high))
            every = (slice(None), *[None] * (voxels.ndim - 1))
            prepared = normalise(voxels, low[every], high[every])
            if self.image.dimensions == 2:
                index = to_device(group.index, device)
                rows, columns = group.spacing_mm
                images[index], insides[index] = to_grid(
                    prepared[:, None], (rows, columns), target_mm=target_mm, size=size
                )
            else:
                (place,) = group.index.tolist()
                images[place, 0], insides[place] = to_patch(
                    prepared[0], group.centre, spacing_mm=group.spacing_mm, target_mm=target_mm, size=size
                )
        return images, insides
