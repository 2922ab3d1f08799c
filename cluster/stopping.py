"""Requests to end pretraining in order: by SIGTERM, or by a caller with several runs."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType


@dataclass
class StopRequest:
    """Request to save a checkpoint and end."""

    event: threading.Event = field(default_factory=threading.Event)
    why: str = "SIGTERM"

    def ask(self, why: str) -> None:
        """Make the request; the first reason counts."""
        if not self.event.is_set():
            self.why = why
            self.event.set()


@contextmanager
def catch_sigterm() -> Iterator[StopRequest]:
    """Turn the first SIGTERM into a request to stop; a second one ends the process by default."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        stop.event.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # Ray installs its own handler in ray.init, which has already run.
    signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
