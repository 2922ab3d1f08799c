"""A pretraining run through faults, and the same run without: do their curves agree?

    three nodes in namespaces, a real S3 server -> run A without faults -> run B, a fault every 20 to 40 steps -> verdict

Faults are drawn by seed: `kill -9` of a worker, of a raylet, of all of a node, of the driver, of the head with all that runs
there. Also a cable pulled for longer than the collective timeout; the store killed and started again; SIGTERM to a node; a notice of
preemption. What a cluster's own machinery would do is done here: a node that is gone comes back after some seconds, a job whose
driver died is submitted again.

With a fixed number of workers the losses must be the same bits, with an elastic one within 1e-3. Either way the run must end by
itself at the last step, all checkpoints must be whole, and no process may be left over.

    python -m tests.chaos.chaos --faults 10 --seed 0 --world fixed --output jobs/results/chaos
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.local.s3 import S3Server, make_bucket
from tests.nodes import Cluster, Node, cluster, refusal
from tests.toy import write_toy_data

KINDS = ("worker", "raylet", "node", "driver", "head", "network", "store", "sigterm", "preemption")
CHECKPOINT_INTERVAL = 10
COLLECTIVE_TIMEOUT_S = 30
COMES_BACK_S = 10.0
CUT_S = 45.0
LEARNING_RATES = {"fixed": 1e-3, "elastic": 1e-4}
"""Another number of workers sums in another order. With 1e-3 that difference of rounding grew tenfold every 40 steps, from 1e-7 to 9e-3
after 230: no curve of so small a model could be held against another one."""
APART = (20, 40)
"""Steps from one fault to the next."""

_JOB = """
kind: pretrain
name: {name}
retries: 10
storage: s3://chaos/{name}
resources:
  num_workers: {num_workers}
  collective_timeout_s: {timeout_s}
  network_interface: eth0
  resize_interval_s: 15
  node_wait_s: 600
pretrain:
  corpus: s3://chaos/corpus/corpus
  image: {{spacing_mm: 2.0, size: 32}}
  model: {{channels: [4, 4, 8, 8, 8], feature_channels: 4, head_channels: 16, embedding_channels: 8}}
  loss: {{pixel_pairs_per_image: 16}}
  optimizer: {{learning_rate: {learning_rate}}}
  steps: {steps}
  global_batch: 4
  zero_stage: {zero_stage}
  report_interval: 1
  checkpoint_interval: {checkpoint_interval}
"""
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


def verdict(
    expected: Mapping[str, Any], found: Mapping[str, Any], *, steps: int, elastic: bool, left_over: Sequence[str]
) -> dict[str, Any]:
    """Compare two runs: what `read_run` returns."""
    ours, theirs = found["losses"], expected["losses"]
    differences = [abs(ours[step] - theirs[step]) for step in range(1, steps + 1) if step in ours and step in theirs]
    all_there = sorted(ours) == list(range(1, steps + 1)) == sorted(theirs)
    largest = max(differences, default=float("inf"))
    checks = {
        "every step once": all_there,
        "curve": all_there and (largest <= 1e-3 if elastic else largest == 0.0),
        "last step": found["last_step"] == steps,
        "same stream": found["stream"] == expected["stream"],
        "checkpoints whole": not found["damaged"],
        "no process left": not left_over,
    }
    return {"passed": all(checks.values()), "checks": checks, "largest_difference": largest, "left_over": left_over}


def read_run(url: str) -> dict[str, Any]:
    """Read losses by step, the last checkpoint's stream state, and what is wrong with any checkpoint."""
    from p2r.engine.checkpoint import newest_checkpoint
    from p2r.storage import Storage

    storage = Storage(url)
    rows = [json.loads(line) for line in storage.read_bytes("history.jsonl").decode().splitlines()]
    newest = newest_checkpoint(storage)
    paths = storage.list("checkpoints")
    damaged = []
    for path in paths:
        if path.endswith("/manifest.json"):
            folder = path.removesuffix("/manifest.json")
            for name, entry in storage.read_json(path)["files"].items():
                data = storage.read_bytes(f"{folder}/{name}")
                if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                    damaged.append(f"{folder}/{name}")
    whole = {path.rsplit("/", 1)[0] for path in paths if path.endswith("/manifest.json")}
    loose = sorted({"/".join(path.split("/")[:2]) for path in paths} - whole)
    return {
        "losses": {row["step"]: row["loss"] for row in rows},
        "last_step": None if newest is None else newest.step,
        "stream": None if newest is None else newest.manifest.state.stream,
        "damaged": damaged,
        "without_manifest": loose,
    }


