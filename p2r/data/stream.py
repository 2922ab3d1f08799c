"""Corpora -> an endless stream of (batch, state), with samples read, checked and decoded ahead of use.

`order` alone determines the samples; threads affect only timing. So the state is a step number plus the identity of the
stream, and a resumed run gets, bit for bit, the batches of an uninterrupted one. Loading uses threads, because reading,
checking and decompressing release the GIL. Processes are avoided: their number could leak into the order, and object storage
clients do not survive a fork.
"""

import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from p2r.cache import node_cache
from p2r.config import ImageConfig
from p2r.counters import Counters
from p2r.data.batch import Batch
from p2r.data.batch import Replaced as Replaced
from p2r.data.fetch import OpenShards
from p2r.data.loader import Loader
from p2r.data.loader import Quarantine as Quarantine
from p2r.data.manifest import Manifest, manifest_sha256
from p2r.data.order import ORDER, Order, check_world_size
from p2r.data.parts import Balance
from p2r.errors import CheckpointError, DataError
from p2r.storage import Storage


@dataclass(frozen=True)
class Corpus:
    """A corpus to stream from, at one revision."""

    storage: Storage
    manifest: Manifest
    weight: float | None = None
    """Weight in every batch relative to the other corpora; None for all corpora: proportional to their sizes."""
    contrast: str | None = None
    """Name of the contrast of its records, if they do not state it."""


@dataclass(frozen=True)
class StreamState:
    """Position of a stream: the complete data state for a checkpoint."""

    corpora: tuple[tuple[str, float | None], ...]
    """Revision (the manifest's SHA-256) and weight of each corpus."""
    seed: int
    """Seed of the order."""
    global_batch: int
    """Samples per step over all ranks."""
    neighbours: float = 0.0
    """Fraction of samples that are the neighbour of another sample."""
    balance: Mapping[str, Any] | None = None
    """Property by which the corpora are balanced, and the weight of each of its values; None: not balanced."""
    step: int = 0
    """Batches consumed since the run began, over all epochs."""

    def to_dict(self) -> dict[str, object]:
        """Return the state for a checkpoint, along with the version of the order."""
        return {
            "order": ORDER,
            "corpora": [{"manifest_sha256": sha256, "weight": weight} for sha256, weight in self.corpora],
            "seed": self.seed,
            "global_batch": self.global_batch,
            "neighbours": self.neighbours,
            **({} if self.balance is None else {"balance": dict(self.balance)}),
            "step": self.step,
        }

    def resumed(self, value: Mapping[str, Any]) -> "StreamState":
        """Return the state in a checkpoint, after checking that it belongs to this stream.

        Raises:
            CheckpointError: if it belongs to another stream; resuming would repeat some samples and skip others.
        """
        if not isinstance(value.get("step"), int) or value["step"] < 0:
            raise CheckpointError(f"the stream state has no valid step: {value.get('step')!r}")
        expected_state = {"balance": None, **self.to_dict(), "step": value["step"]}
        if unknown := sorted(value.keys() - expected_state.keys()):
            raise CheckpointError(
                f"the checkpoint's data stream has {', '.join(unknown)}, which this version of p2r does not know: resume with the "
                "version that wrote it, or start from the weights with --fork NAME"
            )
        # A version that had no such key behaved like its default.
        saved = {field.name: field.default for field in fields(self) if field.default is not MISSING} | dict(value)
        for name, expected in expected_state.items():
            if saved.get(name) != expected:
                raise CheckpointError(
                    f"the checkpoint's data stream has {name} {saved.get(name)!r}, this run has {expected!r}: "
                    "resume with the same corpus, seed and global batch, or start from the weights with --fork NAME"
                )
        return replace(self, step=value["step"])


