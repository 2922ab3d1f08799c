"""An image in [0, 1] -> the same anatomy as from another scanner, coil or sequence, in [0, 1].

All parameters are drawn first (`sample_appearance`), each from its own random numbers, and then applied to the whole batch
(`apply_appearance`). The order follows an acquisition: tissue contrast (gamma, inversion, contrast), the coil's bias field,
resolution (blur, large voxels), ghosts of periodic motion, noise. The window between two percentiles comes last, as for a
finished image. The result is clipped to [0, 1], the range at inference.

A transform is applied only to the images for which it was drawn; the others stay bitwise unchanged. The host knows which
images these are, so nothing synchronises with the device. An image's view does not depend on the rest of the batch: sums do
not depend on the order of addition, and functions not on a pixel's position in memory. (A power does, so it is computed by
exp and log.)

Alternatives: kornia has most of these transforms in batches, but no ghosts, bias fields or Rician noise, and draws from the
global generator. MONAI and TorchIO have all of them, one image at a time.

Each contrast of an image has its own appearance: scanners, coils and sequences change one contrast independently of another. A
missing contrast, a channel of zeros, stays missing.

Letters: B images, C contrasts, D spatial dimensions (2 or 3), *S sizes along them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import IntensityConfig
from p2r.contrasts import find_present
from p2r.device import on_device
from p2r.views.draws import Draws
from p2r.views.smooth import spline_field

BIAS_CONTROLS = 5
"""Control points along each side: two patches of the spline, as smooth as a surface coil's field."""
NARROWEST_WINDOW = 0.05
"""Minimum width of the window, so that a slice of air is not stretched until its noise fills the range."""
_FIXED_POINT = 2**24  # sums of whole numbers do not depend on the order of addition
_FINE_FIXED_POINT = 2.0**44  # sums up to 2**19 fit into 63 bits
_NUM_BINS = 1024
_MAX_COUNTED = 2**16  # largest number of pixels for an image's percentiles, on a regular grid

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Appearance:
    """Appearance parameters of B images, on the host."""

    draws: Draws
    """Random numbers of the noise."""
    gamma: Numbers
    """(B,) exponents; 1: off."""
    inverted: Flags
    """(B,) True: dark and bright are exchanged."""
    contrast: Numbers
    """(B,) factors about the image's mean; 1: off."""
    biased: Flags
    """(B,) True: a bias field is applied."""
    bias: Numbers
    """(B, *k) control values of the bias field's splines; their geometric mean is 1, to balance darkening and brightening."""
    blur_mm: Numbers
    """(B,) standard deviations; 0: off."""
    voxel_mm: Numbers
    """(B, D) edges of the simulated voxels; no effect along axes whose pixels are at least as large."""
    ghosting: Numbers
    """(B,) fraction of every n-th line of k-space that is lost to motion; 0: off."""
    num_ghosts: NDArray[np.int64]
    """(B,) n: copies of the image across its field of view, including itself."""
    ghost_axis: NDArray[np.int64]
    """(B,) axis of the ghosts, the phase encoding axis."""
    noise: Numbers
    """(B,) standard deviations; 0: off."""
    rician: Flags
    """(B,) True: the noise is in both parts of a complex image, of which the magnitude is taken."""
    window: Numbers
    """(B, 2) percentiles that become 0 and 1; 0 and 100: off."""

    def take(self, rows: NDArray[np.intp]) -> "Appearance":
        """Select images by index."""
        parts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "draws"}
        return Appearance(self.draws.take(rows), **{name: values[rows] for name, values in parts.items()})


