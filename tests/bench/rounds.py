"""What the benchmarks of data share: contenders take turns, so that a slow minute of the machine falls on all of them."""

import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def take_turns(contenders: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[Any]]:
    """Call every contender once a round, each round beginning with another of them; return what the calls returned."""
    names = list(contenders)
    measured: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in (names[(turn + place) % len(names)] for place in range(len(names))):
            measured[name].append(contenders[name]())
            progress(f"round {turn + 1} of {rounds}, {name}: {measured[name][-1]}")
    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": middle, "low": low, "high": high}


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Compare round with round: both saw the same minute of the machine."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


def resident_mib(key: str = "VmRSS") -> float:
    """Return this process's memory: `VmRSS`, or its peak, `VmHWM`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def pin_to_one_core() -> tuple[set[int], set[int]]:
    """Keep this process, its threads and its children on one core; return the set of that core, and of all others."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    return set(cores[:1]), set(cores[1:] or cores)


def cpu_name() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def progress(text: str) -> None:
    """Say what is being done, beside the results."""
    print(text, file=sys.stderr, flush=True)
