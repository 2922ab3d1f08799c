import itertools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p2r.config import ImageConfig, IngestConfig
from p2r.counters import Counters
from p2r.data.batch import Batch
from p2r.data.corpus import find_scans, ingest_locally, load_manifest, verify_corpus
from p2r.data.manifest import Manifest, make_manifest
from p2r.data.order import global_batch, locate, steps_per_epoch
from p2r.data.preprocess import intensity_window, plane_spacing, prepare
from p2r.data.shards import open_shard, read_index
from p2r.data.stream import Corpus, Quarantine, Replaced, StreamState, order_of, stream, stream_state
from p2r.errors import CheckpointError, DataError, InputError
from p2r.storage import Storage

SmallCorpus = tuple[Storage, Manifest]

IMAGE = ImageConfig(spacing_mm=2.0, size=32)
SIZE = 8


def batches(
    corpus: SmallCorpus, num: int, *, state: StreamState | None = None, size: int = SIZE, **options: Any
) -> list[tuple[Batch, StreamState]]:
    settings = {"image": IMAGE, "seed": 3, "global_batch": size, "state": state, **options}
    with closing(stream(Corpus(*corpus), **settings)) as source:
        return list(itertools.islice(source, num))


def assert_bitwise_equal(ours: list[tuple[Batch, StreamState]], theirs: list[tuple[Batch, StreamState]]) -> None:
    assert len(ours) == len(theirs)
    for (a, state_a), (b, state_b) in zip(ours, theirs, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(a.images(), b.images(), strict=True))
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.epochs, b.epochs)
        assert (a.image, state_a) == (b.image, state_b)


def test_a_batch_has_the_slices_of_the_order(small_corpus: SmallCorpus) -> None:
    storage, manifest = small_corpus
    (batch, state), *_ = batches(small_corpus, 1)
    expected = global_batch(manifest, seed=3, epoch=0, step=0, global_batch=SIZE)
    np.testing.assert_array_equal(batch.positions, expected)
    images, insides = batch.images()
    assert images.shape == (SIZE, 1, 32, 32) and images.dtype == torch.float32
    assert insides.shape == (SIZE, 32, 32) and insides.dtype == torch.bool
    assert not batch.epochs.any() and batch.spacing_mm == 2.0 and batch.wait_s >= 0 and state.step == 1
    assert images.min() >= 0 and images.max() <= 1
    assert not images[:, 0][~insides].any() and insides.any(dim=(1, 2)).all()
    for image, shard, sample in zip(images, *locate(manifest, expected), strict=True):
        name = manifest["shards"][shard]["name"]
        reader = open_shard(storage.local(name))
        row, _ = reader.locate(int(sample))
        plane, spacing = reader.read_plane(int(sample))[None], plane_spacing(row.spacing_mm, row.slice_axis)
        alone, _ = prepare(plane, intensity_window(row.percentiles, (0.5, 99.5)), spacing, target_mm=2.0, size=32)
        assert torch.equal(alone[0], image)


@pytest.mark.parametrize("stop", [1, 4, 7, 9])
def test_resume_repeats_and_skips_nothing_and_is_bitwise_equal(small_corpus: SmallCorpus, stop: int) -> None:
    assert steps_per_epoch(small_corpus[1], SIZE) == 7  # stops are within an epoch, at its end and beyond
    whole = batches(small_corpus, 16)
    before = batches(small_corpus, stop)
    saved = json.loads(json.dumps(before[-1][1].to_dict()))
    state = stream_state([Corpus(*small_corpus)], seed=3, global_batch=SIZE).resumed(saved)
    after = batches(small_corpus, 16 - stop, state=state)
    assert_bitwise_equal(before + after, whole)


def test_every_epoch_reads_each_sample_at_most_once_in_another_order(small_corpus: SmallCorpus) -> None:
    steps = steps_per_epoch(small_corpus[1], SIZE)
    epochs: dict[int, list[int]] = {}
    for batch, _ in batches(small_corpus, 2 * steps):
        epochs.setdefault(int(batch.epochs[0]), []).extend(batch.positions.tolist())
    assert list(epochs) == [0, 1]
    assert all(len(set(positions)) == len(positions) == steps * SIZE for positions in epochs.values())
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_together_read_the_batches_of_one_rank(small_corpus: SmallCorpus, world_size: int) -> None:
    whole = batches(small_corpus, 9)
    ranks = [batches(small_corpus, 9, rank=rank, world_size=world_size) for rank in range(world_size)]
    for (batch, state), *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.images()[0] for part, _ in parts]), batch.images()[0])
        assert all(part_state == state for _, part_state in parts)


