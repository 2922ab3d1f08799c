import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from p2r.data import manifest as module
from p2r.data.manifest import (
    Manifest,
    contains,
    facts_of,
    load_manifest,
    manifest_bytes,
    manifest_sha256,
    parse_manifest,
    ranges_of,
)
from p2r.documents import memory_of
from p2r.errors import DataError
from p2r.storage import Storage

Corpus = tuple[Storage, Manifest]


def test_a_revision_is_stored_under_the_digest_of_its_bytes(small_corpus: Corpus) -> None:
    storage, manifest = small_corpus
    revision = f"manifests/{manifest_sha256(manifest)}.json"
    assert storage.read_bytes(revision) == storage.read_bytes("manifest.json")
    assert load_manifest(storage, revision=manifest_sha256(manifest)) == manifest


def test_a_folder_without_a_manifest_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no corpus at .*no manifest\.json; make one"):
        load_manifest(Storage(str(tmp_path)))


def test_an_absent_or_damaged_revision_is_refused(small_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no revision 00"):
        load_manifest(small_corpus[0], revision="0" * 64)
    with pytest.raises(DataError, match="is not a SHA-256"):
        load_manifest(small_corpus[0], revision="../../etc/passwd")
    (tmp_path / "manifests").mkdir()
    (tmp_path / f"manifests/{'0' * 64}.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        load_manifest(Storage(str(tmp_path)), revision="0" * 64)


@pytest.mark.parametrize("content", [[1], 7, None, {"format": "p2r-corpus/1"}, {"shards": []}, {"format": ["a"]}])
def test_a_manifest_of_another_format_is_refused(content: Any) -> None:
    with pytest.raises(DataError, match="this version reads 'p2r-corpus/2'"):
        parse_manifest(json.dumps(content).encode(), name="manifest.json")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[" * 200_000, b'{"format": NaN}', b'{"n": ' + b"9" * 10_000 + b"}"]
)
def test_a_manifest_that_is_not_json_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is not"):
        parse_manifest(content, name="manifest.json")


def test_a_manifest_that_lacks_a_key_is_refused_by_its_name(small_corpus: Corpus) -> None:
    _, manifest = small_corpus
    for name in set(manifest) - {"format"}:
        lacking = {key: value for key, value in manifest.items() if key != name}
        with pytest.raises(DataError, match=f"{name}: Field required"):
            parse_manifest(manifest_bytes(lacking), name="manifest.json")


HOSTILE: dict[str, dict[str, Any]] = {
    "a path out of the folder": {"name": "../../shard-000000-000000000000.tar"},
    "an absolute path": {"name": "/etc/passwd"},
    "a folder": {"name": "a/shard-000000-000000000000.tar"},
    "another line": {"name": "shard-000000-000000000000.tar\n"},
    "nothing": {"name": ""},
    "no text": {"name": 7},
    "a negative count": {"num_samples": -1},
    "a fraction": {"num_samples": 1.5},
    "true": {"num_records": True},
    "text": {"num_bytes": "12"},
    "more than a machine counts": {"num_samples": 10**30},
    "infinity": {"num_volumes": math.inf},
    "no digest": {"sha256": "abc"},
    "a digest in capitals": {"index_sha256": "A" * 64},
    "none": {"num_samples": None},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_shard_is_refused(small_corpus: Corpus, change: dict[str, Any]) -> None:
    _, manifest = small_corpus
    first, *others = manifest["shards"]
    hostile = {**manifest, "shards": [{**first, **change}, *others]}
    with pytest.raises(DataError, match=r"is not a valid manifest: shards\.0|is not JSON"):
        parse_manifest(json.dumps(hostile).encode(), name="manifest.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": {}}, "shards"),
        ({"shards": [7]}, r"shards\.0"),
        ({"shards": []}, "num_samples is 62, its shards add up to 0"),
        (
            {"shards": [], "num_samples": 0, "num_records": 0, "num_volumes": 0, "num_bytes": 0},
            "the corpus has no samples",
        ),
        ({"ledger_sha256": "../../ledger"}, "ledger_sha256"),
        ({"thumbnails_sha256": 3}, "thumbnails_sha256"),
        ({"previous": "../manifest"}, "previous"),
        ({"salt": None}, "salt"),
        ({"subject_digests": "abc"}, "subject_digests"),
        ({"voxel_digests": [1]}, r"voxel_digests\.0"),
        ({"reasons": {"accepted": -3}}, r"reasons\.accepted"),
        ({"revision": 0}, "revision"),
        ({"source": "x"}, "source"),
        ({"preprocessing": {}}, r"preprocessing\.slice_axis"),
        ({"summary": {"shape": []}}, "summary"),
        ({"deidentification": {"names": 1}}, r"deidentification\.names"),
        ({"num_samples": 1}, "num_samples is 1, its shards add up to 62"),
        ({"num_bytes": 1}, "num_bytes is 1, its shards add up to"),
    ],
)
def test_a_hostile_manifest_is_refused(small_corpus: Corpus, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"is not a valid manifest: {message}"):
        parse_manifest(manifest_bytes({**small_corpus[1], **change}), name="manifest.json")


