"""Random numbers -> one warp per image -> the warped image, in 2D and 3D.

Rotation, scale, shear, flip, translation and elastic deformation are drawn first, then composed into ONE field of
positions. So an image is interpolated once, and the source of every pixel of a view is known. They act in millimetres, also
for anisotropic pixels: a rotation maps a circle in the body to itself, and a parameter has the same effect at every pixel
size.

A rotation in 3D is about the first axis, then the second, then the third, each by an angle of its own range, as in
nnU-Net and TorchIO. Alternatives: kornia works in batches, but interpolates twice (affine, then elastic) and has no elastic
deformation in 3D. MONAI works image by image. Neither returns the source position of each pixel.

A warp is (B, *s, D): for each pixel of the output, its position in the input, in pixels.

Letters: B images, C contrasts, D spatial dimensions (2 or 3), *S the input's sizes along them, *s the output's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import GeometryConfig
from p2r.device import on_device
from p2r.views.draws import Draws
from p2r.views.smooth import num_controls, spline_field


@dataclass(frozen=True)
class Geometry:
    """Geometric parameters of B images, in millimetres, on the host."""

    matrix: NDArray[np.float64]
    """(B, D, D) from offsets in the output to offsets in the input, both from the centre."""
    shift_mm: NDArray[np.float64]
    """(B, D) translation, added to the offsets in the input."""
    controls_mm: NDArray[np.float64] | None
    """(B, D, *k) displacements of the elastic control points; None: no elastic deformation."""


def sample_geometry(
    draws: Draws, *, config: GeometryConfig, size: tuple[int, ...], spacing_mm: Sequence[float]
) -> Geometry:
    """Draw the geometric parameters of each image.

    Args:
        draws: Random numbers of B images.
        config: Ranges of the parameters.
        size: *s, the size of the output.
        spacing_mm: Pixel size along each of D axes.
    """
    dimensions = len(size)
    largest = np.array([config.rotation_deg] if dimensions == 2 else config.rotation_3d_deg)
    smallest, greatest = np.log(config.scale)
    num_shears = dimensions * (dimensions - 1) // 2
    matrix = affine_matrix(
        rotation_deg=draws.between(-1, 1, "rotation", len(largest)) * largest,
        magnification=np.exp(draws.between(smallest, greatest, "scale")),
        shear_deg=draws.between(-1, 1, "shear", num_shears) * config.shear_deg,
        flipped=draws.uniform("flip", dimensions) < config.flip_probability,
    )
    shift_mm = draws.between(-1, 1, "translation", dimensions) * config.translation_mm
    controls_mm = None
    if config.elastic_mm > 0:
        grid = [
            num_controls(pixels, config.elastic_spacing_mm / mm) for pixels, mm in zip(size, spacing_mm, strict=True)
        ]
        controls_mm = draws.normal("elastic", dimensions, *grid) * config.elastic_mm
    return Geometry(matrix, shift_mm, controls_mm)


def affine_matrix(
    *,
    rotation_deg: NDArray[np.float64],
    magnification: NDArray[np.float64],
    shear_deg: NDArray[np.float64],
    flipped: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Compose B linear maps from offsets in a view to offsets in the image.

    Args:
        rotation_deg: (B, 1) in the plane, or (B, 3) about each axis.
        magnification: (B,) magnification of the view.
        shear_deg: (B, 1) of rows along columns; or (B, 3): the first axis along the second, the first along the third, the
            second along the third.
        flipped: (B, D) bool: mirrored axes.

    Returns:
        (B, D, D).
    """
    batch, dimensions = flipped.shape
    pairs = list(combinations(range(dimensions), 2))
    matrix = np.tile(np.eye(dimensions), (batch, 1, 1))
    for angle, (i, j) in zip(np.deg2rad(rotation_deg).T, reversed(pairs), strict=True):  # about axis 0 first
        turn = np.tile(np.eye(dimensions), (batch, 1, 1))
        turn[:, i, i] = turn[:, j, j] = np.cos(angle)
        turn[:, j, i] = np.sin(angle)
        turn[:, i, j] = -turn[:, j, i]
        matrix = matrix @ turn
    shear = np.tile(np.eye(dimensions), (batch, 1, 1))
    for tangent, (i, j) in zip(np.tan(np.deg2rad(shear_deg)).T, pairs, strict=True):
        shear[:, i, j] = tangent
    signs = np.where(flipped, -1.0, 1.0)
    return matrix @ shear * signs[:, None] / magnification[:, None, None]


def warp_of(
    geometry: Geometry,
    *,
    size_in: tuple[int, ...],
    size_out: tuple[int, ...],
    spacing_mm: Sequence[float],
    device: torch.device | None = None,
) -> Tensor:
    """Compose the field of positions. The centres of input and output coincide before the translation.

    Args:
        geometry: Parameters of B images.
        size_in: *S.
        size_out: *s.
        spacing_mm: Pixel size of input and output along each of D axes.
        device: Device of the computation.

    Returns:
        (B, *s, D) float32, pixels of the input.
    """
    dimensions, mm = len(size_out), np.array(spacing_mm, dtype=np.float64)
    vector_shape = (1, dimensions, *[1] * dimensions)
    matrix = on_device(geometry.matrix * (mm / mm[:, None]), device)
    centre = (np.array(size_in) - 1) / 2
    position = on_device(geometry.shift_mm / mm + centre, device).reshape(-1, *vector_shape[1:])
    for axis in reversed(range(dimensions)):
        offset = torch.arange(size_out[axis], dtype=torch.float32, device=device) - (size_out[axis] - 1) / 2
        along = offset.reshape(-1, *[1] * (dimensions - 1 - axis))
        position = matrix[:, :, axis].reshape(-1, *vector_shape[1:]) * along + position  # (B, D, ...) up to (B, D, *s)
    if geometry.controls_mm is not None:
        position += spline_field(geometry.controls_mm / mm.reshape(vector_shape), size=size_out, device=device)
    return position.movedim(1, -1)


