"""Model section of a job -> a network from an image (B, C, *S) to a dense representation (B, F, *S).

The networks are MONAI's and nnU-Net's, in 2D and 3D, without their last layer: the representation is the output of the decoder. So a linear
probe can read it, and pretraining and segmentation share all weights below their heads. The blocks are run one by one, for
two reasons. The representation may come from a coarser level of the decoder, without the later blocks. And blocks may be
recomputed in the backward pass instead of storing their activations.

Normalisation never mixes samples: an image's features do not depend on its batch, its rank, or on train() and eval(). It
would also cancel the bias of the preceding convolution, so these convolutions have none. Weights are drawn from torch's
global generator, which the caller seeds.

Letters: B images, C contrasts, *S rows and columns, or three axes; F feature channels. Levels count from the finest, 0;
level l has 1 / 2^l of the image's pixels along each axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from monai.networks.layers.factories import Conv, Norm
from monai.networks.layers.utils import get_norm_layer
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from p2r.config import ModelConfig
from p2r.contrasts import balance
from p2r.errors import InputError
from p2r.model.normalisation import GroupNorm, InstanceNorm, LayerNorm
from p2r.model.residual_encoder import ResidualEncoderUNet

Norm.add_factory_callable("p2r_instance", lambda dimensions: InstanceNorm)
Norm.add_factory_callable("p2r_group", lambda dimensions: GroupNorm)

Block = Callable[..., Tensor]
"""Maps, and in the decoder also the skip maps of the encoder -> maps."""
Run = Callable[..., Tensor]
"""(block, *inputs, level=..., is_encoder=...) -> output of the block."""


@dataclass(frozen=True)
class Cost:
    """Parameters and operations of a backbone."""

    num_parameters: int
    flops_per_image: int
    """Floating-point operations of one forward pass; a multiply-add counts as two."""

    def __str__(self) -> str:
        return f"{self.num_parameters / 1e6:.2f} M parameters, {self.flops_per_image / 1e9:.2f} GFLOP forward per image"


def cost_of(config: ModelConfig, *, dimensions: int, size: int) -> Cost:
    """Count a backbone's parameters and operations, without running it.

    Args:
        config: Model section of a job.
        dimensions: Dimensions of the image, 2 or 3.
        size: Edge of the image, pixels.
    """
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(config, dimensions=dimensions).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.empty(1, config.in_channels, *[size] * dimensions, device="meta"))
    return Cost(sum(weight.numel() for weight in backbone.parameters()), counter.get_total_flops())


def build_backbone(config: ModelConfig, *, dimensions: int = 2) -> "EncoderDecoder":
    """Build a backbone, with new weights from torch's global generator.

    Args:
        config: Model section of a job.
        dimensions: Dimensions of the image, 2 or 3.
    """
    return EncoderDecoder(config, dimensions=dimensions)


def channels_of_levels(config: ModelConfig, levels: Sequence[int], *, dimensions: int) -> list[int]:
    """Return the channels of the maps of decoder levels, without running the network on data."""
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(config, dimensions=dimensions).to("meta")
    sides = [2 * config.size_divisor] * dimensions
    with torch.no_grad():
        maps = backbone.levels(torch.empty(1, config.in_channels, *sides, device="meta"), levels)
    return [one.shape[1] for one in maps]


class EncoderDecoder(nn.Module):
    """One of the encoder-decoders, up to the decoder level of the representation.

    Args:
        config: Model section of a job.
        dimensions: Dimensions of the image, 2 or 3.

    Attributes:
        unet: The network, without unused parts. The attribute's name is part of the names of published weights.
        projection: 1x1 convolution from the level's own channels to F; identity if the level has F channels already.
    """

    def __init__(self, config: ModelConfig, *, dimensions: int) -> None:
        super().__init__()
        self.config, self.dimensions = config, dimensions
        build, self._encode, self._decoder_blocks = _NETWORKS[config.name]
        self.unet, channels = build(config, dimensions)
        self.projection: nn.Module = nn.Identity()
        if channels != config.feature_channels:
            self.projection = Conv["conv", dimensions](channels, config.feature_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Compute features (B, F, *S / 2^level) of `image` (B, C, *S), in the precision of the weights.

        Raises:
            ValueError: for another number of contrasts or axes, or a size that the levels cannot halve.
        """
        return self._compute(image, None)

    def levels(self, image: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """Compute the maps of several decoder levels in one pass.

        Args:
            image: (B, C, *S).
            levels: Levels from `config.level`, the features of `forward`, to `config.depth`, the encoder's last maps.

        Returns:
            Maps (B, channels of the level, *S / 2^level), in the order of `levels`.

        Raises:
            InputError: A level does not exist in this network.
            ValueError: as in `forward`.
        """
        first, last = self.config.level, self.config.depth
        missing = [level for level in levels if not first <= level <= last]
        if missing or not levels:
            finer = f"; finer levels were left out of this network (model.level {first})" if first else ""
            raise InputError(
                f"level {missing[0] if missing else 'none'} does not exist: {self.config.name} has levels {first} to {last}{finer}"
            )
        found: dict[int, Tensor] = {}
        found[first] = self._compute(image, found)
        return [found[level] for level in levels]

    def _compute(self, image: Tensor, found: dict[int, Tensor] | None) -> Tensor:
        """Return the features; put the maps of every level into `found`, if it is given."""
        channels, axes = self.config.in_channels, "H, W" if self.dimensions == 2 else "X, Y, Z"
        if image.ndim != 2 + self.dimensions or image.shape[1] != channels:
            raise ValueError(f"image must be (B, {channels}, {axes}), got {tuple(image.shape)}")
        self.config.check_size(*image.shape[2:], what="the sides of an image")
        image = balance(image.to(next(self.parameters()).dtype))
        if is_channels_last(self.config.channels_last, on_gpu=image.is_cuda, compiled=torch.compiler.is_compiling()):
            # A copy: with one contrast both layouts are the same bytes, and torch would continue with channels first.
            image = image.clone(memory_format=torch.channels_last if self.dimensions == 2 else torch.channels_last_3d)
        *skips, maps = self._encode(self.unet, image, self._run_block)  # one per level, finest first
        decoder = self._decoder_blocks(self.unet)  # finest first, from the configured level
        for level, block in reversed(list(enumerate(decoder, start=self.config.level))):
            if found is not None:
                found[level + 1] = maps
            maps = self._run_block(block, maps, skips[level], level=level, is_encoder=False)
        features: Tensor = self.projection(maps)
        return features

    def _run_block(self, block: Block, *inputs: Tensor, level: int, is_encoder: bool) -> Tensor:
        setting = self.config.checkpoint_activations
        recompute = (
            setting == "all" or (setting == "encoder" and is_encoder) or (isinstance(setting, int) and level < setting)
        )
        if not recompute or not torch.is_grad_enabled():
            return block(*inputs)
        # The networks draw no random numbers, so no generator state has to be saved.
        recomputed: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return recomputed


def is_channels_last(setting: Literal["auto"] | bool, *, on_gpu: bool, compiled: bool) -> bool:
    """Return whether maps have the channels-last layout.

    Without torch.compile, instance normalisation copies its maps to channels first and back. An nnU-Net trained 24 % slower with
    channels last for this reason. Source: https://github.com/pytorch/pytorch/issues/59168
    """
    return on_gpu and compiled if setting == "auto" else setting


def _run_sequence(blocks: Sequence[Block], image: Tensor, run: Run) -> list[Tensor]:
    """Run blocks one after another and return the output of each."""
    maps = []
    for level, block in enumerate(blocks):
        image = run(block, image, level=level, is_encoder=True)
        maps.append(image)
    return maps


def _build_basic_unet(config: ModelConfig, dimensions: int) -> tuple[nn.Module, int]:
    network = BasicUNet(
        spatial_dims=dimensions,
        in_channels=config.in_channels,
        out_channels=1,
        features=(*config.channels, config.feature_channels),
        norm=_norm_spec(config),
        bias=False,
    )
    network.final_conv = nn.Identity()
    for level in range(config.level):
        delattr(network, f"upcat_{level + 1}")
    return network, config.channels[config.level] if config.level else config.feature_channels


def _encode_basic_unet(network: Any, image: Tensor, run: Run) -> list[Tensor]:
    return _run_sequence([network.conv_0, *(getattr(network, f"down_{level}") for level in range(1, 5))], image, run)


def _basic_unet_decoder_blocks(network: Any) -> list[Block]:
    def run_upcat(block: Any, maps: Tensor, skip: Tensor) -> Tensor:
        # Like MONAI's forward, without the padding of odd sizes, which torch.compile does not support.
        output: Tensor = block.convs(torch.cat([skip, block.upsample(maps)], dim=1))
        return output

    names = [f"upcat_{number}" for number in range(1, 5)]
    return [partial(run_upcat, getattr(network, name)) for name in names if hasattr(network, name)]


def _build_dynunet(config: ModelConfig, dimensions: int) -> tuple[nn.Module, int]:
    strides = [1] + [2] * config.depth
    network = DynUNet(
        spatial_dims=dimensions,
        in_channels=config.in_channels,
        out_channels=1,
        kernel_size=[3] * len(strides),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=config.channels,
        norm_name=_norm_spec(config),
        res_block=config.name == "residual_dynunet",
    )
    network.output_block = nn.Identity()
    del network.skip_layers  # the same blocks, registered twice
    network.upsamples = network.upsamples[: config.depth - config.level]  # coarsest first
    return network, config.channels[config.level]


def _encode_dynunet(network: Any, image: Tensor, run: Run) -> list[Tensor]:
    return _run_sequence([network.input_block, *network.downsamples, network.bottleneck], image, run)


def _dynunet_decoder_blocks(network: Any) -> list[Block]:
    return list(reversed(network.upsamples))


def _build_unet(config: ModelConfig, dimensions: int) -> tuple[nn.Module, int]:
    nested = UNet(
        spatial_dims=dimensions,
        in_channels=config.in_channels,
        out_channels=config.feature_channels,
        channels=config.channels,
        strides=[2] * config.depth,
        num_res_units=2,
        norm=_norm_spec(config),
        bias=False,
    ).model
    network = nn.Module()
    network.down, network.up = nn.ModuleList(), nn.ModuleList()
    for level in range(config.depth):
        down, skip, up = nested
        network.down.append(down)
        if level >= config.level:
            network.up.append(up)
        nested = skip.submodule
    network.bottom = nested
    return network, config.channels[config.level - 1] if config.level else config.feature_channels


def _encode_unet(network: Any, image: Tensor, run: Run) -> list[Tensor]:
    return _run_sequence([*network.down, network.bottom], image, run)


def _unet_decoder_blocks(network: Any) -> list[Block]:
    def run_up(block: nn.Module, maps: Tensor, skip: Tensor) -> Tensor:
        output: Tensor = block(torch.cat([skip, maps], dim=1))
        return output

    return [partial(run_up, block) for block in network.up]


def _build_swin_unetr(config: ModelConfig, dimensions: int) -> tuple[nn.Module, int]:
    setting = config.checkpoint_activations
    network = SwinUNETR(
        in_channels=config.in_channels,
        out_channels=1,
        feature_size=config.channels[0],
        norm_name=_norm_spec(config),
        norm_layer=LayerNorm,
        spatial_dims=dimensions,
        # Tokens begin at level 1.
        use_checkpoint=setting in ("encoder", "all") or (isinstance(setting, int) and setting > 1),
    )
    network.out = nn.Identity()
    for level in range(config.level):
        delattr(network, f"decoder{level + 1}")
        delattr(network, f"encoder{level + 1}")  # it only serves the skip into that decoder
    for module in network.modules():
        if hasattr(module, "relative_position_index"):  # determined by the window size, so not a weight to store
            module.register_buffer("relative_position_index", module.relative_position_index, persistent=False)
    return network, config.channels[max(config.level - 1, 0)]


def _encode_swin_unetr(network: Any, image: Tensor, run: Run) -> list[Tensor]:
    *tokens, deepest, coarsest = network.swinViT(image, network.normalize)  # levels 1 to 5
    maps = [
        # The inputs of removed decoders are not computed.
        run(getattr(network, f"encoder{level + 1}"), given, level=level, is_encoder=True)
        if hasattr(network, f"encoder{level + 1}")
        else given
        for level, given in enumerate([image, *tokens])
    ]
    return [*maps, deepest, run(network.encoder10, coarsest, level=5, is_encoder=True)]


def _swin_unetr_decoder_blocks(network: Any) -> list[Block]:
    names = [f"decoder{number}" for number in range(1, 6)]
    return [getattr(network, name) for name in names if hasattr(network, name)]


def _build_residual_encoder_unet(config: ModelConfig, dimensions: int) -> tuple[nn.Module, int]:
    name, values = _norm_spec(config)
    network = ResidualEncoderUNet(
        dimensions=dimensions,
        in_channels=config.in_channels,
        channels=config.channels,
        blocks=config.num_blocks,
        norm=partial(_build_norm, name, values, dimensions),
        level=config.level,
    )
    return network, config.channels[config.level]


def _build_norm(name: str, values: dict[str, int], dimensions: int, channels: int) -> nn.Module:
    norm: nn.Module = get_norm_layer((name, values), spatial_dims=dimensions, channels=channels)
    return norm


def _encode_residual_encoder_unet(network: Any, image: Tensor, run: Run) -> list[Tensor]:
    blocks = [network.encoder_block(level) for level in range(len(network.encoder.stages))]
    return _run_sequence(blocks, image, run)


def _residual_encoder_unet_decoder_blocks(network: Any) -> list[Block]:
    return [network.decoder_block(index) for index in reversed(range(len(network.decoder.stages)))]


def _norm_spec(config: ModelConfig) -> tuple[str, dict[str, int]]:
    return ("p2r_group", {"num_groups": config.groups}) if config.normalisation == "group" else ("p2r_instance", {})


_NETWORKS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "basic_unet": (_build_basic_unet, _encode_basic_unet, _basic_unet_decoder_blocks),
    "unet": (_build_unet, _encode_unet, _unet_decoder_blocks),
    "dynunet": (_build_dynunet, _encode_dynunet, _dynunet_decoder_blocks),
    "residual_dynunet": (_build_dynunet, _encode_dynunet, _dynunet_decoder_blocks),
    "swin_unetr": (_build_swin_unetr, _encode_swin_unetr, _swin_unetr_decoder_blocks),
    "residual_encoder_unet": (
        _build_residual_encoder_unet,
        _encode_residual_encoder_unet,
        _residual_encoder_unet_decoder_blocks,
    ),
}
