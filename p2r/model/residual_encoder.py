"""nnU-Net's residual encoder U-Net, with the names of its weights: `encoder.*` and `decoder.*` of its checkpoints load unchanged.

    stem -> stage 0 (full size) -> stage 1 (half) -> ... ; decoder: transposed convolution, concatenation, convolution

A stage is a sequence of residual blocks: two convolutions, each with a normalisation. The skip path of a block averages over the
stride and has a 1x1 convolution if the number of channels changes (ResNet-D). The decoder has one convolution per level.

Convolutions have a bias, unlike those of the other networks. The bias of a transposed convolution affects the features. The bias
before an instance normalisation does not, but checkpoints hold it.

Source: Isensee et al., nnU-Net Revisited, MICCAI 2024; `ResidualEncoderUNet` of dynamic-network-architectures (Apache-2.0).
"""

from collections.abc import Callable, Sequence

import torch
from monai.networks.layers.factories import Conv, Pool
from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]
"""Number of channels -> normalisation."""

_SLOPE = 0.01
"""Slope of the leaky ReLU for negative values."""


class ResidualEncoderUNet(nn.Module):
    """Encoder and decoder of the network, without a segmentation layer.

    Args:
        dimensions: Dimensions of the image, 2 or 3.
        in_channels: C, contrasts of an image.
        channels: Channels per level, finest first.
        blocks: Residual blocks per level.
        norm: Number of channels -> normalisation.
        level: Finest decoder level that is built.
    """

    def __init__(
        self,
        *,
        dimensions: int,
        in_channels: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        norm: NormFactory,
        level: int,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.stem = nn.Module()
        self.encoder.stem.convs = nn.Sequential(_ConvNorm(dimensions, in_channels, channels[0], norm=norm))
        inputs = [channels[0], *channels]
        self.encoder.stages = nn.Sequential(
            *(
                _Stage(dimensions, inputs[stage], width, stride=1 if stage == 0 else 2, num_blocks=count, norm=norm)
                for stage, (width, count) in enumerate(zip(channels, blocks, strict=True))
            )
        )
        self.decoder.stages, self.decoder.transpconvs = nn.ModuleList(), nn.ModuleList()
        for below in range(len(channels) - 1, level, -1):  # coarsest first, as in nnU-Net
            width = channels[below - 1]
            self.decoder.transpconvs.append(
                Conv["convtrans", dimensions](channels[below], width, kernel_size=2, stride=2)
            )
            stage = nn.Module()
            stage.convs = nn.Sequential(_ConvNorm(dimensions, 2 * width, width, norm=norm))
            self.decoder.stages.append(stage)
        self.apply(_initialise)

    def encoder_block(self, level: int) -> Callable[[Tensor], Tensor]:
        """Return the encoder's block of a level: maps of the level above, or the image -> maps."""
        stage: Callable[[Tensor], Tensor] = self.encoder.stages[level]  # type: ignore[index, assignment]
        if level > 0:
            return stage
        stem: Callable[[Tensor], Tensor] = self.encoder.stem.convs  # type: ignore[assignment, union-attr]
        return lambda image: stage(stem(image))

    def decoder_block(self, index: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a block of the decoder, coarsest first: maps of the level below, and the skip -> maps."""
        up, convs = self.decoder.transpconvs[index], self.decoder.stages[index].convs  # type: ignore[index, union-attr]

        def run(maps: Tensor, skip: Tensor) -> Tensor:
            output: Tensor = convs(torch.cat([up(maps), skip], dim=1))  # type: ignore[operator]
            return output

        return run


class _ConvNorm(nn.Module):
    """Convolution, normalisation and, if `is_active`, leaky ReLU."""

    def __init__(
        self,
        dimensions: int,
        inputs: int,
        outputs: int,
        *,
        norm: NormFactory,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        is_active: bool = True,
    ) -> None:
        super().__init__()
        self.conv = Conv["conv", dimensions](
            inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias
        )
        self.norm = norm(outputs)
        self.nonlin = nn.LeakyReLU(_SLOPE, inplace=True) if is_active else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        output: Tensor = self.nonlin(self.norm(self.conv(maps)))
        return output


class _ResidualBlock(nn.Module):
    def __init__(self, dimensions: int, inputs: int, outputs: int, *, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(dimensions, inputs, outputs, stride=stride, norm=norm)
        self.conv2 = _ConvNorm(dimensions, outputs, outputs, norm=norm, is_active=False)
        self.nonlin2 = nn.LeakyReLU(_SLOPE, inplace=True)
        skip: list[nn.Module] = []
        if stride > 1:
            skip.append(Pool["avg", dimensions](stride, stride))
        if inputs != outputs:
            skip.append(_ConvNorm(dimensions, inputs, outputs, kernel_size=1, bias=False, norm=norm, is_active=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, maps: Tensor) -> Tensor:
        output: Tensor = self.nonlin2(self.conv2(self.conv1(maps)) + self.skip(maps))
        return output


class _Stage(nn.Module):
    def __init__(
        self, dimensions: int, inputs: int, outputs: int, *, stride: int, num_blocks: int, norm: NormFactory
    ) -> None:
        super().__init__()
        first = _ResidualBlock(dimensions, inputs, outputs, stride=stride, norm=norm)
        more = (_ResidualBlock(dimensions, outputs, outputs, stride=1, norm=norm) for _ in range(num_blocks - 1))
        self.blocks = nn.Sequential(first, *more)

    def forward(self, maps: Tensor) -> Tensor:
        output: Tensor = self.blocks(maps)
        return output


def _initialise(module: nn.Module) -> None:
    """Draw weights as nnU-Net does: He initialisation; each residual block starts as its skip path."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, _ResidualBlock):
        nn.init.zeros_(module.conv2.norm.weight)  # type: ignore[arg-type]
