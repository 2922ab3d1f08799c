"""What the benchmarks of training share: one configuration, batches in memory, an engine, and how steps are timed.

A contender of a turn is an endless generator that takes one optimizer step for each `next`. The device is waited for only
where a clock is read: on a GPU the host runs ahead, as in a training.

Letters: B images of this rank, *S their axes.
"""

import argparse
import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2r.config import PretrainConfig
from p2r.data.batch import Batch, Group
from p2r.engine.build import build_engine
from p2r.engine.step import pretrain_step
from p2r.model.pix2rep import Pix2Rep

Steps = Generator[Any, None, None]
LEARNING_RATE = 1e-4
SPACING_MM = 1.5
OURS = "p2r, fp32"
LAST: dict[str, Any] = {"model": {"channels_last": True}}
FIRST: dict[str, Any] = {"model": {"channels_last": False}}
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: FIRST,
    "p2r, fp32, channels last": LAST,
    "p2r, fp32, compiled": FIRST | {"compile": True},
    "p2r, bf16": FIRST | {"precision": "bf16"},
    "p2r, bf16, channels last": LAST | {"precision": "bf16"},
    "p2r, bf16, compiled": FIRST | {"precision": "bf16", "compile": True},
    "p2r, bf16, compiled, channels last": LAST | {"precision": "bf16", "compile": True},
}
"""Keys of a job's `pretrain` section."""
FULL_SCALE = 1000
"""Integer that becomes 1 in the network's input."""


@dataclass(frozen=True)
class Setting:
    """What is trained, and on what."""

    dimensions: int
    size: int
    batch: int
    pairs: int
    width: int
    views: str
    device: torch.device

    def config(self, *, spacing_mm: float = SPACING_MM, **changes: Any) -> PretrainConfig:
        """Return a job's section, with other values of its keys where `changes` names them: `model` is merged."""
        widths = [self.width * 2**level for level in range(5)]
        model = {"channels": widths, "feature_channels": max(32, self.width), **changes.pop("model", {})}
        section = {
            "image": {"dimensions": self.dimensions, "size": self.size, "spacing_mm": spacing_mm},
            "views": self.views,
            "model": model,
            "loss": {"pixel_pairs_per_image": self.pairs},
            "steps": 1_000_000,
            "global_batch": self.batch,
        }
        return PretrainConfig.model_validate(section | changes)

    def __str__(self) -> str:
        image = " x ".join([str(self.size)] * self.dimensions)
        pairs = f"{self.batch * self.pairs:,} pixel pairs"
        return f"{self.batch} images of {image}, {pairs}, U-Net of base width {self.width}"


def add_options(parser: argparse.ArgumentParser, *, rounds: int, steps: int) -> None:
    """Declare what every benchmark of training can be told."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--dimensions", type=int, choices=[2, 3], default=2)
    parser.add_argument("--size", type=int, help="edge of the images; default: 128 in 2D, 64 in 3D, on a GPU 96")
    parser.add_argument("--batch", type=int, help="images of a step; default: 16 in 2D, 2 in 3D, on a GPU 64 and 4")
    parser.add_argument("--pairs", type=int, default=256, help="pixel pairs of an image")
    parser.add_argument("--width", type=int, help="channels of the finest level; default: 16, on a GPU 64 in 2D")
    parser.add_argument("--views", default="pix2rep", help="name of the ranges of all augmentation")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="that count in a turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)


def add_variant(parser: argparse.ArgumentParser) -> None:
    """Declare how the network computes, where a benchmark measures one way of it."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu, help="the backbone")


def setting_of(options: argparse.Namespace) -> Setting:
    """Return what the options say."""
    device = torch.device(options.device)
    gpu, plane = device.type == "cuda", options.dimensions == 2
    return Setting(
        dimensions=options.dimensions,
        size=options.size or (128 if plane else 96 if gpu else 64),
        batch=options.batch or ((64 if gpu else 16) if plane else (4 if gpu else 2)),
        pairs=options.pairs,
        width=options.width or (64 if gpu and plane else 32 if gpu else 16),
        views=options.views,
        device=device,
    )


def voxels_in_memory(setting: Setting, *, num_images: int, seed: int = 0) -> Tensor:
    """Smooth blobs with noise, (num_images, *S) int16, on the host."""
    generator = torch.Generator().manual_seed(seed)
    shape = [setting.size] * setting.dimensions
    coarse = torch.rand(num_images, 1, *[8] * setting.dimensions, generator=generator)
    mode = "bilinear" if setting.dimensions == 2 else "trilinear"
    smooth = torch.nn.functional.interpolate(coarse, size=shape, mode=mode)[:, 0]
    noisy = smooth + 0.02 * torch.randn(smooth.shape, generator=generator)
    return (FULL_SCALE * noisy.clamp(0, 1)).to(torch.int16)


def batch_of(voxels: Tensor, *, config: PretrainConfig, first: int = 0, pin: bool = False) -> Batch:
    """Make the batch that a stream would deliver of samples (B, *S), numbered from `first`."""
    num, planes = len(voxels), config.image.dimensions == 2
    spacing_mm = (config.image.spacing_mm,) * config.image.dimensions
    centre = () if planes else tuple((length - 1) / 2 for length in voxels.shape[1:])
    places = [torch.arange(num)] if planes else list(torch.arange(num).split(1))  # a group of patches has one
    groups = tuple(
        Group(
            index=index,
            voxels=voxels[index].pin_memory() if pin else voxels[index],
            low=torch.zeros(len(index)),
            high=torch.full((len(index),), float(FULL_SCALE)),
            spacing_mm=spacing_mm,
            centre=centre,
        )
        for index in places
    )
    positions = first + np.arange(num, dtype=np.int64)
    return Batch(groups, positions, np.zeros_like(positions), config.image)


def engine_of(config: PretrainConfig, device: torch.device, *, world_size: int = 1) -> Any:
    """Build network and engine as `p2r.engine.pretrain` does, without trying the compiler before."""
    torch.manual_seed(config.seed)
    model = Pix2Rep(config.model, dimensions=config.image.dimensions)
    engine = build_engine(model.to(device), config, world_size=world_size)
    if config.compile:
        engine.module.backbone.compile(dynamic=False)
    return engine


def steps_over(engine: Any, batches: Iterator[Batch], config: PretrainConfig) -> Steps:
    """Take a step with every batch."""
    for batch in batches:
        yield pretrain_step(engine, batch, config=config, learning_rate=LEARNING_RATE)


def passes_over(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yield batches in memory again and again; each pass is another epoch, so that its views are others."""
    for epoch in count():
        yield from (replace(batch, epochs=np.full_like(batch.epochs, epoch)) for batch in batches)


def loss_of(result: Any) -> float:
    """Return the loss of what a step returned: a tensor, or something that has one."""
    return float(getattr(result, "loss", result))


def wait_for(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Turn:
    """Some steps of a contender."""

    images_per_s: float
    seconds_per_step: float
    loss: float

    def __str__(self) -> str:
        return f"{self.images_per_s:,.1f} images/s"


def turn(start: Callable[[], Steps], *, num_steps: int, num_uncounted: int, batch: int, device: torch.device) -> Turn:
    """Take steps, and see how long that takes."""
    with contextlib.closing(start()) as steps:
        for _ in islice(steps, num_uncounted):
            pass
        wait_for(device)
        began = time.perf_counter()
        last = deque(islice(steps, num_steps), maxlen=1)
        wait_for(device)
        seconds = (time.perf_counter() - began) / num_steps
        return Turn(batch / seconds, seconds, loss_of(last.pop()))
