"""Voxels -> the network's grid -> voxels."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from p2r.config import PERCENTILES
from p2r.data import grids
from p2r.data.grids import axis_weights, cubic_shape, cubic_to_voxel, from_cubic, from_grid, to_grid, to_patch
from p2r.data.preprocess import (
    Preparation,
    frames_of,
    intensity_window,
    label_frames_of,
    label_planes_of,
    normalise,
    percentile_table,
    planes_of,
    planes_to_volume,
    slice_axis,
    volume_to_planes,
)
from p2r.data.volume import Volume
from p2r.errors import RefusedScan

RULES = Preparation(spacing_mm=1.5, image_size=32)


def volume_of(data: NDArray[Any], spacing_mm: tuple[float, float, float] = (1.5, 1.5, 8.0)) -> Volume:
    affine = np.diag([*spacing_mm, 1.0])
    return Volume(data, affine, affine, data.shape[:3], spacing_mm, "scan")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("spacing_mm", "axis"),
    [
        ((1.0, 1.0, 8.0), 2),
        ((5.0, 1.0, 1.0), 0),
        ((1.0, 3.0, 1.0), 1),
        ((1.0, 1.0, 1.0), 2),
        ((1.0, 1.0, 0.995), 2),
        ((1.0, 1.0, 0.9), 1),
    ],
)
def test_slices_are_perpendicular_to_the_largest_spacing(spacing_mm: tuple[float, ...], axis: int) -> None:
    assert slice_axis(spacing_mm) == axis
    assert slice_axis(spacing_mm, 0) == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_stacking_inverts_slicing(axis: int, num_frames: int) -> None:
    data = np.random.default_rng(0).integers(0, 99, (4, 5, 6, num_frames))
    planes = volume_to_planes(data, axis)
    assert len(planes) == num_frames * data.shape[axis]
    for number, plane in enumerate(planes):
        frame, position = divmod(number, data.shape[axis])
        np.testing.assert_array_equal(plane, data[..., frame].take(position, axis))
    np.testing.assert_array_equal(planes_to_volume(planes, axis, num_frames), data)
    vectors = np.stack([planes, -planes], axis=-1)
    np.testing.assert_array_equal(planes_to_volume(vectors, axis, num_frames)[..., 1], -data)


def test_stacking_refuses_an_incomplete_frame() -> None:
    with pytest.raises(ValueError, match="frames"):
        planes_to_volume(np.zeros((5, 2, 2)), 0, 2)


def test_the_window_ignores_the_background() -> None:
    data = np.zeros((20, 20, 20), np.int16)
    data[5:15, 5:15, 5:15] = np.arange(1, 1001).reshape(10, 10, 10)
    low, high = intensity_window(percentile_table(data), (0.5, 99.5))
    assert (low, high) == pytest.approx(tuple(np.percentile(np.arange(1, 1001), (0.5, 99.5))))


def test_the_window_of_a_mask_falls_back_to_all_voxels() -> None:
    data = np.zeros((10, 10, 10), np.int16)
    data[:5] = 7
    assert intensity_window(percentile_table(data), (0.5, 99.5)) == (0.0, 7.0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "float32"])
def test_the_table_has_the_percentiles_of_numpy(dtype: str) -> None:
    rng = np.random.default_rng(0)
    data = rng.gamma(2, 20, (30, 31, 7)).astype(dtype)
    np.testing.assert_allclose(percentile_table(data), np.percentile(data[data != 0], PERCENTILES), rtol=1e-6)


def test_a_window_of_equal_percentiles_uses_minimum_and_maximum() -> None:
    data = np.zeros((10, 10, 10), np.int16)
    data[:3] = 5
    data[0, 0] = 9
    table = percentile_table(data)
    assert intensity_window(table, (10.0, 90.0)) == (5.0, 9.0) and intensity_window(table, (25.0, 50.0)) == (5.0, 9.0)


def test_nearly_constant_intensities_count_as_constant() -> None:
    data = np.zeros((20, 20, 20), np.int16)
    data[0, 0, 0] = 1
    with pytest.raises(RefusedScan) as refusal:
        intensity_window(percentile_table(data), (0.5, 99.5))
    assert refusal.value.code == "constant"


def test_the_window_of_a_large_scan_uses_every_slice() -> None:
    # A stride of 16 along the last axis would use one slice in sixteen.
    data = np.broadcast_to(np.arange(1, 65, dtype=np.int16), (512, 512, 64))
    low, high = intensity_window(percentile_table(data), (0.5, 99.5))
    assert (low, high) == (1.0, 64.0)


def test_normalising_clips() -> None:
    assert normalise(torch.tensor([0, 10, 15, 20, 99]), 10.0, 20.0).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_slice_with_the_target_grid_is_unchanged() -> None:
    planes = noise(2, 1, 20, 24)
    image, inside = to_grid(planes, (1.5, 1.5), target_mm=1.5, size=None)
    assert torch.equal(image, planes)
    assert inside.all()


def test_padding_is_symmetric_and_marked() -> None:
    planes = noise(2, 1, 20, 25)
    image, inside = to_grid(planes, (1.0, 1.0), target_mm=1.0, size=32)
    assert image.shape == (2, 1, 32, 32)
    assert torch.equal(image[:, :, 6:26, 3:28], planes)
    assert inside[:, 6:26, 3:28].all()
    assert inside.sum() == 2 * 20 * 25
    assert not image[~inside[:, None]].any()


def test_cropping_is_central() -> None:
    planes = noise(1, 1, 40, 35)
    image, inside = to_grid(planes, (1.0, 1.0), target_mm=1.0, size=32)
    assert torch.equal(image, planes[..., 4:36, 2:34])
    assert inside.all()


def test_resampling_gives_square_pixels_of_the_stated_size() -> None:
    image, _ = to_grid(noise(1, 1, 20, 40), (3.0, 0.75), target_mm=1.5, size=None)
    assert image.shape[-2:] == (40, 20)


def test_a_disc_keeps_its_position_in_millimetres() -> None:
    rows, columns = np.meshgrid(np.arange(60), np.arange(30), indexing="ij")
    centre = np.array([20.0, 18.0])
    disc = np.exp(-(((rows - centre[0]) * 1.0) ** 2 + ((columns - centre[1]) * 2.0) ** 2) / 50)
    image, _ = to_grid(torch.from_numpy(disc).float()[None, None], (1.0, 2.0), target_mm=1.5, size=64)
    mass = image[0, 0] / image.sum()
    found = [(mass.sum(1 - axis) * torch.arange(64)).sum().item() for axis in (0, 1)]
    from_middle_mm = [(20 - 29.5) * 1.0, (18 - 14.5) * 2.0]
    assert [(value - 31.5) * 1.5 for value in found] == pytest.approx(from_middle_mm, abs=0.3)


def test_labels_are_resampled_without_new_values() -> None:
    labels = torch.randint(0, 4, (1, 1, 20, 20), generator=torch.Generator().manual_seed(0)).float() * 3
    image, _ = to_grid(labels, (1.0, 1.0), target_mm=0.7, size=None, mode="nearest")
    assert set(image.unique().tolist()) == {0.0, 3.0, 6.0, 9.0}


@pytest.mark.parametrize("shape", [(20, 25), (40, 35), (41, 20), (7, 64)])
@pytest.mark.parametrize("size", [32, 33, None])
def test_the_inverse_undoes_cropping_and_padding(shape: tuple[int, int], size: int | None) -> None:
    planes = noise(1, 2, *shape)
    image, inside = to_grid(planes, (1.5, 1.5), target_mm=1.5, size=size)
    back = from_grid(image, shape, spacing_mm=(1.5, 1.5), target_mm=1.5)
    kept = from_grid(inside[:, None].float(), shape, spacing_mm=(1.5, 1.5), target_mm=1.5).bool().expand_as(back)
    assert torch.equal(back[kept], planes[kept])
    assert not back[~kept].any()
    assert kept[0, 0].sum() == min(shape[0], size or shape[0]) * min(shape[1], size or shape[1])


def test_the_inverse_of_resampling_nearly_restores_a_smooth_image() -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 3, 40), torch.linspace(0, 2, 30), indexing="ij")
    planes = (torch.sin(rows) * torch.cos(columns))[None, None]
    image, _ = to_grid(planes, (1.25, 1.4), target_mm=1.0, size=64)
    back = from_grid(image, (40, 30), spacing_mm=(1.25, 1.4), target_mm=1.0)
    assert (back - planes).abs().max() < 0.02


def test_slices_of_a_volume_are_in_order() -> None:
    data = np.random.default_rng(0).integers(0, 1000, (20, 24, 5, 2)).astype(np.uint16)
    planes = planes_of(volume_of(data), preparation=RULES, size=32)
    assert planes.images.shape == (10, 1, 32, 32)
    assert planes.inside.shape == (10, 32, 32)
    assert (planes.axis, planes.shape, planes.spacing_mm, planes.num_frames) == (2, (20, 24), (1.5, 1.5), 2)
    expected = np.clip((data[:, :, 3, 1].astype(np.float32) - planes.low) / (planes.high - planes.low), 0, 1)
    np.testing.assert_allclose(planes.images[8, 0, 6:26, 4:28], expected, atol=1e-6)


def test_label_slices_are_aligned_with_their_images() -> None:
    data = np.random.default_rng(0).integers(0, 1000, (20, 24, 5, 1)).astype(np.int16)
    labels = (data > 500).astype(np.int16)
    planes = planes_of(volume_of(data), preparation=RULES, size=32)
    label = label_planes_of(volume_of(labels), preparation=RULES, axis=planes.axis, size=32)
    assert label.dtype == torch.int64
    assert torch.equal(label.bool(), planes.images[:, 0] * (planes.high - planes.low) + planes.low > 500.5)


def test_the_size_of_the_batch_does_not_change_a_plane() -> None:
    data = np.random.default_rng(0).integers(0, 1000, (37, 29, 6, 1)).astype(np.int16)
    whole = planes_of(volume_of(data, (1.1, 0.9, 8.0)), preparation=RULES, size=32)
    for number, plane in enumerate(volume_to_planes(data, 2)):
        raw = torch.from_numpy(plane.astype(np.float32))[None, None]
        alone, _ = to_grid(normalise(raw, whole.low, whole.high), (1.1, 0.9), target_mm=1.5, size=32)
        assert torch.equal(alone[0], whole.images[number])


def test_preparation_refuses_unknown_keys() -> None:
    with pytest.raises(ValidationError):
        Preparation.model_validate({"spacing_mm": 1.5, "image_size": 32, "spacing": 1})


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_a_whole_axis_is_resampled_as_torch_does_with_antialiasing(scale: float) -> None:
    num_voxels = 40
    size = round(num_voxels / scale)
    weights, inside = axis_weights(
        num_voxels, (num_voxels - 1) / 2, spacing_mm=1.0, target_mm=num_voxels / size, size=size
    )
    plane = noise(1, 1, num_voxels, 7)
    expected = torch.nn.functional.interpolate(plane, size=(size, 7), mode="bilinear", antialias=True)
    assert inside.all()
    torch.testing.assert_close(weights @ plane[0, 0], expected[0, 0], rtol=0, atol=1e-5)


def test_a_patch_shows_the_position_it_was_cropped_from() -> None:
    """The value of a voxel is its position in mm, so a patch must have the positions of its samples."""
    shape, spacing_mm = (30, 24, 10), (1.0, 1.5, 4.0)
    grids = torch.meshgrid(*(torch.arange(n) * mm for n, mm in zip(shape, spacing_mm, strict=True)), indexing="ij")
    centre, target_mm, size = (14.3, 11.0, 4.6), 1.25, 8
    for axis in range(3):
        patch, inside = to_patch(grids[axis], centre, spacing_mm=spacing_mm, target_mm=target_mm, size=size)
        wanted = centre[axis] * spacing_mm[axis] + (torch.arange(size) - (size - 1) / 2) * target_mm
        shown = torch.movedim(patch, axis, 0)
        assert inside.all()
        torch.testing.assert_close(shown, wanted.float()[:, None, None].expand_as(shown), rtol=0, atol=0.1)


def test_a_patch_beyond_the_volume_is_zero_and_marked_as_padding() -> None:
    patch, inside = to_patch(
        torch.ones(4, 20, 20), (1.5, 0.0, 10.0), spacing_mm=(2.0, 1.0, 1.0), target_mm=1.0, size=12
    )
    assert inside.any((1, 2)).tolist() == [False] * 2 + [True] * 8 + [False] * 2  # 8 mm of 12
    assert (
        inside.any((0, 2)).tolist() == [False] * 5 + [True] * 7
    )  # samples are shifted by half a voxel: one is at the border
    assert inside.any((0, 1)).all()
    torch.testing.assert_close(patch, inside.float())


CUBIC = Preparation(dimensions=3, spacing_mm=1.25, image_size=16, intensity_percentiles=(0.0, 100.0))


def positions(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> list[NDArray[np.float32]]:
    """Return, for each axis, a volume whose values are the positions along it, in mm from the centre."""
    along = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    return [grid.astype(np.float32) for grid in np.meshgrid(*along, indexing="ij")]


@pytest.mark.parametrize("size", [None, 16])
def test_frames_have_cubic_voxels_about_the_centre_of_the_volume(size: int | None) -> None:
    shape, spacing_mm = (30, 24, 10), (1.0, 1.5, 4.0)
    for axis, own in enumerate(positions(shape, spacing_mm)):
        frames = frames_of(volume_of(np.stack([own, own], -1), spacing_mm), preparation=CUBIC, size=size)
        cubic = (size,) * 3 if size else (24, 29, 32)  # 30 mm, 36 mm and 40 mm
        assert frames.images.shape == (2, 1, *cubic)
        assert frames.inside.shape == (2, *cubic)
        shown = frames.images[1, 0] * (frames.high - frames.low) + frames.low
        wanted = torch.from_numpy(positions(cubic, (1.25,) * 3)[axis])
        limit = (
            (shape[axis] - 1) / 2 * spacing_mm[axis]
        )  # beyond the centre of the outermost voxel, its value is repeated
        inside = frames.inside[1]
        torch.testing.assert_close(shown[inside], wanted.clamp(-limit, limit)[inside], rtol=0, atol=0.2)
        assert not frames.images[1, 0][~inside].any()


def test_cubic_voxels_cover_the_whole_volume_and_mark_it() -> None:
    shape, spacing_mm, target_mm = (35, 51, 7), (0.9, 1.0, 5.5), 1.7
    cubic = cubic_shape(shape, spacing_mm, target_mm=target_mm)
    for own, size, mm, (scale, offset) in zip(
        shape, cubic, spacing_mm, cubic_to_voxel(shape, cubic, spacing_mm=spacing_mm, target_mm=target_mm), strict=True
    ):
        assert 0 <= size * target_mm - own * mm < target_mm
        assert scale * mm == pytest.approx(target_mm)
        assert (offset * 2 + scale * (size - 1)) / 2 == pytest.approx((own - 1) / 2)  # the centres coincide
    assert cubic_shape((40, 40, 40), (1.0001, 0.9999, 1.0), target_mm=1.0) == (40, 40, 40)


def test_frames_on_the_same_grid_equal_the_volume_and_invert_exactly() -> None:
    data = np.random.default_rng(0).random((9, 8, 7, 2), dtype=np.float32)
    volume = volume_of(data, (1.25, 1.25, 1.25))
    frames = frames_of(volume, preparation=CUBIC, size=None)
    expected = normalise(torch.from_numpy(data), frames.low, frames.high).permute(3, 0, 1, 2)
    assert torch.equal(frames.images[:, 0], expected)
    assert frames.inside.all()
    back = from_cubic(frames.images, frames.shape, spacing_mm=frames.spacing_mm, target_mm=1.25)
    assert torch.equal(back, frames.images)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.5, 4.0), (0.7, 0.8, 0.6)])
def test_the_inverse_from_cubic_voxels_restores_every_position(spacing_mm: tuple[float, float, float]) -> None:
    shape = (20, 18, 12)
    cubic = cubic_shape(shape, spacing_mm, target_mm=1.25)
    for axis, wanted in enumerate(positions(shape, spacing_mm)):
        maps = torch.from_numpy(positions(cubic, (1.25,) * 3)[axis])[None, None]
        back = from_cubic(maps, shape, spacing_mm=spacing_mm, target_mm=1.25)[0, 0]
        inner = slice(1, -1)
        found, expected = torch.movedim(back, axis, 0)[inner], torch.movedim(torch.from_numpy(wanted), axis, 0)[inner]
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def test_voxels_outside_a_part_are_zero_after_the_inverse() -> None:
    back = from_cubic(torch.ones(1, 1, 4, 4, 4), (10, 4, 4), spacing_mm=(1.0, 1.0, 1.0), target_mm=1.0)
    assert back[0, 0].amax((1, 2)).tolist() == [0.0] * 3 + [1.0] * 4 + [0.0] * 3


@pytest.mark.parametrize("size", [None, 32])
def test_labels_of_frames_are_those_of_the_nearest_voxel(size: int | None) -> None:
    shape, spacing_mm = (30, 24, 10), (1.0, 1.5, 4.0)
    labels = np.random.default_rng(0).integers(0, 4, (*shape, 2)).astype(np.int16)
    volume = volume_of(labels, spacing_mm)
    found = label_frames_of(volume, preparation=CUBIC, size=size).numpy()
    cubic = found.shape[1:]
    assert cubic == ((size,) * 3 if size else (24, 29, 32))
    for place in np.ndindex(4, 4, 4):  # at corners, edges and within
        index = [int(step * (n - 1) / 3) for step, n in zip(place, cubic, strict=True)]
        own = [
            (i - (n - 1) / 2) * 1.25 / mm + (o - 1) / 2
            for i, n, o, mm in zip(index, cubic, shape, spacing_mm, strict=True)
        ]
        inside = all(-0.5 <= at <= o - 0.5 for at, o in zip(own, shape, strict=True))
        nearest = tuple(min(max(int(np.floor(at + 0.5)), 0), o - 1) for at, o in zip(own, shape, strict=True))
        assert found[1][tuple(index)] == (labels[(*nearest, 1)] if inside else 0)


@pytest.mark.parametrize(
    "of",
    [
        partial(planes_of, size=None),
        partial(planes_of, size=32),
        partial(frames_of, size=None),
        partial(label_planes_of, axis=2, size=None),
        partial(label_frames_of, size=None),
    ],
)
def test_images_beyond_the_memory_limit_are_refused_before_allocation(of: Any) -> None:
    data = np.random.default_rng(0).integers(0, 9, (20, 30, 4, 1)).astype(np.int16)
    rules = Preparation(spacing_mm=0.001, image_size=32)
    message = r"scan: \d+ (slices|frames) of .* voxels of .* mm, .* of 0.001 mm after resampling, would take .* 8,192 MiB are allowed: use"
    with pytest.raises(RefusedScan, match=message) as refusal:
        of(volume_of(data), preparation=rules)
    assert refusal.value.code == "too_large"


def test_the_memory_limit_counts_the_memory_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 9, (20, 30, 4, 1)).astype(np.int16)
    needed = 4 * (20 * 60 + 40 * 60) * 4 / 2**20  # float32, after columns and after rows
    rules = Preparation(spacing_mm=0.75, image_size=32)
    monkeypatch.setattr(grids, "MAX_IMAGES_MIB", needed)
    assert planes_of(volume_of(data), preparation=rules, size=None).images.shape == (4, 1, 40, 60)
    monkeypatch.setattr(grids, "MAX_IMAGES_MIB", needed * 0.999)
    with pytest.raises(RefusedScan):
        planes_of(volume_of(data), preparation=rules, size=None)
