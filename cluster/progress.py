"""Lines of progress from workers to the driver's log, in order and without Ray's prefixes.

A line may name its group of workers (field `group`). Newly started workers do not know the number of their attempt. The
driver sees the groups in order, and replaces the name by the attempt's number.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.queue import Empty, Queue

from cluster.session import this_node
from p2r.logs import Line, Say, fields_of


@contextmanager
def relay(say: Say) -> Iterator[Queue]:
    """Yield a queue for workers' lines; a thread passes them to `say` until the block ends."""
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})
    ended = threading.Event()
    groups: list[str] = []

    def pump() -> None:
        while True:
            try:
                say(_number_attempt(queue.get(timeout=0.5), groups))
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


def _number_attempt(line: str, groups: list[str]) -> str:
    """Return the line with its group's number, in order of appearance from 1."""
    fields = dict(fields_of(line))
    group = fields.pop("group", None)
    if not isinstance(group, str):
        return line
    if group not in groups:
        groups.append(group)
    return Line(str(line), **{**fields, "attempt": groups.index(group) + 1})
