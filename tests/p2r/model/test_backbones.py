"""Backbones: shapes, refusals, features independent of the batch, and optimisations that change no value."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets.basic_unet import BasicUNet
from safetensors.torch import save_file
from torch import Tensor, nn

import p2r
from p2r.config import ModelConfig
from p2r.errors import InputError
from p2r.model import build_backbone
from p2r.model.backbones import EncoderDecoder, cost_of, is_channels_last
from p2r.model.contrasts import adapt_contrasts, config_for, missing_contrasts
from p2r.model.normalisation import GroupNorm, InstanceNorm, LayerNorm

CHANNELS = {
    "basic_unet": (4, 4, 8, 8, 8),
    "unet": (4, 8, 8),
    "dynunet": (4, 8, 8),
    "residual_dynunet": (4, 8, 8),
    "swin_unetr": (12, 24, 48, 96, 192),
    "residual_encoder_unet": (4, 8, 8),
}
QUICK = [name for name in CHANNELS if name != "swin_unetr"]
SMALL = ModelConfig(channels=CHANNELS["basic_unet"], feature_channels=6)


def small(name: str, **values: Any) -> ModelConfig:
    return ModelConfig(name=name, channels=CHANNELS[name], feature_channels=6, **values)


def image_for(config: ModelConfig, dimensions: int = 2, *, num_images: int = 1) -> Tensor:
    """Return a small image with unequal sides."""
    sides = [config.size_divisor * 2, *[config.size_divisor] * (dimensions - 1)]
    return torch.rand(num_images, config.in_channels, *sides)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", CHANNELS)
def test_features_have_f_channels_at_the_resolution_of_their_level(name: str, dimensions: int) -> None:
    last = small(name).depth - 1
    for level in {0, 1, last} if name != "swin_unetr" or dimensions == 2 else {last}:
        config = small(name, level=level, in_channels=2)
        image = image_for(config, dimensions)
        features = build_backbone(config, dimensions=dimensions)(image)
        assert features.shape == (1, 6, *(side // 2**level for side in image.shape[2:]))


def of_contrasts(name: str, *contrasts: str) -> tuple[ModelConfig, nn.Module]:
    """Return a network of these contrasts whose norms do not hide a factor of the image."""
    config = small(name, contrasts=contrasts)
    torch.manual_seed(0)
    return config, build_backbone(config)


@pytest.mark.parametrize("name", CHANNELS)
def test_a_backbone_of_one_contrast_sees_in_equal_or_missing_contrasts_what_it_saw_in_one(name: str) -> None:
    config, one = of_contrasts(name, "flair")
    image = image_for(config, num_images=2)
    wide = build_backbone(config_for(config, ["flair", "t1", "t2"]))
    wide.load_state_dict(adapt_contrasts(one.state_dict(), config, to=["flair", "t1", "t2"], dimensions=2))
    expected, none = one(image), torch.zeros_like(image)
    for equal in ([image, image, image], [none, image, none], [image, none, image]):
        torch.testing.assert_close(wide(torch.cat(equal, 1)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CHANNELS)
def test_a_backbone_of_some_contrasts_sees_what_that_of_all_sees_without_the_others(name: str) -> None:
    config, full = of_contrasts(name, "flair", "t1", "t2")
    for chosen in (["t1"], ["t2", "flair"]):
        part_config = config_for(config, chosen)
        part = build_backbone(part_config)
        part.load_state_dict(adapt_contrasts(full.state_dict(), config, to=chosen, dimensions=2))
        image = image_for(part_config, num_images=2)
        whole = torch.zeros(2, 3, *image.shape[2:])
        whole[:, [["flair", "t1", "t2"].index(contrast) for contrast in chosen]] = image
        torch.testing.assert_close(part(image), full(whole), rtol=1e-3, atol=1e-4)


def test_a_backbone_of_several_contrasts_has_no_weights_for_others() -> None:
    config, network = of_contrasts("basic_unet", "flair", "t1")
    with pytest.raises(ValueError, match="a network of flair, t1 has no weights for t2"):
        adapt_contrasts(network.state_dict(), config, to=["t2"], dimensions=2)
    assert missing_contrasts(config.contrasts, ["t2", "flair"]) == ("t2",)
    assert missing_contrasts(["flair"], ["t2", "flair"]) == ()


def test_an_images_features_do_not_depend_on_the_contrasts_of_its_batch() -> None:
    config, network = of_contrasts("basic_unet", "flair", "t1")
    both = image_for(config, num_images=2)
    both[0, 1] = 0
    with torch.no_grad():
        together, alone = network(both), network(both[:1])
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("name", CHANNELS)
def test_maps_of_any_level_come_from_one_pass_and_the_finest_are_the_features(name: str) -> None:
    config = small(name, level=1)
    backbone = build_backbone(config).eval()
    assert isinstance(backbone, EncoderDecoder)
    image = image_for(config)
    wanted = [config.depth, 1, 2]
    found = backbone.levels(image, wanted)
    for level, maps in zip(wanted, found, strict=True):
        assert maps.shape[2:] == tuple(side // 2**level for side in image.shape[2:])
    assert torch.equal(found[1], backbone(image)) and found[1].shape[1] == 6
    for missing in ([0], [1, config.depth + 1], [-1], []):
        with pytest.raises(InputError, match=rf"does not exist: {name} has levels 1 to {config.depth}; finer levels"):
            backbone.levels(image, missing)


@pytest.mark.parametrize("name", CHANNELS)
def test_every_weight_is_used_at_every_level(name: str) -> None:
    for level in range(small(name).depth):
        config = small(name, level=level)
        backbone = build_backbone(config)
        backbone(image_for(config)).square().sum().backward()
        assert [key for key, weight in backbone.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("size", [(100, 96), (96, 100), (16, 16), (8, 32)])
def test_a_size_that_the_levels_cannot_halve_is_refused_with_the_rule(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"divisible by 16 .*\(U-Net depth 4\)"):
        build_backbone(SMALL)(torch.rand(1, 1, *size))


@pytest.mark.parametrize("name", CHANNELS)
def test_the_rule_of_sizes_is_the_networks_own(name: str) -> None:
    config = small(name)
    backbone, divisor = build_backbone(config), config.size_divisor
    assert divisor == {"basic_unet": 16, "swin_unetr": 32}.get(name, 4)
    backbone(torch.rand(1, 1, 2 * divisor, divisor))
    for sides in ((divisor, divisor), (2 * divisor, divisor + divisor // 2)):
        with pytest.raises(ValueError, match=f"divisible by {divisor}"):
            backbone(torch.rand(1, 1, *sides))


@pytest.mark.parametrize("shape", [(2, 2, 32, 32), (1, 32, 32), (1, 1, 32, 32, 32)])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        build_backbone(SMALL)(torch.rand(shape))
    with pytest.raises(ValueError, match=r"\(B, 1, X, Y, Z\)"):
        build_backbone(SMALL, dimensions=3)(torch.rand(shape[:4]))


@pytest.mark.parametrize("normalisation", ["instance", "group"])
@pytest.mark.parametrize("name", CHANNELS)
def test_an_images_features_do_not_depend_on_its_batch_or_on_train_and_eval(name: str, normalisation: str) -> None:
    config = small(name, normalisation=normalisation, groups=2)
    backbone = build_backbone(config)
    image = image_for(config, num_images=3)
    together = backbone(image)
    torch.testing.assert_close(backbone(image[1:2])[0], together[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.eval()(image), together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CHANNELS)
def test_equal_seeds_give_equal_weights(name: str) -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(build_backbone(small(name)).state_dict())
    first, same, other = states
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


class Before(nn.Module):
    """The backbone of p2r 0.1.0's first artefacts, in its original code."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = BasicUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            features=(4, 4, 8, 8, 8, 6),
            norm=("instance", {"affine": True}),
            bias=False,
        )
        self.unet.final_conv = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.unet(image)
        return features


