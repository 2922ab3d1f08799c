"""anatomix checkpoints: sizes as published, features as their layers give them, and refusals of other files."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2r.config import ModelConfig
from p2r.errors import CheckpointError
from p2r.model.anatomix import AnatomixUnet, Layout, anatomix, layout_of
from p2r.model.foreign import transfer
from p2r.tensors import unallocated
from tests.nnunet_names import filled

ICLR = Layout(dimensions=3, num_levels=4, channels=16, out_channels=16, has_batch_norm=True)
DEV = Layout(dimensions=3, num_levels=5, channels=32, out_channels=32, has_batch_norm=False, norm_eps=1e-2)
SMALL = Layout(dimensions=3, num_levels=1, channels=2, out_channels=3, has_batch_norm=True)


def _state(layout: Layout) -> dict[str, Tensor]:
    state = AnatomixUnet(layout).state_dict()
    filled_in = {name: filled(name, value.shape) for name, value in state.items() if value.is_floating_point()}
    return state | {name: value.abs() + 0.5 if "var" in name else value for name, value in filled_in.items()}


@pytest.mark.parametrize(("layout", "millions", "last"), [(ICLR, 6, 65), (DEV, 94, 79)])
def test_the_networks_have_the_published_numbers_of_weights(layout: Layout, millions: int, last: int) -> None:
    state = unallocated(lambda: AnatomixUnet(layout), where="test").state_dict()
    weights = {name: value for name, value in state.items() if "running" not in name and "num_batches" not in name}
    assert round(sum(value.numel() for value in weights.values()) / 1e6) == millions
    assert state[f"model.{last}.weight"].shape[:2] == (layout.out_channels, layout.channels)
    assert (f"model.{last}.bias" in state) == (not layout.has_batch_norm)
    assert layout_of(state, where="test") == layout


def test_features_are_those_of_the_layers_written_out() -> None:
    state, network = _state(SMALL), AnatomixUnet(SMALL).eval()
    network.load_state_dict(state)
    image = filled("image", torch.Size((2, 1, 4, 4, 6)))

    def convolved(features: Tensor, number: int) -> Tensor:
        return F.conv3d(F.pad(features, (1,) * 6, mode="reflect"), state[f"model.{number}.weight"])

    def block(features: Tensor, number: int) -> Tensor:
        mean, var, weight, bias = (
            state[f"model.{number + 1}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(convolved(features, number), mean, var, weight, bias).relu()

    skip = block(block(block(image, 0), 3), 6)
    features = block(block(F.max_pool3d(skip, 2), 10), 13)
    features = torch.cat((skip, F.interpolate(features, scale_factor=2)), dim=1)
    expected = convolved(block(block(features, 17), 20), 23)
    with torch.no_grad():
        assert torch.allclose(network(image), expected, atol=1e-5)
        assert torch.allclose(network(image)[:1], network(image[:1]), atol=1e-6), "images of a batch do not mix"


@pytest.mark.parametrize("layout", [SMALL, SMALL._replace(has_batch_norm=False)])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_is_read_whole_and_the_log_says_so(
    layout: Layout, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _state(layout)
    torch.save({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "anatomix.pth")
    network = anatomix(weights=str(tmp_path / "anatomix.pth")).eval()
    for name, value in network.state_dict().items():
        assert not value.is_floating_point() or torch.equal(value, state[name]), name
    matched = 36 if layout.has_batch_norm else 16
    assert f"{matched} of {matched} tensors matched by name and shape" in capsys.readouterr().err
    features = network(filled("image", torch.Size((1, 1, 4, 4, 4))))
    assert features.shape == (1, 3, 4, 4, 4) and features.isfinite().all()
    if not layout.has_batch_norm:
        # 3 channels of standard deviation 1; the rounding of their mean differs between processors.
        assert features.mean(1).abs().max() < 1e-4, "standardised at each pixel"


def test_other_files_are_refused_with_the_names_that_differ(tmp_path: Path) -> None:
    def refused(state: dict[str, Tensor], match: str) -> None:
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=match):
            anatomix(weights=str(tmp_path / "other.pth"))

    state = _state(SMALL)
    refused(
        state | {"model.6.weight": torch.zeros(2, 4, 3, 3, 3)}, r"model\.6\.weight: 2 x 4 x 3 x 3 x 3 there, 2 x 2 x 3"
    )
    refused(
        {name: value for name, value in state.items() if name != "model.4.bias"}, r"model\.4\.bias: none there, 2 here"
    )
    refused(state | {"model.30.bias": torch.zeros(2)}, r"model\.30\.bias: 2 there, none here")
    refused({"conv.weight": torch.zeros(2, 1, 3, 3, 3)}, "is not a checkpoint of anatomix")
    refused(state | {"model.0.weight": state["model.0.weight"] * torch.nan}, "NaN")
    with pytest.raises(CheckpointError, match=r"use it frozen, as finetune\.other with build"):
        transfer(state, lambda config: torch.nn.Identity(), ModelConfig(), where="anatomix.pth")
