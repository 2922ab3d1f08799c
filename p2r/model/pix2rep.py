"""Two views and corresponding points -> the two sets of embeddings that a loss compares; and the model of a task.

Pix2Rep asks a network f to follow geometry: f(warped image) = warped f(image). Warping whole feature maps to compare
them would be dear; here features are read only at the sampled points (a pixel of view b, and its position in view a),
and only those are projected.

Where the representation is coarser than the image, pixel p lies at (p + 1/2) / stride - 1/2 in it: the borders of both grids
fall on each other, so that a mirrored image has a mirrored representation.

Letters: B images, C contrasts, *S the D axes of an image (H W, or X Y Z), F feature channels, n points per image, E
embedding channels.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2r.config import ModelConfig
from p2r.model.backbones import build_backbone
from p2r.model.heads import ProjectionHead


class Pix2Rep(nn.Module):
    """Backbone and projection head, as they are pretrained.

    Args:
        config: Both networks.
        dimensions: 2 or 3, of the image.
        learnt_temperature: Where the loss's temperature starts, if it is learnt; None if it is not.
    """

    def __init__(self, config: ModelConfig, *, dimensions: int = 2, learnt_temperature: float | None = None) -> None:
        super().__init__()
        self.log_temperature: nn.Parameter | None = None
        if learnt_temperature is not None:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(learnt_temperature)]))
        self.stride = config.stride
        self.backbone: nn.Module = build_backbone(config, dimensions=dimensions)
        self.head = ProjectionHead(config.feature_channels, config.head_channels, config.embedding_channels)

    def forward(self, view_a: Tensor, view_b: Tensor, points_a: Tensor, points_b: Tensor) -> tuple[Tensor, Tensor]:
        """Embed corresponding points of two views, in one pass of the backbone over both.

        Args:
            view_a: (B, C, *S).
            view_b: (B, C, *S).
            points_a: (B, n, D) pixels along each axis of view a; fractions are interpolated.
            points_b: (B, n, D) where the same anatomy lies in view b: whole pixels.

        Returns:
            Queries, from a, and keys, from b: (B * n, E) each; row i of both is the same anatomy.
        """
        features = self.backbone(torch.cat([view_a, view_b]))  # (2B, F, *S / stride)
        features_a, features_b = features.chunk(2)
        if self.stride == 1:
            at_points = torch.cat([read_at(features_a, points_a), read_pixels(features_b, points_b)])  # (2B, n, F)
        else:
            points = torch.cat([points_a, points_b])
            at_points = read_at(features, (points + 0.5) / self.stride - 0.5)
        queries, keys = self.head(at_points).flatten(0, 1).chunk(2)  # (B * n, E) each
        return queries, keys


def read_at(features: Tensor, points: Tensor) -> Tensor:
    """Read maps at points, by linear interpolation along each axis in fp32 (float64 stays); exact where a point is a pixel.

    Args:
        features: (B, F, *S), S of D dimensions.
        points: (B, n, D) pixels along each axis, within [0, S - 1]; beyond, the border's value is read.

    Returns:
        (B, n, F).

    Raises:
        ValueError: The shapes do not fit each other.
    """
    size = _check_points(features, points)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    along = zip(points.to(dtype).unbind(-1), size, strict=True)
    position = torch.stack([of_axis.clamp(0, length - 1) for of_axis, length in along], -1)
    low = position.long()
    high = torch.stack([(low[..., axis] + 1).clamp(max=length - 1) for axis, length in enumerate(size)], -1)
    fraction = position - low  # weight of `high`, in [0, 1)

    indices, weights = [], []
    for corner in itertools.product((0, 1), repeat=len(size)):  # 2^D, from all low to all high
        of_axes = [(high if up else low)[..., axis] for axis, up in enumerate(corner)]
        indices.append(_flat_index(of_axes, size))
        shares = [fraction[..., axis] if up else 1 - fraction[..., axis] for axis, up in enumerate(corner)]
        weights.append(functools.reduce(torch.mul, shares))
    values = _take(features, torch.cat(indices, 1)).to(dtype) * torch.cat(weights, 1)[..., None]  # (B, 2^D n, F)
    at_points: Tensor = values.view(len(points), len(indices), -1, values.shape[-1]).sum(1)
    return at_points


def read_pixels(features: Tensor, points: Tensor) -> Tensor:
    """Read maps at whole pixels: what `read_at` gives there, for a fraction of the reading.

    Args:
        features: (B, F, *S).
        points: (B, n, D) whole numbers within [0, S - 1].

    Returns:
        (B, n, F) in fp32 (float64 stays).
    """
    size = _check_points(features, points)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return _take(features, _flat_index(list(points.long().unbind(-1)), size)).to(dtype)


def _check_points(features: Tensor, points: Tensor) -> list[int]:
    _, _, *size = features.shape
    if points.ndim != 3 or points.shape[-1] != len(size) or len(points) != len(features) or len(size) not in (2, 3):
        raise ValueError(
            f"expected features (B, F, H, W) and points (B, n, 2), or the same in 3D, "
            f"got {tuple(features.shape)} and {tuple(points.shape)}"
        )
    return size


def _flat_index(of_axes: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    flat = torch.zeros_like(of_axes[0])
    for of_axis, length in zip(of_axes, size, strict=True):
        flat = flat * length + of_axis
    return flat


def _take(features: Tensor, index: Tensor) -> Tensor:
    """Read (B, F, *S) at (B, m) flat positions -> (B, m, F), with a backward pass that gives the same bits every time."""
    flat = features.flatten(2)
    if features.device.type == "cuda":
        # Adds what meets in one pixel in the order of a sort; the backward pass of gather would add atomically.
        image = torch.arange(len(flat), device=index.device)[:, None]
        return flat.transpose(1, 2)[image, index]
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


class Segmenter(nn.Module):
    """Backbone and a head, as they are trained on a task's labels.

    To probe linearly, freeze the backbone with `backbone.requires_grad_(False)`: its forward pass then keeps nothing
    for a backward one, and its normalisation has no statistics that could drift.

    Args:
        backbone: Image (B, C, *S) -> features (B, F, *S), or fewer of them along each axis.
        head: Features -> logits. Fewer than the image's pixels are interpolated to them.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        """Turn `image` (B, C, *S) into logits (B, num_classes, *S)."""
        return self.logits_of(self.backbone(image), size=image.shape[2:])

    def logits_of(self, features: Tensor, *, size: Sequence[int]) -> Tensor:
        """Turn features (B, F, *s) into logits (B, num_classes, *S), S being `size`."""
        logits: Tensor = self.head(features)
        if logits.shape[2:] == tuple(size):
            return logits
        return F.interpolate(
            logits, size=tuple(size), mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False
        )