def test_a_run_may_resume_with_another_number_of_ranks(small_corpus: SmallCorpus) -> None:
    whole = batches(small_corpus, 6)
    _, state = batches(small_corpus, 3, rank=1, world_size=2)[-1]
    assert_bitwise_equal(batches(small_corpus, 3, state=state), whole[3:])


RANK = """
import itertools, json, sys
from p2r.config import ImageConfig
from p2r.data.manifest import load_manifest
from p2r.data.stream import Corpus, stream, stream_state
from p2r.storage import Storage

url, rank, world_size, saved, num_steps = json.loads(sys.argv[1])
storage = Storage(url)
corpora = [Corpus(storage, load_manifest(storage))]
state = stream_state(corpora, seed=3, global_batch=8)
source = stream(
    corpora, image=ImageConfig(spacing_mm=2.0, size=32), seed=3, global_batch=8, rank=rank, world_size=world_size,
    state=state.resumed(saved) if saved else None,
)
for batch, state in itertools.islice(source, num_steps):
    print(json.dumps([batch.positions.tolist(), state.to_dict()]))
source.close()
"""


def test_processes_resumed_on_another_number_of_ranks_read_the_samples_of_one_process(
    small_corpus: SmallCorpus,
) -> None:
    """Five steps on two processes, then past the end of the epoch on four ranks, then on one."""
    arguments = [json.dumps([small_corpus[0].url, rank, 2, None, 5]) for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, text], stdout=subprocess.PIPE, text=True) for text in arguments
    ]
    steps = [[json.loads(line) for line in rank.communicate(timeout=120)[0].splitlines()] for rank in ranks]
    assert not any(rank.returncode for rank in ranks)
    taken = [[*mine, *theirs] for (mine, _), (theirs, _) in zip(*steps, strict=True)]
    state = stream_state([Corpus(*small_corpus)], seed=3, global_batch=SIZE).resumed(steps[0][-1][1])
    parts = [batches(small_corpus, 5, rank=rank, world_size=4, state=state) for rank in range(4)]
    taken += [
        np.concatenate([batch.positions for batch, _ in of_step]).tolist() for of_step in zip(*parts, strict=True)
    ]
    taken += [batch.positions.tolist() for batch, _ in batches(small_corpus, 6, state=parts[0][-1][1])]
    assert taken == [batch.positions.tolist() for batch, _ in batches(small_corpus, 16)]


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (1, 4), (4, 2)])
def test_threads_change_nothing(small_corpus: SmallCorpus, num_threads: int, prefetch: int) -> None:
    assert_bitwise_equal(batches(small_corpus, 9, num_threads=num_threads, prefetch=prefetch), batches(small_corpus, 9))


def test_the_memory_of_a_batch_is_reused_only_without_references_to_it(small_corpus: SmallCorpus) -> None:
    held: list[tuple[Any, Any]] = []
    places: list[int] = []
    with closing(stream(Corpus(*small_corpus), image=IMAGE, seed=3, global_batch=SIZE)) as source:
        for step, (batch, _) in enumerate(itertools.islice(source, 60)):
            for group in batch.groups:
                places.append(group.voxels.untyped_storage().data_ptr())
                if step % 5 == 0:  # a view of a view, as tensor or array
                    part: Any = group.voxels[-1:] if step % 2 else group.voxels.numpy()[..., 1:].T
                    held.append((part, part.clone() if step % 2 else part.copy()))
            del batch, group
    assert len(set(places)) < len(places) / 2
    assert all((part == copy).all() for part, copy in held) and len(held) >= 12


def stream_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("p2r-stream")}


def test_closing_ends_the_threads(small_corpus: SmallCorpus) -> None:
    source = stream(Corpus(*small_corpus), image=IMAGE, seed=0, global_batch=SIZE)
    next(source)
    assert stream_threads()
    source.close()
    assert not stream_threads()


