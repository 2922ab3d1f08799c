"""A checkpoint for nnU-Net v2: `nnUNetv2_train ... -pretrained_weights checkpoint.pth`.

    checkpoint.pth         weights under nnU-Net's names; a dictionary of tensors and plain values
    configuration.json     the network as a configuration of nnU-Net's plans, which inherits the rest from 2d or 3d_fullres
    add_to_plans.py        adds that configuration to a data set's nnUNetPlans.json
    README.md              model card

nnU-Net's PlainConvUNet has a bias before each normalisation, which has no effect; p2r's dynunet has none, so they are zero. The
output layers are new in nnU-Net, so a model's head is left out. The weights are read back by p2r's own import and must be
the same; where nnU-Net's package of networks is installed, its network must give the features of p2r.
"""

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from pydoc import locate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2r.errors import InputError
from p2r.export import add_to_plans
from p2r.export.source import Source, Written, largest_difference
from p2r.model.backbones import build_backbone
from p2r.model.foreign import Names, names_in, transfer

_MAX_DIFFERENCE = 1e-5
_OPERATIONS = {
    2: ("torch.nn.modules.conv.Conv2d", "torch.nn.modules.instancenorm.InstanceNorm2d"),
    3: ("torch.nn.modules.conv.Conv3d", "torch.nn.modules.instancenorm.InstanceNorm3d"),
}
_IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]
_ALIASED = re.compile(r"\.(conv|norm)\.(weight|bias)$")


def write(source: Source, folder: Path) -> Written:
    """Write the checkpoint into an empty folder.

    Raises:
        InputError: The weights read back differ, or nnU-Net's network gives other features.
    """
    names = names_in("nnU-Net", source.model)
    assert names is not None  # see `p2r.exports`
    state = _rename(source, names)
    _check_round_trip(source, state)
    base = "2d" if source.dimensions == 2 else "3d_fullres"
    name = f"{base}_p2r"
    architecture = _architecture(source)
    _write_files(source, folder, state, architecture, name=name, base=base)
    own = sum(
        value.numel() for key, value in state.items() if ".all_modules." not in key and "decoder.encoder." not in key
    )
    return Written(
        checks=(
            f"read back by p2r: the same weights, {own:,} numbers in {len(state)} entries",
            _check_in_nnunet(source, architecture, state),
        ),
        commands=(
            f"python {folder.name}/add_to_plans.py $nnUNet_preprocessed/DATASET/nnUNetPlans.json",
            f"nnUNetv2_train DATASET {name} 0 -pretrained_weights {folder.name}/checkpoint.pth",
        ),
        notes=(
            f"pretrained on pixels of {source.preparation.spacing_mm:g} mm, with intensities mapped to [0, 1] between percentiles; nnU-Net "
            "keeps its own spacing. Its z-score differs by a factor and an offset, which instance normalisation removes, and by the "
            "clipped voxels",
            *(["nnU-Net makes new output layers: the head of the model is left out"] if source.is_model else []),
        ),
    )


class _Architecture(NamedTuple):
    """nnU-Net's description of a network."""

    network_class_name: str
    arch_kwargs: dict[str, Any]

    def to_json(self) -> dict[str, object]:
        return {**self._asdict(), "_kw_requires_import": _IMPORTED}


def _write_files(
    source: Source,
    folder: Path,
    state: Mapping[str, Tensor],
    architecture: _Architecture,
    *,
    name: str,
    base: str,
) -> None:
    configuration = {
        name: {"inherits_from": base, "architecture": architecture.to_json()},
        "_size_divisor": source.model.size_divisor,
    }
    plan = {
        "architecture_plans": {
            "arch_class_name": architecture.network_class_name,
            "arch_kwargs": architecture.arch_kwargs,
            "arch_kwargs_requiring_import": _IMPORTED,
        },
        "pretrain_num_input_channels": source.model.in_channels,
        "recommended_downstream_patchsize": [source.preparation.image_size] * source.dimensions,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem" if source.model.name == "residual_encoder_unet" else "encoder.stages.0",
    }
    saved = {
        "network_weights": dict(state),
        "nnssl_adaptation_plan": plan,
        "citations": [{"type": "Pretraining", "name": "Pix2Rep", "url": "https://arxiv.org/abs/2407.20395"}],
        "pin": source.manifest.pin,
    }
    torch.save(saved, folder / "checkpoint.pth")
    (folder / "configuration.json").write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
    (folder / "add_to_plans.py").write_bytes(Path(str(add_to_plans.__file__)).read_bytes())
    (folder / "README.md").write_text(source.card, encoding="utf-8")


