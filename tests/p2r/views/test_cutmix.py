"""A box of one image replaces the box of another, along with its labels and masks."""

import math

import numpy as np
import pytest
import torch

from p2r.randomness import keyed_generator
from p2r.views import Draws, Labelled, draw_boxes, exchange


def draws(number: int) -> Draws:
    return Draws.of_generators([keyed_generator(0, "box", index) for index in range(number)])


@pytest.mark.parametrize("size", [(112, 96), (40, 32, 36)])
def test_boxes_have_2_to_40_percent_of_the_image_and_no_long_edge(size: tuple[int, ...]) -> None:
    boxes = draw_boxes(draws(300), size=size)
    fractions = boxes.flatten(1).float().mean(1)
    assert 0.01 < fractions.min() < 0.04 and 0.36 < fractions.max() < 0.45
    for box, fraction in zip(boxes, fractions, strict=True):
        places = box.nonzero()
        edges = places.amax(0) - places.amin(0) + 1
        assert int(edges.prod()) == int(box.sum()), "a box is full"
        parts = edges / torch.tensor(size)
        # Rounding to a pixel changes the ratio of the shortest edges most.
        assert parts.max() / parts.min() < 1 / 0.3 * 1.3, (edges, fraction)
    assert boxes.any(0).float().mean() > 0.95, "boxes are everywhere"


def test_an_images_box_does_not_depend_on_the_rest_of_the_batch() -> None:
    many, of_one = draws(5), draws(5).take(np.array([3]))
    assert torch.equal(draw_boxes(many, size=(20, 30))[3:4], draw_boxes(of_one, size=(20, 30)))


@pytest.mark.parametrize("size", [(8, 6), (8, 6, 4)])
def test_label_and_mask_are_exchanged_with_the_pixels_of_a_box(size: tuple[int, ...]) -> None:
    ground = Labelled(
        torch.zeros(2, 1, *size), torch.zeros(2, *size, dtype=torch.int64), torch.ones(2, *size, dtype=torch.bool)
    )
    classes = torch.arange(1, 1 + 2 * math.prod(size)).reshape(2, *size)
    patch = Labelled(classes[:, None].float(), classes, classes % 2 == 0)
    box = draw_boxes(draws(2), size=size)
    found = exchange(ground, patch, box)
    assert torch.equal(found.images[:, 0].long(), torch.where(box, classes, 0))
    assert torch.equal(found.labels, torch.where(box, classes, 0))
    assert torch.equal(found.counts, ~box | (classes % 2 == 0))
