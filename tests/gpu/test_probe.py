"""The probe for a borrowed GPU runs to its end here, on tiny sizes: no rented minute is lost to a typo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.gpu.carry import LIMIT_MIB, WHEELS_MIB, requirements, weigh
from tests.gpu.probe import PARTS


def test_the_probe_runs_on_a_cpu_and_every_part_tells_something(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "facts.jsonl"
    command = [sys.executable, "-m", "tests.gpu.probe", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=580)
    facts = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, (done.stderr, facts)
    assert {fact["part"] for fact in facts} == set(PARTS)
    assert len(done.stdout.splitlines()) == len(facts)


def test_a_part_that_takes_too_long_is_named_and_the_others_run(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "facts.jsonl"
    command = [sys.executable, "-m", "tests.gpu.probe", "--device", "cpu", "--out", str(out), "--minutes", "0"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert [json.loads(line)["part"] for line in out.read_text().splitlines()] == list(PARTS)


def test_the_repository_leaves_room_for_the_wheels(tmp_path: Path) -> None:
    (tmp_path / "one.whl").write_bytes(bytes(2**20))
    weights = weigh(tmp_path)
    assert weights.pop("one.whl") == 1
    assert 1 < weights.pop("repository") < LIMIT_MIB - WHEELS_MIB
    assert weights == {}


def test_all_that_the_probe_carries_has_a_pinned_version() -> None:
    assert all("==" in requirement for requirement in requirements().values())
