"""Pseudo-labels: their teacher, the pixels that count, mixing between images, and their weight in the loss."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor, nn

from p2r.fewshot.protocol import Settings
from p2r.fewshot.pseudo_labels import (
    PseudoLabelTally,
    logits_without_channels,
    masked_dice_ce,
    pseudo_labels,
    strong_views,
)
from p2r.model.pix2rep import Segmenter
from p2r.randomness import keyed_generator
from p2r.views import Draws, Labelled, WeakAndStrong

SIZES = [(12, 10), (8, 6, 7)]


class Brightness(nn.Module):
    """Predicts class 1 of a pixel with its brightness as probability."""

    def forward(self, image: Tensor) -> Tensor:
        self.seen = image
        return torch.cat([1 - image, image], dim=1).log()


def draws(number: int) -> Draws:
    return Draws.of_generators([keyed_generator(0, "mix", index) for index in range(number)])


@pytest.mark.parametrize("size", SIZES)
def test_a_pseudo_label_counts_where_the_teacher_is_confident_and_the_scan_is_shown(size: tuple[int, ...]) -> None:
    weak = torch.rand(3, 1, *size)
    shown = torch.rand(3, *size) < 0.8
    teacher = Brightness()
    classes, counts = pseudo_labels(teacher, weak, shown, threshold=0.75)
    assert torch.equal(teacher.seen, weak), "the teacher's view has only the geometry"
    brightness = weak[:, 0]
    assert torch.equal(classes, (brightness > 0.5).long())
    assert torch.equal(counts, shown & ((brightness >= 0.75) | (brightness <= 0.25)))


def _mixed(size: tuple[int, ...], number: int, **settings: Any) -> tuple[Labelled, Labelled]:
    """Mix images whose pixel values identify the image: unlabelled image i is -i - 1, labelled image i is i + 1."""
    ones = torch.ones(number, *size)
    unlabelled = -(torch.arange(number) + 1).reshape(-1, *[1] * len(size)) * ones
    views = WeakAndStrong(unlabelled[:, None], (unlabelled[:, None], unlabelled[:, None]), ones.bool())
    values = -unlabelled
    labelled = Labelled(values[:, None], values.long(), ones.bool())
    is_confident = torch.rand(number, *size, generator=torch.Generator().manual_seed(0)) < 0.5
    found = strong_views(
        views, unlabelled.long(), is_confident, labelled, settings=Settings(**settings), draws=draws(number)
    )
    return found, Labelled(unlabelled[:, None], unlabelled.long(), is_confident)


@pytest.mark.parametrize("size", SIZES)
def test_pseudo_label_and_mask_of_a_pixel_are_mixed_with_it(size: tuple[int, ...]) -> None:
    found, before = _mixed(size, 6, cutmix_probability=1.0, cutmix_labelled_fraction=0.5)
    assert len(found.images) == 12
    assert torch.equal(found.images[:, 0].long(), found.labels)
    is_labelled = found.labels > 0
    assert found.counts[is_labelled].all(), "every pixel of a labelled image counts"
    for number, image in enumerate(found.labels):
        for value in image[image < 0].unique():
            here = image == value
            assert torch.equal(found.counts[number][here], before.counts[-int(value) - 1][here])


def test_labelled_and_unlabelled_images_are_mixed_both_ways() -> None:
    found, _ = _mixed((20, 20), 40, cutmix_probability=1.0, cutmix_labelled_fraction=1.0)
    share = (found.labels > 0).flatten(1).float().mean(1)
    assert (share > 0).all() and (share < 1).all()
    into_unlabelled, into_labelled = share < 0.45, share > 0.55
    assert (into_unlabelled | into_labelled).all(), "a box has at most 40 % of an image"
    assert 20 < into_unlabelled.sum() < 60


@pytest.mark.parametrize(("labelled_fraction", "partner"), [(0.0, "unlabelled"), (1.0, "labelled")])
def test_the_other_image_of_a_mix_has_the_requested_kind_and_is_never_the_image_itself(
    labelled_fraction: float, partner: str
) -> None:
    number = 10
    found, _ = _mixed((20, 20), number, cutmix_probability=1.0, cutmix_labelled_fraction=labelled_fraction)
    for index, image in enumerate(found.labels):
        own = -(index % number) - 1
        (other,) = set(image.unique().tolist()) - {own}
        assert (other > 0) == (partner == "labelled")


def test_images_are_mixed_with_the_requested_probability_and_the_two_views_differ() -> None:
    found, before = _mixed((20, 20), 100, cutmix_probability=0.5, cutmix_labelled_fraction=0.5)
    twice = torch.cat([before.labels, before.labels])
    is_mixed = (found.labels != twice).flatten(1).any(1)
    assert 70 < is_mixed.sum() < 130
    assert not torch.equal(*is_mixed.chunk(2))
    whole, _ = _mixed((20, 20), 100, cutmix_probability=0.0, cutmix_labelled_fraction=0.5)
    assert torch.equal(whole.labels, twice)


def test_the_same_draws_mix_the_same_boxes() -> None:
    first, second = (_mixed((9, 8), 5, cutmix_probability=0.5, cutmix_labelled_fraction=0.5)[0] for _ in range(2))
    assert torch.equal(first.images, second.images) and torch.equal(first.counts, second.counts)


@pytest.mark.parametrize("size", SIZES)
def test_if_every_pixel_counts_the_loss_equals_that_of_labelled_images(size: tuple[int, ...]) -> None:
    logits = torch.randn(4, 3, *size)
    labels = torch.randint(0, 3, (4, *size))
    expected = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)(logits, labels[:, None])
    found = masked_dice_ce(logits, labels, torch.ones_like(labels, dtype=torch.bool))
    torch.testing.assert_close(found, expected)


def test_pixels_that_do_not_count_change_neither_loss_nor_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, generator=generator).requires_grad_()
    labels = torch.randint(0, 3, (2, 6, 5), generator=generator)
    counts = torch.rand(2, 6, 5, generator=generator) < 0.5
    loss = masked_dice_ce(logits, labels, counts)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.movedim(1, -1)[~counts].any() and gradient.movedim(1, -1)[counts].any()
    other = torch.where(counts, labels, (labels + 1) % 3)
    assert torch.equal(masked_dice_ce(logits, other, counts), loss)
    chosen, truth = logits.movedim(1, -1)[counts], labels[counts]
    probabilities, one_hot = chosen.softmax(1), F.one_hot(truth, 3)
    dice = (2 * (probabilities * one_hot).sum(0) + 1e-5) / ((probabilities + one_hot).sum(0) + 1e-5)
    torch.testing.assert_close(loss, (1 - dice).mean() + F.cross_entropy(chosen, truth))


def test_without_pixels_that_count_the_loss_is_zero() -> None:
    logits = torch.randn(2, 3, 6, 5).requires_grad_()
    loss = masked_dice_ce(logits, torch.zeros(2, 6, 5, dtype=torch.int64), torch.zeros(2, 6, 5, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_feature_dropout_drops_whole_channels_and_keeps_their_mean(dimensions: int) -> None:
    size = [6] * dimensions
    network = Segmenter(nn.Identity(), nn.Identity())
    found = logits_without_channels(network, torch.ones(3, 400, *size), fraction=0.25, draws=draws(3)).flatten(2)
    assert torch.equal(found.amin(2), found.amax(2))
    values = found[..., 0]
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert 0.18 < (values == 0).float().mean() < 0.32
    assert not torch.equal(values[0], values[1])


def test_a_class_without_pseudo_labels_is_named() -> None:
    tally = PseudoLabelTally(3, steps=40)
    classes = torch.tensor([[0, 0, 0, 2, 1]])
    for step in range(40):
        tally.add(step, classes, torch.tensor([[True, True, True, True, False]]), torch.ones(1, 5, dtype=torch.bool))
    told = tally.to_row(["background", "left", "right"], threshold=0.9)
    assert told.steps == list(range(2, 41, 2)) and set(told.confident_fraction) == {0.8}
    assert told.class_fractions["right"][0] == 0.25
    assert told.classes_never_found == ["left"]
    assert told.warnings == ["no pseudo-label had class left: it was learnt from labelled images only"]


def test_a_class_whose_pseudo_labels_vanish_is_named() -> None:
    for last_step, is_lost in ((20, True), (36, False)):
        tally = PseudoLabelTally(3, steps=40)
        for step in range(40):
            classes = torch.tensor([[0, 1, 2 if step <= last_step else 0]])
            tally.add(step, classes, torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool))
        told = tally.to_row(["background", "left", "right"], threshold=0.9)
        assert told.classes_never_found == []
        assert [warning.partition(" vanished")[0] for warning in told.warnings] == [
            "pseudo-labels of class right"
        ] * is_lost


def test_a_tally_resumed_within_an_interval_continues_to_count() -> None:
    generator = np.random.default_rng(0)
    classes = torch.from_numpy(generator.integers(0, 2, (50, 1, 7)))
    counts = torch.from_numpy(generator.random((50, 1, 7)) < 0.5)
    shown = torch.ones(1, 7, dtype=torch.bool)
    whole, before, after = (PseudoLabelTally(2, steps=50) for _ in range(3))
    for step in range(50):
        whole.add(step, classes[step], counts[step], shown)
        if step == 25:
            after.restore(before.state())
        (before if step < 25 else after).add(step, classes[step], counts[step], shown)
    assert after.to_row(["a", "b"], threshold=0.9) == whole.to_row(["a", "b"], threshold=0.9)
