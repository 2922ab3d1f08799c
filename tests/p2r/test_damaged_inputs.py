"""Jobs, tasks, histories and lists with any damage: read, or refused by p2r's own error, never by another."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from p2r.data.lists import parse_list
from p2r.engine.history import history_bytes, read_history
from p2r.errors import DamagedError, DataError, JobError
from p2r.evaluate.tasks import read_task_config
from p2r.job import read_job
from p2r.storage import Storage

JOBS = Path(__file__).parents[2] / "jobs"
PIECES = [
    b"null", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"<<: *a", b"!!set ", b"!!bool x", b"-1", b"9" * 40, b"1e999", b".nan",
    b"\xff", b"\n", b"\t", b": ", b"- ", b"'", b'"', b"\\u0000", b"(a+)+$", b"(?=x)", b"${HOME}", b"true", b"2026-13-41",
    b"---\n", b"? ", b"p[1-999999999]",
]  # fmt: skip
_BEGINS = re.compile(rb"\n *|: |- |, |\[")  # a key or a value: elsewhere a piece is mostly a part of a text
FUZZ = settings(max_examples=60, derandomize=True, deadline=None, database=None, phases=[Phase.generate])


def damaged(data: st.DataObject, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        meant = [found.end() for found in _BEGINS.finditer(bytes(changed))]
        place = data.draw(st.sampled_from(meant) | st.integers(0, len(changed)))
        changed[place : place + data.draw(st.integers(0, 9))] = data.draw(st.sampled_from(PIECES))
    return bytes(changed)


@FUZZ
@given(data=st.data())
def test_a_job_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged-job.yaml"
    name = data.draw(st.sampled_from(["demo", "acdc", "ranking-acdc", "ingest"]))
    path.write_bytes(damaged(data, (JOBS / f"{name}.yaml").read_bytes()))
    with contextlib.suppress(JobError):
        read_job(path, unset={})


@FUZZ
@given(data=st.data())
def test_a_task_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged-task.yaml"
    name = data.draw(st.sampled_from(["acdc", "template", "hippocampus"]))
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(DataError):
        patch.setenv("P2R_DATA", "/nowhere")
        path.write_bytes(damaged(data, (JOBS / f"tasks/{name}.yaml").read_bytes()))
        read_task_config(path)


@FUZZ
@given(data=st.data())
def test_a_list_is_read_or_refused(data: st.DataObject) -> None:
    contents = {
        "list.csv": b'path,subject,site\na.nii,one,"x, y"\nb.nii,two,\n',
        "list.tsv": b"path\tsubject\na.nii\tone\n",
        "list.jsonl": b'{"path": "a.nii", "subject": "one", "age": 3}\n{"path": "b.nii"}\n',
    }
    name = data.draw(st.sampled_from(sorted(contents)))
    with contextlib.suppress(DataError):
        parse_list(damaged(data, contents[name]), name)


@FUZZ
@given(data=st.data())
def test_a_history_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    storage = Storage(str(tmp_path_factory.getbasetemp() / "damaged-history"))
    rows = [{"step": step, "loss": 3.5, "step_s": 0.25, "images_per_s": 812.0, "world_size": 2} for step in (10, 20)]
    storage.write_bytes("history.jsonl", damaged(data, history_bytes(rows)))
    with contextlib.suppress(DamagedError):
        for row in read_history(storage, "history.jsonl"):
            assert row.step >= 0 and (row.step_s or 0.0) * 2 >= 0


def test_a_history_holds_null_where_a_figure_was_not_finite(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(
        "new.jsonl", history_bytes([{"step": 1, "loss": float("nan"), "health": {"x": [float("inf")]}}])
    )
    storage.write_bytes("old.jsonl", b'{"step": 1, "loss": NaN, "health": {"x": [Infinity]}}\n')
    rows = [{"step": 1, "loss": None, "health": {"x": [None]}}]
    assert [row.to_json() for row in read_history(storage, "new.jsonl")] == rows
    assert [row.to_json() for row in read_history(storage, "old.jsonl")] == rows
    storage.write_bytes("bad.jsonl", b'{"step": 1}\n{"step": "2"}\n')
    with pytest.raises(DamagedError, match=r"bad\.jsonl, row 2: step: Input should be a valid integer"):
        read_history(storage, "bad.jsonl")
