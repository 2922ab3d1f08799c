"""A batch as stored in the shards -> the network's input, on the device.

Samples arrive as integers, each scan on its own grid. Intensities are normalised and grids resampled on the network's
device: this costs almost nothing on a GPU, and only a quarter of the bytes cross the bus.

Shapes: B samples of this rank; C contrasts; S = H W pixels of slices, or X Y Z voxels of patches; S' on a scan's own grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import ImageConfig
from p2r.data.grids import to_grid, to_patch
from p2r.data.preprocess import normalise
from p2r.device import to_device

_COVERED = 0.9999  # 1 up to rounding


@dataclass(frozen=True)
class Group:
    """Samples of a batch that share one grid, as stored; each contrast of a sample by itself."""

    index: Tensor
    """(b,) positions among the B * C channels of the batch: sample * C + contrast. If other frames were read, among B * 2C: a sample's C
    contrasts of its own frame, then those of the other."""
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
    covered: Tensor | None = None
    """(b, *S') bool: voxels inside the scan as acquired, for contrasts that do not cover all of their session's grid; None: all."""


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
    contrasts: tuple[str, ...] | None = None
    """Names of the channels of an image; None: one contrast without a name."""
    present: NDArray[np.bool_] | None = None
    """(B, C): contrasts that each sample has; None: all."""
    has_other_frame: NDArray[np.bool_] | None = None
    """(B,): samples with voxels of another frame of their series, for view b; None: no other frames were read."""

    @property
    def num_channels(self) -> int:
        """C."""
        return 1 if self.contrasts is None else len(self.contrasts)

    @property
    def spacing_mm(self) -> float:
        """Pixel size of `images`."""
        return self.image.spacing_mm

    def images(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Compute the network's input on a device.

        Returns:
            (B, C, *S) float32 in [0, 1], zero for missing contrasts; and (B, *S) bool, True inside the scan.
        """
        images, inside, _, _ = self.prepare_frames(device)
        return images, inside

    def prepare(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the result of `images`, and the pixels that each contrast covers.

        Returns:
            Images and mask as `images`; and (B, C, *S) bool, True inside the scan as acquired, or None if this equals the mask for
            every contrast that is there.
        """
        return self.prepare_frames(device)[:3]

    def prepare_frames(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Compute the result of `prepare`, and the images of the other frames.

        Returns:
            As `prepare`; and (B, C, *S), images of another frame of each sample's series, or of the same frame where there is no other.
            None if no other frames were read.
        """
        device = torch.device(device)
        size, target_mm = self.image.size, self.image.spacing_mm
        shape = [size] * self.image.dimensions
        channels = self._width
        images = torch.zeros(len(self.positions) * channels, 1, *shape, device=device)
        insides = torch.zeros(len(self.positions), *shape, dtype=torch.bool, device=device)
        uncovered: list[tuple[Tensor, Tensor]] = []
        for group in self.groups:
            voxels, low, high = (to_device(tensor, device) for tensor in (group.voxels, group.low, group.high))
            every = (slice(None), *[None] * (voxels.ndim - 1))
            prepared = normalise(voxels, low[every], high[every])
            if self.image.dimensions == 2:
                index = to_device(group.index, device)
                rows, columns = group.spacing_mm
                images[index], insides[index // channels] = to_grid(
                    prepared[:, None], (rows, columns), target_mm=target_mm, size=size
                )
            else:
                (place,) = group.index.tolist()
                images[place, 0], insides[place // channels] = to_patch(
                    prepared[0], group.centre, spacing_mm=group.spacing_mm, target_mm=target_mm, size=size
                )
            if group.covered is not None:
                uncovered.append((group.index, self._cover(group, device)))
        images = images.reshape(len(self.positions), channels, *shape)
        covered = self._join_covered(insides, uncovered)[:, : self.num_channels] if uncovered else None
        if self.has_other_frame is None:
            return images, insides, covered, None
        first, other = images.chunk(2, dim=1)
        has_other = to_device(torch.from_numpy(self.has_other_frame), device).reshape(-1, 1, *[1] * len(shape))
        return first, insides, covered, torch.where(has_other, other, first)

    @property
    def _width(self) -> int:
        """Images of a sample: contrasts, times frames."""
        return self.num_channels * (1 if self.has_other_frame is None else 2)

    def _cover(self, group: Group, device: torch.device) -> Tensor:
        """Return the pixels (b, *S) that a group's contrasts cover; a pixel interpolated from a voxel outside does not count."""
        assert group.covered is not None
        covered = to_device(group.covered, device).float()
        if self.image.dimensions == 2:
            rows, columns = group.spacing_mm
            mask, _ = to_grid(covered[:, None], (rows, columns), target_mm=self.image.spacing_mm, size=self.image.size)
            return mask[:, 0] > _COVERED
        mask, _ = to_patch(
            covered[0],
            group.centre,
            spacing_mm=group.spacing_mm,
            target_mm=self.image.spacing_mm,
            size=self.image.size,
        )
        return mask[None] > _COVERED

    def _join_covered(self, insides: Tensor, uncovered: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        covered = insides[:, None].repeat(1, self._width, *[1] * self.image.dimensions)
        flat = covered.flatten(0, 1)
        for index, mask in uncovered:
            flat[to_device(index, flat.device)] &= mask
        return covered
