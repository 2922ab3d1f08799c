"""A step of the order -> one rank's batch: located, read, checked and decoded; damaged samples are replaced and counted.

The replacement of a damaged sample depends only on the sample's own position, so that all runs choose the same one.

Shapes: B samples of this rank of C contrasts each, b of these on one grid; T P h w as in `shards`.
"""

import math
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import ImageConfig
from p2r.counters import Counters
from p2r.data.batch import Batch, Group, Replaced
from p2r.data.grids import check_plane
from p2r.data.index import Box, IndexRow, covered_box
from p2r.data.order import Order, Samples
from p2r.data.parts import Shards
from p2r.data.patches import choose_patch
from p2r.data.preparation import intensity_window, plane_spacing
from p2r.data.shards import ShardReader
from p2r.errors import DataError
from p2r.randomness import keyed_generator

Array = NDArray[Any]

_window = lru_cache(maxsize=4096)(intensity_window)
_LOOKAHEAD_STEPS = 32  # remote shards are prefetched up to this number of steps ahead
_BLOCK_STEPS = 16  # the order is computed in blocks of this number of steps
_RANGE_THREADS = 16  # concurrent requests where chunks are read by ranges
_SPARE_BUFFERS = 2  # kept in addition to the buffers in use
_MAX_REPLACEMENTS = 8  # samples tried in place of a damaged one


@dataclass(frozen=True)
class Quarantine:
    """Policy for damaged samples."""

    max_replaced: int = 0
    """Number of samples that are replaced before the stream stops."""
    on_replaced: Callable[[Replaced], None] | None = None
    """Called once for each replaced sample, on any thread."""


class _Place(NamedTuple):
    """Location of a sample."""

    corpus: int
    shard: int
    sample: int
    epoch: int


class _Part(NamedTuple):
    """The part of a record that is read for a sample."""

    reader: ShardReader
    row: IndexRow
    number: int
    """Index of the slice in its record, or of the patch's frame."""
    box: Box | None = None
    """Patches only: slices, rows, columns."""
    centre: tuple[float, ...] = ()
    """Patches only: centre in voxels of the box, along X, Y, Z."""

    @property
    def covered(self) -> Array:
        """Voxels of the slice, or of the box, inside the scan as acquired."""
        row = self.row
        if self.box is not None:
            return covered_box(row, self.box)
        plane = self.number % row.stored_shape[1]
        covered: Array = covered_box(row, (slice(plane, plane + 1), *row.whole[1:]))[0]
        return covered

    @property
    def grid(self) -> tuple[Any, ...]:
        """Key that is equal for samples stacked in one array; a patch is never stacked."""
        return self.row.plane_grid if self.box is None else (id(self),)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice, or of the box."""
        if self.box is None:
            return self.row.stored_shape[2:]
        return tuple(side.stop - side.start for side in self.box)

    def read(self, reader: ShardReader, out: Array) -> None:
        """Read the sample into `out`."""
        if self.box is None:
            reader.read_located(self.row, self.number, out)
        else:
            reader.read_box(self.row, self.number, self.box, out)


class _Buffers:
    """Reusable memory: buffers of earlier batches that are no longer referenced.

    New memory costs a page fault every 4 KiB; for large batches these take longer than decoding.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: list[NDArray[np.uint8]] = []

    def take(self, num_bytes: int) -> Tensor:
        """Return uninitialised memory, (num_bytes,) uint8; it is not reused while any view of it exists."""
        with self._lock:
            held: list[NDArray[np.uint8]] = []
            free: list[NDArray[np.uint8]] = []
            for buffer in self._buffers:
                # Every view holds a reference, tensors too. The three counted here: the list, the loop variable, the call.
                (free if sys.getrefcount(buffer) == 3 else held).append(buffer)
            free.sort(key=len)
            fitting = next((index for index, buffer in enumerate(free) if len(buffer) >= num_bytes), None)
            chosen = free.pop(fitting) if fitting is not None else np.empty(_round_up(num_bytes), np.uint8)
            self._buffers = [*held, *free[-_SPARE_BUFFERS:], chosen]
            return torch.from_numpy(chosen[:num_bytes])


