"""Ten minutes on a borrowed GPU: measurements that need one, the most valuable first.

    python -m tests.gpu.probe [--minutes 9] [--device cuda|cpu] [--out FILE] [--parts machine,kernels,...]

Every part is a process with a time limit of its own. Each fact is a line of JSON, written as soon as it is known; a table of all
facts ends the run. The probe needs the repository, torch, Triton and the wheels of `tests/gpu/carry.py`; neither a network nor
Ray. Peers of the loss and NVIDIA's tools are used if they are installed, and skipped by name otherwise. On a CPU the same parts
run on tiny sizes, with kernels in Triton's interpreter.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.gpu.engine_parts import deterministic, engine, variants
from tests.gpu.loss_parts import (
    draws,
    kernels,
    launches,
    loss,
    machine,
    peers,
    precisions,
    tiles_of_kernels,
    tools,
    views,
)
from tests.gpu.sizes import Fact, Sizes

PARTS: dict[str, tuple[Callable[[Sizes], Iterator[Fact]], int]] = {
    "machine": (machine, 30),
    "kernels": (kernels, 120),
    "loss": (loss, 90),
    "engine": (engine, 120),
    "peers": (peers, 90),
    "tiles": (tiles_of_kernels, 120),
    "draws": (draws, 30),
    "deterministic": (deterministic, 90),
    "variants": (variants, 150),
    "views": (views, 30),
    "precisions": (precisions, 60),
    "tools": (tools, 90),
}
"""By name, most valuable first, with the most seconds that each may take."""


def run_part(name: str, device: str, out: Path) -> None:
    """Print the facts of one part, a line of JSON each, and append them to a file at once."""
    sizes = Sizes(torch.device(device), device == "cuda")
    sys.path.append(str(Path(__file__).parents[1] / "bench"))  # benchmarks import one another as scripts
    with out.open("a") as file:
        for fact in (launches if name == "launches" else PARTS[name][0])(sizes):
            line = json.dumps({"part": name, **fact})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


def main() -> int:
    """Run all parts; return 1 if a fact is wrong or a part has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("probe.jsonl"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--one", choices=(*PARTS, "launches"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        run_part(asked.one, asked.device, asked.out)
        return 0
    end = time.monotonic() + 60 * asked.minutes
    facts: list[Fact] = []
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if asked.device == "cpu" else {})}
    for name in asked.parts.split(","):
        limit = min(PARTS[name][1] if asked.device == "cuda" else 300, end - time.monotonic())
        command = [sys.executable, "-m", "tests.gpu.probe", "--device", asked.device, "--out", str(asked.out)]
        facts += _facts_of([*command, "--one", name], name, limit, environment, asked.out)
    for fact in facts:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in fact.items()
            )
        )
    return int(
        any(fact.get("is_right") is False or fact.get("is_repeatable") is False or "failed" in fact for fact in facts)
    )


def _facts_of(command: list[str], name: str, limit: float, environment: dict[str, str], out: Path) -> list[Fact]:
    """Run a part and return its facts; the last one says that it failed or took too long, if it did."""
    text, failed = "", "no time was left"
    if limit > 0:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
            text, failed = done.stdout, f"exit {done.returncode}: {done.stderr[-800:]}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            failed = f"took more than {limit:.0f} s"
    facts = [json.loads(line) for line in text.splitlines() if line.startswith('{"part"') and line.endswith("}")]
    if failed:
        facts.append({"part": name, "failed": failed})
        with out.open("a") as file:
            file.write(json.dumps(facts[-1]) + "\n")
    return facts


if __name__ == "__main__":
    raise SystemExit(main())
