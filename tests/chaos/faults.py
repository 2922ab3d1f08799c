"""Faults of a cluster: drawn by seed, made at their step, undone as a cluster's own machinery would."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local.s3 import S3Server
from tests.nodes import Cluster, Node

KINDS = ("worker", "raylet", "node", "driver", "head", "network", "store", "sigterm", "preemption")
COMES_BACK_S = 10.0
CUT_S = 45.0
APART = (20, 40)
"""Steps from one fault to the next."""
_STEP = re.compile(r"pretrain \| step (\d+)/(\d+) ")
_RESUMED = re.compile(r"imports ([\d.]+) s, load and first report ([\d.]+) s")


@dataclass(frozen=True)
class Draw:
    """A fault that is to come."""

    step: int
    """It is made as soon as this step was reported."""
    kind: str
    node: int
    """Which of the nodes with workers, where it is one."""


@dataclass
class Made:
    """A fault that was made, and how the run got over it."""

    kind: str
    step: int
    """Newest step that had been reported."""
    target: str
    detected_s: float | None = None
    """From the fault to the line that says what failed."""
    started_s: float | None = None
    """From that line to the workers' first statement: room, Ray's actors, Python, torch."""
    imports_s: float | None = None
    """Imports of the engine."""
    load_s: float | None = None
    """Checkpoint, stream and the first step."""
    next_step_s: float | None = None
    """From the fault to the next reported step."""
    said: str = ""
    """The run's own line."""


def draw_faults(seed: int, num: int, *, kinds: Sequence[str] = KINDS, num_nodes: int = 2) -> list[Draw]:
    """Draw kinds, places and steps; every kind comes once before one comes twice."""
    rng = random.Random(seed)
    step, bag, found = 0, list[str](), list[Draw]()
    for _ in range(num):
        if not bag:
            bag = rng.sample(list(kinds), len(kinds))
        step += rng.randint(*APART)
        found.append(Draw(step, bag.pop(), rng.randrange(num_nodes)))
    return found


