r"""Embeddings of pixel pairs -> InfoNCE within each image: the negatives of a pixel come only from its own image.

Across images, the same anatomy in two patients would be a false negative, more often in larger batches. Within an image,
pixels differ by their anatomical position, which patients have in common. The price is fewer negatives; and no term makes
patients similar, either.

Candidates, forms and the decoupled variant are as in `info_nce`; the loss is the mean over the pairs of all images. Images
have few pixels, so similarities are stored for one image at a time and recomputed in the backward pass. On a GPU, images are
batched until one similarity matrix has 64 MiB, because launching kernels per image would take longer than running them.

Source: the local loss of Chaitanya et al. 2020 (negatives of the same image), arXiv:2006.10511.

Shape letters: B images of this rank, n pixel pairs of each, E embedding channels, D spatial dimensions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from p2r.loss.arguments import number_in, refuse_form_and_temperature
from p2r.loss.contrast import Form
from p2r.loss.ranks import (
    Findings,
    GradientScale,
    agree,
    all_reduce_sum,
    own_gradient_factor,
    postpones,
    refuse_pair,
    refuse_values,
    refuse_weights,
)

_MAX_ENTRIES = 2**24
_EXCLUDED = -1e30  # logit of an excluded candidate: finite, so that a pixel without negatives has gradient 0, not NaN


def info_nce_within_images(
    queries: Tensor,
    keys: Tensor,
    *,
    num_images: int,
    temperature: float | Tensor,
    form: Form = "cross_view",
    decoupled: bool = False,
    weights: Tensor | None = None,
    position_mm: Tensor | None = None,
    radius_mm: float = 0.0,
    group: ProcessGroup | None = None,
    gradient_scale: GradientScale = "mean",
    findings: Findings | None = None,
    parts: dict[str, Tensor] | None = None,
) -> Tensor:
    """Contrast every pixel pair with the other pairs of its image.

    Args:
        queries: (B * n, E) embeddings of pixels in view a, image by image; normalised inside.
        keys: (B * n, E) embeddings of the same positions in view b.
        num_images: B.
        temperature: Temperature of the softmax over cosine similarities, > 0. A tensor of one element is learnt.
        form: Candidates of an anchor, see `p2r.loss.info_nce`.
        decoupled: Leave the positive out of the denominator.
        weights: (B * n,) weight of each pair in the mean, >= 0. Pairs of weight 0 are excluded, also as negatives.
        position_mm: (B * n, D) position of each pair in its image, mm; required with a radius.
        radius_mm: Pixels within this distance are not negatives of each other.
        group: Ranks whose pairs the mean includes.
        gradient_scale: Reduction of gradients over ranks by the caller.
        findings: Collects invalid values on a device without synchronising.
        parts: Receives the components of the loss; see `info_nce`.

    Returns:
        Scalar, nats: the mean over all ranks' pairs, the same on every rank. A pair without negatives has zero loss.

    Raises:
        ValueError: on every rank, if an argument on any rank breaks a rule.
        EmbeddingError: on every rank, if embeddings on any rank are not finite or all zeros.
    """
    factor = own_gradient_factor(gradient_scale, group)
    problem: ValueError | None = None
    try:
        must_not_wait = isinstance(temperature, Tensor) and postpones(findings, temperature)
        refuse_form_and_temperature(form, temperature, None if must_not_wait else number_in(temperature))
        refuse_pair(queries=queries, keys=keys)
        _refuse_images(len(queries), num_images, position_mm, radius_mm)
        if weights is not None:
            refuse_weights(weights, queries, findings)
            # Rows of weight 0 may hold anything, including zeros, which have no direction.
            queries, keys = (torch.where(weights[:, None] > 0, rows, 1.0) for rows in (queries, keys))
        refuse_values(queries=queries, keys=keys, findings=findings)
    except ValueError as error:
        problem = error
    if not postpones(findings, queries):
        agree(problem, len(queries) if queries.ndim else 0, {}, device=queries.device, group=group)
    elif problem is not None:
        raise problem

    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        rows = [F.normalize(tower.to(dtype), dim=1) for tower in (queries, keys)]
        weight = torch.ones(len(queries), dtype=dtype, device=queries.device) if weights is None else weights.to(dtype)
        num_pairs = len(queries) // num_images
        at_once = images_at_once(num_pairs, is_gpu=queries.device.type == "cuda")
        tensors = (*rows, weight, position_mm if radius_mm else None)
        by_images = zip(*(_split_images(x, num_images, num_pairs, at_once) for x in tensors), strict=True)
        losses = [
            checkpoint(
                _sum_losses,
                *image_tensors,
                1 / temperature,
                form,
                decoupled,
                radius_mm,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for image_tensors in by_images
        ]
        own, cosine, negatives = torch.cat(losses).sum(0)
        if parts is not None:
            own_weight = weight.sum()
            parts["positive"] = torch.stack([cosine.detach(), own_weight])
            parts["negatives"] = torch.stack([negatives.detach(), own_weight])
        total, total_weight = all_reduce_sum(torch.stack([own.detach(), weight.sum()]), group)
        total_weight = torch.where(total_weight > 0, total_weight, 1)  # without any pair the mean is 0, not 0 / 0
        differentiable = factor * own / total_weight
        loss: Tensor = differentiable + (total / total_weight - differentiable).detach()
        return loss


def _refuse_images(num_pairs: int, num_images: int, position_mm: Tensor | None, radius_mm: float) -> None:
    if num_images < 1 or num_pairs % num_images:
        raise ValueError(f"{num_pairs} pixel pairs do not divide into {num_images} images")
    if radius_mm and (position_mm is None or len(position_mm) != num_pairs):
        raise ValueError("radius_mm needs position_mm, one for each pixel pair")


def _split_images(x: Tensor | None, num_images: int, num_pairs: int, at_once: int) -> Sequence[Tensor | None]:
    """Split (B * n, ...) into parts of (up to `at_once`, n, ...); None: one None per part."""
    if x is None:
        return [None] * -(-num_images // at_once)
    return torch.split(x.reshape(num_images, num_pairs, *x.shape[1:]), at_once)


def images_at_once(num_pairs: int, *, is_gpu: bool) -> int:
    """Return the number of images whose similarities are computed together, each with `num_pairs` pixel pairs."""
    return max(1, _MAX_ENTRIES // max(1, num_pairs**2)) if is_gpu else 1


def _sum_losses(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    position_mm: Tensor | None,
    k: float | Tensor,
    form: Form,
    decoupled: bool,
    radius_mm: float,
) -> Tensor:
    """Sum over the pairs of each of B images.

    Returns:
        (B, 3) weighted sums over pairs: mean loss of query and key, cosine similarity of the pair, and mean log-sum-exp of
        query and key over their negatives.
    """
    num = queries.shape[1]
    excluded = torch.eye(num, dtype=torch.bool, device=queries.device) | (weights == 0)[:, None]  # (B, n, n)
    if position_mm is not None:
        excluded |= torch.cdist(position_mm, position_mm, compute_mode="donot_use_mm_for_euclid_dist") <= radius_mm
    across = queries @ keys.mT
    cosine = across.diagonal(dim1=1, dim2=2)
    positive = k * cosine
    candidates = [across, across.mT]  # of queries, of keys
    if form == "nt_xent":
        candidates = [torch.cat([across, queries @ queries.mT], 2), torch.cat([across.mT, keys @ keys.mT], 2)]
        excluded = excluded.repeat(1, 1, 2)
    loss, negatives = queries.new_zeros(len(queries)), queries.new_zeros(len(queries))
    for similarities in candidates:
        log_sums = torch.logsumexp((k * similarities).masked_fill(excluded, _EXCLUDED), 2)
        x = log_sums - positive
        has_negatives = log_sums > _EXCLUDED / 2
        losses = torch.where(has_negatives, x, 0) if decoupled else torch.logaddexp(x, torch.zeros_like(x))
        loss = loss + (weights * losses).sum(1) / 2
        negatives = negatives + (weights * torch.where(has_negatives, log_sums, 0)).sum(1) / 2
    return torch.stack([loss, (weights * cosine).sum(1), negatives], 1)
