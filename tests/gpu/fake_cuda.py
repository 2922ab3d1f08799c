"""Training steps on CUDA tensors that have shapes and no memory, in a torch without CUDA.

    python -m tests.gpu.fake_cuda < cases.json

Every tensor knows its device, shape and dtype, and nothing else. A step that reads a value of its device therefore fails,
operands on different devices are an error, and copies for which the host would wait are counted. A step of 64 workers on images
of full size takes seconds. DeepSpeed needs a real device and is replaced by a plain engine; `tests/p2r/engine/test_no_waiting.py`
runs DeepSpeed on a CPU. Kernels are not launched; the arguments of each launch are checked.

Cases are a JSON list of {"name", "config": section `pretrain`, "world_size", "rank", "steps"}; each gives a line of JSON.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock


def build(folder: Path) -> Path:
    """Compile the device into a folder, unless it is there; return the library's path."""
    found = find_spec("torch")
    assert found is not None and found.submodule_search_locations is not None
    torch_folder = Path(found.submodule_search_locations[0])
    library = folder / "fake_device.so"
    if not library.exists():
        source = Path(__file__).with_name("fake_device.cpp")
        lib = torch_folder / "lib"
        linked = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
        command = [
            "g++",
            "-O0",
            "-shared",
            "-fPIC",
            "-std=c++20",
            str(source),
            f"-I{torch_folder / 'include'}",
            *linked,
        ]
        subprocess.run([*command, "-o", library], check=True, timeout=300)
    return library


def run_cases(cases: list[dict[str, Any]], folder: Path, *, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Run cases in a process of its own, into which the device is loaded; return their facts by name."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.fake_cuda"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "P2R_FAKE_DEVICE": str(build(folder))},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {fact["name"]: fact for fact in map(json.loads, done.stdout.splitlines())}


def main() -> int:
    """Run the cases on stdin."""
    ctypes.CDLL(os.environ["P2R_FAKE_DEVICE"])  # before torch, which asks once which devices there are
    for case in json.load(sys.stdin):
        began = time.monotonic()
        facts = steps_of(case)
        print(json.dumps({"name": case["name"], **facts, "seconds": time.monotonic() - began}), flush=True)
    return 0


def steps_of(case: dict[str, Any]) -> dict[str, Any]:
    """Take the steps of one case; return copies that wait, the kernels' launches, and the operators."""
    import torch

    from p2r.config import PretrainConfig
    from p2r.engine.step import take_step
    from p2r.planning.tune_batch import noise_batch

    config = PretrainConfig.model_validate(case["config"])
    world_size = case["world_size"]
    batch = noise_batch(config.image, config.global_batch // world_size)
    waits: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    operators: set[str] = set()
    with _group(case["rank"], world_size), _fake(waits, launches, operators) as device:
        engine = _PlainEngine(config, world_size=world_size, device=device)
        waits.clear()  # of building it
        operators.clear()
        for _ in range(case["steps"]):
            taken = take_step(engine, batch, config=config, learning_rate=1e-3, aligns=True)
        assert engine.num_updates == case["steps"]
        assert taken.loss.device == device and taken.loss.shape == torch.Size([])
        assert all(weight.grad is None for weight in engine.module.parameters())
    return {"waits": dict(waits), "launches": dict(launches), "operators": sorted(operators)}


class _PlainEngine:
    """The part of an engine at ZeRO stage 0 that a step uses."""

    mean_weights = None

    def __init__(self, config: Any, *, world_size: int, device: Any) -> None:
        import torch

        from p2r.engine.build import DTYPES
        from p2r.model.pix2rep import Pix2Rep

        learnt = config.loss.temperature if config.loss.learn_temperature else None
        usual = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[config.precision])
        try:
            with device:
                self.module = Pix2Rep(config.model, dimensions=config.image.dimensions, learnt_temperature=learnt)
        finally:
            torch.set_default_dtype(usual)
        self.device = device
        self.optimizer = torch.optim.AdamW(self.module.parameters(), fused=True)
        self.num_updates, self._calls = 0, 0
        images = config.global_batch // world_size
        self._accumulated = images // (config.micro_batch or images)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def zero_optimization_stage(self) -> int:
        return 0

    def backward(self, loss: Any) -> None:
        (loss / self._accumulated).backward()

    def step(self) -> None:
        self._calls += 1
        if self._calls % self._accumulated == 0:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.num_updates += 1


@contextmanager
def _group(rank: int, world_size: int) -> Iterator[None]:
    """Join a process group of one process, whose collectives give the shapes of all ranks."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _fake(waits: Counter[str], launches: Counter[str], operators: set[str]) -> Iterator[Any]:
    """Make tensors fake, count copies that wait, and replace functions that a build without CUDA lacks."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from p2r.loss import kernel_tiles, kernels

    class Launch:
        def __init__(self, name: str) -> None:
            self._name, self._num = name, len(getattr(kernels, f"_{name}_kernel").arg_names)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert 1 <= len(grid) <= 2 and grid[0] > 0 and 0 < grid[-1] <= 65_535

            def launch(*arguments: Any, **options: Any) -> None:
                of_device = [value for value in arguments if isinstance(value, torch.Tensor)]
                assert all(value.is_cuda and value.is_contiguous() for value in of_device)
                compiled_in = len(set(options) - {"num_warps", "num_stages"})
                assert len(arguments) + compiled_in == self._num
                launches[self._name] += 1

            return launch

    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.add(id(tensor))
        kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []  # keeps the ids of pinned tensors from being used again
    state = torch.zeros(16, dtype=torch.uint8)
    with ExitStack() as stack:
        for place, name, value in (
            (kernels, "_sums_kernel", Launch("sums")),
            (kernels, "_push_kernel", Launch("push")),
            (kernel_tiles, "shared_limit", lambda device: 232_448),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "get_rng_state", lambda *_: state),
            (torch.cuda, "set_rng_state", lambda *_: None),
            (torch.Tensor, "pin_memory", pin),
            (torch.Tensor, "is_pinned", lambda tensor: id(tensor) in pinned),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_copies(waits, operators, pinned))
        yield torch.device("cuda", 0)


def _copies(waits: Counter[str], operators: set[str], pinned: set[int]) -> Any:
    """Return a mode that counts copies between host and device for which the host waits."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            of_floats = name.startswith("cumsum") and args[0].is_floating_point()
            operators.add(f"{name} of floating point" if of_floats else name)
            if name in ("_to_copy", "copy_"):
                source = args[0] if name == "_to_copy" else args[1]
                if isinstance(source, torch.Tensor) and source.is_cuda != result.is_cuda:
                    is_ahead = (kwargs or {}).get("non_blocking") or (name == "copy_" and args[2:] == (True,))
                    if source.is_cuda or not is_ahead or id(source) not in pinned:
                        waits[f"{name} of {tuple(source.shape)}"] += 1
            return result

    return Copies()


if __name__ == "__main__":
    sys.exit(main())