def test_a_corpus_smaller_than_a_global_batch_is_refused_at_once(small_corpus: SmallCorpus) -> None:
    with pytest.raises(DataError, match="fewer than one global batch of 64"):
        stream(Corpus(*small_corpus), image=IMAGE, seed=0, global_batch=64)


def test_an_invalid_world_size_is_refused_at_once(small_corpus: SmallCorpus) -> None:
    with pytest.raises(DataError, match="use 1, 2, 4, 8 ranks"):
        stream(Corpus(*small_corpus), image=IMAGE, seed=0, global_batch=SIZE, world_size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed 3, this run has 4"),
        ({"global_batch": 4}, "global_batch 8, this run has 4"),
        ({"neighbours": 0.5}, "neighbours 0.0, this run has 0.5"),
        ({"corpora": "others"}, "corpora .*manifest_sha256"),
    ],
)
def test_a_state_of_another_stream_is_refused(small_corpus: SmallCorpus, change: dict[str, Any], message: str) -> None:
    _, state = batches(small_corpus, 1)[0]
    run: dict[str, Any] = {"corpora": [Corpus(*small_corpus)], "seed": 3, "global_batch": SIZE}
    assert stream_state(**run).resumed(state.to_dict()) == state
    if change == {"corpora": "others"}:
        storage, manifest = small_corpus
        change = {"corpora": [Corpus(storage, make_manifest({**manifest, "revision": 7}, name="another"))]}
    with pytest.raises(CheckpointError, match=message):
        stream_state(**{**run, **change}).resumed(state.to_dict())


def test_a_state_of_another_stream_is_refused_by_the_stream_too(small_corpus: SmallCorpus) -> None:
    _, state = batches(small_corpus, 1)[0]
    with pytest.raises(CheckpointError, match="seed 3, this run has 0"):
        stream(Corpus(*small_corpus), image=IMAGE, seed=0, global_batch=SIZE, state=state)


def test_planes_that_would_be_too_large_after_resampling_are_refused_by_name(small_corpus: SmallCorpus) -> None:
    image = ImageConfig(spacing_mm=0.001, size=32)
    with pytest.raises(DataError, match=r"shard-.*\.tar: .*: 1 slices of .* would take .* allowed: use larger voxels"):
        batches(small_corpus, 1, image=image)


