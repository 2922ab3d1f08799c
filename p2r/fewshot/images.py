"""Images of a task's scans on one grid, and the draws of a batch among them: which images, and windows of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import FinetuneConfig
from p2r.data.preprocess import Frames, Planes, Preparation
from p2r.evaluate.tasks import LabelledScan
from p2r.randomness import keyed_generator


@dataclass(frozen=True)
class Images:
    """Images of several scans on one grid, on one device."""

    images: Tensor
    """(P, C, *S) in [0, 1]."""
    inside: Tensor
    """(P, *S) bool: pixels of the scan."""
    labels: Tensor | None
    """(P, *S) int64, with `NOT_COUNTED` for pixels without a pseudo-label; None: unlabelled."""

    @cached_property
    def with_foreground(self) -> NDArray[np.int64]:
        """Indices of the images with labelled foreground."""
        assert self.labels is not None
        return np.flatnonzero(self.labels.flatten(1).gt(0).any(1).numpy(force=True)).astype(np.int64)


def labelled_images(scans: Sequence[LabelledScan]) -> Images:
    """Concatenate the images of scans, padded about their centre, because augmentation rotates and crops about the centre."""
    combined = unlabelled_images([scan.planes for scan in scans])
    size = combined.inside.shape[1:]
    labels = torch.cat([_pad_to_size(scan.label_planes, size) for scan in scans])
    return Images(combined.images, combined.inside, labels)


def unlabelled_images(scans: Sequence[Planes | Frames]) -> Images:
    """Concatenate images without labels, padded about their centre to one size."""
    size = [max(sides) for sides in zip(*(scan.images.shape[2:] for scan in scans), strict=True)]
    return Images(
        torch.cat([_pad_to_size(scan.images, size) for scan in scans]),
        torch.cat([_pad_to_size(scan.inside, size) for scan in scans]),
        None,
    )


def _pad_to_size(maps: Tensor, size: Sequence[int]) -> Tensor:
    missing = [want - have for want, have in zip(size, maps.shape[-len(size) :], strict=True)]
    return F.pad(maps, [amount for side in reversed(missing) for amount in (side // 2, side - side // 2)])


def draw_images(
    config: FinetuneConfig, key: tuple[int | str, ...], num_images: int
) -> tuple[NDArray[np.int64], list[np.random.Generator]]:
    """Draw the images of a batch, and a generator for each."""
    chosen = keyed_generator(config.seed, *key).integers(num_images, size=config.batch_size)
    return chosen, [keyed_generator(config.seed, *key, slot) for slot in range(config.batch_size)]


def prefer_foreground(
    chosen: NDArray[np.int64], labelled: Images, key: tuple[int | str, ...], config: FinetuneConfig
) -> int:
    """Replace the first images of a batch by images with labelled foreground; return the number of images replaced."""
    num_shown = round(config.foreground_share * len(chosen)) if config.foreground_share else 0
    found = labelled.with_foreground if num_shown else chosen[:0]
    if not len(found):
        return 0
    chosen[:num_shown] = found[keyed_generator(config.seed, *key, "foreground").integers(len(found), size=num_shown)]
    return num_shown


def cut_windows(
    source: Images,
    chosen: NDArray[np.int64],
    generators: list[np.random.Generator],
    preparation: Preparation,
    *,
    num_shown: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cut windows of the chosen images, about their centre or, if the model reads whole images, about a random position.

    The windows have twice the edge of the network's image, so that augmentation can rotate and crop about their centre. In the first
    `num_shown` images, the position is a pixel of labelled foreground, as far as the image reaches.
    """
    if preparation.planes == "centre":
        index = torch.from_numpy(chosen)
        return source.images[index], source.inside[index], None if source.labels is None else source.labels[index]
    size = preparation.image_size
    tensors = [source.images, source.inside] if source.labels is None else [source.images, source.inside, source.labels]
    cut = []
    for number, (image, generator) in enumerate(zip(chosen, generators, strict=True)):
        # A window extends beyond the image only as far as necessary: an image that fits is always included whole.
        extents = source.images.shape[2:]
        pixel = _draw_foreground_pixel(source, int(image), generator) if number < num_shown else [None] * len(extents)
        starts = [
            _draw_start(extent, size, generator, at) - size // 2 for extent, at in zip(extents, pixel, strict=True)
        ]
        padding = [
            amount
            for start, extent in zip(reversed(starts), reversed(extents), strict=True)
            for amount in (-start, start + 2 * size - extent)
        ]
        cut.append([F.pad(tensor[int(image)], padding) for tensor in tensors])
    images, inside, *labels = (torch.stack(parts) for parts in zip(*cut, strict=True))
    return images, inside, labels[0] if labels else None


def _draw_start(extent: int, size: int, generator: np.random.Generator, pixel: int | None) -> int:
    """Return the start of a window along an axis: at random, or about a pixel as far as the image reaches."""
    if extent <= size:
        return -((size - extent) // 2)
    if pixel is not None:
        return min(max(0, pixel - size // 2), extent - size)
    return int(generator.integers(extent - size + 1))


def _draw_foreground_pixel(source: Images, image: int, generator: np.random.Generator) -> list[int | None]:
    assert source.labels is not None
    pixels = source.labels[image].gt(0).nonzero()
    found: list[int | None] = pixels[int(generator.integers(len(pixels)))].tolist()
    return found
