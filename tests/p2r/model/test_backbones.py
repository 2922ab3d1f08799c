"""Backbones: shapes, refusals, and that an image's features are its own."""

import pytest
import torch

from p2r.config import ModelConfig
from p2r.model import build_backbone

SMALL = ModelConfig(channels=(4, 4, 8, 8, 8), feature_channels=6)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (64, 96)])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_features_have_f_channels_at_full_resolution(size: tuple[int, int], in_channels: int) -> None:
    backbone = build_backbone(SMALL, in_channels=in_channels)
    assert backbone(torch.rand(2, in_channels, *size)).shape == (2, 6, *size)


@pytest.mark.parametrize("size", [(100, 96), (96, 100), (16, 16), (8, 32)])
def test_a_size_that_the_levels_cannot_halve_is_refused_with_the_rule(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="divisible by 16"):
        build_backbone(SMALL)(torch.rand(1, 1, *size))


@pytest.mark.parametrize("shape", [(2, 2, 32, 32), (1, 32, 32)])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        build_backbone(SMALL)(torch.rand(shape))


def test_an_images_features_do_not_depend_on_its_batch_or_on_train_and_eval() -> None:
    backbone = build_backbone(SMALL)
    image = torch.rand(4, 1, 32, 32)
    together = backbone(image)
    torch.testing.assert_close(backbone(image[2:3])[0], together[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone.eval()(image), together, rtol=1e-5, atol=1e-6)


def test_equal_seeds_give_equal_weights() -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(build_backbone(SMALL).state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_weight_is_used() -> None:
    backbone = build_backbone(SMALL)
    backbone(torch.rand(2, 1, 32, 32)).square().sum().backward()
    assert all(weight.grad is not None for weight in backbone.parameters())
