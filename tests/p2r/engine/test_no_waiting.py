"""Between reports, a step neither synchronises with its device nor reads from it.

The steps are real, DeepSpeed's included. The CPU plays the part of a device that works on its own: every call that would
make the host wait for a GPU is counted.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from p2r.config import PretrainConfig
from p2r.engine.build import build_engine, join_process_group
from p2r.engine.step import take_step
from p2r.engine.tune_batch import noise_batch
from p2r.model.pix2rep import Pix2Rep
from tests.ranks import join_ranks, start_ranks

STEPS = 3  # DeepSpeed's timer would synchronise from the third on
CASES: dict[str, dict[str, Any]] = {
    "cross_view": {"loss": {"form": "cross_view"}},
    "nt_xent": {"loss": {"form": "nt_xent", "exclude_within_mm": 6.0, "foreground_share": 0.5}},
    "barlow_twins": {"loss": {"name": "barlow_twins"}},
    "micro-batches": {"micro_batch": 1},
    "within images": {"loss": {"negatives": "image"}},
    "bf16": {"precision": "bf16"},
}
READS = {"tolist", "numpy", "item", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero", "unique"}
WAITING_OPERATORS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}


class _Reads(TorchFunctionMode):
    """Calls from Python that read a tensor."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(function, "__name__", "")) in READS:
            self._found[name] += 1
        return function(*args, **(kwargs or {}))


class _WaitingOperators(TorchDispatchMode):
    """Operators whose result's shape or value the host has to know, wherever they are called from."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING_OPERATORS or by_mask:
            self._found[f"aten::{name}"] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    from deepspeed.accelerator import get_accelerator

    found: Counter[str] = Counter()

    def synchronize(*_: object) -> None:
        found["synchronize"] += 1

    patch.setattr(get_accelerator(), "synchronize", synchronize)
    with _Reads(found), _WaitingOperators(found):
        yield found


def waits(case: dict[str, Any], world_size: int) -> dict[str, int]:
    """Return what the last step waited for."""
    config = PretrainConfig.model_validate(
        {
            "image": {"size": 32, "spacing_mm": 2.0},
            "model": {"channels": (4, 4, 8, 8, 8), "feature_channels": 6, "head_channels": 8, "embedding_channels": 6},
            "views": "pix2rep_v2",
            "steps": STEPS,
            "global_batch": 4,
            **case,
            "loss": {"pixel_pairs_per_image": 20, **case.get("loss", {})},
        }
    )
    engine = build_engine(Pix2Rep(config.model), config, world_size=world_size)
    batch = noise_batch(config.image, config.global_batch // world_size)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ranks", "tiles"):
            patch.setattr(f"p2r.loss.{module}.is_waited_for", lambda device: True)
        for _ in range(STEPS - 1):
            take_step(engine, batch, config=config, learning_rate=1e-3)
        with counted(patch) as found:
            take_step(engine, batch, config=config, learning_rate=1e-3)
    engine.destroy()
    return dict(found)


def run_rank(rank: int, folder: str) -> None:
    Path(folder, f"{rank}.json").write_text(json.dumps({name: waits(case, 2) for name, case in CASES.items()}))


@pytest.fixture(scope="module")
def of_worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[dict[str, int]]]:
    """A function that returns, of each rank, what the last step of a case waited for."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = start_ranks(2, folder, run_rank, str(folder))
    join_process_group(torch.device("cpu"))
    alone = {name: [waits(case, 1)] for name, case in CASES.items()}
    join_ranks(ranks)
    of_two = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return lambda world_size, case: alone[case] if world_size == 1 else [of_rank[case] for of_rank in of_two]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_waits_for_nothing(
    of_worlds: Callable[[int, str], list[dict[str, int]]], world_size: int, case: str
) -> None:
    assert of_worlds(world_size, case) == [{}] * world_size


def test_what_would_wait_is_counted() -> None:
    join_process_group(torch.device("cpu"))
    from deepspeed.accelerator import get_accelerator

    values = torch.arange(3.0)
    with pytest.MonkeyPatch.context() as patch, counted(patch) as found:
        get_accelerator().synchronize()
        float(values[0])
        values.tolist()
        values[values > 1]
        values.numpy()
        torch.stack([values, values]).nonzero()
    assert found.keys() >= {
        "synchronize",
        "tolist",
        "numpy",
        "aten::_local_scalar_dense",
        "aten::index",
        "aten::nonzero",
    }
