"""What a step of pretraining costs beside a plain loop in the manner of the published code: side by side in one run.

    python tests/bench/bench_step.py                                         # this machine: the GPU if there is one
    python tests/bench/bench_step.py --size 128 --batch 16 --pairs 256 --json step.json --picture step.png

Ours is the product's own step: integers in memory -> images, two views, points, one pass of the network over both views,
loss, backward, update, by `p2r.engine`. The published manner is written after the code that Pix2Rep's authors released:
TorchIO's intensity transforms per sample in a torch DataLoader, in its workers or, as released, without any. One affine
warp on the device; projection head (1x1 convolutions, batch norm) and warp over whole maps; every pixel normalised, then
some sampled. The 2N x 2N matrix, its mask and cross entropy (NT-Xent); fp32, nothing compiled, AdamW, the loss read in
every step. Images in memory, network, widths of the head, batch, number of pairs and ranges of the transforms are equal.
Without TorchIO in the loop (views are the image itself) it says what TorchIO costs. `--views p2r` draws more of ours.

Contenders take turns, so that a slow minute of the machine falls on all of them. Ratios are medians of the rounds' ratios,
and those to the published manner are to the faster of its loops. Steps that would still profit from what was made ahead
do not count. A slower contender takes fewer steps in a turn, so that turns last about as long. Peak memory is this
process's, above what the contender holds between its steps (weights, gradients, state of the optimizer). Parts are timed
in further steps in which the device is waited for after each part; `loss` is both of its passes. `% of matmul` is the
rate of the backbone's own products over the whole step, as a share of a large product's rate in the faster of fp32 and
bf16. The backbone goes forward three times, for two views. Other computation counts as time only.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench_loss import Memory, matmul_rate
from bench_views import torchio_appearance
from charts import OTHERS_COLOUR, OURS_COLOUR, bars, shares
from rounds import cpu_name, progress, ratios, spread, take_turns
from training import (
    FIRST,
    FULL_SCALE,
    LEARNING_RATE,
    OURS,
    SPACING_MM,
    VARIANTS,
    Setting,
    Steps,
    add_options,
    batch_of,
    engine_of,
    passes_over,
    setting_of,
    steps_over,
    turn,
    voxels_in_memory,
    wait_for,
)

import p2r.engine.step
from p2r.config import GeometryConfig, PretrainConfig
from p2r.data.batch import Batch
from p2r.engine.build import DTYPES, join_process_group
from p2r.model.backbones import build_backbone, cost_of
from p2r.report.canvas import headline, new_figure, to_png

PUBLISHED, UNAUGMENTED = "published manner", "published manner, without TorchIO"
BATCHES = 4
"""Different batches in memory."""
UNCOUNTED = 1
AHEAD = 2
"""Batches that a worker of a DataLoader makes ahead."""
PARTS = ("input", "views", "points", "forward", "loss", "backward", "optimizer", "other")


class Ours:
    """Our step, in one variant."""

    def __init__(self, setting: Setting, changes: dict[str, Any]) -> None:
        self.setting, self.config = setting, setting.config(**changes)
        self.engine = engine_of(self.config, setting.device)
        voxels = voxels_in_memory(setting, num_images=BATCHES * setting.batch)
        pin = setting.device.type == "cuda"
        self._batches = passes_over(
            [
                batch_of(part, config=self.config, first=number * setting.batch, pin=pin)
                for number, part in enumerate(voxels.split(setting.batch))
            ]
        )

    def start(self) -> Steps:
        """Go on."""
        return steps_over(self.engine, self._batches, self.config)

    num_uncounted = UNCOUNTED

    def parts(self, num_steps: int, *, pairs: int | None = None) -> dict[str, float]:
        """Measure the parts of a step as shares of it, and its seconds as `seconds`, perhaps with other pairs per image."""
        config = self.config
        if pairs is not None:
            config = config.model_copy(update={"loss": config.loss.model_copy(update={"pixel_pairs_per_image": pairs})})
        steps = steps_over(self.engine, self._batches, config)
        next(steps)  # of its shapes
        with Parts(self.engine, self.setting.device) as parts:
            began = parts.now()
            for _ in islice(steps, num_steps):
                pass
            seconds = parts.now() - began
        found = {name: parts.seconds.get(name, 0.0) / seconds for name in PARTS[:-1]}
        return {**found, "other": 1 - sum(found.values()), "seconds": seconds / num_steps}


class Parts(contextlib.ExitStack):
    """Clocks around the parts of our step, while this is entered."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self._engine, self._device = engine, device
        self._backward_began = self._loss_ended = math.nan

    def now(self) -> float:
        """Return the time at which the device has done what it was given."""
        wait_for(self._device)
        return time.perf_counter()

    def __enter__(self) -> "Parts":
        super().__enter__()
        step, engine = p2r.engine.step, self._engine
        for owner, attribute, name in (
            (Batch, "images", "input"),
            (step, "make_views", "views"),
            (step, "corresponding_points", "points"),
            (step, "pixel_pair_loss", "loss"),
            (engine, "step", "optimizer"),
        ):
            self.enter_context(
                mock.patch.object(owner, attribute, self._timed(getattr(owner, attribute), name, owner is Batch))
            )
        self.enter_context(mock.patch.object(engine, "backward", self._timed_backward(engine.backward)))
        hooks = (
            engine.module.register_forward_pre_hook(self._forward_begins),
            engine.module.register_forward_hook(self._forward_ends),
        )
        for hook in hooks:
            self.callback(hook.remove)
        return self

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _timed(self, function: Callable[..., Any], name: str, is_method: bool) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self._add(name, self.now() - began)

        # A plain function in a class is bound to its instances, as what it stands for.
        return timed if is_method else partial(timed)

    def _forward_begins(self, module: nn.Module, inputs: Any) -> None:
        self._forward_began = self.now()

    def _forward_ends(self, module: nn.Module, inputs: Any, towers: tuple[Tensor, Tensor]) -> None:
        self._add("forward", self.now() - self._forward_began)
        if all(tower.requires_grad for tower in towers):
            for tower in towers:
                tower.register_hook(self._loss_has_ended)

    def _loss_has_ended(self, gradient: Tensor) -> None:
        self._loss_ended = self.now()

    def _timed_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = self._loss_ended = self.now()
            result = backward(*arguments, **options)
            self._add("loss", self._loss_ended - began)
            self._add("backward", self.now() - self._loss_ended)
            return result

        return timed


