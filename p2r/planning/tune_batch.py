"""Batch tuning: how many images a worker can encode at once, and how many pixel pairs of each, found by trial.

Every trial is a separate process that takes a few steps on noise images of the job's shape, so a failed trial leaves nothing
behind. Images are doubled until they do not fit, and the gap is halved twice; then pairs are doubled. No shards are read. A
trial is a single worker. Workers of a group hold a smaller part of the optimizer's state, and also the embeddings of the other
workers' pairs, which the headroom covers.

    python -m p2r.planning.tune_batch < trial.json      # command of a trial
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from pydantic import TypeAdapter

from p2r.config import ImageConfig, PretrainConfig
from p2r.console import show
from p2r.data.batch import Batch, Group
from p2r.data.order import allowed_world_sizes
from p2r.documents import checked, read_json
from p2r.engine.profile import peak_mib
from p2r.errors import InputError, TrainingError

HEADROOM = 0.1
"""Fraction of the memory that stays free: for other workers' embeddings, and for fragmentation in the allocator."""

MOST_TIMES = 4
"""Largest number of images to try, as a multiple of the job's global batch; and of pairs, as a multiple of the job's pairs."""

_NUM_STEPS = 2  # timed steps, after an untimed one
_DOES_NOT_FIT = 3  # exit code of a trial
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class BatchTrial:
    """One trial."""

    images: int
    """Images encoded at once."""
    pairs: int
    """Pairs of each image."""
    peak_mib: float | None = None
    """None: it did not fit."""
    images_per_s: float | None = None

    @property
    def fits(self) -> bool:
        """True if the trial fitted into memory."""
        return self.peak_mib is not None


@dataclass(frozen=True)
class _Given:
    """The input of a trial's process."""

    config: PretrainConfig
    trial: BatchTrial
    device: str
    limit_mib: float


_TRIAL, _GIVEN = TypeAdapter(BatchTrial), TypeAdapter(_Given)


@dataclass(frozen=True)
class Cut:
    """Split of the job's global batch over a number of workers."""

    num_workers: int
    images: int
    """Images of each worker."""
    micro_batch: int | None
    """Images encoded at once; None: all of them."""


@dataclass(frozen=True)
class Tuning:
    """Result of batch tuning."""

    trials: tuple[BatchTrial, ...]
    """Trials in order."""
    images: int
    """Largest number of images that a worker can encode at once, with the job's pairs."""
    pairs: int
    """Largest number of pairs per image, with this number of images."""
    cuts: tuple[Cut, ...]
    """Splits for every number of workers that can share the job's global batch."""


def tune_batch(
    config: PretrainConfig, *, device: torch.device, memory_gib: float | None, say: Callable[[str], None]
) -> Tuning:
    """Find the largest batch that fits.

    Args:
        config: Configuration of the job.
        device: Device of the trials.
        memory_gib: Memory of one worker, GiB. On a CPU: of the whole process. None: all of the GPU's.
        say: Receives a line per trial.

    Raises:
        InputError: `memory_gib` is missing on a CPU, or not even one image fits.
        TrainingError: A trial failed for a reason other than memory.
    """
    if device.type != "cuda" and memory_gib is None:
        raise InputError("tune-batch on a CPU needs the memory that a worker may use: --memory-gib 8")
    limit_mib = (1 - HEADROOM) * (1024 * memory_gib if memory_gib is not None else _device_memory_mib(device))
    trials: list[BatchTrial] = []

    def fits(images: int, pairs: int) -> bool:
        trial = run_batch_trial(config, BatchTrial(images, pairs), device=device, limit_mib=limit_mib)
        trials.append(trial)
        found = f"{trial.peak_mib:.0f} MiB | {trial.images_per_s:.1f} img/s" if trial.fits else "does not fit"
        say(f"tune-batch | {images} images of {pairs} pairs | {found}")
        return trial.fits

    pairs = config.loss.pixel_pairs_per_image
    images = _largest_fitting(1, MOST_TIMES * config.global_batch, lambda images: fits(images, pairs), halvings=2)
    if not images:
        raise InputError(
            f"one image with {pairs} pixel pairs does not fit into {limit_mib / 1024:.1f} GiB ({HEADROOM:.0%} are kept free): "
            "give more memory, a smaller image or network, or pretrain.model.checkpoint_activations: all"
        )
    most = max(pairs, min(MOST_TIMES * pairs, config.image.size**config.image.dimensions))
    more = _largest_fitting(2 * pairs, most, lambda pairs: fits(images, pairs), halvings=0) if 2 * pairs <= most else 0
    return Tuning(tuple(trials), images, more or pairs, cuts_of(config.global_batch, images))


def cuts_of(global_batch: int, most_images: int) -> tuple[Cut, ...]:
    """Share a global batch among every allowed number of workers, in the largest micro-batches that fit."""
    cuts = []
    for num_workers in allowed_world_sizes(global_batch):
        images = global_batch // num_workers
        micro_batch = max(part for part in range(1, min(images, most_images) + 1) if images % part == 0)
        cuts.append(Cut(num_workers, images, None if micro_batch == images else micro_batch))
    return tuple(cuts)


