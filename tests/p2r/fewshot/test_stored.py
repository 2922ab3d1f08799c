"""Documents of trials on the storage are read within limits, and checked."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2r.engine.profile import profile_text
from p2r.errors import DamagedError
from p2r.fewshot import stored
from p2r.fewshot.stored import read_candidates, read_readings, read_report_rows, read_result, read_sweeps
from p2r.storage import Storage
from tests.source_names import uses_of

ROOT = Path(__file__).parents[3]
TRIAL = {
    "id": "disc-final-scratch-n1-d0",
    "task": "disc",
    "mode": "scratch",
    "protocol": "leak_free",
    "num_labelled": 1,
    "draw": 0,
    "subjects": ["sub-01"],
    "settings": {"learning_rate": 0.01, "steps": 2},
}
ROW = {
    **TRIAL,
    "split": "test",
    "dice_mean": 0.5,
    "dice": {"disc": 0.5, "ring": None},
    "backbone_sha256": None,
    "predictions": "trials/x.npz",
}
RESULT = {
    "trial": TRIAL,
    "validation": {"dice_mean": None, "more": [1]},
    "seconds": 1,
    "weights": "trials/x.safetensors",
    "num_prototypes": [3, 1],
    "row": ROW,
    "more": "is kept",
}
SWEEP = {"num_trials": 2, "num_concurrent": 1, "sweep_s": 2.5, "trials_s": 2}
READING = {"time": "2026-11-29T10:00:00+00:00", "trial": "x", "recipe_sha256": "0" * 64, "num_scans": 2}
PART = {"name": "data", "seconds_per_step": 0.1, "share": 0.5}
PROFILE = {
    "device": "cpu",
    "first_step": 2,
    "num_steps": 3,
    "seconds_per_step": 0.2,
    "parts": [PART],
    "beside": [],
    "operators": [{**PART, "calls_per_step": 2}],
    "memory": dict.fromkeys(("weights_mib", "gradients_mib", "optimizer_mib", "activations_mib", "peak_mib"), 1.0),
}
PATHS = {
    "result": "trials/x.json",
    "candidates": "searches/x.json",
    "sweep": "sweeps/1.json",
    "reading": "readings/x.json",
    "report": "report/report.json",
    "profile": "profile/profile.json",
}
DOCUMENTS: dict[str, tuple[Any, Callable[[Storage, str], Any]]] = {
    "result": (RESULT, lambda storage, path: read_result(storage, path).to_json()),
    "candidates": (
        [[{"learning_rate": 0.01}, None], [{"steps": 2}, {"trial": TRIAL, "failed": "why"}]],
        lambda storage, path: [
            (candidate, other and other.to_json()) for candidate, other in read_candidates(storage, path)
        ],
    ),
    "sweep": (SWEEP, lambda storage, _: [one.to_json() for one in read_sweeps(storage)]),
    "reading": (READING, lambda storage, _: [one.to_json() for one in read_readings(storage, "readings")]),
    "report": ({"rows": [ROW]}, lambda storage, path: [one.to_json() for one in read_report_rows(storage, path)]),
    "profile": (PROFILE, lambda storage, _: profile_text(storage)),
}
HOSTILE: list[tuple[str, tuple[str | int, ...], Any]] = [
    ("result", (), []),
    ("result", ("trial",), None),
    ("result", ("trial", "id"), "../../x"),
    ("result", ("trial", "id"), "x\nFAILED y"),
    ("result", ("trial", "task"), 7),
    ("result", ("trial", "num_labelled"), -1),
    ("result", ("trial", "num_labelled"), True),
    ("result", ("trial", "draw"), 0.5),
    ("result", ("trial", "subjects"), "sub-01"),
    ("result", ("trial", "subjects"), [7] * 1000),
    ("result", ("trial", "settings"), {"hook": 1}),
    ("result", ("trial", "settings", "steps"), "2"),
    ("result", ("validation", "dice_mean"), 1.5),
    ("result", ("validation", "dice_mean"), "0.5"),
    ("result", ("seconds",), -1),
    ("result", ("weights",), "../../../etc/passwd"),
    ("result", ("weights",), "/etc/passwd"),
    ("result", ("num_prototypes",), [2**60]),
    ("result", ("row", "predictions"), "trials/\u202egnp"),
    ("result", ("row", "dice"), {str(number): "x" for number in range(200)}),
    ("result", ("row", "backbone_sha256"), "abc"),
    ("candidates", (), {}),
    ("candidates", (0,), [{}]),
    ("candidates", (0, 0), {"learning_rate": "0.01"}),
    ("candidates", (1, 1), {"failed": "why"}),
    ("sweep", ("num_trials",), 0),
    ("sweep", ("trials_s",), 1e300),
    ("sweep", ("sweep_s",), "2"),
    ("reading", ("time",), 7),
    ("reading", ("trial",), ["x"]),
    ("report", ("rows",), {}),
    ("report", ("rows", 0, "dice_mean"), 7),
    ("profile", ("parts",), {"x": 1}),
    ("profile", ("memory",), []),
    ("profile", ("operators", 0, "share"), "much"),
]


def put(storage: Storage, kind: str, content: bytes) -> None:
    storage.write_bytes(PATHS[kind], content)


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(copy[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_valid_document_is_read_unchanged(kind: str, tmp_path: Path) -> None:
    value, read = DOCUMENTS[kind]
    storage = Storage(str(tmp_path))
    put(storage, kind, json.dumps(value).encode())
    found = read(storage, PATHS[kind])
    wanted = {"result": RESULT, "candidates": [tuple(one) for one in value], "report": [ROW]}.get(kind, [value])
    assert "data" in found if kind == "profile" else found == wanted


@pytest.mark.parametrize(("kind", "place", "wrong"), HOSTILE)
def test_a_wrong_value_is_refused_with_its_key(
    kind: str, place: tuple[Any, ...], wrong: object, tmp_path: Path
) -> None:
    value, read = DOCUMENTS[kind]
    storage = Storage(str(tmp_path))
    put(storage, kind, json.dumps(changed(value, place, wrong)).encode())
    with pytest.raises(DamagedError, match=r"is damaged: .*") as refusal:
        read(storage, PATHS[kind])
    text = str(refusal.value)
    assert PATHS[kind] in text and len(text) < 1500 and "\n" not in text
    assert ".".join(map(str, place)) in text


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("content", [b"", b"[", b"[" * 100_000, b"NaN", b'{"a": 1, "a": 2}', b"\xff", b"9" * 5000])
def test_an_unparsable_document_is_refused_by_name(kind: str, content: bytes, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    put(storage, kind, content)
    with pytest.raises(DamagedError, match=PATHS[kind]):
        DOCUMENTS[kind][1](storage, PATHS[kind])


@pytest.mark.parametrize("kind", DOCUMENTS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_damaged_document_raises_a_data_error(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    value, read = DOCUMENTS[kind]
    content = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"", b"\0", b"[", b"}", b",", b"1e9", b"-"])
        )
    storage = Storage(str(tmp_path))
    put(storage, kind, bytes(content))
    with contextlib.suppress(DamagedError):
        read(storage, PATHS[kind])


def test_the_size_of_documents_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    put(storage, "result", json.dumps(RESULT).encode())
    monkeypatch.setattr(stored, "MAX_BYTES", 100)
    with pytest.raises(DamagedError, match="more than"):
        read_result(storage, PATHS["result"])


def test_every_document_from_outside_is_read_within_limits() -> None:
    """Python's own readers accept any depth, number and size, so only three modules may use them, and a script that runs without p2r."""
    allowed = {"p2r/documents.py", "p2r/plain_yaml.py", "p2r/logs.py", "p2r/export/add_to_plans.py"}
    readers = {
        "json.load",
        "json.loads",
        "yaml.load",
        "yaml.safe_load",
        "yaml.full_load",
        "pickle.load",
        "pickle.loads",
    }
    found = {
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("p2r/**/*.py"), *ROOT.glob("cluster/**/*.py")]
        for name, _ in uses_of(path.read_text())
        if name in readers
    }
    assert found <= allowed, found - allowed
