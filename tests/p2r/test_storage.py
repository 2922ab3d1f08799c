import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from p2r.counters import Counters
from p2r.errors import DamagedError, StorageError
from p2r.storage import Storage
from tests.fault_proxy import ALWAYS, Fault, FaultProxy


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


@pytest.mark.parametrize("name", ["run #1", "what?x=1", "a%20b", "a;b&c", "<b>", "Läufe 心臓"])
def test_every_character_of_a_folder_s_name_is_kept(name: str, tmp_path: Path) -> None:
    for url in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}/"):
        storage = Storage(url)
        storage.child("below").write_bytes("x", b"1")
        assert storage.url == Storage(storage.url).url == f"file://{tmp_path}/{name}"
        assert (tmp_path / name / "below/x").read_bytes() == b"1"
        assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://bucket/x",
        "s3:///x",
        "s3:bucket/x",
        "file://host/x",
        "file:/x",
        "files:///x",
        "/x\ny",
        "file:///x\x1b[2J",
        "~nosuchuser/x",
    ],
)
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
    assert storage.read_bytes("a/b.bin", max_bytes=7) == b"content"
    with pytest.raises(DamagedError, match="more than the 6 bytes"):
        storage.read_tagged("a/b.bin", max_bytes=6)
    assert not storage.exists("a")
    assert storage.list() == ["a/b.bin"]
    digest = hashlib.sha256(b"content").hexdigest()
    assert storage.local("a/b.bin", sha256=digest, num_bytes=7).read_bytes() == b"content"
    with pytest.raises(StorageError, match="does not exist"):
        storage.read_bytes("a/c.bin")
    storage.write_bytes("a/d.bin", b"changed")
    with pytest.raises(StorageError, match="damaged"):
        storage.local("a/d.bin", sha256=hashlib.sha256(b"as it was").hexdigest())
    storage.delete("a")
    assert storage.list() == []


@pytest.mark.s3
@pytest.mark.parametrize("place", ["the environment", "a file"])
def test_a_wrong_key_is_refused_and_not_repeated(
    place: str, s3_url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor where the server repeats it: keys of the environment are masked in every error, those of a file by the client."""
    secret = "not-the-right-one"
    if place == "a file":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        keys = f"[default]\naws_access_key_id = SOMEBODY\naws_secret_access_key = {secret}\n"
        (tmp_path / "credentials").write_text(keys)
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as refused:
        Storage(f"{s3_url}/run").check_writable()
    proxy.add(Fault("status", on="PUT ", times=ALWAYS, status=403, said=f"you signed with {secret}"))
    with pytest.raises(StorageError, match=r"you signed with \*\*\*") as repeated:
        Storage(f"{s3_url}/run").check_writable()
    for caught in (refused, repeated):
        assert secret not in "".join(traceback.format_exception(caught.value))


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.s3)])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A folder, then a bucket."""
    url = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("s3_url")
    return Storage(url, counters=Counters())


def test_what_is_there_is_not_created(shared: Storage) -> None:
    assert shared.create("a/b", b"first")
    assert not shared.create("a/b", b"second")
    assert shared.read_bytes("a/b") == b"first"
    assert shared.list() == ["a/b"]


def test_of_eight_that_create_exactly_one_wins(shared: Storage) -> None:
    for round_ in range(2):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n, r=round_: shared.create(f"x{r}", b"%d" % n), range(8)))
        assert won.count(True) == 1
        assert shared.read_bytes(f"x{round_}") == b"%d" % won.index(True)


def test_a_replacement_needs_the_version_that_it_was_made_from(shared: Storage) -> None:
    assert shared.read_tagged("x") is None
    assert not shared.replace("x", b"0", tag="no such version")
    assert shared.replace("x", b"1", tag=None)
    assert not shared.replace("x", b"2", tag=None)
    content, tag = shared.read_tagged("x") or (b"", "")
    assert content == b"1"
    assert shared.replace("x", b"2", tag=tag)
    assert not shared.replace("x", b"3", tag=tag)
    assert shared.read_bytes("x") == b"2"
    assert shared.list() == ["x"]


