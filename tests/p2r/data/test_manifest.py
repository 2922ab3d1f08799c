import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2r.data.manifest import contains, load_manifest, manifest_sha256, verify_corpus
from p2r.errors import DataError
from p2r.storage import Storage

Corpus = tuple[Storage, dict[str, Any]]


@pytest.fixture
def corpus_copy(small_corpus: Corpus, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(small_corpus[0].url.removeprefix("file://"), folder)
    return folder


def test_a_sound_corpus_has_no_problems(small_corpus: Corpus) -> None:
    assert verify_corpus(small_corpus[0]) == []


def test_the_revision_is_kept_under_the_digest_of_its_bytes(small_corpus: Corpus) -> None:
    storage, manifest = small_corpus
    revision = f"manifests/{manifest_sha256(manifest)}.json"
    assert storage.read_bytes(revision) == storage.read_bytes("manifest.json")


def test_a_folder_without_a_manifest_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no corpus at .*no manifest\.json; make one"):
        load_manifest(Storage(str(tmp_path)))


@pytest.mark.parametrize("content", [[1], {"format": "p2r-corpus/2"}, {"shards": []}])
def test_a_manifest_of_another_format_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="this version reads 'p2r-corpus/1'"):
        load_manifest(Storage(str(tmp_path)))


def test_a_manifest_that_lacks_something_says_what(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "p2r-corpus/1", "num_samples": 1}))
    with pytest.raises(DataError, match="lacks licence, shards"):
        load_manifest(Storage(str(tmp_path)))


def test_it_tells_who_is_in_the_corpus(small_corpus: Corpus) -> None:
    storage, manifest = small_corpus
    assert contains(manifest, subject="sub-03")
    assert contains(manifest, cohort="default", subject="sub-03")
    assert not contains(manifest, subject="sub-06")
    assert not contains(manifest, cohort="elsewhere", subject="sub-03")
    rows = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    assert all(contains(manifest, voxels_sha256=row["voxels_sha256"]) for row in rows)
    assert not contains(manifest, voxels_sha256="0" * 64)
    with pytest.raises(ValueError, match="needs a subject"):
        contains(manifest)


def test_the_manifest_names_no_subject(small_corpus: Corpus) -> None:
    assert "sub-0" not in json.dumps(small_corpus[1])


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: _flip(folder / "shard-000001.tar", 3000), r"shard-000001\.tar: damaged"),
        (lambda folder: _flip(folder / "shard-000001.idx", 100), r"shard-000001\.idx: the index is damaged"),
        (lambda folder: (folder / "shard-000000.tar").unlink(), r"shard-000000\.tar does not exist"),
        (lambda folder: (folder / "shard-000000.idx").unlink(), r"shard-000000\.idx does not exist"),
        (lambda folder: (folder / "shard-000000.tar").write_bytes(b"short"), r"has 5 bytes, its manifest says"),
        (lambda folder: (folder / "ledger.jsonl").unlink(), r"ledger\.jsonl: cannot be read"),
        (lambda folder: (folder / "ledger.jsonl").write_text(""), r"counts by reason are \{\}"),
        (lambda folder: shutil.rmtree(folder / "manifests"), r"absent, though manifest\.json is that revision"),
    ],
)
def test_every_kind_of_damage_is_one_named_problem(
    corpus_copy: Path, damage: Callable[[Path], None], problem: str
) -> None:
    damage(corpus_copy)
    with pytest.raises(AssertionError, match=problem):
        assert verify_corpus(Storage(str(corpus_copy))) == []


def test_counts_that_do_not_add_up_are_a_problem(corpus_copy: Path) -> None:
    path = corpus_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["num_samples"] += 1
    path.write_text(json.dumps(manifest))
    problems = verify_corpus(Storage(str(corpus_copy)))
    assert any("its shards add up to" in problem for problem in problems)
