"""The U-Net of anatomix, from one of its checkpoints, as a frozen network for `finetune.other`.

    finetune.other: {build: "p2r.model.anatomix:anatomix", options: {weights: anatomix.pth}, ...}

None of p2r's networks has its layers: padding by reflection, upsampling without weights, and batch normalisation or instance
normalisation without scale. So its weights are used frozen, and cannot start a pretraining. Frozen batch normalisation uses stored
means, and does not mix the images of a batch.

The file determines the network: 4 d + 4 convolutions mean d levels, and running means mean batch normalisation. Files of both kinds
differ in pooling and upsampling, which have no weights: maximum and nearest, or average and linear (`anatomix-dev`).

Source: Dey et al., ICLR 2025 (arXiv:2411.02372), and the layout of its released network.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2r.errors import CheckpointError
from p2r.logs import say
from p2r.reference import parse_reference
from p2r.tensors import unallocated
from p2r.weights_file import as_float32, read_weights_file

MARKER = re.compile(r"^(?:_orig_mod\.)?model\.0\.weight$")
"""Name of the first convolution, in a file saved after torch.compile, too."""
_COMPILED = "_orig_mod."
_NUM_NAMED = 6
_INSTANCE_EPS = 1e-2


class Layout(NamedTuple):
    """Sizes of the network."""

    dimensions: int
    num_levels: int
    channels: int
    """Channels of the finest level."""
    out_channels: int
    has_batch_norm: bool
    norm_eps: float = 1e-5


class AnatomixUnet(nn.Module):
    """Encoder and decoder as one list of layers, whose numbers are the names of the weights.

    Args:
        layout: Sizes.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.model = nn.Sequential(*_layers(layout))
        self.is_standardised = not layout.has_batch_norm

    def forward(self, image: Tensor) -> Tensor:
        """Return features (B, F, *S) of images (B, 1, *S) in [0, 1].

        Features of files with instance normalisation are standardised over F at each pixel, as their authors advise.
        """
        skips: list[Tensor] = []
        features = image
        for layer in self.model:
            if isinstance(layer, _POOLS):
                skips.append(features)
            features = layer(features)
            if isinstance(layer, nn.Upsample):
                features = torch.cat((skips.pop(), features), dim=1)
        if not self.is_standardised:
            return features
        return F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)


_POOLS = (nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d)


def anatomix(*, weights: str, norm_eps: float | None = None) -> nn.Module:
    """Return the network of a checkpoint, after comparing every name and shape; log the numbers of matched tensors.

    Args:
        weights: Path or URL of the checkpoint, such as `anatomix.pth`; `@sha256:HEX` pins it. No code of the file runs.
        norm_eps: Constant under the root of a normalisation. None: 1e-5 for batch normalisation, 1e-2 for instance normalisation, as in
            `anatomix-dev` with 94 million weights; its predecessor with 37 million had 1e-5.

    Raises:
        CheckpointError: The file is not readable, or is not a checkpoint of this network.
    """
    where = f"weights of anatomix {weights}"
    file = read_weights_file(parse_reference(weights), where=where)
    found = {name.removeprefix(_COMPILED): value for name, value in file.tensors.items()}
    layout = layout_of(found, where=where, norm_eps=norm_eps)
    network = unallocated(lambda: AnatomixUnet(layout), where=where)
    wanted = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
    _refuse_differences(found, wanted, where=where)
    state = {name: as_float32(found[name], name=name, where=where) for name in wanted}
    network = AnatomixUnet(layout)
    network.load_state_dict(state, strict=False)  # what is not in `state` counts batches
    left_out = len(found) - len(state)
    say(
        f"finetune | weights of anatomix, sha256 {file.sha256[:12]}: {len(state)} of {len(wanted)} tensors matched by name and shape, "
        f"{sum(value.numel() for value in state.values()):,} values; left out: {left_out} (counts of batches)"
    )
    return network