def stream(
    corpora: Corpus | Sequence[Corpus],
    *,
    image: ImageConfig,
    seed: int,
    global_batch: int,
    contrasts: tuple[str, ...] | None = None,
    rank: int = 0,
    world_size: int = 1,
    state: StreamState | None = None,
    neighbours: float = 0.0,
    balance: Balance | None = None,
    frames_apart: int = 0,
    quarantine: Quarantine = Quarantine(),  # noqa: B008 (frozen)
    counters: Counters | None = None,
    num_threads: int = 2,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Generator[tuple[Batch, StreamState], None, None]:
    """Yield this rank's batches endlessly, each with the state to save after it.

    Args:
        corpora: Corpora to mix, by weight.
        image: The network's grid.
        seed: Seed of the order.
        global_batch: Samples per step over all ranks.
        contrasts: Names of the contrasts of an image, in the order of its channels; None: records have one without a name.
        rank: Rank of this process.
        world_size: Number of ranks; must divide the lanes of the order.
        state: State to resume from; None: start from the beginning.
        neighbours: Fraction of samples, at most 0.5, that are the next slice of the previous sample.
        balance: Parts of the corpora to mix in place of the corpora, from `read_balance`; then a sample's position counts those of all
            parts.
        frames_apart: Also read another frame of each sample's series, at most this far away: see `Batch.prepare_frames`. 0: none.
        quarantine: Policy for damaged samples.
        counters: Receives the event counts.
        num_threads: Number of batches decoded at the same time.
        prefetch: Number of batches that are ready or being loaded ahead of the consumer.
        pin_memory: Decode into pinned memory, for asynchronous copies to a GPU.

    Raises:
        DataError: immediately for an unsuitable corpus or world size; later for more damage than the quarantine allows.
        StorageError: if a shard cannot be fetched.
        CheckpointError: if `state` belongs to another stream.
    """
    corpora = [corpora] if isinstance(corpora, Corpus) else list(corpora)
    counters = counters or Counters()
    fresh = stream_state(corpora, seed=seed, global_batch=global_batch, neighbours=neighbours, balance=balance)
    if state is not None:
        fresh.resumed(state.to_dict())
    for corpus in corpora:
        check_contrasts(corpus, contrasts)
    _refuse_absent_contrasts(corpora, contrasts)
    order = order_of(corpora, image=image, seed=seed, global_batch=global_batch, balance=balance)
    check_world_size(global_batch, world_size)
    cache = node_cache(counters) if not all(corpus.storage.is_local for corpus in corpora) else None
    shards = [OpenShards(corpus.storage, corpus.manifest, cache=cache, counters=counters) for corpus in corpora]
    loader = Loader(
        shards if balance is None else balance.open(shards),
        order,
        image=image,
        seed=seed,
        contrasts=contrasts,
        names=[corpus.contrast for corpus in corpora] if balance is None else [None] * len(balance.values),
        share=range(rank * global_batch // world_size, (rank + 1) * global_batch // world_size),
        neighbours=neighbours,
        frames_apart=frames_apart,
        quarantine=quarantine,
        counters=counters,
        pin_memory=pin_memory,
    )
    return _load_ahead(loader, state or fresh, counters, num_threads=num_threads, depth=max(prefetch, num_threads))


def stream_state(
    corpora: Sequence[Corpus],
    *,
    seed: int,
    global_batch: int,
    neighbours: float = 0.0,
    balance: Balance | None = None,
) -> StreamState:
    """Return the initial state of a stream."""
    return StreamState(
        corpora=tuple((manifest_sha256(corpus.manifest), corpus.weight) for corpus in corpora),
        seed=seed,
        global_batch=global_batch,
        neighbours=neighbours,
        balance=None if balance is None else balance.to_dict(),
    )


def check_contrasts(corpus: Corpus, contrasts: tuple[str, ...] | None) -> None:
    """Refuse a corpus that does not have the contrasts of a network.

    Raises:
        DataError: if only one of the two has named contrasts, or the corpus has none of the network's.
    """
    known = corpus.manifest.facts.contrasts
    named = ", ".join(known or ())
    if known is not None and corpus.contrast is not None:
        raise DataError(f"{corpus.storage.url} has the contrasts {named}: leave contrast out of pretrain.corpus")
    if contrasts is None and known is not None:
        raise DataError(
            f"{corpus.storage.url} has the contrasts {named}: choose some of them in pretrain.model.contrasts"
        )
    if contrasts is None:
        return
    if known is None and corpus.contrast is None:
        raise DataError(
            f"{corpus.storage.url} has no named contrasts, pretrain.model.contrasts are {', '.join(contrasts)}: ingest it with "
            "ingest.sessions, or name its contrast in pretrain.corpus"
        )
    if _contrasts_of(corpus).isdisjoint(contrasts):
        raise DataError(
            f"{corpus.storage.url} has none of the contrasts {', '.join(contrasts)} (pretrain.model.contrasts); it has "
            f"{named or corpus.contrast}"
        )


def _refuse_absent_contrasts(corpora: Sequence[Corpus], contrasts: tuple[str, ...] | None) -> None:
    """Refuse contrasts that no corpus has: the network would never see them, and its backbone would claim to read them."""
    found = frozenset[str]().union(*map(_contrasts_of, corpora))
    if absent := [name for name in contrasts or () if name not in found]:
        raise DataError(
            f"no scan of {', '.join(corpus.storage.url for corpus in corpora)} has the contrast {', '.join(absent)} "
            f"(pretrain.model.contrasts); there are {', '.join(sorted(found))}: leave it out, or add such scans"
        )


def _contrasts_of(corpus: Corpus) -> frozenset[str]:
    """Return the contrasts of a corpus's records."""
    known = corpus.manifest.facts.contrasts or {}
    return frozenset(name for name, count in known.items() if count) | ({corpus.contrast} if corpus.contrast else set())


def order_of(
    corpora: Sequence[Corpus], *, image: ImageConfig, seed: int, global_batch: int, balance: Balance | None = None
) -> Order:
    """Return the order of a stream: of slices, or of patches (`patches_per_volume` of each volume).

    Raises:
        DataError: if a corpus or a part is too small, or only some of the corpora have a weight.
    """
    if balance is not None:
        return balance.order(seed=seed, global_batch=global_batch)
    weights = [corpus.weight for corpus in corpora if corpus.weight is not None]
    if len(weights) not in (0, len(corpora)):
        raise DataError("give a weight to every corpus, or to none of them")
    counts = [
        [
            shard.num_samples if image.dimensions == 2 else shard.num_volumes * image.patches_per_volume
            for shard in corpus.manifest.shards
        ]
        for corpus in corpora
    ]
    return Order(counts, seed=seed, global_batch=global_batch, weights=weights or None)


def _load_ahead(
    loader: Loader, state: StreamState, counters: Counters, *, num_threads: int, depth: int
) -> Generator[tuple[Batch, StreamState], None, None]:
    """Load up to `depth` steps ahead on threads, and yield them in order. Closing the generator stops the threads."""
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
