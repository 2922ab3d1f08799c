"""Segmentations are on the scan's own voxels, and features at the right position in the patient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2r.config import ModelConfig
from p2r.data import grids
from p2r.data.preprocess import Preparation
from p2r.data.volume import Volume, read_labels, read_volume, to_source_grid, write_nifti
from p2r.errors import RefusedScan
from p2r.evaluate.inference import embed_volume, images_read, predict_probabilities, predict_volume
from p2r.evaluate.models import on_scan_grid
from p2r.model import SegmentationHead, Segmenter, build_backbone


class Threshold(nn.Module):
    """Class 1 where the image is brighter than one half; remembers the sizes that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[int, ...]] = set()

    def forward(self, image: Tensor) -> Tensor:
        self.sizes.add(tuple(image.shape[1:]))
        assert not self.training
        return torch.cat([0.5 - image, image - 0.5], dim=1) * 50


class Identity(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        assert all(side % 16 == 0 for side in image.shape[2:])
        assert any(side > 16 for side in image.shape[2:])
        return torch.cat([image, 1 - image], dim=1)


def oblique_affine(spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """Axes permuted (file axis 0 runs towards inferior), one flipped, all tilted."""
    tilt, turn = np.deg2rad(12), np.deg2rad(-9)
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    permuted = np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]], float)
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ permuted @ np.diag(spacing_mm)
    affine[:3, 3] = (31.0, -12.5, 7.25)
    return affine


def scan_with_blob(
    folder: Path, *, spacing_mm: tuple[float, float, float], shape: tuple[int, ...]
) -> tuple[Volume, NDArray[np.uint8]]:
    """An asymmetric bright ellipsoid, far from the middle, in a dark textured scan; written and read again."""
    grid = np.indices(shape[:3]).astype(float)
    centre = np.array([0.3, 0.6, 0.55]) * shape[:3]
    radius = np.array([0.16, 0.22, 0.3]) * shape[:3]
    distance = (((grid.T - centre) / radius) ** 2).sum(axis=-1).T
    inside = distance < 1
    dark = 100 + np.random.default_rng(0).integers(0, 20, size=shape)
    lit = inside[..., None] if len(shape) == 4 else inside
    image = np.where(lit, 1000, dark).astype(np.int16)
    affine = oblique_affine(spacing_mm)
    write_nifti(folder / "scan.nii.gz", image, affine)
    return read_volume(folder / "scan.nii.gz"), np.broadcast_to(lit, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("spacing_mm", "shape", "target_mm", "size"),
    [
        ((1.5, 1.5, 6.0), (48, 40, 8), 1.5, 32),  # planes larger than the windows, same pixels
        ((6.0, 1.2, 0.9), (7, 52, 60), 1.5, 96),  # planes smaller than the windows, coarser pixels
        ((1.0, 5.0, 1.3), (60, 6, 45), 0.8, 32),  # finer pixels
        ((1.5, 1.5, 6.0), (40, 48, 5, 3), 2.0, 32),  # a cine
    ],
)
def test_a_segmentation_lies_on_the_scans_own_grid(
    tmp_path: Path, spacing_mm: tuple[float, float, float], shape: tuple[int, ...], target_mm: float, size: int
) -> None:
    volume, truth = scan_with_blob(tmp_path, spacing_mm=spacing_mm, shape=shape)
    segmenter = Threshold().train()
    found = predict_volume(
        segmenter, volume, preparation=Preparation(spacing_mm=target_mm, image_size=size), num_classes=2, batch_size=4
    )
    assert found.shape == volume.data.shape
    assert found.dtype == np.uint8
    assert segmenter.training, "the network must be left as it was"
    assert segmenter.sizes == {(1, size, size)}
    in_file_order = to_source_grid(found, volume)
    truth = truth if truth.ndim == 4 else truth[..., None]
    dice = 2 * (in_file_order & truth).sum() / (in_file_order.sum() + truth.sum())
    assert dice > (0.999 if target_mm == 1.5 == spacing_mm[0] else 0.93)
    write_nifti(tmp_path / "mask.nii.gz", in_file_order, volume.source_affine, like=volume)
    again = read_labels(tmp_path / "mask.nii.gz")
    assert np.array_equal(again.data, found)
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-5)


