"""(corpora, seed, step) -> the samples of a global batch: a pure function, the same for every world size.

A sample is one slice (or one volume, for 3D); its position counts samples over the manifest's shards. For each epoch the
shards are permuted, and their samples form a ring that starts at a random position. L lanes cut the ring into equal
stretches. A step takes the next G / L samples of every lane, after each lane is shuffled in windows. Rank r of R reads
L / R neighbouring lanes. Therefore

- ranks never overlap, all have the same number of steps, and their union is the same batch for every R that divides L;
- each shard is read by one or two ranks per epoch, nearly in sequence: about one download per shard and epoch;
- a batch mixes as many regions of the corpus as there are lanes;
- the whole state is (seed, step). Fewer than G + L samples are left out of an epoch, different ones each time.

Several corpora share the lanes by weight, and each has its own epochs: a small one repeats more often.

A sample's position within a window is computed, not looked up. A Feistel network with cycle walking permutes any length in
constant time and no memory (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Shards are permuted by
sorting raw Philox words. Neither depends on functions whose results numpy may change.

Letters: N samples, G global batch, L lanes, R ranks, W window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2r.errors import DataError
from p2r.randomness import keyed_generator

ORDER = "lanes/2"  # version of the order, stored in checkpoints: a resumed run must use the order that it began with

_MAX_LANES = 1024
_WINDOW = 16_384
_ROUNDS = 4

Positions = NDArray[np.int64]
Words = NDArray[np.uint64]
Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Samples:
    """Samples of one step."""

    positions: Positions
    """(B,) positions in the corpus; in a mixture, the positions of corpus k follow those in corpus k - 1."""
    epochs: Positions
    """(B,) completed passes over each sample's corpus."""


