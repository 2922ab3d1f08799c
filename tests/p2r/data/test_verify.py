"""One flipped bit anywhere in a corpus is a problem with a name; so is whatever is absent, cut, or does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2r.data.shards import open_shard
from p2r.data.verify import unreferenced_files, verify_corpus
from p2r.storage import Storage

Corpus = tuple[Storage, dict[str, Any]]


@pytest.fixture
def copy(small_corpus: Corpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus[0].url.removeprefix("file://"), tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def only(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def test_a_sound_corpus_has_no_problems(small_corpus: Corpus) -> None:
    assert verify_corpus(small_corpus[0]) == []
    assert unreferenced_files(small_corpus[0]) == []


def in_tar(what: str) -> Callable[[Path], tuple[Path, int]]:
    def place(folder: Path) -> tuple[Path, int]:
        path = only(folder, "*.tar")
        row, _ = open_shard(path).locate(0)
        at = {
            "payload": row.chunk_offsets[0] + 9,
            "header": 3,
            "header's checksum": 150,
            "text": 520,
            "padding": row.offset + row.size,
            "end": path.stat().st_size - 1,
        }
        return path, at[what]

    return place


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (in_tar("payload"), r"shard-000000-.*\.tar: damaged: chunk 0 of record sub-"),
        (in_tar("header"), r"\.tar: damaged, .* voxels are sound, headers"),
        (in_tar("header's checksum"), r"\.tar: damaged, .* voxels are sound, headers"),
        (in_tar("text"), r"\.tar: damaged, .* voxels are sound, headers"),
        (in_tar("padding"), r"\.tar: damaged, .* voxels are sound, headers"),
        (in_tar("end"), r"\.tar: damaged, .* voxels are sound, headers"),
        (lambda folder: (only(folder, "*.idx"), 40), r"shard-000000-.*\.idx: the index is damaged"),
        (lambda folder: (folder / "ledger.jsonl", 40), r"ledger\.jsonl: not the current revision's"),
        (lambda folder: (only(folder, "ledgers/*"), 40), r"ledgers/.*: damaged"),
        (lambda folder: (only(folder, "thumbnails/*"), 40), r"thumbnails/.*: damaged"),
        (lambda folder: (only(folder, "manifests/*"), 40), r"manifests/.*\.json: damaged"),
        (lambda folder: (folder / "manifest.json", 2), r"manifest\.json"),
    ],
)
def test_a_flipped_bit_is_noticed(copy: Path, place: Callable[[Path], tuple[Path, int]], problem: str) -> None:
    flip(*place(copy))
    with pytest.raises(AssertionError, match=problem):
        assert verify_corpus(Storage(str(copy))) == []


def test_a_flipped_bit_is_noticed_wherever_it_is(copy: Path) -> None:
    storage = Storage(str(copy))
    for path in sorted(path for path in copy.rglob("*") if path.is_file() and "receipts" not in path.parts):
        size = path.stat().st_size
        for place in range(0, size, max(1, size // 7)):
            flip(path, place)
            assert verify_corpus(storage), f"{path} at {place}"
            flip(path, place)
    assert verify_corpus(storage) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: only(folder, "*.tar").unlink(), r"shard-000000-.*\.tar does not exist"),
        (lambda folder: only(folder, "*.idx").unlink(), r"shard-000000-.*\.idx does not exist"),
        (lambda folder: only(folder, "*.tar").write_bytes(b"short"), r"it has 5 bytes, the manifest says"),
        (lambda folder: (folder / "ledger.jsonl").unlink(), r"ledger\.jsonl: absent"),
        (lambda folder: only(folder, "ledgers/*").write_text(""), r"ledgers/.*: damaged"),
        (lambda folder: shutil.rmtree(folder / "thumbnails"), r"thumbnails/.*: absent"),
        (lambda folder: shutil.rmtree(folder / "manifests"), r"absent, though manifest\.json is that revision"),
    ],
)
def test_every_kind_of_loss_is_one_named_problem(copy: Path, damage: Callable[[Path], None], problem: str) -> None:
    damage(copy)
    with pytest.raises(AssertionError, match=problem):
        assert verify_corpus(Storage(str(copy))) == []


def test_problems_are_one_line_each(copy: Path) -> None:
    for path in copy.glob("*.tar"):
        flip(path, 5000)
    only(copy, "*.idx").write_text("\n\n")
    problems = verify_corpus(Storage(str(copy)))
    assert len(problems) == len(list(copy.glob("*.tar")))
    assert not any("\n" in problem for problem in problems)


def test_counts_that_do_not_add_up_are_a_problem(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["num_samples"] += 1
    path.write_text(json.dumps(manifest))
    assert any("its shards add up to" in problem for problem in verify_corpus(Storage(str(copy))))


def test_files_of_no_revision_are_listed(copy: Path) -> None:
    (copy / "shard-000009-0123456789ab.tar").write_bytes(b"")
    (copy / "ledgers" / "other.jsonl").write_bytes(b"")
    assert unreferenced_files(Storage(str(copy))) == ["ledgers/other.jsonl", "shard-000009-0123456789ab.tar"]
    assert verify_corpus(Storage(str(copy))) == []