class InMemory(Dataset[tuple[Tensor, Tensor]]):
    """Two views of an image in memory, by transforms of one sample."""

    def __init__(self, images: Tensor, appear: Callable[[Any], Any] | None) -> None:
        self._images, self._appear = images, appear

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._images[index]
        if self._appear is None:
            return image, image
        volume = image[..., None] if image.ndim == 3 else image  # (1, X, Y, Z)
        first, second = (self._appear(volume).reshape(image.shape) for _ in range(2))
        return first, second


class Published:
    """A plain loop in the manner of the published code."""

    def __init__(self, setting: Setting, *, num_workers: int, augments: bool) -> None:
        self.setting, self.config = setting, setting.config(**FIRST)
        self.num_uncounted = AHEAD * num_workers + UNCOUNTED
        self._num_workers = num_workers
        voxels = voxels_in_memory(setting, num_images=BATCHES * setting.batch)
        appear = torchio_appearance(self.config.views.intensity) if augments else None
        self._dataset = InMemory(voxels[:, None].float() / FULL_SCALE, appear)
        torch.manual_seed(0)
        model = self.config.model
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if setting.dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self._network = nn.Sequential(
            build_backbone(model, dimensions=setting.dimensions),
            conv(model.feature_channels, model.head_channels, 1),
            norm(model.head_channels),
            nn.ReLU(),
            conv(model.head_channels, model.embedding_channels, 1),
        ).to(setting.device)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=LEARNING_RATE)

    def start(self) -> Steps:
        """Begin with a new pass of a DataLoader, whose workers end with the turn."""
        sampler = RandomSampler(self._dataset, replacement=True, num_samples=10**9)
        workers: dict[str, Any] = {"prefetch_factor": AHEAD} if self._num_workers else {}
        loader = DataLoader(
            self._dataset, self.setting.batch, sampler=sampler, num_workers=self._num_workers, **workers
        )
        for view_1, view_2 in loader:
            yield self._step(view_1.to(self.setting.device), view_2.to(self.setting.device))

    def _step(self, view_1: Tensor, view_2: Tensor) -> float:
        setting, loss_config = self.setting, self.config.loss
        theta = random_affines(setting, self.config.views.geometry).to(setting.device)
        grid = F.affine_grid(theta, list(view_2.shape), align_corners=True)
        view_2 = F.grid_sample(view_2, grid, align_corners=True)
        maps_1, maps_2 = self._network(view_1), self._network(view_2)
        maps_1 = F.grid_sample(maps_1, grid, align_corners=True)
        loss = sampled_nt_xent(
            maps_1, maps_2, num_pairs=setting.batch * setting.pairs, temperature=loss_config.temperature
        )
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()