class Order:
    """The order of one run, prepared once; then any step is computed in constant time.

    Args:
        corpora: For each corpus, the number of samples in each of its shards.
        seed: Seed of the run.
        global_batch: G, samples per step over all ranks.
        weights: Weight of each corpus in every batch, rounded to lanes; None: proportional to the sizes.
        names: Name of each corpus, for messages; None: its number.

    Raises:
        DataError: if a corpus is smaller than its part of a global batch, or its part is less than a lane.
    """

    def __init__(
        self,
        corpora: Sequence[Sequence[int]],
        *,
        seed: int,
        global_batch: int,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.num_lanes = num_lanes(global_batch)
        self._per_lane = global_batch // self.num_lanes
        self._global_batch = global_batch
        sizes = [sum(counts) for counts in corpora]
        self._owner, self._lane = _deal_lanes(sizes if weights is None else weights, self.num_lanes, names)
        self._first = np.cumsum([0, *sizes])
        self._rings = [
            _Ring(
                np.asarray(counts, dtype=np.int64),
                seed,
                number,
                int((self._owner == number).sum()),
                self._per_lane,
                name=None if names is None else names[number],
            )
            for number, counts in enumerate(corpora)
        ]

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Steps in one pass over each corpus."""
        return tuple(ring.num_steps for ring in self._rings)

    @property
    def shares(self) -> tuple[float, ...]:
        """Fraction of every batch that comes from each corpus."""
        return tuple(float((self._owner == number).mean()) for number in range(len(self._rings)))

    def samples(self, step: int, *, rank: int = 0, world_size: int = 1) -> Samples:
        """Return one rank's part of a global batch: contiguous part number `rank` of `world_size` equal parts.

        Args:
            step: Step since the run began, over all epochs.
            rank: 0 to `world_size` - 1.
            world_size: Number of ranks; must divide the lanes.

        Raises:
            DataError: if the world size does not divide the lanes; names the sizes that do.
            ValueError: if step or rank is out of range.
        """
        check_world_size(self._global_batch, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to {world_size - 1}, got {rank}")
        size = self._global_batch // world_size
        return self.slice(step, range(rank * size, (rank + 1) * size))

    def slice(self, step: int, numbers: range) -> Samples:
        """Return samples of a global batch by their indices in it."""
        return self.slices(range(step, step + 1), numbers)[0]

    def slices(self, steps: range, numbers: range) -> list[Samples]:
        """Return these samples of each step's global batch: several steps at once take hardly longer than one."""
        if steps.start < 0:
            raise ValueError(f"step must be at least 0, got {steps.start}")
        lanes, offsets = np.divmod(np.tile(np.asarray(numbers, dtype=np.int64), len(steps)), self._per_lane)
        of_step = np.repeat(np.asarray(steps, dtype=np.int64), len(numbers))
        owners = self._owner[lanes]
        positions, epochs = np.empty_like(lanes), np.empty_like(lanes)
        for number, ring in enumerate(self._rings):
            mine = owners == number
            epochs[mine] = of_step[mine] // ring.num_steps
            for epoch in range(steps[0] // ring.num_steps, steps[-1] // ring.num_steps + 1):
                these = mine & (epochs == epoch)
                if these.any():
                    step_of_epoch = of_step[these] - epoch * ring.num_steps
                    places = ring.positions(epoch, step_of_epoch, self._lane[lanes[these]], offsets[these])
                    positions[these] = self._first[number] + places
        parts = (array.reshape(len(steps), len(numbers)) for array in (positions, epochs))
        return [Samples(*rows) for rows in zip(*parts, strict=True)]

    def num_samples(self, corpus: int, shard: int) -> int:
        """Return the number of samples in a shard."""
        return int(self._rings[corpus].counts[shard])

    def locate(self, positions: Positions) -> tuple[Positions, Positions, Positions]:
        """Return the indices of the corpus, of the shard in its manifest, and of the sample in that shard, by position."""
        corpora = np.asarray(np.searchsorted(self._first[1:], positions, side="right"), dtype=np.int64)
        shards, samples = np.empty_like(corpora), np.empty_like(corpora)
        for number, ring in enumerate(self._rings):
            mine = corpora == number
            places = positions[mine] - self._first[number]
            shards[mine] = np.searchsorted(ring.ends, places, side="right")
            samples[mine] = places - (ring.ends - ring.counts)[shards[mine]]
        return corpora, shards, samples


class _Ring:
    """One corpus: its samples in the order of each epoch, cut into lanes."""

    def __init__(
        self, counts: Positions, seed: int, number: int, lanes: int, per_lane: int, *, name: str | None
    ) -> None:
        self.counts, self.ends = counts, np.cumsum(counts)
        num_samples = int(counts.sum())
        if num_samples < lanes * per_lane and name is not None:
            raise DataError(
                f"{name} has {num_samples} samples, fewer than its {lanes * per_lane} of a global batch: lower its weight, or "
                "global_batch, or ingest more such scans"
            )
        if num_samples < lanes * per_lane:
            raise DataError(
                f"the corpus has {num_samples} samples, fewer than one global batch of {lanes * per_lane}: "
                f"ingest more scans, or set global_batch to {num_samples} or less"
                + ("" if number == 0 else "; with several corpora this is the part of one of them in a batch")
            )
        self._seed, self._number, self._per_lane = seed, number, per_lane
        self._lane_length = num_samples // lanes
        self.num_steps = self._lane_length // per_lane
        self._cached_epoch = lru_cache(maxsize=4)(self._prepare_epoch)

    def positions(self, epoch: int, steps: Positions, lanes: Positions, offsets: Positions) -> Positions:
        """Return positions in the corpus: sample number `offsets` of each of `lanes` at each of `steps` of an epoch."""
        order, ends, shift, key = self._cached_epoch(epoch)
        places = self._shuffle_offsets(steps * self._per_lane + offsets, lanes, key)
        ring = (lanes * self._lane_length + places + shift) % self.ends[-1]
        slots = np.searchsorted(ends, ring, side="right")  # indices into the permuted sequence of shards
        shards = order[slots]
        within = ring - (ends[slots] - self.counts[shards])
        return np.asarray((self.ends - self.counts)[shards] + within, dtype=np.int64)

    def _prepare_epoch(self, epoch: int) -> tuple[Positions, Positions, int, np.uint64]:
        """Return the order of the shards, the end of each on the ring, the start of the ring, and the key of the shuffle."""
        words = self._generator(epoch, "shards").random_raw(len(self.counts))
        order = np.asarray(np.argsort(words, kind="stable"), dtype=np.int64)
        shift = int(self._generator(epoch, "shift").random_raw()) % int(self.ends[-1])
        return order, np.cumsum(self.counts[order]), shift, np.uint64(self._generator(epoch, "lanes").random_raw())

    def _generator(self, epoch: int, name: str) -> Any:
        return keyed_generator(self._seed, "order", self._number, epoch, name).bit_generator

    def _shuffle_offsets(self, offsets: Positions, lanes: Positions, key: np.uint64) -> Positions:
        """Shuffle offsets within lanes: each stays in its window of W."""
        windows = offsets // _WINDOW
        keys = _mix_words(_mix_words(lanes.astype(np.uint64) ^ key) ^ windows.astype(np.uint64))
        lengths = np.minimum(_WINDOW, self._lane_length - windows * _WINDOW)
        shuffled = np.empty_like(offsets)
        for length in np.unique(lengths):  # one length, or two if a lane ends in a shorter window
            chosen = lengths == length
            start = windows[chosen] * _WINDOW
            within = (offsets[chosen] - start).astype(np.uint64)
            shuffled[chosen] = start + _permute_index(within, int(length), keys[chosen]).astype(np.int64)
        return shuffled


def num_lanes(global_batch: int) -> int:
    """Return L, the largest divisor of the global batch up to 1,024; the world size must divide it."""
    if global_batch < 1:
        raise ValueError(f"global_batch must be at least 1, got {global_batch}")
    return max(lanes for lanes in range(1, min(global_batch, _MAX_LANES) + 1) if global_batch % lanes == 0)


def allowed_world_sizes(global_batch: int) -> list[int]:
    """Return all numbers of ranks that can share a global batch."""
    lanes = num_lanes(global_batch)
    return [size for size in range(1, lanes + 1) if lanes % size == 0]


def check_world_size(global_batch: int, world_size: int) -> None:
    """Check that a number of ranks divides the lanes.

    Raises:
        DataError: if it does not; names the numbers that do.
    """
    lanes = num_lanes(global_batch)
    if world_size < 1 or lanes % world_size:
        raise DataError(
            f"{world_size} ranks cannot share a global batch of {global_batch} ({lanes} lanes): "
            f"use {', '.join(map(str, allowed_world_sizes(global_batch)))} ranks, or another global_batch"
        )


def check_micro_batch(global_batch: int, world_size: int, micro_batch: int | None) -> None:
    """Refuse a micro-batch that does not divide a rank's part of the global batch.

    Raises:
        DataError: It does not.
    """
    images = global_batch // world_size
    if micro_batch is not None and images % micro_batch:
        raise DataError(
            f"pretrain.micro_batch must divide a worker's part of the global batch, got {micro_batch} for {global_batch} "
            f"images over {world_size} workers: {images} each"
        )


def sizes_for_micro_batch(global_batch: int, world_sizes: Sequence[int], micro_batch: int | None) -> list[int]:
    """Return the numbers of ranks whose parts of the global batch the micro-batch divides.

    Raises:
        DataError: There is none.
    """
    found = [size for size in world_sizes if micro_batch is None or global_batch // size % micro_batch == 0]
    if not found:
        check_micro_batch(global_batch, world_sizes[0], micro_batch)
    return found


def world_sizes_between(global_batch: int, fewest: int, most: int) -> list[int]:
    """Return the numbers of ranks from `fewest` to `most` that can share a global batch.

    Raises:
        DataError: if there are none; names the possible numbers.
    """
    allowed = allowed_world_sizes(global_batch)
    found = [size for size in allowed if fewest <= size <= most]
    if not found:
        raise DataError(
            f"no number of ranks from {fewest} to {most} can share a global batch of {global_batch} "
            f"({num_lanes(global_batch)} lanes): use {', '.join(map(str, allowed))} ranks, or another global_batch"
        )
    return found


def steps_per_epoch(manifest: Manifest, global_batch: int) -> int:
    """Return the number of full global batches in one pass over a corpus.

    Raises:
        DataError: if the corpus is smaller than one global batch.
    """
    return _cached_order(manifest, seed=0, global_batch=global_batch).steps_per_epoch[0]


def global_batch(manifest: Manifest, *, seed: int, epoch: int, step: int, global_batch: int) -> Positions:
    """Return the sample positions of one global batch, int64 (G,), lane after lane.

    Args:
        manifest: Manifest of the corpus.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        step: Step within the epoch, 0 to `steps_per_epoch` - 1.
        global_batch: G, samples per step over all ranks.
    """
    return rank_batch(manifest, seed=seed, epoch=epoch, step=step, global_batch=global_batch, rank=0, world_size=1)


def rank_batch(
    manifest: Manifest, *, seed: int, epoch: int, step: int, global_batch: int, rank: int, world_size: int
) -> Positions:
    """Return one rank's part of `global_batch`: contiguous part number `rank` of `world_size` equal parts.

    Raises:
        DataError: if the corpus is too small, or the world size does not divide the lanes; names the sizes that do.
        ValueError: if step or rank is out of range.
    """
    order = _cached_order(manifest, seed=seed, global_batch=global_batch)
    (num_steps,) = order.steps_per_epoch
    if not 0 <= step < num_steps:
        raise ValueError(f"step must be 0 to {num_steps - 1} within an epoch, got {step}")
    return order.samples(epoch * num_steps + step, rank=rank, world_size=world_size).positions


def locate(manifest: Manifest, positions: Positions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the shard in the manifest and of the sample in that shard, by position."""
    counts = np.asarray(counts_of(manifest), dtype=np.int64)
    ends = np.cumsum(counts)
    shards = np.asarray(np.searchsorted(ends, positions, side="right"), dtype=np.int64)
    return shards, positions - (ends - counts)[shards]


def counts_of(manifest: Manifest) -> list[int]:
    """Return the number of samples in each shard."""
    return [entry["num_samples"] for entry in manifest["shards"]]


_recent: list[tuple[Any, int, int, Order]] = []


def _cached_order(manifest: Manifest, *, seed: int, global_batch: int) -> Order:
    """Return the order of a manifest, from a small cache keyed by identity; cached manifests are referenced, so ids stay valid."""
    for shards, *rest, order in _recent:
        if shards is manifest["shards"] and rest == [seed, global_batch]:
            return order
    order = Order([counts_of(manifest)], seed=seed, global_batch=global_batch)
    _recent[:] = [(manifest["shards"], seed, global_batch, order), *_recent[:3]]
    return order


def _deal_lanes(weights: Sequence[float], num_lanes: int, names: Sequence[str] | None) -> tuple[Positions, Positions]:
    """Return for each lane its corpus, and its index among the lanes of that corpus; corpora are evenly interleaved."""
    credit = np.zeros(len(weights))
    owner = np.empty(num_lanes, dtype=np.int64)
    for lane in range(num_lanes):
        credit += np.asarray(weights, dtype=np.float64) / sum(weights)
        owner[lane] = credit.argmax()
        credit[owner[lane]] -= 1
    lanes = [int((owner == number).sum()) for number in range(len(weights))]
    if min(lanes) < 1:
        number = lanes.index(0)
        raise DataError(
            f"weights {', '.join(f'{weight:g}' for weight in weights)} give "
            f"{f'corpus number {number + 1}' if names is None else names[number]} less than one of the {num_lanes} lanes of a batch: "
            "raise its weight, or global_batch"
        )
    return owner, np.asarray([int((owner[:lane] == owner[lane]).sum()) for lane in range(num_lanes)], dtype=np.int64)


def _permute_index(index: Words, length: int, keys: Words) -> Words:
    """Permute 0..length - 1, differently for each key."""
    bits = (length - 1).bit_length()
    result = _apply_feistel(index, bits, keys)
    while (outside := result >= length).any():  # less than half of the domain, so two rounds on average
        result[outside] = _apply_feistel(result[outside], bits, keys[outside])
    return result


def _apply_feistel(index: Words, bits: int, keys: Words) -> Words:
    """Permute 0..2**bits - 1 by a Feistel network."""
    shift = np.uint64((bits + 1) // 2)
    low_mask, high_mask = np.uint64((1 << int(shift)) - 1), np.uint64((1 << (bits // 2)) - 1)
    high, low = index >> shift, index & low_mask
    for number in range(_ROUNDS):
        high = high ^ (_mix_words(low ^ keys ^ np.uint64(2 * number + 1 << 32)) & high_mask)
        low = low ^ (_mix_words(high ^ keys ^ np.uint64(2 * number + 2 << 32)) & low_mask)
    return high << shift | low


def _mix_words(words: Words) -> Words:
    """Scramble 64-bit words bijectively. Source: Steele et al. 2014, SplitMix64, doi:10.1145/2660193.2660195."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