def _rename(source: Source, names: Names) -> dict[str, Tensor]:
    """Return the weights under all names that nnU-Net's network registers, without output layers."""
    own = {name: value for name, value in source.weights().items() if name.startswith("backbone.unet.")}
    state: dict[str, Tensor] = {}
    for key, value in own.items():
        name = names(key.removeprefix("backbone.unet."), source.model.depth)
        state[name] = value
        bias = re.sub(r"weight$", "bias", name)
        if source.model.name == "dynunet" and re.search(r"(\.conv|transpconvs\.\d+)\.weight$", name):
            width = value.shape[1] if "transpconvs" in name else value.shape[0]
            state[bias] = torch.zeros(width)
    for name, value in list(state.items()):
        if (found := _ALIASED.search(name)) is not None:
            index = int(found[1] == "norm")
            state[f"{name[: found.start()]}.all_modules.{index}.{found[2]}"] = value
    return state | {f"decoder.{name}": value for name, value in state.items() if name.startswith("encoder.")}


def _architecture(source: Source) -> _Architecture:
    model, dimensions = source.model, source.dimensions
    levels = len(model.channels)
    conv, norm = _OPERATIONS[dimensions]
    arguments: dict[str, Any] = {
        "n_stages": levels,
        "features_per_stage": list(model.channels),
        "conv_op": conv,
        "kernel_sizes": [[3] * dimensions] * levels,
        "strides": [[1] * dimensions, *[[2] * dimensions] * (levels - 1)],
        "conv_bias": True,
        "norm_op": norm,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    if model.name == "residual_encoder_unet":
        name = "ResidualEncoderUNet"
        arguments |= {"n_blocks_per_stage": list(model.num_blocks), "n_conv_per_stage_decoder": [1] * (levels - 1)}
    else:
        name = "PlainConvUNet"
        arguments |= {"n_conv_per_stage": [2] * levels, "n_conv_per_stage_decoder": [2] * (levels - 1)}
    return _Architecture(f"dynamic_network_architectures.architectures.unet.{name}", arguments)


def _check_round_trip(source: Source, state: Mapping[str, Tensor]) -> None:
    """Read the weights back as `pretrain.init_from` does, and compare them."""
    found = transfer(
        state,
        lambda config: build_backbone(config, dimensions=source.dimensions),
        source.model,
        where="the export",
    ).weights
    for name, value in source.weights().items():
        if name.startswith("backbone.unet.") and not torch.equal(found[name.removeprefix("backbone.")], value):
            raise InputError(f"{name} read back from the checkpoint differs: nothing was exported")


def _check_in_nnunet(source: Source, architecture: _Architecture, state: Mapping[str, Tensor]) -> str:
    """Compute features with nnU-Net's own network, if its package is installed."""
    network_class: Any = locate(architecture.network_class_name)
    if network_class is None:
        return "not compared with nnU-Net's own network: dynamic-network-architectures is not installed here"
    arguments = {
        key: locate(value) if key in _IMPORTED and value is not None else value
        for key, value in architecture.arch_kwargs.items()
    }
    network = network_class(source.model.in_channels, num_classes=2, deep_supervision=True, **arguments).eval()
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unexpected or any(".seg_layers." not in name for name in missing):
        raise InputError(f"nnU-Net's network needs {missing[:3]} and has no {unexpected[:3]}: nothing was exported")
    seen: list[Tensor] = []
    network.decoder.stages[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    backbone: Any = source.network.backbone if source.is_model else source.network
    found = 0.0
    for images in (source.images(), source.images(batch=2, blocks=3, seed=1)):
        with torch.no_grad():
            network(images)
            features = backbone.projection(seen[-1])
            found = max(
                found, largest_difference(features, backbone(images), at_most=_MAX_DIFFERENCE, what="nnU-Net's network")
            )
    version = importlib.metadata.version("dynamic-network-architectures")
    return f"nnU-Net's own network ({version}): largest difference of the features from p2r {found:.1e}"
