"""Appearance: each effect against its plain formula, independent of other images, in 2D and 3D."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from p2r.config import IntensityConfig
from p2r.contrasts import find_present
from p2r.views.draws import Draws
from p2r.views.intensity import (
    NARROWEST_WINDOW,
    Appearance,
    _running_sum,
    apply_appearance,
    draw_intensity,
    sample_appearance,
    unchanged,
)

PROBABILITIES = [name for name in IntensityConfig.model_fields if name.endswith("_probability")]
NEUTRAL = IntensityConfig(**dict.fromkeys(PROBABILITIES, 0.0))
EVERYTHING = IntensityConfig(**dict.fromkeys(PROBABILITIES, 0.5))


def draws(num: int) -> Draws:
    return Draws.of_samples(0, epochs=np.zeros(num, dtype=np.int64), positions=np.arange(num))


def edges(image: Tensor, spacing_mm: float | tuple[float, ...] = 1.0) -> tuple[float, ...]:
    return (spacing_mm,) * (image.ndim - 2) if isinstance(spacing_mm, float) else spacing_mm


def draw(image: Tensor, *, spacing_mm: float | tuple[float, ...] = 1.0, **ranges: Any) -> Tensor:
    config = NEUTRAL.model_copy(update=ranges)
    return draw_intensity(image, draws(len(image)), config=config, spacing_mm=edges(image, spacing_mm))


def look(image: Tensor, *, spacing_mm: float | tuple[float, ...] = 1.0, **parameters: Any) -> Tensor:
    """Apply given parameters, the same for all images."""
    neutral = unchanged(draws(len(image)), dimensions=image.ndim - 2)
    given: dict[str, Any] = {
        name: np.array(np.broadcast_to(value, getattr(neutral, name).shape)) for name, value in parameters.items()
    }
    return apply_appearance(image, replace(neutral, **given), spacing_mm=edges(image, spacing_mm))


@pytest.fixture(params=[(33, 41), (11, 14, 9)], ids=["2D", "3D"])
def image(request: pytest.FixtureRequest) -> Tensor:
    return torch.rand(16, 1, *request.param, generator=torch.Generator().manual_seed(0))


def test_without_any_transform_the_image_stays_bitwise_unchanged(image: Tensor) -> None:
    assert torch.equal(draw(image), image)
    assert torch.equal(look(image), image)


@pytest.mark.parametrize(
    "ranges",
    [
        {"gamma": (1, 1), "gamma_probability": 1},
        {"contrast": (1, 1), "contrast_probability": 1},
        {"bias_field": 0, "bias_field_probability": 1},
        {"blur_mm": 0, "blur_probability": 1},
        {"low_resolution_mm": (0, 1), "low_resolution_probability": 1},
        {"ghosting": (0, 0), "ghosting_probability": 1},
        {"noise": 0, "noise_probability": 1, "rician_probability": 1},
        {"window_low": (0, 0), "window_high": (100, 100), "window_probability": 1},
    ],
    ids=lambda ranges: next(iter(ranges)),
)
def test_a_transform_of_strength_zero_is_the_identity_exactly(image: Tensor, ranges: dict[str, Any]) -> None:
    assert torch.equal(draw(image, **ranges), image)


def test_a_transform_that_is_added_changes_no_other() -> None:
    base = sample_appearance(draws(8), config=IntensityConfig(), dimensions=2)
    more = sample_appearance(
        draws(8), config=IntensityConfig(ghosting_probability=1, window_probability=1, noise=0.5), dimensions=2
    )
    for name in ("gamma", "inverted", "contrast", "bias", "blur_mm", "voxel_mm", "rician"):
        assert np.array_equal(getattr(base, name), getattr(more, name)), name
    np.testing.assert_allclose(more.noise / 0.5, base.noise / 0.06)


def test_each_transform_takes_part_as_often_as_its_probability_says() -> None:
    config = IntensityConfig(**{name: 0.1 * (1 + number) for number, name in enumerate(PROBABILITIES)})
    drawn = sample_appearance(draws(4000), config=config, dimensions=3)
    taken = {
        "gamma": drawn.gamma != 1,
        "contrast": drawn.contrast != 1,
        "inversion": drawn.inverted,
        "bias_field": drawn.biased,
        "blur": drawn.blur_mm > 0,
        "low_resolution": drawn.voxel_mm > 0,
        "ghosting": drawn.ghosting > 0,
        "noise": drawn.noise > 0,
        "rician": drawn.rician,
        "window": drawn.window[:, 0] > 0,
    }
    assert {f"{name}_probability" for name in taken} == set(PROBABILITIES)
    for name, flags in taken.items():
        assert flags.mean() == pytest.approx(getattr(config, f"{name}_probability"), abs=0.03), name
    together = np.corrcoef(np.stack([flags.reshape(4000, -1)[:, 0] for flags in taken.values()])[:-1])
    assert np.abs(together - np.eye(len(together))).max() < 0.07


def test_ranges_are_reached_and_kept() -> None:
    config = IntensityConfig(**dict.fromkeys(PROBABILITIES, 1.0))
    drawn = sample_appearance(draws(2000), config=config, dimensions=2)
    for values, (low, high) in {
        "gamma": (drawn.gamma, config.gamma),
        "contrast": (drawn.contrast, config.contrast),
        "blur": (drawn.blur_mm, (0, config.blur_mm)),
        "voxels": (drawn.voxel_mm, config.low_resolution_mm),
        "ghosting": (drawn.ghosting, config.ghosting),
        "noise": (drawn.noise, (0, config.noise)),
        "low": (drawn.window[:, 0], config.window_low),
        "high": (drawn.window[:, 1], config.window_high),
    }.values():
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
    assert set(drawn.num_ghosts) == set(range(config.num_ghosts[0], config.num_ghosts[1] + 1))
    assert set(drawn.ghost_axis) == {0, 1}
    assert np.mean(np.log(drawn.gamma)) == pytest.approx(np.mean(np.log(config.gamma)), abs=0.02)


def test_gamma_is_an_exponent(image: Tensor) -> None:
    image[0, 0, 0] = 0.0
    torch.testing.assert_close(draw(image, gamma=(2.0, 2.0), gamma_probability=1), image**2, rtol=0, atol=1e-6)
    torch.testing.assert_close(look(image, gamma=0.5), image**0.5, rtol=0, atol=1e-6)


def test_inversion_exchanges_dark_and_bright(image: Tensor) -> None:
    torch.testing.assert_close(draw(image, inversion_probability=1.0), 1 - image, rtol=0, atol=1e-6)
    half = draw(image, inversion_probability=0.5)
    inverted = [not torch.equal(a, b) for a, b in zip(half, image, strict=True)]
    assert 2 < sum(inverted) < 14


def test_contrast_is_a_factor_about_the_mean_also_of_an_inverted_image(image: Tensor) -> None:
    grey = 0.4 + 0.2 * image
    for inverted in (False, True):
        base = 1 - grey if inverted else grey
        mean = base.mean(tuple(range(1, image.ndim)), keepdim=True)
        result = look(grey, contrast=1.5, inverted=inverted)
        torch.testing.assert_close(result, mean + 1.5 * (base - mean), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (24, 24, 24)])
def test_the_bias_field_is_smooth_and_within_its_amplitude(size: tuple[int, ...]) -> None:
    grey = torch.full((8, 1, *size), 0.5)
    log_field = (draw(grey, bias_field=0.4, bias_field_probability=1) / 0.5).log()
    assert log_field.abs().max() <= 0.4 + 1e-5
    assert log_field.flatten(1).std(1).max() > 0.03
    assert (log_field[..., 1:] - log_field[..., :-1]).abs().max() < 0.04 * 64 / size[-1]


def test_half_of_the_images_are_blurred_by_a_gaussian_in_millimetres() -> None:
    dot = torch.zeros(32, 1, 41, 41)
    dot[:, :, 20, 20] = 1.0
    offsets = torch.arange(41.0) - 20
    variances = {}
    for spacing_mm in (1.0, 2.0):
        blurred = draw(dot, blur_mm=3.0, blur_probability=0.5, spacing_mm=spacing_mm)
        torch.testing.assert_close(blurred.sum((1, 2, 3)), torch.ones(32), rtol=0, atol=1e-5)
        variances[spacing_mm] = (blurred.sum((1, 2)) * offsets**2).sum(1) * spacing_mm**2
    assert 8 <= (variances[1.0] > 0).sum() <= 24
    assert variances[1.0].max().sqrt() <= 3.0
    wide = variances[1.0] > 2**2  # narrower ones are smaller than a pixel of 2 mm
    torch.testing.assert_close(variances[1.0][wide], variances[2.0][wide], rtol=0.08, atol=0)


def test_a_blurred_image_equals_scipys_gaussian_filter(image: Tensor) -> None:
    sigmas_mm = np.linspace(0, 1.5, 16)
    mm = (1.0, 0.6, 2.0)[: image.ndim - 2]
    neutral = unchanged(draws(16), dimensions=len(mm))
    blurred = apply_appearance(image, replace(neutral, blur_mm=sigmas_mm), spacing_mm=mm)
    for result, plane, sigma in zip(blurred[:, 0], image[:, 0], sigmas_mm, strict=True):
        expected = plane.double().numpy()
        for axis, edge in enumerate(mm):
            px = sigma / edge
            if px > 0:
                expected = ndimage.gaussian_filter1d(expected, px, axis, radius=int(np.ceil(3 * px)), mode="nearest")
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


def naive_large_voxels(line: np.ndarray[Any, Any], voxel_px: float) -> np.ndarray[Any, Any]:
    """Average a line over large voxels, on a grid of 1000 points a pixel, then interpolate between their centres."""
    fine, length = 1000, len(line)
    padded = np.pad(line, 40, mode="edge").repeat(fine)
    numbers = np.arange(-60, 61)
    numbers = numbers[np.abs(numbers * voxel_px) < length / 2 + 1.5 * voxel_px]
    centres = length / 2 + numbers * voxel_px
    starts, stops = ((centres + side * voxel_px / 2 + 40) * fine for side in (-1, 1))
    means = [padded[round(a) : round(b)].mean() for a, b in zip(starts, stops, strict=True)]
    return np.interp(np.arange(length) + 0.5, centres, means)


@pytest.mark.parametrize("voxel_mm", [1.3, 2.0, 4.7])
def test_large_voxels_hold_means_and_are_interpolated_between(image: Tensor, voxel_mm: float) -> None:
    size = image.shape[2:]
    for axis in range(len(size)):
        voxels = np.zeros(len(size))
        voxels[axis] = voxel_mm
        mm = tuple(1.0 if other == axis else 9.0 for other in range(len(size)))
        result = look(image[:2], voxel_mm=voxels, spacing_mm=mm)[0, 0]
        expected = np.apply_along_axis(naive_large_voxels, axis, image[0, 0].double().numpy(), voxel_mm)
        np.testing.assert_allclose(result.numpy(), expected, atol=2e-3)


class _FloatingRunningSums(TorchDispatchMode):
    """Count the running sums that CUDA has no deterministic implementation of."""

    num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten.cumsum and args[0].is_floating_point():
            self.num += 1
        return function(*args, **(kwargs or {}))


def test_running_sums_are_those_of_floating_point_without_its_operator(image: Tensor) -> None:
    with _FloatingRunningSums() as found:
        look(image, voxel_mm=4.0)
    assert found.num == 0
    lines = 3 * torch.rand(5, 600, generator=torch.Generator().manual_seed(0))
    expected = lines.double().cumsum(-1).float()
    torch.testing.assert_close(_running_sum(lines), expected, rtol=2**-23, atol=0)
    assert (_running_sum(lines) == expected).float().mean() > 0.999


def test_voxels_no_larger_than_the_pixels_change_nothing(image: Tensor) -> None:
    assert torch.equal(look(image, voxel_mm=1.5, spacing_mm=1.5), image)
    constant = torch.full_like(image, 0.3)
    torch.testing.assert_close(look(constant, voxel_mm=4.0), constant, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_ghosts", [2, 3, 4])
def test_ghosts_are_those_of_weakened_lines_of_k_space(num_ghosts: int) -> None:
    for size in ((36, 24), (12, 24, 12)):
        image = torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(1))
        for axis in range(len(size)):
            spectrum = np.fft.fft(image.double().numpy(), axis=axis + 2)
            kept = np.ones(size[axis])
            kept[::num_ghosts] -= 0.6
            kept[0] = 1  # the central line
            spectrum *= kept.reshape([-1 if other == axis else 1 for other in range(len(size))])
            expected = np.abs(np.fft.ifft(spectrum, axis=axis + 2).real).clip(0, 1)
            result = look(image, ghosting=0.6, num_ghosts=num_ghosts, ghost_axis=axis)
            np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_ghosts_that_do_not_divide_the_image_are_a_part_of_it_apart() -> None:
    dot = torch.zeros(1, 1, 50, 8)
    dot[0, 0, 5, 3] = 1.0
    result = look(dot, ghosting=1.0, num_ghosts=4, ghost_axis=0)[0, 0, :, 3]
    assert sorted(result.topk(4).indices.tolist()) == [5, 17, 30, 43]


def test_noise_has_no_mean_and_at_most_its_standard_deviation() -> None:
    grey = torch.full((16, 2, 64, 64), 0.5)
    noise = draw(grey, noise=0.06, noise_probability=1) - grey
    assert noise.mean().abs() < 1e-3
    deviations = noise.std((1, 2, 3))
    assert deviations.max() < 0.063
    assert deviations.min() < 0.02 < deviations.max()
    assert abs(np.corrcoef(noise[:, 0].flatten(), noise[:, 1].flatten())[0, 1]) < 0.02


def test_rician_noise_has_the_rice_distribution() -> None:
    for signal in (0.0, 0.2):
        grey = torch.full((1, 1, 200, 200), signal)
        result = look(grey, noise=0.1, rician=True).flatten().double().numpy()
        assert stats.kstest(result, stats.rice(signal / 0.1, scale=0.1).cdf).pvalue > 1e-3


def test_a_window_stretches_between_percentiles_of_the_scan(image: Tensor) -> None:
    skewed = torch.cat([image**3, 0.5 * image], dim=1)
    inside = image[:, 0] > 0.2
    neutral = unchanged(draws(16), dimensions=image.ndim - 2)
    window = np.stack([np.linspace(0, 20, 16), np.linspace(80, 100, 16)], axis=1)
    result = apply_appearance(skewed, replace(neutral, window=window), spacing_mm=edges(image), inside=inside)
    for row in range(16):
        for contrast in range(2):
            values = skewed[row, contrast].double().numpy()
            low, high = np.percentile(values[inside[row].numpy()], window[row])
            expected = ((values - low) / (high - low)).clip(0, 1)
            np.testing.assert_allclose(result[row, contrast].numpy(), expected, atol=0.01)


def test_a_window_of_air_or_of_nothing_stays_finite_and_dark() -> None:
    air = 0.01 * torch.rand(2, 1, 30, 30)
    neutral = replace(unchanged(draws(2), dimensions=2), window=np.array([[1.0, 99.0]] * 2))
    result = apply_appearance(air, neutral, spacing_mm=(1.0, 1.0))
    assert 0 < result.max() <= 0.01 / NARROWEST_WINDOW + 1e-3
    nothing = torch.zeros(2, 30, 30, dtype=torch.bool)
    assert apply_appearance(air, neutral, spacing_mm=(1.0, 1.0), inside=nothing).isfinite().all()
    assert not apply_appearance(0 * air, neutral, spacing_mm=(1.0, 1.0)).any()


def test_percentiles_of_large_images_are_taken_of_a_part_of_them() -> None:
    image = torch.rand(1, 1, 600, 500, generator=torch.Generator().manual_seed(0)) ** 2
    result = look(image, window=(2.0, 97.0))
    low, high = np.percentile(image.numpy(), (2, 97))
    torch.testing.assert_close(result, ((image - low) / (high - low)).clamp(0, 1), rtol=0, atol=0.01)


@pytest.mark.parametrize("size", [(61, 67), (128, 128), (19, 33, 41)])
def test_an_image_does_not_depend_on_the_rest_of_the_batch_or_on_threads(size: tuple[int, ...]) -> None:
    """Use sizes at which torch splits a batch among threads inside an image."""
    image = torch.rand(11, 2, *size, generator=torch.Generator().manual_seed(0))
    inside = image[:, 0] > 0.1
    mm = (1.0, 1.5, 2.0)[: len(size)]
    options: dict[str, Any] = {"config": EVERYTHING, "spacing_mm": mm}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = draw_intensity(image, draws(11), inside=inside, **options)
        torch.set_num_threads(1)
        assert torch.equal(draw_intensity(image, draws(11), inside=inside, **options), together)
    finally:
        torch.set_num_threads(threads)
    for row in range(11):
        one = slice(row, row + 1)
        alone = draw_intensity(image[one], Draws(draws(11).keys[one]), inside=inside[one], **options)
        assert torch.equal(alone[0], together[row])


def test_the_result_is_new_and_stays_in_the_range_of_the_networks_input(image: Tensor) -> None:
    before = image.clone()
    config = EVERYTHING.model_copy(update={"noise": 0.5})
    result = draw_intensity(image, draws(16), config=config, spacing_mm=edges(image))
    assert result.min() >= 0.0
    assert result.max() <= 1.0
    assert result.dtype == torch.float32
    result.zero_()
    assert torch.equal(image, before)


def test_each_contrast_has_its_own_appearance_and_the_first_that_of_an_image_of_one(image: Tensor) -> None:
    both = image.expand(-1, 2, *image.shape[2:])
    inside = torch.rand_like(image[:, 0]) > 0.2
    result = draw_intensity(both, draws(16), config=EVERYTHING, spacing_mm=edges(image), inside=inside)
    single = draw_intensity(image, draws(16), config=EVERYTHING, spacing_mm=edges(image), inside=inside)
    torch.testing.assert_close(result[:, :1], single, rtol=0, atol=0)
    assert ((result[:, 0] - result[:, 1]).abs().flatten(1).amax(1) > 0.01).all()


def test_a_missing_contrast_stays_missing(image: Tensor) -> None:
    both = torch.cat([image, image], 1)
    both[::2, 1] = 0
    config = EVERYTHING.model_copy(update={"inversion_probability": 1.0, "noise_probability": 1.0})
    result = draw_intensity(both, draws(16), config=config, spacing_mm=edges(image))
    assert torch.equal(find_present(result), find_present(both))


def test_draws_and_pixel_edges_must_fit_the_image(image: Tensor) -> None:
    with pytest.raises(ValueError, match="the draws of B images"):
        draw_intensity(image, draws(3), config=NEUTRAL, spacing_mm=edges(image))
    with pytest.raises(ValueError, match="D pixel sizes"):
        draw_intensity(image, draws(16), config=NEUTRAL, spacing_mm=(1.0,))


def test_parameters_are_plain_numbers_on_the_host() -> None:
    drawn = sample_appearance(draws(2), config=EVERYTHING, dimensions=3)
    assert all(
        isinstance(getattr(drawn, name), np.ndarray) for name in Appearance.__dataclass_fields__ if name != "draws"
    )