def test_many_shards_are_checked_by_columns_in_the_memory_of_their_values(
    small_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model for each of 300,000 shards took 38 s and a gigabyte."""
    monkeypatch.delattr(module, "_SHARDS")
    content = manifest_of_shards(small_corpus[1], 20_000)
    tracemalloc.start()
    try:
        manifest = parse_manifest(content, name="manifest.json")
        assert len(manifest.shards) == 20_000
        peak = tracemalloc.get_traced_memory()[1] + len(content)
    finally:
        tracemalloc.stop()
    assert peak < memory_of(content)


def manifest_of_shards(manifest: Manifest, number: int) -> bytes:
    """Return the bytes of a manifest with this many shards of one sample each."""
    counts = dict.fromkeys(("num_records", "num_samples", "num_volumes", "num_bytes"), 1)
    digests = [f"{index:064x}" for index in range(number)]
    shards = [
        {"name": f"shard-{index:06d}-{digest[-12:]}.tar", "sha256": digest, "index_sha256": digest, **counts}
        for index, digest in enumerate(digests)
    ]
    return manifest_bytes({**manifest, "shards": shards, **dict.fromkeys(counts, number)})


def test_a_shard_that_is_listed_twice_is_refused(small_corpus: Corpus) -> None:
    manifest = small_corpus[1]
    with pytest.raises(DataError, match="listed twice"):
        parse_manifest(manifest_bytes({**manifest, "shards": manifest["shards"] * 2}), name="manifest.json")


def test_membership_of_subjects_is_answered(small_corpus: Corpus) -> None:
    storage, manifest = small_corpus
    assert contains(manifest.facts, subject="sub-03")
    assert contains(manifest.facts, cohort="default", subject="sub-03")
    assert not contains(manifest.facts, subject="sub-06")
    assert not contains(manifest.facts, cohort="elsewhere", subject="sub-03")
    rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    assert all(contains(manifest.facts, voxels_sha256=row["voxels_sha256"]) for row in rows)
    assert not contains(manifest.facts, voxels_sha256="0" * 64)
    with pytest.raises(ValueError, match="needs a subject"):
        contains(manifest.facts)


def test_the_manifest_names_no_subject(small_corpus: Corpus) -> None:
    assert "sub-0" not in json.dumps(dict(small_corpus[1]))


def test_the_facts_of_a_manifest_match_the_scans(small_corpus: Corpus) -> None:
    facts = dict(facts_of(small_corpus[1]))
    assert (facts["scans"], facts["subjects"], facts["planes"], facts["volumes"]) == ("12", "6", "62", "13")
    assert ("spacing, mm", "S", "8", "8", "8") in ranges_of(small_corpus[1])
    assert ("extent, voxels", "frames", "1", "1", "2") in ranges_of(small_corpus[1])
