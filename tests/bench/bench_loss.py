"""What the pixel-pair loss costs beside other implementations: time, memory, error, side by side in one run.

    python tests/bench/bench_loss.py                                         # this machine: the GPU if there is one
    python tests/bench/bench_loss.py --num 4096 16384 65536 --channels 128 --json rows.json --picture loss.png

Contenders take turns, so that a slow minute of the machine falls on all of them; times are medians over the rounds. Peers
that are not installed or cannot run here are named with the reason. `pip install -e '.[bench]'` brings those that need
nothing but torch; open_clip's and lightly's losses are measured too where these packages are installed.

FLOP are counted as 10 N^2 E for every contender (one product forward, four backward: the least without atomic additions).
So its rate says how long a contender takes, not how busy it is. Gradient errors are relative, against float64, over both towers.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from p2r.loss import backends, info_nce, tiles

Loss = Callable[[Tensor, Tensor], Tensor]
OURS = "p2r"
MATRICES_OF_NAIVE = 5
"""N x N float32 that a naive loss holds at once."""


def naive(queries: Tensor, keys: Tensor, *, temperature: float) -> Tensor:
    """The textbook: one matrix of all similarities, cross entropy along both sides."""
    scores = queries.float() @ keys.float().T / temperature
    index = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(scores, index) + F.cross_entropy(scores.T, index)) / 2


def checkpointed(queries: Tensor, keys: Tensor, *, temperature: float, block: int = 1024) -> Tensor:
    """What torch's own parts give: blocks of rows, computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    def of_block(rows: Tensor, others: Tensor, start: int) -> Tensor:
        scores = rows.float() @ others.float().T / temperature
        index = torch.arange(start, start + len(rows), device=rows.device)
        return F.cross_entropy(scores, index, reduction="sum")

    total = queries.new_zeros((), dtype=torch.float32)
    for one, other in ((queries, keys), (keys, queries)):
        for start in range(0, len(one), block):
            total = total + checkpoint(of_block, one[start : start + block], other, start, use_reentrant=False)
    return total / (2 * len(queries))


def file_of_package(package: str, path: str) -> ModuleType:
    """Load one file of an installed package, without what the whole package would import."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("not installed")
    file = Path(spec.submodule_search_locations[0], path)
    spec = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contenders(temperature: float, device: torch.device, channels: int) -> Iterator[tuple[str, Loss | str]]:
    """Yield names and losses of normalised towers, or why one is not measured."""
    yield OURS, lambda q, k: info_nce(q, k, temperature=temperature)
    yield "naive torch", lambda q, k: naive(q, k, temperature=temperature)
    compiled = torch.compile(naive, dynamic=False)
    yield "naive, torch.compile", lambda q, k: compiled(q, k, temperature=temperature)
    yield "torch, checkpointed blocks", lambda q, k: checkpointed(q, k, temperature=temperature)
    if device.type == "cuda":
        yield "p2r, torch tiles", lambda q, k: in_tiles(q, k, temperature)
    for name, make in PEERS.items():
        try:
            yield name, make(temperature, device, channels)
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}".splitlines()[0]


def in_tiles(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Run our loss by its torch tiles where it would take the kernels."""
    choose, backends.choose_backend = backends.choose_backend, lambda rows: tiles
    try:
        return info_nce(queries, keys, temperature=temperature)
    finally:
        backends.choose_backend = choose


def memeff(temperature: float, device: torch.device, channels: int) -> Loss:
    needs_cuda(device)
    from memeff.clip_loss import MemoryEfficientCLIPLoss

    # Its default would rescale the gradient.
    return MemoryEfficientCLIPLoss(temperature=temperature, normalized_inputs=True, stable=False)


def inf_cl(temperature: float, device: torch.device, channels: int) -> Loss:
    needs_cuda(device)
    from inf_cl import cal_flash_loss

    def loss(q: Tensor, k: Tensor) -> Tensor:
        one, other = (cal_flash_loss(*pair, scale=1 / temperature, head_dim=channels) for pair in ((q, k), (k, q)))
        return (one.mean() + other.mean()) / 2

    return loss


def cut_cross_entropy(temperature: float, device: torch.device, channels: int) -> Loss:
    needs_cuda(device)
    from cut_cross_entropy import linear_cross_entropy

    def loss(q: Tensor, k: Tensor) -> Tensor:
        index = torch.arange(len(q), device=q.device)
        # filter_eps=None: the default leaves out small gradients, of which a contrastive loss is made.
        one, other = (
            linear_cross_entropy(a / temperature, b, index, filter_eps=None, impl="cce") for a, b in ((q, k), (k, q))
        )
        return (one + other) / 2

    return loss


def open_clip(temperature: float, device: torch.device, channels: int) -> Loss:
    loss = file_of_package("open_clip", "loss.py").ClipLoss()
    scale = torch.tensor(1 / temperature, device=device)
    return lambda q, k: loss(q.float(), k.float(), scale)


