"""Deterministic algorithms for the duration of a run.

PyTorch then raises an error, by name, for operations without a deterministic algorithm.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Enable deterministic algorithms, and restore the settings afterwards; without effect if not `wanted`.

    cuBLAS reads its variable on first use. A process that has already multiplied on a GPU needs it from its start
    (`CUBLAS_WORKSPACE_CONFIG=:4096:8`).
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
