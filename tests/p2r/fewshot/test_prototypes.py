"""Class prototypes compared with naive sums, and a head that selects the nearest prototype."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from p2r.errors import DataError
from p2r.fewshot.prototypes import class_prototypes
from p2r.model.heads import PrototypeHead


def scene(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return two images of 5 features of random lengths: classes 1 and 2 near one direction each, background near three."""
    directions = torch.eye(5)
    labels = torch.zeros(2, 12, 10, dtype=torch.int64)
    labels[:, 2:5, 2:5], labels[:, 6:9, 5:9] = 1, 2
    kind = labels.clone()  # index of the direction
    background = torch.randint(2, 5, labels.shape, generator=generator)
    kind = torch.where(labels == 0, background, labels - 1)
    noise = 0.1 * torch.randn(2, 12, 10, 5, generator=generator)
    lengths = 0.1 + 5 * torch.rand(2, 12, 10, 1, generator=generator)
    features = ((directions[kind] + noise) * lengths).permute(0, 3, 1, 2)
    inside = torch.ones_like(labels, dtype=torch.bool)
    inside[:, -2:] = False
    return features, labels, inside


def test_a_class_is_the_mean_direction_of_its_pixels_in_the_scan_relative_to_the_mean_of_class_means() -> None:
    features, labels, inside = scene(torch.Generator().manual_seed(0))
    features[:, :, labels[0] == 0] = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0])[:, None]  # any sample has the same mean
    labels[:, -1] = 1  # outside the scan: not used
    centre, found = class_prototypes(
        [(features, labels, inside)],
        num_classes=3,
        prototypes_per_class=1,
        background_prototypes=3,
        generator=np.random.default_rng(0),
    )
    pixels: list[list[torch.Tensor]] = [[], [], []]
    for image, row, column in inside.nonzero().tolist():
        pixel = features[image, :, row, column]
        pixels[int(labels[image, row, column])].append(pixel / pixel.norm())
    expected = torch.stack([torch.stack(of_class).mean(0) for of_class in pixels]).mean(0)
    torch.testing.assert_close(centre, expected)
    for of_class, prototype in zip(pixels, found, strict=True):
        total = torch.zeros(5)
        for pixel in of_class:
            total += (pixel - expected) / (pixel - expected).norm()
        torch.testing.assert_close(prototype, (total / total.norm())[None])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_background_of_several_kinds_is_distinguished_from_the_classes(stride: int) -> None:
    features, labels, inside = scene(torch.Generator().manual_seed(1))
    if stride == 2:
        labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
        inside = inside.repeat_interleave(2, 1).repeat_interleave(2, 2)
    centre, found = class_prototypes(
        [(features, labels, inside)],
        num_classes=3,
        prototypes_per_class=1,
        background_prototypes=3,
        generator=np.random.default_rng(0),
    )
    assert [len(of_class) for of_class in found] == [3, 1, 1]
    torch.testing.assert_close(torch.cat(found).norm(dim=1), torch.ones(5))
    head = PrototypeHead(5, [3, 1, 1], is_centred=True)
    head.load_state_dict({"centre": centre, "prototypes": torch.cat(found)})
    logits = head(features)
    predicted = logits.argmax(1)
    moved = F.normalize(features, dim=1) - centre[None, :, None, None]
    cosines = torch.stack([F.cosine_similarity(moved, p[None, :, None, None], dim=1) for p in torch.cat(found)], 1)
    nearest = torch.tensor([0, 0, 0, 1, 2])[cosines.argmax(1)]
    assert torch.equal(predicted, nearest)
    if stride == 1:
        assert (predicted == labels)[inside].float().mean() > 0.98
    assert torch.equal(head(features * 7).argmax(1), predicted)  # only directions count


def test_a_class_of_several_kinds_has_a_prototype_of_each() -> None:
    features, labels, inside = scene(torch.Generator().manual_seed(2))
    merged = labels.clamp_max(1)  # one class with the directions of two
    found = [
        class_prototypes(
            [(features, merged, inside)],
            num_classes=2,
            prototypes_per_class=2,
            background_prototypes=3,
            generator=np.random.default_rng(0),
        )
        for _ in range(2)
    ]
    (centre, (_, of_class)), again = found
    assert torch.equal(of_class, again[1][1])
    nearest = of_class @ F.normalize(torch.eye(5)[:2] - centre, dim=1).T
    assert sorted(nearest.argmax(1).tolist()) == [0, 1] and nearest.amax(1).min() > 0.97


def test_similarity_maps_are_smoothed_by_a_normalised_gaussian_up_to_the_edge() -> None:
    features = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    prototypes = {"prototypes": torch.randn(3, 3, generator=torch.Generator().manual_seed(1))}
    plain, smooth = PrototypeHead(3, [2, 1]), PrototypeHead(3, [2, 1], smoothing_pixels=0.7)
    plain.load_state_dict(prototypes)
    smooth.load_state_dict(prototypes)
    maps, expected = plain(features), torch.zeros(2, 2, 9, 11)
    offsets = range(-3, 4)
    total = sum(math.exp(-(one**2 + other**2) / (2 * 0.7**2)) for one in offsets for other in offsets)
    for row in range(9):
        for column in range(11):
            for one in offsets:
                for other in offsets:
                    value = maps[:, :, min(max(row + one, 0), 8), min(max(column + other, 0), 10)]
                    expected[:, :, row, column] += math.exp(-(one**2 + other**2) / (2 * 0.7**2)) / total * value
    torch.testing.assert_close(smooth(features), expected)
    assert PrototypeHead(3, [2, 1], smoothing_pixels=0.7)(torch.rand(1, 3, 4, 5, 6)).shape == (1, 2, 4, 5, 6)


def test_few_pixels_of_a_class_give_few_prototypes() -> None:
    features = torch.rand(1, 4, 3, 3)
    labels = torch.ones(1, 3, 3, dtype=torch.int64)
    labels[0, 0, 0] = 0
    labels[0, 1:, :] = 2
    labels[0, 0, 1] = -1
    _, found = class_prototypes(
        [(features, labels, labels >= 0)],
        num_classes=3,
        prototypes_per_class=4,
        background_prototypes=8,
        generator=np.random.default_rng(0),
    )
    assert [len(of_class) for of_class in found] == [1, 1, 4]


def test_a_class_without_a_pixel_is_refused() -> None:
    features, labels, inside = scene(torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="no pixel of class 3"):
        class_prototypes(
            [(features, labels, inside)],
            num_classes=4,
            prototypes_per_class=1,
            background_prototypes=3,
            generator=np.random.default_rng(0),
        )
