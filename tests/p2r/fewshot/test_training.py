"""Training images cut from labelled scans, and the training step."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation, frames_of, label_frames_of, label_planes_of, planes_of
from p2r.data.volume import Volume
from p2r.evaluate.tasks import LabelledScan, TaskScan
from p2r.fewshot.images import Images, cut_windows, draw_images, labelled_images, prefer_foreground
from p2r.randomness import keyed_generator


def _centres(planes: str, height: int, width: int) -> set[tuple[int, int]]:
    """Return row and column in the slice of the centres of many windows."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = (1 + rows * width + columns)[None]
    generators = [keyed_generator(0, "test", number) for number in range(200)]
    preparation = Preparation(spacing_mm=1.0, image_size=32, planes=planes)
    _, inside, cut = cut_windows(
        Images(torch.zeros(1, 1, height, width), torch.ones(1, height, width, dtype=torch.bool), labels),
        np.zeros(200, np.int64),
        generators,
        preparation,
    )
    assert cut is not None and torch.equal(inside, torch.gt(cut, 0))
    middle = cut[:, cut.shape[1] // 2, cut.shape[2] // 2] - 1
    return {(int(value) // width, int(value) % width) for value in middle}


def test_training_windows_cover_every_part_of_a_slice() -> None:
    centres = _centres("whole", 64, 96)
    rows, columns = ({centre[axis] for centre in centres} for axis in (0, 1))
    assert (min(rows), max(rows)) == (16, 48)
    assert (min(columns), max(columns)) == (16, 80)


def test_a_slice_that_fits_is_used_whole() -> None:
    assert _centres("whole", 20, 32) == {(10, 16)}


def test_a_model_of_the_centre_trains_on_the_centre() -> None:
    assert _centres("centre", 64, 96) == {(32, 48)}


def test_training_windows_cover_every_part_of_a_volume_and_one_that_fits_is_used_whole() -> None:
    shape = (24, 12, 40)
    labels = 1 + torch.arange(math.prod(shape)).reshape(1, *shape)
    generators = [keyed_generator(0, "test", number) for number in range(100)]
    _, inside, cut = cut_windows(
        Images(torch.zeros(1, 1, *shape), torch.ones(1, *shape, dtype=torch.bool), labels),
        np.zeros(100, np.int64),
        generators,
        Preparation(dimensions=3, spacing_mm=1.0, image_size=16),
    )
    assert cut is not None and cut.shape == (100, 32, 32, 32)
    assert torch.equal(inside, torch.gt(cut, 0))
    centres = np.array(np.unravel_index((cut[:, 16, 16, 16] - 1).numpy(), shape))
    assert centres.min(1).tolist() == [8, 6, 8]
    assert centres.max(1).tolist() == [16, 6, 32]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_images_of_unequal_scans_are_padded_about_their_centres(dimensions: int) -> None:
    scans = []
    for shape in ((6, 8, 4), (9, 7, 5)):
        data = np.random.default_rng(0).integers(1, 8, (*shape, 2)).astype(np.int16)
        volume = Volume(data, np.eye(4), np.eye(4), shape, (1.0, 1.0, 1.0), "scan")
        preparation = Preparation(
            dimensions=dimensions,
            spacing_mm=1.0,
            image_size=16,
            intensity_percentiles=(0, 100),
        )
        make, make_labels = (planes_of, label_planes_of) if dimensions == 2 else (frames_of, label_frames_of)
        options = {"axis": 2} if dimensions == 2 else {}
        scans.append(
            LabelledScan(
                TaskScan("scan", "sub-01", Path(), Path()),
                volume,
                volume,
                make(volume, preparation=preparation, size=None),
                make_labels(volume, preparation=preparation, size=None, **options),
            )
        )
    together = labelled_images(scans)
    images, inside, labels = together.images, together.inside, together.labels
    size, count = ((9, 8), 8 + 10) if dimensions == 2 else ((9, 8, 5), 4)
    assert images.shape == (count, 1, *size)
    assert labels is not None and inside.shape == labels.shape == (count, *size)
    assert torch.equal((images[:, 0] * 6).round().long() + inside, labels)  # 1 to 7, and 0 for padding
    sizes = {tuple(mask.nonzero().amax(0) - mask.nonzero().amin(0) + 1) for mask in inside}
    assert {tuple(map(int, found)) for found in sizes} == {(6, 8, 4)[:dimensions], (9, 7, 5)[:dimensions]}
    for mask in inside:
        low, high = mask.nonzero().amin(0), mask.nonzero().amax(0)
        assert ((low - (torch.tensor(size) - 1 - high)).abs() <= 1).all()


def _rare(shape: tuple[int, ...]) -> Images:
    """Six images, of which one has a single pixel of foreground."""
    labels = torch.zeros(6, *shape, dtype=torch.int64)
    labels[4, *(3 for _ in shape)] = 2
    return Images(torch.zeros(6, 1, *shape), torch.ones(6, *shape, dtype=torch.bool), labels)


@pytest.mark.parametrize("shape", [(40, 56), (24, 20, 40)])
def test_a_share_of_a_batch_shows_foreground_and_the_rest_is_as_without_it(shape: tuple[int, ...]) -> None:
    images, preparation = _rare(shape), Preparation(dimensions=len(shape), spacing_mm=1.0, image_size=16)
    plain = FinetuneConfig(tasks=("task.yaml",), batch_size=8)
    config = plain.model_copy(update={"foreground_share": 0.5})
    without, _ = draw_images(plain, ("key",), 6)
    chosen, generators = draw_images(config, ("key",), 6)
    num_shown = prefer_foreground(chosen, images, ("key",), config)
    assert num_shown == 4 and chosen[:4].tolist() == [4] * 4 and chosen[4:].tolist() == without[4:].tolist()
    _, _, labels = cut_windows(images, chosen, generators, preparation, num_shown=num_shown)
    assert labels is not None
    # Windows have twice the edge; their middle, which the network sees, shows the pixel.
    middle = labels[(slice(None), *(slice(8, 24) for _ in shape))]
    assert middle[:4].flatten(1).amax(1).tolist() == [2] * 4
    assert prefer_foreground(without, images, ("key",), plain) == 0


def test_images_without_any_foreground_are_drawn_as_they_are() -> None:
    images = _rare((32, 32))
    assert images.labels is not None
    images.labels.zero_()
    config = FinetuneConfig(tasks=("task.yaml",), foreground_share=0.5)
    chosen = np.arange(6)
    assert prefer_foreground(chosen, images, ("key",), config) == 0 and chosen.tolist() == list(range(6))