def layout_of(tensors: Mapping[str, Tensor], *, where: str, norm_eps: float | None = None) -> Layout:
    """Return the sizes that the names and shapes of a checkpoint imply; these do not give `norm_eps` (see `anatomix`).

    Raises:
        CheckpointError: They are of another network.
    """
    kernels = [value for _, value in sorted(_numbered(tensors)) if value.ndim >= 4]
    num_levels, rest = divmod(len(kernels) - 4, 4)
    if rest or num_levels < 1 or kernels[0].shape[1] != 1:
        raise CheckpointError(
            f"{where} is not a checkpoint of anatomix: its names must be model.N.weight, with 4 d + 4 convolutions and one image channel; "
            f"got {len(kernels)} convolutions, first names {', '.join(list(tensors)[:3]):.200}"
        )
    has_batch_norm = any(name.endswith("running_mean") for name in tensors)
    return Layout(
        dimensions=kernels[0].ndim - 2,
        num_levels=num_levels,
        channels=kernels[0].shape[0],
        out_channels=kernels[-1].shape[0],
        has_batch_norm=has_batch_norm,
        norm_eps=(1e-5 if has_batch_norm else _INSTANCE_EPS) if norm_eps is None else norm_eps,
    )


def _numbered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    for name, value in tensors.items():
        if match := re.fullmatch(r"model\.(\d{1,4})\.weight", name):
            yield int(match[1]), value


def _layers(layout: Layout) -> Iterator[nn.Module]:
    """Yield the layers in their order: double convolutions, with pooling or upsampling between levels."""
    conv = nn.Conv2d if layout.dimensions == 2 else nn.Conv3d
    norm: type[nn.Module]
    pool: type[nn.Module]
    if layout.has_batch_norm:
        norm = nn.BatchNorm2d if layout.dimensions == 2 else nn.BatchNorm3d
        pool, mode = (nn.MaxPool2d if layout.dimensions == 2 else nn.MaxPool3d), "nearest"
    else:
        norm = nn.InstanceNorm2d if layout.dimensions == 2 else nn.InstanceNorm3d
        pool = nn.AvgPool2d if layout.dimensions == 2 else nn.AvgPool3d
        mode = "bilinear" if layout.dimensions == 2 else "trilinear"

    def convolved(before: int, after: int) -> Iterator[nn.Module]:
        yield conv(before, after, 3, padding=1, padding_mode="reflect", bias=not layout.has_batch_norm)

    def block(before: int, after: int) -> Iterator[nn.Module]:
        yield from convolved(before, after)
        yield norm(after, eps=layout.norm_eps)
        yield nn.ReLU()

    widths = [layout.channels * 2**level for level in range(layout.num_levels + 1)]
    yield from block(1, widths[0])
    for before, width in zip(widths[:1] + widths[:-2], widths[:-1], strict=True):
        yield from (*block(before, width), *block(width, width), pool(2))
    yield from (*block(widths[-2], widths[-1]), *block(widths[-1], widths[-1]))
    for coarse, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
        yield nn.Upsample(scale_factor=2, mode=mode)
        yield from (*block(coarse + width, width), *block(width, width))
    yield from convolved(widths[0], layout.out_channels)


def _refuse_differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, where: str) -> None:
    floating = {name: value for name, value in found.items() if not name.endswith("num_batches_tracked")}
    lines = [
        f"  {name:.100}: {_text(floating.get(name))} there, {_text(wanted.get(name))} here"
        for name in sorted({*floating, *wanted})
        if _text(floating.get(name)) != _text(wanted.get(name))
    ]
    if lines:
        shown = [*lines[:_NUM_NAMED], *([f"  and {len(lines) - _NUM_NAMED} more"] if len(lines) > _NUM_NAMED else [])]
        raise CheckpointError(
            f"{where}: {len(lines)} of {len(wanted)} weights do not fit its own network:\n"
            + "\n".join(shown)
            + "\nUse a file as anatomix released it"
        )


def _text(value: Tensor | None) -> str:
    return "none" if value is None else " x ".join(map(str, value.shape)) or "a number"
