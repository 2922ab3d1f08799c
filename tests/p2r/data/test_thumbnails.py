import numpy as np
import pytest

from p2r.data.thumbnails import from_bytes, lowest_lots, thumbnail, to_bytes
from p2r.data.volume import Volume
from p2r.errors import DataError


def volume_of(data: np.ndarray, spacing_mm: tuple[float, float, float]) -> Volume:
    affine = np.diag([*spacing_mm, 1.0])
    return Volume(data[..., None], affine, affine, data.shape, spacing_mm, key="scan")


def test_a_thumbnail_is_the_middle_slice_in_its_aspect_ratio() -> None:
    data = np.zeros((40, 20, 5), np.int16)
    data[:, :, 2] = 700
    data[20:, :, 2] = 1000
    pixels = thumbnail(volume_of(data, (1.0, 1.0, 8.0)))
    assert pixels.shape == (96, 96)
    assert (pixels[:, :24] == 0).all() and (pixels[:, 72:] == 0).all()  # half as wide as high
    assert (pixels[:48, 24:72] == 0).all() and (pixels[48:, 24:72] == 255).all()


def test_the_slice_is_perpendicular_to_the_largest_spacing_and_pixels_may_be_anisotropic() -> None:
    data = np.random.default_rng(0).integers(0, 900, (6, 30, 60)).astype(np.uint16)
    pixels = thumbnail(volume_of(data, (9.0, 2.0, 1.0)))
    assert (pixels.max(axis=0) > 0).all() and (pixels.max(axis=1) > 0).all()  # 60 mm x 60 mm: the square is full


def test_each_pixel_is_the_mean_of_its_voxels() -> None:
    data = np.random.default_rng(1).integers(0, 1000, (192, 192, 3)).astype(np.float32)
    low, high = np.percentile(data[..., 1], (1, 99))
    levels = ((data[..., 1] - low) / (high - low)).clip(0, 1)
    expected = levels.reshape(96, 2, 96, 2).mean(axis=(1, 3)) * 256
    found = thumbnail(volume_of(data, (1.0, 1.0, 5.0))).astype(float)
    assert np.abs(found + 0.5 - expected).max() < 0.6


@pytest.mark.parametrize("shape", [(2, 300, 2), (1000, 2, 2), (3, 3, 3), (96, 96, 96)])
def test_any_shape_gives_a_thumbnail(shape: tuple[int, int, int]) -> None:
    data = np.arange(np.prod(shape)).reshape(shape).astype(np.float32)
    assert thumbnail(volume_of(data, (1.0, 1.0, 1.0))).shape == (96, 96)


def test_thumbnails_are_bitwise_equal_after_storage() -> None:
    rng = np.random.default_rng(2)
    found = {key: rng.integers(0, 256, (96, 96)).astype(np.uint8) for key in ("b", "a")}
    content = to_bytes(found)
    assert content == to_bytes(dict(sorted(found.items())))
    again = from_bytes(content)
    assert list(again) == ["a", "b"]
    assert all(np.array_equal(again[key], found[key]) for key in found)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"key": "a", "pixels": "AAAA"}', b"x", b'{"key": 1, "pixels": 2}'])
def test_an_invalid_thumbnail_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="cannot be parsed"):
        from_bytes(content)


def test_the_draw_of_a_larger_corpus_keeps_most_scans_of_a_smaller_one() -> None:
    small, large = [[f"scan-{number}" for number in range(count)] for count in (200, 220)]
    assert lowest_lots(small, 48) == lowest_lots(small[::-1], 48)
    assert len(set(lowest_lots(small, 48)) & set(lowest_lots(large, 48))) > 35
