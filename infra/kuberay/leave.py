"""Drain this pod's Ray node before the pod is deleted, so that training can save and leave. `preStop` hook of a worker.

    python -m infra.kuberay.leave --seconds 120

Kubernetes runs it before it sends SIGTERM to a deleted pod: on eviction, when a machine is drained, and when a spot machine is
reclaimed. Ray does not notice these by itself. Once informed, it starts nothing more on the node, and Ray Train learns the
deadline. The hook returns when the raylet has ended, which it does as soon as it is idle, or when the time is over. If the
whole cluster is deleted, its head is already gone and the hook does not wait.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ASKING_LIMIT_S = 20.0
"""Time limit for the head's answer, s; Ray itself would search much longer for a missing head."""


def find_raylet(processes: Iterable[Path]) -> tuple[Path, str] | None:
    """Return the raylet among folders of `/proc`, and its node id in hex digits; None if there is none."""
    for process in processes:
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has just ended
            continue
        if Path(words[0]).name == "raylet":
            for word in words:
                if word.startswith("--node_id="):
                    return process, word.partition("=")[2]
    return None


def leave(seconds: float, *, address: str, processes: Callable[[], Iterable[Path]]) -> str:
    """Ask Ray to drain this node, wait until it has left, and return the outcome."""
    deadline = time.monotonic() + seconds
    found = find_raylet(processes())
    if found is None:
        return "no raylet here"
    raylet, node = found
    command = ["ray", "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is to go"]
    command += ["--deadline-remaining-seconds", str(int(seconds))]
    try:
        subprocess.run(command, check=True, timeout=min(ASKING_LIMIT_S, seconds), capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"the head at {address} does not answer"
    except subprocess.CalledProcessError as error:
        return f"not drained: {error.stderr.strip()[-500:]}"
    while time.monotonic() < deadline:
        if not raylet.exists():
            return "left"
        time.sleep(0.2)
    return f"still busy after {seconds:g} s"


def main() -> int:
    """Leave the cluster; the outcome is printed to stderr and does not affect the exit status."""
    parser = argparse.ArgumentParser(description="Tell Ray that this pod is to go, and wait until its work has left.")
    parser.add_argument("--seconds", type=float, required=True, help="until the pod is killed")
    arguments = parser.parse_args()
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        print("leave: RAY_ADDRESS is not set; the operator sets it for workers", file=sys.stderr)
        return 0
    said = leave(arguments.seconds, address=address, processes=lambda: Path("/proc").glob("[0-9]*"))
    print(f"leave: {said}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