def apply_warp(image: Tensor, warp: Tensor, *, mode: Literal["bilinear", "nearest"] = "bilinear") -> Tensor:
    """Sample `image` at the positions in `warp`; zero outside the image. Whole pixels give their exact values.

    Args:
        image: (B, C, *S) floating point.
        warp: (B, *s, D).
        mode: Interpolation: `bilinear` (trilinear in 3D), or `nearest` for labels.

    Returns:
        (B, C, *s).

    Raises:
        ValueError: if the shapes do not match.
    """
    dimensions = warp.ndim - 2
    if not (
        dimensions in (2, 3) and image.ndim == warp.ndim and warp.shape[-1] == dimensions and len(image) == len(warp)
    ):
        raise ValueError(f"expected (B, C, *S) and (B, *s, D) in 2D or 3D, got {_shapes(image, warp)}")
    # grid_sample takes positions as fractions of the image size, which are exact in floating point only for powers of two.
    # So the image is padded to a power of two with zeros, the same values as outside the image.
    sizes = [1 << (size - 1).bit_length() for size in image.shape[2:]]
    missing = [size - there for size, there in zip(sizes, image.shape[2:], strict=True)]
    padded = F.pad(image, [pad for axis in reversed(missing) for pad in (0, axis)]) if any(missing) else image
    positions = zip(warp.to(image.dtype).unbind(-1), sizes, strict=True)
    parts = [(2 * position + 1) / size - 1 for position, size in positions]  # pixel centres, in [-1, 1]
    grid = torch.stack(parts[::-1], dim=1).movedim(1, -1)
    return F.grid_sample(padded, grid, mode=mode, padding_mode="zeros", align_corners=False)


def inside_mask(warp: Tensor, inside: Tensor) -> Tensor:
    """Mark the pixels of the output that show the scan.

    A pixel is marked if every input pixel used in its interpolation is inside the image and the scan, and if the warp does
    not fold there. Where it folds, neighbours are mirrored relative to the rest of the image.

    Args:
        warp: (B, *s, D).
        inside: (B, *S) bool, pixels of the input inside the scan.

    Returns:
        (B, *s) bool.
    """
    return shown_mask(warp, apply_warp(inside[:, None].float(), warp)[:, 0], size_in=tuple(inside.shape[1:]))


def shown_mask(warp: Tensor, warped_inside: Tensor, *, size_in: tuple[int, ...]) -> Tensor:
    """Compute `inside_mask` from an already warped `inside`, for example warped as another contrast of the image.

    Args:
        warp: (B, *s, D).
        warped_inside: (B, *s) float32.
        size_in: *S.
    """
    shown = warped_inside > 0.9999  # 1 up to rounding
    for position, size in zip(warp.unbind(-1), size_in, strict=True):
        shown &= (position >= 0) & (position <= size - 1)
    return shown & ~_mark_folds(warp)


def _mark_folds(warp: Tensor) -> Tensor:
    """Mark the pixels (B, *s) at the corners of cells with another orientation than most cells; a flip is not a fold.

    The Jacobian of a cell uses forward differences at its first corner.
    """
    position = warp.movedim(-1, 0)  # (D, B, *s)
    dimensions = len(position)
    corner = _cell_corners(position, [0] * dimensions)
    steps = [_cell_corners(position, axis) - corner for axis in np.eye(dimensions, dtype=int).tolist()]
    if dimensions == 2:
        determinant = _cross_product(steps[0], steps[1], 0, 1)
    else:
        determinant = sum(  # type: ignore[assignment]
            steps[0][i] * _cross_product(steps[1], steps[2], j, k) for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1))
        )
    cells = tuple(range(1, dimensions + 1))
    mirrored = (determinant < 0).sum(cells, keepdim=True) * 2 > determinant[0].numel()
    bad = torch.where(mirrored, determinant >= 0, determinant <= 0)
    padded = F.pad(bad, [1, 1] * dimensions)
    folded = torch.zeros_like(warp[..., 0], dtype=torch.bool)
    for corners in product((0, 1), repeat=dimensions):
        folded |= _cell_corners(padded, corners)
    return folded


def _cell_corners(field: Tensor, corner: Sequence[int]) -> Tensor:
    """Return the values of a field (..., *s) at one corner of every cell; `corner` is 0 or 1 along each axis."""
    dims = range(field.ndim - len(corner), field.ndim)
    for dim, start in zip(dims, corner, strict=True):
        field = field.narrow(dim, start, field.shape[dim] - 1)
    return field


def _cross_product(first: Tensor, second: Tensor, i: int, j: int) -> Tensor:
    return first[i] * second[j] - first[j] * second[i]


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