def count_up(storage: Storage, times: int) -> None:
    """Add 1 to the number in a file, however many others do, `times` times."""
    done = 0
    while done < times:
        tagged = storage.read_tagged("count")
        number = int(tagged[0]) if tagged else 0
        done += storage.replace("count", b"%d" % (number + 1), tag=tagged[1] if tagged else None)


def test_threads_that_replace_what_they_read_lose_no_update(shared: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: count_up(shared, 5), range(8)))
    assert shared.read_bytes("count") == b"40"


def test_processes_that_replace_what_they_read_lose_no_update(tmp_path: Path, repository: Path) -> None:
    code = f"from tests.p2r.test_storage import *; count_up(Storage({str(tmp_path)!r}), 50)"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=repository) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0] * 3
    assert (tmp_path / "count").read_bytes() == b"150"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_a_file_is_uploaded_over_another_or_only_where_none_is(shared: Storage, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(b"first")
    assert shared.upload(local, "a/x", if_absent=True)
    local.write_bytes(b"second")
    assert not shared.upload(local, "a/x", if_absent=True)
    assert shared.read_bytes("a/x") == b"first"
    assert shared.upload(local, "a/x")
    assert shared.read_bytes("a/x") == b"second"
    assert shared.list() == ["a/x"]
    with pytest.raises(StorageError, match=r"cannot write .*a/y: FileNotFoundError"):
        shared.upload(tmp_path / "nothing", "a/y")


def test_a_range_is_exactly_the_bytes_asked_for(shared: Storage) -> None:
    content = bytes(range(256)) * 40
    shared.write_bytes("x", content)
    for start, stop in ((0, 1), (0, len(content)), (300, 700), (len(content) - 1, len(content)), (5, 5)):
        assert shared.read_range("x", start, stop) == content[start:stop]
    assert shared.counters.snapshot()["range_reads"] == 5
    with pytest.raises(StorageError, match=f"bytes up to {len(content) + 1} were requested: it is damaged"):
        shared.read_range("x", 10, len(content) + 1)
    with pytest.raises(StorageError, match="nothing"):
        shared.read_range("nothing", 0, 1)
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        shared.read_range("x", 5, 4)


def test_a_download_is_whole_and_checked_or_leaves_what_was_there(shared: Storage, tmp_path: Path) -> None:
    shared.write_bytes("x", b"content")
    shared.write_bytes("empty", b"")
    target = tmp_path / "below" / "target"
    shared.download("x", target, sha256=hashlib.sha256(b"content").hexdigest(), num_bytes=7)
    shared.download("empty", tmp_path / "empty", sha256=hashlib.sha256(b"").hexdigest(), num_bytes=0)
    assert (tmp_path / "empty").read_bytes() == b""
    with pytest.raises(StorageError, match="damaged"):
        shared.download("x", target, sha256=hashlib.sha256(b"another").hexdigest())
    with pytest.raises(StorageError, match="has 7 bytes, its manifest says 8"):
        shared.download("x", target, num_bytes=8)
    with pytest.raises(StorageError, match="nothing"):
        shared.download("nothing", target)
    assert target.read_bytes() == b"content"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_listing_has_what_lies_below_and_nothing_beside(shared: Storage) -> None:
    for path in ("a/1", "a/b/2", "ab", "c", ".tmp-left", "a/.tmp-left"):
        shared.write_bytes(path, b"1")
    assert shared.list() == ["a/1", "a/b/2", "ab", "c"]
    assert shared.list("a") == ["a/1", "a/b/2"]
    assert shared.child("a").list() == ["1", "b/2"]
    assert shared.list("a/") == ["a/1", "a/b/2"]
    assert shared.list("c") == ["c"]
    assert shared.list("nothing") == []
    shared.delete("a")
    shared.delete("c")
    shared.delete("nothing")
    assert shared.list() == ["ab"]
    assert shared.version("ab")[0] == 1


def test_a_storage_knows_when_a_file_was_written(shared: Storage) -> None:
    before = time.time()
    shared.write_bytes("a/x", b"12")
    facts = shared.facts("a/x")
    assert facts is not None
    assert (facts.num_bytes, facts.version) == shared.version("a/x")
    assert before - 2 < facts.modified_s < time.time() + 2  # a server counts in seconds
    assert shared.facts("a") is None and shared.facts("a/x/y") is None and shared.facts("nothing") is None


def test_a_storage_whose_conditions_hold_is_good_for_several_writers(shared: Storage) -> None:
    shared.check_conditional()
    assert shared.list() == []


def test_a_storage_that_ignores_conditions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "create", lambda self, path, data: self.write_bytes(path, data) or True)
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        Storage(str(tmp_path)).check_conditional()


