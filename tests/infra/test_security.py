"""SECURITY.md: every claim has a test, every test it names exists, and no code unpickles files that others may write."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_names import calls_of

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "SECURITY.md").read_text()


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", SECURITY)
    assert len(named) > 25
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_every_claim_of_the_threat_model_names_a_test_or_says_that_none_does() -> None:
    rows = re.findall(r"^\| (.+) \|$(?!\n\|---)", SECURITY, re.MULTILINE)  # without the headers
    assert len(rows) > 15
    for row in rows:
        assert "::test_" in row or "no test" in row or "below |" in f"{row} |", row


LOADERS = {"numpy.load": ("allow_pickle", "False"), "torch.load": ("weights_only", "True")}
"""Functions that unpickle unless an argument forbids it. Ruff refuses pickle itself, eval, shells and YAML that makes objects."""


def unsafe_loads(text: str) -> list[int]:
    """The lines that call a loader, under whichever name it was imported, without the argument that forbids pickle."""
    found = []
    for function, node in calls_of(text):
        if function in LOADERS:
            word, value = LOADERS[function]
            if {one.arg: ast.unparse(one.value) for one in node.keywords}.get(word) != value:
                found.append(node.lineno)
    return found


def test_no_code_unpickles_arrays_or_tensors() -> None:
    paths = [path for folder in ("p2r", "cluster", "infra", "docs") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    texts = {str(path): path.read_text() for path in paths}
    assert {name: lines for name, text in texts.items() if "load" in text and (lines := unsafe_loads(text))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import numpy as np\nnp.load(path)",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "import numpy as anything\nanything.load(path)",
        "from numpy import load\nload(path)",
        "from torch import load as read\nread(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=is_safe)",
        "def f():\n    import torch as t; return t.load(path)",
    ],
)
def test_a_load_that_may_unpickle_is_found_under_any_name(text: str) -> None:
    assert unsafe_loads(text) == [2]
    assert unsafe_loads("import numpy as np\nnp.load(path, allow_pickle=False)\njson.load(file)") == []


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("S102", "exec(text)"),
        ("S202", "import tarfile\n\ntarfile.open(path).extractall(folder)"),
        ("S301", "import pickle\n\npickle.loads(data)"),
        ("S302", "import marshal\n\nmarshal.loads(data)"),
        ("S307", "eval(text)"),
        ("S506", "import yaml\n\nyaml.load(text, Loader=yaml.Loader)"),
        ("S602", "import subprocess\n\nsubprocess.run(text, shell=True)"),
        ("S605", "import os\n\nos.system(text)"),
    ],
)
def test_ruff_refuses_what_runs_what_it_reads(code: str, text: str) -> None:
    for folder in ("p2r", "cluster", "infra"):
        command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
        done = subprocess.run(
            [*command, "--stdin-filename", f"{folder}/new.py", "-"],
            input=text,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert f" {code} " in done.stdout, done.stdout + done.stderr