def random_affines(setting: Setting, geometry: GeometryConfig) -> Tensor:
    """Draw (B, D, D + 1) maps of positions in [-1, 1]: rotation, magnification, flips and shift."""
    num, dimensions = setting.batch, setting.dimensions
    matrix = torch.eye(dimensions).repeat(num, 1, 1)
    planes = {(0, 1): geometry.rotation_deg}
    if dimensions == 3:
        planes = dict(zip([(1, 2), (0, 2), (0, 1)], geometry.rotation_3d_deg, strict=True))
    for (i, j), degrees in planes.items():
        angle = math.radians(degrees) * (2 * torch.rand(num) - 1)
        turned = torch.eye(dimensions).repeat(num, 1, 1)
        turned[:, i, i] = turned[:, j, j] = angle.cos()
        turned[:, j, i], turned[:, i, j] = angle.sin(), -angle.sin()
        matrix = matrix @ turned
    low, high = (math.log(value) for value in geometry.scale)
    matrix = matrix / torch.empty(num, 1, 1).uniform_(low, high).exp()
    matrix = matrix * torch.where(torch.rand(num, 1, dimensions) < geometry.flip_probability, -1.0, 1.0)
    most = 2 * geometry.translation_mm / SPACING_MM / setting.size
    return torch.cat([matrix, torch.empty(num, dimensions, 1).uniform_(-most, most)], dim=2)


def sampled_nt_xent(maps_1: Tensor, maps_2: Tensor, *, num_pairs: int, temperature: float) -> Tensor:
    """Contrast some pixels of maps (B, E, *S) that lie on each other: all similarities of 2N in one matrix."""
    rows_1, rows_2 = (F.normalize(maps.movedim(1, -1).flatten(0, -2), dim=1) for maps in (maps_1, maps_2))
    chosen = torch.randperm(len(rows_1), device=rows_1.device)[:num_pairs]
    rows = torch.cat([rows_1[chosen], rows_2[chosen]])
    similarities = rows @ rows.T
    diagonal = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = similarities[~diagonal].view(len(rows), -1) / temperature
    partner = torch.arange(num_pairs, device=rows.device)
    return F.cross_entropy(logits, torch.cat([partner + num_pairs - 1, partner]))


def contenders(num_workers: int) -> dict[str, Callable[[Setting], Ours | Published]]:
    """Return who is measured."""
    return {
        **{name: partial(Ours, changes=changes) for name, changes in VARIANTS.items()},
        f"{PUBLISHED}, {num_workers} worker{'s' * (num_workers != 1)}": partial(
            Published, num_workers=num_workers, augments=True
        ),
        PUBLISHED: partial(Published, num_workers=0, augments=True),
        UNAUGMENTED: partial(Published, num_workers=0, augments=False),
    }


