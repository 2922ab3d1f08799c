"""Unlabelled scans of another contrast than the labelled ones: single scans, and all of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from p2r.fewshot.odd_scans import odd_scans


def scan(seed: int, *, is_inverted: bool) -> Any:
    images = 0.1 + 0.2 * torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(seed))
    images = 1 - images if is_inverted else images
    return SimpleNamespace(images=images, inside=torch.ones(3, 20, 20, dtype=torch.bool), spacing_mm=(2.0, 2.0))


@pytest.mark.parametrize("num_inverted", [0, 1, 3, 6])
def test_scans_of_another_contrast_are_named_also_if_they_are_the_majority(num_inverted: int) -> None:
    unlabelled = {f"scan-{seed}": scan(seed, is_inverted=seed <= num_inverted) for seed in range(1, 7)}
    warnings = odd_scans([scan(0, is_inverted=False)], unlabelled)
    assert len(warnings) == (num_inverted > 0)
    for warning in warnings:
        have = "scan has" if num_inverted == 1 else "scans have"
        assert warning.startswith(f"{num_inverted} unlabelled {have} other intensities than the labelled ones")
