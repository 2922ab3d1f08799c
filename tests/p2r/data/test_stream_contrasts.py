"""The stream of a corpus of sessions: the guarantees of `test_stream`, for records of up to three contrasts."""

import itertools
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p2r.config import ImageConfig
from p2r.counters import Counters
from p2r.data.batch import Batch
from p2r.data.grids import to_grid
from p2r.data.manifest import Manifest
from p2r.data.order import locate
from p2r.data.preprocess import intensity_window, normalise, plane_spacing
from p2r.data.shards import IndexRow, ShardReader, open_shard, read_index
from p2r.data.stream import Corpus, Quarantine, StreamState, stream, stream_state
from p2r.errors import DataError
from p2r.storage import Storage

SessionCorpus = tuple[Storage, Manifest]

IMAGE = ImageConfig(spacing_mm=2.0, size=32)
PATCHES = ImageConfig(dimensions=3, spacing_mm=2.0, size=16, patches_per_volume=4)
CONTRASTS = ("flair", "t1", "t1ce")


def batches(
    corpus: SessionCorpus, num: int, *, state: StreamState | None = None, **options: Any
) -> list[tuple[Batch, StreamState]]:
    settings = {"image": IMAGE, "seed": 3, "global_batch": 8, "state": state, "contrasts": CONTRASTS, **options}
    with closing(stream(Corpus(*corpus), **settings)) as source:
        return list(itertools.islice(source, num))


def assert_bitwise_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for one, other in zip(a.prepare(), b.prepare(), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)  # type: ignore[arg-type]
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.present, b.present)


def located(corpus: SessionCorpus, position: int) -> tuple[ShardReader, IndexRow, int]:
    """Return the shard, the first volume and the plane of a sample."""
    storage, manifest = corpus
    (shard,), (sample,) = locate(manifest, np.array([position]))
    reader = open_shard(storage.local(manifest["shards"][shard]["name"]))
    return reader, *reader.locate(int(sample))


def test_each_channel_of_an_image_is_its_contrast_and_missing_ones_are_zero(session_corpus: SessionCorpus) -> None:
    num_missing = num_uncovered = 0
    for batch, _ in batches(session_corpus, 6):
        images, insides, covered = batch.prepare()
        assert images.shape == (8, 3, 32, 32) and insides.shape == (8, 32, 32)
        assert batch.contrasts == CONTRASTS and batch.present is not None and batch.present.shape == (8, 3)
        for index, position in enumerate(batch.positions.tolist()):
            reader, first, plane = located(session_corpus, position)
            volumes = {row.contrast: row for row in reader.volumes(first)}
            assert [name in volumes for name in CONTRASTS] == batch.present[index].tolist()
            for channel, name in enumerate(CONTRASTS):
                if name not in volumes:
                    num_missing += 1
                    assert not images[index, channel].any()
                    continue
                row, voxels = volumes[name], np.empty(first.stored_shape[2:], volumes[name].dtype)
                reader.read_located(row, plane, voxels)
                window = intensity_window(row.percentiles, (0.5, 99.5))
                ready = normalise(torch.from_numpy(voxels)[None, None], *window)
                expected, inside = to_grid(ready, plane_spacing(row.spacing_mm, 2), target_mm=2.0, size=32)
                assert torch.equal(images[index, channel], expected[0, 0]) and torch.equal(insides[index], inside[0])
                if covered is not None:
                    num_uncovered += int((insides[index] & ~covered[index, channel]).sum())
                    assert (row.coverage is not None) == bool((insides[index] & ~covered[index, channel]).any())
    assert num_missing > 40 and num_uncovered > 200


@pytest.mark.parametrize("image", [IMAGE, PATCHES])
@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resume_is_bitwise_equal_with_other_numbers_of_ranks(
    session_corpus: SessionCorpus, stop: int, image: ImageConfig
) -> None:
    whole = batches(session_corpus, 9, image=image)
    saved = json.loads(json.dumps(whole[stop - 1][1].to_dict()))
    state = stream_state([Corpus(*session_corpus)], seed=3, global_batch=8).resumed(saved)
    after = [batch for batch, _ in batches(session_corpus, 9 - stop, state=state, image=image)]
    assert_bitwise_equal(after, [batch for batch, _ in whole[stop:]])
    ranks = [batches(session_corpus, 9 - stop, state=state, rank=rank, world_size=4, image=image) for rank in range(4)]
    for batch, *parts in zip(after, *ranks, strict=True):
        assert torch.equal(torch.cat([part.images()[0] for part, _ in parts]), batch.images()[0])
        np.testing.assert_array_equal(np.concatenate([part.present for part, _ in parts]), batch.present)


def test_a_network_of_one_contrast_reads_only_sessions_that_have_it(session_corpus: SessionCorpus) -> None:
    counters = Counters()
    whole = batches(session_corpus, 10, contrasts=("flair",), counters=counters)
    for batch, _ in whole:
        assert batch.present is not None and batch.present.all() and batch.images()[0].shape == (8, 1, 32, 32)
        for position in batch.positions.tolist():
            reader, row, _ = located(session_corpus, position)
            assert "flair" in {one.contrast for one in reader.volumes(row)}
    assert counters.snapshot()["samples_without_contrast"] > 10
    ranks = [batches(session_corpus, 10, contrasts=("flair",), rank=rank, world_size=2) for rank in range(2)]
    for (batch, _), *parts in zip(whole, *ranks, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.positions for part, _ in parts]), batch.positions)


