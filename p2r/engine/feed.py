"""Decoded batches -> the same batches on the device, each copied while the step before it is computed.

A copy starts in pinned memory and runs on a stream of its own. Every batch comes with the state of the data after it, as it
did from `p2r.data.stream`: what is copied ahead is in nobody's state yet, so a checkpoint never skips a batch that was not
trained on. On a CPU there is nothing to copy, and batches pass through.
"""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from p2r.data.batch import Batch, Group
from p2r.data.stream import StreamState
from p2r.device import to_device

Timed = Callable[[str], AbstractContextManager[Any]]
"""Gives the context in which a part of a step, by its name, is computed."""
Batches = Generator[tuple[Batch, StreamState], None, None]

_MOST_STEPS_AHEAD = 2
"""The host enqueues no more steps than this beside the one that is computed: every one holds a batch on the device."""


def feed(batches: Batches, device: torch.device, *, timed: Timed = torch.profiler.record_function) -> Batches:
    """Yield batches on their device, each with the state to save after it. Closing it closes `batches`.

    A batch's `wait_s` becomes 0 where the device still had work while the host waited.
    """
    return _copied(batches, device, timed) if device.type == "cuda" else batches


def _copied(batches: Batches, device: torch.device, timed: Timed) -> Batches:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    steps: deque[torch.cuda.Event] = deque()  # ends of those that were enqueued
    try:
        for batch, state in batches:
            is_idle = not steps or steps[-1].query()  # type: ignore[no-untyped-call]
            if len(steps) == _MOST_STEPS_AHEAD:
                steps.popleft().synchronize()
            with torch.cuda.stream(side), timed("copy"):
                here = _on_device(batch, device)
            current = torch.cuda.current_stream(device)
            current.wait_stream(side)
            for group in here.groups:
                for tensor in (group.voxels, group.low, group.high, group.index):
                    if tensor.is_cuda:
                        tensor.record_stream(current)
            yield replace(here, wait_s=batch.wait_s if is_idle else 0.0), state
            end = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record(current)
            steps.append(end)
    finally:
        batches.close()


def _on_device(batch: Batch, device: torch.device) -> Batch:
    def group_on_device(group: Group) -> Group:
        # The place of a patch is a number that the host computes with.
        index = to_device(group.index, device) if batch.image.dimensions == 2 else group.index
        voxels, low, high = (to_device(tensor, device) for tensor in (group.voxels, group.low, group.high))
        return replace(group, index=index, voxels=voxels, low=low, high=high)

    return replace(batch, groups=tuple(group_on_device(group) for group in batch.groups))
