r"""Embeddings of pixel pairs -> InfoNCE within each image: a pixel is told apart from the other pixels of its own image alone.

Across images, the same anatomy of two patients would be a negative of itself: false, and the more of them the larger the
batch. Within an image, what tells pixels apart is where they lie in the anatomy, which patients share. The price are
fewer negatives, and nothing that asks patients to be alike either.

Candidates, forms and the decoupled variant are those of `info_nce`, of which this is the sum over images. As images have
few pixels, similarities are held for one image at a time, in the backward pass again. A GPU takes so many images at once
that one matrix of their similarities has 64 MiB: launching kernels image by image would take longer than running them.

Source: the local loss of Chaitanya et al. 2020 (negatives of the same image), arXiv:2006.10511.

Shape letters: B images of this rank, n pixel pairs of each, E embedding channels, D spatial dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from p2r.loss.info_nce import Form, number_in, refuse_form_and_temperature
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

_ENTRIES_AT_ONCE = 2**24
_NEVER = -1e30  # of a similarity: finite, so that a pixel without negatives has a gradient of zero and not of NaN


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
    """Contrast every pixel pair with the others of its image.

    Args:
        queries: (B * n, E) embeddings of pixels in view a, image after image; any length, normalised inside.
        keys: (B * n, E) embeddings of the same places in view b.
        num_images: B.
        temperature: Width of the softmax over cosine similarities, > 0. A tensor of one element is learnt.
        form: Which candidates an anchor has, see `p2r.loss.info_nce`.
        decoupled: Leave the positive out of the denominator.
        weights: (B * n,) of each pair in the mean, >= 0. A pair of weight 0 takes no part, not even as a negative.
        position_mm: (B * n, D) where each pair lies in its image, mm; wanted where there is a radius.
        radius_mm: Pixels at most this far apart are no negatives of one another.
        group: Ranks over whose pairs the mean is taken.
        gradient_scale: What the caller's reducer does with the ranks' gradients.
        findings: Where to keep what is wrong with values on a device, instead of waiting for it.
        parts: Receives what the loss is made of; see `info_nce`.

    Returns:
        Scalar, nats: the mean over all ranks' pairs, the same on every rank. A pair without negatives costs nothing.

    Raises:
        ValueError: On every rank, if an argument on any rank breaks a rule.
        EmbeddingError: On every rank, if embeddings on any are not finite or rows of zeros.
    """
    factor = own_gradient_factor(gradient_scale, group)
    problem: ValueError | None = None
    try:
        must_not_wait = isinstance(temperature, Tensor) and postpones(findings, temperature)
        refuse_form_and_temperature(form, temperature, None if must_not_wait else number_in(temperature))
        refuse_pair(queries=queries, keys=keys)
        if num_images < 1 or len(queries) % num_images:
            raise ValueError(f"{len(queries)} pixel pairs do not divide into {num_images} images")
        if radius_mm and (position_mm is None or len(position_mm) != len(queries)):
            raise ValueError("radius_mm needs position_mm, one for each pixel pair")
        if weights is not None:
            refuse_weights(weights, queries, findings)
            # Rows of no weight may hold anything; of zeros they would have no direction.
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
        by_images = zip(
            *(
                [None] * -(-num_images // at_once)
                if x is None
                else torch.split(x.reshape(num_images, num_pairs, *x.shape[1:]), at_once)
                for x in tensors
            ),
            strict=True,
        )
        costs = [
            checkpoint(
                _costs,
                *of_images,
                1 / temperature,
                form,
                decoupled,
                radius_mm,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for of_images in by_images
        ]
        own, cosine, of_negatives = torch.cat(costs).sum(0)
        if parts is not None:
            own_weight = weight.sum()
            parts["positive"] = torch.stack([cosine.detach(), own_weight])
            parts["negatives"] = torch.stack([of_negatives.detach(), own_weight])
        of_all, total_weight = all_reduce_sum(torch.stack([own.detach(), weight.sum()]), group)
        total_weight = torch.where(total_weight > 0, total_weight, 1)  # of no pair at all, nothing is the mean
        carried = factor * own / total_weight
        loss: Tensor = carried + (of_all / total_weight - carried).detach()
        return loss


def images_at_once(num_pairs: int, *, is_gpu: bool) -> int:
    """Return how many images of `num_pairs` pixel pairs have their similarities held at a time."""
    return max(1, _ENTRIES_AT_ONCE // max(1, num_pairs**2)) if is_gpu else 1


def _costs(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    position_mm: Tensor | None,
    k: float | Tensor,
    form: Form,
    decoupled: bool,
    radius_mm: float,
) -> Tensor:
    """Add up the pairs of each of B images.

    Returns:
        (B, 3) weighted sums: half of the cost of query and key, cosines, half of the log-sum-exps of both over their negatives.
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
    cost, of_negatives = queries.new_zeros(len(queries)), queries.new_zeros(len(queries))
    for similarities in candidates:
        log_sums = torch.logsumexp((k * similarities).masked_fill(excluded, _NEVER), 2)
        x = log_sums - positive
        has_negatives = log_sums > _NEVER / 2
        losses = torch.where(has_negatives, x, 0) if decoupled else torch.logaddexp(x, torch.zeros_like(x))
        cost = cost + (weights * losses).sum(1) / 2
        of_negatives = of_negatives + (weights * torch.where(has_negatives, log_sums, 0)).sum(1) / 2
    return torch.stack([cost, (weights * cosine).sum(1), of_negatives], 1)
