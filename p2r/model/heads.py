"""Small networks on top of the representation: a projection head for pretraining, and two heads for tasks.

The projection head is dropped after pretraining. It works on points, not on maps: only sampled pixels are compared, so it
costs H*W/n times less. It normalises over the channels of one point, and never mixes points. Being cheap, it computes in fp32
even if the backbone does not, and rounds its output once, for the loss to multiply in the network's precision.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from monai.networks.layers.simplelayers import separable_filtering
from torch import Tensor, nn

from p2r.model.normalisation import LayerNorm, wide


class WideLinear(nn.Linear):
    """Linear layer computed in fp32. Each layer widens its own weights, because ZeRO stage 3 gathers them layer by layer."""

    def forward(self, features: Tensor) -> Tensor:
        """Map `features` (..., F), in fp32, to (..., E)."""
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
        """Map `features` (..., F) to embeddings (..., E), not normalised: the loss normalises them in fp32."""
        dtype = next(self.parameters()).dtype
        embeddings: Tensor = self.layers(features.to(torch.promote_types(dtype, torch.float32))).to(dtype)
        return embeddings


class SegmentationHead(nn.Module):
    """Features (B, F, *S) -> logits (B, num_classes, *S) by one 1x1 convolution; a linear probe on frozen features.

    Args:
        feature_channels: F.
        num_classes: Number of classes, including background.
        dimensions: Dimensions of the maps, 2 or 3.
    """

    def __init__(self, feature_channels: int, num_classes: int, *, dimensions: int = 2) -> None:
        super().__init__()
        self.convolution = Conv["conv", dimensions](feature_channels, num_classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits (B, num_classes, *S) of `features` (B, F, *S)."""
        logits: Tensor = self.convolution(features)
        return logits


class PrototypeHead(nn.Module):
    """Features (B, F, *S) -> logits (B, num_classes, *S): the cosine to the nearest prototype of each class / temperature.

    Args:
        feature_channels: F.
        num_prototypes: Number of prototypes of each class, background first.
        smoothing_pixels: Standard deviation of the Gaussian filter on the map of each class, pixels of the features; 0: no filter.
        is_centred: Subtract `centre` (F,) from the unit vectors of the features before the comparison.
    """

    temperature = 0.1
    """Temperature of the logits. It only affects the blending of overlapping windows: the largest cosine wins anyway."""

    def __init__(
        self,
        feature_channels: int,
        num_prototypes: Sequence[int],
        *,
        smoothing_pixels: float = 0.0,
        is_centred: bool = False,
    ) -> None:
        super().__init__()
        self.num_prototypes = tuple(num_prototypes)
        self.kernel = gaussian_kernel(smoothing_pixels)
        self.prototypes = nn.Parameter(torch.zeros(sum(num_prototypes), feature_channels), requires_grad=False)
        self.centre = nn.Parameter(torch.zeros(feature_channels), requires_grad=False) if is_centred else None

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits (B, num_classes, *S) of `features` (B, F, *S)."""
        directions = F.normalize(features.float(), dim=1)
        if self.centre is not None:
            centre = self.centre.float().reshape(1, -1, *[1] * (features.ndim - 2))
            directions = F.normalize(directions - centre, dim=1)
        cosines = torch.einsum("pf,bf...->bp...", F.normalize(self.prototypes.float(), dim=1), directions)
        by_class = torch.split(cosines, list(self.num_prototypes), dim=1)
        nearest = torch.stack([class_cosines.amax(1) for class_cosines in by_class], dim=1)
        if len(self.kernel) > 1:
            nearest = separable_filtering(nearest, nearest.new_tensor(self.kernel), mode="replicate")
        return nearest / self.temperature


def gaussian_kernel(sigma_pixels: float) -> tuple[float, ...]:
    """Return the weights of a sampled Gaussian up to three standard deviations, with the sum 1; a single 1 for 0."""
    radius = math.ceil(3 * sigma_pixels)
    weights = [math.exp(-0.5 * (place / (sigma_pixels or 1.0)) ** 2) for place in range(-radius, radius + 1)]
    return tuple(weight / sum(weights) for weight in weights)
