"""Appearance: each effect against its plain formula; every image on its own."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from p2r.config import IntensityConfig
from p2r.randomness import keyed_generator
from p2r.views.intensity import draw_intensity

NEUTRAL = IntensityConfig(gamma=(1, 1), contrast=(1, 1), bias_field=0, noise=0, blur_mm=0, inversion_probability=0)


def generators(num: int) -> list[np.random.Generator]:
    return [keyed_generator(0, "test", index) for index in range(num)]


def draw(image: Tensor, *, spacing_mm: float = 1.0, **ranges: object) -> Tensor:
    config = NEUTRAL.model_copy(update=ranges)
    return draw_intensity(image, generators(len(image)), config=config, spacing_mm=spacing_mm)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(16, 1, 33, 41, generator=torch.Generator().manual_seed(0))


def test_neutral_ranges_leave_the_image_as_it_is(image: Tensor) -> None:
    torch.testing.assert_close(draw(image), image, rtol=0, atol=1e-6)


def test_gamma_is_an_exponent_within_its_range(image: Tensor) -> None:
    exponents = draw(image, gamma=(0.5, 2.0))[:, 0, 0, 0].log() / image[:, 0, 0, 0].log()
    assert (exponents >= 0.499).all()
    assert (exponents <= 2.001).all()
    assert exponents.std() > 0.1
    torch.testing.assert_close(draw(image, gamma=(2.0, 2.0)), image**2, rtol=0, atol=1e-6)


def test_inversion_exchanges_dark_and_bright(image: Tensor) -> None:
    torch.testing.assert_close(draw(image, inversion_probability=1.0), 1 - image, rtol=0, atol=1e-6)
    half = draw(image, inversion_probability=0.5)
    inverted = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(half, image, strict=True)]
    assert 2 < sum(inverted) < 14


def test_contrast_is_a_factor_about_the_mean(image: Tensor) -> None:
    grey = 0.4 + 0.2 * image
    mean = grey.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(draw(grey, contrast=(1.5, 1.5)), mean + 1.5 * (grey - mean), rtol=0, atol=1e-5)


def test_the_bias_field_is_smooth_and_within_its_amplitude() -> None:
    grey = torch.full((8, 1, 64, 64), 0.5)
    log_field = (draw(grey, bias_field=0.4) / 0.5).log()
    assert log_field.abs().max() <= 0.4 + 1e-5
    assert log_field.std((1, 2, 3)).max() > 0.05
    assert (log_field[..., 1:] - log_field[..., :-1]).abs().max() < 0.04


def test_half_of_the_images_are_blurred_by_a_gaussian_in_millimetres() -> None:
    dot = torch.zeros(32, 1, 41, 41)
    dot[:, :, 20, 20] = 1.0
    offsets = torch.arange(41.0) - 20
    variances = {}
    for spacing_mm in (1.0, 2.0):
        blurred = draw(dot, blur_mm=3.0, spacing_mm=spacing_mm)
        torch.testing.assert_close(blurred.sum((1, 2, 3)), torch.ones(32), rtol=0, atol=1e-5)
        variances[spacing_mm] = (blurred.sum((1, 2)) * offsets**2).sum(1) * spacing_mm**2
    assert 8 <= (variances[1.0] > 0).sum() <= 24
    assert variances[1.0].max().sqrt() <= 3.0
    wide = variances[1.0] > 2**2  # narrower ones are smaller than a pixel of 2 mm
    torch.testing.assert_close(variances[1.0][wide], variances[2.0][wide], rtol=0.08, atol=0)


def test_a_blurred_image_equals_scipys_gaussian_filter(image: Tensor) -> None:
    blurred = draw(image, blur_mm=1.5)
    sigmas = []
    for generator in generators(len(image)):
        generator.uniform(), generator.random(), generator.uniform()
        sigmas.append(max(0.0, generator.uniform(-1, 1) * 1.5))
    for result, plane, sigma in zip(blurred[:, 0], image[:, 0], sigmas, strict=True):
        expected = gaussian_filter(plane.double().numpy(), sigma, radius=5, mode="nearest") if sigma else plane.numpy()
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


def test_noise_has_no_mean_and_at_most_its_standard_deviation() -> None:
    grey = torch.full((16, 2, 64, 64), 0.5)
    noise = draw(grey, noise=0.06) - grey
    assert noise.mean().abs() < 1e-3
    deviations = noise.std((1, 2, 3))
    assert deviations.max() < 0.063
    assert deviations.min() < 0.02 < deviations.max()
    assert abs(np.corrcoef(noise[:, 0].flatten(), noise[:, 1].flatten())[0, 1]) < 0.02


def test_the_result_stays_in_the_range_of_the_networks_input(image: Tensor) -> None:
    result = draw_intensity(image, generators(16), config=IntensityConfig(noise=0.5), spacing_mm=1.0)
    assert result.min() >= 0.0
    assert result.max() <= 1.0
    assert result.dtype == torch.float32


def test_a_generator_per_image_is_required(image: Tensor) -> None:
    with pytest.raises(ValueError, match="B generators"):
        draw_intensity(image, generators(3), config=NEUTRAL, spacing_mm=1.0)