def lightly(temperature: float, device: torch.device, channels: int) -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=temperature)  # the 2N form: four times the entries
    return lambda q, k: loss(q.float(), k.float())


def needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError("needs a CUDA device")


PEERS: dict[str, Callable[[float, torch.device, int], Loss]] = {
    "memeff": memeff,
    "Inf-CL": inf_cl,
    "cut-cross-entropy, unfiltered": cut_cross_entropy,
    "open_clip": open_clip,
    "lightly NT-Xent (2N)": lightly,
}


class Memory:
    """Peak memory of a block of code above what it found, bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.extra = device, math.nan

    def __enter__(self) -> "Memory":
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, and counts again when it is used
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
            self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        after = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else self._status("VmHWM")
        self.extra = after - self._before

    @staticmethod
    def _status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return 1024 * int(line.split()[1])


def towers(num: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit rows whose partners agree about as well as half-way through a training."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(num, channels, generator=generator)
    keys = queries + torch.randn(num, channels, generator=generator)
    one, other = (F.normalize(rows, dim=1).to(device, dtype).requires_grad_() for rows in (queries, keys))
    return one, other


def timed(loss: Loss, queries: Tensor, keys: Tensor) -> tuple[float, float, tuple[Tensor, ...]]:
    """Seconds of the forward and of the backward pass, and the gradients."""

    def now() -> float:
        if queries.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    value = loss(queries, keys)
    middle = now()
    gradients = torch.autograd.grad(value, (queries, keys))
    return middle - began, now() - middle, gradients


def error(gradients: tuple[Tensor, ...], exact: tuple[Tensor, ...], towers: tuple[Tensor, ...]) -> float:
    """Relative, over both towers, along the sphere: ours normalises inside, and has no other part."""
    along = [
        ours.double() - rows * (ours.double() * rows).sum(1, keepdim=True)
        for ours, rows in zip(gradients, (tower.detach().double() for tower in towers), strict=True)
    ]
    difference = sum(float((ours - theirs).square().sum()) for ours, theirs in zip(along, exact, strict=True))
    return math.sqrt(difference / sum(float(theirs.square().sum()) for theirs in exact))


def matmul_rate(dtype: torch.dtype, device: torch.device, *, size: int | None = None) -> float:
    """FLOP/s of a large product in this dtype: what can be reached at most by what is made of products."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[2:])


def available_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


