"""Pointers: followed to a pin, moved by one of several writers, refused by name; hostile documents do no harm."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import p2r
from p2r.errors import DamagedError, InputError, StorageError
from p2r.pointers import MAX_BYTES, file_of, move, read_pointer, resolve
from p2r.published import promotion
from p2r.published.promotion import move_latest, promote
from p2r.published.results import add_results, results_of
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage
from tests.p2r.published.conftest import publish_version, result

Say = Callable[[str], None]


def quiet(line: str) -> None:
    pass


def test_a_reference_is_split_into_its_place_its_pointer_and_its_pin() -> None:
    digest = "0" * 64
    assert parse_reference("s3://b/toy@stable") == Reference("s3://b/toy", None, "stable")
    assert parse_reference(f"toy@stable@sha256:{digest}") == Reference("toy", digest, "stable")
    for text in (
        "toy",
        "s3://b/toy@stable/",
        "/data/me@host/toy",
        "hf://o/n@main",
        "toy@1",
        "s3://k:secret@bucket",
        "toy@Stable",
    ):
        assert parse_reference(text).pointer is None, text
    for reference in (Reference("toy", None, "stable"), Reference("toy", digest, "stable"), Reference("toy", digest)):
        assert parse_reference(str(reference)) == reference


@pytest.mark.s3
def test_a_pointer_is_followed_to_the_pin_of_the_version_it_was_moved_to(place: str) -> None:
    first, second = publish_version(f"{place}/1"), publish_version(f"{place}/2", seed=1)
    with pytest.raises(
        StorageError, match=r"toy has no pointer stable: it has none; `p2r promote .*/VERSION --to stable`"
    ):
        p2r.load_backbone(f"{place}@stable")
    promote(f"{place}/1", "stable", forced=None, say=quiet)
    assert p2r.load_backbone(f"{place}@stable").manifest["pin"] == first.pin
    promote(second.pin, "stable", forced=None, say=quiet)
    assert p2r.load_backbone(f"{place}@stable").manifest["pin"] == second.pin
    pointer = read_pointer(Storage(place), "stable")
    assert pointer is not None
    assert [pointer[0].target.version, *(one.version for one in pointer[0].history)] == ["2", "1"]
    with pytest.raises(DamagedError, match=r"the pointer names .*/2@sha256"):
        resolve(parse_reference(f"{place}@stable@sha256:{first.sha256}"))
    with pytest.raises(StorageError, match=r"has no pointer candidate: it has stable"):
        resolve(parse_reference(f"{place}@candidate"))


@pytest.mark.s3
def test_of_racing_promotions_each_is_checked_against_the_one_before_and_none_is_lost(place: str) -> None:
    number = 4
    for version in range(number):
        publish_version(f"{place}/{version}", seed=version)
    meeting, failures = threading.Barrier(number), []

    def enter(version: int) -> None:
        meeting.wait()
        try:
            promote(f"{place}/{version}", "stable", forced=None, say=quiet)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=enter, args=(version,)) for version in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = read_pointer(Storage(place), "stable")
    assert found is not None
    assert sorted([found[0].target.version, *(one.version for one in found[0].history)]) == sorted(
        map(str, range(number))
    )


@pytest.mark.s3
def test_a_pointer_that_was_moved_since_it_was_read_is_not_moved(place: str) -> None:
    versions = Storage(place)
    facts: dict[str, Any] = {"sha256": "0" * 64, "checks": [], "forced": None}
    assert move(versions, "stable", version="1", since=None, **facts) is not None
    assert move(versions, "stable", version="2", since=None, **facts) is None
    since = read_pointer(versions, "stable")
    assert move(versions, "stable", version="2", since=since, **facts) is not None
    assert move(versions, "stable", version="3", since=since, **facts) is None


def test_checks_refuse_by_name_and_a_reason_overrides_them_on_record(tmp_path: Path) -> None:
    place = str(tmp_path / "toy")
    publish_version(f"{place}/1", dice=0.80)
    publish_version(f"{place}/worse", seed=1, dice=0.60)
    publish_version(f"{place}/noise", seed=2, dice=0.74)
    publish_version(f"{place}/collapsed", seed=3, health={"effective_rank": 1.2, "dead_dimensions_fraction": 0.9})
    publish_version(f"{place}/unknown", seed=4, health=None)
    promote(f"{place}/1", "stable", forced=None, say=quiet)
    refusals = {
        "worse": r"dice: FAILED: below version 1: disc, linear_probe, 1 labelled: 0\.600 against 0\.800, and the noise is 0\.071",
        "collapsed": r"health: FAILED: embeddings have collapsed: effective rank 1\.2 \(at least 2\), dead dimensions 90%.*\n.*"
        r"dice: FAILED: it has no result in common with version 1, which has: disc, linear_probe, 1 labelled",
        "unknown": r"health: FAILED: the backbone was published without metrics",
    }
    for version, reason in refusals.items():
        with pytest.raises(
            InputError, match=rf"toy/{version} is not promoted to toy@stable:\n(.*\n)*? *{reason}[^§]*--force REASON"
        ):
            promote(f"{place}/{version}", "stable", forced=None, say=quiet)
    promote(f"{place}/noise", "stable", forced="not needed", say=quiet)
    found = read_pointer(Storage(place), "stable")
    assert found is not None and found[0].target.version == "noise" and found[0].target.forced is None
    promote(f"{place}/collapsed", "stable", forced="the only one with contrasts", say=quiet)
    found = read_pointer(Storage(place), "stable")
    assert found is not None and found[0].target.forced == "the only one with contrasts"
    assert any("health: FAILED" in one for one in found[0].target.checks)


def test_a_transductive_result_is_neither_compared_with_nor_replaced_by_another(tmp_path: Path) -> None:
    place = str(tmp_path / "toy")
    artefact = publish_version(f"{place}/1", dice=0.60)
    add_results(artefact, [result(0.80, transductive=True)])
    assert [one.mean for one in results_of(artefact)] == [0.60, 0.80]
    promote(f"{place}/1", "stable", forced=None, say=quiet)
    publish_version(f"{place}/2", seed=1, dice=0.60)
    promote(f"{place}/2", "stable", forced=None, say=quiet)
    add_results(publish_version(f"{place}/3", seed=2), [result(0.60, transductive=True)])
    with pytest.raises(InputError, match="no result in common with version 2"):
        promote(f"{place}/3", "stable", forced=None, say=quiet)


def test_a_damaged_version_is_never_promoted(tmp_path: Path) -> None:
    artefact = publish_version(str(tmp_path / "toy/1"))
    (tmp_path / "toy/1" / artefact.manifest.files.weights.name).write_bytes(b"x")
    with pytest.raises(StorageError, match="damaged"):
        promote(artefact.pin, "stable", forced="now", say=quiet)
    with pytest.raises(InputError, match="is not the name of a pointer"):
        promote(artefact.pin, "../1/manifest", forced=None, say=quiet)


def test_the_limits_of_health_are_those_of_the_alert(repository: Path) -> None:
    rule = (repository / "infra/prometheus/generate.py").read_text()
    assert re.search(rf"p2r_embedding_effective_rank\b[^<>]*< {promotion.MIN_EFFECTIVE_RANK:g}\b", rule)
    assert re.search(rf"p2r_embedding_dead_dimensions_ratio\b[^<>]*> {promotion.MAX_DEAD_DIMENSIONS:g}\b", rule)


def test_latest_names_what_was_published_last_also_after_a_publisher_died_before_it_moved_it(tmp_path: Path) -> None:
    place = str(tmp_path / "toy")
    first, second = publish_version(f"{place}/1"), publish_version(f"{place}/2", seed=1)

    def latest() -> str:
        return resolve(parse_reference(f"{place}@latest")).url.rpartition("/")[2]

    move_latest(second.storage, second.sha256, is_new=True)
    move_latest(first.storage, first.sha256, is_new=False)  # published again: nothing new
    assert latest() == "2"
    (tmp_path / "toy" / file_of("latest")).unlink()
    move_latest(first.storage, first.sha256, is_new=False)
    move_latest(second.storage, second.sha256, is_new=False)
    assert latest() == "2"


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a path for a version": lambda one: {**one, "target": {**one["target"], "version": "../../other/1"}},
    "an absolute path": lambda one: {**one, "target": {**one["target"], "version": "/etc"}},
    "the pointer of another name": lambda one: {**one, "name": "other"},
    "another pointer": lambda one: {**one, "pointer": "latest"},
    "no digest": lambda one: {**one, "target": {**one["target"], "sha256": ""}},
    "another format": lambda one: {**one, "format": "p2r-pointer/2"},
    "an unknown key": lambda one: {**one, "url": "s3://evil/x"},
    "a long history": lambda one: {**one, "history": [one["target"]] * 51},
    "a list": lambda one: [one],
    "deep nesting": lambda one: b"[" * 2000,
    "no JSON": lambda one: b"\x80",
    "too long": lambda one: b" " * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_pointer_is_refused_by_name_and_never_followed(attack: str, tmp_path: Path) -> None:
    place = tmp_path / "toy"
    publish_version(f"{place}/1")
    promote(f"{place}/1", "stable", forced=None, say=quiet)
    document = place / file_of("stable")
    value = HOSTILE[attack](json.loads(document.read_text()))
    document.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    with pytest.raises(InputError, match=r"@stable\.json"):
        p2r.load_backbone(f"{place}@stable")
    with pytest.raises(InputError, match=r"@stable\.json"):
        promote(f"{place}/1", "stable", forced="anyway", say=quiet)


@pytest.mark.s3
def test_jobs_that_add_results_at_once_lose_none_and_an_entry_is_replaced_by_its_own_setting(place: str) -> None:
    artefact = publish_version(f"{place}/1", dice=0.5)
    threads = [
        threading.Thread(target=add_results, args=(artefact, [result(0.1 * number, task=f"t{number}")]))
        for number in range(1, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    add_results(artefact, [result(0.6)])
    assert {one.task: one.mean for one in results_of(artefact)} == pytest.approx(
        {"disc": 0.6, "t1": 0.1, "t2": 0.2, "t3": 0.3, "t4": 0.4, "t5": 0.5}
    )
    other = publish_version(f"{place}/2", seed=1)
    other.storage.write_bytes("results.json", artefact.storage.read_bytes("results.json"))
    with pytest.raises(DamagedError, match="is of the manifest with sha256"):
        results_of(other)
