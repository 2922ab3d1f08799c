"""Thread-safe counters and timers.

Names in use: bytes_fetched, fetch_seconds, retries{cause}, range_reads; cache_hits, cache_misses, cache_evictions,
cache_evicted_bytes, cache_refusals{cause}, cache_drops; decode_seconds, wait_seconds, replaced_records, batches, ready_batches.
`ready_batches` is the sum over taken batches of the number ready at that time.
"""

import threading


class Counters:
    """Sums by name and labels, which only grow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add `value` to a sum, which starts at 0."""
        key = name
        if labels:
            key += "{" + ",".join(f'{label}="{labels[label]}"' for label in sorted(labels)) + "}"
        with self._lock:
            self._values[key] = self._values.get(key, 0) + value

    def snapshot(self) -> dict[str, float]:
        """Return the current sums, sorted by name: `{'bytes_fetched': 4096, 'retries{cause="503"}': 2}`."""
        with self._lock:
            return dict(sorted(self._values.items()))
