"""Lines of progress from workers to the driver's terminal, in order and without Ray's prefixes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.util.queue import Empty, Queue

from cluster.session import this_node

Say = Callable[[str], None]


@contextmanager
def relay(say: Say) -> Iterator[Queue]:
    """Give a queue that workers `put` lines into; a thread hands them to `say` until the block ends."""
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})
    ended = threading.Event()

    def pump() -> None:
        while True:
            try:
                say(queue.get(timeout=0.5))
            except Empty:
                if ended.is_set():
                    return

    thread = threading.Thread(target=pump, name="p2r-progress", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        ended.set()
        thread.join(timeout=10)
        queue.shutdown(force=True)
