"""Reuse of freed memory by a process that computes on the CPU.

By default glibc returns every large block to the system when it is freed. The next step then takes new pages, which the system fills with
zeros: about a third of the CPU time of a training step. `tests/bench/bench_allocator.py` measures it.

Source: mallopt(3).
"""

import ctypes
import sys

# Parameters of mallopt in malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for its next allocations, instead of returning it to the system.

    The process then holds as much memory as at its peak. Results do not change.

    Returns:
        True if the C library has this setting, as glibc on Linux does; otherwise nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_MAX, 0))
