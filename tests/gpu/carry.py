"""Wheels for the probe on a GPU machine without a network, and their size.

    python -m tests.gpu.carry FOLDER [--python 3.12]

The machine has torch, Triton and their libraries. The other packages are downloaded for its Python, at the versions that the
project pins. DeepSpeed publishes no wheel; a pure one is built here. On the machine:

    python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl
    PYTHONPATH=/tmp/site python3 -m tests.gpu.probe --minutes 9
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 64
"""Limit for the repository's tracked files and the wheels together."""
WHEELS_MIB = 24
"""Upper bound of the wheels' size; for Python 3.12 they take 20.2 MiB."""
PACKAGES = (
    *("annotated-types", "pydantic", "pydantic-core", "typing-inspection", "google-re2"),
    *("blosc2", "ndindex", "numexpr", "isal", "nibabel", "pydicom", "webdataset", "braceexpand"),
    *("monai", "hjson", "memeff", "inf-cl", "cut-cross-entropy"),
)
BUILT = ("deepspeed",)
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def requirements() -> dict[str, str]:
    """Return a requirement for each package, at the version that the project pins."""
    pinned = "".join((ROOT / name).read_text() for name in ("constraints.txt", "constraints-tests.txt"))
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", pinned, re.MULTILINE))
    versions = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    return {name: f"{name}=={versions[name]}" for name in (*PACKAGES, *BUILT)}


def fetch(folder: Path, *, python: str) -> None:
    """Put all wheels into a folder."""
    wanted = requirements()
    pip = [sys.executable, "-m", "pip"]
    platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    pure = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(
        [*pip, "download", "-q", "--no-deps", *target, "-d", str(folder), *[wanted[name] for name in PACKAGES]],
        check=True,
    )
    subprocess.run([*pure, *[wanted[name] for name in BUILT]], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})


def weigh(folder: Path) -> dict[str, float]:
    """Return sizes in MiB: each wheel, and the tracked files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = sum((ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file())
    wheels = {path.name: path.stat().st_size / 2**20 for path in sorted(folder.glob("*.whl"))}
    return {"repository": tracked / 2**20, **wheels}


def main() -> int:
    """Fetch the wheels and print their sizes; return 1 if they exceed a limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    fetch(asked.folder, python=asked.python)
    weights = weigh(asked.folder)
    for name, mib in weights.items():
        print(f"{mib:8.2f} MiB  {name}")
    print(f"{sum(weights.values()):8.2f} MiB  of {LIMIT_MIB}")
    return int(sum(weights.values()) > LIMIT_MIB or sum(weights.values()) - weights["repository"] > WHEELS_MIB)


if __name__ == "__main__":
    raise SystemExit(main())
