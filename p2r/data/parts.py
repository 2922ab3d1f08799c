"""Parts of corpora: the records that share a value, such as one scanner. The loader reads a part like a corpus.

A part has the shards of all corpora, one corpus after the other, and of each shard only its own records. So order, resuming and the
replacement of damaged samples work within a part as within a corpus, and every sample drawn from a part has its value.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from p2r.data.fetch import OpenShards
from p2r.data.order import Order
from p2r.data.shards import ShardReader
from p2r.errors import DataError

Read = TypeVar("Read")


class Members(NamedTuple):
    """The parts of one corpus's records."""

    num_shards: int
    contrast: str | None
    """Name of the contrast of records that do not state it."""
    parts: Mapping[str, tuple[int, ...]]
    """By key of a record: numbers of the parts to which it belongs."""


@dataclass(frozen=True)
class Balance:
    """Parts of a run's corpora, and their shares of a batch."""

    by: str
    """Property of the scans."""
    values: tuple[str, ...]
    """Value of each part."""
    weights: tuple[float, ...]
    """Weight of each part in every batch."""
    num_samples: tuple[tuple[int, ...], ...]
    """By part, for each shard of all corpora: its samples."""
    num_records: tuple[tuple[int, ...], ...]
    """By part, for each shard of all corpora: its records."""
    members: tuple[Members, ...]
    """By corpus."""

    def to_dict(self) -> dict[str, Any]:
        """Return the part of a stream's state that identifies the shares."""
        return {"by": self.by, "weights": dict(zip(self.values, self.weights, strict=True))}

    def images_per_step(self, global_batch: int) -> dict[str, int]:
        """Return the number of images of each value in every global batch."""
        shares = self.order(seed=0, global_batch=global_batch).shares
        return {value: round(share * global_batch) for value, share in zip(self.values, shares, strict=True)}

    def line(self, global_batch: int) -> str:
        """Return a line for the terminal: the images of each value in a batch, and in the corpora."""
        order = self.order(seed=0, global_batch=global_batch)
        parts = zip(self.values, order.shares, self.num_samples, order.steps_per_epoch, strict=True)
        return f"balance by {self.by} | " + ", ".join(
            f"{value}: {round(share * global_batch)} of {global_batch} images in a batch, {sum(samples)} in all, {steps} steps for all"
            for value, share, samples, steps in parts
        )

    def order(self, *, seed: int, global_batch: int) -> Order:
        """Return the order of the parts' samples.

        Raises:
            DataError: if a part is smaller than its share of a global batch, or its share is less than a lane.
        """
        names = [f"{self.by} {value}" for value in self.values]
        return Order(self.num_samples, seed=seed, global_batch=global_batch, weights=self.weights, names=names)

    def open(self, corpora: Sequence[OpenShards]) -> list["Part"]:
        """Return the parts of open corpora."""
        return [Part(corpora, self, number) for number in range(len(self.values))]


class Part:
    """The records of one value, with the interface of `OpenShards`. Thread-safe.

    Args:
        corpora: Open shards of each corpus.
        balance: Parts of these corpora.
        number: Number of the part.
    """

    def __init__(self, corpora: Sequence[OpenShards], balance: Balance, number: int) -> None:
        self._corpora, self._balance, self._number = corpora, balance, number
        self._ends = list(accumulate(members.num_shards for members in balance.members))
        self._readers: WeakKeyDictionary[ShardReader, ShardReader] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self.is_remote = any(shards.is_remote for shards in corpora)

    def plan(self, step: int, shards: Iterable[int]) -> None:
        """See `OpenShards.plan`."""
        for number in shards:
            corpus, shard = self._find(number)
            self._corpora[corpus].plan(step, [shard])

    def done(self, step: int) -> None:
        """See `OpenShards.done`."""
        for shards in self._corpora:
            shards.done(step)

    def name(self, number: int) -> str:
        """Return the URL of a shard."""
        corpus, shard = self._find(number)
        return self._corpora[corpus].name(shard)

    def reader(self, number: int) -> ShardReader:
        """Return a reader of the part's records of a shard.

        Raises:
            DataError: if the shard has another number of these records than the ledger states.
        """
        corpus, shard = self._find(number)
        whole = self._corpora[corpus].reader(shard)
        with self._lock:
            reader = self._readers.get(whole)
            if reader is None:
                reader = self._readers[whole] = self._choose_records(whole, corpus)
        stated = self._balance.num_records[self._number][number]
        if reader.num_records != stated:
            value = f"{self._balance.by} {self._balance.values[self._number]}"
            raise DataError(
                f"{whole.name}: {reader.num_records} records have {value}, the ledger states {stated}; ingest this corpus again"
            )
        return reader

    def is_by_range(self, number: int) -> bool:
        """See `OpenShards.is_by_range`."""
        corpus, shard = self._find(number)
        return self._corpora[corpus].is_by_range(shard)

    def read_again(self, number: int, read: Callable[[ShardReader], Read]) -> Read:
        """See `OpenShards.read_again`."""
        corpus, shard = self._find(number)
        return self._corpora[corpus].read_again(shard, read)

    def close(self) -> None:
        """Close the corpora."""
        for shards in self._corpora:
            shards.close()

    def _choose_records(self, whole: ShardReader, corpus: int) -> ShardReader:
        members = self._balance.members[corpus]
        return whole.of_records(lambda key: self._number in members.parts.get(key, ()), contrast=members.contrast)

    def _find(self, number: int) -> tuple[int, int]:
        """Return the corpus of a shard, and the shard's number in it."""
        corpus = bisect_right(self._ends, number)
        return corpus, number - (self._ends[corpus - 1] if corpus else 0)


Shards = OpenShards | Part
"""Shards from which a loader reads."""