class Submitted:
    """`p2r run` on the head, and what it says, with the time."""

    def __init__(self, nodes: Cluster, job: Path) -> None:
        self._nodes, self._job = nodes, job
        self.lines: list[tuple[float, str]] = []
        self.step = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "cluster", "run", str(self._job)]
        process = self._nodes.popen(
            self._nodes.head, command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        threading.Thread(target=self._read, args=(process.stderr,), daemon=True).start()
        return process

    def _read(self, stream: Any) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip()
            self.lines.append((time.monotonic(), line))
            if found := _STEP.search(line):
                self.step = int(found[1])
            print(f"    {line}", file=sys.stderr, flush=True)

    def kill(self) -> None:
        """Kill the driver and submit the job again."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.submit_again()

    def submit_again(self) -> None:
        """Submit the job whose driver is dead once more."""
        self.process.wait()
        self.process = self._start()

    def since(self, began: float, pattern: str, *, after: float = 0.0) -> tuple[float, str] | None:
        """Return the first line since a moment that matches."""
        for at, line in list(self.lines):
            if at >= max(began, after) and re.search(pattern, line):
                return at, line
        return None


class Trouble:
    """Makes faults, and does afterwards what a cluster's own machinery would."""

    def __init__(self, nodes: Cluster, store: S3Server, run: Submitted, rng: random.Random) -> None:
        self._nodes, self._store, self._run, self._rng = nodes, store, run, rng
        self._later: list[tuple[float, Callable[[], object]]] = []

    def make(self, draw: Draw) -> Made:
        """Make one fault now: at the node that was drawn, or, where an elastic group does without that one, at another."""
        nodes = self._nodes.nodes[1:]
        nodes = nodes[draw.node :] + nodes[: draw.node]
        node = next((node for node in nodes if node.pids_of("RayTrainWorker")), nodes[0])
        made = Made(draw.kind, self._run.step, node.address)
        makers: Mapping[str, Callable[[Node], str]] = {
            "worker": self._worker,
            "raylet": self._raylet,
            "node": self._node,
            "driver": self._driver,
            "head": self._head,
            "network": self._network,
            "store": self._restart_store,
            "sigterm": self._sigterm,
            "preemption": self._preemption,
        }
        made.target = makers[draw.kind](node)
        return made

    def do_what_is_due(self) -> None:
        """Bring back what has been away for long enough."""
        now = time.monotonic()
        due = [action for at, action in self._later if at <= now]
        self._later = [(at, action) for at, action in self._later if at > now]
        for action in due:
            action()

    def finish(self) -> None:
        """Bring back everything at once."""
        for _, action in list(self._later):
            action()
        self._later.clear()

    def _in(self, seconds: float, action: Callable[[], object]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def _worker(self, node: Node) -> str:
        workers = [pid for each in self._nodes.nodes[1:] for pid in each.pids_of("RayTrainWorker")]
        pid = self._rng.choice(sorted(workers))
        os.kill(pid, signal.SIGKILL)
        return f"process {pid}"

    def _raylet(self, node: Node) -> str:
        for pid in node.pids_of("raylet/raylet"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._in(COMES_BACK_S, lambda: self._revive(node))
        return node.address

    def _node(self, node: Node) -> str:
        self._nodes.kill(node)
        self._in(COMES_BACK_S, lambda: self._revive(node))
        return node.address

    def _driver(self, node: Node) -> str:
        self._run.kill()
        return "driver"

    def _head(self, node: Node) -> str:
        """The head's state is lost with it: the one that comes back knows neither nodes nor jobs."""
        head = self._nodes.head
        self._nodes.kill(head)
        time.sleep(COMES_BACK_S)
        self._nodes.start(head)
        self._nodes.wait(num_nodes=1)
        for each in self._nodes.nodes[1:]:
            self._revive_when_gone(each, time.monotonic() + 120.0)
        self._run.submit_again()
        return head.address

    def _network(self, node: Node) -> str:
        self._nodes.cut(node)

        def mend() -> None:
            self._nodes.mend(node)
            self._revive_when_gone(node, time.monotonic() + 120.0)

        self._in(CUT_S, mend)
        return node.address

    def _revive_when_gone(self, node: Node, until: float) -> None:
        """A raylet that was declared dead ends itself when it hears of it, which may be a while after it could."""
        if not node.pids_of("raylet/raylet"):
            self._revive(node)
        elif time.monotonic() < until:
            self._in(2.0, lambda: self._revive_when_gone(node, until))

    def _restart_store(self, node: Node) -> str:
        self._store.kill()
        self._in(5.0, self._store.start)
        return "store"

    def _sigterm(self, node: Node) -> str:
        assert node.main is not None
        node.main.send_signal(signal.SIGTERM)
        self._in(COMES_BACK_S, lambda: self._revive(node))
        return node.address

    def _preemption(self, node: Node) -> str:
        ray = str(Path(sys.executable).parent / "ray")
        arguments = [
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=chaos",
            f"--address={self._nodes.address}",
        ]
        drain = [ray, "drain-node", f"--node-id={self._id_of(node)}", *arguments, "--deadline-remaining-seconds=30"]
        self._nodes.popen(self._nodes.head, drain, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait()
        self._in(30.0, lambda: self._node(node))
        return node.address

    def _id_of(self, node: Node) -> str:
        find = (
            "import ray; ray.init(address='auto', logging_level='error');"
            f"print(next(n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerAddress'] == '{node.address}'))"
        )
        asked = self._nodes.popen(self._nodes.head, [sys.executable, "-c", find], stdout=subprocess.PIPE)
        return asked.communicate()[0].decode().strip()

    def _revive(self, node: Node) -> None:
        self._nodes.kill(node)
        self._nodes.start(node)


def go_through(run: Submitted, trouble: Trouble, draws: Sequence[Draw], *, limit_s: float) -> list[Made]:
    """Make each fault when its step is reached, until the run ends.

    Raises:
        TimeoutError: It does not.
    """
    waiting, made, began_at = list(draws), list[Made](), time.monotonic()
    pending: tuple[float, Made] | None = None
    while run.process.poll() is None:
        if time.monotonic() - began_at > limit_s:
            raise TimeoutError(f"the run has not ended after {limit_s:.0f} s; last line: {run.lines[-1:]}")
        trouble.do_what_is_due()
        if pending is not None and _is_over(run, *pending):
            print(f"  over after {pending[1].next_step_s:.1f} s: {pending[1]}", file=sys.stderr, flush=True)
            pending = None
        if pending is None and waiting and run.step >= waiting[0].step:
            draw = waiting.pop(0)
            at = time.monotonic()
            fault = trouble.make(draw)
            print(f"  fault: {draw.kind} at step {fault.step}, {fault.target}", file=sys.stderr, flush=True)
            made.append(fault)
            pending = at, fault
        time.sleep(0.1)
    trouble.finish()
    if pending is not None:
        _is_over(run, *pending)
    return made


def _is_over(run: Submitted, at: float, made: Made) -> bool:
    """Whether the run has taken a step since a fault that it noticed; fills in how long that took."""
    said = run.since(at, r"^fault \|")
    if made.kind == "store":  # waited for, if it is back in time
        step = run.since(at + 5.0, _STEP.pattern)
        if said is None and step is not None:
            made.next_step_s = step[0] - at
            return True
    if said is None:
        if made.kind == "network" and time.monotonic() - at > CUT_S + 60 and run.since(at + CUT_S, _STEP.pattern):
            made.next_step_s = time.monotonic() - at
            return True
        return False
    resumed = run.since(at, _RESUMED.pattern, after=said[0])
    if resumed is None:
        return False
    made.said = said[1]
    made.detected_s, made.next_step_s = said[0] - at, resumed[0] - at
    if found := _RESUMED.search(resumed[1]):
        made.imports_s, made.load_s = float(found[1]), float(found[2])
        made.started_s = resumed[0] - said[0] - made.imports_s - made.load_s
    return True