def draw_curves(expected: Mapping[int, float], found: Mapping[int, float], made: Sequence[Made], *, title: str) -> Any:
    """Draw both curves over one another, and a line where each fault was."""
    from p2r.report.canvas import FAINT, INK, drawing, headline, new_figure, plain

    figure = new_figure(8.4, 4.2)
    axes = figure.add_axes((0.08, 0.13, 0.9, 0.6))
    axes.plot(list(expected), list(expected.values()), color="#b0b0b0", linewidth=4, label="without faults")
    axes.plot(list(found), list(found.values()), color="#0072b2", linewidth=1.1, label="through the faults")
    low, high = axes.get_ylim()
    for fault in made:
        axes.axvline(fault.step, color="#d55e00", linewidth=0.8, linestyle=(0, (3, 2)))
        axes.text(fault.step, high, f" {fault.kind}", rotation=60, fontsize=8, color=INK, va="bottom", clip_on=False)
    axes.set_ylim(low, high)
    axes.set_xlabel("step", color=FAINT, fontsize=9)
    axes.set_ylabel("loss, nats", color=FAINT, fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    plain(axes)
    headline(figure, title, "Pretraining on two nodes; each line is a fault")
    return drawing(figure)


@contextlib.contextmanager
def _s3(folder: Path, address: str) -> Iterator[S3Server]:
    server = S3Server(folder, address=address)
    server.start()
    try:
        make_bucket(server.environment, "chaos")
        yield server
    finally:
        server.kill()


def _left_over(nodes: Cluster) -> list[str]:
    """Processes of training that are still there some seconds after the driver has ended."""
    words = ("RayTrainWorker", "TrainController", "ray::DriverChannel", "cluster run")
    deadline = time.monotonic() + 30
    while True:
        found = [f"{node.address}: {pid}" for node in nodes.nodes for pid in node.pids_of(*words)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(1)


def _write_job(path: Path, name: str, *, steps: int, elastic: bool, zero_stage: int) -> Path:
    path.write_text(
        _JOB.format(
            name=name,
            num_workers="[1, 2]" if elastic else 2,
            timeout_s=COLLECTIVE_TIMEOUT_S,
            steps=steps,
            zero_stage=zero_stage,
            checkpoint_interval=CHECKPOINT_INTERVAL,
            learning_rate=LEARNING_RATES["elastic" if elastic else "fixed"],
        )
    )
    return path


def chaos(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both runs and return what is to be known about them."""
    elastic = arguments.world == "elastic"
    kinds = tuple(arguments.kinds.split(",")) if arguments.kinds else KINDS
    draws = draw_faults(arguments.seed, arguments.faults, kinds=kinds)
    steps = draws[-1].step + APART[1]
    began = time.monotonic()
    # Bound before the cluster is there: the bridge has the address, and the workers' environment must name the store.
    with cluster(folder / "nodes", num_cpus=(0, 1, 1)) as nodes, _s3(folder / "s3", nodes.host) as store:
        os.environ.update(store.environment)
        make_corpus(folder)
        job = _write_job(folder / "a.yaml", "a", steps=steps, elastic=elastic, zero_stage=arguments.zero_stage)
        undisturbed = Submitted(nodes, job)
        if undisturbed.process.wait(arguments.limit_s) != 0:
            raise RuntimeError("the run without faults failed: see above")
        expected = read_run("s3://chaos/a/pretrain")
        job = _write_job(folder / "b.yaml", "b", steps=steps, elastic=elastic, zero_stage=arguments.zero_stage)
        run = Submitted(nodes, job)
        made = go_through(
            run, Trouble(nodes, store, run, random.Random(arguments.seed)), draws, limit_s=arguments.limit_s
        )
        left_over = _left_over(nodes)
        found = read_run("s3://chaos/b/pretrain")
        result = verdict(expected, found, steps=steps, elastic=elastic, left_over=left_over)
        result["checks"]["ended by itself"] = run.process.returncode == 0
        result["checks"]["all faults made"] = len(made) == len(draws)
        result["passed"] = all(result["checks"].values())
    return {
        **result,
        "world": arguments.world,
        "seed": arguments.seed,
        "steps": steps,
        "seconds": time.monotonic() - began,
        "faults": [asdict(fault) for fault in made],
        "without_manifest": found["without_manifest"],
        "losses": {"expected": expected["losses"], "found": found["losses"]},
    }


def make_corpus(folder: Path) -> None:
    """Make a corpus of discs on the store, in this process."""
    data = write_toy_data(folder / "data", num_subjects=8)
    job = folder / "corpus.yaml"
    job.write_text(
        "kind: ingest\nname: corpus\nstorage: s3://chaos/corpus\n"
        f'ingest: {{sources: ["{data}/images"], licence: CC0-1.0, shard_size_mib: 0.01}}\n'
    )
    subprocess.run([sys.executable, "-m", "p2r", str(job)], check=True)


def main() -> int:
    """Run it, write a JSON and pictures, and return whether all is well."""
    parser = argparse.ArgumentParser(description="Pretraining through faults, compared with a run without.")
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=("fixed", "elastic"), default="fixed")
    parser.add_argument("--kinds", help=f"comma-separated, of {', '.join(KINDS)}; default: all")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=2400, help="of each of the two runs")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if (reason := refusal()) is not None:
        print(f"chaos: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # namespaces and processes are taken away, too
    with tempfile.TemporaryDirectory(prefix="p2r-chaos-") as folder:
        result = chaos(arguments, Path(folder))
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"{arguments.world}-{arguments.seed}"
    losses = result.pop("losses")
    (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    made = [Made(**fault) for fault in result["faults"]]
    title = f"{len(made)} faults, {arguments.world} number of workers: " + (
        "the same curve, bit by bit"
        if result["largest_difference"] == 0
        else f"within {result['largest_difference']:.1e}"
    )
    picture = draw_curves(losses["expected"], losses["found"], made, title=title)
    (arguments.output / f"{name}.png").write_bytes(picture.png)
    (arguments.output / f"{name}.svg").write_bytes(picture.svg)
    for fault in made:
        seconds = {key: value for key, value in asdict(fault).items() if key.endswith("_s") and value is not None}
        print(f"{fault.kind:11} step {fault.step:4}  " + "  ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    for check, good in result["checks"].items():
        print(f"{'yes' if good else 'NO ':4} {check}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
