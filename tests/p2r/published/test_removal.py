"""Removal: nothing that is named is lost, whoever names it when; a killed removal is completed; racing publishers stay whole."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

import p2r
from p2r.artefact import MANIFEST, Artefact, open_artefact
from p2r.backbone import verify_artefact
from p2r.errors import StorageError
from p2r.pointers import file_of, move, read_pointer
from p2r.published import promotion, removal
from p2r.published.collection import enclosing_storage, read_collections
from p2r.published.promotion import promote
from p2r.published.removal import plan_removal, remove
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage
from tests.p2r.published.conftest import publish_version

LINEAGE: dict[str, Any] = {"checkpoint_sha256": "0" * 64}


def quiet(line: str) -> None:
    pass


def decisions(url: str, **options: Any) -> dict[str, bool]:
    return {
        item.version.version: item.is_removed for item in plan_removal(url, min_age_days=0, **options) if item.is_whole
    }


def versions_of(url: str) -> set[str]:
    return {one.version for collection in read_collections(url) for one in collection.versions}


@pytest.mark.s3
def test_only_what_nothing_names_is_removed_and_only_when_asked(place: str) -> None:
    parent = publish_version(f"{place}/parent")
    publish_version(f"{place}/stable", seed=1)
    publish_version(f"{place}/1-step-10", seed=2)
    if place.startswith("s3://"):
        time.sleep(1.1)  # its clock counts seconds
    named = {"parents": [{"reference": parent.pin, "format": "p2r-backbone/2", "sha256": parent.sha256}]}
    publish_version(f"{place}/child", seed=3, lineage=LINEAGE | named)
    promote(f"{place}/stable", "stable", forced=None, say=quiet)
    now_s = time.time() + 5
    assert decisions(place, now_s=now_s) == {"parent": False, "stable": False, "1-step-10": True, "child": False}
    assert not any(item.is_removed for item in plan_removal(place, min_age_days=1))
    assert versions_of(place) == {"parent", "stable", "1-step-10", "child"}  # nothing was asked for yet
    if place.startswith("s3://"):
        time.sleep(1.1)  # its clock counts seconds
    done = {item.version.version: item for item in remove(place, min_age_days=0)}
    assert done["1-step-10"].is_removed and done["1-step-10"].num_bytes > 0
    assert versions_of(place) == {"parent", "stable", "child"}
    assert Storage(f"{place}/1-step-10").list() == []
    assert "parent of" in done["parent"].line() and "@stable" in done["stable"].line()
    for version in ("parent", "stable", "child"):
        verify_artefact(open_artefact(parse_reference(f"{place}/{version}"), is_fresh=True))


def _publish_parent_and_newer(place: str) -> Artefact:
    parent = publish_version(f"{place}/1")
    publish_version(f"{place}/2", seed=1)
    os.utime(f"{place}/1/manifest.json", (1_000_000, 1_000_000))
    return parent


def _publish_child(url: str, parent: Artefact) -> None:
    named = {"parents": [{"reference": parent.pin, "format": "p2r-backbone/2", "sha256": parent.sha256}]}
    publish_version(url, seed=3, lineage=LINEAGE | named)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("backbones", ""),
        ("models", ""),
        ("backbones/toy", ""),
        ("", None),
        ("elsewhere/toy", None),
        ("variants/first", None),
        ("variants/first/backbones/toy", "variants/first/"),
    ],
)
def test_the_storage_of_a_name_is_the_folder_above_backbones_or_models(
    tmp_path: Path, part: str, expected: str | None
) -> None:
    # The storage itself is in a folder called `models`.
    for folder in ("", "variants/first/"):
        Storage(f"{tmp_path}/models/run").write_bytes(f"{folder}backbones/toy/1/manifest.json", b"{}")
    found = enclosing_storage(f"{tmp_path}/models/run/{part}")
    assert found == (None if expected is None else f"file://{tmp_path}/models/run/{expected}")


def test_a_version_is_kept_that_another_name_of_the_storage_has_as_its_parent(tmp_path: Path) -> None:
    parent = _publish_parent_and_newer(f"{tmp_path}/backbones/toy")
    _publish_child(f"{tmp_path}/backbones/other/1", parent)
    done = {item.version.storage.url: item for item in remove(f"{tmp_path}/backbones/toy", min_age_days=0)}
    item = done[f"file://{tmp_path}/backbones/toy/1"]
    assert not item.is_removed and "parent of" in item.line() and "other/1" in item.line()
    p2r.load_backbone(parent.pin)


def test_a_version_that_another_name_has_as_its_parent_after_the_plan_is_put_into_use_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"{tmp_path}/backbones/toy"
    parent = _publish_parent_and_newer(place)
    look = removal._named_now

    def named_before(url: str) -> dict[str, str]:
        _publish_child(f"{tmp_path}/backbones/other/1", parent)
        return look(url)

    monkeypatch.setattr(removal, "_named_now", named_before)
    (item,) = [one for one in remove(place, min_age_days=0) if one.version.version == "1"]
    assert not item.is_removed and "other/1 names it; it is in use again" in item.line()


def test_of_versions_written_at_the_same_time_all_count_as_the_newest(tmp_path: Path) -> None:
    place = tmp_path / "backbones/toy"
    for number in range(3):
        publish_version(f"{place}/{number}", seed=number)
        at = 1_000_000 + 1000 * (number > 0)
        os.utime(place / f"{number}/manifest.json", (at, at))
    assert decisions(str(place)) == {"0": True, "1": False, "2": False}


@pytest.fixture
def place_of_two(tmp_path: Path) -> str:
    """A name with two versions, of which nothing names the first."""
    place = str(tmp_path / "backbones/toy")
    publish_version(f"{place}/1")
    publish_version(f"{place}/2", seed=1)
    return place


class Killed(BaseException):
    """What stops a removal."""


@pytest.mark.parametrize("stop", ["after marking", "after one file", "before the mark is deleted"])
def test_a_killed_removal_is_completed_by_the_next_and_loses_nothing_named(
    stop: str, place_of_two: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = Storage.delete
    deleted: list[str] = []

    def die(*_: Any) -> Any:
        raise Killed

    def dying_delete(storage: Storage, path: str) -> None:
        if (stop == "after one file" and deleted) or (stop.startswith("before") and path == MANIFEST):
            raise Killed
        if not path.startswith(".tmp"):
            deleted.append(path)
        delete(storage, path)

    with monkeypatch.context() as killing:
        if stop == "after marking":
            killing.setattr(removal, "_named_now", die)
        else:
            killing.setattr(Storage, "delete", dying_delete)
        with pytest.raises(Killed):
            remove(place_of_two, min_age_days=0)
    with pytest.raises(StorageError, match=r"toy/1/manifest\.json was put out of use by p2r gc on 20"):
        p2r.load_backbone(f"{place_of_two}/1")
    with pytest.raises(StorageError, match="was put out of use by p2r gc"):
        publish_version(f"{place_of_two}/1")  # it may not commit while files are being deleted
    p2r.load_backbone(f"{place_of_two}/2")
    assert decisions(place_of_two) == {"1": False, "2": False}  # another removal may be at work
    monkeypatch.setattr(removal, "_ABANDONED_S", -5.0)
    remove(place_of_two, min_age_days=0)
    assert versions_of(place_of_two) == {"2"}
    p2r.load_backbone(publish_version(f"{place_of_two}/1").pin)


def test_a_version_that_a_pointer_names_after_the_plan_is_put_into_use_again(
    place_of_two: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_artefact(Reference(f"{place_of_two}/1"))
    look = removal._named_now

    def named_before(url: str) -> dict[str, str]:
        move(Storage(place_of_two), "stable", version="1", sha256=first.sha256, checks=[], forced=None, since=None)
        return look(url)

    monkeypatch.setattr(removal, "_named_now", named_before)
    (item,) = [one for one in remove(place_of_two, min_age_days=0) if one.version.version == "1"]
    assert not item.is_removed and "@stable names it; it is in use again" in item.line()
    assert p2r.load_backbone(f"{place_of_two}@stable").manifest["pin"] == first.pin


def test_a_pointer_that_was_moved_to_a_version_beside_its_removal_is_moved_back(
    place_of_two: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(f"{place_of_two}/2", "stable", forced=None, say=quiet)

    def removed_after(versions: Storage, pointer: str, **options: Any) -> Any:
        moved = move(versions, pointer, **options)
        Storage(f"{place_of_two}/1").delete("")
        return moved

    monkeypatch.setattr(promotion, "move", removed_after)
    with pytest.raises(StorageError, match=r"toy/1 was removed while it was promoted, and stable was moved back"):
        promote(f"{place_of_two}/1", "stable", forced=None, say=quiet)
    found = read_pointer(Storage(place_of_two), "stable")
    assert found is not None and found[0].target.version == "2"


def test_a_publisher_whose_old_files_are_removed_before_it_commits_writes_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, create = str(tmp_path / "toy"), Storage.create

    def interrupted(storage: Storage, path: str, data: bytes) -> bool:
        raise Killed

    monkeypatch.setattr(Storage, "create", interrupted)
    with pytest.raises(Killed):
        publish_version(f"{place}/1")
    assert versions_of(place) == {"1"} and not decisions(place, now_s=time.time() - 3600)["1"]

    def removed_before(storage: Storage, path: str, data: bytes) -> bool:
        monkeypatch.setattr(Storage, "create", create)
        if path == MANIFEST:
            (item,) = remove(place, min_age_days=0)
            assert item.is_removed and "it was never completed" in item.reason
        return create(storage, path, data)

    monkeypatch.setattr(Storage, "create", removed_before)
    verify_artefact(publish_version(f"{place}/1"))


def test_leftovers_of_losers_are_removed_and_files_of_others_are_not(tmp_path: Path) -> None:
    place = tmp_path / "toy"
    artefact = publish_version(f"{place}/1")
    leftover, note = place / f"1/model-{'0' * 64}.safetensors", place / "1/notes.txt"
    for path in (leftover, note):
        path.write_text("x")
        os.utime(path, (1, 1))
    assert [item.line().split()[0] for item in plan_removal(str(place), min_age_days=7)] == ["keep", "remove"]
    remove(str(place), min_age_days=7)
    assert not leftover.exists() and note.exists()
    verify_artefact(artefact)


def test_temporary_files_of_killed_publishers_are_removed_and_those_of_writers_at_work_are_not(tmp_path: Path) -> None:
    place = tmp_path / "backbones/toy"
    artefact = publish_version(f"{place}/1")
    (place / "2").mkdir()
    old = [place / "1/.tmp-abcd_123", place / "2/.tmp-abcd_123"]
    kept = [place / "1/.tmp-abcd_124", place / "1/.tmp-lock-manifest.json", place / "1/.tmp-notes", place / ".tmp-x"]
    other = tmp_path / "backbones/other/1/.tmp-abcd_123"  # nothing tells that this is p2r's
    for path in (*old, *kept, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        if path != kept[0]:
            os.utime(path, (1, 1))
    remove(str(tmp_path), min_age_days=7)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in (*kept, other))
    verify_artefact(artefact)


def test_nothing_is_promoted_or_removed_where_conditions_are_ignored(
    place_of_two: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "replace", lambda self, path, data, tag: True)
    with pytest.raises(StorageError, match="ignores If-Match"):
        promote(f"{place_of_two}/1", "stable", forced=None, say=quiet)
    with pytest.raises(StorageError, match="ignores If-Match"):
        remove(place_of_two, min_age_days=0)
    assert versions_of(place_of_two) == {"1", "2"} and read_pointer(Storage(place_of_two), "stable") is None


@pytest.mark.parametrize("damage", ["manifest", "pointer"])
def test_what_cannot_be_read_protects_what_it_may_name(damage: str, place_of_two: str) -> None:
    path = Path(place_of_two, file_of("stable")) if damage == "pointer" else Path(place_of_two, "1", MANIFEST)
    path.write_text("{")
    assert not any(decisions(place_of_two).values())
