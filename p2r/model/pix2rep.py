"""Two views and corresponding points -> the two sets of embeddings that a loss compares; and the model of a task.

Pix2Rep asks a network f to follow geometry: f(warped image) = warped f(image). Warping whole feature maps to compare
them would be dear; here features are read only at the sampled points (a pixel of view b, and its position in view a),
and only those are projected.

Letters: B images, C contrasts, H W rows and columns, F feature channels, n points per image, E embedding channels.
"""

import torch
from torch import Tensor, nn

from p2r.config import ModelConfig
from p2r.model.backbones import build_backbone
from p2r.model.heads import ProjectionHead


class Pix2Rep(nn.Module):
    """Backbone and projection head, as they are pretrained.

    Args:
        config: Both networks.
        in_channels: C.
    """

    def __init__(self, config: ModelConfig, *, in_channels: int = 1) -> None:
        super().__init__()
        self.backbone = build_backbone(config, in_channels=in_channels)
        self.head = ProjectionHead(config.feature_channels, config.head_channels, config.embedding_channels)

    def forward(self, view_a: Tensor, view_b: Tensor, points_a: Tensor, points_b: Tensor) -> tuple[Tensor, Tensor]:
        """Embed corresponding points of two views, in one pass of the backbone over both.

        Args:
            view_a: (B, C, H, W).
            view_b: (B, C, H, W).
            points_a: (B, n, 2) row and column in view a, pixels; fractions are interpolated.
            points_b: (B, n, 2) where the same anatomy lies in view b.

        Returns:
            Queries, from a, and keys, from b: (B * n, E) each; row i of both is the same anatomy.
        """
        features = self.backbone(torch.cat([view_a, view_b]))  # (2B, F, H, W)
        at_points = read_at(features, torch.cat([points_a, points_b]))  # (2B, n, F)
        queries, keys = self.head(at_points).flatten(0, 1).chunk(2)  # (B * n, E) each
        return queries, keys


def read_at(features: Tensor, points: Tensor) -> Tensor:
    """Read maps at points, by bilinear interpolation in fp32 (float64 stays); exact where a point is a pixel.

    Args:
        features: (B, F, H, W).
        points: (B, n, 2) row and column, pixels, within [0, H - 1] and [0, W - 1]; beyond, the border's value is read.

    Returns:
        (B, n, F).

    Raises:
        ValueError: The shapes do not fit each other.
    """
    if features.ndim != 4 or points.ndim != 3 or points.shape[-1] != 2 or len(points) != len(features):
        raise ValueError(f"expected (B, F, H, W) and (B, n, 2), got {tuple(features.shape)} and {tuple(points.shape)}")
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    height, width = features.shape[-2:]
    row = points[..., 0].to(dtype).clamp(0, height - 1)
    column = points[..., 1].to(dtype).clamp(0, width - 1)
    top, left = row.long(), column.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, across = row - top, column - left  # weights of bottom and right, in [0, 1)

    pixels = features.flatten(2)  # (B, F, H * W)
    corners = torch.cat([top * width + left, top * width + right, bottom * width + left, bottom * width + right], dim=1)
    weights = torch.cat(
        [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], dim=1
    )  # (B, 4n)
    values = pixels.gather(2, corners[:, None].expand(-1, pixels.shape[1], -1)).to(dtype) * weights[:, None]
    return values.view(*values.shape[:2], 4, -1).sum(2).transpose(1, 2)  # (B, F, 4n) -> (B, n, F)


class Segmenter(nn.Module):
    """Backbone and a head, as they are trained on a task's labels.

    To probe linearly, freeze the backbone with `backbone.requires_grad_(False)`: its forward pass then keeps nothing
    for a backward one, and instance normalisation has no statistics that could drift.

    Args:
        backbone: Image (B, C, H, W) -> features (B, F, H, W).
        head: Features -> logits.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        """Turn `image` (B, C, H, W) into logits (B, num_classes, H, W)."""
        logits: Tensor = self.head(self.backbone(image))
        return logits
