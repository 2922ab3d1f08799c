"""Small networks on top of the representation: one for pretraining, dropped afterwards, and one for a task.

The projection head works on points, not on maps: only sampled pixels are compared, so it costs H*W/n times less. Its
normalisation is over the channels of one point, and never mixes points.
"""

from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Features of points (..., F) -> embeddings (..., E): linear, layer norm, GELU, linear.

    Args:
        feature_channels: F.
        hidden_channels: Width between the two linear layers.
        embedding_channels: E.
    """

    def __init__(self, feature_channels: int, hidden_channels: int, embedding_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(feature_channels, hidden_channels),
            nn.LayerNorm(hidden_channels),
            nn.GELU(),
            nn.Linear(hidden_channels, embedding_channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Turn `features` (..., F) into embeddings (..., E), not normalised: the loss does that, in fp32."""
        embeddings: Tensor = self.layers(features.to(next(self.parameters()).dtype))
        return embeddings


class SegmentationHead(nn.Module):
    """Features (B, F, H, W) -> logits (B, num_classes, H, W) by one 1x1 convolution: on frozen features, a probe.

    Args:
        feature_channels: F.
        num_classes: Classes, background included.
    """

    def __init__(self, feature_channels: int, num_classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(feature_channels, num_classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `features` (B, F, H, W) into logits (B, num_classes, H, W)."""
        logits: Tensor = self.convolution(features)
        return logits
