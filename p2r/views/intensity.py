"""An image in [0, 1] -> the same anatomy as another scanner, coil or sequence might have shown it, in [0, 1].

All parameters are drawn first, per image and from its own generator; then they are applied to the whole batch. The
order is that of an acquisition: tissue contrast (gamma, inversion, contrast), then the coil's bias field, then
resolution (blur), then noise. The result is clipped to [0, 1], the range that a network sees in use. The bias field is
1 in the geometric mean of its control values, so that as much is darkened as is brightened.

Letters: B images, C contrasts, H W rows and columns. One draw serves all contrasts of an image; the noise is their own.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import IntensityConfig
from p2r.views.smooth import spline_field

BIAS_CONTROLS = 5  # control points along each side: two patches of the spline, as slow as a surface coil's field
FIXED_POINT = 2**24  # a mean over whole numbers is the same in every order of adding


def draw_intensity(
    image: Tensor, generators: Sequence[np.random.Generator], *, config: IntensityConfig, spacing_mm: float
) -> Tensor:
    """Draw one appearance per image.

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        generators: B, one per image. Every one is advanced equally far whatever is drawn.
        config: Ranges.
        spacing_mm: Pixel size.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    if image.ndim != 4 or len(image) != len(generators):
        raise ValueError(f"expected (B, C, H, W) and B generators, got {tuple(image.shape)} and {len(generators)}")
    scalars = np.empty((len(generators), 5))  # gamma, inverted, contrast, blur sigma in pixels, noise
    bias = np.empty((len(generators), 1, BIAS_CONTROLS, BIAS_CONTROLS))
    for index, generator in enumerate(generators):
        gamma = np.exp(generator.uniform(*np.log(config.gamma)))
        inverted = generator.random() < config.inversion_probability
        contrast = np.exp(generator.uniform(*np.log(config.contrast)))
        blur_px = generator.uniform(-1, 1) * config.blur_mm / spacing_mm  # negative in half of the images: no blur
        scalars[index] = gamma, inverted, contrast, max(blur_px, 0.0), generator.uniform() * config.noise
        bias[index] = _draw_bias(generator, config.bias_field)
    gamma_, inverted_, contrast_, noise_ = (_per_image(scalars[:, i], image.device) for i in (0, 1, 2, 4))

    result = image**gamma_
    result = inverted_ + (1 - 2 * inverted_) * result
    mean = _mean(result)
    result = mean + contrast_ * (result - mean)
    if config.bias_field > 0:
        result = result * spline_field(bias, size=(image.shape[-2], image.shape[-1]), device=image.device)
    if config.blur_mm > 0:
        max_radius = int(np.ceil(3 * config.blur_mm / spacing_mm))
        result = _blur(result, scalars[:, 3], max_radius)
    if config.noise > 0:
        result = result + noise_ * _draw_noise(generators, image)
    return result.clamp(0, 1)


def _draw_bias(generator: np.random.Generator, max_amplitude: float) -> NDArray[np.float64]:
    """Draw the control values of a positive field. The exponential is taken of these few, not of every pixel."""
    log_field = generator.uniform(-1, 1, (BIAS_CONTROLS, BIAS_CONTROLS))
    log_field -= log_field.mean()
    amplitude = generator.uniform() * max_amplitude
    field: NDArray[np.float64] = np.exp(log_field * amplitude / max(float(np.abs(log_field).max()), 1e-12))
    return field


def _per_image(values: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device)[:, None, None, None]


def _mean(image: Tensor) -> Tensor:
    """Return each image's mean (B, 1, 1, 1), the same to the bit however a machine splits the sum."""
    total = (image * FIXED_POINT).long().sum((1, 2, 3), keepdim=True)
    return (total.double() / (FIXED_POINT * image[0].numel())).float()


def _blur(image: Tensor, sigmas_px: NDArray[np.float64], max_radius: int) -> Tensor:
    """Blur each image (B, C, H, W) with its own Gaussian; the border is repeated outwards; sigma 0 changes nothing."""
    chosen = np.flatnonzero(sigmas_px > 0)
    if len(chosen) == 0 or max_radius == 0:
        return image
    offsets = np.arange(-max_radius, max_radius + 1)
    kernels = np.exp(-0.5 * (offsets / np.maximum(sigmas_px[chosen, None], 1e-3)) ** 2)
    kernels /= kernels.sum(1, keepdims=True)
    index = torch.as_tensor(chosen, device=image.device)
    weights = torch.as_tensor(kernels, dtype=torch.float32, device=image.device)[:, :, None, None, None]
    blurred = image[index]
    for dim, padding in ((2, (0, 0, max_radius, max_radius)), (3, (max_radius, max_radius, 0, 0))):
        padded = F.pad(blurred, padding, mode="replicate")
        blurred = torch.zeros_like(blurred)
        for tap in range(len(offsets)):
            blurred += weights[:, tap] * padded.narrow(dim, tap, blurred.shape[dim])
    return image.index_copy(0, index, blurred)


def _draw_noise(generators: Sequence[np.random.Generator], image: Tensor) -> Tensor:
    noise = np.empty(image.shape, dtype=np.float32)
    for index, generator in enumerate(generators):
        generator.standard_normal(out=noise[index], dtype=np.float32)
    return torch.from_numpy(noise).to(image.device)
