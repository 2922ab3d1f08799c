"""Patches of whole volumes: the bytes that they read, and draws in the foreground."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import pytest

from p2r.config import ImageConfig, IngestConfig
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.data.foreground import foreground_cells, is_foreground
from p2r.data.patches import choose_patch
from p2r.data.shards import ShardReader, local_ranges, open_shard, read_index
from p2r.data.stream import Corpus, stream
from p2r.errors import DataError
from p2r.storage import Storage

SHAPE = (72, 64, 80)
PATCH: dict[str, Any] = {"dimensions": 3, "spacing_mm": 1.0, "size": 32}


def voxels(seed: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """A bright cube in one corner, in noise."""
    values = np.random.default_rng(seed).normal(40, 8, SHAPE)
    values[8:32, 8:32, 48:72] += 400
    return values.astype(np.int16)


def ingested(folder: Path, *, record: str = "blocks", block_size: Literal[16, 24, 32] = 32, num: int = 4) -> Corpus:
    scans = folder / "scans"
    scans.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        nibabel.save(nibabel.Nifti1Image(voxels(number), np.eye(4)), scans / f"sub-{number}.nii")
    storage = Storage(str(folder / f"corpus-{record}-{block_size}"))
    config = IngestConfig(sources=(str(scans),), licence="CC0-1.0", record=record, block_size=block_size, slice_axis=2)
    list(ingest_locally(config, storage))
    return Corpus(storage, load_manifest(storage))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return ingested(tmp_path_factory.mktemp("patches"), block_size=16)


def readers(corpus: Corpus) -> Iterator[tuple[ShardReader, list[int]]]:
    """Yield a reader for each shard, and the list of the bytes of its reads."""
    for shard in corpus.manifest.shards:
        path = Path(corpus.storage.url.removeprefix("file://"), shard.name)
        read, sizes = local_ranges(path), list[int]()

        def counted(start: int, stop: int, read: Any = read, sizes: list[int] = sizes) -> bytes:
            sizes.append(stop - start)
            return bytes(read(start, stop))

        yield ShardReader(path.name, read_index(path.with_suffix(".idx")), counted), sizes


@pytest.mark.parametrize("block_size", [16, 24, 32])
def test_any_box_of_blocks_has_the_voxels_of_the_scan(tmp_path: Path, block_size: Literal[16, 24, 32]) -> None:
    corpus = ingested(tmp_path, block_size=block_size, num=1)
    (reader, _), rng = next(readers(corpus)), np.random.default_rng(0)
    stored = np.moveaxis(voxels(0), 2, 0)
    for _ in range(20):
        edges = [sorted(rng.choice(length + 1, 2, replace=False)) for length in stored.shape]
        planes, rows, columns = (slice(int(start), int(stop)) for start, stop in edges)
        found = reader.read_box(reader.records[0], 0, (planes, rows, columns))
        np.testing.assert_array_equal(found, stored[planes, rows, columns])


def test_a_patch_of_small_blocks_reads_at_most_twice_its_bytes(tmp_path: Path) -> None:
    rng, scans = np.random.default_rng(0), tmp_path / "scans"
    scans.mkdir()
    nibabel.save(nibabel.Nifti1Image(rng.normal(500, 50, (128, 128, 128)).astype(np.int16), np.eye(4)), scans / "a.nii")
    config = IngestConfig(sources=(str(scans),), licence="CC0-1.0", record="blocks", block_size=16, one_subject=True)
    storage = Storage(str(tmp_path / "corpus"))
    list(ingest_locally(config, storage))
    ((reader, sizes),) = readers(Corpus(storage, load_manifest(storage)))
    row, image = reader.records[0], ImageConfig(dimensions=3, spacing_mm=1.0, size=96)
    per_voxel = row.size / np.prod(row.shape)
    for seed in range(6):
        box, _ = choose_patch(row, image, np.random.default_rng(seed))
        reader.read_box(row, 0, box)
    assert sum(sizes) / 6 <= 2 * per_voxel * 96**3


def test_patches_are_centred_in_the_foreground_if_asked_and_anywhere_otherwise(corpus: Corpus) -> None:
    reader = open_shard(Path(corpus.storage.url.removeprefix("file://"), corpus.manifest.shards[0].name))
    row = reader.records[0]
    assert row.foreground is not None and is_foreground(row.foreground)
    cells = {tuple(cell) for cell in foreground_cells(row.foreground)}
    # Cells have 9 x 8 x 10 voxels: the cube covers these at least in part, and those in the middle wholly.
    covered = {(x, y, z) for x in range(4) for y in range(1, 4) for z in range(4, 8)}
    assert {(x, y, z) for x in (1, 2) for y in range(1, 4) for z in (5, 6)} <= cells <= covered
    image = ImageConfig(**PATCH, foreground_share=1.0)
    for seed in range(30):
        box, centre = choose_patch(row, image, np.random.default_rng(seed))
        z, x, y = ((part.start + at) for part, at in zip(box, (centre[2], centre[0], centre[1]), strict=True))
        # The centre is in a cell of the foreground, or as near as the scan reaches.
        assert 15 <= x <= 36 and 15 <= y <= 32 and 40 <= z <= 64
    plain, shared = ImageConfig(**PATCH), ImageConfig(**PATCH, foreground_share=0.5)
    anywhere = [choose_patch(row, plain, np.random.default_rng(seed))[0] for seed in range(30)]
    mixed = [choose_patch(row, shared, np.random.default_rng(seed))[0] for seed in range(30)]
    far = [sum(box[0].start < 8 for box in boxes) for boxes in (anywhere, mixed)]
    assert far[0] > far[1] > 0


def test_draws_in_the_foreground_are_the_same_on_every_number_of_ranks_and_after_a_resume(corpus: Corpus) -> None:
    image = ImageConfig(**PATCH, foreground_share=0.7, patches_per_volume=4)

    def taken(num: int, **options: Any) -> list[Any]:
        with closing(stream(corpus, image=image, seed=1, global_batch=4, **options)) as source:
            return list(islice(source, num))

    whole = taken(5)
    resumed = taken(3, state=whole[1][1])
    parts = [taken(5, rank=rank, world_size=2) for rank in range(2)]
    for number, (batch, state) in enumerate(whole):
        images = batch.images()[0]
        assert np.array_equal(images, np.concatenate([part[number][0].images()[0] for part in parts]))
        if number > 1:
            assert np.array_equal(images, resumed[number - 2][0].images()[0]) and resumed[number - 2][1] == state


def test_a_corpus_without_foreground_is_refused_by_name(tmp_path: Path) -> None:
    corpus = ingested(tmp_path, record="planes")
    image = ImageConfig(**PATCH, foreground_share=1.0)
    with (
        closing(stream(corpus, image=image, seed=0, global_batch=2)) as source,
        pytest.raises(DataError, match=r"shard-0.*foreground of sub-\d is not known.*blocks into a new"),
    ):
        next(source)
    with pytest.raises(ValueError, match="it needs dimensions 3"):
        ImageConfig(foreground_share=0.5)


def test_an_index_with_an_invalid_foreground_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    folder = Path(corpus.storage.url.removeprefix("file://"))
    index = next(folder.glob("*.idx"))
    row = read_index(index)[0]
    damaged = tmp_path / "damaged.idx"
    damaged.write_text(index.read_text().replace(str(row.foreground), "AAAA"))
    with pytest.raises(DataError, match="foreground has 512 bits"):
        read_index(damaged)
