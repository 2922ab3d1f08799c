"""The manifest of a checkpoint is checked before anything that it names is fetched."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r.documents import is_relative_path
from p2r.engine.checkpoint import newest_checkpoint
from p2r.engine.checkpoint_manifest import FORMAT, SavedCheckpoint
from p2r.errors import CheckpointError, DamagedError
from p2r.storage import Storage

ENTRY = {"sha256": "0" * 64, "num_bytes": 3}
SOUND: dict[str, Any] = {
    "format": FORMAT,
    "step": 4,
    "state": {"stream": {"step": 4}},
    "config": {"zero_stage": 1, "steps": 10},
    "world_size": 1,
    "init_from": None,
    "tensors": ["ema"],
    "files": {"model.safetensors": ENTRY, "ema.safetensors": ENTRY, "deepspeed/a_states.pt": ENTRY},
}
PATH = "checkpoints/step-00000004/manifest.json"


def read(folder: Path, text: str) -> SavedCheckpoint | None:
    storage = Storage(str(folder))
    storage.write_bytes(PATH, text.encode())
    return newest_checkpoint(storage)


def test_a_sound_manifest_is_read(tmp_path: Path) -> None:
    saved = read(tmp_path, json.dumps({**SOUND, "of a later version": [1]}))
    assert saved is not None
    assert (saved.path, saved.step) == ("checkpoints/step-00000004", 4)
    assert saved.manifest.to_json() == {**SOUND, "of a later version": [1]}


@pytest.mark.parametrize(
    "name",
    ["/etc/cron.d/x", "../x", "a/../../x", "a//x", "./x", "", "a\\..\\x", "C:\\x", "a\0", "a\n", "x/", "n" * 2000],
)
def test_a_file_that_leads_out_of_the_folder_makes_a_manifest_damaged(tmp_path: Path, name: str) -> None:
    assert not is_relative_path(name)
    assert read(tmp_path, json.dumps({**SOUND, "files": {**SOUND["files"], name: ENTRY}})) is None


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": ["../../x"]},
        {"tensors": ["absent"]},
        {"files": {}},
        {"files": {"model.safetensors": {"sha256": "x", "num_bytes": 3}, "ema.safetensors": ENTRY}},
        {"files": {"model.safetensors": {**ENTRY, "num_bytes": 2**60}, "ema.safetensors": ENTRY}},
        {"world_size": 0},
        {"world_size": "1"},
        {"step": -1},
        {"step": 10**20},
        {"config": {}},
        {"config": {"zero_stage": True}},
        {"state": [1]},
    ],
)
def test_a_manifest_that_breaks_a_rule_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    assert read(tmp_path, json.dumps({**SOUND, **change})) is None


@settings(max_examples=120, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_no_damage_to_a_manifest_ends_in_another_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz-checkpoint"
    content = bytearray(json.dumps(SOUND).encode())
    pieces = [b"null", b"[", b"{", b"-1", b"9" * 30, b"1e999", b'"x"', b"\xff", b"NaN", b'"step": 1, ', b"/", b".."]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 6))] = data.draw(st.sampled_from(pieces))
    storage = Storage(str(folder))
    storage.write_bytes(PATH, bytes(content))
    try:
        found = newest_checkpoint(storage)
    except (DamagedError, CheckpointError):
        return
    assert found is None or all(map(is_relative_path, found.manifest.files))
