"""Warps: exact where nothing moves, in the right direction and millimetres where something does."""

import numpy as np
import pytest
import torch
from torch import Tensor

from p2r.config import GeometryConfig
from p2r.randomness import keyed_generator
from p2r.views.geometric import apply_warp, inside_mask, sample_warps

STILL = GeometryConfig(
    rotation_deg=0, scale=(1, 1), shear_deg=0, translation_mm=0, flip_probability=0, elastic_mm=0, elastic_spacing_mm=32
)


def generators(num: int) -> list[np.random.Generator]:
    return [keyed_generator(0, "test", index) for index in range(num)]


def identity(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns], -1)[None].float()


def warps(config: GeometryConfig, size: tuple[int, int], *, num: int = 4, spacing_mm: float = 1.0) -> Tensor:
    return sample_warps(generators(num), config=config, size_in=size, size_out=size, spacing_mm=spacing_mm)


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (96, 160), (130, 101), (1, 5)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_an_identity_warp_returns_the_image_exactly(size: tuple[int, int], mode: str) -> None:
    image = torch.rand(1, 3, *size)
    assert torch.equal(apply_warp(image, identity(*size), mode=mode), image)


@pytest.mark.parametrize("size", [(64, 64), (50, 77)])
def test_ranges_of_no_extent_give_the_identity_warp_exactly(size: tuple[int, int]) -> None:
    assert torch.equal(warps(STILL, size), identity(*size).expand(4, -1, -1, -1))


def test_a_smaller_output_shows_the_centre_of_the_input() -> None:
    image = torch.rand(2, 1, 20, 30)
    warp = sample_warps(generators(2), config=STILL, size_in=(20, 30), size_out=(8, 10), spacing_mm=1.0)
    assert torch.equal(apply_warp(image, warp), image[:, :, 6:14, 10:20])


def test_a_flip_mirrors_both_axes_exactly_and_folds_nothing() -> None:
    warp = warps(STILL.model_copy(update={"flip_probability": 1.0}), (10, 12), num=1)
    image = torch.rand(1, 1, 10, 12)
    assert torch.equal(apply_warp(image, warp), image.flip(2, 3))
    one_axis = identity(10, 12).flip(1)
    assert inside_mask(one_axis, torch.ones(1, 10, 12, dtype=torch.bool)).all()


def test_bilinear_interpolation_equals_the_written_out_formula() -> None:
    image = torch.rand(1, 1, 9, 11, dtype=torch.float64)
    position = torch.rand(1, 5, 5, 2, dtype=torch.float64) * torch.tensor([8.0, 10.0])
    result = apply_warp(image, position)
    for row in range(5):
        for column in range(5):
            y, x = position[0, row, column].tolist()
            top, left = min(int(y), 7), min(int(x), 9)
            expected = sum(
                float(image[0, 0, top + down, left + right]) * (1 - abs(y - top - down)) * (1 - abs(x - left - right))
                for down in (0, 1)
                for right in (0, 1)
            )
            assert result[0, 0, row, column].item() == pytest.approx(expected, abs=1e-12)


def test_beyond_the_border_is_zero() -> None:
    image = torch.ones(1, 1, 10, 13)
    far = identity(10, 13) + torch.tensor([20.0, 0.0])
    assert not apply_warp(image, far).any()
    assert not apply_warp(image, -far).any()


def test_translation_and_elastic_displacement_are_millimetres() -> None:
    config = STILL.model_copy(update={"translation_mm": 6.0, "elastic_mm": 3.0})
    coarse = warps(config, (33, 33), spacing_mm=2.0) - identity(33, 33)
    fine = warps(config, (65, 65), spacing_mm=1.0) - identity(65, 65)
    torch.testing.assert_close(2.0 * coarse, fine[:, ::2, ::2], rtol=0, atol=1e-4)
    shifts = warps(STILL.model_copy(update={"translation_mm": 6.0}), (8, 8), num=200, spacing_mm=2.0) - identity(8, 8)
    assert 2.8 < shifts.abs().max() <= 3.0


def test_a_magnification_of_two_shows_the_central_half() -> None:
    warp = warps(STILL.model_copy(update={"scale": (2.0, 2.0)}), (9, 9), num=1)
    assert warp[0, 0, 0].tolist() == pytest.approx([2.0, 2.0], abs=1e-5)
    assert warp[0, 8, 4].tolist() == pytest.approx([6.0, 4.0], abs=1e-5)


def test_rotation_and_shear_keep_areas_and_reach_their_ranges() -> None:
    config = STILL.model_copy(update={"rotation_deg": 180.0, "shear_deg": 30.0})
    warp = warps(config, (8, 8), num=300).double()
    down, across = warp[:, 1, 0] - warp[:, 0, 0], warp[:, 0, 1] - warp[:, 0, 0]
    areas = down[:, 0] * across[:, 1] - down[:, 1] * across[:, 0]
    torch.testing.assert_close(areas, torch.ones(300, dtype=torch.float64), rtol=0, atol=1e-5)
    angles = torch.atan2(down[:, 1], down[:, 0])
    assert angles.min() < -3.0
    assert angles.max() > 3.0


def test_the_elastic_field_does_not_depend_on_other_images() -> None:
    together = warps(GeometryConfig(), (50, 61), num=7)
    alone = sample_warps(
        generators(7)[5:6], config=GeometryConfig(), size_in=(50, 61), size_out=(50, 61), spacing_mm=1.0
    )
    assert torch.equal(together[5], alone[0])


def test_default_ranges_fold_nothing() -> None:
    warp = warps(GeometryConfig(), (128, 128), num=32, spacing_mm=1.5)
    large = torch.ones(32, 512, 512, dtype=torch.bool)
    assert inside_mask(warp + 190.0, large).all()


def test_valid_pixels_lie_in_the_image_and_in_the_scan() -> None:
    inside = torch.zeros(8, 64, 64, dtype=torch.bool)
    inside[:, 10:50, 5:60] = True
    warp = warps(GeometryConfig(), (64, 64), num=8, spacing_mm=1.5)
    valid = inside_mask(warp, inside)
    assert 0.2 < valid.float().mean() < 0.9
    for position in ((warp[valid] + 0.002).floor(), (warp[valid] - 0.002).ceil()):
        assert position[:, 0].min() >= 10
        assert position[:, 0].max() <= 49
        assert position[:, 1].min() >= 5
        assert position[:, 1].max() <= 59


def test_a_pixel_that_is_partly_padding_is_not_valid() -> None:
    inside = torch.ones(1, 8, 8, dtype=torch.bool)
    inside[0, 4, 4] = False
    valid = inside_mask(identity(8, 8) + 0.25, inside)[0]
    assert not valid[3:5, 3:5].any()
    assert not valid[7].any()
    assert valid.sum() == 49 - 4


def test_folded_pixels_are_not_valid_whichever_way_the_rest_is_turned() -> None:
    folded = identity(32, 32)
    folded[0, 10:14] = folded[0, 10:14].flip(0)
    inside = torch.ones(1, 32, 32, dtype=torch.bool)
    for warp in (folded, folded.flip(2)):
        valid = inside_mask(warp, inside)[0]
        assert not valid[10:14].any()
        assert valid[:9].all()
        assert valid[15:].all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        apply_warp(torch.rand(2, 1, 8, 8), identity(8, 8))
