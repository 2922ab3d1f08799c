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
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.local.s3 import S3Server, make_bucket
from tests.chaos.faults import APART, KINDS, Made, Submitted, Trouble, draw_faults, go_through
from tests.nodes import Cluster, cluster, refusal
from tests.toy import write_toy_data

CHECKPOINT_INTERVAL = 10
COLLECTIVE_TIMEOUT_S = 30
LEARNING_RATES = {"fixed": 1e-3, "elastic": 1e-4}
"""Another number of workers sums in another order. With 1e-3 that difference of rounding grew tenfold every 40 steps, from 1e-7 to 9e-3
after 230: no curve of so small a model could be held against another one."""

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
