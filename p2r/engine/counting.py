"""Memory of tensors in bytes, counted by their storages: live tensors, and tensors saved by autograd.

Both count real tensors, or meta tensors, which have shapes and types but neither memory nor values. The memory of a step can
thus be counted on a machine too small for it, by running the actual code.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while active, the tensors that were created in it and are still alive.

    Args:
        meta: Count meta tensors as if they were real; otherwise they count as 0 bytes.
        apart: Keys of earlier storages, such as the weights: an operation may return a view of them.
    """

    def __init__(self, *, meta: bool = False, apart: frozenset[int] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._meta, self._apart = meta, apart
        self.num_bytes, self.peak_bytes = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.is_meta == self._meta:
                self._count_storage(leaf.untyped_storage())
        return made

    def forget_peak(self) -> None:
        """Reset the peak to the current size."""
        self.peak_bytes = self.num_bytes

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._sizes or key in self._apart:
            return
        self._sizes[key] = storage.nbytes()
        self.num_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        weakref.finalize(
            storage, self._release_storage, key
        )  # lives as long as the memory, however many tensors share it

    def _release_storage(self, key: int) -> None:
        self.num_bytes -= self._sizes.pop(key)


class SavedTensors:
    """Counts the storages that autograd saves, each once, until they are freed.

    Args:
        apart: Keys of storages that are not counted, such as the weights.
    """

    def __init__(self, apart: frozenset[int]) -> None:
        self.peak_bytes, self._bytes = 0, 0
        self._apart, self._holders = apart, dict[int, int]()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Count within this context."""
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _SavedTensor(tensor, self), lambda held: held.tensor
        ):
            yield

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        number = self._holders.get(key, 0)
        self._holders[key] = number + 1
        if not number and key not in self._apart:
            self._bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)

    def let_go(self, tensor: Tensor) -> None:
        """Stop counting a tensor, unless something else holds it."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        self._holders[key] -= 1
        if not self._holders[key] and key not in self._apart:
            self._bytes -= storage.nbytes()


class _SavedTensor:
    def __init__(self, tensor: Tensor, counter: SavedTensors) -> None:
        self.tensor, self._counter = tensor.detach(), counter  # with its graph, the tensor would hold itself
        counter.hold(self.tensor)

    def __del__(self) -> None:
        self._counter.let_go(self.tensor)


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a key that distinguishes storages alive at the same time. Meta storages have no address."""
    key: int = storage._cdata
    return key


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the sizes of all storages in bytes, by key."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage_key(storage): storage.nbytes() for storage in storages}
