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
from collections.abc import Sequence

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
    stride = sampling_stride(pairs_per_image, global_batch)
    rows = torch.cat([queries.detach().float(), keys.detach().float(), weights.float()[:, None]], 1)
    return rows.view(-1, pairs_per_image, rows.shape[1])[:, ::stride].flatten(0, 1)


def sampling_stride(pairs_per_image: int, global_batch: int) -> int:
    """Return the distance between sampled pairs of an image."""
    return -(-pairs_per_image // max(1, _MOST_PAIRS // global_batch))


def health_by_contrasts(
    pairs: Tensor, numbers: Tensor, *, names: Sequence[str], temperature: float | None
) -> dict[str, dict[str, float]]:
    """Compute the metrics of each pair of contrasts, from the sampled pairs.

    Args:
        pairs: (M, 2E + 1) of all ranks, as for `embedding_health`.
        numbers: (M,) number of the pair of contrasts of each.
        names: Name of each number, from `p2r.views.contrasts.pair_names`.
        temperature: tau of InfoNCE; None: the objective is another one.

    Returns:
        By name: `pairs`, their number; `equivariance_error`, the deviation from the warp relative to pairs of different pixels of the
        same contrasts, as for the whole step. `loss` (InfoNCE only), the mean cost of finding the pixel's partner among all sampled
        pixels of the other view, nats, which are fewer than in training. Also the metrics of `embedding_health`. Pairs of contrasts
        with fewer than two pixel pairs are left out.
    """
    has_content = pairs[:, -1] > 0
    present, of = pairs[has_content], numbers[has_content]
    if len(present) < 2 or not torch.isfinite(present).all():
        return {}
    queries, keys = (F.normalize(rows, dim=1) for rows in present[:, :-1].double().chunk(2, dim=1))
    cosines = queries @ keys.T  # (M', M')
    found = {}
    for number in sorted(set(of.tolist())):
        rows = of == number
        count = int(rows.sum())
        if count < 2:
            continue
        block = cosines[rows][:, rows]
        of_pairs = float(block.diagonal().mean())
        of_others = (float(block.sum()) - count * of_pairs) / (count * (count - 1))
        metrics = {"pairs": float(count), "equivariance_error": max(0.0, 1 - of_pairs) / max(1 - of_others, 1e-6)}
        if temperature is not None:
            chances = (cosines[rows] / temperature).log_softmax(1), (cosines[:, rows] / temperature).log_softmax(0)
            own = torch.nonzero(rows)[:, 0]
            along = torch.arange(count)
            metrics["loss"] = -float(chances[0][along, own].mean() + chances[1][own, along].mean()) / 2
        found[names[number]] = metrics | (embedding_health(present[rows]) or {})
    return found


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
