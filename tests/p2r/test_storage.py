import hashlib
import pickle
from pathlib import Path

import pytest

from p2r.errors import StorageError
from p2r.storage import Storage


def test_what_is_written_is_read_and_listed(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/a")
    storage.write_bytes("x/y.bin", b"1")
    storage.write_json("z.json", {"b": 1, "a": [2]})
    assert storage.read_bytes("x/y.bin") == b"1"
    assert storage.read_json("z.json") == {"b": 1, "a": [2]}
    assert storage.list() == ["x/y.bin", "z.json"]
    assert storage.child("x").list() == ["y.bin"]
    assert storage.exists("x/y.bin")
    assert not storage.exists("x")


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("x", b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match="disk full"):
        storage.write_bytes("x", b"new")
    monkeypatch.undo()
    assert storage.read_bytes("x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"file://.*/nothing does not exist"):
        Storage(str(tmp_path)).read_bytes("nothing")
    with pytest.raises(StorageError, match="does not exist"):
        Storage(str(tmp_path)).local("nothing")


def test_a_file_of_another_size_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("x", b"12")
    assert storage.local("x", num_bytes=2).read_bytes() == b"12"
    with pytest.raises(StorageError, match="has 2 bytes, its manifest says 3"):
        storage.local("x", num_bytes=3)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        Storage(f"{tmp_path}/file/below").check_writable()


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3:///x", "file://host/x"])
def test_a_url_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(StorageError):
        Storage(url)


def test_paths_do_not_leave_the_storage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stay below"):
        Storage(str(tmp_path)).read_bytes("../x")


def test_a_storage_travels_to_another_process(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(Storage(str(tmp_path)))).url == f"file://{tmp_path}"


@pytest.mark.s3
def test_a_bucket_behaves_like_a_folder(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    storage = Storage(f"{s3_url}/run")
    storage.check_writable()
    assert storage.list() == []
    storage.write_bytes("a/b.bin", b"content")
    assert storage.exists("a/b.bin")
    assert not storage.exists("a")
    assert storage.list() == ["a/b.bin"]
    digest = hashlib.sha256(b"content").hexdigest()
    assert storage.local("a/b.bin", sha256=digest, num_bytes=7).read_bytes() == b"content"
    with pytest.raises(StorageError, match="does not exist"):
        storage.read_bytes("a/c.bin")
    storage.write_bytes("a/d.bin", b"changed")
    with pytest.raises(StorageError, match="damaged"):
        storage.local("a/d.bin", sha256=digest)
    storage.delete("a")
    assert storage.list() == []


@pytest.mark.s3
def test_a_wrong_key_is_refused_and_not_repeated(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-right-one")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
        Storage(f"{s3_url}/run").check_writable()
    assert "not-the-right-one" not in str(caught.value)
