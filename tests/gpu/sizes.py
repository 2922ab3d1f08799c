"""Device, sizes and clock of the probe's parts."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

Fact = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Device of a part, with its sizes."""

    device: torch.device
    is_gpu: bool

    def pick(self, on_gpu: Any, on_cpu: Any) -> Any:
        """Return the first on a GPU, the second on a CPU."""
        return on_gpu if self.is_gpu else on_cpu


def seconds(work: Callable[[], object], sizes: Sizes, *, repeats: int) -> float:
    """Return the median time of some work, after one run that warms up."""
    times = []
    for _ in range(repeats + 1):
        if sizes.is_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if sizes.is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]
