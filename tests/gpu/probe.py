"""Ten minutes on a borrowed GPU: everything about this code that only a GPU can tell, most valuable first.

    python -m tests.gpu.probe [--minutes 9] [--device cuda|cpu] [--out FILE] [--parts machine,kernels,...]

Every part is a process of its own with its own limit. Each fact is a line of JSON, written as soon as it is known; a table of
all facts ends the run. It needs the repository, torch, Triton and the core's libraries; DeepSpeed for the parts `engine` and
`deterministic`; neither a network nor Ray. On a CPU the same parts run on tiny sizes, with kernels in Triton's interpreter.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Fact = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a part computes with."""

    device: torch.device
    is_gpu: bool

    def pick(self, on_gpu: Any, on_cpu: Any) -> Any:
        """Return the first on a GPU, the second on a CPU."""
        return on_gpu if self.is_gpu else on_cpu


def seconds(work: Callable[[], object], sizes: Sizes, *, repeats: int) -> float:
    """Return the median time of some work, after one run that warms up."""
    times = []
    for _ in range(repeats + 1):
        if sizes.is_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if sizes.is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]


def machine(sizes: Sizes) -> Iterator[Fact]:
    """Versions, and the ceilings of this card: products and copies."""
    versions = {}
    for name in ("torch", "triton", "deepspeed"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    name = torch.cuda.get_device_name() if sizes.is_gpu else "cpu"
    yield {"name": name, "python": sys.version.split()[0], **versions}
    side = sizes.pick(8192, 128)
    a, b = (torch.randn(side, side, device=sizes.device).to(torch.bfloat16) for _ in range(2))
    yield {"tflop_per_s": 2 * side**3 / seconds(lambda: a @ b, sizes, repeats=20) / 1e12, "side": side}
    block = torch.zeros(sizes.pick(2**30, 2**20), dtype=torch.uint8, device=sizes.device)
    yield {"copy_gib_per_s": 2 * len(block) / seconds(block.clone, sizes, repeats=10) / 2**30}


def _rows(num: int, first: int, channels: int, dtype: torch.dtype, masks: str, device: torch.device, seed: int) -> Any:
    from p2r.loss.tiles import Rows

    generator = torch.Generator().manual_seed(seed)
    values = torch.nn.functional.normalize(torch.randn(num, channels, generator=generator), dim=1).to(dtype)
    image = torch.arange(num) // 40 + 3 if masks != "none" else None
    position_mm = 20 * torch.rand(num, 2, generator=generator) if masks == "radius" else None
    present = (torch.rand(num, generator=generator) < 0.8).to(torch.uint8) if masks == "image" else None
    parts: dict[str, Any] = {"values": values, "image": image, "position_mm": position_mm, "present": present}
    weight = torch.rand(num, generator=generator)
    on_device: dict[str, Any] = {name: None if part is None else part.to(device) for name, part in parts.items()}
    return Rows(
        first=first,
        weight=weight.to(device),
        **on_device,
    )


def kernels(sizes: Sizes) -> Iterator[Fact]:
    """Values of the kernels against float64, and two runs against one another."""
    from p2r.loss import kernels as ours
    from p2r.loss import tiles
    from p2r.loss.tiles import Scale

    dtype = sizes.pick(torch.bfloat16, torch.float32)
    for channels in sizes.pick((64, 128, 256), (16,)):
        for num, others, first in sizes.pick(((300, 257, 0), (129, 300, 100), (4096, 20_000, 0)), ((70, 150, 0),)):
            for masks in ("none", "image", "radius"):
                a = _rows(num, first, channels, dtype, masks, sizes.device, 1)
                b = _rows(others, 0, channels, dtype, masks, sizes.device, 2)
                scale = Scale(10.0, 8.0 if masks == "radius" else math.inf, 3.0)
                exact = [
                    dataclasses.replace(rows, values=rows.values.double(), weight=rows.weight.double())
                    for rows in (a, b)
                ]

                def run(module: Any, pair: Any, scale: Scale = scale) -> list[torch.Tensor]:
                    over_a, over_b = module.sums(*pair, scale, of_columns=True)
                    return [over_a, over_b.sum(0), *module.push(*pair, scale, to_candidates=True)]

                found, again, expected = run(ours, (a, b)), run(ours, (a, b)), run(tiles, exact)
                errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
                yield {
                    "case": f"{num} x {others} from {first}, E {channels}, {masks}",
                    "error": max(errors),
                    "is_right": max(errors) < sizes.pick(5e-3, 1e-5),
                    "is_repeatable": all(map(torch.equal, found, again)),
                }


def loss(sizes: Sizes) -> Iterator[Fact]:
    """Time and memory of the whole loss, forward and backward."""
    from p2r.loss import info_nce

    for num in sizes.pick((16_384, 65_536, 1_048_576), (256,)):
        for form in ("cross_view", "nt_xent") if num < 10**6 else ("cross_view",):
            a, b = (
                torch.randn(num, 128, device=sizes.device)
                .to(sizes.pick(torch.bfloat16, torch.float32))
                .requires_grad_()
                for _ in range(2)
            )
            if sizes.is_gpu:
                torch.cuda.reset_peak_memory_stats()

            def step(a: Any = a, b: Any = b, form: Any = form) -> None:
                torch.autograd.grad(info_nce(a, b, temperature=0.1, form=form), (a, b))

            took = seconds(step, sizes, repeats=10 if num < 10**6 else 1)
            operations = {"cross_view": 10, "nt_xent": 22}[form] * num**2 * 128
            memory = torch.cuda.max_memory_allocated() / 2**20 if sizes.is_gpu else None
            yield {"N": num, "form": form, "ms": 1e3 * took, "tflop_per_s": operations / took / 1e12, "mib": memory}


def tiles_of_kernels(sizes: Sizes) -> Iterator[Fact]:
    """Time of each kernel alone, by tile."""
    from p2r.loss import kernels as ours
    from p2r.loss.tiles import Scale

    num, dtype = sizes.pick(65_536, 130), sizes.pick(torch.bfloat16, torch.float32)
    channels = sizes.pick(128, 16)
    rows = _rows(num, 0, channels, dtype, "none", sizes.device, 1)
    shapes = ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3))
    chosen = ours._choose_tile
    for shape in sizes.pick(shapes, shapes[-1:]):
        for name in ("sums", "push"):

            def run(name: str = name) -> None:
                if name == "sums":
                    ours.sums(rows, rows, Scale(10.0), of_columns=True)
                else:
                    ours.push(rows, rows, Scale(10.0))

            ours._choose_tile = lambda table, anchors, shape=shape: ours._Tile(*shape)  # type: ignore[misc]
            try:
                yield {"kernel": name, "tile": shape, "ms": 1e3 * seconds(run, sizes, repeats=sizes.pick(10, 1))}
            except Exception as error:  # the others are still wanted
                yield {"kernel": name, "tile": shape, "error": f"{type(error).__name__}: {error}"[:200]}
            finally:
                ours._choose_tile = chosen