def test_the_default_has_the_weights_the_names_and_the_numbers_that_it_always_had() -> None:
    torch.manual_seed(3)
    before = Before()
    torch.manual_seed(3)
    now = build_backbone(SMALL)
    assert now.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(now.state_dict()[key], value) for key, value in before.state_dict().items())
    image = torch.rand(2, 1, 48, 32)
    assert torch.equal(now(image), before(image))


def test_a_backbone_that_was_published_before_can_still_be_loaded(tmp_path: Path) -> None:
    before = Before()
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    model = {"name": "basic_unet", "channels": [4, 4, 8, 8, 8], "feature_channels": 6}
    config = {
        "model": {**model, "head_channels": 16, "embedding_channels": 8},
        "preparation": {
            **{"slice_axis": "auto", "intensity_percentiles": [0.5, 99.5]},
            **{"spacing_mm": 2.0, "image_size": 32, "planes": "whole"},
        },
        "classes": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = {
        name: {
            "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(),
            "num_bytes": (tmp_path / name).stat().st_size,
        }
        for name in ("model.safetensors", "config.json")
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "p2r-backbone/1", "files": files}))
    loaded = p2r.load_backbone(str(tmp_path))
    image = torch.rand(1, 1, 32, 48)
    assert torch.equal(loaded(image), before(image))


