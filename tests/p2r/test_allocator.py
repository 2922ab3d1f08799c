"""A process that keeps its freed memory takes no new pages for the next step."""

import subprocess
import sys

import pytest

# Fills 64 MiB and frees it, 20 times; prints the pages taken in the last 10.
_SCRIPT = """
import resource, sys, torch
from p2r.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for turn in range(20):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16, 2**20).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _pages_taken(setting: str) -> int:
    done = subprocess.run([sys.executable, "-c", _SCRIPT, setting], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc on Linux has the setting")
def test_freed_memory_is_used_again_without_taking_new_pages_from_the_system() -> None:
    assert _pages_taken("kept") < 1000 < 100_000 < _pages_taken("default")