def run_batch_trial(config: PretrainConfig, trial: BatchTrial, *, device: torch.device, limit_mib: float) -> BatchTrial:
    """Try a size in a separate process, and return it with its measurements."""
    given = {
        "config": config.model_dump(mode="json"),
        "trial": asdict(trial),
        "device": str(device),
        "limit_mib": limit_mib,
    }
    done = subprocess.run(
        [sys.executable, "-m", "p2r.planning.tune_batch"], input=json.dumps(given), capture_output=True, text=True
    )
    if done.returncode in (_DOES_NOT_FIT, -9):  # -9: killed by the system for lack of memory
        return trial
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TrainingError(f"a trial of {trial.images} images with {trial.pairs} pairs failed: {last}")
    where = f"the answer of a trial of {trial.images} images with {trial.pairs} pairs"
    answer = (done.stdout.splitlines() or [""])[-1].encode(errors="replace")
    try:
        return checked(_TRIAL, read_json(answer, where=where, max_bytes=_MAX_BYTES), where=where)
    except InputError as error:
        raise TrainingError(str(error)) from None


def noise_batch(image: ImageConfig, num_images: int, *, contrasts: tuple[str, ...] | None = None) -> Batch:
    """Return a batch of noise in the form of a batch from shards, with every contrast of every image."""
    generator = torch.Generator().manual_seed(0)
    shape, num_channels = [image.size] * image.dimensions, num_images * len(contrasts or ("",))
    voxels = torch.randint(0, 1000, (num_channels, *shape), generator=generator, dtype=torch.int16)
    spacing_mm, centre = (image.spacing_mm,) * image.dimensions, ((image.size - 1) / 2,) * 3
    # Planes of one grid come together, patches one at a time.
    parts = [torch.arange(num_channels)] if image.dimensions == 2 else list(torch.arange(num_channels)[:, None])
    groups = tuple(
        Group(part, voxels[part], torch.zeros(len(part)), torch.full((len(part),), 1000.0), spacing_mm, centre)
        for part in parts
    )
    positions = np.arange(num_images, dtype=np.int64)
    return Batch(groups, positions, np.zeros_like(positions), image, contrasts=contrasts)


def _largest_fitting(first: int, last: int, fits: Callable[[int], bool], *, halvings: int) -> int:
    """Return the largest number up to `last` that fits, 0 if not even `first` does.

    The number is doubled until it does not fit; then the gap is halved `halvings` times.
    """
    low, high = 0, first
    while high <= last and fits(high):
        low, high = high, 2 * high
    if not low or high > last:
        return low
    for _ in range(halvings):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _device_memory_mib(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory / 2**20


def _run_steps(config: PretrainConfig, trial: BatchTrial, *, device: torch.device, limit_mib: float) -> BatchTrial:
    """Take a few steps in this process, and measure them."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_mib / _device_memory_mib(device)), device)
    else:
        threading.Thread(target=_exit_beyond_limit, args=(limit_mib, device), daemon=True).start()
    # Imported here, because only trials need these modules, which take seconds to import.
    from p2r.engine.build import build_engine, join_process_group
    from p2r.engine.step import pretrain_step
    from p2r.model.pix2rep import Pix2Rep

    join_process_group(device)
    loss = config.loss.model_copy(update={"pixel_pairs_per_image": trial.pairs})
    config = config.model_copy(update={"global_batch": trial.images, "micro_batch": None, "loss": loss})
    engine = build_engine(Pix2Rep.of(config).to(device), config, world_size=1)
    batch = noise_batch(config.image, trial.images, contrasts=config.model.contrasts)
    began = math.nan
    for step in range(1 + _NUM_STEPS):
        if step == 1:
            began = time.perf_counter()
        float(pretrain_step(engine, batch, config=config, learning_rate=config.optimizer.learning_rate))
    seconds = time.perf_counter() - began
    found = peak_mib(device)
    if found > limit_mib:
        sys.exit(_DOES_NOT_FIT)
    return BatchTrial(trial.images, trial.pairs, found, _NUM_STEPS * trial.images / seconds)


def _exit_beyond_limit(limit_mib: float, device: torch.device) -> None:
    """End this process as soon as it exceeds its memory limit, before the machine swaps."""
    while peak_mib(device) <= limit_mib:
        time.sleep(0.05)
    os._exit(_DOES_NOT_FIT)


def main() -> int:
    """Run the trial given on stdin."""
    content = sys.stdin.buffer.read(_MAX_BYTES + 1)
    given = checked(_GIVEN, read_json(content, where="stdin", max_bytes=_MAX_BYTES), where="stdin")
    try:
        trial = _run_steps(given.config, given.trial, device=torch.device(given.device), limit_mib=given.limit_mib)
    except torch.cuda.OutOfMemoryError:
        return _DOES_NOT_FIT
    show(json.dumps(asdict(trial)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
