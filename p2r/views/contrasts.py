"""The contrasts that each of two views shows, and the names of pairs of contrasts.

    same     both views show the same contrasts: all that the image has, except those dropped at random
    cross    each view shows one contrast: another one, if the image has several
    mixed    same or cross, drawn for each image

Two contrasts of a session are two views of the same anatomy, an appearance change that no augmentation draws.

Letters: B images, C contrasts.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.typing import NDArray

from p2r.config import ViewsConfig
from p2r.views.draws import Draws
from p2r.views.dropout import find_kept

Shown = NDArray[np.bool_]

SEVERAL = "several"
"""Name of the pair of views of which one shows several contrasts."""


def choose_contrasts(present: Shown, draws: Draws, *, config: ViewsConfig) -> tuple[Shown, Shown]:
    """Choose the contrasts of view a and of view b.

    Args:
        present: (B, C), contrasts that each image has.
        draws: Random numbers of B images.
        config: Rules.

    Returns:
        (B, C) for each view; at least one contrast of every image that has any.
    """
    kept = keep_contrasts(present, draws.named("dropout"), dropout=config.contrast_dropout)
    if config.contrasts == "same":
        return kept, kept
    first, second = _choose_two(present, draws.named("cross"))
    if config.contrasts == "cross":
        return first, second
    crosses = draws.uniform("mixed")[:, None] < 0.5
    return np.where(crosses, first, kept), np.where(crosses, second, kept)


def keep_contrasts(present: Shown, draws: Draws, *, dropout: float) -> Shown:
    """Drop each contrast with probability `dropout`, except one drawn contrast of each image."""
    if not dropout:
        return present
    numbers = draws.uniform("contrast", present.shape[1])
    kept: Shown = find_kept(torch.from_numpy(present), torch.from_numpy(numbers), probability=dropout).numpy()
    return kept


def pair_names(contrasts: Sequence[str]) -> list[str]:
    """Return the names of the pairs of contrasts of two views, in the order of `number_pairs`: `flair-t1`, ..., `several`."""
    return [f"{one}-{other}" for one, other in combinations_with_replacement(contrasts, 2)] + [SEVERAL]


def number_pairs(shown_a: Shown, shown_b: Shown) -> NDArray[np.int64]:
    """Return the number (B,) of each image's pair of contrasts: of an unordered pair, or of `several`."""
    num = shown_a.shape[1]
    low = np.minimum(shown_a.argmax(1), shown_b.argmax(1))
    high = np.maximum(shown_a.argmax(1), shown_b.argmax(1))
    number = low * num - low * (low - 1) // 2 + high - low
    is_single = (shown_a.sum(1) <= 1) & (shown_b.sum(1) <= 1)
    numbers: NDArray[np.int64] = np.where(is_single, number, num * (num + 1) // 2).astype(np.int64)
    return numbers


def _choose_two(present: Shown, draws: Draws) -> tuple[Shown, Shown]:
    """Choose one contrast of each image, and another one if it has several."""
    numbers = np.where(present, draws.uniform("contrast", present.shape[1]), -1.0)
    order = np.argsort(-numbers, axis=1, kind="stable")
    rows = np.arange(len(present))
    is_alone = present.sum(1) < 2
    chosen = []
    for place in (order[:, 0], np.where(is_alone, order[:, 0], order[:, min(1, present.shape[1] - 1)])):
        shown = np.zeros_like(present)
        shown[rows, place] = present[rows, place]
        chosen.append(shown)
    return chosen[0], chosen[1]
