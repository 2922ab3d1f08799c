"""With pseudonyms, a corpus has no names of the source, and leaks are still found."""

import hashlib
import hmac
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from p2r.config import IngestConfig
from p2r.data.corpus import contains, corpus_digest, ingest_locally, load_manifest, verify_corpus, was_asked
from p2r.data.manifest import Manifest
from p2r.data.pseudonyms import Names, names_for, names_of
from p2r.data.sidecar import closed_tags
from p2r.errors import DataError
from p2r.report import write_corpus_report
from p2r.storage import Storage

WriteScan = Callable[..., Path]
SECRET = "the secret of this test"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", SECRET)


@pytest.fixture
def patients(write_scan: WriteScan) -> Path:
    """Scans with people's names in file names, folders and sidecars: valid, a copy, truncated, and without a subject."""
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


def make(storage: Storage, config: IngestConfig) -> Manifest:
    for _ in ingest_locally(config, storage):
        pass
    return load_manifest(storage)


def test_no_name_occurs_in_the_bytes_of_the_corpus(patients: Path, tmp_path: Path) -> None:
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


def test_technical_entities_and_tags_are_kept(patients: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    manifest = make(storage, config_of(patients))
    tar = storage.read_bytes(manifest["shards"][0]["name"])
    assert b'"entities": {"suffix": "T1w"}' in tar
    assert b'"entities": {"run": "2", "suffix": "FLAIR"}' in tar
    assert b'"acquisition": {"EchoTime": 0.01}' in tar


def test_a_leak_is_found_with_the_secret_and_unknown_without_it(
    patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "corpus"))
    manifest = make(storage, config_of(patients))
    assert contains(manifest.facts, subject="sub-JaneAbernathy")
    assert not contains(manifest.facts, subject="sub-JimAbernathy")
    assert manifest["deidentification"]["names"] == "hmac-sha256"
    assert SECRET not in json.dumps(dict(manifest))
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", "another secret of some length")
    with pytest.raises(DataError, match="made with another secret"):
        contains(manifest.facts, subject="sub-JaneAbernathy")
    monkeypatch.delenv("P2R_PSEUDONYM_KEY")
    with pytest.raises(DataError, match=r"P2R_PSEUDONYM_KEY \(it is not set\)"):
        contains(manifest.facts, subject="sub-JaneAbernathy")
    voxels = next(json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines() if b"accepted" in line)
    assert contains(manifest.facts, voxels_sha256=voxels["voxels_sha256"])  # needs no secret


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
    found = [names.subject("x"), names.key("x"), names.source("x"), names.state(0, "x")[1], names.asked("x")]
    found += [Names("b", SECRET.encode()).subject("x"), Names("a", b"other").subject("x")]
    assert len(set(found)) == len(found)
    assert names_for(names.statement(), "a") == names
    assert names_for({"names": "plain"}, "a") == names_for({}, "a") == Names("a")


def forms_of(text: str) -> list[bytes]:
    """Return a text and its digests: all forms that can be computed by guessing the text."""
    content = text.encode("utf-8", "surrogateescape")
    digests = [hash_(content).hexdigest() for hash_ in (hashlib.md5, hashlib.sha1, hashlib.sha256)]
    escaped = json.dumps(text)[1:-1].encode()
    return [content, escaped, content.hex().encode(), *(digest[:12].encode() for digest in digests)]


def bytes_of(storage: Storage) -> bytes:
    return b"\n".join(path.encode() + b"\n" + storage.read_bytes(path) for path in storage.list())


def guesses_of(folder: Path, config: IngestConfig) -> list[bytes]:
    """Return everything that can be computed from names, paths and sizes without the secret."""
    texts = [str(folder), f"file://{folder}", folder.name]
    for path in folder.rglob("*.nii"):
        stem = path.name.removesuffix(".nii")
        subject = stem.partition("_")[0]
        texts += [path.name, stem, str(path), f"file://{path}", subject, f"default/{subject}", stem.partition("_")[2]]
        texts += [str(path.stat().st_size), str(path.stat().st_mtime_ns)]
    forms = [form for text in texts for form in forms_of(text)]
    return [*forms, corpus_digest(config).encode()]


