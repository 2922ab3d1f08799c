"""Between reports, a step neither synchronises with its device nor reads from it; and `deterministic` has what it needs.

The steps are real, DeepSpeed's included. The CPU plays the part of a device that works on its own. Every call that would
make the host wait for a GPU is counted, and every operator is compared with those for which CUDA has no deterministic
implementation.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
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
from p2r.engine.peers import refuse_mixed_gpus
from p2r.engine.step import take_step
from p2r.errors import InputError
from p2r.model.pix2rep import Pix2Rep
from p2r.planning.tune_batch import noise_batch
from tests.gpu.operators import not_deterministic
from tests.ranks import join_ranks, start_ranks

MODEL = {"channels": (4, 4, 8, 8, 8), "feature_channels": 6, "head_channels": 8, "embedding_channels": 6}
STEPS = 3  # DeepSpeed's timer would synchronise from the third on
CASES: dict[str, dict[str, Any]] = {
    "cross_view": {"loss": {"form": "cross_view"}},
    "nt_xent": {"loss": {"form": "nt_xent", "exclude_within_mm": 6.0, "foreground_share": 0.5}},
    "barlow_twins": {"loss": {"name": "barlow_twins"}},
    "micro-batches": {"micro_batch": 1},
    "within images": {"loss": {"negatives": "image"}},
    "within images, micro-batches": {"loss": {"negatives": "image"}, "micro_batch": 1},
    "bf16": {"precision": "bf16", "zero_stage": 2},
    "learnt temperature": {"loss": {"learn_temperature": True}},
    "learnt temperature, ring, micro-batches": {
        "loss": {"learn_temperature": True, "exchange": "ring", "form": "nt_xent"},
        "micro_batch": 1,
    },
    "zero 3": {"loss": {"learn_temperature": True, "negatives": "image"}, "zero_stage": 3},
    "coarser level": {"model": {"level": 1}},
    "reconstruction": {"loss": {"reconstruction": {"block_mm": 8}}, "micro_batch": 1},
    "unet": {"model": {"name": "unet", "channels": (4, 8, 8)}},
    "dynunet": {"model": {"name": "dynunet", "channels": (4, 8, 8)}},
    "swin_unetr": {"image": {"size": 64}, "model": {"name": "swin_unetr", "channels": (12, 24, 48, 96, 192)}},
    "3D": {"image": {"dimensions": 3, "size": 16}, "model": {"name": "unet", "channels": (4, 8, 8)}},
    "3D basic_unet": {"image": {"dimensions": 3, "size": 32}, "loss": {"name": "barlow_twins"}},
}
READS = {"tolist", "item", "__bool__", "__float__", "__int__", "__index__", "nonzero", "unique"}
"""Calls that read; `numpy` is not among them, for it fails on a GPU's tensors instead of waiting."""
WAITING_OPERATORS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
COPIES = {"tensor", "as_tensor", "new_tensor", "from_numpy"}
"""Make tensors of the host's numbers; on a GPU without waiting only in `p2r.device`, through pinned memory."""


class _Reads(TorchFunctionMode):
    """Calls from Python that read a tensor, or that make one of the host's numbers."""

    def __init__(self, found: Counter[str], of_host: list[Tensor]) -> None:
        super().__init__()
        self._found, self._of_host = found, {id(tensor) for tensor in of_host}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS and not (args and id(args[0]) in self._of_host):
            self._found[name] += 1
        if name in COPIES and (caller := sys._getframe(1).f_code.co_filename).split("/")[-1] != "device.py":
            self._found[f"{name} in {caller}"] += 1
        return function(*args, **(kwargs or {}))


