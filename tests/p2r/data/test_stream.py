import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p2r.config import ImageConfig, IngestConfig
from p2r.data.corpus import find_scans, ingest_locally, load_manifest, verify_corpus
from p2r.data.order import global_batch, locate, steps_per_epoch
from p2r.data.preprocess import intensity_window, plane_spacing, prepare
from p2r.data.shards import open_shard, read_index
from p2r.data.stream import Batch, StreamState, stream
from p2r.errors import CheckpointError, DataError, InputError
from p2r.storage import Storage

Corpus = tuple[Storage, dict[str, Any]]

IMAGE = ImageConfig(spacing_mm=2.0, size=32)
SIZE = 8


def batches(
    corpus: Corpus, num: int, *, state: StreamState | None = None, size: int = SIZE, **options: Any
) -> list[tuple[Batch, StreamState]]:
    settings = {"image": IMAGE, "seed": 3, "global_batch": size, "state": state, **options}
    with closing(stream(*corpus, **settings)) as source:
        return list(itertools.islice(source, num))


def assert_bitwise_equal(ours: list[tuple[Batch, StreamState]], theirs: list[tuple[Batch, StreamState]]) -> None:
    assert len(ours) == len(theirs)
    for (a, state_a), (b, state_b) in zip(ours, theirs, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.inside, b.inside)
        np.testing.assert_array_equal(a.positions, b.positions)
        assert (a.epoch, a.spacing_mm, state_a) == (b.epoch, b.spacing_mm, state_b)


def test_a_batch_holds_the_planes_that_the_order_names(small_corpus: Corpus) -> None:
    storage, manifest = small_corpus
    (batch, state), *_ = batches(small_corpus, 1)
    expected = global_batch(manifest, seed=3, epoch=0, step=0, global_batch=SIZE)
    np.testing.assert_array_equal(batch.positions, expected)
    assert batch.image.shape == (SIZE, 1, 32, 32) and batch.image.dtype == torch.float32
    assert batch.inside.shape == (SIZE, 32, 32) and batch.inside.dtype == torch.bool
    assert batch.epoch == 0 and batch.spacing_mm == 2.0 and batch.wait_s >= 0 and state.step == 1
    assert batch.image.min() >= 0 and batch.image.max() <= 1
    assert not batch.image[:, 0][~batch.inside].any() and batch.inside.any(dim=(1, 2)).all()
    for image, shard, sample in zip(batch.image, *locate(manifest, expected), strict=True):
        name = manifest["shards"][shard]["name"]
        reader = open_shard(storage.local(name))
        row, _ = reader.locate(int(sample))
        plane, spacing = reader.read_plane(int(sample))[None], plane_spacing(row.spacing_mm, row.slice_axis)
        alone, _ = prepare(plane, intensity_window(row.percentiles, (0.5, 99.5)), spacing, target_mm=2.0, size=32)
        assert torch.equal(alone[0], image)


@pytest.mark.parametrize("stop", [1, 4, 7, 9])
def test_resume_repeats_and_skips_nothing_and_is_bitwise_equal(small_corpus: Corpus, stop: int) -> None:
    assert steps_per_epoch(small_corpus[1], SIZE) == 7  # so that the stops are within, at and beyond an epoch's end
    whole = batches(small_corpus, 16)
    before = batches(small_corpus, stop)
    saved = json.loads(json.dumps(before[-1][1].to_dict()))
    state = StreamState.from_dict(saved, manifest=small_corpus[1], seed=3, global_batch=SIZE)
    after = batches(small_corpus, 16 - stop, state=state)
    assert_bitwise_equal(before + after, whole)


def test_every_epoch_reads_each_sample_at_most_once_in_another_order(small_corpus: Corpus) -> None:
    steps = steps_per_epoch(small_corpus[1], SIZE)
    epochs: dict[int, list[int]] = {}
    for batch, _ in batches(small_corpus, 2 * steps):
        epochs.setdefault(batch.epoch, []).extend(batch.positions.tolist())
    assert list(epochs) == [0, 1]
    assert all(len(set(positions)) == len(positions) == steps * SIZE for positions in epochs.values())
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_rank_sees(small_corpus: Corpus, world_size: int) -> None:
    whole = batches(small_corpus, 9)
    ranks = [batches(small_corpus, 9, rank=rank, world_size=world_size) for rank in range(world_size)]
    for (batch, state), *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.image for part, _ in parts]), batch.image)
        assert all(part_state == state for _, part_state in parts)


def test_a_run_may_go_on_with_another_number_of_ranks(small_corpus: Corpus) -> None:
    whole = batches(small_corpus, 6)
    _, state = batches(small_corpus, 3, rank=1, world_size=2)[-1]
    assert_bitwise_equal(batches(small_corpus, 3, state=state), whole[3:])


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (1, 4), (4, 2)])
def test_threads_change_nothing(small_corpus: Corpus, num_threads: int, prefetch: int) -> None:
    assert_bitwise_equal(batches(small_corpus, 9, num_threads=num_threads, prefetch=prefetch), batches(small_corpus, 9))


