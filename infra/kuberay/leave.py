"""This pod is to go -> Ray's node is drained, so that training saves and leaves while there is time. The `preStop` of a worker.

    python -m infra.kuberay.leave --seconds 120

Kubernetes runs it when it deletes a pod, before it sends SIGTERM: on eviction, when a machine is drained, and when a spot machine
is taken away. Ray knows nothing of that by itself; told so, it starts nothing more here, and Ray Train learns of the deadline. It
returns when the raylet has ended, which it does as soon as nothing runs on it, or when the seconds are over. A cluster that is
deleted as a whole has no head any more: then there is nobody to tell, and nothing to wait for.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ASKING_LIMIT_S = 20.0
"""How long the head may take to answer; Ray itself would look for one that has gone for much longer."""


def find_raylet(processes: Iterable[Path]) -> tuple[Path, str] | None:
    """Return the raylet among folders of `/proc`, and its node's id in hex digits; None if there is none."""
    for process in processes:
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if Path(words[0]).name == "raylet":
            for word in words:
                if word.startswith("--node_id="):
                    return process, word.partition("=")[2]
    return None


def leave(seconds: float, *, address: str, processes: Callable[[], Iterable[Path]]) -> str:
    """Ask Ray to drain this node, wait until it has gone, and return what became of it."""
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
    """Leave; what became of it goes to stderr, and Kubernetes goes on whatever it was."""
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
