"""The choice of pixel pairs, and their positions."""

from typing import Any

import numpy as np
import pytest
import torch

from p2r.loss import corresponding_points
from p2r.randomness import keyed_generator

SHAPE = (3, 12, 17)  # B, H, W


def make_generators(num: int = SHAPE[0]) -> list[np.random.Generator]:
    return [keyed_generator(0, "points", image) for image in range(num)]


def drawn(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = corresponding_points(*arguments, **options)
    return pairs.a, pairs.b


@pytest.fixture
def warp() -> torch.Tensor:
    """Return positions that identify their own pixel: pixel (r, c) of image 1 points to (r / 4 + 1, c / 4 + 1)."""
    rows, cols = torch.meshgrid(torch.arange(12.0), torch.arange(17.0), indexing="ij")
    return torch.stack([torch.stack((rows, cols), -1) / 4 + image for image in range(3)])


def test_points_of_b_are_valid_pixels_and_points_of_a_follow_the_warp(warp: torch.Tensor) -> None:
    valid = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    points_a, points_b = drawn(warp, valid, num_points=40, generators=make_generators())
    assert points_a.shape == points_b.shape == (3, 40, 2)
    assert points_a.dtype == points_b.dtype == torch.float32
    for image in range(3):
        for a, b in zip(points_a[image], points_b[image], strict=True):
            row, col = int(b[0]), int(b[1])
            assert valid[image, row, col]
            assert torch.equal(a, warp[image, row, col])


def test_positions_on_the_border_stay_and_those_beyond_come_back_to_it() -> None:
    rows, cols = torch.meshgrid(torch.arange(12.0), torch.arange(17.0), indexing="ij")
    identity, valid = torch.stack((rows, cols), -1)[None], torch.ones(1, 12, 17, dtype=torch.bool)
    points_a, points_b = drawn(identity, valid, num_points=12 * 17, generators=make_generators(1))
    assert torch.equal(points_a, points_b)
    assert points_a.amax((0, 1)).tolist() == [11, 16]
    beyond, _ = drawn(3 * identity - 10, valid, num_points=12 * 17, generators=make_generators(1))
    assert (beyond.amin((0, 1)).tolist(), beyond.amax((0, 1)).tolist()) == ([0, 0], [11, 16])


def test_the_only_valid_pixel_is_drawn_every_time_and_counts(warp: torch.Tensor) -> None:
    valid = torch.zeros(SHAPE, dtype=torch.bool)
    valid[:, 7, 3] = True
    pairs = corresponding_points(warp, valid, num_points=5, generators=make_generators())
    assert {tuple(point) for point in pairs.b.flatten(0, 1).tolist()} == {(7.0, 3.0)}
    assert pairs.weight.tolist() == [[1.0] * 5] * 3


def test_a_foreground_without_a_share_of_its_own_changes_nothing(warp: torch.Tensor) -> None:
    valid, foreground = torch.ones(SHAPE, dtype=torch.bool), torch.zeros(SHAPE, dtype=torch.bool)
    foreground[:, 5, 5] = True
    plain, with_foreground = (
        drawn(warp, valid, num_points=20, generators=make_generators(), foreground=given)
        for given in (None, foreground)
    )
    assert torch.equal(plain[1], with_foreground[1])


def test_no_pixel_is_drawn_twice_if_there_are_enough(warp: torch.Tensor) -> None:
    valid = torch.zeros(SHAPE, dtype=torch.bool)
    valid[:, 2:6, 3:13] = True  # 40 pixels
    _, points_b = drawn(warp, valid, num_points=40, generators=make_generators())
    for image in range(3):
        assert len({tuple(point) for point in points_b[image].tolist()}) == 40


def test_too_few_valid_pixels_are_drawn_with_replacement(warp: torch.Tensor) -> None:
    valid = torch.zeros(SHAPE, dtype=torch.bool)
    valid[:, 4, 5:7] = True
    _, points_b = drawn(warp, valid, num_points=30, generators=make_generators())
    assert {tuple(point) for point in points_b.flatten(0, 1).tolist()} == {(4.0, 5.0), (4.0, 6.0)}


def test_an_image_without_valid_pixels_gives_points_within_it_and_leaves_the_others_alone(warp: torch.Tensor) -> None:
    valid = torch.ones(SHAPE, dtype=torch.bool)
    before = drawn(warp, valid, num_points=20, generators=make_generators())
    valid[1] = False
    warp = warp.clone()
    warp[1] += 100
    points_a, points_b = drawn(warp, valid, num_points=20, generators=make_generators())
    assert points_a[1].min() >= 0
    assert (points_a[1] <= torch.tensor([11.0, 16.0])).all()
    for image in (0, 2):
        assert torch.equal(points_a[image], before[0][image])
        assert torch.equal(points_b[image], before[1][image])


def test_an_image_gets_the_same_points_in_any_batch(warp: torch.Tensor) -> None:
    valid = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.7
    together = drawn(warp, valid, num_points=25, generators=make_generators())
    alone = drawn(warp[2:], valid[2:], num_points=25, generators=make_generators()[2:])
    assert torch.equal(together[0][2:], alone[0])
    assert torch.equal(together[1][2:], alone[1])


def test_every_valid_pixel_is_drawn_equally_often() -> None:
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[0, :5, :4] = True  # 20 pixels
    warp = torch.zeros(1, 8, 8, 2)
    counts = np.zeros((8, 8))
    for repeat in range(2000):
        _, points_b = drawn(warp, valid, num_points=5, generators=[keyed_generator(3, repeat)])
        for row, col in points_b[0].long().tolist():
            counts[row, col] += 1
    expected = 2000 * 5 / 20
    assert counts[:5, :4].sum() == 2000 * 5
    assert np.abs(counts[:5, :4] - expected).max() < 5 * np.sqrt(expected * 0.75)


def test_an_image_without_valid_pixels_weighs_nothing(warp: torch.Tensor) -> None:
    valid = torch.ones(SHAPE, dtype=torch.bool)
    valid[1] = False
    pairs = corresponding_points(warp, valid, num_points=7, generators=make_generators())
    assert pairs.weight.tolist() == [[1.0] * 7, [0.0] * 7, [1.0] * 7]


def test_points_of_volumes_follow_the_warp() -> None:
    valid = torch.zeros(2, 4, 5, 6, dtype=torch.bool)
    valid[:, 1:3, 2:5, 1:6] = True
    warp = torch.rand(2, 4, 5, 6, 3, generator=torch.Generator().manual_seed(0))
    pairs = corresponding_points(warp, valid, num_points=30, generators=make_generators(2))
    assert pairs.a.shape == pairs.b.shape == (2, 30, 3)
    for image in range(2):
        places = pairs.b[image].long().tolist()
        assert sorted(places) == [[z, y, x] for z in (1, 2) for y in (2, 3, 4) for x in (1, 2, 3, 4, 5)]
        for (z, y, x), a in zip(places, pairs.a[image], strict=True):
            assert torch.equal(a, warp[image, z, y, x])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 8), (0.25, 12), (0.5, 20), (1.0, 40)])