@pytest.mark.parametrize("which", ["encoder", "all", 1, 2])
@pytest.mark.parametrize("name", CHANNELS)
def test_activations_that_are_computed_again_give_the_same_gradients_and_need_less_memory(
    name: str, which: str | int
) -> None:
    if name == "swin_unetr" and which in ("encoder", 1):
        pytest.skip("slow, and covered by the others")

    def gradients(config: ModelConfig) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        backbone = build_backbone(config)
        image = image_for(config)
        num_bytes = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal num_bytes
            num_bytes += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            features = backbone(image)
        features.square().sum().backward()
        return {key: weight.grad for key, weight in backbone.named_parameters() if weight.grad is not None}, num_bytes

    kept, bytes_kept = gradients(small(name))
    again, bytes_again = gradients(small(name, checkpoint_activations=which))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    assert bytes_again < bytes_kept


def test_a_frozen_backbone_stores_no_activations_despite_checkpointing() -> None:
    backbone = build_backbone(small("dynunet", checkpoint_activations="all")).requires_grad_(False)
    assert not backbone(torch.rand(1, 1, 16, 16)).requires_grad


@pytest.mark.parametrize("normalisation", ["instance", "group"])
@pytest.mark.parametrize("name", QUICK)
def test_channels_last_are_kept_through_the_network_and_only_change_rounding(name: str, normalisation: str) -> None:
    normalised: list[Tensor] = []

    def keep(_: nn.Module, __: Any, maps: Tensor) -> None:
        normalised.append(maps)

    for dimensions, layout in ((2, torch.channels_last), (3, torch.channels_last_3d)):
        if dimensions == 3 and name in ("residual_dynunet", "residual_encoder_unet"):
            continue  # PyTorch's 1x1x1 convolution on CPUs returns channels first
        config = small(name, channels_last=True, normalisation=normalisation, groups=2)
        torch.manual_seed(0)
        backbone = build_backbone(config, dimensions=dimensions)
        for module in backbone.modules():
            if isinstance(module, InstanceNorm | GroupNorm):
                module.register_forward_hook(keep)
        torch.manual_seed(0)
        plain = build_backbone(config.model_copy(update={"channels_last": False}), dimensions=dimensions)
        image = image_for(config, dimensions, num_images=2)
        normalised.clear()
        features = backbone(image)
        assert normalised and all(maps.is_contiguous(memory_format=layout) for maps in normalised)
        torch.testing.assert_close(features, plain(image), rtol=1e-3, atol=1e-4)


