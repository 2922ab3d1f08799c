"""Features of a few labelled scans -> prototypes of each class: segmentation without training.

A prototype is the mean direction of pixels' features, a point on the unit sphere. A class with several prototypes is split by
k-means on the sphere, initialised by k-means++: the background is heterogeneous, and an organ looks different near its border,
base and apex. A pixel gets the class of the prototype with the largest cosine similarity (`p2r.model.heads.PrototypeHead`).
All features share a direction that says nothing about the class, so the mean of the class means is subtracted first.

Shapes: P images; *S their sides; F features; n pixels

Sources: Snell et al. 2017 (class means as prototypes); Dhillon and Modha 2001 (k-means on the sphere); Wang et al. 2019 (SimpleShot:
centred features).
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from p2r.errors import DataError

_MAX_PIXELS = 20_000
_MAX_PIXELS_OF_IMAGE = 2_000  # of a class other than the background
_NUM_ITERATIONS = 20


def class_prototypes(
    images: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    num_classes: int,
    prototypes_per_class: int,
    background_prototypes: int,
    generator: np.random.Generator,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the prototypes of every class, and the centre to which they refer.

    Args:
        images: For each labelled scan: features (P, F, *s), on its grid or coarser; labels (P, *S); and inside (P, *S) bool.
            The computation is restricted to the pixels inside.
        num_classes: Number of classes, including background.
        prototypes_per_class: Maximum number of prototypes of each class but the background. 1: its mean direction.
        background_prototypes: Maximum number of background prototypes.
        generator: Random generator for the sampled pixels and the initial centres.

    Returns:
        The centre (F,): mean over the classes of the mean direction of their pixels. And unit vectors (n, F) of each class, background
        first, of directions relative to the centre.

    Raises:
        DataError: if a class has no pixels in the images.
    """
    pixels: list[list[Tensor]] = [[] for _ in range(num_classes)]
    for features, labels, inside in images:
        for maps, label, is_scan in zip(features, labels, inside, strict=True):
            whole = maps[None]
            if whole.shape[2:] != label.shape:
                mode = "bilinear" if label.ndim == 2 else "trilinear"
                whole = F.interpolate(whole, size=label.shape, mode=mode, align_corners=False)
            directions = F.normalize(whole[0].flatten(1), dim=0).T  # (n, F)
            flat = torch.where(is_scan, label, -1).flatten()
            for value in range(num_classes):
                of_class = directions[flat == value]
                # Neighbouring pixels are redundant, and the background has most of them.
                at_most = -(-len(of_class) // 10) if value == 0 else _MAX_PIXELS_OF_IMAGE
                pixels[value].append(_sample_pixels(of_class, at_most, generator))
    missing = [str(value) for value, found in enumerate(pixels) if not any(map(len, found))]
    if missing:
        raise DataError(
            f"the labelled patients have no pixel of class {', '.join(missing)}, so it has no prototype; "
            "use another seed, or more patients"
        )
    numbers = [background_prototypes] + [prototypes_per_class] * (num_classes - 1)
    by_class = [torch.cat(found) for found in pixels]
    centre = torch.stack([found.mean(0) for found in by_class]).mean(0)
    return centre, [
        _spherical_k_means(F.normalize(found - centre, dim=1), number, generator)
        for found, number in zip(by_class, numbers, strict=True)
    ]


def _sample_pixels(directions: Tensor, at_most: int, generator: np.random.Generator) -> Tensor:
    """Sample pixels without replacement, if there are more than `at_most`."""
    if len(directions) <= at_most:
        return directions
    chosen = generator.choice(len(directions), size=at_most, replace=False)
    return directions[torch.from_numpy(np.sort(chosen))]


def _spherical_k_means(directions: Tensor, num_centres: int, generator: np.random.Generator) -> Tensor:
    """Cluster unit vectors around at most `num_centres` unit vectors (n, F); one centre is the mean direction of all."""
    if num_centres == 1:
        return F.normalize(directions.sum(0, keepdim=True), dim=1)
    directions = _sample_pixels(directions, _MAX_PIXELS, generator)
    centres = directions[[int(generator.integers(len(directions)))]]
    while len(centres) < min(num_centres, len(directions)):  # k-means++: far from previous centres
        distances = (1 - (directions @ centres.T).amax(1)).clamp_min(0).double().numpy()
        if distances.sum() <= 0:
            break
        drawn = int(generator.choice(len(directions), p=distances / distances.sum()))
        centres = torch.cat([centres, directions[[drawn]]])
    for _ in range(_NUM_ITERATIONS):
        nearest = (directions @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, directions)
        counts = torch.bincount(nearest, minlength=len(centres))
        centres = torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), centres)
    return centres
