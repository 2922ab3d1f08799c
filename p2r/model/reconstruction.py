"""Features of a view with masked blocks -> its intensities, and their error in these blocks.

Letters: B images, C contrasts, F feature channels, *S spatial. Source: Xie et al. 2022 (SimMIM), arXiv:2111.09886: one linear layer
predicts as well as deeper heads, and only masked pixels are scored.
"""

from monai.networks.layers.factories import Conv
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn


class ReconstructionHead(nn.Module):
    """Features (B, F, *S / stride) -> intensities (B, C, *S) by one 1x1 convolution: each vector predicts all pixels that it covers.

    Args:
        feature_channels: F.
        num_contrasts: C.
        stride: Pixels along each axis that a feature vector covers.
        dimensions: Dimensions of the maps, 2 or 3.
    """

    def __init__(self, feature_channels: int, num_contrasts: int, *, stride: int, dimensions: int) -> None:
        super().__init__()
        self.stride = stride
        self.convolution = Conv["conv", dimensions](feature_channels, num_contrasts * stride**dimensions, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Predict the intensities (B, C, *S) of views with `features` (B, F, *S / stride)."""
        values: Tensor = self.convolution(features)
        return values if self.stride == 1 else pixelshuffle(values, features.ndim - 2, self.stride)


def reconstruction_errors(predicted: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Return the mean squared error (B,) of each image over its scored pixels and contrasts, in fp32; 0 if it has none.

    Args:
        predicted: (B, C, *S).
        target: (B, C, *S).
        scored: (B, C, *S) bool.
    """
    squares = (predicted.float() - target).masked_fill(~scored, 0).square()
    axes = tuple(range(1, squares.ndim))
    errors: Tensor = squares.sum(axes) / scored.sum(axes).clamp(min=1)
    return errors
