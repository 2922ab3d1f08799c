"""Corpora -> an endless stream of (batch, state): samples read, checked and decoded ahead of need.

Which samples come is decided by `order` alone; threads only decide when. So the state is a step number, and what names
the stream: a run that resumes from it gets, bit for bit, the batches that it would have got. Threads, because reading,
checking and decompressing release the interpreter; no processes, whose number could leak into the order, and which
clients of object storage do not survive when forked.
"""

import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from p2r.cache import node_cache
from p2r.config import ImageConfig
from p2r.counters import Counters
from p2r.data.batch import Batch
from p2r.data.batch import Replaced as Replaced
from p2r.data.fetch import OpenShards
from p2r.data.loader import Loader
from p2r.data.loader import Quarantine as Quarantine
from p2r.data.manifest import manifest_sha256
from p2r.data.order import ORDER, Order, check_world_size
from p2r.errors import CheckpointError, DataError
from p2r.storage import Storage


@dataclass(frozen=True)
class Corpus:
    """A corpus to stream from, at one revision."""

    storage: Storage
    manifest: Mapping[str, Any]
    weight: float | None = None
    """Part in every batch, relative to the other corpora's; None for all: in proportion to their sizes."""


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands: everything that a checkpoint has to hold of the data."""

    corpora: tuple[tuple[str, float | None], ...]
    """Revision (the manifest's SHA-256) and weight of each corpus."""
    seed: int
    """Of the order."""
    global_batch: int
    """Samples per step over all ranks."""
    neighbours: float = 0.0
    """Share of samples that are the neighbour of another."""
    step: int = 0
    """Batches taken since the run began, over all epochs."""

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint; names the order, too."""
        return {
            "order": ORDER,
            "corpora": [{"manifest_sha256": sha256, "weight": weight} for sha256, weight in self.corpora],
            "seed": self.seed,
            "global_batch": self.global_batch,
            "neighbours": self.neighbours,
            "step": self.step,
        }

    def resumed(self, value: Mapping[str, Any]) -> "StreamState":
        """Return the state in a checkpoint, if it belongs to the stream that this state names.

        Raises:
            CheckpointError: It belongs to another stream; going on would repeat some samples and skip others.
        """
        if not isinstance(value.get("step"), int) or value["step"] < 0:
            raise CheckpointError(f"the stream state has no valid step: {value.get('step')!r}")
        for name, expected in {**self.to_dict(), "step": value["step"]}.items():
            if value.get(name) != expected:
                raise CheckpointError(
                    f"the checkpoint's data stream has {name} {value.get(name)!r}, this run has {expected!r}: "
                    "resume with the same corpus, seed and global batch, or start a new run from the weights with --fork NAME"
                )
        return replace(self, step=value["step"])


def stream(
    corpora: Corpus | Sequence[Corpus],
    *,
    image: ImageConfig,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    state: StreamState | None = None,
    neighbours: float = 0.0,
    quarantine: Quarantine = Quarantine(),  # noqa: B008 (frozen)
    counters: Counters | None = None,
    num_threads: int = 2,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Generator[tuple[Batch, StreamState], None, None]:
    """Yield this rank's batches for ever, each with the state to save after it.

    Args:
        corpora: What to stream, by weight.
        image: The network's grid.
        seed: Of the order.
        global_batch: Samples per step over all ranks.
        rank: This process.
        world_size: All processes; must divide the lanes of the order.
        state: Go on from here; None: from the beginning.
        neighbours: Share of samples, at most a half, that are the next plane of the sample before.
        quarantine: What becomes of damaged samples.
        counters: Receives what happens.
        num_threads: Batches decoded at the same time.
        prefetch: Batches ready or in work ahead of the consumer.
        pin_memory: Decode into memory from which a GPU copies on its own.

    Raises:
        DataError: At once for a corpus or world size that cannot be; later for damage that the quarantine does not take.
        StorageError: For shards that cannot be had.
        CheckpointError: `state` belongs to another stream.
    """
    corpora = [corpora] if isinstance(corpora, Corpus) else list(corpora)
    counters = counters or Counters()
    fresh = stream_state(corpora, seed=seed, global_batch=global_batch, neighbours=neighbours)
    if state is not None:
        fresh.resumed(state.to_dict())
    order = order_of(corpora, image=image, seed=seed, global_batch=global_batch)
    check_world_size(global_batch, world_size)
    cache = node_cache(counters) if not all(corpus.storage.is_local for corpus in corpora) else None
    loader = Loader(
        [OpenShards(corpus.storage, corpus.manifest, cache=cache, counters=counters) for corpus in corpora],
        order,
        image=image,
        seed=seed,
        share=range(rank * global_batch // world_size, (rank + 1) * global_batch // world_size),
        neighbours=neighbours,
        quarantine=quarantine,
        counters=counters,
        pin_memory=pin_memory,
    )
    return _ahead(loader, state or fresh, counters, num_threads=num_threads, depth=max(prefetch, num_threads))


def stream_state(corpora: Sequence[Corpus], *, seed: int, global_batch: int, neighbours: float = 0.0) -> StreamState:
    """Return the state at the beginning of a stream."""
    return StreamState(
        corpora=tuple((manifest_sha256(corpus.manifest), corpus.weight) for corpus in corpora),
        seed=seed,
        global_batch=global_batch,
        neighbours=neighbours,
    )


def order_of(corpora: Sequence[Corpus], *, image: ImageConfig, seed: int, global_batch: int) -> Order:
    """Return the order of a stream: of planes; or of patches, of which each volume gives some.

    Raises:
        DataError: A corpus is too small, or some corpora have a weight and others have none.
    """
    weights = [corpus.weight for corpus in corpora if corpus.weight is not None]
    if len(weights) not in (0, len(corpora)):
        raise DataError("give a weight to every corpus, or to none of them")
    name, times = ("num_samples", 1) if image.dimensions == 2 else ("num_volumes", image.patches_per_volume)
    counts = [[entry[name] * times for entry in corpus.manifest["shards"]] for corpus in corpora]
    return Order(counts, seed=seed, global_batch=global_batch, weights=weights or None)


def _ahead(
    loader: Loader, state: StreamState, counters: Counters, *, num_threads: int, depth: int
) -> Generator[tuple[Batch, StreamState], None, None]:
    """Load steps on threads, `depth` of them ahead; yield in order. Closing the generator ends the threads."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="p2r-stream")
    waiting: deque[Future[Batch]] = deque()
    try:
        while True:
            while len(waiting) < depth:
                loader.plan(state.step + len(waiting))
                waiting.append(pool.submit(loader.load, state.step + len(waiting)))
            num_ready = sum(future.done() for future in waiting)
            began = time.perf_counter()
            batch = waiting.popleft().result()
            wait_s = time.perf_counter() - began
            counters.add("wait_seconds", wait_s)
            counters.add("batches")
            counters.add("ready_batches", num_ready)
            loader.done(state.step)
            state = replace(state, step=state.step + 1)
            yield replace(batch, wait_s=wait_s, num_ready=num_ready), state
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        loader.close()