def draw_intensity(
    image: Tensor,
    draws: Draws,
    *,
    config: IntensityConfig,
    spacing_mm: Sequence[float],
    inside: Tensor | None = None,
) -> Tensor:
    """Draw one appearance for each contrast of each image, and apply it.

    Args:
        image: (B, C, *S) float32 in [0, 1].
        draws: Random numbers of B images.
        config: Ranges of the parameters.
        spacing_mm: Pixel size along each of D axes.
        inside: (B, *S) bool, pixels of the scan, over which percentiles are computed; None: all.

    Returns:
        (B, C, *S) float32 in [0, 1]; missing contrasts stay zero.
    """
    num_contrasts, dimensions = image.shape[1], image.ndim - 2
    appearance = sample_appearance(draws.of_contrasts(num_contrasts), config=config, dimensions=dimensions)
    if num_contrasts == 1:
        return apply_appearance(image, appearance, spacing_mm=spacing_mm, inside=inside)
    if inside is not None:
        inside = inside.repeat_interleave(num_contrasts, 0)
    single = image.flatten(0, 1)[:, None]  # (B C, 1, *S)
    changed = apply_appearance(single, appearance, spacing_mm=spacing_mm, inside=inside).reshape(image.shape)
    return changed * find_present(image).reshape(*image.shape[:2], *[1] * dimensions)


def unchanged(draws: Draws, *, dimensions: int) -> Appearance:
    """Return the neutral appearance, which does not change images."""
    batch = len(draws)
    zeros, ones = np.zeros(batch), np.ones(batch)
    none = np.zeros(batch, dtype=np.bool_)
    return Appearance(
        draws,
        gamma=ones,
        inverted=none,
        contrast=ones,
        biased=none,
        bias=np.ones((batch, *[BIAS_CONTROLS] * dimensions)),
        blur_mm=zeros,
        voxel_mm=np.zeros((batch, dimensions)),
        ghosting=zeros,
        num_ghosts=np.full(batch, 2),
        ghost_axis=np.zeros(batch, dtype=np.int64),
        noise=zeros,
        rician=none,
        window=np.tile([0.0, 100.0], (batch, 1)),
    )


def sample_appearance(draws: Draws, *, config: IntensityConfig, dimensions: int) -> Appearance:
    """Draw the appearance of each image. Transforms that are off, or not drawn, get their neutral value."""

    def happens(name: str, probability: float, *shape: int) -> Flags:
        if probability in (0, 1):  # nothing to draw; draws are stateless, so no other number changes
            return np.full((len(draws), *shape), probability == 1)
        flags: Flags = draws.uniform(f"{name} happens", *shape) < probability
        return flags

    def drawn(name: str, low: float, high: float, probability: float, *shape: int, neutral: float) -> Numbers:
        if probability == 0:
            return np.full((len(draws), *shape), neutral)
        return np.where(happens(name, probability, *shape), draws.between(low, high, name, *shape), neutral)

    def factor(name: str, limits: tuple[float, float], probability: float) -> Numbers:
        low, high = np.log(limits)
        return np.exp(drawn(name, low, high, probability, neutral=0.0))

    bias_field = drawn("bias field", 0, config.bias_field, config.bias_field_probability, neutral=0.0)
    fewest, most = config.num_ghosts
    windowed = happens("window", config.window_probability)
    return Appearance(
        draws,
        gamma=factor("gamma", config.gamma, config.gamma_probability),
        inverted=happens("inversion", config.inversion_probability),
        contrast=factor("contrast", config.contrast, config.contrast_probability),
        biased=bias_field > 0,
        bias=_bias_controls(draws, bias_field, dimensions),
        blur_mm=drawn("blur", 0, config.blur_mm, config.blur_probability, neutral=0.0),
        voxel_mm=drawn(
            "low resolution", *config.low_resolution_mm, config.low_resolution_probability, dimensions, neutral=0.0
        ),
        ghosting=drawn("ghosting", *config.ghosting, config.ghosting_probability, neutral=0.0),
        num_ghosts=(fewest + (most - fewest + 1) * draws.uniform("number of ghosts")).astype(np.int64),
        ghost_axis=(dimensions * draws.uniform("axis of ghosts")).astype(np.int64),
        noise=drawn("noise", 0, config.noise, config.noise_probability, neutral=0.0),
        rician=happens("rician", config.rician_probability),
        window=np.stack(
            [
                np.where(windowed, draws.between(*config.window_low, "window's low end"), 0.0),
                np.where(windowed, draws.between(*config.window_high, "window's high end"), 100.0),
            ],
            axis=1,
        ),
    )


