"""Class prototypes compared with naive sums, and a head that selects the nearest prototype."""

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


def test_a_class_is_the_mean_direction_of_its_pixels_in_the_scan() -> None:
    features, labels, inside = scene(torch.Generator().manual_seed(0))
    labels[:, -1] = 1  # outside the scan: not used
    _, *found = class_prototypes(
        [(features, labels, inside)], num_classes=3, background_prototypes=3, generator=np.random.default_rng(0)
    )
    for value, prototype in enumerate(found, start=1):
        total = torch.zeros(5)
        for image, row, column in (inside & (labels == value)).nonzero().tolist():
            pixel = features[image, :, row, column]
            total += pixel / pixel.norm()
        torch.testing.assert_close(prototype, (total / total.norm())[None])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_background_of_several_kinds_is_distinguished_from_the_classes(stride: int) -> None:
    features, labels, inside = scene(torch.Generator().manual_seed(1))
    if stride == 2:
        labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
        inside = inside.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found = class_prototypes(
        [(features, labels, inside)], num_classes=3, background_prototypes=3, generator=np.random.default_rng(0)
    )
    assert [len(of_class) for of_class in found] == [3, 1, 1]
    torch.testing.assert_close(torch.cat(found).norm(dim=1), torch.ones(5))
    head = PrototypeHead(5, [3, 1, 1])
    head.load_state_dict({"prototypes": torch.cat(found)})
    logits = head(features)
    predicted = logits.argmax(1)
    cosines = torch.stack([F.cosine_similarity(features, p[None, :, None, None], dim=1) for p in torch.cat(found)], 1)
    nearest = torch.tensor([0, 0, 0, 1, 2])[cosines.argmax(1)]
    assert torch.equal(predicted, nearest)
    if stride == 1:
        assert (predicted == labels)[inside].float().mean() > 0.98
    assert torch.equal(head(features * 7).argmax(1), predicted)  # only directions count


def test_few_background_pixels_give_few_prototypes() -> None:
    features = torch.rand(1, 4, 3, 3)
    labels = torch.ones(1, 3, 3, dtype=torch.int64)
    labels[0, 0, 0] = 0
    found = class_prototypes(
        [(features, labels, labels >= 0)], num_classes=2, background_prototypes=8, generator=np.random.default_rng(0)
    )
    assert [len(of_class) for of_class in found] == [1, 1]


def test_a_class_without_a_pixel_is_refused() -> None:
    features, labels, inside = scene(torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="no pixel of class 3"):
        class_prototypes(
            [(features, labels, inside)], num_classes=4, background_prototypes=3, generator=np.random.default_rng(0)
        )