def stream_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("p2r-stream")}


def test_closing_ends_the_threads(small_corpus: Corpus) -> None:
    source = stream(*small_corpus, image=IMAGE, seed=0, global_batch=SIZE)
    next(source)
    assert stream_threads()
    source.close()
    assert not stream_threads()


def test_a_corpus_smaller_than_a_global_batch_is_refused_at_once(small_corpus: Corpus) -> None:
    with pytest.raises(DataError, match="fewer than one global batch of 64"):
        stream(*small_corpus, image=IMAGE, seed=0, global_batch=64)


def test_a_world_size_that_does_not_fit_is_refused_at_once(small_corpus: Corpus) -> None:
    with pytest.raises(DataError, match="use 1, 2, 4, 8 ranks"):
        stream(*small_corpus, image=IMAGE, seed=0, global_batch=SIZE, world_size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed 3, this run has 4"),
        ({"global_batch": 4}, "global_batch 8, this run has 4"),
        ({"manifest": {"another": 1}}, "manifest_sha256 '.*', this run has"),
    ],
)
def test_a_state_of_another_stream_is_refused(small_corpus: Corpus, change: dict[str, Any], message: str) -> None:
    _, state = batches(small_corpus, 1)[0]
    run = {"manifest": small_corpus[1], "seed": 3, "global_batch": SIZE}
    assert StreamState.from_dict(state.to_dict(), **run) == state
    with pytest.raises(CheckpointError, match=message):
        StreamState.from_dict(state.to_dict(), **{**run, **change})


def test_a_state_of_another_stream_is_refused_by_the_stream_too(small_corpus: Corpus) -> None:
    _, state = batches(small_corpus, 1)[0]
    with pytest.raises(CheckpointError, match="seed 3, this run has 0"):
        stream(*small_corpus, image=IMAGE, seed=0, global_batch=SIZE, state=state)


@pytest.mark.parametrize("value", [{}, {"step": -1}, {"step": "7"}, {"step": None}])
def test_a_state_without_a_step_is_refused(small_corpus: Corpus, value: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no valid step"):
        StreamState.from_dict(value, manifest=small_corpus[1], seed=3, global_batch=SIZE)


@pytest.fixture
def damageable(small_corpus: Corpus, tmp_path: Path) -> Iterator[tuple[Path, Corpus]]:
    folder = tmp_path / "copy"
    shutil.copytree(small_corpus[0].url.removeprefix("file://"), folder)
    yield folder, (Storage(str(folder)), small_corpus[1])
    assert not stream_threads()  # errors end them too


def test_one_damaged_byte_stops_the_stream_and_is_named(damageable: tuple[Path, Corpus]) -> None:
    folder, corpus = damageable
    row = read_index(folder / "shard-000001.idx")[0]
    content = bytearray((folder / "shard-000001.tar").read_bytes())
    content[row.chunk_offsets[1] + 40] ^= 128
    (folder / "shard-000001.tar").write_bytes(content)
    with pytest.raises(DataError, match=rf"shard-000001\.tar: chunk 1 of {row.key} is damaged"):
        batches(corpus, 30)


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000000.idx"])
@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-700])]
)
def test_a_shard_or_index_that_is_absent_or_cut_is_named(
    damageable: tuple[Path, Corpus], name: str, damage: Any
) -> None:
    folder, corpus = damageable
    damage(folder / name)
    with pytest.raises(InputError, match=name):
        batches(corpus, 30)


@pytest.mark.s3
def test_a_bucket_of_scans_becomes_a_bucket_of_shards_and_the_same_batches(
    s3_url: str, small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    local, manifest = small_corpus
    bucket, remote = Storage(f"{s3_url}/scans"), Storage(f"{s3_url}/corpus")
    for path in sorted(Path(manifest["source"][0]).iterdir()):
        bucket.upload(path, path.name)
    config = IngestConfig(sources=(bucket.url,), licence="CC0-1.0", shard_size_mib=0.012)
    list(ingest_locally(config, remote))
    found = load_manifest(remote)
    assert found["shards"] == manifest["shards"]  # byte for byte what the folder gave
    assert verify_corpus(remote) == []
    with closing(stream(remote, found, image=IMAGE, seed=3, global_batch=SIZE)) as source:
        for (batch, _), (expected, _) in zip(source, batches((local, manifest), 9), strict=False):
            assert torch.equal(batch.image, expected.image)
    with pytest.raises(DataError, match="nowhere"):
        find_scans([f"{s3_url}/nowhere"], cache=tmp_path)