def _trained(sizes: Sizes, *, deterministic: bool, images: int, num_steps: int) -> Iterator[tuple[float, Any, Any]]:
    """Yield seconds, loss and config of steps of the real engine, whose batches come through `feed`."""
    from p2r.config import PretrainConfig
    from p2r.data.stream import StreamState
    from p2r.engine.build import build_engine, join_process_group
    from p2r.engine.determinism import deterministic as only_deterministic
    from p2r.engine.feed import feed
    from p2r.engine.step import take_step
    from p2r.model.pix2rep import Pix2Rep
    from p2r.planning.tune_batch import noise_batch

    config = PretrainConfig.model_validate(
        {
            "image": {"size": sizes.pick(192, 32)},
            "model": sizes.pick({}, {"channels": (4, 4, 8, 8, 8), "feature_channels": 4, "embedding_channels": 8}),
            "loss": {"pixel_pairs_per_image": sizes.pick(256, 16), "form": "cross_view"},
            "views": "pix2rep_v2",
            "steps": num_steps,
            "global_batch": images,
            "precision": "bf16",
            "deterministic": deterministic,
        }
    )
    with only_deterministic(deterministic):
        join_process_group(sizes.device)
        torch.manual_seed(0)
        engine = build_engine(Pix2Rep(config.model).to(sizes.device), config, world_size=1)
        state = StreamState(corpora=(), seed=0, global_batch=images)
        batches = feed(((noise_batch(config.image, images), state) for _ in range(num_steps)), sizes.device)
        for number, (batch, _) in enumerate(batches):
            if sizes.is_gpu and number == 5 and not deterministic:
                torch.cuda.set_sync_debug_mode("error")
            began = time.perf_counter()
            taken = take_step(engine, batch, config=config, learning_rate=1e-3)
            yield time.perf_counter() - began, taken.loss, config
        if sizes.is_gpu:
            torch.cuda.set_sync_debug_mode("default")
        engine.destroy()


