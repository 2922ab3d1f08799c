"""Decoded batches -> the same batches on the device, each copied during the previous step.

A copy starts in pinned memory and runs on its own stream. Every batch comes with the data state after it, as from
`p2r.data.stream`. Batches copied ahead are not yet part of that state, so a checkpoint never skips a batch that was not
trained on. On a CPU, batches pass through unchanged.
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
"""Returns the context in which the named part of a step is computed."""
Batches = Generator[tuple[Batch, StreamState], None, None]

_MOST_STEPS_AHEAD = 2
"""Largest number of steps that the host enqueues ahead of the device; each holds a batch in device memory."""


def feed(batches: Batches, device: torch.device, *, timed: Timed = torch.profiler.record_function) -> Batches:
    """Yield batches on their device, each with the state to save after it. Closing it closes `batches`.

    `wait_s` of a batch becomes 0 if the device was still busy while the host waited.
    """
    return _copy_ahead(batches, device, timed) if device.type == "cuda" else batches


def _copy_ahead(batches: Batches, device: torch.device, timed: Timed) -> Batches:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    steps: deque[torch.cuda.Event] = deque()  # ends of the enqueued steps
    try:
        for batch, state in batches:
            is_idle = not steps or steps[-1].query()  # type: ignore[no-untyped-call]
            if len(steps) == _MOST_STEPS_AHEAD:
                steps.popleft().synchronize()
            with torch.cuda.stream(side), timed("copy"):
                here = _copy_to_device(batch, device)
            current = torch.cuda.current_stream(device)
            current.wait_stream(side)
            for group in here.groups:
                for tensor in (group.voxels, group.low, group.high, group.index, group.covered):
                    if tensor is not None and tensor.is_cuda:
                        tensor.record_stream(current)
            yield replace(here, wait_s=batch.wait_s if is_idle else 0.0), state
            end = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record(current)
            steps.append(end)
    finally:
        batches.close()


def _copy_to_device(batch: Batch, device: torch.device) -> Batch:
    def group_on_device(group: Group) -> Group:
        # The host computes with the position of a patch, so it stays there.
        index = to_device(group.index, device) if batch.image.dimensions == 2 else group.index
        voxels, low, high = (to_device(tensor, device) for tensor in (group.voxels, group.low, group.high))
        covered = None if group.covered is None else to_device(group.covered, device)
        return replace(group, index=index, voxels=voxels, low=low, high=high, covered=covered)

    return replace(batch, groups=tuple(group_on_device(group) for group in batch.groups))