def test_windows_agree_with_the_whole_plane_for_a_network_without_context(tmp_path: Path) -> None:
    volume, _ = scan_with_blob(tmp_path, spacing_mm=(1.5, 1.5, 6.0), shape=(50, 70, 4))
    small, large = (
        predict_volume(Threshold(), volume, preparation=Preparation(spacing_mm=1.5, image_size=size), num_classes=2)
        for size in (16, 96)
    )
    assert np.array_equal(small, large)


def test_the_batch_size_does_not_change_a_segmentation(tmp_path: Path) -> None:
    volume, _ = scan_with_blob(tmp_path, spacing_mm=(1.0, 1.0, 4.0), shape=(40, 40, 7))
    torch.manual_seed(0)
    segmenter = nn.Conv2d(1, 3, 5, padding=2)
    one, many = (
        predict_volume(
            segmenter,
            volume,
            preparation=Preparation(spacing_mm=1.3, image_size=32),
            num_classes=3,
            batch_size=batch_size,
        )
        for batch_size in (1, 16)
    )
    assert (one == many).mean() > 0.9999  # ties may fall either way


def test_a_network_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    volume, _ = scan_with_blob(tmp_path, spacing_mm=(1.0, 1.0, 4.0), shape=(20, 20, 4))
    with pytest.raises(ValueError, match="has 2 classes, expected 4"):
        predict_volume(Threshold(), volume, preparation=Preparation(spacing_mm=1.0, image_size=32), num_classes=4)


def scan_with_bright_spot(
    folder: Path, *, spacing_mm: tuple[float, float, float]
) -> tuple[Volume, NDArray[np.float64]]:
    """A smooth spot about the voxel (19, 10, 2), and where that is in mm."""
    i, j, k = np.indices((36, 44, 6))
    image = np.exp(-((i - 19) ** 2 + (j - 10) ** 2) / (2 * 2.0**2)) * (k == 2)
    affine = oblique_affine(spacing_mm)
    write_nifti(folder / "scan.nii.gz", image.astype(np.float32), affine)
    return read_volume(folder / "scan.nii.gz"), (affine @ [19, 10, 2, 1])[:3]


@pytest.mark.parametrize("target_mm", [0.7, 1.5, 2.3])
@pytest.mark.parametrize("spacing_mm", [(1.5, 1.5, 6.0), (1.1, 1.9, 6.0)])
def test_features_of_a_bright_spot_lie_where_it_lies_in_the_patient(
    tmp_path: Path, spacing_mm: tuple[float, float, float], target_mm: float
) -> None:
    volume, spot_mm = scan_with_bright_spot(tmp_path, spacing_mm=spacing_mm)
    preparation = Preparation(spacing_mm=target_mm, image_size=32, intensity_percentiles=(0, 100))
    features, affine = embed_volume(Identity(), volume, preparation=preparation)
    assert features.ndim == 5
    assert features.dtype == np.float32
    assert features.shape[3:] == (1, 2)
    weight = features[..., 0, 0].astype(float)
    indices = np.indices(weight.shape).reshape(3, -1)
    centre = (indices * weight.reshape(-1)).sum(axis=1) / weight.sum()
    np.testing.assert_allclose((affine @ [*centre, 1])[:3], spot_mm, atol=0.02)


