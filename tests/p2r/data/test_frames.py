"""Frames of one series as views of each other: which are read, and that the order, resumes and ranks stay exact."""

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from p2r.config import ImageConfig, IngestConfig, PretrainConfig, SessionsConfig, ViewsConfig
from p2r.data.batch import Batch
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.data.stream import Corpus, stream
from p2r.storage import Storage
from p2r.views import make_views

FRAMES, STEP = 6, 40
PLANES = ImageConfig(size=16, spacing_mm=1.0, intensity_percentiles=(0.0, 100.0))
PATCHES = ImageConfig(dimensions=3, size=16, spacing_mm=1.0, intensity_percentiles=(0.0, 100.0))


def write(path: Path, seed: int, *, frames: int) -> None:
    """Write a series of equal frames, each brighter than the one before by `STEP`."""
    still = np.random.default_rng(seed).integers(1, 200, (24, 20, 18, 1))
    voxels = (still + STEP * np.arange(frames)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels if frames > 1 else voxels[..., 0], np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


def ingested(folder: Path, **changes: Any) -> Corpus:
    storage = Storage(str(folder / "corpus"))
    config = IngestConfig(sources=(str(folder / "scans"),), licence="CC0-1.0", shard_size_mib=0.2, **changes)
    list(ingest_locally(config, storage))
    return Corpus(storage, load_manifest(storage))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three series and two stills."""
    folder = tmp_path_factory.mktemp("frames")
    (folder / "scans").mkdir()
    for number in range(5):
        write(folder / f"scans/sub-{number}.nii", number, frames=FRAMES if number < 3 else 1)
    return ingested(folder, slice_axis=2)


def taken(corpus: Corpus, num: int, *, image: ImageConfig = PLANES, **options: Any) -> list[tuple[Batch, Any]]:
    with closing(stream(corpus, image=image, seed=2, global_batch=4, **options)) as source:
        return list(islice(source, num))


@pytest.mark.parametrize("image", [PLANES, PATCHES])
@pytest.mark.parametrize("apart", [1, 3])
def test_the_other_frame_shows_the_same_place_at_most_that_far_away(
    corpus: Corpus, image: ImageConfig, apart: int
) -> None:
    distances: list[int] = []
    for batch, _ in taken(corpus, 5, image=image, frames_apart=apart):
        first, _, covered, other = batch.prepare_frames()
        assert other is not None and covered is None and batch.has_other_frame is not None
        assert first.shape == other.shape == (4, 1, *[16] * image.dimensions)
        for ours, theirs, has_other in zip(first, other, batch.has_other_frame, strict=True):
            if not has_other:
                assert torch.equal(ours, theirs)
                continue
            # Intensities span 1 to 199 + 5 * STEP, or nearly.
            step = (theirs - ours) * (198 + STEP * (FRAMES - 1)) / STEP
            assert step.std() < 0.05
            distances.append(round(float(step.mean())))
    assert 0 < max(map(abs, distances)) <= apart and 0 not in distances
    assert min(distances) < 0 < max(distances)


def test_other_frames_change_neither_the_order_nor_the_first_frames(corpus: Corpus) -> None:
    plain, with_others = taken(corpus, 4), taken(corpus, 4, frames_apart=2)
    for (ours, state), (theirs, expected) in zip(with_others, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.images(), theirs.images(), strict=True))
        assert state == expected and np.array_equal(ours.positions, theirs.positions)
        assert theirs.prepare_frames()[3] is None


def test_other_frames_are_the_same_after_a_resume_and_on_other_ranks(corpus: Corpus) -> None:
    whole = taken(corpus, 4, frames_apart=2)
    resumed = taken(corpus, 2, frames_apart=2, state=whole[1][1])
    ranks = [taken(corpus, 4, frames_apart=2, rank=rank, world_size=2) for rank in range(2)]

    def other(batch: Batch) -> torch.Tensor:
        found = batch.prepare_frames()[3]
        assert found is not None
        return found

    for number, (batch, _) in enumerate(whole):
        assert torch.equal(other(batch), torch.cat([other(rank[number][0]) for rank in ranks]))
        if number > 1:
            assert torch.equal(other(batch), other(resumed[number - 2][0]))


def test_frames_of_several_contrasts_stay_together(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for number in range(3):
        for name in ("cine", "tagged")[: 1 + (number > 0)]:
            write(tmp_path / f"scans/sub-{number}_{name}.nii", 10 * number + len(name), frames=FRAMES)
    names = ("cine", "tagged")
    corpus = ingested(tmp_path, sessions=SessionsConfig(contrasts={name: name for name in names}), slice_axis=2)
    for batch, _ in taken(corpus, 4, frames_apart=1, contrasts=names):
        first, _, _, others = batch.prepare_frames()
        assert others is not None and batch.present is not None and batch.present.shape == (4, 2)
        steps = (others - first).flatten(2).mean(2)
        for step, present in zip(steps, batch.present, strict=True):
            assert step[0].abs() > 0.05 and bool(present[1]) == bool(step[1].abs() > 0.05)
            assert not present[1] or torch.sign(step[0]) == torch.sign(step[1])


@pytest.mark.parametrize("num_contrasts", [1, 2])
def test_view_b_is_made_of_the_other_frame_and_view_a_of_the_first(num_contrasts: int) -> None:
    image, other = (torch.rand(3, num_contrasts, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    given: dict[str, Any] = {
        "inside": torch.ones(3, 16, 16, dtype=torch.bool),
        "config": ViewsConfig(),
        "spacing_mm": 1.0,
        "seed": 0,
        "epochs": np.zeros(3, np.int64),
        "positions": np.arange(3),
    }
    plain, swapped, mixed = (
        make_views(image, **given),
        make_views(other, **given),
        make_views(image, other=other, **given),
    )
    assert torch.equal(mixed.a, plain.a) and torch.equal(mixed.b, swapped.b) and torch.equal(mixed.warp, plain.warp)
    with pytest.raises(ValueError, match="expected other of the image's shape"):
        make_views(image, other=other[:2], **given)


def test_neighbours_of_volumes_are_refused_with_the_way_out() -> None:
    values = {"image": {"dimensions": 3, "size": 32}, "steps": 1, "global_batch": 4, "neighbours": 0.5}
    with pytest.raises(ValueError, match=r"views\.frames_apart pairs the frames"):
        PretrainConfig.model_validate(values)