def test_samples_of_a_shard_without_the_contrast_are_absent(session_corpus: SessionCorpus, tmp_path: Path) -> None:
    """A session without T1 is a sample outside of every scan, so that no pixel of it is compared."""
    storage, manifest = session_corpus
    of_shard = [open_shard(storage.local(entry["name"])) for entry in manifest["shards"]]
    names = [{one.contrast for row in reader.records for one in reader.volumes(row)} for reader in of_shard]
    lacking = next(number for number, found in enumerate(names) if not {"t1ce", "t1", "flair"} <= found)
    (missing, *_) = sorted({"t1ce", "t1", "flair"} - names[lacking], key=str)
    found = [batch for batch, _ in batches(session_corpus, 8, contrasts=(str(missing),))]
    absent = np.concatenate([batch.present for batch in found])[:, 0] == 0
    shards, _ = locate(manifest, np.concatenate([batch.positions for batch in found]))
    assert absent.any() and set(shards[absent].tolist()) == {
        number for number, has in enumerate(names) if missing not in has
    }
    insides = torch.cat([batch.images()[1] for batch in found])
    assert not insides[torch.from_numpy(absent)].any() and insides[torch.from_numpy(~absent)].any((1, 2)).all()


def test_damage_in_one_contrast_replaces_the_whole_sample(session_corpus: SessionCorpus, tmp_path: Path) -> None:
    shutil.copytree(session_corpus[0].url.removeprefix("file://"), tmp_path / "copy")
    corpus = (Storage(str(tmp_path / "copy")), session_corpus[1])
    shard = next(
        entry["name"]
        for entry in corpus[1]["shards"]
        if len(read_index(tmp_path / "copy" / entry["name"].replace(".tar", ".idx"))) > 2
    )
    rows = read_index(tmp_path / "copy" / shard.replace(".tar", ".idx"))
    row = next(two for one, two in itertools.pairwise(rows) if one.key == two.key)  # not the first of its record
    content = bytearray((tmp_path / "copy" / shard).read_bytes())
    content[row.chunk_offsets[1] + 40] ^= 128
    (tmp_path / "copy" / shard).write_bytes(content)
    sound, damaged = batches(session_corpus, 12), batches(corpus, 12, quarantine=Quarantine(10))
    notes = [note for batch, _ in damaged for note in batch.replaced]
    assert notes and all(f"chunk 1 of {row.key} is damaged" in note.error for note in notes)
    changed = 0
    for (batch, _), (before, _) in zip(damaged, sound, strict=True):
        same = batch.positions == before.positions
        changed += int((~same).sum())
        assert torch.equal(batch.images()[0][same], before.images()[0][same])
        for index in np.flatnonzero(~same):
            reader, first, _ = located(session_corpus, int(batch.positions[index]))
            present = [name in {one.contrast for one in reader.volumes(first)} for name in CONTRASTS]
            assert batch.present is not None and batch.present[index].tolist() == present
            assert [bool(image.any()) for image in batch.images()[0][index]] == present
    assert changed == len(notes)
    with pytest.raises(DataError, match=rf"chunk 1 of {row.key} is damaged"):
        batches(corpus, 12)


def test_contrasts_of_corpus_and_network_must_fit(session_corpus: SessionCorpus, small_corpus: SessionCorpus) -> None:
    def refusal(corpus: Corpus, contrasts: tuple[str, ...] | None) -> str:
        with pytest.raises(DataError) as caught:
            stream(corpus, image=IMAGE, seed=0, global_batch=8, contrasts=contrasts)
        return str(caught.value)

    assert "has the contrasts flair, t1, t1ce: choose some of them in pretrain.model.contrasts" in refusal(
        Corpus(*session_corpus), None
    )
    assert "has none of the contrasts dwi (pretrain.model.contrasts); it has flair, t1, t1ce" in refusal(
        Corpus(*session_corpus), ("dwi",)
    )
    assert "has no named contrasts" in refusal(Corpus(*small_corpus), ("t1",))
    # The network would never see it, and its backbone would claim to read it.
    assert "has the contrast dwi (pretrain.model.contrasts); there are flair, t1, t1ce: leave it out" in refusal(
        Corpus(*session_corpus), ("t1", "dwi")
    )
    assert "leave contrast out" in refusal(Corpus(*session_corpus, contrast="t1"), ("t1",))


def test_a_corpus_without_names_joins_a_mixture_under_the_name_that_the_job_gives(
    session_corpus: SessionCorpus, small_corpus: SessionCorpus
) -> None:
    corpora = [Corpus(*session_corpus, weight=1.0), Corpus(*small_corpus, weight=1.0, contrast="t1")]
    with closing(stream(corpora, image=IMAGE, seed=3, global_batch=8, contrasts=CONTRASTS)) as source:
        for batch, _ in itertools.islice(source, 6):
            others = batch.positions >= session_corpus[1]["num_samples"]
            assert others.sum() == 4 and batch.present is not None
            assert (batch.present[others] == [False, True, False]).all()
            assert batch.images()[0][torch.from_numpy(others), 1].flatten(1).any(1).all()
