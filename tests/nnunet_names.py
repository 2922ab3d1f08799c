"""Checkpoints as nnU-Net and nnssl write them, made from the weights of our networks without their packages."""

import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def filled(name: str, shape: torch.Size) -> Tensor:
    """Return weights that depend only on their name and shape; the scale of a normalisation is about 1."""
    count = torch.Size(shape).numel()
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + zlib.crc32(name.encode()) % 1000) * 0.3
    return (values + 1.0 * name.endswith("norm.weight")).float().reshape(shape)


def nnunet_state(state: dict[str, Tensor], *, num_classes: int = 3) -> dict[str, Tensor]:
    """Return the state of nnU-Net's ResidualEncoderUNet: our names, every second name that it registers, and segmentation layers."""
    ours = {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
    found: dict[str, Tensor] = {}
    for name, value in ours.items():
        found[name] = value
        if re.search(r"\.(conv|norm)\.(weight|bias)$", name):
            found[re.sub(r"\.(conv|norm)\.(\w+)$", lambda m: f".all_modules.{int(m[1] == 'norm')}.{m[2]}", name)] = (
                value
            )
    found |= {f"decoder.{name}": value for name, value in found.items() if name.startswith("encoder.")}
    ups = sorted(name for name in ours if re.fullmatch(r"decoder\.transpconvs\.\d+\.weight", name))
    for index, up in enumerate(ups):
        width, ndim = ours[up].shape[1], ours[up].ndim
        found[f"decoder.seg_layers.{index}.weight"] = torch.rand(num_classes, width, *[1] * (ndim - 2))
        found[f"decoder.seg_layers.{index}.bias"] = torch.rand(num_classes)
    return found


def save_nnssl(path: Path, state: dict[str, Tensor]) -> None:
    """Write an nnssl checkpoint: weights, adaptation plan and citations."""
    plan: dict[str, Any] = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {"configurations": {"onemmiso": {"patch_size": [160, 160, 160], "spacing": [1, 1, 1]}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
    }
    citations = [{"type": "Pretraining Dataset", "name": "OpenMind"}]
    torch.save({"network_weights": state, "nnssl_adaptation_plan": plan, "citations": citations}, path)