@pytest.mark.parametrize("value", [{}, {"step": -1}, {"step": "7"}, {"step": None}])
def test_a_state_without_a_step_is_refused(small_corpus: SmallCorpus, value: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no valid step"):
        stream_state([Corpus(*small_corpus)], seed=3, global_batch=SIZE).resumed(value)


@pytest.fixture
def damageable(small_corpus: SmallCorpus, tmp_path: Path) -> Iterator[tuple[Path, SmallCorpus]]:
    folder = tmp_path / "copy"
    shutil.copytree(small_corpus[0].url.removeprefix("file://"), folder)
    yield folder, (Storage(str(folder)), small_corpus[1])
    assert not stream_threads()  # errors end them too


def test_one_damaged_byte_stops_the_stream_and_is_named(damageable: tuple[Path, SmallCorpus]) -> None:
    folder, corpus = damageable
    (tar,) = folder.glob("shard-000001-*.tar")
    row = read_index(tar.with_suffix(".idx"))[0]
    content = bytearray(tar.read_bytes())
    content[row.chunk_offsets[1] + 40] ^= 128
    tar.write_bytes(content)
    with pytest.raises(DataError, match=rf"{tar.name}: chunk 1 of {row.key} is damaged"):
        batches(corpus, 30)


def damage(folder: Path, shard: str, chunks: list[tuple[int, int]]) -> None:
    """Flip a bit in some planes, by number of record and plane."""
    rows = read_index(folder / shard.replace(".tar", ".idx"))
    content = bytearray((folder / shard).read_bytes())
    for record, plane in chunks:
        content[rows[record].chunk_offsets[plane] + 40] ^= 128
    (folder / shard).write_bytes(content)


def test_a_damaged_sample_is_replaced_reproducibly_and_counted(
    damageable: tuple[Path, SmallCorpus],
) -> None:
    folder, corpus = damageable
    sound = batches(corpus, 14)
    shard = corpus[1]["shards"][1]["name"]
    damage(folder, shard, [(0, 1), (1, 2)])
    notes: list[Replaced] = []
    counters = Counters()
    options: dict[str, Any] = {"quarantine": Quarantine(10, notes.append), "counters": counters}
    whole = batches(corpus, 14, **options)
    assert_bitwise_equal(whole, batches(corpus, 14, quarantine=Quarantine(10), num_threads=1))
    ranks = [batches(corpus, 14, rank=rank, world_size=2, quarantine=Quarantine(10)) for rank in range(2)]
    replaced = [note for batch, _ in whole for note in batch.replaced]
    assert sorted(notes, key=str) == sorted(replaced, key=str) and 2 <= len(notes) <= 4  # two epochs, two planes
    assert counters.snapshot()["replaced_records"] == len(notes)
    assert all(note.shard.endswith(shard) and "CRC-32" in note.error for note in notes)
    num_changed = 0
    for (batch, _), (before, _), *parts in zip(whole, sound, *ranks, strict=True):
        changed = batch.positions != before.positions
        num_changed += int(changed.sum())
        assert torch.equal(batch.images()[0][~changed], before.images()[0][~changed])
        assert torch.equal(torch.cat([part.images()[0] for part, _ in parts]), batch.images()[0])
        np.testing.assert_array_equal(np.concatenate([part.positions for part, _ in parts]), batch.positions)
        np.testing.assert_array_equal(locate(corpus[1], batch.positions)[0], locate(corpus[1], before.positions)[0])
    assert num_changed == len(notes)


def test_more_damage_than_the_quarantine_allows_stops_the_stream(damageable: tuple[Path, SmallCorpus]) -> None:
    folder, corpus = damageable
    damage(folder, corpus[1]["shards"][1]["name"], [(0, 0), (0, 1), (0, 2)])
    with pytest.raises(DataError, match=r"is damaged.*2 damaged samples were replaced already, the most allowed"):
        batches(corpus, 30, quarantine=Quarantine(2))


def test_an_unreadable_shard_stops_the_stream(damageable: tuple[Path, SmallCorpus]) -> None:
    folder, corpus = damageable
    shard = corpus[1]["shards"][1]["name"]
    rows = read_index(folder / shard.replace(".tar", ".idx"))
    damage(folder, shard, [(number, plane) for number, row in enumerate(rows) for plane in range(row.num_planes)])
    with pytest.raises(DataError, match="replacements of a damaged sample cannot be read either"):
        batches(corpus, 30, quarantine=Quarantine(1000))


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("world_size", [1, 8])
def test_neighbours_are_slices_adjacent_to_the_previous_sample(
    small_corpus: SmallCorpus, share: float, world_size: int
) -> None:
    steps = [
        np.concatenate([batch.positions for batch, _ in parts])
        for parts in zip(
            *(
                batches(small_corpus, 7, rank=rank, world_size=world_size, neighbours=share)
                for rank in range(world_size)
            ),
            strict=True,
        )
    ]
    plain = [batch.positions for batch, _ in batches(small_corpus, 7)]
    num_neighbours = 0
    for positions, before in zip(steps, plain, strict=True):
        changed = np.flatnonzero(positions != before)
        assert (changed % 2 == 1).all()
        assert (np.abs(positions[changed] - positions[changed - 1]) == 1).all()
        shards, _ = locate(small_corpus[1], positions)
        assert (shards[changed] == shards[changed - 1]).all()
        num_neighbours += len(changed)
    assert share * 7 * SIZE - 3 <= num_neighbours <= share * 7 * SIZE  # some are neighbours by chance


def test_a_mixture_streams_all_of_its_corpora(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(small_corpus[0].url.removeprefix("file://"), folder)
    corpora = [Corpus(*small_corpus, weight=3.0), Corpus(Storage(str(folder)), small_corpus[1], weight=1.0)]
    with closing(stream(corpora, image=IMAGE, seed=3, global_batch=SIZE)) as source:
        taken = list(itertools.islice(source, 12))
    num_samples = small_corpus[1]["num_samples"]
    assert all((batch.positions >= num_samples).sum() == SIZE // 4 for batch, _ in taken)
    with closing(stream(corpora, image=IMAGE, seed=3, global_batch=SIZE, state=taken[4][1])) as source:
        assert_bitwise_equal(list(itertools.islice(source, 7)), taken[5:])
    with pytest.raises(DataError, match="weight to every corpus"):
        stream([corpora[0], Corpus(*small_corpus)], image=IMAGE, seed=3, global_batch=SIZE)


PATCHES = ImageConfig(dimensions=3, spacing_mm=1.5, size=16, patches_per_volume=3)


@pytest.mark.parametrize("record", ["planes", "blocks", "npy"])
def test_patches_are_read_from_the_same_shards(small_corpus: SmallCorpus, tmp_path: Path, record: str) -> None:
    _, manifest = small_corpus
    config = IngestConfig(sources=tuple(manifest["source"]), licence="CC0-1.0", shard_size_mib=0.012, record=record)
    storage = Storage(str(tmp_path / "corpus"))
    list(ingest_locally(config, storage))
    corpus = (storage, load_manifest(storage))
    taken = batches(corpus, 9, image=PATCHES)
    for (batch, _), (expected, _) in zip(taken, batches(small_corpus, 9, image=PATCHES), strict=True):
        # The layout changes nothing but the revision.
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch.images(), expected.images(), strict=True))
        np.testing.assert_array_equal(batch.positions, expected.positions)
    num_volumes = sum(entry["num_volumes"] for entry in manifest["shards"])
    assert num_volumes == 13  # eleven stills and a cine of two frames
    assert order_of([Corpus(*corpus)], image=PATCHES, seed=0, global_batch=SIZE).steps_per_epoch == (13 * 3 // SIZE,)
    for batch, _ in taken:
        images, insides = batch.images()
        assert images.shape == (SIZE, 1, 16, 16, 16) and insides.shape == (SIZE, 16, 16, 16)
        assert insides.any(dim=(1, 2, 3)).all() and not images[:, 0][~insides].any()
        assert images.amax() > 0.3 and images.amin() >= 0 and images.amax() <= 1
    ranks = [batches(corpus, 9, image=PATCHES, rank=rank, world_size=2) for rank in range(2)]
    for (batch, _), *parts in zip(taken, *ranks, strict=True):
        assert torch.equal(torch.cat([part.images()[0] for part, _ in parts]), batch.images()[0])


def test_the_stream_counts_its_work(small_corpus: SmallCorpus) -> None:
    counters = Counters()
    batches(small_corpus, 3, counters=counters)
    counted = counters.snapshot()
    assert counted["decode_seconds"] > 0 and counted["wait_seconds"] > 0
    assert counted["batches"] == 3 and 0 <= counted["ready_batches"] <= 2 * 3


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-700])]
)
def test_an_absent_or_truncated_shard_or_index_is_named(
    damageable: tuple[Path, SmallCorpus], suffix: str, damage: Any
) -> None:
    folder, corpus = damageable
    (path,) = folder.glob(f"shard-000000-*{suffix}")
    damage(path)
    with pytest.raises(InputError, match=path.name):
        batches(corpus, 30)


@pytest.mark.s3
def test_scans_in_a_bucket_give_the_same_batches(
    s3_url: str, small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    local, manifest = small_corpus
    bucket, remote = Storage(f"{s3_url}/scans"), Storage(f"{s3_url}/corpus")
    for path in sorted(Path(manifest["source"][0]).iterdir()):
        bucket.upload(path, path.name)
    config = IngestConfig(sources=(bucket.url,), licence="CC0-1.0", shard_size_mib=0.012)
    list(ingest_locally(config, remote))
    found = load_manifest(remote)
    assert found["shards"] == manifest["shards"]  # bitwise equal to the corpus of the folder
    assert verify_corpus(remote) == []
    with closing(stream(Corpus(remote, found), image=IMAGE, seed=3, global_batch=SIZE)) as source:
        for (batch, _), (expected, _) in zip(source, batches((local, manifest), 9), strict=False):
            assert torch.equal(batch.images()[0], expected.images()[0])
    with pytest.raises(DataError, match="nowhere"):
        find_scans([f"{s3_url}/nowhere"], cache=tmp_path)
