"""Views: a point of b shows the anatomy that the warp says it does in a; an image's views are its own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p2r.config import GeometryConfig, IntensityConfig, ViewsConfig
from p2r.randomness import keyed_generator
from p2r.views import ViewPair, apply_warp, augment_labelled, make_views

PLAIN = IntensityConfig(gamma=(1, 1), contrast=(1, 1), bias_field=0, noise=0, blur_mm=0, inversion_probability=0)
GEOMETRY_ONLY = ViewsConfig(intensity=PLAIN)


def coordinate_image(num: int, height: int, width: int) -> Tensor:
    """An image whose two channels are its own row and column, as parts of its size: a map of where one is."""
    rows = torch.arange(height)[:, None].expand(height, width) / height
    columns = torch.arange(width).expand(height, width) / width
    return torch.stack([rows, columns]).expand(num, 2, height, width)


def views(image: Tensor, positions: list[int], *, inside: Tensor | None = None, **options: Any) -> ViewPair:
    options = {"config": ViewsConfig(), "spacing_mm": 1.5, "seed": 3, **options}
    epochs = np.full(len(positions), options.pop("epoch", 1))
    inside = torch.ones(len(image), *image.shape[2:], dtype=torch.bool) if inside is None else inside
    return make_views(image, inside, epochs=epochs, positions=np.array(positions), **options)


@pytest.mark.parametrize("size", [(64, 64), (80, 50)])
def test_a_valid_pixel_of_b_shows_the_place_in_a_that_the_warp_names(size: tuple[int, int]) -> None:
    pair = views(coordinate_image(6, *size), list(range(6)), config=GEOMETRY_ONLY)
    shown = pair.b.movedim(1, -1)[pair.valid] * torch.tensor(size)
    torch.testing.assert_close(shown, pair.warp[pair.valid], rtol=0, atol=1e-3)
    assert pair.valid.float().mean() > 0.5


def test_embedding_a_warped_image_equals_warping_the_embedding() -> None:
    """A map that acts on every pixel alone follows any warp onto whole pixels, here a quarter turn, exactly."""
    image = torch.rand(1, 1, 31, 31)
    rows, columns = torch.meshgrid(torch.arange(31.0), torch.arange(31.0), indexing="ij")
    quarter_turn = torch.stack([columns, 30 - rows], -1)[None]

    def embed(view: Tensor) -> Tensor:
        return torch.cat([view.sin(), view**2], dim=1)

    assert torch.equal(embed(apply_warp(image, quarter_turn)), apply_warp(embed(image), quarter_turn))
    assert torch.equal(apply_warp(image, quarter_turn), image.rot90(1, (2, 3)))


@pytest.mark.parametrize("size", [(64, 64), (45, 51)])
def test_an_images_views_do_not_depend_on_the_images_beside_it(size: tuple[int, int]) -> None:
    image = torch.rand(9, 1, *size, generator=torch.Generator().manual_seed(1))
    together = views(image, list(range(100, 109)))
    for index in (0, 4, 8):
        alone = views(image[index : index + 1], [100 + index])
        for name in ("a", "b", "warp", "valid"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[index]), name
    order = [7, 2, 5]
    some = views(image[order], [100 + index for index in order])
    assert torch.equal(some.b, together.b[order])


def test_views_are_the_same_with_one_thread_and_with_two() -> None:
    image = torch.rand(3, 1, 75, 83, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = views(image, [0, 1, 2])
        torch.set_num_threads(2)
        two = views(image, [0, 1, 2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)


def test_seed_epoch_and_position_each_give_other_views() -> None:
    image = torch.rand(1, 1, 32, 32)
    base = views(image, [0])
    others = [views(image, [1]), views(image, [0], seed=4), views(image, [0], epoch=2)]
    assert torch.equal(views(image, [0]).b, base.b)
    assert not any(torch.equal(other.warp, base.warp) for other in others)


def test_the_two_views_differ_in_appearance_also_where_nothing_moves() -> None:
    still = GeometryConfig(
        rotation_deg=0, scale=(1, 1), shear_deg=0, translation_mm=0, flip_probability=0, elastic_mm=0
    )
    image = torch.rand(2, 1, 32, 32)
    pair = views(image, [0, 1], config=ViewsConfig(geometry=still))
    assert pair.valid.all()
    assert (pair.a - pair.b).abs().mean() > 0.02


def test_outside_the_scan_both_views_are_zero_and_nothing_is_valid() -> None:
    inside = torch.zeros(4, 64, 64, dtype=torch.bool)
    inside[:, 8:56, 16:48] = True
    bright = ViewsConfig(intensity=PLAIN.model_copy(update={"inversion_probability": 1.0}))
    pair = views(torch.full((4, 1, 64, 64), 0.25) * inside[:, None], list(range(4)), inside=inside, config=bright)
    assert torch.equal(pair.a[:, 0] > 0, inside)
    assert torch.equal(pair.b[:, 0] > 0, pair.valid)
    source = pair.warp[pair.valid]
    assert source[:, 0].min() > 8 - 0.002
    assert source[:, 1].max() < 47 + 0.002


def test_a_label_moves_with_its_image() -> None:
    rows, columns = torch.meshgrid(torch.arange(70), torch.arange(90), indexing="ij")
    label = ((rows // 12 + columns // 12) % 3)[None].expand(4, -1, -1) + 1
    image = label[:, None].float() / 4
    generators = [keyed_generator(0, index) for index in range(4)]
    result, classes = augment_labelled(
        image, label, config=GEOMETRY_ONLY, size=64, spacing_mm=1.5, generators=generators
    )
    assert result.shape == (4, 1, 64, 64)
    assert classes.shape == (4, 64, 64)
    assert classes.dtype == torch.int64
    within_class = (result[:, 0] * 4 - (result[:, 0] * 4).round()).abs() < 1e-3
    same = (result[:, 0] * 4).round().long() == classes
    assert same[within_class].float().mean() > 0.97  # the rest: pixels midway between classes 1 and 3
    assert torch.equal(classes == 0, result[:, 0] == 0)


def test_labels_are_cut_about_the_centre_when_nothing_moves() -> None:
    still = GeometryConfig(
        rotation_deg=0, scale=(1, 1), shear_deg=0, translation_mm=0, flip_probability=0, elastic_mm=0
    )
    label = torch.randint(0, 4, (1, 40, 20))
    image = torch.rand(1, 1, 40, 20)
    inside = torch.ones(1, 40, 20, dtype=torch.bool)
    inside[:, :, :4] = False
    result, classes = augment_labelled(
        image,
        label,
        config=ViewsConfig(geometry=still, intensity=PLAIN),
        size=32,
        spacing_mm=1.0,
        generators=[keyed_generator(0)],
        inside=inside,
    )
    assert torch.equal(classes[:, :, 6:26], label[:, 4:36] * inside[:, 4:36])
    torch.testing.assert_close(result[:, 0, :, 10:26], image[:, 0, 4:36, 4:], rtol=0, atol=1e-6)
    assert not classes[:, :, :6].any()
    assert not result[..., 26:].any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    image = torch.rand(2, 1, 32, 32)
    with pytest.raises(ValueError, match="one position and epoch per image"):
        views(image, [0])
    with pytest.raises(ValueError, match=r"inside \(B, H, W\)"):
        views(image, [0, 1], inside=torch.ones(2, 32, 31, dtype=torch.bool))
