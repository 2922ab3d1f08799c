"""Under pseudonyms no name gets out of the job, and a leak is found all the same."""

import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2r.config import IngestConfig
from p2r.data.corpus import contains, ingest_locally, load_manifest, verify_corpus
from p2r.data.pseudonyms import Names, names_for, names_of
from p2r.errors import DataError
from p2r.storage import Storage

WriteScan = Callable[..., Path]
SECRET = "the secret of this test"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", SECRET)


@pytest.fixture
def patients(write_scan: WriteScan) -> Path:
    """Scans whose names, folders and sidecars name people: good ones, a copy, a cut one, one that matches no pattern."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(1, 500, (18, 20, 4)).astype(np.int16) for _ in range(4)]
    folder = write_scan(
        "Abernathy_westwing/sub-JaneAbernathy/anat/sub-JaneAbernathy_acq-byWhodunnit_T1w.nii.gz", arrays[0]
    ).parents[2]
    (folder / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    sidecar = {"EchoTime": 0.01, "InstitutionName": "Abernathy Hospital", "PatientName": "JaneAbernathy"}
    (folder / "sub-JaneAbernathy/anat/sub-JaneAbernathy_acq-byWhodunnit_T1w.json").write_text(json.dumps(sidecar))
    write_scan("Abernathy_westwing/sub-JaneAbernathy/anat/sub-JaneAbernathy_run-1_Replicated.nii.gz", arrays[0])
    write_scan("Abernathy_westwing/sub-JohnAbernathy/anat/sub-JohnAbernathy_run-2_FLAIR.nii.gz", arrays[1])
    cut = write_scan("Abernathy_westwing/sub-JimAbernathy/anat/sub-JimAbernathy_T1w.nii.gz", arrays[2])
    cut.write_bytes(cut.read_bytes()[:-40])
    write_scan("Abernathy_westwing/sub-JackAbernathy/anat/sub-JackAbernathy_T1w.nii.gz", arrays[0])
    write_scan("Abernathy_westwing/extra/OtherAbernathy.nii.gz", arrays[3])
    return folder


def config_of(folder: Path, **changes: Any) -> IngestConfig:
    fields = {
        "sources": (str(folder),),
        "licence": "CC0-1.0",
        "pseudonyms": True,
        "subject_pattern": "^(sub-[A-Za-z]+)",
    }
    return IngestConfig(**{**fields, **changes})


def make(storage: Storage, config: IngestConfig) -> dict[str, Any]:
    for _ in ingest_locally(config, storage):
        pass
    return load_manifest(storage)


def test_no_name_is_anywhere_in_the_bytes_of_the_corpus(patients: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    manifest = make(storage, config_of(patients, sources=(str(patients), str(patients / "sub-JohnAbernathy"))))
    assert manifest["reasons"] == {"accepted": 3, "duplicate": 1, "no_subject": 1, "truncated": 1}
    assert verify_corpus(storage) == []
    modified = [str(path.stat().st_mtime_ns) for path in patients.rglob("*.nii.gz")]
    words = ["abernathy", "whodunnit", "westwing", "replicated", "t1w.nii", str(tmp_path).lower(), *modified]
    for path in storage.list():
        content = path.encode().lower() + storage.read_bytes(path).lower()
        assert [word for word in words if word.encode() in content] == [], path


def test_names_become_keyed_hashes_that_their_owner_can_compute(patients: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    make(storage, config_of(patients, cohort="ours"))
    rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    expected = hmac.new(SECRET.encode(), b"p2r/subject\nours/sub-JohnAbernathy", hashlib.sha256).hexdigest()[:16]
    assert expected in {row["subject"] for row in rows}
    assert all(row["message"] == "" for row in rows)
    assert all(len(row[name]) == 16 for row in rows for name in ("key", "source") if row["status"] == "accepted")


def test_technical_entities_and_tags_stay(patients: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    manifest = make(storage, config_of(patients))
    tar = storage.read_bytes(manifest["shards"][0]["name"])
    assert b'"entities": {"suffix": "T1w"}' in tar
    assert b'"entities": {"run": "2", "suffix": "FLAIR"}' in tar
    assert b'"acquisition": {"EchoTime": 0.01}' in tar


def test_the_leak_is_found_with_the_secret_and_cannot_be_looked_for_without(
    patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    manifest = make(storage, config_of(patients))
    assert contains(manifest, subject="sub-JaneAbernathy")
    assert not contains(manifest, subject="sub-JimAbernathy")
    assert manifest["deidentification"]["names"] == "hmac-sha256"
    assert SECRET not in json.dumps(manifest)
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", "another secret of some length")
    with pytest.raises(DataError, match="under another secret"):
        contains(manifest, subject="sub-JaneAbernathy")
    monkeypatch.delenv("P2R_PSEUDONYM_KEY")
    with pytest.raises(DataError, match=r"P2R_PSEUDONYM_KEY \(it is not set\)"):
        contains(manifest, subject="sub-JaneAbernathy")
    voxels = next(json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines() if b"accepted" in line)
    assert contains(manifest, voxels_sha256=voxels["voxels_sha256"])  # needs no secret


def test_a_corpus_grows_under_its_own_secret_only(
    patients: Path, tmp_path: Path, write_scan: WriteScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    first = make(storage, config_of(patients))
    assert make(storage, config_of(patients)) == first
    write_scan(
        "Abernathy_westwing/sub-NewAbernathy/anat/sub-NewAbernathy_T1w.nii.gz",
        np.arange(18 * 20 * 4).reshape(18, 20, 4).astype(np.int16),
    )
    assert make(storage, config_of(patients))["num_subjects"] == first["num_subjects"] + 1
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", "another secret of some length")
    with pytest.raises(DataError, match="names: "):
        make(storage, config_of(patients))


@pytest.mark.parametrize("value", ["", "short", "fifteen letters"])
def test_a_job_without_a_secret_stops_before_anything_is_read(
    value: str, patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", value)
    with pytest.raises(DataError, match="16 or more characters") as caught:
        make(Storage(str(tmp_path / "corpus")), config_of(patients))
    assert not value or value not in str(caught.value)
    assert not (tmp_path / "corpus").exists()


def test_pseudonyms_of_one_name_differ_by_kind_cohort_and_secret() -> None:
    names = names_of("a", pseudonyms=True)
    found = [names.subject("x"), names.key("x"), names.source("x"), names.modified("x")]
    found += [Names("b", SECRET.encode()).subject("x"), Names("a", b"other").subject("x")]
    assert len(set(found)) == len(found)
    assert names_for(names.statement(), "a") == names
    assert names_for({"names": "plain"}, "a") == names_for({}, "a") == Names("a")
