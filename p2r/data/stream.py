"""A corpus -> an endless stream of (batch, state): planes read, checked and made into images ahead of need.

Which planes come is decided by `order` alone; threads only decide when. So the state is a step number, and what names
the stream: a run that resumes from it gets, bit for bit, the batches that it would have got. Threads, because reading
and decompressing release the interpreter; no processes, whose number could leak into the order, and which object
storage clients do not survive when forked.

Shapes: B images of this rank, H = W = `image.size`.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import ImageConfig
from p2r.data.manifest import manifest_sha256
from p2r.data.order import ORDER, check_world_size, locate, rank_batch, steps_per_epoch
from p2r.data.preprocess import intensity_window, plane_spacing, prepare
from p2r.data.shards import ShardReader, local_ranges, read_index
from p2r.errors import CheckpointError
from p2r.storage import Storage

_MAX_OPEN_SHARDS = 256  # file descriptors; a plane finds its shard open as long as the rank has no more lanes than this


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands: everything that a checkpoint has to hold of the data.

    Attributes:
        manifest_sha256: The corpus's revision.
        seed: Of the order.
        global_batch: Samples per step over all ranks.
        step: Batches taken since the run began, over all epochs.
    """

    manifest_sha256: str
    seed: int
    global_batch: int
    step: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint; names the order, too."""
        return {
            "order": ORDER,
            "manifest_sha256": self.manifest_sha256,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "step": self.step,
        }

    @classmethod
    def from_dict(
        cls, value: Mapping[str, Any], *, manifest: Mapping[str, Any], seed: int, global_batch: int
    ) -> "StreamState":
        """Read back what `to_dict` gave, for a run with this corpus, seed and global batch.

        Raises:
            CheckpointError: It belongs to another stream; going on would repeat some samples and skip others.
        """
        fresh = cls(manifest_sha256=manifest_sha256(manifest), seed=seed, global_batch=global_batch)
        if not isinstance(value.get("step"), int) or value["step"] < 0:
            raise CheckpointError(f"the stream state has no valid step: {value.get('step')!r}")
        _check_same({**fresh.to_dict(), "step": value["step"]}, value)
        return replace(fresh, step=value["step"])


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        image: (B, 1, H, W) float32 in [0, 1].
        inside: (B, H, W) bool, True where a pixel belongs to the scan.
        positions: (B,) int64, the samples' positions in the corpus: keys for augmentation.
        epoch: Of these samples, from 0.
        spacing_mm: Pixel size.
        wait_s: How long the consumer stood still for this batch.
    """

    image: Tensor
    inside: Tensor
    positions: NDArray[np.int64]
    epoch: int
    spacing_mm: float
    wait_s: float


def stream(
    storage: Storage,
    manifest: Mapping[str, Any],
    *,
    image: ImageConfig,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    state: StreamState | None = None,
    num_threads: int = 2,
    prefetch: int = 2,
) -> Generator[tuple[Batch, StreamState], None, None]:
    """Yield this rank's batches for ever, each with the state to save after it.

    Args:
        storage: Of the corpus.
        manifest: Of the corpus.
        image: The network's grid.
        seed: Of the order.
        global_batch: Samples per step over all ranks.
        rank: This process.
        world_size: All processes; must divide the lanes of the order.
        state: Go on from here; None: from the beginning.
        num_threads: Batches decoded at the same time.
        prefetch: Batches ready or in work ahead of the consumer.

    Raises:
        DataError: At once for a corpus or world size that cannot be; later for a damaged shard.
        CheckpointError: `state` belongs to another stream.
    """
    fresh = StreamState(manifest_sha256=manifest_sha256(manifest), seed=seed, global_batch=global_batch)
    if state is not None:
        _check_same({**fresh.to_dict(), "step": state.step}, state.to_dict())
    num_steps = steps_per_epoch(manifest, global_batch)
    check_world_size(global_batch, world_size)
    shards = _Shards(storage, manifest)

    def load(step: int) -> Batch:
        epoch, step_of_epoch = divmod(step, num_steps)
        positions = rank_batch(
            manifest,
            seed=seed,
            epoch=epoch,
            step=step_of_epoch,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
        )
        planes = [
            _load_plane(shards.reader(shard), sample, image) for shard, sample in zip(*_located(positions), strict=True)
        ]
        return Batch(
            image=torch.cat([plane for plane, _ in planes]),
            inside=torch.cat([inside for _, inside in planes]),
            positions=positions,
            epoch=epoch,
            spacing_mm=image.spacing_mm,
            wait_s=0.0,
        )

    def _located(positions: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        numbers, samples = locate(manifest, positions)
        return numbers.tolist(), samples.tolist()

    return _ahead(load, fresh if state is None else state, num_threads=num_threads, depth=max(prefetch, num_threads))


def _ahead(
    load: Any, state: StreamState, *, num_threads: int, depth: int
) -> Generator[tuple[Batch, StreamState], None, None]:
    """Run `load(step)` on threads, `depth` steps ahead; yield in order. Closing the generator ends the threads."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="p2r-stream")
    waiting: deque[Future[Batch]] = deque()
    try:
        while True:
            while len(waiting) < depth:
                waiting.append(pool.submit(load, state.step + len(waiting)))
            began = time.perf_counter()
            batch = waiting.popleft().result()
            state = replace(state, step=state.step + 1)
            yield replace(batch, wait_s=time.perf_counter() - began), state
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _load_plane(reader: ShardReader, sample: int, image: ImageConfig) -> tuple[Tensor, Tensor]:
    row, _ = reader.locate(sample)
    spacing_mm = plane_spacing(row.spacing_mm, row.slice_axis)
    planes = reader.read_plane(sample)[None]
    window = intensity_window(row.percentiles, image.intensity_percentiles)
    return prepare(planes, window, spacing_mm, target_mm=image.spacing_mm, size=image.size)


class _Shards:
    """Readers of the shards in use, opened on first need; fetching one does not hold up the others."""

    def __init__(self, storage: Storage, manifest: Mapping[str, Any]) -> None:
        self._storage = storage
        self._entries = manifest["shards"]
        self._open: OrderedDict[int, Future[ShardReader]] = OrderedDict()
        self._lock = threading.Lock()

    def reader(self, number: int) -> ShardReader:
        with self._lock:
            future = self._open.get(number)
            is_mine = future is None
            if future is None:
                future = self._open[number] = Future()
            self._open.move_to_end(number)
            while len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)  # a thread that still reads it keeps it open
        if is_mine:
            try:
                future.set_result(self._fetch(number))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _fetch(self, number: int) -> ShardReader:
        entry = self._entries[number]
        index = self._storage.local(entry["name"].removesuffix(".tar") + ".idx", sha256=entry["index_sha256"])
        tar = self._storage.local(entry["name"], sha256=entry["sha256"], num_bytes=entry["num_bytes"])
        return ShardReader(str(tar), read_index(index, sha256=entry["index_sha256"]), local_ranges(tar))


def _check_same(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"the checkpoint's data stream has {name} {found.get(name)!r}, this run has {value!r}: "
                "resume with the same corpus, seed and global batch, or start a new run"
            )
