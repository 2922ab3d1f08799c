"""What more ranks bring: images a second, efficiency and bytes over the network of our step on 1, 2 and 4 processes.

    python tests/bench/bench_scaling.py                                      # CPU ranks with one thread each, by gloo
    python tests/bench/bench_scaling.py --device cuda --ranks 1 2 4 8        # one GPU each, by NCCL
    python tests/bench/bench_scaling.py --json scaling.json --picture scaling.png

Strong scaling: the ranks share one global batch, so the step stays the same. Weak scaling: every rank has the batch that a
rank of the largest group has in strong scaling. So pixel pairs, and each rank's share of the loss, grow with the ranks.
Batches lie in memory; what shards cost is measured by `bench_end_to_end.py`. Numbers of ranks that have no GPU each are
left out, with the reason.

Efficiency is images a second over those of one rank times the ranks. Where there are fewer cores than ranks they take
turns on them: `over cores` divides by what there is. All groups of processes live at the same time, and take turns, so
that a slow minute of the machine falls on all of them; who has no turn sleeps.

Bytes are those that a rank must send in a step at least, counted from the tensors that torch.distributed is given. An
all-gather of n bytes sends n to each of the W - 1 others, a reduction to all sends 2 n (W - 1) / W, one to each part
n (W - 1) / W. Embeddings are what the loss exchanges (all-gather of both towers, and its sums), gradients what DeepSpeed
reduces, weights what ZeRO gathers after the update.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[2]))
from charts import PART_COLOURS
from rounds import cpu_name, ratios, spread, take_turns
from training import (
    Setting,
    Steps,
    Turn,
    add_options,
    add_variant,
    batch_of,
    engine_of,
    passes_over,
    setting_of,
    steps_over,
    turn,
    voxels_in_memory,
)

from p2r.config import PretrainConfig
from p2r.engine.build import join_process_group
from p2r.report.canvas import FAINT, INK, headline, new_figure, to_png

KINDS = ("strong", "weak")
TRAFFIC = ("embeddings", "gradients", "weights")
UNCOUNTED = 1
START_LIMIT_S = 300.0


class Traffic(TorchDispatchMode):
    """Counts, while entered, the bytes that this rank must send at least, by what they are."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self._world_size, self.num_bytes = world_size, Counter[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "c10d" and (sent := self._sent(operation, args)):
            self.num_bytes[self._what(operation)] += sent
        return operation(*args, **(kwargs or {}))

    def _sent(self, operation: Any, args: Sequence[Any]) -> int:
        """Return the bytes to send of a collective; signatures begin with outputs, then inputs, or have both in one."""
        name, others = operation.__name__.partition(".")[0], self._world_size - 1
        if name not in BYTES_SENT:
            raise RuntimeError(f"no rule says what c10d.{name} sends: add it to BYTES_SENT in {Path(__file__).name}")
        place, share = BYTES_SENT[name]
        tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor)]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return round(num_bytes * (share(self._world_size) if others else 0))

    @staticmethod
    def _what(operation: Any) -> str:
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_globals.get("__name__", "").startswith("p2r.loss"):
                return "embeddings"
        return "weights" if "gather" in operation.__name__ else "gradients"


BYTES_SENT: dict[str, tuple[int, Callable[[int], float]]] = {
    "allreduce_": (0, lambda ranks: 2 * (ranks - 1) / ranks),
    "allreduce_coalesced_": (0, lambda ranks: 2 * (ranks - 1) / ranks),
    "reduce_": (0, lambda ranks: (ranks - 1) / ranks),
    "broadcast_": (0, lambda ranks: (ranks - 1) / ranks),
    "allgather_": (1, lambda ranks: ranks - 1),
    "_allgather_base_": (1, lambda ranks: ranks - 1),
    "allgather_coalesced_": (1, lambda ranks: ranks - 1),
    "allgather_into_tensor_coalesced_": (1, lambda ranks: ranks - 1),
    "reduce_scatter_": (1, lambda ranks: (ranks - 1) / ranks),
    "_reduce_scatter_base_": (1, lambda ranks: (ranks - 1) / ranks),
    "reduce_scatter_tensor_coalesced_": (1, lambda ranks: (ranks - 1) / ranks),
    "alltoall_base_": (1, lambda ranks: (ranks - 1) / ranks),
    "alltoall_": (1, lambda ranks: (ranks - 1) / ranks),
    "send": (0, lambda ranks: 1),
    "recv_": (0, lambda ranks: 0),
    "barrier": (0, lambda ranks: 0),
}
"""Operation -> which argument is sent, and how many times its bytes on this many ranks."""