def _bias_controls(draws: Draws, amplitude: Numbers, dimensions: int) -> Numbers:
    """Draw positive fields with mean log 0. The exponential is applied to these few values, not to every pixel."""
    shape = [BIAS_CONTROLS] * dimensions
    per_image = (slice(None), *[None] * dimensions)
    log_field = draws.between(-1, 1, "bias field's shape", *shape)
    axes = tuple(range(1, dimensions + 1))
    log_field -= log_field.mean(axes)[per_image]
    largest = np.maximum(np.abs(log_field).max(axes), 1e-12)
    controls: Numbers = np.exp(log_field * (amplitude / largest)[per_image])
    return controls


def apply_appearance(
    image: Tensor, appearance: Appearance, *, spacing_mm: Sequence[float], inside: Tensor | None = None
) -> Tensor:
    """Apply an appearance to each image; see `draw_intensity`.

    Raises:
        ValueError: if the shapes do not match.
    """
    dimensions = image.ndim - 2
    if dimensions not in (2, 3) or len(appearance.draws) != len(image) or len(spacing_mm) != dimensions:
        raise ValueError(
            f"expected image (B, C, *S) in 2D or 3D, the draws of B images and D pixel sizes, "
            f"got {tuple(image.shape)}, {len(appearance.draws)} and {len(spacing_mm)}"
        )
    if inside is None:
        inside = torch.ones_like(image[:, 0], dtype=torch.bool)
    look = appearance
    result = _transform_chosen(image, look, look.gamma != 1, _apply_gamma)
    result = _transform_chosen(result, look, look.inverted | (look.contrast != 1), _apply_tone)
    result = _transform_chosen(result, look, look.biased, _apply_bias)
    result = _transform_chosen(result, look, look.blur_mm > 0, partial(_apply_blur, spacing_mm=spacing_mm))
    for axis, mm in enumerate(spacing_mm):
        enlarge = partial(_simulate_large_voxels, axis=axis, spacing_mm=mm)
        result = _transform_chosen(result, look, look.voxel_mm[:, axis] > mm, enlarge)
    for axis in range(dimensions):
        chosen = (look.ghosting > 0) & (look.ghost_axis == axis)
        result = _transform_chosen(result, look, chosen, partial(_add_ghosts, axis=axis))
    is_noisy = look.noise > 0
    result = _transform_chosen(result, look, is_noisy & ~look.rician, _add_gaussian_noise)
    result = _transform_chosen(result, look, is_noisy & look.rician, _add_rician_noise)
    result = result.clamp(0, 1)
    return _transform_chosen(result, look, (look.window != (0, 100)).any(1), _apply_window, inside)


def _transform_chosen(
    image: Tensor, look: Appearance, chosen: Flags, transform: Callable[..., Tensor], *others: Tensor
) -> Tensor:
    """Apply a transform to the chosen images of a batch, with their rows of the appearance and of `others`."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return image
    if len(rows) == len(image):
        return transform(image, look, *others)
    index = on_device(rows, image.device, dtype=torch.int64)
    selected = [batch.index_select(0, index) for batch in (image, *others)]
    return image.index_copy(0, index, transform(selected[0], look.take(rows), *selected[1:]))


def _per_image(values: NDArray[Any], image: Tensor) -> Tensor:
    return on_device(values, image.device).reshape(-1, *[1] * (image.ndim - 1))


def _apply_gamma(image: Tensor, look: Appearance) -> Tensor:
    return (image.log() * _per_image(look.gamma, image)).exp_()


def _apply_tone(image: Tensor, look: Appearance) -> Tensor:
    """Apply inversion, then contrast, as one linear map of each image's values."""
    inverted, contrast = _per_image(look.inverted, image), _per_image(look.contrast, image)
    scale, offset = 1 - 2 * inverted, inverted
    if (look.contrast != 1).any():
        offset = contrast * offset + (1 - contrast) * (offset + scale * _exact_mean(image))
        scale = contrast * scale
    return image * scale + offset


