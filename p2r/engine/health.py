"""Metrics of a step's embeddings that tell a useful representation from a collapsed one.

    alignment                 mean squared distance of the two unit embeddings of a pair: 0 perfect, 2 unrelated
    uniformity                log of the mean of exp(-2 d^2) over pairs of different pixels, d their distance on the unit
                              sphere: 0 collapsed, towards -4 spread evenly over many dimensions
    effective_rank            exp of the entropy of the normalised singular values: number of dimensions in use
    dead_dimensions_fraction  fraction of channels in which unit embeddings hardly differ: standard deviation below a
                              hundredth of its value for an even spread

They are computed from at most about a thousand pairs, sampled equally from all images. The choice does not depend on how a
step is split over ranks and micro-batches.

Source: Wang and Isola 2020, arXiv:2005.10242 (alpha 2, t 2); Garrido et al. 2023 (RankMe), arXiv:2210.02885.

Shape letters: B images, n pixel pairs per image, m of them sampled, M sampled from all images, E embedding channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_PAIRS = 1024
_DEAD = 0.01


def sample_pairs(queries: Tensor, keys: Tensor, weights: Tensor, *, pairs_per_image: int, global_batch: int) -> Tensor:
    """Sample some of this rank's pairs, without waiting for their device.

    Args:
        queries: (B * n, E), image by image.
        keys: (B * n, E).
        weights: (B * n,) 0 for pairs without content.
        pairs_per_image: n.
        global_batch: Number of images over all ranks.

    Returns:
        (B * m, 2E + 1) float32: query, key, weight.
    """
    stride = -(-pairs_per_image // max(1, _MOST_PAIRS // global_batch))
    rows = torch.cat([queries.detach().float(), keys.detach().float(), weights.float()[:, None]], 1)
    return rows.view(-1, pairs_per_image, rows.shape[1])[:, ::stride].flatten(0, 1)


def embedding_health(pairs: Tensor) -> dict[str, float] | None:
    """Compute the metrics above.

    Args:
        pairs: (M, 2E + 1) of all ranks, from `sample_pairs`, on the CPU.

    Returns:
        The metrics, or None if fewer than two pairs have content, or one of their embeddings is not finite.
    """
    present = pairs[pairs[:, -1] > 0, :-1].double()
    if len(present) < 2 or not torch.isfinite(present).all():
        return None
    queries, keys = (F.normalize(rows, dim=1) for rows in present.chunk(2, dim=1))
    units = torch.cat([queries, keys])  # (2M, E)
    shares = torch.linalg.svdvals(units)
    shares = shares / shares.sum()
    spread = units.std(0, correction=0) * math.sqrt(units.shape[1])
    return {
        "alignment": float((queries - keys).square().sum(1).mean()),
        "uniformity": sum(float((-2 * torch.pdist(tower).square()).exp().mean().log()) for tower in (queries, keys))
        / 2,
        "effective_rank": float(torch.special.entr(shares).sum().exp()),
        "dead_dimensions_fraction": float((spread < _DEAD).double().mean()),
    }
