import os
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from p2r.config import ModelConfig
from p2r.model import build_backbone
from p2r.model.compiling import warm_up

SMALL = ModelConfig(name="dynunet", channels=(4, 4, 4), feature_channels=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_without_a_compiler_training_continues_and_logs_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    is_compiled, said = warm_up(build_backbone(SMALL), shape=(2, 1, 8, 8), dtype=torch.float32)
    assert not is_compiled
    assert said == (
        "not compiled: no compiler (no-such-compiler) on this machine, install one or name it in CXX; "
        "training continues without it"
    )


def test_with_a_failing_compiler_training_continues_and_logs_the_reason(tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    backbone = build_backbone(SMALL)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with inductor.patch({"cpp.cxx": (None, "false")}):  # CXX is read once in a process
        is_compiled, said = warm_up(backbone, shape=(2, 1, 8, 8), dtype=torch.bfloat16)
    assert not is_compiled
    assert said.startswith("not compiled: ") and said.endswith("training continues without it")
    assert "\n" not in said
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


def test_insufficient_memory_for_compiling_is_logged_and_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    backbone = build_backbone(SMALL)
    monkeypatch.setattr(
        "p2r.model.compiling.compile_in_place", lambda module, how: module.register_forward_pre_hook(full)
    )
    is_compiled, said = warm_up(backbone, shape=(2, 1, 8, 8), dtype=torch.float32)
    assert not is_compiled
    assert said == "not compiled: OutOfMemoryError: CUDA out of memory; training continues without it"


@pytest.mark.parametrize("given", [None, "/somewhere/else"])
def test_compiled_code_is_cached_in_p2rs_cache_unless_the_environment_names_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    if given is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as PyTorch sets it when it is imported
    warm_up(build_backbone(SMALL), shape=(2, 1, 8, 8), dtype=torch.float32)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (given or str(tmp_path / "inductor"))


NETWORKS: dict[str, tuple[dict[str, object], int, int]] = {
    "basic_unet": ({"channels": (4, 4, 4, 4, 4)}, 2, 32),
    "basic_unet, group, level 1, activations again": (
        {
            "channels": (4, 4, 4, 4, 4),
            "normalisation": "group",
            "groups": 2,
            "level": 1,
            "checkpoint_activations": "all",
        },
        2,
        32,
    ),
    "unet": ({"channels": (4, 4, 4)}, 3, 16),
    "dynunet": ({"channels": (4, 4, 4)}, 2, 16),
    "residual_dynunet": ({"channels": (4, 4, 4)}, 2, 16),
    "swin_unetr": ({"channels": (12, 24, 48, 96, 192)}, 2, 64),
}
"""Fields of a network, its dimensions, and the size of an image."""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # DeepSpeed replaces the function in a process that has used ZeRO stage 3, and never restores it.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    fields, dimensions, size = NETWORKS[name]
    config = ModelConfig.model_validate({"name": name.split(",")[0], "feature_channels": 4, **fields})
    image = torch.zeros(2, 1, *[size] * dimensions)
    torch._dynamo.reset()
    found = torch._dynamo.explain(build_backbone(config, dimensions=dimensions))(image)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1 and found.op_count > 10


def test_a_break_of_the_graph_is_counted() -> None:
    class Deciding(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image + 1 if image.sum() > 0 else image

    torch._dynamo.reset()
    assert torch._dynamo.explain(Deciding())(torch.ones(3)).graph_break_count > 0


def test_a_backbone_that_is_frozen_at_first_is_compiled_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2r.model.compiling.compile_in_place", lambda module, how: None)
    monkeypatch.setattr("p2r.model.compiling._find_missing_compiler", lambda device: None)
    backbone = build_backbone(SMALL).requires_grad_(False)
    is_compiled, said = warm_up(backbone, shape=(2, 1, 8, 8), dtype=torch.float32)
    assert is_compiled, said
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
