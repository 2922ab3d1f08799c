"""Contrast dropout: an image loses some of its contrasts in training, so that a network can do without them.

Letters: B images, C contrasts, D spatial dimensions, *S sizes along them. Source: Havaei et al. 2016 (HeMIS), which trains on
subsets of contrasts.
"""

import torch
from torch import Tensor

from p2r.contrasts import find_present
from p2r.device import on_device
from p2r.views.draws import Draws


def drop_contrasts(image: Tensor, draws: Draws, *, probability: float) -> Tensor:
    """Replace each contrast by zeros with this probability; an image keeps at least one of the contrasts that it has.

    Args:
        image: (B, C, *S); missing contrasts are zero.
        draws: Random numbers of B images.
        probability: Probability for each contrast.
    """
    num_contrasts = image.shape[1]
    if probability == 0 or num_contrasts == 1:
        return image
    number = on_device(draws.uniform("contrast dropout", num_contrasts), image.device)  # (B, C)
    is_kept = find_kept(find_present(image), number, probability=probability)
    return image * is_kept.reshape(*image.shape[:2], *[1] * (image.ndim - 2))


def find_kept(present: Tensor, number: Tensor, *, probability: float) -> Tensor:
    """Return which contrasts are kept, (B, C) bool: at least one of those that an image has.

    Args:
        present: (B, C) bool, contrasts that each image has.
        number: (B, C) drawn numbers, uniform in [0, 1).
        probability: Probability of dropping a contrast.
    """
    last = torch.where(present, number, -1.0).argmax(1, keepdim=True)  # kept if all others are dropped
    return present & ((number >= probability) | (torch.arange(present.shape[1], device=present.device) == last))
