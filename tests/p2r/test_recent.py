"""Loading again: a pin needs no request, and a storage that is down is replaced by what was read from it last."""

import errno
import hashlib
import logging
import os
from pathlib import Path

import pytest

import p2r
from cluster.verify import verify
from p2r import recent
from p2r.errors import StorageError
from p2r.published.promotion import promote
from p2r.published.reports import add_report
from p2r.storage import Storage
from tests.publishing import publish_toy

pytestmark = pytest.mark.s3
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recent, "_DEADLINE_S", 0.2)
    return tmp_path / "cache"


def test_what_was_loaded_once_loads_again_without_its_storage(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, other = publish_toy(f"{s3_url}/toy/1"), publish_toy(f"{s3_url}/toy/2", seed=1)
    promote(made["pin"], "stable", forced="a toy without health", say=lambda line: None)
    references = (made["pin"], made["url"], f"{s3_url}/toy@stable")
    for reference in references:
        p2r.load_backbone(reference)
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
    monkeypatch.setenv("P2R_S3_DEADLINE_S", "0.2")
    with caplog.at_level(logging.WARNING):
        assert p2r.load_backbone(made["pin"]).manifest["pin"] == made["pin"]
    assert caplog.text == ""
    for reference in references[1:]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert p2r.load_backbone(reference).manifest["pin"] == made["pin"]
        assert "using the content that" in caplog.text and NOWHERE in caplog.text
    with pytest.raises(StorageError, match="cannot read"):
        p2r.load_backbone(other["pin"])
    pointed = references[-1]
    for act in (
        lambda: promote(pointed, "best", forced="a toy", say=lambda line: None),
        lambda: add_report(pointed, "nowhere"),
        lambda: verify(pointed, key=None),
    ):
        with pytest.raises(StorageError, match=r"cannot read .*@stable"):
            act()


def test_a_document_that_was_damaged_in_the_cache_is_read_from_the_storage_again(s3_url: str, own_cache: Path) -> None:
    made = publish_toy(f"{s3_url}/toy/1")
    p2r.load_backbone(made["pin"])
    kept = own_cache / "documents" / made["sha256"]
    assert kept.read_bytes() == Storage(made["url"]).read_bytes("manifest.json")
    kept.write_bytes(b"{}")
    assert p2r.load_backbone(made["pin"]).manifest["sha256"] == made["sha256"]
    assert kept.read_bytes() != b"{}"


def test_a_version_that_was_exchanged_in_its_storage_is_noticed_without_a_pin(s3_url: str) -> None:
    made, other = publish_toy(f"{s3_url}/toy/1"), publish_toy(f"{s3_url}/toy/2", seed=1)
    p2r.load_backbone(made["url"])
    for name in Storage(other["url"]).list():
        Storage(made["url"]).write_bytes(name, Storage(other["url"]).read_bytes(name))
    assert p2r.load_backbone(made["url"]).manifest["sha256"] == other["sha256"]


def test_the_documents_used_last_are_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "_MAX_FILES", 4)
    for number in range(5):
        recent.keep(str(number).encode(), url=f"s3://b/{number}")
    assert len(list((own_cache / "documents").iterdir())) == 4
    assert recent._last_content("s3://b/4") == b"4" and recent._last_content("s3://b/0") is None


def test_a_damaged_copy_of_the_weights_in_the_cache_is_fetched_again(s3_url: str, own_cache: Path) -> None:
    made = publish_toy(f"{s3_url}/toy/1")
    p2r.load_backbone(made["pin"])
    entry = made.facts.files.weights
    copy = own_cache / "objects" / entry.sha256
    sound = copy.read_bytes()
    damaged = sound[:-1] + bytes([sound[-1] ^ 1])
    copy.write_bytes(damaged)
    assert p2r.load_backbone(made["pin"]).manifest["pin"] == made["pin"]
    assert copy.read_bytes() == sound
    copy.unlink()
    Storage(made["url"]).write_bytes(entry.name, damaged)
    with pytest.raises(StorageError, match=f"{entry.name}: it does not have the digest"):
        p2r.load_backbone(made["pin"])


def test_a_document_that_is_replaced_while_it_is_read_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "toy"))
    storage.write_bytes("@stable.json", b"short")
    facts_of = Storage.facts

    def facts(self: Storage, path: str) -> object:
        found = facts_of(self, path)
        storage.write_bytes(path, b"longer than before")
        return found

    monkeypatch.setattr(Storage, "facts", facts)
    assert recent.read_bounded(storage, "@stable.json", 100) == b"longer than before"
    assert recent.read_bounded(storage, "@stable.json", 4) == b"longe"


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOENT, errno.EPERM])
def test_a_kept_document_is_found_where_nothing_can_be_changed(
    error: int, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(error, "not here")

    recent.keep(b"1", url="s3://b/1")
    recent.keep(b"2", url="s3://b/2")
    first, second = (hashlib.sha256(content).hexdigest() for content in (b"1", b"2"))
    (own_cache / "documents" / second).write_bytes(b"damaged")
    monkeypatch.setattr(os, "utime", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    assert recent.find(first) == b"1" and recent.find(second) is None
