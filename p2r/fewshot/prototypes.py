"""Features of a few labelled scans -> prototypes of each class: segmentation without training.

The prototype of a class is the mean direction of its pixels' features, a point on the unit sphere. The background is
heterogeneous, so its pixels are split by k-means on the sphere, initialised by k-means++. A pixel gets the class of the
prototype with the largest cosine similarity (`p2r.model.heads.PrototypeHead`).

Shapes: P images; *S their sides; F features; n pixels

Source: Snell et al. 2017 (class means as prototypes); Dhillon and Modha 2001 (k-means on the sphere).
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from p2r.errors import DataError

_MAX_BACKGROUND_PIXELS = 20_000
_NUM_ITERATIONS = 20


def class_prototypes(
    images: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    num_classes: int,
    background_prototypes: int,
    generator: np.random.Generator,
) -> list[Tensor]:
    """Compute the prototypes of every class.

    Args:
        images: For each labelled scan: features (P, F, *s), on its grid or coarser; labels (P, *S); and inside (P, *S) bool.
            The computation is restricted to the pixels inside.
        num_classes: Number of classes, including background.
        background_prototypes: Maximum number of background prototypes.
        generator: Random generator for the sampled background pixels and the initial centres.

    Returns:
        Unit vectors (n, F) of each class, background first.

    Raises:
        DataError: if a class has no pixels in the images.
    """
    sums: list[Tensor | None] = [None] * num_classes
    background = []
    for features, labels, inside in images:
        for maps, label, is_scan in zip(features, labels, inside, strict=True):
            whole = maps[None]
            if whole.shape[2:] != label.shape:
                mode = "bilinear" if label.ndim == 2 else "trilinear"
                whole = F.interpolate(whole, size=label.shape, mode=mode, align_corners=False)
            directions = F.normalize(whole[0].flatten(1), dim=0).T  # (n, F)
            flat = torch.where(is_scan, label, -1).flatten()
            for value in range(1, num_classes):
                class_sum = directions[flat == value].sum(0)
                previous = sums[value]
                sums[value] = class_sum if previous is None else previous + class_sum
            background.append(_sample_tenth(directions[flat == 0], generator))
    missing = [str(value) for value in range(1, num_classes) if sums[value] is None or not sums[value].any()]  # type: ignore[union-attr]
    if missing or not any(len(pixels) for pixels in background):
        raise DataError(
            f"the labelled patients have no pixel of class {', '.join(missing) or '0'}, so it has no prototype; "
            "use another seed, or more patients"
        )
    centres = _spherical_k_means(torch.cat(background), background_prototypes, generator)
    return [centres, *(F.normalize(total[None], dim=1) for total in sums[1:] if total is not None)]


def _sample_tenth(directions: Tensor, generator: np.random.Generator) -> Tensor:
    """Sample a tenth of the pixels of one image, because neighbouring pixels are redundant."""
    count = -(-len(directions) // 10)
    chosen = generator.choice(len(directions), size=count, replace=False) if count else np.zeros(0, np.int64)
    return directions[torch.from_numpy(np.sort(chosen))]


def _spherical_k_means(directions: Tensor, num_centres: int, generator: np.random.Generator) -> Tensor:
    """Cluster unit vectors around at most `num_centres` unit vectors (n, F)."""
    if len(directions) > _MAX_BACKGROUND_PIXELS:
        chosen = generator.choice(len(directions), size=_MAX_BACKGROUND_PIXELS, replace=False)
        directions = directions[torch.from_numpy(np.sort(chosen))]
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