def _exact_mean(image: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Return the mean of each image (B, 1, ...), or along `dims`; bitwise independent of the order of summation."""
    dims = tuple(range(1, image.ndim)) if dims is None else dims
    count = np.prod([image.shape[dim] for dim in dims])
    total = (image * _FIXED_POINT).int().sum(dims, keepdim=True, dtype=torch.int64)
    return (total.double() / (_FIXED_POINT * float(count))).float()


def _apply_bias(image: Tensor, look: Appearance) -> Tensor:
    return image * spline_field(look.bias[:, None], size=tuple(image.shape[2:]), device=image.device)


def _apply_blur(image: Tensor, look: Appearance, *, spacing_mm: Sequence[float]) -> Tensor:
    """Blur each image with its own Gaussian, truncated at 3 sigma; border values are replicated outside."""
    dimensions = len(spacing_mm)
    for axis, mm in enumerate(spacing_mm):
        sigmas = look.blur_mm / mm
        radii = np.ceil(3 * sigmas)
        reach = int(radii.max())
        offsets = np.arange(-reach, reach + 1)
        kernels = np.exp(-0.5 * (offsets / np.maximum(sigmas[:, None], 1e-3)) ** 2)
        kernels[np.abs(offsets) > radii[:, None]] = 0.0
        kernels /= np.cumsum(kernels, axis=1)[:, -1:]  # a sequential sum, which zeros around a kernel do not change
        weights = on_device(kernels.T.copy(), image.device).reshape(len(offsets), -1, *[1] * (dimensions + 1))
        padding = [0, 0] * (dimensions - 1 - axis) + [reach, reach] + [0, 0] * axis
        padded = F.pad(image, padding, mode="replicate")
        image = torch.zeros_like(image)
        for tap, weight in enumerate(weights):
            image.addcmul_(weight, padded.narrow(axis + 2, tap, image.shape[axis + 2]))
    return image


def _simulate_large_voxels(image: Tensor, look: Appearance, *, axis: int, spacing_mm: float) -> Tensor:
    """Simulate longer voxels along an axis with pixels of `spacing_mm`.

    A large voxel has the mean value of the interval that it covers, with border values replicated outside. The image is
    interpolated linearly between voxel centres, one of which is the image's centre. Means over intervals are differences
    of one running integral.
    """
    lines = image.movedim(axis + 2, -1)  # (B, C, ..., L)
    length, shape = lines.shape[-1], lines.shape
    lines = lines.reshape(len(image), -1, length)
    integral = F.pad(_running_sum(lines), (1, 0))
    edge = look.voxel_mm[:, axis, None] / spacing_mm
    place = (np.arange(length) - (length - 1) / 2) / edge  # in large voxels, from the image's centre
    before = np.floor(place)
    bounds = [(before + step) * edge + length / 2 for step in (-0.5, 0.5, 1.5)]
    integrals = [_integrate_to(integral, lines, bound) for bound in bounds]
    means = [after - ahead for ahead, after in pairwise(integrals)]
    share = on_device((place - before)[:, None], image.device)
    result = ((1 - share) * means[0] + share * means[1]) / on_device(edge[:, None], image.device)
    return result.reshape(shape).movedim(-1, axis + 2)


def _running_sum(lines: Tensor) -> Tensor:
    """Compute the inclusive running sum along the last axis, in whole numbers.

    These are exact in any order of addition; CUDA has no deterministic running sum of floating-point numbers.
    """
    return ((lines.double() * _FINE_FIXED_POINT).long().cumsum(-1).double() / _FINE_FIXED_POINT).to(lines.dtype)


def _integrate_to(integral: Tensor, lines: Tensor, bounds: Numbers) -> Tensor:
    """Integrate lines (B, R, L), constant over each pixel and beyond the ends, from 0 to `bounds` (B, L)."""
    length = lines.shape[-1]
    within = bounds.clip(0, length)
    whole = np.minimum(np.floor(within), length - 1)
    index = on_device(whole[:, None].astype(np.int64), lines.device, dtype=torch.int64).expand(lines.shape)
    part, below, above = (
        on_device(values[:, None], lines.device)
        for values in (within - whole, np.minimum(bounds, 0), np.maximum(bounds - length, 0))
    )
    within_image = integral.gather(2, index) + part * lines.gather(2, index)
    return within_image + below * lines[..., :1] + above * lines[..., -1:]


def _add_ghosts(image: Tensor, look: Appearance, *, axis: int) -> Tensor:
    """Attenuate every n-th line of k-space except the central one, like motion in step with every n-th excitation.

    In the image this subtracts the mean of n copies, each shifted by a further n-th of the field of view, and adds the mean
    along the axis. Copies are shifted by whole pixels, and the result is a magnitude.
    """
    lines = image.movedim(axis + 2, -1)  # (B, C, ..., L)
    length = lines.shape[-1]
    copies = lines
    for number in range(1, int(look.num_ghosts.max())):
        shift = np.rint(number * length / look.num_ghosts)[:, None]
        source = ((np.arange(length) - shift) % length).astype(np.int64)  # (B, L)
        index = on_device(source, image.device, dtype=torch.int64).reshape(len(image), *[1] * (lines.ndim - 2), length)
        shifted = lines.gather(lines.ndim - 1, index.expand(lines.shape))
        copies = copies + _per_image(number < look.num_ghosts, image) * shifted
    ghosts = copies / _per_image(look.num_ghosts, image) - _exact_mean(lines, (lines.ndim - 1,))
    return (lines - _per_image(look.ghosting, image) * ghosts).abs_().movedim(-1, axis + 2)


def _add_gaussian_noise(image: Tensor, look: Appearance) -> Tensor:
    return _draw_noise("noise", image, look).add_(image)


def _add_rician_noise(image: Tensor, look: Appearance) -> Tensor:
    real, imaginary = _add_gaussian_noise(image, look), _draw_noise("imaginary noise", image, look)
    return real.square_().add_(imaginary.square_()).sqrt_()


def _draw_noise(name: str, image: Tensor, look: Appearance) -> Tensor:
    return _per_image(look.noise, image) * look.draws.noise(name, *image.shape[1:], device=image.device)


def _apply_window(image: Tensor, look: Appearance, inside: Tensor) -> Tensor:
    """Map the values between two percentiles of each contrast, over the pixels of the scan, to [0, 1]."""
    stride = 1
    while np.prod([-(-size // stride) for size in image.shape[2:]]) > _MAX_COUNTED:
        stride += 1
    grid = (slice(None), slice(None), *[slice(None, None, stride)] * (image.ndim - 2))
    counted = image[grid].flatten(2)  # (B, C, pixels)
    weight = inside[:, None][grid].flatten(2).expand(counted.shape).long()
    bins = (counted * _NUM_BINS).long().clamp_(max=_NUM_BINS - 1)
    counts = weight.new_zeros((*counted.shape[:2], _NUM_BINS)).scatter_add_(2, bins, weight)
    cumulative = counts.cumsum(2)
    low, high = (_read_percentile(counts, cumulative, column) for column in look.window.T)
    spread = (high - low).clamp(min=NARROWEST_WINDOW)
    ends = (*image.shape[:2], *[1] * (image.ndim - 2))
    return ((image - low.reshape(ends)) / spread.reshape(ends)).clamp_(0, 1)


def _read_percentile(counts: Tensor, cumulative: Tensor, percent: Numbers) -> Tensor:
    """Read a percentile (B,) from histograms (B, C, bins) of [0, 1], assuming uniform values within a bin."""
    rank = (on_device(percent / 100, counts.device)[:, None, None] * cumulative[..., -1:]).clamp(min=0.5)
    at = (cumulative < rank).sum(2, keepdim=True).clamp_(max=_NUM_BINS - 1)
    count = counts.gather(2, at)
    part = (rank - (cumulative.gather(2, at) - count)) / count.clamp(min=1)
    return (at + part) / _NUM_BINS