def serve(
    rank: int, world_size: int, setting: Setting, configs: Mapping[str, PretrainConfig], folder: str, pipe: Connection
) -> None:
    """Be a rank of a group: answer requests for a turn, or for the bytes of a step, until there are no more."""
    # DeepSpeed's, in every process.
    warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor` is deprecated")
    try:
        os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
        device = setting.device
        if device.type == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous-{world_size}",
            rank=rank,
            world_size=world_size,
        )
        join_process_group(device)
        running = {
            kind: steps_of(replace(setting, device=device), config, rank=rank, world_size=world_size)
            for kind, config in configs.items()
        }
        for steps in running.values():
            next(steps)  # compiles and warms up
        pipe.send({"ready": True})
        while (request := pipe.recv()) is not None:
            kind, num_steps = request
            config, steps = configs[kind], running[kind]
            dist.barrier()
            if num_steps:
                one = turn(
                    partial(islice_of, steps, UNCOUNTED + num_steps),
                    num_steps=num_steps,
                    num_uncounted=UNCOUNTED,
                    batch=config.global_batch,
                    device=device,
                )
                pipe.send(asdict(one))
            else:
                with Traffic(world_size) as traffic:
                    next(steps)
                pipe.send(dict(traffic.num_bytes))
        dist.destroy_process_group()
    except BaseException as error:
        pipe.send({"error": f"rank {rank} of {world_size}: {type(error).__name__}: {error}\n{traceback.format_exc()}"})
        raise


def steps_of(setting: Setting, config: PretrainConfig, *, rank: int, world_size: int) -> Steps:
    """Take this rank's steps: its images are a part of those of the global batch."""
    own = config.global_batch // world_size
    engine = engine_of(config, setting.device, world_size=world_size)
    voxels = voxels_in_memory(setting, num_images=config.global_batch)[rank * own :][:own]
    batch = batch_of(voxels, config=config, first=rank * own, pin=setting.device.type == "cuda")
    return steps_over(engine, passes_over([batch]), config)


def islice_of(steps: Steps, num_steps: int) -> Steps:
    """Give some of the steps of a generator that goes on afterwards."""
    yield from islice(steps, num_steps)


class Group:
    """Processes of one world size, from the side of who gives them turns."""

    def __init__(self, world_size: int, setting: Setting, configs: Mapping[str, PretrainConfig], folder: Path) -> None:
        self.configs = configs
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = spawn.Pipe()
            arguments = (rank, world_size, setting, configs, str(folder), there)
            process = spawn.Process(target=serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def wait_until_ready(self) -> None:
        """Return when every rank has taken its first steps."""
        self._answers()

    def ask(self, kind: str, num_steps: int) -> list[dict[str, Any]]:
        """Let all ranks take a turn, or without steps one whose bytes are counted; return what they answer."""
        for pipe in self._pipes:
            pipe.send((kind, num_steps))
        return self._answers()

    def turn(self, kind: str, num_steps: int) -> Turn:
        """Return a turn of all ranks together, as the slowest of them saw it."""
        return min((Turn(**answer) for answer in self.ask(kind, num_steps)), key=lambda one: one.images_per_s)

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(START_LIMIT_S):
                raise RuntimeError(f"a rank of {len(self._pipes)} has not answered for {START_LIMIT_S:.0f} s")
            answers.append(pipe.recv())
            if "error" in answers[-1]:
                raise RuntimeError(answers[-1]["error"])
        return answers

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(30)
            if process.is_alive():
                process.kill()


def cases(setting: Setting, options: argparse.Namespace, ranks: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield numbers of ranks with their settings in strong and in weak scaling."""
    largest = max(ranks)
    for world_size in ranks:
        batches = {"strong": setting.batch, "weak": setting.batch // largest * world_size}
        yield (
            world_size,
            {
                kind: setting.config(precision=options.precision, compile=options.compile, global_batch=batch)
                for kind, batch in batches.items()
            },
        )


def measure(
    setting: Setting, options: argparse.Namespace, ranks: Sequence[int], *, num_devices: int
) -> list[dict[str, Any]]:
    """Measure all numbers of ranks, strong and weak."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="p2r-bench-") as folder, contextlib.ExitStack() as stack:
        groups: dict[int, Group] = {}
        for world_size, configs in cases(setting, options, ranks):
            groups[world_size] = Group(world_size, setting, configs, Path(folder))
            stack.callback(groups[world_size].close)
        for group in groups.values():
            group.wait_until_ready()
        every = [(kind, world_size) for kind in KINDS for world_size in ranks]
        contenders = {
            f"{kind}, {world_size} ranks": partial(groups[world_size].turn, kind, options.steps)
            for kind, world_size in every
        }
        turns = take_turns(contenders, rounds=options.rounds).values()
        rates = {case: [one.images_per_s for one in of_case] for case, of_case in zip(every, turns, strict=True)}
        for kind, world_size in every:
            sent = groups[world_size].ask(kind, 0)[0]  # equal shares, so equal on every rank
            fewest, of_fewest = min(ranks), rates[kind, min(ranks)]
            per_rank = [world_size * rate / fewest for rate in of_fewest]
            per_device = [min(world_size, num_devices) * rate / min(fewest, num_devices) for rate in of_fewest]
            rows[kind, world_size] = {
                "kind": kind,
                "ranks": world_size,
                "global_batch": groups[world_size].configs[kind].global_batch,
                "images_per_s": spread(rates[kind, world_size]),
                "of_rounds": rates[kind, world_size],
                "efficiency": ratios(rates[kind, world_size], per_rank),
                "over_devices": ratios(rates[kind, world_size], per_device),
                "bytes_per_step": {name: sent.get(name, 0) for name in TRAFFIC},
            }
    return list(rows.values())


def table(rows: list[dict[str, Any]], device: str) -> Table:
    columns = ("ranks", "global batch", "images/s", "quartiles", "efficiency, %", f"over {device}s, %")
    result = Table("scaling", *columns, *(f"{name}, KiB" for name in TRAFFIC))
    for row in rows:
        head = [row["kind"], str(row["ranks"]), str(row["global_batch"])]
        if "skipped" in row:
            result.add_row(*head, f"[dim]{row['skipped']}[/dim]")
            continue
        per_s = row["images_per_s"]
        result.add_row(
            *head,
            f"{per_s['median']:,.1f}",
            f"{per_s['low']:,.1f} to {per_s['high']:,.1f}",
            f"{100 * row['efficiency']['median']:.0f}",
            f"{100 * row['over_devices']['median']:.0f}",
            *(f"{row['bytes_per_step'][name] / 1024:,.1f}" for name in TRAFFIC),
        )
    return result


def picture(rows: list[dict[str, Any]], subtitle: str, num_devices: int, device: str) -> bytes:
    """Images a second against ranks beside what they would be at best; and the bytes of a step."""
    measured = [row for row in rows if "skipped" not in row]
    figure = new_figure(11.0, 4.4)
    headline(figure, "Our step on more ranks", subtitle)
    for place, kind in enumerate(KINDS):
        axes = figure.add_axes((0.06 + 0.33 * place, 0.13, 0.25, 0.62))
        of_kind = [row for row in measured if row["kind"] == kind]
        ranks = [row["ranks"] for row in of_kind]
        values = [row["images_per_s"] for row in of_kind]
        first = values[0]["median"] / ranks[0]
        best = [first * min(count, num_devices) for count in ranks]
        axes.plot(ranks, best, color=FAINT, linestyle="--", linewidth=1.2, label=f"one rank's rate per {device}")
        axes.plot(ranks, [value["median"] for value in values], color="#0072b2", marker="o", linewidth=2, label="p2r")
        axes.vlines(ranks, [v["low"] for v in values], [v["high"] for v in values], color=INK, linewidth=1.2)
        axes.set_title(f"{kind} scaling, images a second", loc="left", fontsize=10, color=INK)
        axes.set(xlabel="ranks", ylim=(0, None))
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.legend(frameon=False, fontsize=8.5, loc="lower right")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        _finish(axes)
    axes = figure.add_axes((0.74, 0.13, 0.24, 0.62))
    labels = [f"{row['kind']}, {row['ranks']}" for row in measured]
    left = [0.0] * len(measured)
    for name, colour in zip(TRAFFIC, (PART_COLOURS[4], PART_COLOURS[2], PART_COLOURS[0]), strict=True):
        sent = [row["bytes_per_step"][name] / 2**20 for row in measured]
        axes.barh(range(len(measured)), sent, left=left, height=0.68, color=colour, label=name)
        left = [start + more for start, more in zip(left, sent, strict=True)]
    axes.set_yticks(range(len(measured)), labels)
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.set_xlabel("MiB")
    axes.set_title("sent by a rank in a step", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8.5)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    _finish(axes)
    return to_png(figure)


def _finish(axes: Any) -> None:
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK, length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=5, steps=6)
    add_variant(parser)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes, the fewest first"
    )
    options = parser.parse_args()
    setting = setting_of(options)
    gpu = setting.device.type == "cuda"
    num_devices = torch.cuda.device_count() if gpu else len(os.sched_getaffinity(0))
    ranks = [count for count in sorted(options.ranks) if not gpu or count <= num_devices]
    if not ranks or any(setting.batch % count for count in ranks):
        parser.error(
            f"--batch {setting.batch} must be divisible by all of --ranks, and the fewest must have a GPU each"
        )
    rows = measure(setting, options, ranks, num_devices=num_devices)
    for count in options.ranks:
        if count not in ranks:
            reason = f"needs {count} GPUs, here {'is' if num_devices == 1 else 'are'} {num_devices}"
            rows += [{"kind": kind, "ranks": count, "global_batch": "", "skipped": reason} for kind in KINDS]
    name = torch.cuda.get_device_name() if gpu else cpu_name()
    device = "GPU" if gpu else "core"
    how = f"{options.precision}{', compiled' if options.compile else ''}, {'NCCL' if gpu else 'gloo'}"
    where = f"{num_devices} {device if num_devices == 1 else device + 's'} of {name}"
    console = Console(width=150)
    console.print(table(rows, device))
    console.print(f"strong scaling: {setting}; {how}; {where}; torch {torch.__version__}")
    if options.json:
        found = {"device": name, "num_devices": num_devices, "setting": str(setting), "variant": how, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1))
    if options.picture:
        options.picture.write_bytes(picture(rows, f"{setting}; {how}; {where}", num_devices, device))


if __name__ == "__main__":
    main()