class Loader:
    """Loader of the batch of any step. Thread-safe.

    Args:
        shards: Open shards of each corpus, or of each part of them.
        order: Sample order of the run.
        image: The network's grid.
        seed: Seed of the run.
        contrasts: Names of the contrasts to read, in the order of the channels; None: records have one without a name.
        names: For each corpus, the name of the contrast of records that do not state it.
        share: This rank's samples of each global batch.
        neighbours: Fraction of samples that are the neighbour of the previous sample.
        frames_apart: Largest distance of the other frame that is read for each sample of a series; 0: none is read.
        quarantine: Policy for damaged samples.
        counters: Receives the event counts.
        pin_memory: Decode into pinned memory.
    """

    def __init__(
        self,
        shards: Sequence[Shards],
        order: Order,
        *,
        image: ImageConfig,
        seed: int,
        contrasts: tuple[str, ...] | None,
        names: Sequence[str | None],
        share: range,
        neighbours: float,
        frames_apart: int,
        quarantine: Quarantine,
        counters: Counters,
        pin_memory: bool,
    ) -> None:
        self._shards, self._order, self._image, self._seed = shards, order, image, seed
        self._share, self._neighbours, self._pin_memory = share, neighbours, pin_memory
        self._contrasts, self._names = contrasts, names
        self._frames_apart = frames_apart
        self._num_contrasts = 1 if contrasts is None else len(contrasts)
        self._num_channels = self._num_contrasts * (2 if frames_apart else 1)
        # The first of a pair of neighbours may belong to another rank.
        self._numbers = range(share.start - (share.start % 2 if neighbours else 0), share.stop)
        self._quarantine, self._counters = quarantine, counters
        self._replaced: set[_Place] = set()
        self._buffers = _Buffers()
        self._lock = threading.Lock()
        self._cached_block = lru_cache(maxsize=8)(self._order_block)
        self._last_planned = -1
        self._is_remote = any(source.is_remote for source in shards)
        self._requests = ThreadPoolExecutor(_RANGE_THREADS, thread_name_prefix="p2r-stream-range")

    def close(self) -> None:
        """Stop the threads."""
        self._requests.shutdown(wait=True, cancel_futures=True)
        for source in self._shards:
            source.close()

    def plan(self, step: int) -> None:
        """Start fetching the shards of this step and the next `_LOOKAHEAD_STEPS`."""
        if not self._is_remote:
            return
        last = step + _LOOKAHEAD_STEPS
        for later in range(max(step, self._last_planned + 1), last + 1):
            corpora, shards, _ = self._order.locate(self._ordered_samples(later).positions)
            for number, source in enumerate(self._shards):
                source.plan(later, np.unique(shards[corpora == number]).tolist())
        self._last_planned = max(self._last_planned, last)

    def done(self, step: int) -> None:
        """Mark the batch of a step as consumed."""
        for source in self._shards:
            source.done(step)

    def load(self, step: int) -> Batch:
        """Read the batch of a step.

        Raises:
            DataError: if more samples are damaged than the quarantine allows, or a whole shard is.
            StorageError: if a shard cannot be fetched.
        """
        began = time.perf_counter()
        positions, epochs = self._choose_samples(step)
        places, parts = self._locate_batch(positions, epochs)
        together: dict[Any, list[int]] = defaultdict(list)
        for channel, part in parts.items():
            together[part.grid].append(channel)
        arrays = self._allocate([(parts[members[0]], len(members)) for members in together.values()])
        voxels = dict(zip(together, arrays, strict=True))
        jobs = {
            channel: (places[channel // self._num_channels], parts[channel], out)
            for grid, members in together.items()
            for channel, out in zip(members, voxels[grid].numpy(), strict=True)
        }
        damage: dict[int, DataError] = {}  # by sample
        for channel, error in self._read_all(jobs).items():
            damage.setdefault(channel // self._num_channels, error)
        groups = []
        for grid, members in together.items():
            sound = [row for row, channel in enumerate(members) if channel // self._num_channels not in damage]
            if sound:
                array = voxels[grid] if len(sound) == len(members) else voxels[grid][sound]
                groups.append(
                    self._make_group([members[row] for row in sound], [parts[members[row]] for row in sound], array)
                )
        replaced = self._replace_damaged(damage, places, parts, positions, groups)
        self._counters.add("decode_seconds", time.perf_counter() - began)
        return Batch(
            tuple(groups),
            positions,
            epochs,
            self._image,
            replaced=replaced,
            contrasts=self._contrasts,
            present=self._mark_present(parts, len(places)),
            has_other_frame=self._mark_other_frames(parts, len(places)),
        )

    def _locate_batch(
        self, positions: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> tuple[list[_Place], dict[int, _Part]]:
        """Return the place of each sample, and the parts to read by channel of the batch, see `Group.index`.

        Positions of samples without any of the contrasts are exchanged in place.
        """
        located = zip(*(part.tolist() for part in self._order.locate(positions)), epochs.tolist(), strict=True)
        places = [_Place(*place) for place in located]
        needed = {(place.corpus, place.shard) for place in places}
        readers = {(corpus, shard): self._shards[corpus].reader(shard) for corpus, shard in needed}
        parts: dict[int, _Part] = {}
        for index, place in enumerate(places):
            reader = readers[place.corpus, place.shard]
            if self._contrasts is None:
                found = self._locate_contrasts(place, reader)
            else:
                places[index], found = self._locate_sample(place, reader)
                positions[index] += places[index].sample - place.sample
            parts |= {index * self._num_channels + channel: part for channel, part in found.items()}
        return places, parts

    def _replace_damaged(
        self,
        damage: Mapping[int, DataError],
        places: Sequence[_Place],
        parts: dict[int, _Part],
        positions: NDArray[np.int64],
        groups: list[Group],
    ) -> tuple[Replaced, ...]:
        """Read other samples in place of damaged ones: changes parts and positions, appends to groups, returns the notes."""
        replaced = []
        for index, error in damage.items():
            others, note = self._read_replacement(places[index], error)
            first = index * self._num_channels
            for channel in range(first, first + self._num_channels):
                parts.pop(channel, None)
            for contrast, (part, array) in others.items():
                parts[first + contrast] = part
                groups.append(self._make_group([first + contrast], [part], array))
            positions[index] += note.by - note.sample
            replaced.append(note)
        return tuple(replaced)

    def _mark_present(self, parts: Mapping[int, _Part], num_samples: int) -> NDArray[np.bool_] | None:
        if self._contrasts is None:
            return None
        present = np.zeros(num_samples * self._num_channels, dtype=np.bool_)
        present[list(parts)] = True
        return present.reshape(num_samples, -1)[:, : self._num_contrasts]

    def _mark_other_frames(self, parts: Mapping[int, _Part], num_samples: int) -> NDArray[np.bool_] | None:
        if not self._frames_apart:
            return None
        read = np.zeros(num_samples * self._num_channels, dtype=np.bool_)
        read[list(parts)] = True
        return np.asarray(read.reshape(num_samples, -1)[:, self._num_contrasts :].any(1))

    def _locate_sample(self, place: _Place, reader: ShardReader) -> tuple[_Place, dict[int, _Part]]:
        """Return the parts to read for a sample by contrast; those of another sample if its record has none of the contrasts.

        The other sample is of the same shard, and depends only on the sample's own position. If no record of the shard has one of the
        contrasts, the sample has no parts.
        """
        parts = self._locate_contrasts(place, reader)
        if parts:
            return place, parts
        self._counters.add("samples_without_contrast")
        counts = np.array([num * self._has_contrast(place, reader, row) for row, num in self._samples_of(reader)])
        if not counts.sum():
            return place, {}
        generator = keyed_generator(self._seed, "contrast", place.corpus, place.epoch, place.shard, place.sample)
        number = int(generator.bit_generator.random_raw()) % int(counts.sum())
        record = int(np.searchsorted(np.cumsum(counts), number, side="right"))
        before = sum(num for _, num in self._samples_of(reader)[:record])
        other = place._replace(sample=before + number - int(counts[:record].sum()))
        return other, self._locate_contrasts(other, reader)

    def _locate_contrasts(self, place: _Place, reader: ShardReader) -> dict[int, _Part]:
        """Return the parts to read for a sample by contrast; those of its other frame follow."""
        part = self._locate_part(place, reader)
        if self._contrasts is None:
            parts = {0: part}
        else:
            rows = {row.contrast or self._names[place.corpus]: row for row in reader.volumes(part.row)}
            names = enumerate(self._contrasts)
            parts = {channel: part._replace(row=rows[name]) for channel, name in names if name in rows}
        number = self._choose_other_frame(place, part)
        if number is None:
            return parts
        others = {self._num_contrasts + channel: one._replace(number=number) for channel, one in parts.items()}
        return parts | others

    def _choose_other_frame(self, place: _Place, part: _Part) -> int | None:
        """Return `number` of the same slice or box in another frame of the series; None if there is none, or none is wanted."""
        num_frames, num_planes = part.row.shape[3], part.row.stored_shape[1]
        if not self._frames_apart or num_frames == 1:
            return None
        frame, plane = divmod(part.number, num_planes) if part.box is None else (part.number, 0)
        first, last = max(0, frame - self._frames_apart), min(num_frames - 1, frame + self._frames_apart)
        generator = keyed_generator(self._seed, "frame", place.corpus, place.epoch, place.shard, place.sample)
        other = first + int(generator.bit_generator.random_raw()) % (last - first)
        other += other >= frame
        return other * num_planes + plane if part.box is None else other

    def _has_contrast(self, place: _Place, reader: ShardReader, row: IndexRow) -> bool:
        names = {one.contrast or self._names[place.corpus] for one in reader.volumes(row)}
        return not names.isdisjoint(self._contrasts or ())

    def _samples_of(self, reader: ShardReader) -> list[tuple[IndexRow, int]]:
        """Return the number of samples of each record of a shard."""
        if self._image.dimensions == 2:
            return [(row, row.num_planes) for row in reader.records]
        return [(row, row.shape[3] * self._image.patches_per_volume) for row in reader.records]

    def _choose_samples(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return positions and epochs of this rank's samples; of pairs 2k, 2k + 1 of the global batch, the second may be a neighbour."""
        ordered, share = self._ordered_samples(step), 2 * self._neighbours
        positions, epochs = ordered.positions.copy(), ordered.epochs.copy()
        for index, number in enumerate(self._numbers if share else ()):
            if number % 2 and math.floor((number // 2 + 1) * share) > math.floor(number // 2 * share):
                positions[index] = self._find_neighbour(positions[index - 1], positions[index])
                epochs[index] = epochs[index - 1]
        extra = self._share.start - self._numbers.start
        return positions[extra:], epochs[extra:]

    def _ordered_samples(self, step: int) -> Samples:
        """Return the samples of a step in the order, before neighbours."""
        block, index = divmod(step, _BLOCK_STEPS)
        return self._cached_block(block)[index]

    def _order_block(self, block: int) -> list[Samples]:
        steps = range(block * _BLOCK_STEPS, (block + 1) * _BLOCK_STEPS)
        return self._order.slices(steps, self._numbers)

    def _find_neighbour(self, position: np.int64, otherwise: np.int64) -> np.int64:
        """Return the position of the next slice of the same frame, or of the previous slice if this is the last."""
        corpus, shard, sample = (int(part[0]) for part in self._order.locate(np.array([position])))
        row, number = self._shards[corpus].reader(shard).locate(sample)
        plane, num_planes = number % row.stored_shape[1], row.stored_shape[1]
        if num_planes == 1:
            return otherwise
        return position + 1 if plane + 1 < num_planes else position - 1

    def _locate_part(self, place: _Place, reader: ShardReader) -> _Part:
        if self._image.dimensions == 2:
            row, number = reader.locate(place.sample)
            check_plane(
                row.stored_shape[2:],
                plane_spacing(row.spacing_mm, row.slice_axis),
                target_mm=self._image.spacing_mm,
                name=f"{reader.name}: {row.key}",
            )
            return _Part(reader, row, number)
        row, frame = reader.locate_volume(place.sample // self._image.patches_per_volume)
        generator = keyed_generator(self._seed, "patch", place.corpus, place.epoch, place.shard, place.sample)
        try:
            return _Part(reader, row, frame, *choose_patch(row, self._image, generator))
        except DataError as error:
            raise DataError(f"{reader.name}: {error}") from None

    def _allocate(self, groups: Sequence[tuple[_Part, int]]) -> list[Tensor]:
        """Allocate an array for each (part, count): room for `count` samples of the shape and type of the part."""
        shapes = [(count, *part.shape) for part, count in groups]
        dtypes = [torch.from_numpy(np.empty(0, part.row.dtype)).dtype for part, _ in groups]
        if self._pin_memory:  # torch caches pinned memory for the next batch
            return [
                torch.empty(shape, dtype=dtype, pin_memory=True) for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        pieces = torch.split(self._buffers.take(sum(map(_align_size, sizes))), [_align_size(size) for size in sizes])
        return [
            piece[:size].view(dtype).view(shape)
            for piece, size, dtype, shape in zip(pieces, sizes, dtypes, shapes, strict=True)
        ]

    def _read_all(self, jobs: Mapping[int, tuple[_Place, _Part, Array]]) -> dict[int, DataError]:
        """Read samples into their arrays and return the errors by index; range requests run concurrently."""

        def attempt(job: tuple[_Place, _Part, Array]) -> DataError | None:
            try:
                self._read_part(*job)
            except DataError as error:
                return error
            return None

        places = {(place.corpus, place.shard) for place, _, _ in jobs.values()} if self._is_remote else ()
        by_range = any(self._shards[corpus].is_by_range(shard) for corpus, shard in places)
        results = self._requests.map(attempt, jobs.values()) if by_range else map(attempt, jobs.values())
        return {index: error for index, error in zip(jobs, results, strict=True) if error is not None}

    def _read_part(self, place: _Place, part: _Part, out: Array) -> None:
        try:
            part.read(part.reader, out)
        except DataError:
            self._shards[place.corpus].read_again(place.shard, lambda reader: part.read(reader, out))

    def _make_group(self, members: list[int], parts: list[_Part], voxels: Tensor) -> Group:
        row = parts[0].row
        windows = [_window(part.row.percentiles, self._image.intensity_percentiles) for part in parts]
        low, high = torch.tensor(windows, dtype=torch.float32).unbind(1)
        covered = None if row.coverage is None else torch.from_numpy(np.stack([part.covered for part in parts]))
        if self._image.dimensions == 2:
            spacing_mm = plane_spacing(row.spacing_mm, row.slice_axis)
            return Group(torch.tensor(members), voxels, low, high, spacing_mm, covered=covered)  # (b, h, w)
        canonical = torch.movedim(voxels, 1, 1 + row.slice_axis)  # (b, X, Y, Z)
        if covered is not None:
            covered = torch.movedim(covered, 1, 1 + row.slice_axis)
        return Group(torch.tensor(members), canonical, low, high, row.spacing_mm, parts[0].centre, covered=covered)

    def _read_replacement(self, place: _Place, error: DataError) -> tuple[dict[int, tuple[_Part, Tensor]], Replaced]:
        """Read another sample of the same shard in place of a damaged one: its parts and voxels by contrast."""
        count = self._order.num_samples(place.corpus, place.shard)
        generator = keyed_generator(self._seed, "replacement", place.corpus, place.epoch, place.shard, place.sample)
        for word in generator.bit_generator.random_raw(_MAX_REPLACEMENTS).tolist():
            other = _Place(place.corpus, place.shard, word % count, place.epoch)
            parts = self._locate_contrasts(other, self._shards[place.corpus].reader(place.shard))
            found = {channel: (part, self._allocate([(part, 1)])[0]) for channel, part in parts.items()}
            jobs = {channel: (other, part, voxels[0].numpy()) for channel, (part, voxels) in found.items()}
            if other != place and found and not self._read_all(jobs):
                note = Replaced(self._shards[place.corpus].name(place.shard), place.sample, other.sample, str(error))
                self._count_replacement(place, note, error)
                return found, note
        raise DataError(
            f"{_MAX_REPLACEMENTS} replacements of a damaged sample cannot be read either: {error}"
        ) from error

    def _count_replacement(self, place: _Place, note: Replaced, error: DataError) -> None:
        with self._lock:
            is_new = place not in self._replaced
            self._replaced.add(place)
            num_replaced = len(self._replaced)
        self._counters.add("replaced_records")
        if num_replaced > self._quarantine.max_replaced:
            limit = self._quarantine.max_replaced
            raise DataError(
                f"{error}" + (f"; {limit} damaged samples were replaced already, the most allowed" if limit else "")
            ) from error
        if is_new and self._quarantine.on_replaced is not None:
            self._quarantine.on_replaced(note)


def _align_size(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


def _round_up(num_bytes: int) -> int:
    """Round up to a multiple of an eighth to a quarter of the size, so that a batch of slightly larger slices fits, too."""
    step = max(1 << 20, 1 << max(0, num_bytes.bit_length() - 3))
    return -(-num_bytes // step) * step
