"""Only algorithms that give the same bits every time, for as long as a run lasts.

PyTorch then refuses what it has no such algorithm for, by name, rather than computing it another way each time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Set what makes algorithms deterministic, and set it back; do nothing unless it is wanted.

    cuBLAS reads its variable when it is first used: a process that has multiplied on a GPU before must have it set from its
    beginning (`CUBLAS_WORKSPACE_CONFIG=:4096:8`).
    """
    if not wanted:
        yield
        return
    backends = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        backends.deterministic,
        backends.benchmark,
        os.environ.get(_WORKSPACE),
    )
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    backends.deterministic, backends.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        backends.deterministic, backends.benchmark = before[2:4]
        if before[4] is None:
            del os.environ[_WORKSPACE]
