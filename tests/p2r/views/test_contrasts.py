"""Views across contrasts: which contrasts a view shows, appearance for each of them, and validity in every scan."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from p2r.config import ViewsConfig
from p2r.views import Draws, apply_warp, make_views
from p2r.views.contrasts import choose_contrasts, number_pairs, pair_names

PRESENT = np.array([[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=np.bool_)


def draws(num: int, *, seed: int = 0) -> Draws:
    return Draws.of_samples(seed, epochs=np.zeros(num, np.int64), positions=np.arange(num))


def views_of(**fields: Any) -> ViewsConfig:
    return ViewsConfig.model_validate(fields)


PLAIN: dict[str, Any] = {
    "geometry": {"rotation_deg": 0, "scale": (1, 1), "shear_deg": 0, "translation_mm": 0, "flip_probability": 0, "elastic_mm": 0},
    "intensity": {
        "gamma_probability": 0, "contrast_probability": 0, "inversion_probability": 0, "bias_field_probability": 0,
        "blur_probability": 0, "noise_probability": 0,
    },
}  # fmt: skip


def of_images(num: int) -> dict[str, Any]:
    return {"spacing_mm": 1.5, "seed": 5, "epochs": np.zeros(num, np.int64), "positions": np.arange(num)}


def test_both_views_show_all_contrasts_that_an_image_has() -> None:
    a, b = choose_contrasts(PRESENT, draws(4), config=views_of())
    np.testing.assert_array_equal(a, PRESENT)
    np.testing.assert_array_equal(b, PRESENT)


def test_dropped_contrasts_are_missing_in_both_views_and_one_always_stays() -> None:
    present = np.repeat(PRESENT, 500, axis=0)
    a, b = choose_contrasts(present, draws(2000), config=views_of(contrast_dropout=0.4))
    np.testing.assert_array_equal(a, b)
    assert not (a & ~present).any() and (a.any(1) == present.any(1)).all()
    kept = a[:500].mean(0)  # of three contrasts: 0.6, and a third of 0.4 ** 3 where all would be dropped
    np.testing.assert_allclose(kept, 0.6 + 0.4**3 / 3, atol=0.06)


def test_across_contrasts_each_view_shows_another_one_if_there_are_several() -> None:
    present = np.repeat(PRESENT, 600, axis=0)
    a, b = choose_contrasts(present, draws(2400), config=views_of(contrasts="cross"))
    assert (a.sum(1) == present.any(1)).all() and (b.sum(1) == present.any(1)).all()
    assert not (a & ~present).any() and not (b & ~present).any()
    several = present.sum(1) > 1
    assert not (a & b)[several].any() and (a == b)[~several].all()
    counts = np.bincount(a[:600].argmax(1) * 3 + b[:600].argmax(1), minlength=9)
    assert (counts.reshape(3, 3)[~np.eye(3, dtype=bool)] > 60).all()  # all six ordered pairs


def test_mixed_views_are_the_same_or_across_in_halves() -> None:
    present = np.ones((1000, 3), dtype=np.bool_)
    a, b = choose_contrasts(present, draws(1000), config=views_of(contrasts="mixed"))
    is_same = (a & b).all(1)
    assert 400 < is_same.sum() < 600 and ((a.sum(1) == 1) & (b.sum(1) == 1) & ~(a & b).any(1))[~is_same].all()


def test_the_choice_for_an_image_does_not_depend_on_its_batch() -> None:
    config = views_of(contrasts="mixed", contrast_dropout=0.3)
    whole = choose_contrasts(np.ones((40, 3), np.bool_), draws(40), config=config)
    some = choose_contrasts(np.ones((7, 3), np.bool_), draws(40).take(np.arange(20, 27)), config=config)
    for ours, theirs in zip(some, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[20:27])


def test_pairs_of_contrasts_are_numbered_without_order() -> None:
    names = pair_names(["flair", "t1", "t1ce"])
    assert names == ["flair-flair", "flair-t1", "flair-t1ce", "t1-t1", "t1-t1ce", "t1ce-t1ce", "several"]
    one = np.eye(3, dtype=np.bool_)
    for first in range(3):
        for second in range(3):
            (number,) = number_pairs(one[[first]], one[[second]])
            low, high = sorted((first, second))
            assert names[number] == "-".join(["flair", "t1", "t1ce"][index] for index in (low, high))
    assert number_pairs(np.ones((1, 3), np.bool_), one[[1]]).tolist() == [6]


@pytest.mark.parametrize("size", [(20, 24), (10, 12, 8)])
@pytest.mark.parametrize("contrasts", ["same", "cross", "mixed"])
def test_a_view_has_the_contrasts_that_it_shows_and_zeros_elsewhere(size: tuple[int, ...], contrasts: str) -> None:
    image = torch.rand(4, 3, *size) * 0.8 + 0.1
    image[~torch.from_numpy(PRESENT)] = 0
    inside = torch.ones(4, *size, dtype=torch.bool)
    inside[3] = False  # an image without contrasts is outside of every scan
    views = make_views(image, inside, config=views_of(contrasts=contrasts), present=PRESENT, **of_images(4))
    assert views.shown_a is not None and views.shown_b is not None
    assert views.a.flatten(2).any(2).tolist() == views.shown_a.tolist()
    assert views.b.flatten(2).any(2).tolist() == views.shown_b.tolist()
    assert views.valid[:3].flatten(1).any(1).all() and not views.valid[3].any()
    assert not views.b.masked_select(~views.valid[:, None].expand_as(views.b)).any()


def test_without_changes_a_view_is_its_contrasts_and_geometry_is_shared() -> None:
    image = torch.rand(6, 3, 32, 32)
    inside, present = torch.ones(6, 32, 32, dtype=torch.bool), np.ones((6, 3), np.bool_)
    plain = make_views(image, inside, config=views_of(**PLAIN, contrasts="cross"), present=present, **of_images(6))
    assert plain.shown_a is not None and plain.shown_b is not None
    assert torch.equal(plain.a, image * torch.from_numpy(plain.shown_a)[..., None, None])
    assert torch.equal(plain.b, image * torch.from_numpy(plain.shown_b)[..., None, None])
    moved = make_views(
        image, inside, config=views_of(intensity=PLAIN["intensity"], contrasts="cross"), present=present, **of_images(6)
    )
    expected = apply_warp(image, moved.warp) * torch.from_numpy(plain.shown_b)[..., None, None] * moved.valid[:, None]
    torch.testing.assert_close(moved.b, expected)


def test_each_contrast_has_an_appearance_of_its_own() -> None:
    image = torch.rand(2, 1, 32, 32).expand(2, 3, 32, 32)
    views = make_views(
        image, torch.ones(2, 32, 32, dtype=torch.bool), config=views_of(geometry=PLAIN["geometry"]), **of_images(2)
    )
    for view in (views.a, views.b):
        assert not torch.equal(view[:, 0], view[:, 1]) and not torch.equal(view[:, 1], view[:, 2])
    alone = make_views(
        image[1:], torch.ones(1, 32, 32, dtype=torch.bool), config=views_of(geometry=PLAIN["geometry"]),
        **{**of_images(1), "positions": np.array([1])},
    )  # fmt: skip
    assert torch.equal(alone.a[0], views.a[1]) and torch.equal(alone.b[0], views.b[1])


@pytest.mark.parametrize("contrasts", ["same", "cross"])
def test_pixels_outside_the_scan_of_a_shown_contrast_are_not_compared(contrasts: str) -> None:
    """The first contrast lacks the upper rows, the second the left columns, the third nothing."""
    image = torch.rand(12, 3, 32, 32) * 0.5 + 0.4
    inside = torch.ones(12, 32, 32, dtype=torch.bool)
    covered = torch.ones(12, 3, 32, 32, dtype=torch.bool)
    covered[:, 0, :10], covered[:, 1, :, :12] = False, False
    views = make_views(
        image, inside, config=views_of(contrasts=contrasts), present=np.ones((12, 3), np.bool_), covered=covered,
        **of_images(12),
    )  # fmt: skip
    assert views.shown_a is not None and views.shown_b is not None
    is_cut = {0: lambda row, column: row < 10, 1: lambda row, column: column < 12, 2: lambda row, column: row < 0}
    num_valid = 0
    for index in range(12):
        rows, columns = torch.nonzero(views.valid[index]).unbind(1)
        num_valid += len(rows)
        at = views.warp[index, rows, columns]
        for contrast in np.flatnonzero(views.shown_a[index] | views.shown_b[index]).tolist():
            assert not is_cut[contrast](at[:, 0], at[:, 1]).any()
        for contrast in np.flatnonzero(views.shown_a[index]).tolist():
            assert not views.a[index, contrast][~covered[index, contrast]].any()
        for contrast in np.flatnonzero(views.shown_b[index]).tolist():
            seen = views.b[index, contrast] > 0
            assert not is_cut[contrast](*views.warp[index][seen].unbind(1)).any()
    assert num_valid > 1000


def test_boxes_of_the_views_apply_to_all_contrasts() -> None:
    image, inside = torch.rand(4, 2, 32, 32) * 0.5 + 0.4, torch.ones(4, 32, 32, dtype=torch.bool)
    present: NDArray[np.bool_] = np.ones((4, 2), np.bool_)
    views = make_views(
        image,
        inside,
        config=views_of(intensity=PLAIN["intensity"], shown_fraction=(0.3, 0.4)),
        present=present,
        **of_images(4),
    )
    shown = (views.a > 0).flatten(2).float().mean(2)
    assert ((shown > 0.2) & (shown < 0.5)).all() and torch.equal(views.a[:, 0] > 0, views.a[:, 1] > 0)
    at = views.warp[views.valid].round().long()
    images = torch.arange(4).reshape(4, 1, 1).expand(4, 32, 32)[views.valid]
    assert (views.a[images, 0, at[:, 0], at[:, 1]] > 0).float().mean() > 0.9