def engine(sizes: Sizes) -> Iterator[Fact]:
    """Steps of the real engine: that none waits (from step 6 on, one that does is an error), their rate, memory beside the plan."""
    from p2r.planning.memory import count_step

    images, num_steps = sizes.pick(64, 2), sizes.pick(36, 3)
    began, losses = 0.0, []
    for number, taken in enumerate(_trained(sizes, deterministic=False, images=images, num_steps=num_steps)):
        _, value, config = taken
        began = time.perf_counter() if number == num_steps // 6 else began
        losses.append(value)
    is_finite = all(math.isfinite(float(value)) for value in losses)  # waits for the device
    timed = num_steps - 1 - num_steps // 6
    yield {"images_per_s": images * timed / (time.perf_counter() - began), "is_right": is_finite}
    planned = max(moment.total for moment in count_step(config, world_size=1, device=sizes.device.type).memory)
    measured = torch.cuda.max_memory_allocated() if sizes.is_gpu else None
    yield {"planned_mib": planned / 2**20, "measured_mib": None if measured is None else measured / 2**20}


def deterministic(sizes: Sizes) -> Iterator[Fact]:
    """Three steps, twice, with `deterministic`: equal to the bit."""
    runs = [
        [float(value) for _, value, _ in _trained(sizes, deterministic=True, images=2, num_steps=3)] for _ in range(2)
    ]
    yield {"losses": runs[0], "is_right": runs[0] == runs[1]}


def draws(sizes: Sizes) -> Iterator[Fact]:
    """Random bits and points of the device, which are those of a CPU."""
    import numpy as np

    from p2r.device import random_bits
    from p2r.loss import corresponding_points
    from p2r.randomness import keyed_generator

    keys = np.arange(4, dtype=np.uint64) * 7919
    yield {
        "bits": True,
        "is_right": torch.equal(random_bits(keys, 999), random_bits(keys, 999, device=sizes.device).cpu()),
    }
    size = 24
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(size))] * 2, indexing="ij"), -1)[None].repeat(2, 1, 1, 1)
    valid = torch.rand(2, size, size, generator=torch.Generator().manual_seed(0)) < 0.5
    of_devices = [
        corresponding_points(
            grid.to(device),
            valid.to(device),
            num_points=64,
            generators=[keyed_generator(0, "points", place) for place in range(2)],
        ).b.cpu()
        for device in (torch.device("cpu"), sizes.device)
    ]
    yield {"points": True, "is_right": torch.equal(*of_devices)}


PARTS: dict[str, tuple[Callable[[Sizes], Iterator[Fact]], int]] = {
    "machine": (machine, 30),
    "kernels": (kernels, 120),
    "loss": (loss, 90),
    "engine": (engine, 120),
    "tiles": (tiles_of_kernels, 120),
    "draws": (draws, 30),
    "deterministic": (deterministic, 90),
}
"""By name, most valuable first, with the most seconds that each may take."""


def run_part(name: str, device: str, out: Path) -> None:
    """Print the facts of one part, a line of JSON each, and append them to a file at once."""
    sizes = Sizes(torch.device(device), device == "cuda")
    with out.open("a") as file:
        for fact in PARTS[name][0](sizes):
            line = json.dumps({"part": name, **fact})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


def main() -> int:
    """Run all parts; return 1 if a fact is wrong or a part has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("probe.jsonl"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--one", choices=tuple(PARTS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        run_part(asked.one, asked.device, asked.out)
        return 0
    end = time.monotonic() + 60 * asked.minutes
    facts: list[Fact] = []
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if asked.device == "cpu" else {})}
    for name in asked.parts.split(","):
        limit = min(PARTS[name][1] if asked.device == "cuda" else 300, end - time.monotonic())
        command = [sys.executable, "-m", "tests.gpu.probe", "--device", asked.device, "--out", str(asked.out)]
        facts += _facts_of([*command, "--one", name], name, limit, environment, asked.out)
    for fact in facts:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in fact.items()
            )
        )
    return int(
        any(fact.get("is_right") is False or fact.get("is_repeatable") is False or "failed" in fact for fact in facts)
    )


def _facts_of(command: list[str], name: str, limit: float, environment: dict[str, str], out: Path) -> list[Fact]:
    """Run a part and return its facts; the last one says that it failed or took too long, if it did."""
    text, failed = "", "no time was left"
    if limit > 0:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
            text, failed = done.stdout, f"exit {done.returncode}: {done.stderr[-800:]}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            failed = f"took more than {limit:.0f} s"
    facts = [json.loads(line) for line in text.splitlines() if line.startswith('{"part"') and line.endswith("}")]
    if failed:
        facts.append({"part": name, "failed": failed})
        with out.open("a") as file:
            file.write(json.dumps(facts[-1]) + "\n")
    return facts


if __name__ == "__main__":
    raise SystemExit(main())