def test_the_layout_is_channels_last_by_itself_only_for_compiled_networks_on_gpus() -> None:
    chosen = {
        (on_gpu, compiled): is_channels_last("auto", on_gpu=on_gpu, compiled=compiled)
        for on_gpu in (False, True)
        for compiled in (False, True)
    }
    assert [case for case, last in chosen.items() if last] == [(True, True)]
    assert is_channels_last(True, on_gpu=False, compiled=False)
    assert not is_channels_last(False, on_gpu=True, compiled=True)


@pytest.mark.parametrize("make", [InstanceNorm, lambda channels: GroupNorm(4, channels)])
def test_statistics_of_a_bfloat16_map_are_float32(make: Any) -> None:
    torch.manual_seed(0)
    norm = make(8)
    nn.init.normal_(norm.weight)
    maps = (torch.randn(2, 8, 24, 24) * 0.3 + 5).bfloat16()  # a mean that bfloat16 cannot tell from its neighbours
    push = torch.randn(2, 8, 24, 24).bfloat16()

    def run(norm: nn.Module, maps: Tensor) -> tuple[Tensor, Tensor]:
        maps = maps.clone().requires_grad_()
        norm(maps).backward(push.to(maps.dtype))
        assert maps.grad is not None
        return norm(maps).detach(), maps.grad

    rounded = norm.to(torch.bfloat16)
    found, of_maps = run(rounded, maps)
    assert found.dtype == of_maps.dtype == torch.bfloat16
    exact, of_exact = run(rounded.float(), maps.float())
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=2**-8)  # rounded once
    torch.testing.assert_close(of_maps.float(), of_exact, rtol=2**-7, atol=2**-6)


def test_norms_equal_those_of_torch() -> None:
    maps, tokens = torch.randn(2, 8, 6, 5), torch.randn(2, 7, 8)
    torch.testing.assert_close(InstanceNorm(8)(maps), F.instance_norm(maps))
    assert torch.equal(GroupNorm(4, 8)(maps), nn.GroupNorm(4, 8)(maps))
    assert torch.equal(LayerNorm(8)(tokens), nn.LayerNorm(8)(tokens))


@pytest.mark.parametrize("name", CHANNELS)
def test_bfloat16_weights_give_the_features_of_float32_to_their_precision(name: str) -> None:
    config = small(name)
    torch.manual_seed(0)
    backbone = build_backbone(config).bfloat16()
    image = torch.rand(1, 1, *[4 * config.size_divisor] * 2)  # few pixels are normalised to anything
    with torch.no_grad():
        features = backbone(image)
        exact = backbone.float()(image)
    assert features.dtype == torch.bfloat16
    assert float((features.float() - exact).norm() / exact.norm()) < 0.03


def test_the_cost_is_that_of_its_convolutions() -> None:
    config = small("dynunet")
    flops = 0

    def add(module: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
        nonlocal flops
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = given[0] if isinstance(module, nn.ConvTranspose2d) else made
        flops += 2 * weight.numel() * positions[0, 0].numel()

    backbone = build_backbone(config)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(add)
    backbone(torch.rand(1, 1, 16, 16))
    state = torch.get_rng_state()
    cost = cost_of(config, dimensions=2, size=16)
    assert torch.equal(torch.get_rng_state(), state), "counting must not change the random state"
    assert cost.flops_per_image == flops
    assert cost.num_parameters == sum(weight.numel() for weight in backbone.parameters())
    assert str(cost).endswith("GFLOP forward per image")


@pytest.mark.parametrize("which", ["none", "all"])
@pytest.mark.parametrize("name", ["basic_unet", "unet"])
def test_a_backbone_is_one_graph_to_the_compiler(name: str, which: str) -> None:
    config = small(name, checkpoint_activations=which, channels_last=True)
    backbone = build_backbone(config)
    image = image_for(config)
    traced = torch.compile(backbone, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(traced(image), backbone(image))
