"""Rounds of self-training: agreement of views, renewal of pseudo-labels, and the end of the rounds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation
from p2r.fewshot.plausibility import Plausibility
from p2r.fewshot.protocol import Settings, Trial
from p2r.fewshot.rounds import NOT_COUNTED, Rounds, Unlabelled, agreed_classes, changed_fraction
from p2r.randomness import keyed_generator
from p2r.views.draws import Draws

ANYWHERE = {
    dimensions: Plausibility((-99.0,) * dimensions, (99.0,) * dimensions, (0.0,), (1e9,), is_one_piece=False)
    for dimensions in (2, 3)
}
PLAIN = {
    "gamma_probability": 0.0,
    "contrast_probability": 0.0,
    "inversion_probability": 0.0,
    "bias_field_probability": 0.0,
    "blur_probability": 0.0,
    "noise_probability": 0.0,
}


class Bright(nn.Module):
    """Predicts class 1 with a probability of 0.88 where the image is brighter than `level`."""

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image < self.level, image >= self.level], dim=1).float() * 2


class RightOfTheMiddle(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        place = torch.arange(image.shape[2]).reshape(1, 1, -1, 1).expand(image.shape)
        return torch.cat([place < 8, place >= 8], dim=1).float() * 9


def config(**values: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"tasks": ["a"], **values})


def preparation(dimensions: int = 2, **values: Any) -> Preparation:
    return Preparation.model_validate({"spacing_mm": 1.0, "image_size": 16, "dimensions": dimensions, **values})


def draws(number: int) -> Draws:
    return Draws.of_generators([keyed_generator(0, index) for index in range(number)])


@pytest.mark.parametrize("dimensions", [2, 3])
def test_pixels_count_if_a_change_of_appearance_changes_no_class(dimensions: int) -> None:
    images = torch.rand(4, 1, *[20] * dimensions, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(4, *[20] * dimensions, dtype=torch.bool)
    inside[:, :5] = False
    options: dict[str, Any] = {"draws": draws(4), "config": config(), "preparation": preparation(dimensions)}
    one, all_of_it = agreed_classes(Bright(), images, inside, num_views=1, threshold=None, **options)
    assert torch.equal(one, (images[:, 0] >= 0.5).long()) and torch.equal(all_of_it, inside)
    _, some = agreed_classes(Bright(), images, inside, num_views=4, threshold=None, **options)
    assert 0.05 < some[inside].float().mean() < 0.95 and not some[~inside].any()
    _, none = agreed_classes(Bright(), images, inside, num_views=1, threshold=0.9, **options)
    assert not none.any(), "the network is sure by 0.88"


def test_pixels_count_if_a_mirrored_image_has_the_mirrored_class() -> None:
    views = {"geometry": {"flip_probability": 0.5}, "intensity": PLAIN}
    images, inside = torch.rand(1, 1, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool)
    for probability, agreed in ((0.5, 0.0), (0.0, 1.0)):
        views["geometry"] = {"flip_probability": probability}
        _, counts = agreed_classes(
            *(RightOfTheMiddle(), images, inside),
            draws=draws(1),
            num_views=2,
            threshold=None,
            config=config(views=views),
            preparation=preparation(),
        )
        assert counts.float().mean() == agreed


def rounds(first: nn.Module, images: Tensor, *, rules: Plausibility | None = None, **settings: Any) -> Rounds:
    given = {"steps": 20, "self_training_rounds": 3, "self_training_fraction": 0.2, "agreement_views": 1, **settings}
    trial = Trial("disc", "prototype_self_training", 1, 0, ("a",), Settings(**given), "final")
    return Rounds(
        Unlabelled(images, torch.ones(len(images), *images.shape[2:]).bool(), [slice(0, 2), slice(2, 4)]),
        first,
        rules or ANYWHERE[images.ndim - 2],
        trial=trial,
        config=config(),
        preparation=preparation(images.ndim - 2),
        names=["background", "DISC"],
    )


@pytest.mark.parametrize("dimensions", [2, 3])
def test_prototypes_label_the_first_round_and_the_teacher_all_others(dimensions: int) -> None:
    images = torch.rand(4, 1, *[16] * dimensions, generator=torch.Generator().manual_seed(0))
    made = rounds(Bright(0.5), images, self_training_min_change=0.0)
    lines = {step: made.at(step, Bright(0.1 * (step + 2))) for step in range(20)}
    assert [step for step, line in lines.items() if line] == [0, 4, 8, 12]
    assert [(one.step, one.by) for one in made.told] == [(0, "prototypes"), (4, "teacher"), (8, "teacher")]
    assert made.told[-1].ended_by == "rounds" and made.told[-1].ended_at_step == 12 and made.labels is None
    before, after = ((images[:, 0] >= level).to(torch.int16) for level in (0.5, 0.6))
    assert made.told[1].change == pytest.approx(changed_fraction(before, after), abs=1e-5)
    assert made.told[1].class_fractions["DISC"] == pytest.approx(float((after > 0).float().mean()), abs=1e-5)
    assert made.told[0].change is None and made.told[0].counted_fraction == 1


def test_rounds_end_as_soon_as_pseudo_labels_hardly_change() -> None:
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    made = rounds(Bright(0.5), images, self_training_min_change=0.05)
    lines = [made.at(step, Bright(0.5 + 0.01 * (step == 4))) for step in range(20)]
    assert [step for step, line in enumerate(lines) if line] == [0, 4]
    assert made.told[-1].ended_by == "change" and 0 < (made.told[-1].change or 0.0) < 0.05
    assert "from now on the teacher labels the images of every step" in str(lines[4]) and made.labels is None


def test_a_pixel_without_a_plausible_class_does_not_count_and_a_teacher_counts_where_it_is_sure() -> None:
    images = torch.zeros(4, 1, 16, 16)
    images[:, :, 12:] = 1
    rules = Plausibility((-8.0, -8.0), (6.0, 8.0), (0.0,), (1e9,), is_one_piece=False)
    made = rounds(Bright(), images, rules=rules, self_training_min_change=0.0, confidence_threshold=0.9)
    made.at(0, Bright())
    labels = made.labels
    assert labels is not None and set(labels[:, :12].unique().tolist()) == {0}
    assert (labels[:, 12:14] == 1).all() and (labels[:, 14:] == NOT_COUNTED).all()
    made.at(4, Bright())
    assert made.labels is not None and torch.eq(made.labels, NOT_COUNTED).all(), "sure by 0.88 is not sure"
    assert made.told[1].counted_fraction == 0


def test_a_model_of_the_centre_labels_the_centre() -> None:
    made = rounds(Bright(), torch.ones(4, 1, 24, 12))
    made._preparation = preparation(planes="centre")
    made.at(0, Bright())
    assert made.labels is not None
    assert (made.labels[:, 4:20] == 1).all() and (made.labels[:, :4] == NOT_COUNTED).all()
    assert made.told[0].counted_fraction == 1, "of what it reads"


def test_a_warning_names_a_first_round_without_plausible_frames() -> None:
    rules = Plausibility((-8.0, -8.0), (8.0, 8.0), (300.0,), (1e9,), is_one_piece=False)
    made = rounds(Bright(), torch.ones(4, 1, 16, 16), rules=rules)
    assert made.warnings() == []
    made.at(0, Bright())
    (warning,) = made.warnings()
    assert warning.startswith("no unlabelled frame has organs of a plausible size")


def test_rounds_continue_from_a_saved_state() -> None:
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = rounds(Bright(), images)
    whole.at(0, Bright())
    restored = rounds(Bright(), images)
    restored.restore(whole.tensors(), whole.state())
    assert whole.labels is not None and restored.labels is not None
    assert torch.equal(restored.labels, whole.labels) and restored.told == whole.told
    assert sum(tensor.numel() for tensor in whole.tensors().values()) < whole.labels.numel()
    for made in (whole, restored):
        for step in range(1, 20):
            made.at(step, Bright(0.1 * step))
    assert restored.told == whole.told and restored.tensors() == {}


def test_change_is_a_fraction_of_old_and_new_foreground() -> None:
    before = torch.tensor([0, 0, 1, 1, 2, NOT_COUNTED])
    after = torch.tensor([0, NOT_COUNTED, 1, 2, NOT_COUNTED, 1])
    assert changed_fraction(before, after) == pytest.approx(3 / 4)
    assert changed_fraction(before * 0, before * 0) == 0
    assert np.isfinite(changed_fraction(before, before))
