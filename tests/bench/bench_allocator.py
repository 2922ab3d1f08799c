"""Cost of returning freed memory to the system: CPU time of a training step on the CPU, with and without `p2r.allocator`.

    python tests/bench/bench_allocator.py                                    # a few minutes of one core
    python tests/bench/bench_allocator.py --width 4 --size 32 --batch 2 --rounds 1 --json rows.json

A step is the network's forward pass over a batch and its backward pass; the gradients of both contenders must be equal. The setting
holds for a whole process, so every turn is a process of its own, pinned to one core with one thread. The first two steps do not count.
CPU time of the process is measured, not the clock, so that other programs do not count. Ratios are medians of the rounds' ratios.
"""

import argparse
import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from rounds import cpu_name, pin_to_one_core, ratios, resident_mib, spread, take_turns

from p2r.allocator import keep_freed_memory
from p2r.config import ModelConfig
from p2r.model.backbones import build_backbone

CONTENDERS = ("returned to the system", "kept")


def measure(name: str, *, width: int, size: int, batch: int, steps: int) -> dict[str, float]:
    """Return user and system CPU time per step, s, this process's peak memory, MiB, and a sum of the gradients."""
    pin_to_one_core()
    torch.set_num_threads(1)
    if name == "kept" and not keep_freed_memory():
        sys.exit("this C library has no mallopt: there is nothing to compare")
    torch.manual_seed(0)
    channels = tuple(width * 2**level for level in range(5))
    network = build_backbone(ModelConfig(name="unet", channels=channels, feature_channels=2 * width), dimensions=2)
    images = torch.rand(batch, 1, size, size)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        network(images).square().mean().backward()

    step()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    gradients = [weight.grad.double().sum().item() for weight in network.parameters() if weight.grad is not None]
    return {
        "user": (after.ru_utime - before.ru_utime) / steps,
        "system": (after.ru_stime - before.ru_stime) / steps,
        "peak_mib": resident_mib("VmHWM"),
        "gradients": sum(gradients),
    }


def in_new_process(name: str, *, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure a contender in a process of its own."""
    sizes = [f"--{key}={getattr(arguments, key)}" for key in ("width", "size", "batch", "steps")]
    command = [sys.executable, __file__, "--contender", name, *sizes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def rows_of(measured: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Summarise the rounds of each contender; `ratio` is to memory returned to the system, of CPU time."""
    if len({turn["gradients"] for turns in measured.values() for turn in turns}) != 1:
        sys.exit("the gradients differ between the contenders")
    total = {name: [turn["user"] + turn["system"] for turn in turns] for name, turns in measured.items()}
    return [
        {
            "contender": name,
            "user_s": spread([turn["user"] for turn in turns]),
            "system_s": spread([turn["system"] for turn in turns]),
            "peak_mib": spread([turn["peak_mib"] for turn in turns]),
            "ratio": ratios(total[name], total[CONTENDERS[0]]),
        }
        for name, turns in measured.items()
    ]


def main() -> None:
    """Print a table, and write its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of the first level")
    parser.add_argument("--size", type=int, default=160, help="edge of the images, pixels")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--contender", choices=CONTENDERS, help="measure one in this process (used by the benchmark itself)"
    )
    arguments = parser.parse_args()
    if arguments.contender:
        sizes = {key: getattr(arguments, key) for key in ("width", "size", "batch", "steps")}
        print(json.dumps(measure(arguments.contender, **sizes)))
        return
    turns = {name: partial(in_new_process, name, arguments=arguments) for name in CONTENDERS}
    rows = rows_of(take_turns(turns, rounds=arguments.rounds))
    table = Table(title=f"A training step on the CPU: {cpu_name()}, torch {torch.__version__}, one thread")
    for column in (
        "freed memory is",
        "user, s a step",
        "system, s a step",
        "CPU time, ratio",
        "quartiles",
        "peak, MiB",
    ):
        table.add_column(column, justify="left" if column.startswith("freed") else "right")
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["contender"],
            f"{row['user_s']['median']:.3f}",
            f"{row['system_s']['median']:.3f}",
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            f"{row['peak_mib']['median']:,.0f}",
        )
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpu": cpu_name(), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
