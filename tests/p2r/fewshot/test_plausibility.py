"""Rules of plausible organs from labelled frames: place, one piece, size; and their violations."""

import numpy as np
import pytest
import torch
from torch import Tensor

from p2r.data.preprocess import Frames, Planes
from p2r.fewshot.plausibility import Plausibility, frames_of_scans, learn_plausibility, plausible

FRAME = [slice(0, 3)]
SIZES = [(24, 20), (24, 20, 12)]


def block(size: tuple[int, ...], start: int, edge: int, *, images: int = 3) -> Tensor:
    """Return a frame with adjacent blocks of classes 1 and 2 along the first axis, in every image."""
    labels = torch.zeros(images, *size, dtype=torch.int64)
    others = (slice(6, 6 + edge),) * (len(size) - 1)
    labels[(slice(None), slice(start, start + edge), *others)] = 1
    labels[(slice(None), slice(start + edge, start + 2 * edge), *others)] = 2
    return labels


def rules(labels: Tensor, frames: list[slice], *, factor: float = 1.5, margin: float = 3) -> Plausibility:
    return learn_plausibility(labels, frames, num_classes=3, size_factor=factor, margin_pixels=margin)


@pytest.mark.parametrize("size", SIZES)
def test_the_labelled_frames_themselves_are_plausible(size: tuple[int, ...]) -> None:
    labels = block(size, 6, 4)
    frames = FRAME if len(size) == 2 else [slice(index, index + 1) for index in range(3)]
    kept, verdicts = plausible(labels, frames, rules(labels, frames))
    assert kept.all() and verdicts == [True] * len(frames)


@pytest.mark.parametrize("size", SIZES)
def test_foreground_far_from_labelled_positions_does_not_count(
    size: tuple[int, ...],
) -> None:
    labels = block(size, 6, 4)
    learnt = rules(labels, FRAME)
    found = labels.clone()
    found[(slice(None), slice(20, 23), *(slice(6, 9),) * (len(size) - 1))] = 1
    kept, verdicts = plausible(found, FRAME, learnt)
    assert verdicts == [True]
    assert torch.equal(kept, found == labels)


def test_only_the_largest_part_counts_if_labelled_organs_are_in_one_piece() -> None:
    labels = block((24, 20), 4, 4)
    found = labels.clone()
    found[1, 14:16, 6:9] = 2
    kept, _ = plausible(found, FRAME, rules(labels, FRAME, factor=3, margin=9))
    assert torch.equal(kept, found == labels)
    scattered = labels.clone()
    scattered[:, 14:18, 14:18] = 2
    learnt = rules(scattered, FRAME, factor=3, margin=9)
    assert rules(labels, FRAME).is_one_piece and not learnt.is_one_piece
    assert plausible(found, FRAME, learnt)[0].all()


@pytest.mark.parametrize(
    ("edge", "kept_classes", "is_kept"),
    [(4, {0, 1, 2}, True), (5, {0}, True), (3, set(), False)],
)
def test_too_large_classes_and_frames_with_too_small_classes_do_not_count(
    edge: int, kept_classes: set[int], is_kept: bool
) -> None:
    learnt = rules(block((24, 20), 6, 4), FRAME, factor=1.5)  # 16 pixels: between 10.7 and 24
    found = block((24, 20), 6, edge)
    kept, verdicts = plausible(found, FRAME, learnt)
    assert verdicts == [is_kept] and set(found[kept].unique().tolist()) == kept_classes


def test_a_class_absent_in_a_labelled_frame_may_be_absent() -> None:
    labels = torch.cat([block((24, 20), 6, 4), block((24, 20), 6, 4)])
    labels[3:][labels[3:] == 2] = 0
    learnt = rules(labels, [slice(0, 3), slice(3, 6)])
    assert learnt.smallest[1] == 0 < learnt.smallest[0]


def test_the_place_of_organs_is_learnt_from_the_centre_of_the_images() -> None:
    learnt = rules(block((24, 20), 6, 4), FRAME, margin=2.5)
    assert learnt.low == (6 - 11.5 - 2.5, 6 - 9.5 - 2.5) and learnt.high == (13 - 11.5 + 2.5, 9 - 9.5 + 2.5)


def test_frames_are_in_the_order_of_the_images() -> None:
    planes = Planes(torch.zeros(6, 1, 4, 4), torch.ones(6, 4, 4).bool(), 2, 0.0, 1.0, (4, 4), (1.0, 1.0), num_frames=2)
    volumes = Frames(torch.zeros(2, 1, 4, 4, 4), torch.ones(2, 4, 4, 4).bool(), 0.0, 1.0, (4, 4, 4), (1.0, 1.0, 1.0))
    assert frames_of_scans([planes, planes]) == [slice(start, start + 3) for start in (0, 3, 6, 9)]
    assert frames_of_scans([volumes, volumes]) == [slice(index, index + 1) for index in range(4)]
    assert np.all([frame.stop <= 12 for frame in frames_of_scans([planes, planes])])