def measure(
    setting: Setting, *, rounds: int, num_steps: int, num_workers: int, only: list[str] | None, matmul: float
) -> tuple[list[dict[str, Any]], dict[str, Ours]]:
    """Measure every contender; return rows, and our variants that ran."""
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Ours | Published] = {}
    seconds: dict[str, float] = {}
    one_turn = partial(turn, batch=setting.batch, device=setting.device)
    for name, make in contenders(num_workers).items():
        if only is not None and name not in (OURS, *only):
            continue
        rows[name] = {"contender": name}
        began = time.perf_counter()
        try:
            contender = make(setting)
            one_turn(contender.start, num_steps=1, num_uncounted=0)
            rows[name]["first_step_s"] = time.perf_counter() - began
            with Memory(setting.device) as memory:
                seconds[name] = one_turn(contender.start, num_steps=1, num_uncounted=1).seconds_per_step
        except Exception as error:
            if name == OURS:
                raise
            rows[name]["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            progress(f"{name}: skipped, {rows[name]['skipped']}")
            continue
        rows[name]["peak_mib"] = memory.extra / 2**20
        running[name] = contender
    steps_of_turn = {
        name: max(1, min(num_steps, round(num_steps * seconds[OURS] / of_name))) for name, of_name in seconds.items()
    }
    turns = take_turns(
        {
            name: partial(one_turn, one.start, num_steps=steps_of_turn[name], num_uncounted=one.num_uncounted)
            for name, one in running.items()
        },
        rounds=rounds,
    )
    rates = {name: [one.images_per_s for one in of_name] for name, of_name in turns.items()}
    whole = [name for name in running if name.startswith(PUBLISHED) and name != UNAUGMENTED]
    reference = max(whole, key=lambda name: spread(rates[name])["median"], default=None)
    for name, one in running.items():
        row, config = rows[name], one.config
        row["images_per_s"], row["of_rounds"] = spread(rates[name]), rates[name]
        row["seconds_per_step"] = spread([of_turn.seconds_per_step for of_turn in turns[name]])["median"]
        row["last_loss"] = turns[name][-1].loss
        row["times_fp32"] = ratios(rates[name], rates[OURS])
        row["times_published"] = ratios(rates[name], rates[reference]) if reference else None
        row["of_matmul"] = backbone_flops(config, setting) / row["seconds_per_step"] / matmul
        if isinstance(one, Ours):
            progress(f"{name}: parts")
            row["parts"] = one.parts(steps_of_turn[name])
    return list(rows.values()), {name: one for name, one in running.items() if isinstance(one, Ours)}


def backbone_flops(config: PretrainConfig, setting: Setting) -> float:
    """Count the backbone's operations in a step: two views, forward and twice as many backward."""
    cost = cost_of(config.model, dimensions=setting.dimensions, size=setting.size)
    return 3 * 2 * setting.batch * float(cost.flops_per_image)


def table(rows: list[dict[str, Any]]) -> Table:
    columns = (
        "ms a step",
        "images/s",
        "quartiles",
        "x published",
        "x p2r, fp32",
        "peak MiB",
        "% of matmul",
        "ready, s",
    )
    result = Table("contender", *columns)
    for row in rows:
        if "skipped" in row:
            result.add_row(row["contender"], f"[dim]{row['skipped']}[/dim]")
            continue
        per_s, times = row["images_per_s"], row["times_published"]
        result.add_row(
            row["contender"],
            f"{1e3 * row['seconds_per_step']:,.0f}",
            f"{per_s['median']:,.1f}",
            f"{per_s['low']:,.1f} to {per_s['high']:,.1f}",
            f"{times['median']:.2f}" if times else "",
            f"{row['times_fp32']['median']:.2f}",
            f"{row['peak_mib']:,.0f}",
            f"{100 * row['of_matmul']:.1f}",
            f"{row['first_step_s']:.0f}",
        )
    return result


def table_of_parts(rows: list[dict[str, Any]]) -> Table:
    result = Table("% of a step", *PARTS, "ms a step")
    for row in rows:
        if "parts" in row:
            parts = [f"{100 * row['parts'][name]:.1f}" for name in PARTS]
            result.add_row(row["contender"], *parts, f"{1e3 * row['parts']['seconds']:,.0f}")
    return result


def picture(rows: list[dict[str, Any]], subtitle: str) -> bytes:
    """Images a second as bars, ours in colour, above what our steps consist of."""
    measured = [row for row in rows if "skipped" not in row]
    with_parts = [row for row in measured if "parts" in row]
    heights = [0.33 * len(measured) + 0.8, 0.33 * len(with_parts) + 1.0]
    whole = sum(heights) + 0.7
    figure = new_figure(9.5, whole)
    headline(figure, "Images a second in pretraining", subtitle)
    top = whole - 0.7
    upper, lower = (
        figure.add_axes((0.27, (top - sum(heights[: place + 1]) + 0.4) / whole, 0.70, (heights[place] - 0.75) / whole))
        for place in range(2)
    )
    texts = [
        f"{row['images_per_s']['median']:,.3g}"
        + (f"   {row['times_published']['median']:.2g} x" if row["times_published"] else "")
        for row in measured
    ]
    bars(
        upper,
        [row["contender"] for row in measured],
        [row["images_per_s"] for row in measured],
        title="whole steps (x: times the published manner, the faster of its loops)",
        texts=texts,
        colours=[OURS_COLOUR if row["contender"].startswith("p2r") else OTHERS_COLOUR for row in measured],
    )
    shares(
        lower,
        [row["contender"] for row in with_parts],
        [{name: row["parts"][name] for name in PARTS} for row in with_parts],
        title="parts of our step, %",
    )
    return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=5, steps=8)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="of the published manner's DataLoader")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders to measure; p2r in fp32 always is")
    parser.add_argument(
        "--loss-pairs",
        type=int,
        help="say which share of a step the loss takes at so many pairs; default: 65,536 on a GPU",
    )
    options = parser.parse_args()
    setting = setting_of(options)
    join_process_group(setting.device)
    gpu = setting.device.type == "cuda"
    # Large enough for a CPU, of which many take a thousand times longer for bf16 than a GPU does.
    rates_of_products = {
        name: matmul_rate(dtype, setting.device, size=None if gpu else 512) for name, dtype in DTYPES.items()
    }
    matmul = max(rates_of_products.values())
    rows, ours = measure(
        setting,
        rounds=options.rounds,
        num_steps=options.steps,
        num_workers=options.workers,
        only=options.only,
        matmul=matmul,
    )
    name = torch.cuda.get_device_name(setting.device) if gpu else cpu_name()
    found: dict[str, Any] = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {"setting": str(setting), "views": setting.views, "matmul_flops_per_s": rates_of_products}
    found["rows"] = rows
    console = Console(width=170)
    console.print(table(rows))
    console.print(table_of_parts(rows))
    console.print(
        f"{setting}, views {setting.views}; {name}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        "products, TFLOP/s: " + ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates_of_products.items())
    )
    rates = {row["contender"]: row["images_per_s"]["median"] for row in rows if row["contender"] in ours}
    fastest = max(rates, key=lambda name: rates[name])
    num_pairs = options.loss_pairs or (65_536 if gpu else 0)
    if num_pairs:
        per_image = max(1, num_pairs // setting.batch)
        parts = ours[fastest].parts(options.steps, pairs=per_image)
        found["many_pairs"] = {"contender": fastest, "num_pairs": per_image * setting.batch, "parts": parts}
        console.print(
            f"{fastest}, with {per_image * setting.batch:,} pixel pairs: the loss takes {100 * parts['loss']:.1f} % "
            f"of a step of {1e3 * parts['seconds']:,.0f} ms"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.picture:
        options.picture.write_bytes(picture(rows, f"{setting}, {name}"))


if __name__ == "__main__":
    main()