class _WaitingOperators(TorchDispatchMode):
    """Operators whose result's shape or value the host has to know, wherever they are called from."""

    def __init__(self, found: Counter[str], operators: set[str]) -> None:
        super().__init__()
        self._found, self._operators = found, operators

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        is_floating = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
        self._operators.add(f"{name} of floating point" if name.startswith("cumsum") and is_floating else name)
        by_mask = name in ("index", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING_OPERATORS or by_mask:
            self._found[f"aten::{name}"] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(
    patch: pytest.MonkeyPatch, *, of_host: list[Tensor] | None = None, operators: set[str] | None = None
) -> Iterator[Counter[str]]:
    from deepspeed.accelerator import get_accelerator

    found: Counter[str] = Counter()

    def synchronize(*_: object) -> None:
        found["synchronize"] += 1

    patch.setattr(get_accelerator(), "synchronize", synchronize)
    with _Reads(found, of_host or []), _WaitingOperators(found, set() if operators is None else operators):
        yield found


def waits(case: dict[str, Any], world_size: int) -> tuple[dict[str, int], list[str]]:
    """Return what the last step waited for, and the operators that it called."""
    config = PretrainConfig.model_validate(
        {
            "views": "pix2rep_v2",
            "steps": STEPS,
            "global_batch": 4,
            **case,
            "image": {"size": 32, "spacing_mm": 2.0, **case.get("image", {})},
            "model": {**MODEL, **case.get("model", {})},
            "loss": {"pixel_pairs_per_image": 20, **case.get("loss", {})},
        }
    )
    engine = build_engine(Pix2Rep.of(config), config, world_size=world_size)
    batch = noise_batch(config.image, config.global_batch // world_size)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ranks", "tiles"):
            patch.setattr(f"p2r.loss.{module}.is_waited_for", lambda device: True)
        for _ in range(STEPS - 1):
            take_step(engine, batch, config=config, learning_rate=1e-3)
        operators: set[str] = set()
        host = [group.index for group in batch.groups]  # patches are placed by the host
        with counted(patch, of_host=host, operators=operators) as found:
            take_step(engine, batch, config=config, learning_rate=1e-3)
    engine.destroy()
    return dict(found), sorted(operators)


def run_rank(rank: int, folder: str) -> None:
    found = {name: waits(case, 2) for name, case in CASES.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps({**found, "mixed": refusal_of_mixed_gpus(rank)}))


def refusal_of_mixed_gpus(rank: int) -> str:
    """Return what a rank says to a group of two kinds of GPUs, having said nothing to one of one kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        refuse_mixed_gpus(torch.device("cuda", 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: ("NVIDIA H200", "NVIDIA L4")[rank])
        try:
            refuse_mixed_gpus(torch.device("cuda", 0))
        except InputError as error:
            return str(error)
    return ""


Waits = dict[tuple[int, str], list[Any]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Waits:
    """By number of ranks and case, what the last step of each rank waited for, and its operators."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = start_ranks(2, folder, run_rank, str(folder))
    join_process_group(torch.device("cpu"))
    alone = {(1, name): [waits(case, 1)] for name, case in CASES.items()}
    join_ranks(ranks)
    of_two = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return alone | {(2, name): [of_rank[name] for of_rank in of_two] for name in (*CASES, "mixed")}


@pytest.mark.parametrize("case", [case for case in CASES if case != "zero 3"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_waits_for_nothing(steps: Waits, world_size: int, case: str) -> None:
    assert [found for found, _ in steps[world_size, case]] == [{}] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeed_alone_waits_at_zero_stage_3_and_once(steps: Waits, world_size: int) -> None:
    for found, _ in steps[world_size, "zero 3"]:
        assert found.pop("aten::_local_scalar_dense") == found.pop("__bool__") == 1  # is the norm finite?
        assert found == {name: count for name, count in found.items() if "deepspeed" in name}


@pytest.mark.parametrize("case", CASES)
def test_every_operator_of_a_step_has_a_deterministic_implementation_on_cuda(steps: Waits, case: str) -> None:
    for world_size in (1, 2):
        for _, operators in steps[world_size, case]:
            assert len(operators) > 50
            assert not_deterministic(operators) == []


def test_every_rank_refuses_a_group_of_two_kinds_of_gpus_by_name(steps: Waits) -> None:
    assert steps[2, "mixed"] == 2 * [
        "the workers of a run must have GPUs of one kind, got NVIDIA H200 on rank 0; NVIDIA L4 on rank 1: "
        "run the job on nodes with one kind of GPU"
    ]


def test_what_would_wait_is_counted() -> None:
    join_process_group(torch.device("cpu"))
    from deepspeed.accelerator import get_accelerator

    values = torch.arange(3.0)
    with pytest.MonkeyPatch.context() as patch, counted(patch) as found:
        get_accelerator().synchronize()
        float(values[0])
        values.tolist()
        values[values > 1]
        torch.tensor([1.0])
        torch.stack([values, values]).nonzero()
    assert found.keys() >= {
        "synchronize",
        "tolist",
        "aten::_local_scalar_dense",
        "aten::index",
        "aten::nonzero",
    }