def _name(seed: int) -> str:
    """Return a random name that does not occur by chance."""
    return "".join(np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyzäß"), 9))


NAME = st.integers(0, 2**63).map(_name)


@settings(max_examples=2, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(
    names=st.lists(st.tuples(NAME, NAME), min_size=2, max_size=3, unique=True), num_padded=st.integers(100_000, 900_000)
)
def test_without_the_secret_no_byte_follows_from_a_name_a_path_or_a_size(
    names: list[tuple[str, str]], num_padded: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("scans") / f"ward-{names[0][1]}"
    folder.mkdir()
    for number, (person, word) in enumerate(names):
        voxels = np.random.default_rng(number).integers(0, 900, (18, 20, 4)).astype(np.int16)
        path = folder / f"{person}_{word}.nii"
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.5, 1.5, 8.0, 1.0])), path)
        with path.open("ab") as file:
            file.write(bytes(num_padded + 7 * number))
        sidecar = {
            "EchoTime": 0.01,
            "SequenceName": word,
            "ScanOptions": [word],
            "Manufacturer": person,
            "ImageType": ["M", word],
        }
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    cut = folder / f"{names[0][0]}x_{names[0][1]}.nii"
    cut.write_bytes(bytes(num_padded + 3))
    config = config_of(folder, subject_pattern="^([^_]+)_", sources=(str(folder),))
    contents = []
    for secret in (SECRET, "another secret of some length"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("P2R_PSEUDONYM_KEY", secret)
            storage = Storage(str(tmp_path_factory.mktemp("corpus")))
            manifest = make(storage, config)
            assert was_asked(manifest, config)
            write_corpus_report(storage)
        assert manifest["num_records"] == len(names)
        contents.append(bytes_of(storage))
        found = [guess for guess in guesses_of(folder, config) if guess.lower() in contents[-1].lower()]
        assert found == []
    rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    of_voxels = {row["voxels_sha256"].encode() for row in rows if row["voxels_sha256"]}
    common = set.intersection(*(set(re.findall(rb"[0-9a-f]{16,}", content)) for content in contents))
    of_voxels |= {manifest["preprocessing_sha256"].encode(), str(manifest["code"]["commit"]).encode()}
    assert {digest for digest in common if digest not in of_voxels and not digest.isdigit()} == set()


def test_a_corpus_of_an_earlier_version_is_recognised_and_grows(
    patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, config = Storage(str(tmp_path / "corpus")), config_of(patients)

    def state(names: Names, num_bytes: int, modified: str) -> tuple[int, str]:
        key = f"p2r/modified\n{modified}".encode()
        return num_bytes, hmac.new(SECRET.encode(), key, hashlib.sha256).hexdigest()[:16]

    with monkeypatch.context() as patch:  # sizes in clear text, and the digest of the section without the secret
        patch.setattr(Names, "state", state)
        patch.setattr(Names, "asked", lambda names, digest: digest)
        before = make(storage, config)
    assert before["asked"] == [corpus_digest(config)]
    assert was_asked(before, config)
    assert make(storage, config) == before  # nothing changed: all rows are known
    (patients / "extra/NewAbernathy.nii.gz").write_bytes((patients / "extra/OtherAbernathy.nii.gz").read_bytes())
    after = make(storage, config_of(patients, subject_pattern="^([A-Z][a-z]+|sub-[A-Za-z]+)"))
    assert after["revision"] == 2
    assert len(after["asked"]) == 2
    assert after["asked"][1] != corpus_digest(config_of(patients, subject_pattern="^([A-Z][a-z]+|sub-[A-Za-z]+)"))


@pytest.mark.parametrize("pseudonyms", [True, False])
def test_a_name_that_is_not_utf_8_has_a_row(write_scan: WriteScan, tmp_path: Path, pseudonyms: bool) -> None:
    good = write_scan("sub-one_T1w.nii.gz", np.arange(18 * 20 * 4).reshape(18, 20, 4).astype(np.int16))
    os.rename(good, os.fsencode(good.parent) + b"/sub-m\xfcller_T1w.nii.gz")  # noqa: PTH104 (bytes)
    (good.parent / os.fsdecode(b"sub-k\xe4ufer_T1w.nii.gz")).write_bytes(b"no scan")
    storage = Storage(str(tmp_path / "corpus"))
    config = config_of(good.parent, pseudonyms=pseudonyms, subject_pattern="^(sub-[^_]+)")
    make(storage, config)
    assert make(storage, config)["reasons"] == {"accepted": 1, "not_nifti": 1}
    assert verify_corpus(storage) == []
    write_corpus_report(storage)
    rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    escaped = [row["subject"] for row in rows if row["source"].endswith("/sub-m\\xfcller_T1w.nii.gz")]
    assert escaped == ([] if pseudonyms else ["sub-m\\xfcller"])


def test_free_text_is_not_kept(tmp_path: Path) -> None:
    tags = {
        "EchoTime": 0.01, "MTState": True, "Manufacturer": "Siemens", "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
        "ScanningSequence": "GR_IR", "SequenceVariant": "SK\\SP", "PhaseEncodingDirection": "j-", "ConversionSoftware": "dcm2niix",
    }  # fmt: skip
    made_up = {
        "SequenceName": "JaneAbernathy", "ScanOptions": ["FS", "JaneAbernathy"], "ImageType": ["ORIGINAL", "Jane"],
        "Manufacturer": "Abernathy Hospital", "ReceiveCoilName": "x", "ManufacturersModelName": "Prisma of Jane", "Unknown": "x",
    }  # fmt: skip
    assert closed_tags(tags) == tags
    assert closed_tags(made_up) == {}