class Halved(nn.Module):
    """Features that are half, or a quarter, as fine as the image."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, image: Tensor) -> Tensor:
        pool = nn.functional.avg_pool2d if image.ndim == 4 else nn.functional.avg_pool3d
        return torch.cat([pool(image, self.stride), pool(1 - image, self.stride)], dim=1)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("spacing_mm", [(1.5, 1.5, 6.0), (1.1, 1.9, 6.0)])
def test_so_do_features_of_a_coarser_level(
    tmp_path: Path, spacing_mm: tuple[float, float, float], stride: int, dimensions: int
) -> None:
    volume, spot_mm = scan_with_bright_spot(tmp_path, spacing_mm=spacing_mm)
    preparation = Preparation(
        dimensions=dimensions,
        spacing_mm=0.7,
        image_size=32,
        intensity_percentiles=(0, 100),
    )
    features, affine = embed_volume(Halved(stride), volume, preparation=preparation)
    assert max(features.shape[:3]) < 100
    weight = features[..., 0, 0].astype(float)
    indices = np.indices(weight.shape).reshape(3, -1)
    centre = (indices * weight.reshape(-1)).sum(axis=1) / weight.sum()
    np.testing.assert_allclose((affine @ [*centre, 1])[:3], spot_mm, atol=0.05)


@pytest.mark.parametrize("target_mm", [0.9, 1.5, 2.3])
def test_volumes_of_features_lie_where_they_lie_in_the_patient(tmp_path: Path, target_mm: float) -> None:
    volume, spot_mm = scan_with_bright_spot(tmp_path, spacing_mm=(1.5, 1.2, 3.0))
    preparation = Preparation(dimensions=3, spacing_mm=target_mm, image_size=32, intensity_percentiles=(0, 100))
    features, affine = embed_volume(Identity(), volume, preparation=preparation)
    assert features.shape[3:] == (1, 2)
    weight = features[..., 0, 0].astype(float)
    indices = np.indices(weight.shape).reshape(3, -1)
    centre = (indices * weight.reshape(-1)).sum(axis=1) / weight.sum()
    np.testing.assert_allclose((affine @ [*centre, 1])[:3], spot_mm, atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), target_mm)


def test_a_scan_smaller_than_the_network_s_least_is_padded(tmp_path: Path) -> None:
    volume, _ = scan_with_blob(tmp_path, spacing_mm=(2.0, 2.0, 2.0), shape=(10, 9, 8))
    for dimensions, shape in ((2, (10, 9, 8)), (3, (10, 9, 8))):
        preparation = Preparation(dimensions=dimensions, spacing_mm=2.0, image_size=32)
        features, _ = embed_volume(Identity(), volume, preparation=preparation)
        assert sorted(features.shape[:3]) == sorted(shape)


@pytest.mark.parametrize(
    ("spacing_mm", "shape", "target_mm", "size"),
    [
        ((1.5, 1.5, 1.5), (48, 40, 36), 1.5, 32),  # larger than the windows, same voxels
        ((4.0, 1.2, 0.9), (12, 36, 40), 1.5, 96),  # smaller than the windows, thick planes
        ((1.0, 1.4, 1.3), (30, 26, 28), 0.8, 32),  # finer voxels
        ((1.5, 1.5, 3.0), (30, 28, 16, 2), 2.0, 32),  # two frames
    ],
)
def test_a_volume_s_segmentation_lies_on_the_scans_own_grid(
    tmp_path: Path, spacing_mm: tuple[float, float, float], shape: tuple[int, ...], target_mm: float, size: int
) -> None:
    volume, truth = scan_with_blob(tmp_path, spacing_mm=spacing_mm, shape=shape)
    segmenter = Threshold().train()
    preparation = Preparation(dimensions=3, spacing_mm=target_mm, image_size=size)
    found = predict_volume(segmenter, volume, preparation=preparation, num_classes=2)
    assert found.shape == volume.data.shape
    assert found.dtype == np.uint8
    assert segmenter.training, "the network must be left as it was"
    assert segmenter.sizes == {(1, size, size, size)}
    truth = truth if truth.ndim == 4 else truth[..., None]
    in_file_order = to_source_grid(found, volume)
    dice = 2 * (in_file_order & truth).sum() / (in_file_order.sum() + truth.sum())
    assert dice > (0.999 if target_mm == 1.5 == spacing_mm[0] else 0.92)


def test_windows_of_a_volume_agree_with_the_whole_for_a_network_without_context(tmp_path: Path) -> None:
    volume, _ = scan_with_blob(tmp_path, spacing_mm=(1.5, 1.5, 1.5), shape=(24, 40, 20))
    one, many, whole = (
        predict_volume(
            Threshold(),
            volume,
            preparation=Preparation(dimensions=3, spacing_mm=1.5, image_size=size),
            num_classes=2,
            batch_size=batch_size,
        )
        for size, batch_size in ((16, 1), (16, 8), (48, 1))
    )
    assert np.array_equal(one, many) and np.array_equal(one, whole)


def test_a_model_of_the_centre_of_volumes_says_background_outside_it(tmp_path: Path) -> None:
    bright = np.full((40, 36, 38), 1000, np.int16)
    bright[:2] = 1  # not constant
    write_nifti(tmp_path / "scan.nii.gz", bright, np.eye(4))
    preparation = Preparation(
        dimensions=3, spacing_mm=1.0, image_size=16, intensity_percentiles=(0, 100), planes="centre"
    )
    found = predict_volume(Threshold(), read_volume(tmp_path / "scan.nii.gz"), preparation=preparation, num_classes=2)
    centre = np.zeros((40, 36, 38), bool)
    centre[12:28, 10:26, 11:27] = True
    assert np.array_equal(found[..., 0] == 1, centre)


@pytest.mark.parametrize("level", [0, 1])
def test_a_real_network_of_volumes_segments_a_scan(tmp_path: Path, level: int) -> None:
    volume, _ = scan_with_blob(tmp_path, spacing_mm=(1.5, 1.2, 3.0), shape=(20, 24, 10))
    config = ModelConfig(name="dynunet", channels=(4, 4, 8), feature_channels=4, level=level)
    segmenter = Segmenter(build_backbone(config, dimensions=3), SegmentationHead(4, 3, dimensions=3))
    preparation = Preparation(dimensions=3, spacing_mm=1.5, image_size=16)
    found = predict_volume(segmenter, volume, preparation=preparation, num_classes=3)
    assert found.shape == volume.data.shape
    features, _ = embed_volume(segmenter.backbone, volume, preparation=preparation, size_divisor=config.size_divisor)
    x, y, z = (
        int(np.ceil(n * mm / 1.5 - 0.01)) for n, mm in zip(volume.data.shape[:3], volume.spacing_mm, strict=True)
    )
    assert features.shape == (-(-x // 2**level), -(-y // 2**level), -(-z // 2**level), 1, 4)


def test_the_grid_of_features_covers_exactly_the_scan(tmp_path: Path) -> None:
    volume, _ = scan_with_bright_spot(tmp_path, spacing_mm=(1.1, 1.9, 6.0))
    features, affine = embed_volume(Identity(), volume, preparation=Preparation(spacing_mm=1.5, image_size=32))
    for corner in (np.zeros(3), np.ones(3)):
        ours = affine @ [*(corner * features.shape[:3] - 0.5), 1]
        scans = volume.affine @ [*(corner * volume.data.shape[:3] - 0.5), 1]
        np.testing.assert_allclose(ours, scans, atol=1e-9)


def test_features_of_a_cine_keep_their_frames(tmp_path: Path) -> None:
    volume, truth = scan_with_blob(tmp_path, spacing_mm=(1.5, 1.5, 6.0), shape=(20, 24, 4, 3))
    features, _ = embed_volume(Identity(), volume, preparation=Preparation(spacing_mm=1.5, image_size=32), batch_size=5)
    assert features.shape == (*volume.data.shape, 2)
    np.testing.assert_array_equal(to_source_grid(features, volume)[..., 0] > 0.5, truth)


def test_a_model_of_the_centre_says_background_outside_it(tmp_path: Path) -> None:
    bright = np.full((96, 80, 2), 1000, np.int16)
    bright[:2] = 1  # not constant
    write_nifti(tmp_path / "scan.nii.gz", bright, np.diag([1.0, 1.0, 8.0, 1.0]))
    volume = read_volume(tmp_path / "scan.nii.gz")
    low_high = (0.0, 100.0)
    found = {
        planes: predict_volume(
            Threshold(),
            volume,
            preparation=Preparation(spacing_mm=1.0, image_size=32, intensity_percentiles=low_high, planes=planes),
            num_classes=2,
        )
        for planes in ("whole", "centre")
    }
    centre = np.zeros((96, 80), bool)
    centre[32:64, 24:56] = True
    assert np.array_equal(found["centre"][..., 1, 0] == 1, centre)
    assert (found["whole"][2:, :, 1, 0] == 1).all()


def test_the_largest_component_alone_is_kept_on_request(tmp_path: Path) -> None:
    affine = np.diag([1.5, 1.5, 6.0, 1.0])
    image = np.full((32, 32, 4), 100, np.int16)
    image[4:14, 4:14, 1:3] = 1000
    image[24:27, 24:27, 1:3] = 1000  # a second, smaller bright spot
    write_nifti(tmp_path / "scan.nii.gz", image, affine)
    volume = read_volume(tmp_path / "scan.nii.gz")
    preparation = Preparation(spacing_mm=1.5, image_size=32)
    whole, largest = (
        predict_volume(Threshold(), volume, preparation=preparation, num_classes=2, largest_component=keep)
        for keep in (False, True)
    )
    assert whole[25, 25, 1] == largest[8, 8, 1] == 1 and largest[25, 25, 1] == 0
    assert np.array_equal(largest, np.where(np.indices(whole.shape)[0] < 20, whole, 0))


def test_maps_of_a_stranger_s_many_classes_are_refused_before_they_are_made(tmp_path: Path) -> None:
    volume, _ = scan_with_blob(tmp_path, spacing_mm=(1.0, 1.0, 2.0), shape=(40, 40, 12))
    with pytest.raises(RefusedScan, match=r"maps of 10000000 classes on .* voxels would take .*: segment a part"):
        predict_volume(
            Threshold(), volume, preparation=Preparation(spacing_mm=1.0, image_size=32), num_classes=10_000_000
        )
    images = images_read(volume, Preparation(spacing_mm=1.0, image_size=32))
    with pytest.raises(RefusedScan, match=r"would take .*: leave out the probabilities, segment a part"):
        predict_probabilities(
            Threshold(), images, preparation=Preparation(spacing_mm=1.0, image_size=32), num_classes=10_000_000
        )


def test_features_beyond_the_memory_of_a_scan_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, _ = scan_with_blob(tmp_path, spacing_mm=(1.0, 1.0, 2.0), shape=(40, 40, 12))
    rules = Preparation(spacing_mm=1.0, image_size=32)
    features, affine = embed_volume(Identity(), volume, preparation=rules)
    monkeypatch.setattr(grids, "MAX_IMAGES_MIB", 0.18)
    with pytest.raises(RefusedScan, match=r"2 features of 48 x 48 pixels of 12 images would take"):
        embed_volume(Identity(), volume, preparation=rules)
    monkeypatch.setattr(grids, "MAX_IMAGES_MIB", 0.1)
    with pytest.raises(RefusedScan, match=r"2 features of 40 x 12 x 40 voxels would take .*: leave out --native"):
        on_scan_grid(features[:, :, :, 0], affine, volume)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_probabilities_add_up_to_one_also_where_the_network_reads_nothing(tmp_path: Path, dimensions: int) -> None:
    shape = (30, 26, 6) if dimensions == 2 else (30, 26, 28)
    volume, _ = scan_with_blob(
        tmp_path, spacing_mm=(1.5, 1.5, 6.0) if dimensions == 2 else (1.5, 1.5, 1.5), shape=shape
    )
    preparation = Preparation(spacing_mm=1.3, image_size=16, planes="centre", dimensions=dimensions)
    options: dict[str, Any] = {"preparation": preparation, "num_classes": 2}
    found = predict_probabilities(Threshold(), images_read(volume, preparation), **options)
    assert found.shape == (*volume.data.shape, 2)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    beyond = (found[..., 0] == 1) & (found[..., 1] == 0)
    assert beyond.mean() > 0.3 and beyond.any(axis=(1, 2, 3)).all()
    assert np.array_equal(found.argmax(-1), predict_volume(Threshold(), volume, **options))
