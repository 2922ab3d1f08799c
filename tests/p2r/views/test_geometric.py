"""Warps: exact for the identity, otherwise in the right direction and in millimetres, in 2D and 3D."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from p2r.config import GeometryConfig
from p2r.views.draws import Draws
from p2r.views.geometric import Geometry, affine_matrix, apply_warp, inside_mask, sample_geometry, warp_of

STILL = GeometryConfig(
    rotation_deg=0,
    rotation_3d_deg=(0, 0, 0),
    scale=(1, 1),
    shear_deg=0,
    translation_mm=0,
    flip_probability=0,
    elastic_mm=0,
)
SIZES = [(64, 64), (50, 77), (20, 26, 31)]


def draws(num: int) -> Draws:
    return Draws.of_samples(0, epochs=np.zeros(num, dtype=np.int64), positions=np.arange(num))


def identity(*size: int) -> Tensor:
    return torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1)[None].float()


def warps(
    config: GeometryConfig,
    size: tuple[int, ...],
    *,
    num: int = 4,
    spacing_mm: float | tuple[float, ...] = 1.0,
    size_out: tuple[int, ...] | None = None,
) -> Tensor:
    mm = (spacing_mm,) * len(size) if isinstance(spacing_mm, float) else spacing_mm
    size_out = size_out or size
    geometry = sample_geometry(draws(num), config=config, size=size_out, spacing_mm=mm)
    return warp_of(geometry, size_in=size, size_out=size_out, spacing_mm=mm)


def affine(dimensions: int, **parts: Any) -> np.ndarray[Any, Any]:
    pairs = dimensions * (dimensions - 1) // 2
    neutral = {
        "rotation_deg": np.zeros((1, pairs)),
        "magnification": np.ones(1),
        "shear_deg": np.zeros((1, pairs)),
        "flipped": np.zeros((1, dimensions), dtype=bool),
    }
    return affine_matrix(**{**neutral, **parts})[0]


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (96, 160), (130, 101), (1, 5), (8, 8, 8), (13, 9, 30)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_an_identity_warp_returns_the_image_exactly(size: tuple[int, ...], mode: Any) -> None:
    image = torch.rand(1, 3, *size)
    assert torch.equal(apply_warp(image, identity(*size), mode=mode), image)


@pytest.mark.parametrize("size", SIZES)
def test_ranges_of_no_extent_give_the_identity_warp_exactly(size: tuple[int, ...]) -> None:
    spacing_mm = (0.7, 1.9, 3.3)[: len(size)]
    assert torch.equal(warps(STILL, size, spacing_mm=spacing_mm), identity(*size).expand(4, *size, -1))


def test_a_smaller_output_shows_the_centre_of_the_input() -> None:
    image = torch.rand(2, 1, 20, 30)
    warp = warps(STILL, (20, 30), size_out=(8, 10), num=2)
    assert torch.equal(apply_warp(image, warp), image[:, :, 6:14, 10:20])
    volume = torch.rand(1, 1, 8, 20, 30)
    warp = warps(STILL, (8, 20, 30), size_out=(4, 8, 10), num=1)
    assert torch.equal(apply_warp(volume, warp), volume[:, :, 2:6, 6:14, 10:20])


@pytest.mark.parametrize("size", [(10, 12), (10, 12, 7)])
def test_a_flip_mirrors_all_axes_exactly_and_folds_nothing(size: tuple[int, ...]) -> None:
    warp = warps(STILL.model_copy(update={"flip_probability": 1.0}), size, num=1)
    image = torch.rand(1, 1, *size)
    assert torch.equal(apply_warp(image, warp), image.flip(tuple(range(2, image.ndim))))
    one_axis = identity(*size).flip(1)
    assert inside_mask(one_axis, torch.ones(1, *size, dtype=torch.bool)).all()


def test_flips_along_each_axis_are_independent() -> None:
    config = STILL.model_copy(update={"flip_probability": 0.5})
    geometry = sample_geometry(draws(800), config=config, size=(8, 8, 8), spacing_mm=(1, 1, 1))
    signs = np.diagonal(geometry.matrix, axis1=1, axis2=2)
    for pattern in product((-1, 1), repeat=3):
        assert 60 < (signs == pattern).all(1).sum() < 140


@pytest.mark.parametrize("dimensions", [2, 3])
def test_bilinear_interpolation_equals_the_written_out_formula(dimensions: int) -> None:
    size = (9, 11, 6)[:dimensions]
    image = torch.rand(1, 1, *size, dtype=torch.float64)
    out = (4, 5, 3)[:dimensions]
    position = torch.rand(1, *out, dimensions, dtype=torch.float64) * (torch.tensor(size) - 1)
    result = apply_warp(image, position)
    for index in product(*map(range, out)):
        at = position[0][index].tolist()
        first = [min(int(x), length - 2) for x, length in zip(at, size, strict=True)]
        expected = 0.0
        for corner in product((0, 1), repeat=dimensions):
            place = tuple(a + b for a, b in zip(first, corner, strict=True))
            weight = np.prod([1 - abs(x - there) for x, there in zip(at, place, strict=True)])
            expected += float(image[0, 0][place]) * weight
        assert result[0, 0][index].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [(40, 52), (20, 24, 28)])
def test_a_warped_image_equals_scipys_at_the_warps_positions(size: tuple[int, ...]) -> None:
    image = torch.rand(2, 1, *size)
    warp = warps(GeometryConfig(translation_mm=2.0), size, num=2, spacing_mm=(1.0, 2.0, 1.5)[: len(size)])
    result = apply_warp(image, warp)
    for plane, position, moved in zip(image[:, 0], warp, result[:, 0], strict=True):
        expected = map_coordinates(
            plane.double().numpy(), position.double().movedim(-1, 0).numpy(), order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(moved.numpy(), expected, atol=2e-5)


def test_beyond_the_border_is_zero() -> None:
    for size in ((10, 13), (5, 10, 13)):
        image = torch.ones(1, 1, *size)
        far = identity(*size) + 20
        assert not apply_warp(image, far).any()
        assert not apply_warp(image, -far).any()


def test_translation_and_elastic_displacement_are_millimetres() -> None:
    config = STILL.model_copy(update={"translation_mm": 6.0, "elastic_mm": 3.0})
    coarse = warps(config, (33, 33), spacing_mm=2.0) - identity(33, 33)
    fine = warps(config, (65, 65), spacing_mm=1.0) - identity(65, 65)
    torch.testing.assert_close(2.0 * coarse, fine[:, ::2, ::2], rtol=0, atol=1e-4)
    shifts = warps(STILL.model_copy(update={"translation_mm": 6.0}), (8, 8), num=200, spacing_mm=2.0) - identity(8, 8)
    assert 2.8 < shifts.abs().max() <= 3.0


@pytest.mark.parametrize("dimensions", [2, 3])
def test_anisotropic_pixels_show_the_same_motion_in_millimetres(dimensions: int) -> None:
    """Apply the same draws to a fine grid and to every n-th pixel of it: at common pixels, both show the same positions."""
    config = GeometryConfig()
    steps = (1, 3, 2)[:dimensions]
    fine_size, coarse_size = (37,) * dimensions, (37, 13, 19)[:dimensions]
    fine = warps(config, fine_size, num=2, spacing_mm=1.0)
    coarse = warps(config, coarse_size, num=2, spacing_mm=tuple(map(float, steps)))
    every = (slice(None), *[slice(None, None, step) for step in steps])
    torch.testing.assert_close(coarse * torch.tensor(steps), fine[every], rtol=0, atol=1e-4)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_a_rotation_by_30_degrees_is_one_in_millimetres(axis: int | None) -> None:
    mm = np.array([1.0, 2.5] if axis is None else [1.0, 2.5, 0.8])
    dimensions = len(mm)
    angles = np.array([[30.0]]) if axis is None else 30.0 * np.eye(3)[axis : axis + 1]
    geometry = Geometry(affine(dimensions, rotation_deg=angles)[None], np.zeros((1, dimensions)), None)
    size = (21, 15, 19)[:dimensions]
    warp = warp_of(geometry, size_in=size, size_out=size, spacing_mm=mm.tolist())[0].double().numpy()
    centre = (np.array(size) - 1) / 2
    before = ((identity(*size)[0].numpy() - centre) * mm).reshape(-1, dimensions)
    after = ((warp - centre) * mm).reshape(-1, dimensions)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.linalg.norm(before, axis=1), atol=1e-4)
    if axis is not None:
        np.testing.assert_allclose(after[:, axis], before[:, axis], atol=1e-4)
        before, after = np.delete(before, axis, 1), np.delete(after, axis, 1)
    turned = (before * after).sum(1) / np.maximum((before**2).sum(1), 1e-9)
    np.testing.assert_allclose(turned[(before**2).sum(1) > 0.1], np.cos(np.deg2rad(30)), atol=1e-4)


def test_rotations_about_three_axes_follow_one_another() -> None:
    def about(axis: int, degrees: float) -> np.ndarray[Any, Any]:
        return affine(3, rotation_deg=degrees * np.eye(3)[axis : axis + 1])

    together = affine(3, rotation_deg=np.array([[10.0, 20.0, 30.0]]))
    np.testing.assert_allclose(together, about(0, 10) @ about(1, 20) @ about(2, 30), atol=1e-12)
    quarter = about(2, 90.0)
    np.testing.assert_allclose(quarter[:2, :2], affine(2, rotation_deg=np.array([[90.0]])), atol=1e-12)
    np.testing.assert_allclose(quarter @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_each_axis_has_its_own_range_of_rotation_in_3d() -> None:
    config = STILL.model_copy(update={"rotation_3d_deg": (0.0, 0.0, 40.0)})
    matrix = sample_geometry(draws(300), config=config, size=(8, 8, 8), spacing_mm=(1, 1, 1)).matrix
    np.testing.assert_allclose(matrix[:, 2], np.tile([0.0, 0.0, 1.0], (300, 1)), atol=1e-12)
    angles = np.rad2deg(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert -40 <= angles.min() < -38
    assert 38 < angles.max() <= 40


def test_a_magnification_of_two_shows_the_central_half() -> None:
    warp = warps(STILL.model_copy(update={"scale": (2.0, 2.0)}), (9, 9), num=1)
    assert warp[0, 0, 0].tolist() == pytest.approx([2.0, 2.0], abs=1e-5)
    assert warp[0, 8, 4].tolist() == pytest.approx([6.0, 4.0], abs=1e-5)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_rotation_and_shear_keep_volumes_and_reach_their_ranges(dimensions: int) -> None:
    ranges = {"rotation_deg": 180.0, "rotation_3d_deg": (180.0, 180.0, 180.0), "shear_deg": 30.0}
    config = STILL.model_copy(update=ranges)
    matrix = sample_geometry(draws(300), config=config, size=(8,) * dimensions, spacing_mm=(1,) * dimensions).matrix
    np.testing.assert_allclose(np.linalg.det(matrix), 1, atol=1e-9)
    angles = np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])
    assert angles.min() < -3.0
    assert angles.max() > 3.0


def test_shear_is_drawn_for_every_pair_of_axes() -> None:
    config = STILL.model_copy(update={"shear_deg": 20.0})
    matrix = sample_geometry(draws(300), config=config, size=(8, 8, 8), spacing_mm=(1, 1, 1)).matrix
    for i, j in ((0, 1), (0, 2), (1, 2)):
        angles = np.rad2deg(np.arctan(matrix[:, i, j]))
        assert angles.min() < -19 and 19 < angles.max() <= 20
        np.testing.assert_array_equal(matrix[:, j, i], 0)


@pytest.mark.parametrize("size", [(50, 61), (20, 33, 41)])
def test_a_warp_does_not_depend_on_other_images(size: tuple[int, ...]) -> None:
    together = warps(GeometryConfig(), size, num=7)
    mm = (1.0,) * len(size)
    geometry = sample_geometry(Draws(draws(7).keys[5:6]), config=GeometryConfig(), size=size, spacing_mm=mm)
    assert torch.equal(together[5], warp_of(geometry, size_in=size, size_out=size, spacing_mm=mm)[0])


@pytest.mark.parametrize(("size", "num"), [((128, 128), 32), ((48, 48, 48), 8)])
def test_default_ranges_fold_nothing(size: tuple[int, ...], num: int) -> None:
    warp = warps(GeometryConfig(), size, num=num, spacing_mm=1.5)
    margin = (190.0, 40.0)[len(size) - 2]
    large = torch.ones(num, *[int(length + 2 * margin) for length in size], dtype=torch.bool)
    assert inside_mask(warp + margin, large).all()


@pytest.mark.parametrize("size", [(64, 64), (28, 32, 36)])
def test_valid_pixels_lie_in_the_image_and_in_the_scan(size: tuple[int, ...]) -> None:
    inside = torch.zeros(8, *size, dtype=torch.bool)
    first, last = [5] * len(size), [length - 9 for length in size]
    inside[(slice(None), *[slice(a, b + 1) for a, b in zip(first, last, strict=True)])] = True
    warp = warps(GeometryConfig(), size, num=8, spacing_mm=1.5)
    valid = inside_mask(warp, inside)
    assert 0.1 < valid.float().mean() < 0.9
    for position in ((warp[valid] + 0.002).floor(), (warp[valid] - 0.002).ceil()):
        assert (position.amin(0) >= torch.tensor(first)).all()
        assert (position.amax(0) <= torch.tensor(last)).all()


def test_a_pixel_that_is_partly_padding_is_not_valid() -> None:
    inside = torch.ones(1, 8, 8, dtype=torch.bool)
    inside[0, 4, 4] = False
    valid = inside_mask(identity(8, 8) + 0.25, inside)[0]
    assert not valid[3:5, 3:5].any()
    assert not valid[7].any()
    assert valid.sum() == 49 - 4


@pytest.mark.parametrize("size", [(32, 32), (32, 9, 10)])
def test_folded_pixels_are_not_valid_whichever_way_the_rest_is_turned(size: tuple[int, ...]) -> None:
    folded = identity(*size)
    folded[0, 10:14] = folded[0, 10:14].flip(0)
    inside = torch.ones(1, *size, dtype=torch.bool)
    for warp in (folded, folded.flip(2)):
        valid = inside_mask(warp, inside)[0]
        assert not valid[10:14].any()
        assert valid[:9].all()
        assert valid[15:].all()


@pytest.mark.parametrize("size", [(96, 96), (40, 44, 48)])
def test_pixels_are_folded_where_the_elastic_field_says_so(size: tuple[int, ...]) -> None:
    """Compare with the sign of the determinant from numpy's gradient, for a field that is strong enough to fold."""
    config = GeometryConfig(elastic_mm=14, elastic_spacing_mm=16, translation_mm=0, rotation_deg=0)
    warp = warps(config, size, num=3)
    inside = torch.ones(3, *[length + 200 for length in size], dtype=torch.bool)
    valid = inside_mask(warp + 100, inside)
    assert 0.02 < (~valid).float().mean() < 0.6
    for position, shows in zip(warp.double().numpy(), valid.numpy(), strict=True):
        axes = range(len(size))
        jacobian = np.stack([np.stack(np.gradient(position[..., axis]), -1) for axis in axes], -2)
        sign = np.sign(np.median(np.linalg.det(jacobian)))
        determinant = sign * np.linalg.det(jacobian)
        inner = (slice(2, -2),) * len(size)
        # Only where the sign is clear, because the two take differences at different positions.
        assert not shows[inner][determinant[inner] < -0.1].any()
        assert shows[inner][determinant[inner] > 0.4].mean() > 0.999


def test_shapes_that_do_not_fit_are_refused() -> None:
    for image, warp in (
        (torch.rand(2, 1, 8, 8), identity(8, 8)),
        (torch.rand(1, 8, 8), identity(8, 8)),
        (torch.rand(1, 1, 8, 8, 8), identity(8, 8)),
        (torch.rand(1, 1, 8), identity(8)),
    ):
        with pytest.raises(ValueError, match=r"\(B, C, \*S\)"):
            apply_warp(image, warp)
