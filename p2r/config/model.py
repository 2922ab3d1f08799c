"""Section `pretrain.model`: the network."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from p2r.config.section import Section, is_none
from p2r.contrasts import Contrasts


class ModelConfig(Section):
    """Encoder-decoder with the dimensions of its image, and the projection head used only in pretraining."""

    name: Literal["basic_unet", "unet", "dynunet", "residual_dynunet", "swin_unetr", "residual_encoder_unet"] = (
        "basic_unet"
    )
    """MONAI's BasicUNet (two convolutions per level), UNet (residual units), DynUNet (nnU-Net's network, with plain or residual blocks)
    or SwinUNETR (attention within windows). residual_encoder_unet: nnU-Net's ResEnc, the network of the OpenMind checkpoints."""
    in_channels: PositiveInt = 1
    """C, contrasts of an image. Default with `contrasts`: their number."""
    contrasts: Contrasts | None = Field(default=None, exclude_if=is_none)
    """Names of the contrasts of an image, in the order of its channels, such as [t1, flair]. An image may lack some of them. None: one
    contrast, of any kind."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=8)] = (16, 32, 64, 128, 256)
    """Channels per level, finest first; each level halves the size. basic_unet has five levels. swin_unetr has five token levels below
    the image's own resolution; their channels double from a multiple of 12."""
    blocks: Annotated[tuple[PositiveInt, ...], Field(max_length=8)] | None = Field(default=None, exclude_if=is_none)
    """residual_encoder_unet only: residual blocks per level, as many numbers as in `channels`. None: nnU-Net's 1, 3, 4, then 6."""
    feature_channels: PositiveInt = 32
    """F, channels of the dense representation that a backbone returns for every pixel."""
    level: NonNegativeInt = 0
    """Decoder level that gives the representation. 0: the finest, one vector per pixel; 1: one per 2 pixels along each axis; 2: one per
    4. Finer levels are left out of the network."""
    normalisation: Literal["instance", "group"] = "instance"
    """Both normalise each image by itself, with a learnt scale and shift. Batch normalisation is refused: it mixes a rank's images."""
    groups: PositiveInt = 8
    """Group normalisation only: number of groups; must divide every number of channels."""
    channels_last: Literal["auto"] | bool = "auto"
    """Use the channels-last memory format, in which convolutions are faster on GPUs and slower on CPUs. auto: on GPUs with
    `pretrain.compile`. Without it, instance normalisation copies its maps to channels first and back, which costs more."""
    checkpoint_activations: Literal["none", "encoder", "all"] | PositiveInt = "none"
    """Blocks whose activations are recomputed in the backward pass instead of stored: less memory, more time, the same numbers. A number:
    the blocks of that many levels, starting at the finest, which hold the most."""
    head_channels: PositiveInt = 256
    """Hidden width of the projection head."""
    embedding_channels: PositiveInt = 128
    """E, length of the embedding vectors that the loss compares."""

    @model_validator(mode="before")
    @classmethod
    def _count_contrasts(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("contrasts"), list | tuple):
            return {"in_channels": len(values["contrasts"]), **values}
        return values

    @field_validator("normalisation", mode="before")
    @classmethod
    def _refuse_batch(cls, value: object) -> object:
        if value == "batch":
            raise ValueError(
                "batch normalisation would make features depend on the other images of a rank and micro-batch: use instance or group"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        first, channels = self.channels[0], list(self.channels)
        if self.contrasts is not None and self.in_channels != len(self.contrasts):
            raise ValueError(
                f"in_channels must be {len(self.contrasts)}, the number of contrasts ({', '.join(self.contrasts)}), got "
                f"{self.in_channels}; leave it out"
            )
        if self.name == "basic_unet" and len(channels) != 5:
            raise ValueError(f"channels of basic_unet must be five, got {len(channels)}; unet and dynunet take 3 to 8")
        if self.name == "swin_unetr" and (first % 12 or channels != [first * 2**level for level in range(5)]):
            raise ValueError(
                f"channels of swin_unetr must be five that double from a multiple of 12, such as 24, 48, 96, 192, 384, got {channels}"
            )
        if self.blocks is not None and self.name != "residual_encoder_unet":
            raise ValueError(f"blocks are for residual_encoder_unet; {self.name} has none: leave them out")
        if self.blocks is not None and len(self.blocks) != len(channels):
            raise ValueError(
                f"blocks must have one number per level, got {len(self.blocks)} for {len(channels)} levels"
            )
        if self.level >= self.depth:
            raise ValueError(f"level must be below {self.depth} ({self._kind} depth {self.depth}), got {self.level}")
        if self.normalisation == "group":
            uneven = [number for number in (*channels, self.feature_channels) if number % self.groups]
            if uneven:
                raise ValueError(f"groups must divide channels and feature_channels, got {self.groups} for {uneven}")
        return self

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Residual blocks of every level of residual_encoder_unet."""
        return self.blocks or tuple((1, 3, 4)[level] if level < 3 else 6 for level in range(len(self.channels)))

    @property
    def depth(self) -> int:
        """Number of times the network halves an image."""
        return len(self.channels) - (self.name != "swin_unetr")

    @property
    def size_divisor(self) -> int:
        """Divisor required of every side of an image."""
        return 1 << self.depth

    @property
    def stride(self) -> int:
        """Pixels along each axis that share one vector of the representation."""
        return 1 << self.level

    @property
    def _kind(self) -> str:
        return "Swin UNETR" if self.name == "swin_unetr" else "U-Net"

    def check_size(self, *size: int, what: str) -> None:
        """Raise `ValueError` if the network cannot take an image of this size.

        Args:
            size: Pixels along each axis.
            what: Name of the size, for the message.
        """
        divisor, shown = self.size_divisor, " x ".join(map(str, size))
        rule = f"({self._kind} depth {self.depth})"
        if any(side % divisor for side in size):
            raise ValueError(f"{what} must be divisible by {divisor} {rule}, got {shown}")
        if all(side == divisor for side in size):
            # Normalising a single pixel gives zero for every image.
            raise ValueError(
                f"{what} must be divisible by {divisor} and larger {rule}: one pixel would be left at the coarsest level, got {shown}"
            )
