"""Parts of the probe that take steps of the real engine, DeepSpeed's included."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.gpu.sizes import Fact, Sizes


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


def variants(sizes: Sizes) -> Iterator[Fact]:
    """Throughput of the step in every variant of precision, layout and compiling; then a profile of one variant."""
    from functools import partial

    from training import (
        VARIANTS,
        Setting,
        batch_of,
        engine_of,
        passes_over,
        steps_over,
        turn,
        voxels_in_memory,
    )

    from p2r.engine.build import join_process_group

    size, batch, width = sizes.pick((128, 64, 64), (32, 2, 4))
    setting = Setting(2, size, batch, pairs=sizes.pick(256, 16), width=width, views="pix2rep", device=sizes.device)
    join_process_group(sizes.device)
    voxels = voxels_in_memory(setting, num_images=batch)
    names = [name for name in VARIANTS if "bf16" in name and (sizes.is_gpu or "compiled" not in name)]
    for name in sizes.pick([*names, "p2r, fp32"], names):
        config = setting.config(**VARIANTS[name])
        engine = engine_of(config, sizes.device)
        batches = passes_over([batch_of(voxels, config=config, pin=sizes.is_gpu)])
        began = time.perf_counter()
        taken = turn(
            partial(steps_over, engine, batches, config),
            num_steps=sizes.pick(20, 1),
            num_uncounted=sizes.pick(3, 0),
            batch=batch,
            device=sizes.device,
        )
        yield {"variant": name, "images_per_s": taken.images_per_s, "all_s": time.perf_counter() - began}
        engine.destroy()
    config = setting.config(**VARIANTS[names[-1]])
    engine = engine_of(config, sizes.device)
    steps = steps_over(engine, passes_over([batch_of(voxels, config=config, pin=sizes.is_gpu)]), config)
    for _ in range(sizes.pick(3, 1)):
        next(steps)
    yield from _dearest(lambda: next(steps), sizes, name=names[-1])
    engine.destroy()


def _dearest(step: Callable[[], object], sizes: Sizes, *, name: str) -> Iterator[Fact]:
    """Profile one step, and yield the operators with the longest device time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if sizes.is_gpu else [])]) as found:
        step()
        if sizes.is_gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if sizes.is_gpu else "self_cpu_time_total"
    for event in sorted(found.key_averages(), key=lambda event: -float(getattr(event, key)))[: sizes.pick(15, 3)]:
        yield {"variant": name, "operator": event.key[:80], "ms": getattr(event, key) / 1e3, "calls": event.count}


def deterministic(sizes: Sizes) -> Iterator[Fact]:
    """Three steps, twice, with `deterministic`: equal to the bit."""
    runs = [
        [float(value) for _, value, _ in _trained(sizes, deterministic=True, images=2, num_steps=3)] for _ in range(2)
    ]
    yield {"losses": runs[0], "is_right": runs[0] == runs[1]}
