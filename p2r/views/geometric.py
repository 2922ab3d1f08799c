"""Random numbers -> one warp per image -> the warped image.

Rotation, scale, shear, flip, shift and elastic deformation are drawn first, then composed into ONE field of positions,
so that an image is interpolated once, and every pixel of a view knows where it came from. Lengths are millimetres: an
augmentation means the same at every pixel size. One generator per image: what is drawn for it does not depend on its
neighbours.

A warp is (B, h, w, 2): for each pixel of the output, the row and column in the input that it shows, in pixels.

Letters: B images, C contrasts, H W the input's rows and columns, h w the output's.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import GeometryConfig
from p2r.views.smooth import num_controls, spline_field


def sample_warps(
    generators: Sequence[np.random.Generator],
    *,
    config: GeometryConfig,
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    spacing_mm: float,
    device: torch.device | None = None,
) -> Tensor:
    """Draw one warp per generator. The centres of input and output fall on each other before the shift.

    Args:
        generators: B, one per image.
        config: Ranges.
        size_in: (H, W).
        size_out: (h, w).
        spacing_mm: Pixel size of input and output.
        device: Where the warps are computed. Random numbers are always drawn on the CPU.

    Returns:
        (B, h, w, 2) float32, pixels of the input.
    """
    elastic_px = config.elastic_spacing_mm / spacing_mm
    grid = (num_controls(size_out[0], elastic_px), num_controls(size_out[1], elastic_px))
    matrices = np.empty((len(generators), 2, 2))
    shifts = np.empty((len(generators), 2))
    controls = np.empty((len(generators), 2, *grid))
    for image, generator in enumerate(generators):
        matrices[image] = _draw_matrix(generator, config)
        shifts[image] = generator.uniform(-1, 1, 2) * config.translation_mm / spacing_mm
        controls[image] = generator.standard_normal((2, *grid)) * config.elastic_mm / spacing_mm

    row = torch.arange(size_out[0], dtype=torch.float32, device=device) - (size_out[0] - 1) / 2
    column = torch.arange(size_out[1], dtype=torch.float32, device=device) - (size_out[1] - 1) / 2
    matrix = torch.as_tensor(matrices, dtype=torch.float32, device=device)[:, :, :, None, None]  # (B, 2, 2, 1, 1)
    shifts += (np.array(size_in) - 1) / 2
    shift = torch.as_tensor(shifts, dtype=torch.float32, device=device)[:, :, None, None]
    position = matrix[:, :, 0] * row[:, None] + (matrix[:, :, 1] * column + shift)  # (B, 2, h, w)
    if config.elastic_mm > 0:
        position += spline_field(controls, size=size_out, device=device)
    return position.permute(0, 2, 3, 1)


def _draw_matrix(generator: np.random.Generator, config: GeometryConfig) -> NDArray[np.float64]:
    """Draw the 2 x 2 matrix from offsets in the output to offsets in the input, with 6 numbers whatever the ranges."""
    angle = np.deg2rad(config.rotation_deg) * generator.uniform(-1, 1)
    magnification = np.exp(generator.uniform(*np.log(config.scale)))
    shear = np.tan(np.deg2rad(config.shear_deg) * generator.uniform(-1, 1))
    signs = np.where(generator.random(2) < config.flip_probability, -1.0, 1.0)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix: NDArray[np.float64] = rotation @ np.array([[1.0, shear], [0.0, 1.0]]) * signs / magnification
    return matrix


def apply_warp(image: Tensor, warp: Tensor, *, mode: Literal["bilinear", "nearest"] = "bilinear") -> Tensor:
    """Read `image` where `warp` points; zero beyond its border. A warp onto whole pixels gives their exact values.

    Args:
        image: (B, C, H, W) floating point.
        warp: (B, h, w, 2).
        mode: Interpolation; `nearest` for labels.

    Returns:
        (B, C, h, w).

    Raises:
        ValueError: The shapes do not fit each other.
    """
    if image.ndim != 4 or warp.ndim != 4 or warp.shape[-1] != 2 or len(image) != len(warp):
        raise ValueError(f"expected (B, C, H, W) and (B, h, w, 2), got {tuple(image.shape)} and {tuple(warp.shape)}")
    # grid_sample wants positions as parts of the image's size. Those are exact in floating point for sizes that are
    # powers of two, and only for them: so the image grows by zeros, which lie beyond its border anyway.
    height, width = (1 << (size - 1).bit_length() for size in image.shape[-2:])
    padded = F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
    row, column = warp.to(image.dtype).unbind(-1)
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=1)  # pixel centres, in [-1, 1]
    return F.grid_sample(padded, grid.permute(0, 2, 3, 1), mode=mode, padding_mode="zeros", align_corners=False)


def inside_mask(warp: Tensor, inside: Tensor) -> Tensor:
    """Mark the pixels of the output that truly show a place of the scan.

    A pixel is marked where every input pixel that it is interpolated from lies within the image and is itself marked,
    and where the warp is not folded (where it is, neighbours are mirrored against the rest of the image).

    Args:
        warp: (B, h, w, 2).
        inside: (B, H, W) bool, pixels of the input that belong to the scan.

    Returns:
        (B, h, w) bool.
    """
    row, column = warp.unbind(-1)
    within = (row >= 0) & (row <= inside.shape[-2] - 1) & (column >= 0) & (column <= inside.shape[-1] - 1)
    shown = apply_warp(inside[:, None].float(), warp)[:, 0] > 0.9999  # 1 but for rounding
    return within & shown & ~_folded(warp)


def _folded(warp: Tensor) -> Tensor:
    """Mark the pixels (B, h, w) at the corners of cells that do not turn as most cells do: a flip is no fold."""
    position = warp.movedim(-1, 0)  # (2, B, h, w)
    down = position[:, :, 1:, :-1] - position[:, :, :-1, :-1]
    across = position[:, :, :-1, 1:] - position[:, :, :-1, :-1]
    determinant = down[0] * across[1] - down[1] * across[0]  # (B, h - 1, w - 1)
    num_cells = determinant[0].numel()
    mirrored = (determinant < 0).sum((1, 2)) * 2 > num_cells
    bad = torch.where(mirrored[:, None, None], determinant >= 0, determinant <= 0)
    cells = F.pad(bad, (1, 1, 1, 1))
    return cells[:, 1:, 1:] | cells[:, :-1, 1:] | cells[:, 1:, :-1] | cells[:, :-1, :-1]
