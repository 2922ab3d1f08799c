"""Model section of a job -> a network from an image (B, C, H, W) to a dense representation (B, F, H, W).

The U-Net is MONAI's, without its last 1x1 convolution: the F channels of the finest decoder level are the
representation, so that a linear probe reads what the decoder made, and pretraining and segmentation share every weight
below their heads. Instance normalisation never mixes samples: an image's features do not depend on its batch, on its
rank, or on train() and eval(). It would also take away any bias of the convolution before it, so those have none.
Weights are drawn from torch's global generator, which the caller seeds.

Letters: B images, C contrasts, H W rows and columns, F feature channels.
"""

from collections.abc import Callable

from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor, nn

from p2r.config import ModelConfig

SIZE_DIVISOR = 16  # four levels down, each half the size


class BasicUNetBackbone(nn.Module):
    """MONAI's BasicUNet up to its finest decoder level.

    Args:
        config: Channels of the levels and of the representation.
        in_channels: C.
    """

    def __init__(self, config: ModelConfig, *, in_channels: int) -> None:
        super().__init__()
        self.unet = BasicUNet(
            spatial_dims=2,
            in_channels=in_channels,
            out_channels=1,
            features=(*config.channels, config.feature_channels),
            norm=("instance", {"affine": True}),
            bias=False,
        )
        self.unet.final_conv = nn.Identity()
        self.in_channels = in_channels
        self.feature_channels = config.feature_channels

    def forward(self, image: Tensor) -> Tensor:
        """Turn `image` (B, C, H, W) into features (B, F, H, W), in the precision of the weights.

        Raises:
            ValueError: A side is not divisible by 16, or both are 16 (one pixel is left at the coarsest level, and the
                instance normalisation of one pixel is zero whatever the image is).
        """
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(f"image must be (B, {self.in_channels}, H, W), got {tuple(image.shape)}")
        height, width = image.shape[-2:]
        if height % SIZE_DIVISOR or width % SIZE_DIVISOR or height * width <= SIZE_DIVISOR**2:
            raise ValueError(
                f"height and width must be divisible by {SIZE_DIVISOR} (U-Net depth 4) and larger than "
                f"{SIZE_DIVISOR} x {SIZE_DIVISOR}, got {height} x {width}"
            )
        features: Tensor = self.unet(image.to(next(self.parameters()).dtype))
        return features


_BACKBONES: dict[str, Callable[..., nn.Module]] = {"basic_unet": BasicUNetBackbone}


def build_backbone(config: ModelConfig, *, in_channels: int = 1) -> nn.Module:
    """Build the backbone that `config` names, with new weights from torch's global generator."""
    return _BACKBONES[config.name](config, in_channels=in_channels)
