"""A checkpoint is complete or absent, whoever fails on the way."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2r.engine.checkpoint_manifest import CheckpointManifest, SavedConfig, SavedState
from p2r.engine.uploading import Uploader, outdated, own_folder, path_of, step_of
from p2r.errors import StorageError
from p2r.files import file_sha256, locked
from p2r.storage import Storage


def peers(rank: int = 0, world_size: int = 1) -> Any:
    """Ranks of which only this one is a process: the others are played by the test."""

    def together(work: Callable[[], Any]) -> list[Any]:
        return [work()]

    return SimpleNamespace(rank=rank, world_size=world_size, first=lambda work: work(), together=together)


def uploader(storage: Storage, *, rank: int = 0, world_size: int = 1, **options: Any) -> Uploader:
    made = Uploader(storage, peers(rank, world_size), **{"keep": 2, **options})
    made._attempt = "this one"
    return made


def start(made: Uploader, folder: Path, step: int, **files: str) -> None:
    for name, text in (files or {"weights": f"of step {step}"}).items():
        (folder / f"{step}").mkdir(exist_ok=True)
        (folder / f"{step}" / name).write_text(text)
    manifest = CheckpointManifest(
        step=step, state=SavedState(), config=SavedConfig(steps=10, zero_stage=1), world_size=1, files={}
    )
    made.start(folder / f"{step}", step, manifest=manifest, began_s=time.monotonic())


class Slow(Storage):
    """A storage that takes a file when it is let."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.let = threading.Event()

    def upload(self, local: Path, path: str, *, if_absent: bool = False) -> bool:
        assert self.let.wait(30)
        return super().upload(local, path, if_absent=if_absent)


def test_an_upload_goes_on_beside_whoever_started_it_and_ends_with_the_manifest(tmp_path: Path) -> None:
    storage = Slow(str(tmp_path / "storage"))
    made = uploader(storage)
    start(made, tmp_path, 4, weights="abc", more="d")
    before = made.newest
    assert storage.list() == [] and before is None
    storage.let.set()
    made.finish()
    files = storage.read_json("checkpoints/step-00000004/manifest.json")["files"]
    assert files["weights"] == {
        "sha256": file_sha256(tmp_path / "storage/checkpoints/step-00000004/weights"),
        "num_bytes": 3,
    }
    newest = made.newest
    assert newest is not None and newest.path == path_of(4) and newest.num_bytes == 4
    assert not (tmp_path / "4").exists()


def test_a_checkpoint_waits_for_the_receipts_of_this_attempt(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    receipt, old = "checkpoints/step-00000004/receipts/rank-00001.json", "0" * 64
    storage.write_json(receipt, {"attempt": "an earlier one", "files": {"b": {"sha256": old, "num_bytes": 1}}})
    made = uploader(storage, world_size=2)
    start(made, tmp_path, 4, a="x")
    time.sleep(0.2)
    assert not storage.exists("checkpoints/step-00000004/manifest.json")
    (tmp_path / "4b").mkdir()
    other = uploader(storage, rank=1, world_size=2)
    start(other, tmp_path / "4b", 4, b="y")
    other.finish()
    made.finish()
    files = storage.read_json("checkpoints/step-00000004/manifest.json")["files"]
    assert sorted(files) == ["a", "b"] and files["b"]["sha256"] != old
    assert not storage.exists(receipt)


def test_a_rank_that_cannot_upload_is_named_by_all(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    (tmp_path / "storage/checkpoints/step-00000004").mkdir(parents=True)
    (tmp_path / "storage/checkpoints/step-00000004/b").mkdir()  # where a file should go
    first, second = uploader(storage, world_size=2), uploader(storage, rank=1, world_size=2)
    (tmp_path / "4b").mkdir()
    start(first, tmp_path, 4, a="x")
    start(second, tmp_path / "4b", 4, b="y")
    for made, who in ((second, ""), (first, "rank 1: ")):
        with pytest.raises(StorageError, match=f"checkpoint of step 4 could not be uploaded: {who}cannot write .*/b:"):
            made.finish()
    assert not storage.exists("checkpoints/step-00000004/manifest.json")


def test_a_rank_that_is_gone_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    made = uploader(storage, world_size=2, timeout_s=0.1)
    start(made, tmp_path, 4)
    with pytest.raises(StorageError, match="rank 1 has not uploaded its part"):
        made.finish()
    made = uploader(storage, world_size=2)
    start(made, tmp_path, 6)
    made.close(timeout_s=0.1)
    assert not storage.exists("checkpoints/step-00000006/manifest.json")


FILES = [
    *("checkpoints/step-00000010/manifest.json", "checkpoints/step-00000010/model"),
    *("checkpoints/step-00000020/manifest.json", "checkpoints/step-00000025/model"),
    *("checkpoints/step-00000030/manifest.json", "checkpoints/step-00000035/damaged.json"),
    *("checkpoints/step-00000040/manifest.json", "checkpoints/step-00000050/model", "checkpoints/other"),
]


@pytest.mark.parametrize(
    ("newest", "keep", "keep_every", "gone"),
    [
        (40, 2, 0, [10, 20, 25, 35]),
        (40, 1, 0, [10, 20, 25, 30, 35]),
        (40, 1, 20, [10, 25, 30, 35]),
        (40, 9, 0, [25, 35]),
        (30, 1, 0, [10, 20, 25]),  # what is newer is somebody else's
    ],
)
def test_the_newest_and_every_so_many_stay_and_orphans_go(
    newest: int, keep: int, keep_every: int, gone: list[int]
) -> None:
    assert outdated(FILES, newest, keep=keep, keep_every=keep_every) == gone


def test_old_checkpoints_go_when_a_newer_one_is_complete(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    storage.write_bytes("checkpoints/step-00000003/half", b"")
    made = uploader(storage, keep=1, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        start(made, tmp_path, step)
        made.finish()
    assert {step_of(path) for path in storage.list("checkpoints")} == {4, 8, 10}


def test_a_folder_is_removed_after_whoever_had_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "p2r-checkpoint-left"
    left.mkdir()
    left.with_suffix(".lock").touch()  # of a process that was killed
    with own_folder() as folder:
        assert folder.is_dir() and not left.exists() and not left.with_suffix(".lock").exists()
        with own_folder() as other:
            assert folder.is_dir() and other.is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "p2r-checkpoint-x.lock"), own_folder():
        assert (tmp_path / "p2r-checkpoint-x.lock").exists()
