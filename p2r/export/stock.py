"""A published network as one of MONAI's own networks: its definition for a bundle, and its weights under MONAI's names.

The last layer, which a backbone lacks, is an identity for a backbone, and the segmentation head for a model. Where the last
layer has a 1x1 convolution before it (`projection`), both are multiplied into one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from p2r.errors import InputError
from p2r.export.source import Source
from p2r.model.foreign import names_in
from p2r.model.heads import PrototypeHead

_LAST_LAYER = {
    "basic_unet": "final_conv",
    "dynunet": "output_block.conv.conv",
    "residual_dynunet": "output_block.conv.conv",
    "swin_unetr": "out.conv.conv",
}
"""Name of the last 1x1 convolution; MONAI's UNet has none."""
_ALIASES = ("skip_layers.",)
"""Names under which a network registers its blocks a second time."""


def definition(source: Source, *, scripts: str) -> dict[str, object]:
    """Return the definition of the network for a MONAI bundle.

    Args:
        source: The backbone or model.
        scripts: Module with the classes of `bundle_script`, as the bundle imports it.
    """
    head = source.config.head() if source.is_model else None
    network = _network(source, num_outputs=_channels(source))
    if isinstance(head, PrototypeHead):
        return {
            "_target_": f"{scripts}.WithPrototypes",
            "network": network,
            "feature_channels": source.model.feature_channels,
            "num_prototypes": list(head.num_prototypes),
            "temperature": head.temperature,
            "kernel": list(head.kernel),
            "is_centred": head.centre is not None,
        }
    if _needs_wrapper(source):
        return {
            "_target_": f"{scripts}.WithHead",
            "network": network,
            "feature_channels": source.model.feature_channels,
            "num_classes": source.num_outputs,
            "dimensions": source.dimensions,
        }
    return network


def load_stock(network: nn.Module, source: Source) -> None:
    """Load the weights of a backbone or model into the network of its `definition`.

    Raises:
        InputError: A weight has no place, or a place no weight.
    """
    weights = _weights(source)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    missing = [
        name
        for name in missing
        if not name.removeprefix("network.").startswith(_ALIASES) and "relative_position_index" not in name
    ]
    if missing or unexpected:
        raise InputError(
            f"the installed MONAI builds another {source.model.name} than p2r: no weights for {missing[:3]}, no place for "
            f"{unexpected[:3]}; install the version of MONAI that p2r requires"
        )


def _needs_wrapper(source: Source) -> bool:
    return source.is_model and (source.model.name == "unet" or bool(source.config.num_prototypes))


def _channels(source: Source) -> int:
    return source.model.feature_channels if _needs_wrapper(source) else source.num_outputs


def _network(source: Source, *, num_outputs: int) -> dict[str, object]:
    model, dimensions = source.model, source.dimensions
    norm: list[Any] = ["instance", {"affine": True}]
    if model.normalisation == "group":
        norm = ["group", {"num_groups": model.groups}]
    common = {"spatial_dims": dimensions, "in_channels": model.in_channels, "out_channels": num_outputs}
    channels = list(model.channels)
    if model.name == "basic_unet":
        features = [*channels, model.feature_channels]
        return {"_target_": "BasicUNet", **common, "features": features, "norm": norm, "bias": False}
    if model.name == "unet":
        strides = [2] * model.depth
        return {
            "_target_": "UNet",
            **common,
            "channels": channels,
            "strides": strides,
            "num_res_units": 2,
            "norm": norm,
            "bias": False,
        }
    if model.name == "swin_unetr":
        return {"_target_": "SwinUNETR", **common, "feature_size": channels[0], "norm_name": norm}
    strides = [1] + [2] * model.depth
    return {
        "_target_": "DynUNet",
        **common,
        "kernel_size": [3] * len(strides),
        "strides": strides,
        "upsample_kernel_size": strides[1:],
        "filters": channels,
        "norm_name": norm,
        "res_block": model.name == "residual_dynunet",
    }


def _weights(source: Source) -> dict[str, Tensor]:
    """Return the weights under the names of `definition`."""
    own = source.weights()
    unet = {
        name.removeprefix("backbone.unet."): value for name, value in own.items() if name.startswith("backbone.unet.")
    }
    rename = names_in("MONAI", source.model)
    assert rename is not None
    unet = {rename(name, source.model.depth): value for name, value in unet.items()}
    weight, bias = _projection(source, own)
    is_wrapped = _needs_wrapper(source)
    if source.is_model and not is_wrapped:
        weight, bias = _multiply(own["head.convolution.weight"], own["head.convolution.bias"], weight, bias)
    if (last := _LAST_LAYER.get(source.model.name)) is not None:
        unet |= {f"{last}.weight": weight, f"{last}.bias": bias}
    if not is_wrapped:
        return unet
    named = {f"network.{name}": value for name, value in unet.items()}
    if source.config.num_prototypes:
        of_head = {name.removeprefix("head."): value for name, value in own.items() if name.startswith("head.")}
        return {**named, **of_head}
    return {**named, "head.weight": own["head.convolution.weight"], "head.bias": own["head.convolution.bias"]}


def _projection(source: Source, own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the 1x1 convolution of a backbone to its features; an identity if it has none."""
    if "backbone.projection.weight" in own:
        return own["backbone.projection.weight"], own["backbone.projection.bias"]
    channels = source.model.feature_channels
    return torch.eye(channels).reshape(channels, channels, *[1] * source.dimensions), torch.zeros(channels)


def _multiply(weight: Tensor, bias: Tensor, first: Tensor, first_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 1x1 convolution that equals `first`, followed by `weight` and `bias`."""
    matrix = weight.flatten(1).double()
    product = (matrix @ first.flatten(1).double()).float()
    shifted = (matrix @ first_bias.double() + bias.double()).float()
    return product.reshape(*product.shape, *weight.shape[2:]), shifted
