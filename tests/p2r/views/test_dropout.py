"""Contrast dropout: an image loses contrasts at the given rate, never all, and independently of its batch."""

import numpy as np
import pytest
import torch

from p2r.config import GeometryConfig, IntensityConfig, ViewsConfig
from p2r.contrasts import find_present
from p2r.views.draws import Draws
from p2r.views.dropout import drop_contrasts
from p2r.views.pair import augment_labelled, augment_weakly_and_strongly

NUM = 3000


def draws(num: int) -> Draws:
    return Draws.of_samples(0, epochs=np.zeros(num, dtype=np.int64), positions=np.arange(num))


def test_contrasts_are_dropped_at_their_rate_and_one_always_stays() -> None:
    image = torch.rand(NUM, 3, 2, 2) + 0.1
    image[::2, 0] = 0
    kept = drop_contrasts(image, draws(NUM), probability=0.6)
    found = find_present(kept)
    assert found.any(1).all() and not found[::2, 0].any()
    assert torch.equal(kept, image * found[:, :, None, None])
    # Of three, one stays although all were drawn to be dropped with probability 0.6 ** 3.
    assert abs(found[1::2].float().mean() - (0.4 + 0.6**3 / 3)) < 0.03
    assert abs(found[::2, 1:].float().mean() - (0.4 + 0.6**2 / 2)) < 0.03


@pytest.mark.parametrize(("num_contrasts", "probability"), [(1, 0.9), (3, 0.0)])
def test_one_contrast_or_no_probability_changes_nothing(num_contrasts: int, probability: float) -> None:
    image = torch.rand(5, num_contrasts, 4, 4)
    assert drop_contrasts(image, draws(5), probability=probability) is image


def test_an_image_loses_the_same_contrasts_in_any_batch() -> None:
    image = torch.rand(9, 4, 3, 3)
    together = drop_contrasts(image, draws(9), probability=0.5)
    alone = drop_contrasts(image[7:8], Draws(draws(9).keys[7:8]), probability=0.5)
    assert torch.equal(together[7:8], alone)


def test_labelled_images_and_strong_views_lose_contrasts_and_weak_ones_do_not() -> None:
    image, inside = torch.rand(64, 2, 16, 16) * 0.9 + 0.1, torch.ones(64, 16, 16, dtype=torch.bool)
    geometry, intensity = GeometryConfig(flip_probability=0), IntensityConfig(inversion_probability=0)
    config = ViewsConfig(geometry=geometry, intensity=intensity, contrast_dropout=0.5)
    generators = [np.random.default_rng(number) for number in range(64)]
    labelled, _ = augment_labelled(
        image, inside.long(), config=config, size=16, spacing_mm=1.0, generators=generators, inside=inside
    )
    views = augment_weakly_and_strongly(
        image,
        inside,
        geometry=geometry,
        intensity=intensity,
        size=16,
        spacing_mm=1.0,
        generators=generators,
        contrast_dropout=0.5,
    )
    assert find_present(views.weak).all()
    for view in (labelled, *views.strong):
        found = find_present(view)
        assert found.any(1).all() and 0.4 < found.float().mean() < 0.9
    assert not torch.equal(find_present(views.strong[0]), find_present(views.strong[1]))