@pytest.mark.parametrize("is_always", [True, False])
def test_a_storage_that_replaces_whatever_is_there_or_never_is_refused(
    is_always: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "replace", lambda self, path, data, tag: is_always)
    with pytest.raises(StorageError, match="ignores If-Match"):
        Storage(str(tmp_path)).check_conditional()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
def test_an_object_larger_than_the_cache_is_refused_with_the_way_out(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("P2R_CACHE_GIB", "0.000001")
    Storage(s3_url).write_bytes("x", bytes(2000))
    with pytest.raises(StorageError, match=r"/x does not fit into the cache .*: set P2R_CACHE_GIB"):
        Storage(s3_url).local("x")


def test_what_a_folder_holds_is_read_within_bounds(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("rows.jsonl", b'{"a": 1}\n{"a": NaN}\n')
    assert storage.read_bytes("rows.jsonl", max_bytes=20) == storage.read_bytes("rows.jsonl")
    with pytest.raises(DamagedError, match="more than the 19 bytes"):
        storage.read_bytes("rows.jsonl", max_bytes=19)
    assert storage.read_rows("rows.jsonl", nan_as_none=True) == [{"a": 1}, {"a": None}]
    with pytest.raises(DamagedError, match=r"rows\.jsonl, line 2 is not JSON: NaN"):
        storage.read_rows("rows.jsonl")
    storage.write_bytes("rows.jsonl", b"[1]\n")
    with pytest.raises(DamagedError, match="line 1 is not a JSON object"):
        storage.read_rows("rows.jsonl")
    with pytest.raises(ValueError, match="relative"):
        storage.read_bytes("a\0b")


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    {"a pipe": lambda: os.mkfifo(path), "a device": lambda: path.symlink_to("/dev/zero"), "a folder": path.mkdir}[
        kind
    ]()
    storage = Storage(str(tmp_path))
    signal.alarm(60)  # ends the tests: nothing else could
    for read in (
        lambda: storage.read_bytes("x.json"),
        lambda: storage.read_json("x.json"),
        lambda: storage.read_tagged("x.json", max_bytes=10),
        lambda: storage.read_range("x.json", 0, 10),
        lambda: storage.local("x.json"),
        lambda: storage.fetch("x.json", io.BytesIO(), sha256="0" * 64, num_bytes=10),
    ):
        with pytest.raises(StorageError, match=r"x\.json"):
            read()
    assert storage.facts("x.json") is None and not storage.exists("x.json")
    signal.alarm(0)


def test_links_that_form_a_loop_end_a_listing(tmp_path: Path) -> None:
    for folder in ("a/b", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("x")
    (tmp_path / "a/linked").symlink_to(tmp_path / "elsewhere")
    for number in range(4):  # each link twice as many paths, without end
        (tmp_path / f"a/b/up-{number}").symlink_to("..")
        (tmp_path / f"a/same-{number}").symlink_to("b")
    assert Storage(str(tmp_path / "a")).list() == ["b/file", "linked/file"]