def measure(
    num: int,
    channels: int,
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    rate: float,
    only: list[str] | None,
) -> list[dict[str, Any]]:
    """Measure every contender at one size."""
    queries, keys = towers(num, channels, dtype, device)
    exact = None
    if num <= 16384:  # float64 on all pairs takes long beyond
        doubles = [rows.detach().double().requires_grad_() for rows in (queries, keys)]
        exact = torch.autograd.grad(exactly(doubles[0], doubles[1], temperature), doubles)
    rows: list[dict[str, Any]] = []
    running: dict[str, tuple[Loss, dict[str, Any]]] = {}
    for name, loss in contenders(temperature, device, channels):
        if only is not None and name not in (OURS, *only):
            continue
        row: dict[str, Any] = {"contender": name, "num": num, "channels": channels, "temperature": temperature}
        row |= {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
        rows.append(row)
        quadratic = name.startswith(("naive", "open_clip", "lightly"))
        needed = MATRICES_OF_NAIVE * 4 * num**2 * (4 if name.startswith("lightly") else 1)
        if isinstance(loss, str):
            row["skipped"] = loss
        elif quadratic and needed > 0.8 * available_memory(device):
            row["skipped"] = f"would need about {needed / 2**30:.0f} GiB"
        else:
            try:
                timed(loss, queries, keys)  # compiles and warms up
                with Memory(device) as memory:
                    first = timed(loss, queries, keys)[2]
                second = timed(loss, queries, keys)[2]
            except Exception as reason:
                row["skipped"] = f"{type(reason).__name__}: {reason}".splitlines()[0][:120]
                continue
            row["extra_mib"] = memory.extra / 2**20
            row["runs_agree"] = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
            if exact is not None and not name.startswith("lightly"):
                row["gradient_error"] = error(first, exact, (queries, keys))
            del first, second
            running[name] = (loss, row)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for turn in range(rounds):
        for name, (loss, _) in running.items():
            times[name].append(timed(loss, queries, keys)[:2])
            progress(f"N {num}, round {turn + 1} of {rounds}, {name}: {sum(times[name][-1]):.3f} s")
    for name, (_, row) in running.items():
        row["forward_s"], row["backward_s"] = (statistics.median(part) for part in zip(*times[name], strict=True))
        row["seconds"] = statistics.median(map(sum, times[name]))
        ratios = [sum(theirs) / sum(ours) for theirs, ours in zip(times[name], times[OURS], strict=True)]
        row["times_ours"] = statistics.median(ratios)
        row["tflops"] = 10 * num**2 * channels / row["seconds"] / 1e12
        row["of_matmul_rate"] = row["tflops"] * 1e12 / rate
    return rows


class _Reference(torch.autograd.Function):
    """The reference, for float64: explicit gradients, in blocks of rows; W = P_rows + P_columns - 2 I."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, temperature: float) -> Tensor:
        of_rows = torch.cat([(rows @ k.T / temperature).logsumexp(1) for rows in q.split(1024)])
        of_columns = torch.cat([(rows @ q.T / temperature).logsumexp(1) for rows in k.split(1024)])
        ctx.save_for_backward(q, k, of_rows, of_columns)
        ctx.temperature = temperature
        positive = (q * k).sum(1) / temperature
        return (of_rows + of_columns - 2 * positive).mean() / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, of_rows, of_columns = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k)
        for start in range(0, len(q), 1024):
            rows = slice(start, start + 1024)
            scores = q[rows] @ k.T / ctx.temperature
            weight = (scores - of_rows[rows, None]).exp() + (scores - of_columns).exp()
            index = torch.arange(len(weight), device=q.device)
            weight[index, start + index] -= 2
            grad_q[rows] = weight @ k
            grad_k += weight.T @ q[rows]
        scale = gradient / (2 * len(q) * ctx.temperature)
        return grad_q * scale, grad_k * scale, None


def exactly(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    unit = [F.normalize(rows, dim=1) for rows in (queries, keys)]
    loss: Tensor = _Reference.apply(*unit, temperature)
    return loss


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(
        "contender",
        "N",
        "E",
        "forward",
        "backward",
        "both",
        "x ours",
        "extra MiB",
        "gradient error",
        "twice",
        "% of matmul",
    )
    for row in rows:
        head = [row["contender"], f"{row['num']:,}", str(row["channels"])]
        if "skipped" in row:
            result.add_row(*head, f"[dim]{row['skipped']}[/dim]")
            continue
        times = [f"{1e3 * row[key]:.1f} ms" for key in ("forward_s", "backward_s", "seconds")]
        gradient_error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""
        same = "same" if row["runs_agree"] else "differs"
        result.add_row(
            *head,
            *times,
            f"{row['times_ours']:.2f}",
            f"{row['extra_mib']:.0f}",
            gradient_error,
            same,
            f"{100 * row['of_matmul_rate']:.0f}",
        )
    return result


def picture(rows: list[dict[str, Any]], rate: float, device: str, file: Path) -> None:
    """Time and memory against N, on logarithmic axes, with the time that the products alone would take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    measured = [row for row in rows if "skipped" not in row]
    for name in dict.fromkeys(row["contender"] for row in measured):
        of_name = [row for row in measured if row["contender"] == name]
        style = {"marker": "o", "linewidth": 2.5 if name == OURS else 1.2, "zorder": 3 if name == OURS else 2}
        num = [row["num"] for row in of_name]
        left.plot(num, [row["seconds"] for row in of_name], label=name, **style)
        right.plot(num, [max(row["extra_mib"], 0.1) for row in of_name], label=name, **style)
    sizes = sorted({row["num"] for row in measured})
    channels = rows[0]["channels"]
    # A CPU can serve both directions by one product in the backward pass; a GPU would have to add atomically.
    products = 8 if device == "cpu" else 10
    left.plot(sizes, [products * n**2 * channels / rate for n in sizes], "k--", label=f"products alone, {products} N²E")
    right.plot(sizes, [4 * 4 * n * channels / 2**20 for n in sizes], "k--", label="two towers and their gradients")
    for axes, what in ((left, "forward and backward, seconds"), (right, "memory above the inputs, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="pixel pairs N", ylabel=what)
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"Symmetric InfoNCE, E = {channels}, {first['dtype']}, temperature {first['temperature']}", x=0.01, ha="left"
    )
    figure.savefig(file, dpi=110)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num", type=int, nargs="+", default=[4096, 16384, 65536] if cuda else [2048, 4096, 8192, 16384]
    )
    parser.add_argument("--channels", type=int, default=128, help="E")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders to measure; ours always is")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rate = matmul_rate(dtype, device)
    rows = []
    for num in options.num:
        rows += measure(num, options.channels, options.temperature, dtype, device, options.rounds, rate, options.only)
    console = Console(width=170)
    console.print(table(rows))
    name = torch.cuda.get_device_name() if cuda and device.type == "cuda" else "CPU"
    console.print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, matmul {rate / 1e12:.2f} TFLOP/s in {options.dtype}"
    )
    if options.json:
        options.json.write_text(json.dumps({"device": name, "matmul_flops": rate, "rows": rows}, indent=1))
    if options.picture:
        picture(rows, rate, device.type, options.picture)


if __name__ == "__main__":
    main()
