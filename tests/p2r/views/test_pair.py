"""Views in 2D and 3D: the warp maps a point of b to the same anatomy in a, and views are independent of other images."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2r.config import GeometryConfig, IntensityConfig, ViewsConfig
from p2r.randomness import keyed_generator
from p2r.views import ViewPair, apply_warp, augment_labelled, augment_weakly_and_strongly, make_views

PROBABILITIES = [name for name in IntensityConfig.model_fields if name.endswith("_probability")]
PLAIN = IntensityConfig(**dict.fromkeys(PROBABILITIES, 0.0))
EVERYTHING = ViewsConfig(intensity=IntensityConfig(**dict.fromkeys(PROBABILITIES, 0.5)))
GEOMETRY_ONLY = ViewsConfig(intensity=PLAIN)
STILL = GeometryConfig(
    rotation_deg=0,
    rotation_3d_deg=(0, 0, 0),
    scale=(1, 1),
    shear_deg=0,
    translation_mm=0,
    flip_probability=0,
    elastic_mm=0,
)
PARTS = ("a", "b", "warp", "valid")


def coordinate_image(num: int, *size: int) -> Tensor:
    """Return an image whose channels are its own coordinates, as fractions of its size."""
    places = torch.meshgrid(*(torch.arange(length) / length for length in size), indexing="ij")
    return torch.stack(places).expand(num, len(size), *size)


def views(image: Tensor, positions: list[int], *, inside: Tensor | None = None, **options: Any) -> ViewPair:
    options = {"config": ViewsConfig(), "spacing_mm": 1.5, "seed": 3, **options}
    epochs = np.full(len(positions), options.pop("epoch", 1))
    inside = torch.ones(len(image), *image.shape[2:], dtype=torch.bool) if inside is None else inside
    return make_views(image, inside, epochs=epochs, positions=np.array(positions), **options)


@pytest.mark.parametrize(
    ("size", "spacing_mm"),
    [
        ((64, 64), 1.5),
        ((80, 50), 1.5),
        ((96, 40), (1.0, 2.5)),
        ((32, 32, 32), 2.0),
        ((40, 34, 18), (1.0, 1.2, 3.0)),
    ],
)
def test_a_valid_pixel_of_b_shows_the_place_in_a_that_the_warp_names(
    size: tuple[int, ...], spacing_mm: float | tuple[float, ...]
) -> None:
    pair = views(coordinate_image(6, *size), list(range(6)), config=GEOMETRY_ONLY, spacing_mm=spacing_mm)
    shown = pair.b.movedim(1, -1)[pair.valid] * torch.tensor(size)
    torch.testing.assert_close(shown, pair.warp[pair.valid], rtol=0, atol=1e-3)
    assert pair.valid.float().mean() > 0.3


def test_embedding_a_warped_image_equals_warping_the_embedding() -> None:
    """A pointwise map is exactly equivariant to any warp onto whole pixels, here a quarter turn."""
    image = torch.rand(1, 1, 31, 31)
    rows, columns = torch.meshgrid(torch.arange(31.0), torch.arange(31.0), indexing="ij")
    quarter_turn = torch.stack([columns, 30 - rows], -1)[None]

    def embed(view: Tensor) -> Tensor:
        return torch.cat([view.sin(), view**2], dim=1)

    assert torch.equal(embed(apply_warp(image, quarter_turn)), apply_warp(embed(image), quarter_turn))
    assert torch.equal(apply_warp(image, quarter_turn), image.rot90(1, (2, 3)))


@pytest.mark.parametrize("size", [(96, 96), (40, 40, 40)])
def test_a_network_of_isotropic_filters_is_equivariant_up_to_interpolation_error(size: tuple[int, ...]) -> None:
    """The output of isotropic filters rotates with the image, by the warp of the views."""
    dimensions = len(size)
    config = ViewsConfig(
        geometry=STILL.model_copy(
            update={"rotation_deg": 90.0, "rotation_3d_deg": (90.0,) * 3, "flip_probability": 0.5}
        ),
        intensity=PLAIN,
    )
    places = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, length) for length in size), indexing="ij"))
    centres = torch.rand(4, dimensions, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    image = (
        torch.stack(
            [
                (
                    -12 * (places[None] - centres[..., blob].reshape(4, dimensions, *[1] * dimensions)).square().sum(1)
                ).exp()
                for blob in range(8)
            ]
        ).sum(0)[:, None]
        / 4
    )
    distance = torch.stack(torch.meshgrid(*[torch.arange(-6.0, 7.0)] * dimensions, indexing="ij")).norm(dim=0)
    filters = torch.stack([(-(distance**2) / (2 * sigma**2)).exp() for sigma in (1.0, 1.5, 2.0)])[:, None]
    filters /= filters.flatten(1).sum(1).reshape(-1, 1, *[1] * dimensions)
    convolve = F.conv2d if dimensions == 2 else F.conv3d

    def embed(view: Tensor) -> Tensor:
        return (convolve(view, filters, padding=6) * 3).tanh()

    pair = views(image, [0, 1, 2, 3], config=config)
    inner = F.avg_pool3d if dimensions == 3 else F.avg_pool2d
    far_from_edges = inner(pair.valid[:, None].float(), 13, stride=1, padding=6)[:, 0] > 0.999
    followed, expected = embed(pair.b), apply_warp(embed(pair.a), pair.warp)
    assert far_from_edges.float().mean() > 0.05
    error = (followed - expected).abs().amax(1)[far_from_edges]
    contrast = expected.movedim(1, -1)[far_from_edges].std()
    assert error.max() < 0.05 * contrast
    unwarped = (followed - embed(pair.a)).abs().amax(1)[far_from_edges]
    assert unwarped.mean() > 20 * error.mean()


@pytest.mark.parametrize("config", [ViewsConfig(), EVERYTHING], ids=["default", "everything"])
@pytest.mark.parametrize("size", [(64, 64), (45, 51), (150, 130), (20, 33, 27)])
def test_an_images_views_do_not_depend_on_the_rest_of_the_batch(size: tuple[int, ...], config: ViewsConfig) -> None:
    image = torch.rand(9, 1, *size, generator=torch.Generator().manual_seed(1))
    together = views(image, list(range(100, 109)), config=config)
    for index in (0, 4, 8):
        alone = views(image[index : index + 1], [100 + index], config=config)
        for name in PARTS:
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[index]), name
    order = [7, 2, 5]
    some = views(image[order], [100 + index for index in order], config=config)
    assert torch.equal(some.b, together.b[order])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_share_a_batch_make_the_views_of_one(num_ranks: int) -> None:
    image = torch.rand(6, 1, 24, 20, 22, generator=torch.Generator().manual_seed(1))
    together = views(image, list(range(6)), config=EVERYTHING)
    for rank in range(num_ranks):
        own = list(range(rank, 6, num_ranks))
        part = views(image[own], own, config=EVERYTHING)
        for name in PARTS:
            assert torch.equal(getattr(part, name), getattr(together, name)[own])


@pytest.mark.parametrize("size", [(75, 83), (190, 180), (33, 34, 35)])
def test_views_are_the_same_with_any_number_of_threads(size: tuple[int, ...]) -> None:
    image = torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(1))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(views(image, [0, 1, 2], config=EVERYTHING))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(getattr(other, name), getattr(made[0], name)) for name in PARTS)


def test_seed_epoch_and_position_each_give_other_views() -> None:
    image = torch.rand(1, 1, 32, 32)
    base = views(image, [0])
    others = [views(image, [1]), views(image, [0], seed=4), views(image, [0], epoch=2)]
    assert torch.equal(views(image, [0]).b, base.b)
    assert not any(torch.equal(other.warp, base.warp) for other in others)


@pytest.mark.parametrize("size", [(33, 47), (12, 15, 10)])
def test_without_any_transform_both_views_are_the_image_exactly(size: tuple[int, ...]) -> None:
    image = torch.rand(3, 2, *size)
    pair = views(image, [0, 1, 2], config=ViewsConfig(geometry=STILL, intensity=PLAIN))
    assert torch.equal(pair.a, image)
    assert torch.equal(pair.b, image)
    assert pair.valid.all()
    assert torch.equal(pair.warp[0], torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1).float())


def test_the_two_views_differ_in_appearance_also_where_nothing_moves() -> None:
    image = torch.rand(2, 1, 32, 32)
    pair = views(image, [0, 1], config=ViewsConfig(geometry=STILL))
    assert pair.valid.all()
    assert (pair.a - pair.b).abs().mean() > 0.02


def test_the_warp_does_not_depend_on_what_the_appearance_may_be() -> None:
    image = torch.rand(2, 1, 32, 32)
    assert torch.equal(views(image, [0, 1]).warp, views(image, [0, 1], config=EVERYTHING).warp)


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


@pytest.mark.parametrize("size", [(32, 32), (12, 12, 12)])
def test_an_image_without_a_pixel_in_the_scan_has_no_valid_pixel_and_no_nan(size: tuple[int, ...]) -> None:
    inside = torch.zeros(2, *size, dtype=torch.bool)
    inside[0] = True
    everything = EVERYTHING.intensity.model_copy(update={"window_probability": 1.0})
    pair = views(torch.rand(2, 1, *size), [0, 1], inside=inside, config=ViewsConfig(intensity=everything))
    assert not pair.valid[1].any()
    assert not pair.a[1].any() and not pair.b[1].any()
    assert pair.a.isfinite().all() and pair.b.isfinite().all() and pair.warp.isfinite().all()


def test_a_view_that_shows_nothing_of_the_image_is_all_invalid() -> None:
    far = ViewsConfig(geometry=GeometryConfig(translation_mm=1000.0))
    pair = views(torch.rand(20, 1, 16, 16), list(range(20)), config=far)
    gone = ~pair.valid.flatten(1).any(1)
    assert gone.sum() > 15
    assert not pair.b[gone].any()


@pytest.mark.parametrize("size", [(70, 90), (30, 34, 38)])
def test_a_label_moves_with_its_image(size: tuple[int, ...]) -> None:
    blocks = sum(index // 12 for index in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    label = (blocks % 3)[None].expand(4, *size) + 1  # type: ignore[index]
    image = label[:, None].float() / 4
    generators = [keyed_generator(0, index) for index in range(4)]
    out = 64 if len(size) == 2 else (24, 20, 28)
    result, classes = augment_labelled(
        image, label, config=GEOMETRY_ONLY, size=out, spacing_mm=1.5, generators=generators
    )
    shape = (64, 64) if isinstance(out, int) else out
    assert result.shape == (4, 1, *shape)
    assert classes.shape == (4, *shape)
    assert classes.dtype == torch.int64
    within_class = (result[:, 0] * 4 - (result[:, 0] * 4).round()).abs() < 1e-3
    same = (result[:, 0] * 4).round().long() == classes
    assert same[within_class].float().mean() > 0.97  # the rest: pixels midway between classes 1 and 3
    assert torch.equal(classes == 0, result[:, 0] == 0)


def test_augmenting_advances_generators_equally_whatever_is_drawn() -> None:
    after = []
    for config in (ViewsConfig(), EVERYTHING, ViewsConfig(geometry=STILL, intensity=PLAIN)):
        generators = [keyed_generator(0, index) for index in range(2)]
        image, label = torch.rand(2, 1, 16, 16), torch.ones(2, 16, 16, dtype=torch.int64)
        augment_labelled(image, label, config=config, size=16, spacing_mm=1.0, generators=generators)
        after.append([generator.random() for generator in generators])
    assert after[0] == after[1] == after[2]


def test_labels_are_cut_about_the_centre_when_nothing_moves() -> None:
    label = torch.randint(0, 4, (1, 40, 20))
    image = torch.rand(1, 1, 40, 20)
    inside = torch.ones(1, 40, 20, dtype=torch.bool)
    inside[:, :, :4] = False
    result, classes = augment_labelled(
        image,
        label,
        config=ViewsConfig(geometry=STILL, intensity=PLAIN),
        size=32,
        spacing_mm=1.0,
        generators=[keyed_generator(0)],
        inside=inside,
    )
    assert torch.equal(classes[:, :, 6:26], label[:, 4:36] * inside[:, 4:36])
    assert torch.equal(result[:, 0, :, 10:26], image[:, 0, 4:36, 4:])
    assert not classes[:, :, :6].any()
    assert not result[..., 26:].any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    image = torch.rand(2, 1, 32, 32)
    with pytest.raises(ValueError, match="one position and epoch per image"):
        views(image, [0])
    with pytest.raises(ValueError, match=r"inside \(B, \*S\)"):
        views(image, [0, 1], inside=torch.ones(2, 32, 31, dtype=torch.bool))
    for spacing_mm in ((1.0,), (1.0, 1.0, 1.0), 0.0, (1.0, -2.0), float("nan")):
        with pytest.raises(ValueError, match="spacing_mm must be one positive number or 2"):
            views(image, [0, 1], spacing_mm=spacing_mm)
    with pytest.raises(ValueError, match="one generator per image"):
        augment_labelled(
            image, torch.ones(2, 32, 32).long(), config=ViewsConfig(), size=8, spacing_mm=1.0, generators=[]
        )


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 80), (24, 28, 32)])
def test_views_on_a_gpu_are_those_of_the_cpu_to_rounding_and_nothing_waits(size: tuple[int, ...]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image = torch.rand(8, 2, *size, generator=torch.Generator().manual_seed(1))
    inside = torch.ones(8, *size, dtype=torch.bool)
    expected = views(image, list(range(8)), config=EVERYTHING)
    image, inside = image.cuda(), inside.cuda()
    views(image, list(range(8)), inside=inside, config=EVERYTHING)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = views(image, list(range(8)), inside=inside, config=EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.warp.cpu(), expected.warp, rtol=0, atol=1e-4)
    assert (found.valid.cpu() == expected.valid).float().mean() > 0.999
    for name in ("a", "b"):
        difference = (getattr(found, name).cpu() - getattr(expected, name)).abs()
        assert difference.quantile(0.999) < 1e-3, name


@pytest.mark.parametrize("size", [(24, 20), (10, 12, 8)])
def test_the_views_of_an_unlabelled_image_show_the_same_places_and_the_weak_one_is_only_moved(
    size: tuple[int, ...],
) -> None:
    image = torch.rand(3, 1, *size)
    inside = torch.ones(3, *size, dtype=torch.bool)
    inside[:, :3] = False
    options: dict[str, Any] = {"size": 16, "spacing_mm": 1.0}

    def generators() -> list[np.random.Generator]:
        return [keyed_generator(0, slot) for slot in range(3)]

    labels = torch.randint(-1, 3, (3, *size))
    moved, moved_labels = augment_labelled(
        image, labels, inside=inside, generators=generators(), config=GEOMETRY_ONLY, **options
    )
    for config, is_alike in ((GEOMETRY_ONLY, True), (EVERYTHING, False)):
        views = augment_weakly_and_strongly(
            image,
            inside,
            generators=generators(),
            geometry=config.geometry,
            intensity=config.intensity,
            labels=labels,
            **options,
        )
        assert views.labels is not None and torch.equal(views.labels[views.shown], moved_labels[views.shown])
        assert views.shown.shape == (3, *[16] * len(size))
        for view in (views.weak, *views.strong):
            assert view.shape == (3, 1, *[16] * len(size))
            assert not view[:, 0][~views.shown].any()
        assert torch.equal(*views.strong) == is_alike == torch.equal(views.strong[0], views.weak)
        assert torch.equal(views.weak, moved), "as in augment_labelled, which draws the same geometry"


@pytest.mark.parametrize("size", [(40, 36), (24, 20, 16)])
def test_each_view_shows_a_box_of_its_own_and_valid_pixels_are_in_both(size: tuple[int, ...]) -> None:
    image, inside = torch.ones(6, 1, *size), torch.ones(6, *size, dtype=torch.bool)
    inside[:, :3] = False
    options: dict[str, Any] = {"spacing_mm": 1.0, "seed": 0, "epochs": np.zeros(6, int), "positions": np.arange(6)}
    whole = make_views(image, inside, config=GEOMETRY_ONLY, **options)
    views = make_views(image, inside, config=GEOMETRY_ONLY.model_copy(update={"shown_fraction": (0.3, 0.6)}), **options)
    assert torch.equal(views.warp, whole.warp), "the geometry does not depend on it"
    is_shown = views.a[:, 0] > 0
    share = is_shown.flatten(1).float().mean(1)
    assert ((share > 0.2) & (share < 0.7)).all() and len(share.unique()) == 6
    assert not is_shown[:, :3].any()
    assert views.valid.any() and not (views.valid & ~whole.valid).any()
    in_a = apply_warp(is_shown[:, None].float(), views.warp)[:, 0]
    torch.testing.assert_close(in_a[views.valid], torch.ones(int(views.valid.sum())))
    torch.testing.assert_close(views.b[:, 0][views.valid], torch.ones(int(views.valid.sum())))
    in_b = views.b[:, 0] > 0.999
    assert (in_b & ~views.valid).any(), "a place that only view b shows is no pair"
