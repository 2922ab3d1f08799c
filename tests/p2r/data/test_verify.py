"""One flipped bit anywhere in a corpus is a named problem, as are absent, truncated and inconsistent files."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2r.config import ImageConfig
from p2r.data.manifest import load_manifest, manifest_bytes, manifest_sha256, revision_path
from p2r.data.revision import current_revision
from p2r.data.shards import index_name, open_shard
from p2r.data.stream import Corpus, stream
from p2r.data.verify import unreferenced_files, verify_corpus
from p2r.errors import DataError
from p2r.storage import Storage

SmallCorpus = tuple[Storage, dict[str, Any]]


@pytest.fixture
def copy(small_corpus: SmallCorpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus[0].url.removeprefix("file://"), tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def only(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def test_a_sound_corpus_has_no_problems(small_corpus: SmallCorpus) -> None:
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
        (in_tar("header"), r"\.tar: damaged, .* voxels are intact, headers"),
        (in_tar("header's checksum"), r"\.tar: damaged, .* voxels are intact, headers"),
        (in_tar("text"), r"\.tar: damaged, .* voxels are intact, headers"),
        (in_tar("padding"), r"\.tar: damaged, .* voxels are intact, headers"),
        (in_tar("end"), r"\.tar: damaged, .* voxels are intact, headers"),
        (lambda folder: (only(folder, "*.idx"), 40), r"shard-000000-.*\.idx: the index is damaged"),
        (lambda folder: (folder / "ledger.jsonl", 40), r"ledger\.jsonl: not the ledger of the current revision"),
        (lambda folder: (only(folder, "ledgers/*"), 40), r"ledgers/.*: damaged"),
        (lambda folder: (only(folder, "thumbnails/*"), 40), r"thumbnails/.*: damaged"),
        (lambda folder: (only(folder, "manifests/*"), 40), r"manifests/.*\.json: damaged"),
        (lambda folder: (folder / "manifest.json", 2), r"manifest\.json"),
    ],
)
def test_a_flipped_bit_is_detected(copy: Path, place: Callable[[Path], tuple[Path, int]], problem: str) -> None:
    flip(*place(copy))
    with pytest.raises(AssertionError, match=problem):
        assert verify_corpus(Storage(str(copy))) == []


def test_a_flipped_bit_is_detected_at_any_position(copy: Path) -> None:
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
        (lambda folder: only(folder, "*.tar").write_bytes(b"short"), r"it has 5 bytes, the manifest has"),
        (lambda folder: (folder / "ledger.jsonl").unlink(), r"ledger\.jsonl: absent"),
        (lambda folder: only(folder, "ledgers/*").write_text(""), r"ledgers/.*: damaged"),
        (lambda folder: shutil.rmtree(folder / "thumbnails"), r"thumbnails/.*: absent"),
        (lambda folder: shutil.rmtree(folder / "manifests"), r"absent, although manifest\.json is this revision"),
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


def test_inconsistent_counts_are_a_problem(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["num_samples"] += 1
    path.write_text(json.dumps(manifest))
    assert any("its shards add up to" in problem for problem in verify_corpus(Storage(str(copy))))


def test_files_outside_every_revision_are_listed(copy: Path) -> None:
    (copy / "shard-000009-0123456789ab.tar").write_bytes(b"")
    (copy / "ledgers" / "other.jsonl").write_bytes(b"")
    assert unreferenced_files(Storage(str(copy))) == ["ledgers/other.jsonl", "shard-000009-0123456789ab.tar"]
    assert verify_corpus(Storage(str(copy))) == []


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]) -> Storage:
    """Forge a manifest, a row of an index and a row of the ledger, with all digests of them correct."""
    storage = Storage(str(folder))
    manifest = storage.read_json("manifest.json")
    shard = manifest["shards"][0]
    index = [json.loads(line) for line in storage.read_bytes(index_name(shard["name"])).splitlines()]
    ledger = [json.loads(line) for line in storage.read_bytes("ledger.jsonl").splitlines()]
    row = next(row for row in ledger if row["key"] == index[0]["key"])
    change(manifest, index[0], row)
    content = "".join(json.dumps(row, sort_keys=True) + "\n" for row in index).encode()
    storage.write_bytes(index_name(shard["name"]), content)
    shard["index_sha256"] = hashlib.sha256(content).hexdigest()
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in ledger).encode()
    manifest["ledger_sha256"] = hashlib.sha256(lines).hexdigest()
    storage.write_bytes(f"ledgers/{manifest['ledger_sha256']}.jsonl", lines)
    storage.write_bytes("ledger.jsonl", lines)
    storage.write_bytes("manifest.json", manifest_bytes(manifest))
    storage.write_bytes(revision_path(manifest_sha256(manifest)), manifest_bytes(manifest))
    return storage


def rewrite_lines(folder: Path, which: str, change: Callable[[list[bytes]], list[bytes]]) -> Storage:
    """Change the lines of the first index, or of the ledger, and every digest that names them."""
    storage = Storage(str(folder))
    manifest = storage.read_json("manifest.json")
    path = index_name(manifest["shards"][0]["name"]) if which == "index" else "ledger.jsonl"
    content = b"".join(change(storage.read_bytes(path).splitlines(keepends=True)))
    sha256 = hashlib.sha256(content).hexdigest()
    storage.write_bytes(path, content)
    if which == "index":
        manifest["shards"][0]["index_sha256"] = sha256
    else:
        manifest["ledger_sha256"] = sha256
        storage.write_bytes(f"ledgers/{manifest['ledger_sha256']}.jsonl", content)
    storage.write_bytes("manifest.json", manifest_bytes(manifest))
    storage.write_bytes(revision_path(manifest_sha256(manifest)), manifest_bytes(manifest))
    return storage


def first_with(**values: Any) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [json.dumps({**json.loads(lines[0]), **values}).encode() + b"\n", *lines[1:]]


@pytest.mark.parametrize("which", ["index", "ledger"])
@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:-1], lines[-1][: len(lines[-1]) // 2]],
        lambda lines: lines[:-1],
        lambda lines: [],
        lambda lines: [*lines, lines[0]],
        lambda lines: [*lines, b"[]\n"],
        lambda lines: [*lines, b"7\n"],
        lambda lines: [*lines, b"[" * 100_000],
        lambda lines: [*lines, b"\xff\xfe\n"],
        lambda lines: [*lines, b'{"key": 1, "key": 2}\n'],
        first_with(key=7),
        first_with(key="x" * 10_000),
        first_with(subject=["x"]),
        first_with(shape=[2**62] * 4),
        first_with(shape=[10, 10]),
        first_with(dtype="object"),
        first_with(spacing_mm="1"),
        first_with(percentiles=[]),
    ],
    ids=[
        *("cut", "a row less", "empty", "a row twice", "a list", "a number", "deep", "no UTF-8", "a key twice"),
        *("key", "long key", "subject", "huge shape", "short shape", "dtype", "spacing", "percentiles"),
    ],
)
def test_rows_of_a_stranger_are_problems_of_one_line_with_digests_that_fit(
    copy: Path, which: str, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    storage = rewrite_lines(copy, which, change)
    problems = verify_corpus(storage)
    assert any(which in problem or ".idx" in problem for problem in problems)
    assert all("\n" not in problem and len(problem) < 1000 for problem in problems)
    with contextlib.suppress(DataError):  # a row less, or twice, is found by comparing files, which growing does not
        current_revision(storage)


def an_index_row(**values: Any) -> Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]:
    return lambda manifest, index, ledger: index.update(values)


def add_a_sample(manifest: dict[str, Any], index: dict[str, Any], ledger: dict[str, Any]) -> None:
    manifest["shards"][0]["num_samples"] += 1
    manifest["num_samples"] += 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (an_index_row(spacing_mm=[1.0, 1e5, 1.0]), "spacing_mm has three values that are plausible"),
        (an_index_row(spacing_mm=[1.0, 1e300, 1.0]), "spacing_mm has three values that are plausible"),
        (an_index_row(percentiles=[1e308] * 17), "percentiles has 17 values that never decrease"),
        (
            an_index_row(percentiles=[float(n) for n in range(17, 0, -1)]),
            "percentiles has 17 values that never decrease",
        ),
        (an_index_row(chunk_offsets=[2**60, 2**60 + 1]), "whole numbers up to"),
        (add_a_sample, "num_samples is"),
    ],
)
def test_a_forged_corpus_with_correct_digests_is_refused_when_verified_and_when_read(
    copy: Path, change: Any, problem: str
) -> None:
    storage = rewrite(copy, change)
    assert any(problem in found for found in verify_corpus(storage))
    corpus = Corpus(storage, load_manifest(storage))
    with pytest.raises(DataError, match=problem):
        for _ in zip(
            range(9), stream(corpus, image=ImageConfig(size=32, spacing_mm=2.0), seed=1, global_batch=8), strict=False
        ):
            pass


def test_a_ledger_row_without_its_count_is_named_by_verification_and_growth(copy: Path) -> None:
    storage = rewrite(copy, lambda manifest, index, ledger: ledger.pop("num_samples"))
    assert any("num_samples: Field required" in found for found in verify_corpus(storage))
    with pytest.raises(DataError, match="num_samples: Field required"):
        current_revision(storage)
