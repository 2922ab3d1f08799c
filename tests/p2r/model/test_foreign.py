"""Weights of other tools: stock networks give their own features, and every refusal states the rule and the way out."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from p2r.config import ModelConfig
from p2r.errors import CheckpointError
from p2r.model.backbones import build_backbone
from p2r.model.foreign import Transfer, transfer
from p2r.tensors import unallocated
from tests.nnunet_names import filled, nnunet_state

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/nnunet_networks.json").read_text(encoding="utf-8"))
"""Names of nnU-Net's own classes, and features of their decoders, with the weights of `filled`."""
STRIDES = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": (4, 8, 8)}
AFFINE = ("instance", {"affine": True})


def _basic(dimensions: int) -> nn.Module:
    return BasicUNet(spatial_dims=dimensions, in_channels=1, out_channels=3, features=(4, 4, 8, 8, 8, 6))


def _unet(dimensions: int) -> nn.Module:
    return UNet(
        dimensions, in_channels=1, out_channels=6, channels=(4, 8, 8), strides=(2, 2), num_res_units=2, bias=False
    )


def _dynunet(dimensions: int, *, res_block: bool = False) -> nn.Module:
    heads = {"deep_supervision": True, "deep_supr_num": 1} if res_block else {}
    return DynUNet(spatial_dims=dimensions, in_channels=1, out_channels=3, res_block=res_block, **STRIDES, **heads)


def _swin(dimensions: int) -> nn.Module:
    return SwinUNETR(in_channels=1, out_channels=3, feature_size=12, spatial_dims=dimensions)


def section(name: str, channels: tuple[int, ...], features: int, **values: Any) -> ModelConfig:
    return ModelConfig(name=name, channels=channels, feature_channels=features, **values)


SWIN = section("swin_unetr", (12, 24, 48, 96, 192), 12)
CASES: dict[str, tuple[Callable[[int], nn.Module], ModelConfig, str]] = {
    "basic_unet": (_basic, section("basic_unet", (4, 4, 8, 8, 8), 6), "upcat_1"),
    "unet": (_unet, section("unet", (4, 8, 8), 6), "model"),
    "dynunet": (_dynunet, section("dynunet", (4, 8, 8), 4), "upsamples.1"),
    "residual_dynunet": (
        lambda dimensions: _dynunet(dimensions, res_block=True),
        section("residual_dynunet", (4, 8, 8), 4),
        "upsamples.1",
    ),
    "swin_unetr": (_swin, SWIN, "decoder1"),
}
"""Our network -> stock MONAI network, model section, and the module whose output is the features."""


def mapped(tensors: dict[str, Tensor], config: ModelConfig, *, dimensions: int = 2) -> Transfer:
    def build(one: ModelConfig) -> nn.Module:
        return unallocated(lambda: build_backbone(one, dimensions=dimensions), where="test")

    return transfer(tensors, build, config, where="theirs.pth")


def loaded(found: Transfer, config: ModelConfig, *, dimensions: int = 2) -> nn.Module:
    backbone = build_backbone(config, dimensions=dimensions)
    backbone.load_state_dict(found.weights, strict=False)
    return backbone.eval()


