"""(manifest, seed, epoch, step) -> which samples make a global batch: a pure function, the same for every world size.

A sample is one plane; its position counts planes over the manifest's shards. For each epoch the shards are permuted
and their planes laid end to end as a ring, which starts at a random place. L lanes cut the ring into equal stretches; a
step takes the next G / L planes of every lane, after each lane was shuffled in windows. Rank r of R reads L / R
neighbouring lanes. So

- ranks never overlap, all have the same number of steps, and their union is the same batch for every R that divides L;
- each shard is read by one or two ranks per epoch, nearly in sequence: about one download per shard and epoch;
- a batch mixes as many places of the corpus as there are lanes;
- nothing has to be saved but (seed, epoch, step). Fewer than G planes sit out an epoch, other ones each time.

The permutations sort raw Philox words instead of calling `Generator.permutation`, whose results numpy may change.

Letters: N samples, G global batch, L lanes, R ranks, W window.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2r.errors import DataError
from p2r.randomness import keyed_generator

ORDER = "lanes/1"  # the name of this order; a resumed run must find the order that it began with

_MAX_LANES = 1024
_WINDOW = 16_384

Positions = NDArray[np.int64]
Manifest = Mapping[str, Any]


def num_lanes(global_batch: int) -> int:
    """L, the largest divisor of the global batch up to 1,024; the world size must divide it."""
    if global_batch < 1:
        raise ValueError(f"global_batch must be at least 1, got {global_batch}")
    return max(lanes for lanes in range(1, min(global_batch, _MAX_LANES) + 1) if global_batch % lanes == 0)


def steps_per_epoch(manifest: Manifest, global_batch: int) -> int:
    """Full global batches in one pass over the corpus.

    Raises:
        DataError: The corpus is smaller than one global batch.
    """
    num_samples = sum(_counts(manifest))
    lanes = num_lanes(global_batch)
    if num_samples < global_batch:
        raise DataError(
            f"the corpus has {num_samples} samples, fewer than one global batch of {global_batch}: "
            f"ingest more scans, or set global_batch to {num_samples} or less"
        )
    return num_samples // lanes // (global_batch // lanes)


def global_batch(manifest: Manifest, *, seed: int, epoch: int, step: int, global_batch: int) -> Positions:
    """Sample positions of one global batch, int64 (G,), lane after lane.

    Args:
        manifest: Of the corpus.
        seed: Of the run.
        epoch: Counts from 0.
        step: Within the epoch, 0 to `steps_per_epoch` - 1.
        global_batch: G.
    """
    return rank_batch(manifest, seed=seed, epoch=epoch, step=step, global_batch=global_batch, rank=0, world_size=1)


def rank_batch(
    manifest: Manifest, *, seed: int, epoch: int, step: int, global_batch: int, rank: int, world_size: int
) -> Positions:
    """One rank's part of `global_batch`: its contiguous slice number `rank` of `world_size` equal ones.

    Raises:
        DataError: The corpus is too small, or the world size does not divide the lanes; names the sizes that do.
        ValueError: step or rank is out of range.
    """
    num_steps = steps_per_epoch(manifest, global_batch)
    if not 0 <= step < num_steps:
        raise ValueError(f"step must be 0 to {num_steps - 1} within an epoch, got {step}")
    check_world_size(global_batch, world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to {world_size - 1}, got {rank}")
    lanes = num_lanes(global_batch)
    counts = _counts(manifest)
    lane_length, per_lane = sum(counts) // lanes, global_batch // lanes
    offsets = np.arange(step * per_lane, (step + 1) * per_lane)
    mine = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
    ring = np.concatenate([lane * lane_length + _in_lane(seed, epoch, lane, lane_length, offsets) for lane in mine])
    return _ring_to_positions(ring, counts, seed, epoch)


def check_world_size(global_batch: int, world_size: int) -> None:
    """Refuse a number of ranks that the lanes cannot be dealt to.

    Raises:
        DataError: It does not divide the lanes; names the sizes that do.
    """
    lanes = num_lanes(global_batch)
    if world_size < 1 or lanes % world_size:
        allowed = [size for size in range(1, lanes + 1) if lanes % size == 0]
        raise DataError(
            f"{world_size} ranks cannot share a global batch of {global_batch} ({lanes} lanes): "
            f"use {', '.join(map(str, allowed))} ranks, or another global_batch"
        )


def locate(manifest: Manifest, positions: Positions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sample positions -> number of the shard in the manifest, and number of the sample in that shard."""
    counts = np.asarray(_counts(manifest), dtype=np.int64)
    ends = np.cumsum(counts)
    shards = np.asarray(np.searchsorted(ends, positions, side="right"), dtype=np.int64)
    return shards, positions - (ends - counts)[shards]


def _counts(manifest: Manifest) -> tuple[int, ...]:
    return tuple(entry["num_samples"] for entry in manifest["shards"])


def _in_lane(seed: int, epoch: int, lane: int, length: int, offsets: Positions) -> Positions:
    """Shuffle `offsets` into a lane: each stays in its window of W."""
    windows = offsets // _WINDOW
    shuffled = np.empty_like(offsets)
    for window in np.unique(windows):
        start = int(window) * _WINDOW
        order = _window_order(seed, epoch, lane, int(window), min(_WINDOW, length - start))
        chosen = windows == window
        shuffled[chosen] = order[offsets[chosen] - start].astype(np.int64) + start  # int16 would overflow
    return shuffled


@lru_cache(maxsize=2048)  # the windows in use: one per lane, 32 KiB each
def _window_order(seed: int, epoch: int, lane: int, window: int, length: int) -> NDArray[np.int16]:
    return _permutation(length, seed, "order", epoch, lane, window).astype(np.int16)


def _ring_to_positions(ring: Positions, counts: Sequence[int], seed: int, epoch: int) -> Positions:
    starts, order, ends, shift = _ring(tuple(counts), seed, epoch)
    places = (ring + shift) % ends[-1]
    slots = np.searchsorted(ends, places, side="right")  # which shard of the permuted sequence
    within = places - (ends[slots] - np.asarray(counts)[order[slots]])
    return np.asarray(starts[order[slots]] + within, dtype=np.int64)


@lru_cache(maxsize=4)
def _ring(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[Positions, Positions, Positions, int]:
    """First position of each shard; the shards' order; where each ends on the ring; where the ring begins."""
    sizes = np.asarray(counts, dtype=np.int64)
    order = _permutation(len(counts), seed, "order", epoch, "shards")
    shift = int(keyed_generator(seed, "order", epoch, "shift").bit_generator.random_raw()) % int(sizes.sum())
    return np.cumsum(sizes) - sizes, order, np.cumsum(sizes[order]), shift


def _permutation(length: int, seed: int, *key: int | str) -> Positions:
    words = keyed_generator(seed, *key).bit_generator.random_raw(length)
    return np.asarray(np.argsort(words, kind="stable"), dtype=np.int64)