def test_a_share_of_the_points_is_drawn_in_the_foreground(share: float, expected: int, warp: torch.Tensor) -> None:
    valid = torch.ones(SHAPE, dtype=torch.bool)
    foreground = torch.zeros(SHAPE, dtype=torch.bool)
    foreground[:, :, :4] = True  # 48 of 204 pixels
    pairs = corresponding_points(
        warp, valid, num_points=40, generators=make_generators(), foreground=foreground, foreground_share=share
    )
    for points in pairs.b:
        in_foreground = int((points[:, 1] < 4).sum())
        assert in_foreground >= share * 40
        assert abs(in_foreground - (share * 40 + (40 - share * 40) * 48 / 204)) < 8
        assert len({tuple(point) for point in points.tolist()}) == 40


def test_a_foreground_too_small_for_its_share_is_drawn_whole(warp: torch.Tensor) -> None:
    foreground = torch.zeros(SHAPE, dtype=torch.bool)
    foreground[:, 3, 3:6] = True
    valid = torch.ones(SHAPE, dtype=torch.bool)
    valid[:, 3, 5] = False
    pairs = corresponding_points(
        warp, valid, num_points=40, generators=make_generators(), foreground=foreground, foreground_share=0.5
    )
    for points in pairs.b:
        drawn_points = {tuple(point) for point in points.tolist()}
        assert {(3.0, 3.0), (3.0, 4.0)} <= drawn_points
        assert (3.0, 5.0) not in drawn_points
        assert len(drawn_points) == 40


def test_shares_out_of_range_and_foregrounds_of_another_shape_are_refused(warp: torch.Tensor) -> None:
    valid = torch.ones(SHAPE, dtype=torch.bool)
    with pytest.raises(ValueError, match="foreground_share"):
        corresponding_points(warp, valid, num_points=4, generators=make_generators(), foreground_share=1.5)
    with pytest.raises(ValueError, match="foreground of valid's shape"):
        corresponding_points(warp, valid, num_points=4, generators=make_generators(), foreground=valid[:, :3])


def test_shapes_that_do_not_fit_are_refused(warp: torch.Tensor) -> None:
    valid = torch.ones(SHAPE, dtype=torch.bool)
    with pytest.raises(ValueError, match="warp"):
        corresponding_points(warp[:, :-1], valid, num_points=4, generators=make_generators())
    with pytest.raises(ValueError, match="generators"):
        corresponding_points(warp, valid, num_points=4, generators=make_generators(2))