def features_of(network: nn.Module, module: str, image: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(module).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        network.eval()(image)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_stock_network_of_monai_gives_its_own_features_in_ours(name: str, dimensions: int) -> None:
    if name == "swin_unetr" and dimensions == 3:
        pytest.skip("slow, and its names are those of 2D")
    build, config, module = CASES[name]
    torch.manual_seed(1)
    network = build(dimensions)
    found = mapped(
        {f"module.{key}": value for key, value in network.state_dict().items()}, config, dimensions=dimensions
    )
    assert found.prefix == "module." and "MONAI" in found.source
    image = torch.rand(1, 1, *[64 if name == "swin_unetr" else 32] * dimensions)
    with torch.no_grad():
        ours = loaded(found, config, dimensions=dimensions)(image)
    # Biases before a normalisation are left out; they change only the rounding.
    torch.testing.assert_close(ours, features_of(network, module, image), rtol=1e-4, atol=2e-5)
    rows = {(row.outcome, row.part) for row in found.rows}
    assert ("matched", "encoder") in rows and all(row.reason for row in found.rows)
    counted = sum(row.num_tensors for row in found.rows if row.outcome != "new")
    assert counted == len(network.state_dict()), "every tensor of the checkpoint has a line"


@pytest.mark.parametrize("dimensions", [2, 3])
def test_nnunets_residual_encoder_is_ours_name_by_name_and_value_by_value(dimensions: int) -> None:
    golden = GOLDEN[f"residual-{dimensions}"]
    config = section("residual_encoder_unet", (4, 8, 12), 4, blocks=(1, 2, 2))
    state = build_backbone(config, dimensions=dimensions).state_dict()
    state = {name: filled(name.removeprefix("unet."), value.shape) for name, value in state.items()}
    theirs = nnunet_state(state)
    names = "\n".join(sorted(f"{name} {tuple(value.shape)}" for name, value in theirs.items()))
    assert len(theirs) == golden["num_names"]
    assert hashlib.sha256(names.encode()).hexdigest() == golden["names_sha256"]
    found = mapped({f"network.{name}": value for name, value in theirs.items()}, config, dimensions=dimensions)
    assert found.weights.keys() == state.keys() and all(torch.equal(found.weights[name], state[name]) for name in state)
    assert not any(row.outcome == "new" for row in found.rows)
    image = filled("image", torch.Size([1, 1, *[16] * dimensions]))
    with torch.no_grad():
        features = loaded(found, config, dimensions=dimensions)(image).flatten()
    assert features[:: features.numel() // 12][:12].tolist() == pytest.approx(golden["features"], abs=2e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_nnunets_plain_network_gives_its_own_features_in_dynunet_away_from_the_border(dimensions: int) -> None:
    golden, config = GOLDEN[f"plain-{dimensions}"], section("dynunet", (4, 8, 12), 4)
    ours = build_backbone(config, dimensions=dimensions).state_dict()
    theirs = {}
    for name in ours:
        found = re.sub(r"^unet\.(input_block|downsamples\.0|bottleneck)\.", _stage, name)
        found = re.sub(r"^unet\.upsamples\.(\d)\.transp_conv\.conv", r"decoder.transpconvs.\1", found)
        found = re.sub(r"^unet\.upsamples\.(\d)\.conv_block\.", r"decoder.stages.\1.", found)
        found = re.sub(r"\.(conv|norm)(\d)\.(?:conv\.)?", lambda m: f".convs.{int(m[2]) - 1}.{m[1]}.", found)
        theirs[found] = filled(found, ours[name].shape)
        if found.endswith("conv.weight") or "transpconvs" in found:
            bias = found.replace("weight", "bias")
            width = ours[name].shape[1 if "transpconvs" in found else 0]
            theirs[bias] = filled(bias, torch.Size([width]))
    result = mapped(theirs, config, dimensions=dimensions)
    assert len(result.weights) == len(ours) and "PlainConvUNet" in result.source
    image = filled("image", torch.Size([1, 1, *[16] * dimensions]))
    # With the transposed convolutions' biases, which ours does not have, the features are exactly nnU-Net's.
    backbone: Any = loaded(result, config, dimensions=dimensions)
    for index, block in enumerate(backbone.unet.upsamples):
        block.transp_conv.conv.bias = nn.Parameter(theirs[f"decoder.transpconvs.{index}.bias"])
    with torch.no_grad():
        features = backbone(image).flatten()
    assert features[:: features.numel() // 12][:12].tolist() == pytest.approx(golden["features"], abs=2e-4)
    assert any("except at the image's border" in row.reason for row in result.rows)


def _stage(match: re.Match[str]) -> str:
    return f"encoder.stages.{('input_block', 'downsamples.0', 'bottleneck').index(match[1])}.0."


def test_an_encoder_alone_is_taken_and_a_coarser_level_leaves_the_finer_blocks_out() -> None:
    build, config, _ = CASES["basic_unet"]
    state = build(2).state_dict()
    found = mapped({name: value for name, value in state.items() if not name.startswith(("upcat", "final"))}, config)
    assert ("new", "decoder", "the checkpoint has no such decoder") in {
        (r.outcome, r.part, r.reason) for r in found.rows
    }
    assert not any("upcat" in name for name in found.weights)
    coarse = config.model_copy(update={"level": 2})
    reasons = {row.reason for row in mapped(state, coarse).rows}
    assert "decoder level finer than model.level" in reasons
    assert "layers to this network's own number of channels" in reasons


STATE = _basic(2).state_dict()


@pytest.mark.parametrize(
    ("change", "config", "rule"),
    [
        (lambda s: _basic(3).state_dict(), {}, r"3 dimensions, and image.dimensions is 2: set it to 3"),
        (lambda s: s, {"name": "unet"}, r"is MONAI's BasicUNet, and model.name is unet: set it to basic_unet"),
        (lambda s: s, {"in_channels": 2}, r"1 channels \(its stem is 4 x 1 x 3 x 3\), and this network has 2"),
        (lambda s: s, {"channels": (8, 8, 8, 8, 8)}, r"its stem is 4 x 1 x 3 x 3, .* set model.channels"),
        (lambda s: s, {"channels": (4, 4, 8, 8, 16)}, r"of 62 weights do not fit, and the encoder must be complete"),
        (lambda s: s, {"feature_channels": 8}, r"the decoder must be complete, or absent:[\s\S]*feature_channels"),
        (lambda s: {k: v for k, v in s.items() if "upcat_2" not in k}, {}, r"the decoder must be complete, or absent"),
        (
            lambda s: {**s, "down_9.convs.conv_0.conv.weight": torch.rand(1)},
            {},
            r"1 weights for which this network has no",
        ),
        (
            lambda s: {"some.weight": torch.rand(2)},
            {},
            r"of no known network, or lacks its first layer; known are .*Use it frozen",
        ),
        (lambda s: {**s, "conv_0.bn.running_mean": torch.rand(4)}, {}, r"batch normalisation"),
        (
            lambda s: {**s, "down_1.convs.conv_0.conv.weight": s["down_1.convs.conv_0.conv.weight"] * torch.nan},
            {},
            r"NaN",
        ),
        (lambda s: {k: v.int() for k, v in s.items()}, {}, r"int32; weights are floating-point"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_rule_and_the_way_out(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], config: dict[str, Any], rule: str
) -> None:
    given = ModelConfig(**{"channels": (4, 4, 8, 8, 8), "feature_channels": 6, **config})
    with pytest.raises(CheckpointError, match=rule):
        mapped(change(STATE), given)


def test_copies_of_a_layer_that_differ_and_another_normalisation_are_refused() -> None:
    config = section("residual_encoder_unet", (4, 8, 12), 4, blocks=(1, 2, 2))
    state = nnunet_state(build_backbone(config).state_dict())
    with pytest.raises(CheckpointError, match=r"set model\.normalisation to instance"):
        mapped(state, config.model_copy(update={"normalisation": "group", "groups": 4}))
    twice = {**state, "encoder.stem.convs.0.all_modules.0.weight": torch.rand(4, 1, 3, 3)}
    with pytest.raises(CheckpointError, match="are one layer, and have different values"):
        mapped(twice, config)
    with pytest.raises(CheckpointError, match="no place"):
        mapped(state, config.model_copy(update={"blocks": (1, 2, 1)}))
    with pytest.raises(CheckpointError, match="the encoder must be complete"):
        mapped(state, config.model_copy(update={"blocks": (1, 2, 3)}))
