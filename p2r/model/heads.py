"""Small networks on top of the representation: one for pretraining, dropped afterwards, and two for a task.

The projection head works on points, not on maps: only sampled pixels are compared, so it costs H*W/n times less. Its
normalisation is over the channels of one point, and never mixes points. It is so cheap that it computes in fp32 where the
backbone does not, and rounds what it gives once, for the loss to multiply in the network's precision.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from p2r.model.normalisation import LayerNorm, wide


class WideLinear(nn.Linear):
    """PyTorch's, computed in fp32. Every layer widens its own weights: ZeRO stage 3 brings them layer by layer."""

    def forward(self, features: Tensor) -> Tensor:
        """Turn `features` (..., F), in fp32, into (..., E)."""
        return F.linear(features, wide(self.weight), wide(self.bias))


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
            WideLinear(feature_channels, hidden_channels),
            LayerNorm(hidden_channels),
            nn.GELU(),
            WideLinear(hidden_channels, embedding_channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Turn `features` (..., F) into embeddings (..., E), not normalised: the loss does that, in fp32."""
        dtype = next(self.parameters()).dtype
        embeddings: Tensor = self.layers(features.to(torch.promote_types(dtype, torch.float32))).to(dtype)
        return embeddings


class SegmentationHead(nn.Module):
    """Features (B, F, *S) -> logits (B, num_classes, *S) by one 1x1 convolution: on frozen features, a probe.

    Args:
        feature_channels: F.
        num_classes: Classes, background included.
        dimensions: 2 or 3, of the maps.
    """

    def __init__(self, feature_channels: int, num_classes: int, *, dimensions: int = 2) -> None:
        super().__init__()
        self.convolution = Conv["conv", dimensions](feature_channels, num_classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `features` (B, F, *S) into logits (B, num_classes, *S)."""
        logits: Tensor = self.convolution(features)
        return logits


class PrototypeHead(nn.Module):
    """Features (B, F, *S) -> logits (B, num_classes, *S): the cosine to the nearest prototype of each class, over a temperature.

    Args:
        feature_channels: F.
        num_prototypes: Of each class, background first.
    """

    temperature = 0.1
    """It decides how windows are blended where they overlap, and nothing else: the largest cosine wins."""

    def __init__(self, feature_channels: int, num_prototypes: Sequence[int]) -> None:
        super().__init__()
        self.num_prototypes = tuple(num_prototypes)
        self.prototypes = nn.Parameter(torch.zeros(sum(num_prototypes), feature_channels), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `features` (B, F, *S) into logits (B, num_classes, *S)."""
        directions = F.normalize(features.float(), dim=1)
        cosines = torch.einsum("pf,bf...->bp...", F.normalize(self.prototypes.float(), dim=1), directions)
        of_classes = torch.split(cosines, list(self.num_prototypes), dim=1)
        return torch.stack([of_class.amax(1) for of_class in of_classes], dim=1) / self.temperature
