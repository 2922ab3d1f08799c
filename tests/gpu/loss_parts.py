"""Parts of the probe that need only torch, Triton and the loss: the card, kernels, peers, draws, views."""

import csv
import dataclasses
import importlib.metadata
import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from tests.gpu.sizes import Fact, Sizes, seconds


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
    return Rows(first=first, weight=weight.to(device), **on_device)


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


def peers(sizes: Sizes) -> Iterator[Fact]:
    """The loss beside other implementations, by turns: time, memory, error."""
    from bench_loss import PEERS, matmul_rate, measure

    dtype = sizes.pick(torch.bfloat16, torch.float32)
    rate = matmul_rate(dtype, sizes.device, size=sizes.pick(8192, 256))
    only = ["naive torch", "torch, checkpointed blocks", "p2r, torch tiles", *PEERS]
    for num in sizes.pick((16_384, 65_536), (256,)):
        rows = measure(num, sizes.pick(128, 16), 0.1, dtype, sizes.device, sizes.pick(3, 1), rate, only)
        keys = ("seconds", "times_ours", "extra_mib", "gradient_error", "tflops", "runs_agree", "skipped")
        for row in rows:
            yield {"contender": row["contender"], "N": num, **{key: row[key] for key in keys if key in row}}


def precisions(sizes: Sizes) -> Iterator[Fact]:
    """Time of the loss of float32 rows, by the kernels as TF32 and by torch's tiles."""
    from p2r.loss import info_nce

    num = sizes.pick(16_384, 256)
    rows = [torch.randn(num, sizes.pick(128, 32), device=sizes.device, requires_grad=True) for _ in range(2)]

    def step() -> None:
        torch.autograd.grad(info_nce(rows[0], rows[1], temperature=0.1), rows)

    for precision in ("high", "highest"):
        torch.set_float32_matmul_precision(precision)
        yield {"N": num, "precision": precision, "ms": 1e3 * seconds(step, sizes, repeats=sizes.pick(5, 1))}


_TILES = {
    128: (
        *((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
        *((128, 128, 8, 3, True), (128, 64, 4, 3, True)),
    ),
    512: ((64, 32, 8, 2, True), (64, 64, 8, 2, True), (64, 64, 8, 2)),
}
"""Tiles to compare, by channels; True: `push` loads candidates by descriptor."""


def tiles_of_kernels(sizes: Sizes) -> Iterator[Fact]:
    """Time of each kernel by itself, for several tiles."""
    from p2r.loss import kernel_tiles
    from p2r.loss import kernels as ours
    from p2r.loss.tiles import Scale

    num, dtype = sizes.pick(65_536, 130), sizes.pick(torch.bfloat16, torch.float32)
    chosen = kernel_tiles.choose_tile
    for channels, shapes in sizes.pick(_TILES, {16: ((64, 64, 4, 3), (64, 64, 4, 3, True))}).items():
        rows = _rows(num, 0, channels, dtype, "none", sizes.device, 1)
        for shape, name in itertools.product(shapes, ("sums", "push")):

            def run(name: str = name, rows: Any = rows) -> None:
                if name == "sums":
                    ours.sums(rows, rows, Scale(10.0), of_columns=True)
                else:
                    ours.push(rows, rows, Scale(10.0))

            case = {"kernel": name, "channels": channels, "tile": shape}
            kernel_tiles.choose_tile = lambda table, anchors, shape=shape: kernel_tiles.Tile(*shape)  # type: ignore[misc]
            try:
                yield {**case, "ms": 1e3 * seconds(run, sizes, repeats=sizes.pick(10, 1))}
            except Exception as error:  # the others are still wanted
                yield {**case, "error": f"{type(error).__name__}: {error}"[:200]}
            finally:
                kernel_tiles.choose_tile = chosen


def tools(sizes: Sizes) -> Iterator[Fact]:
    """Counters of the kernels by ncu, and memory errors by compute-sanitizer, if these tools are installed."""
    module = [sys.executable, "-m", "tests.gpu.probe", "--device", sizes.device.type]
    commands = {
        "ncu": [
            *("--clock-control", "none", "--csv", "--kernel-name", "regex:_kernel", "--launch-count", "4"),
            *("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats"),
        ],
        "compute-sanitizer": ["--tool", "memcheck"],
    }
    for tool, options in commands.items():
        if shutil.which(tool) is None:
            yield {"tool": tool, "skipped": "not on the PATH"}
            continue
        done = subprocess.run([tool, *options, *module, "--one", "launches"], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('"') or "ERROR SUMMARY" in line]
        for row in csv.DictReader(line for line in lines if line.startswith('"')):
            yield {"tool": tool, "kernel": row.get("Kernel Name"), row.get("Metric Name", "?"): row.get("Metric Value")}
        yield {"tool": tool, "exit": done.returncode, "said": (lines or done.stderr.splitlines() or [""])[-1][-200:]}


def launches(sizes: Sizes) -> Iterator[Fact]:
    """Launch each kernel twice, for `tools`."""
    from p2r.loss import kernels as ours
    from p2r.loss.tiles import Scale

    num = sizes.pick(16_384, 130)
    dtype, channels = sizes.pick((torch.bfloat16, 128), (torch.float32, 16))
    rows = _rows(num, 0, channels, dtype, "none", sizes.device, 1)
    for _ in range(2):
        ours.sums(rows, rows, Scale(10.0), of_columns=True)
        ours.push(rows, rows, Scale(10.0))
    if sizes.is_gpu:
        torch.cuda.synchronize()
    yield {"launched": num}


def draws(sizes: Sizes) -> Iterator[Fact]:
    """Random bits and points of the device; they equal the CPU's."""
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


def views(sizes: Sizes) -> Iterator[Fact]:
    """Largest difference between views made on the device and on a CPU, in 2D and 3D."""
    import numpy as np

    from p2r.config import ViewsConfig
    from p2r.views.pair import make_views

    for dimensions, size in ((2, sizes.pick(96, 24)), (3, sizes.pick(32, 12))):
        shape = [size] * dimensions
        image = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
        of_cpu, of_device = (
            make_views(
                image.to(device),
                torch.ones(2, *shape, dtype=torch.bool, device=device),
                config=ViewsConfig.model_validate("pix2rep_v2"),
                spacing_mm=1.0,
                seed=0,
                epochs=np.zeros(2, dtype=np.int64),
                positions=np.arange(2, dtype=np.int64),
            )
            for device in (torch.device("cpu"), sizes.device)
        )
        for name in ("a", "b", "warp"):
            one, other = getattr(of_cpu, name), getattr(of_device, name).cpu()
            yield {"dimensions": dimensions, "of": name, "difference": float((one - other).abs().max())}
        agree = (of_cpu.valid == of_device.valid.cpu()).float().mean()
        yield {
            "dimensions": dimensions,
            "of": "valid",
            "share_that_agrees": float(agree),
            "is_right": bool(agree > 0.999),
        }
