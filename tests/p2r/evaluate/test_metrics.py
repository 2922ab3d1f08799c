"""Metrics against counts and distances derived by hand, and the rules for absent classes."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from p2r.evaluate.metrics import (
    Score,
    dice_by_thirds,
    largest_components,
    score_volume,
    soft_dice_with_background,
    summarise,
)

CLASSES = {1: "RV", 2: "LV"}


def labels(shape: tuple[int, int, int], **boxes: tuple[slice, slice, slice]) -> NDArray[np.int16]:
    array = np.zeros(shape, np.int16)
    for name, box in boxes.items():
        array[box] = {"RV": 1, "LV": 2}[name]
    return array


def score(prediction: NDArray[np.int16], reference: NDArray[np.int16], **changes: object) -> dict[str, Score]:
    settings: dict[str, object] = {
        "classes": CLASSES,
        "spacing_mm": (1.0, 1.0, 1.0),
        "nsd_tolerance_mm": 1.0,
        **changes,
    }
    return score_volume(prediction, reference, **settings)  # type: ignore[arg-type]


def row_of(*voxels: int, along: int = 0, length: int = 8) -> NDArray[np.int16]:
    shape = [3, 3, 3]
    shape[along] = length
    array = np.zeros(shape, np.int16)
    for voxel in voxels:
        position = [1, 1, 1]
        position[along] = voxel
        array[tuple(position)] = 1
    return array


def test_dice_is_twice_the_overlap_over_both_sizes() -> None:
    # 4 voxels against 3, of which 2 are shared: 2 * 2 / 7.
    found = score(row_of(1, 2, 3, 4), row_of(3, 4, 5))["RV"]
    assert found.dice == pytest.approx(4 / 7)
    assert found.absent == "none"


def test_equal_masks_score_one_and_no_distance() -> None:
    mask = labels((6, 6, 6), RV=(slice(1, 5), slice(1, 5), slice(1, 5)))
    assert score(mask, mask)["RV"] == Score(1.0, 0.0, 1.0, "none")


def test_one_figure_that_is_not_a_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2r.evaluate.metrics.compute_surface_dice", lambda *given, **named: torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match=r"MONAI gave \[.*nan\]"):
        score(row_of(1, 2), row_of(2, 3))


@pytest.mark.parametrize(("axis", "spacing_mm"), [(0, 1.5), (1, 2.0), (2, 10.0)])
def test_hd95_of_two_single_voxels_is_their_distance_in_mm(axis: int, spacing_mm: float) -> None:
    found = score(row_of(2, along=axis), row_of(5, along=axis), spacing_mm=(1.5, 2.0, 10.0))["RV"]
    assert found.hd95_mm == pytest.approx(3 * spacing_mm)
    assert (found.dice, found.nsd) == (0.0, 0.0)


def test_hd95_interpolates_the_sorted_distances_and_takes_the_worse_direction() -> None:
    # Voxels 1..4 to voxel 1: 0, 2, 4, 6 mm. The 95th percentile is at index 0.95 * 3 = 2.85: 4 + 0.85 * 2.
    # The other way the one distance is 0.
    found = score(row_of(1, 2, 3, 4), row_of(1), spacing_mm=(2.0, 1.0, 1.0))["RV"]
    assert found.hd95_mm == pytest.approx(5.7)


def test_nsd_counts_border_voxels_within_the_tolerance_in_mm() -> None:
    # Distances 0, 2, 4, 6 mm one way, 0 the other: within 2 mm are 2 of 4 and 1 of 1.
    prediction, reference = row_of(1, 2, 3, 4), row_of(1)
    for tolerance, expected in ((1.9, 2 / 5), (2.0, 3 / 5), (6.0, 1.0)):
        found = score(prediction, reference, spacing_mm=(2.0, 1.0, 1.0), nsd_tolerance_mm=tolerance)["RV"]
        assert found.nsd == pytest.approx(expected)


def test_the_interior_of_an_organ_is_no_border() -> None:
    # A 5 x 5 x 5 cube against the same cube with its centre removed. The hole adds 6 border voxels (the centre's neighbours),
    # 1 voxel from the nearest of the outer 98. Of 98 + 98 + 6 voxels, all are within 1 and 196 within 0.5.
    cube = labels((7, 7, 7), RV=(slice(1, 6), slice(1, 6), slice(1, 6)))
    hollow = cube.copy()
    hollow[3, 3, 3] = 0
    assert score(hollow, cube)["RV"].nsd == pytest.approx(1.0)
    assert score(hollow, cube, nsd_tolerance_mm=0.5)["RV"].nsd == pytest.approx(196 / 202)
    assert score(hollow, cube)["RV"].dice == pytest.approx(2 * 124 / 249)


def test_an_organ_at_the_edge_of_the_grid_has_its_border_there() -> None:
    whole, part = np.ones((4, 4, 4), np.int16), np.ones((4, 4, 4), np.int16)
    part[3] = 0
    # The border of the whole has 64 - 8 = 56 voxels; the 16 of the last layer are 1 from the part's border. That border has
    # 48 - 4 = 44 voxels; the inner 2 x 2 of layer 2 are 1 from the whole's border, all others are on it.
    assert score(part, whole, nsd_tolerance_mm=0.5)["RV"].nsd == pytest.approx((40 + 40) / 100)


def test_a_class_absent_in_all_patients_is_left_out_and_counted() -> None:
    mask = row_of(1, 2)
    found = score(mask, mask)
    assert found["LV"] == Score(None, None, None, "both")
    summary = summarise([("p1", found)])
    assert summary.dice == {"RV": 1.0, "LV": None}
    assert (summary.dice_mean, summary.hd95_mm, summary.nsd) == (1.0, 0.0, 1.0)
    assert summary.absent == {
        "RV": {"both": 0, "prediction": 0, "reference": 0},
        "LV": {"both": 1, "prediction": 0, "reference": 0},
    }


@pytest.mark.parametrize("missing", ["prediction", "reference"])
def test_a_class_absent_on_one_side_scores_zero_and_the_grids_diagonal(missing: str) -> None:
    present, empty = row_of(1, 2), np.zeros((8, 3, 3), np.int16)
    pair = (empty, present) if missing == "prediction" else (present, empty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(*pair, spacing_mm=(1.0, 2.0, 10.0))["RV"]
    assert found == Score(0.0, math.sqrt(8**2 + 6**2 + 30**2), 0.0, missing)  # type: ignore[arg-type]


def test_finding_nothing_in_one_patient_lowers_every_mean() -> None:
    perfect, mask = row_of(1, 2), row_of(1, 2)
    good, nothing = score(perfect, mask), score(np.zeros_like(mask), mask)
    summary = summarise([("p1", good), ("p2", nothing)])
    assert summary.dice_mean == pytest.approx(0.5)
    assert summary.nsd == pytest.approx(0.5)
    assert summary.hd95_mm == pytest.approx(math.sqrt(8**2 + 3**2 + 3**2) / 2)
    assert summary.absent["RV"]["prediction"] == 1


def test_dice_alone_is_the_same_dice() -> None:
    rng = np.random.default_rng(0)
    prediction, reference = (rng.integers(0, 2, (6, 6, 4)).astype(np.int16) for _ in range(2))
    whole, alone = (score(prediction, reference, nsd_tolerance_mm=tolerance) for tolerance in (1.0, None))
    assert alone == {name: Score(whole[name].dice, None, None, whole[name].absent) for name in whole}
    assert alone["RV"].dice is not None
    nothing = score(np.zeros_like(reference), reference, nsd_tolerance_mm=None)
    assert nothing["RV"] == Score(0.0, None, None, absent="prediction")
    assert summarise([("sub-1", alone)]).hd95_mm is None


def test_frames_are_averaged_within_a_patient_before_patients_are() -> None:
    def of(dice: float) -> dict[str, Score]:
        return {"RV": Score(dice, 10 * dice, dice, "none")}

    summary = summarise([("p1", of(0.2)), ("p2", of(0.9)), ("p1", of(0.4))])
    assert summary.dice["RV"] == pytest.approx((0.3 + 0.9) / 2)
    assert summary.hd95_mm_by_class["RV"] == pytest.approx((3 + 9) / 2)
    assert summary.dice_by_subject == {"p1": pytest.approx(0.3), "p2": pytest.approx(0.9)}
    assert (summary.num_test_subjects, summary.num_scans) == (2, 3)


def test_the_row_holds_plain_values_only() -> None:
    row = summarise([("p1", score(row_of(1), row_of(2)))]).to_row()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert {"dice", "dice_mean", "hd95_mm", "nsd", "num_test_subjects", "absent"} <= set(row)


def test_figures_do_not_depend_on_where_in_the_grid_the_organs_lie() -> None:
    generator = np.random.default_rng(0)
    small = generator.integers(0, 3, size=(2, 5, 6, 4)).astype(np.int16)
    padded = np.pad(small, ((0, 0), (3, 2), (1, 4), (2, 0)))
    assert score(small[0], small[1], spacing_mm=(1, 2, 3)) == score(padded[0], padded[1], spacing_mm=(1, 2, 3))


def test_wrong_grids_values_and_spacings_are_refused() -> None:
    mask = row_of(1)
    with pytest.raises(ValueError, match="the same 3D grid"):
        score(mask, mask[:-1])
    with pytest.raises(ValueError, match=r"prediction holds labels \[7\]"):
        score(mask * 7, mask)
    with pytest.raises(ValueError, match="three positive numbers"):
        score(mask, mask, spacing_mm=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="the same 3D grid"):
        dice_by_thirds(mask, mask[:-1], classes=CLASSES, axis=0)
    with pytest.raises(ValueError, match="no scores"):
        summarise([])


def test_scans_scored_on_different_classes_are_not_averaged() -> None:
    one, other = ({name: Score(1.0, 0.0, 1.0, "none")} for name in ("RV", "LV"))
    with pytest.raises(ValueError, match=r"the same classes \['RV'\]"):
        summarise([("sub-1", one), ("sub-2", one), ("sub-2", other)])


# Planted truth: phantoms of two organs whose figures are known without measuring.


def ball(
    shape: tuple[int, ...], spacing_mm: tuple[float, float, float], centre_mm: float, radius_mm: float
) -> NDArray[np.bool_]:
    """Return the voxels with their centre in a ball about `centre_mm` on the first axis and the middle of the others."""
    axes = [(np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    middles = (centre_mm, shape[1] * spacing_mm[1] / 2, shape[2] * spacing_mm[2] / 2)
    x, y, z = np.meshgrid(*[axis - middle for axis, middle in zip(axes, middles, strict=True)], indexing="ij")
    inside: NDArray[np.bool_] = x**2 + y**2 + z**2 <= radius_mm**2
    return inside


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (1.0, 1.25, 2.0)])
def test_balls_have_the_dice_hd95_and_nsd_of_geometry(spacing_mm: tuple[float, float, float]) -> None:
    # RV: two balls of radius R whose centres are d apart. They share a lens of volume pi (4R + d) (2R - d)^2 / 12. The
    # distance between a point of one sphere and the other sphere is | |R u - d| - R |. It is spread evenly between 0 and d,
    # because (R - t)^2 <= R^2 + d^2 - 2 R d cos <= (R + t)^2 holds for a range 2 t / d of cos. So the 95th percentile is
    # 0.95 d, and a fraction t / d is within a tolerance t.
    # LV: concentric balls, r < R: Dice 2 r^3 / (r^3 + R^3), every distance R - r.
    shape = tuple(round(edge / mm) for edge, mm in zip((96.0, 40.0, 40.0), spacing_mm, strict=True))
    radius, apart, small = 16.0, 8.0, 12.0
    grid = (shape, spacing_mm)
    prediction, reference = np.zeros(shape, np.int16), np.zeros(shape, np.int16)
    prediction[ball(*grid, 20.0, radius)] = reference[ball(*grid, 20.0 + apart, radius)] = 1
    prediction[ball(*grid, 72.0, small)] = reference[ball(*grid, 72.0, radius)] = 2
    found = score(prediction, reference, spacing_mm=spacing_mm, nsd_tolerance_mm=6.0)
    lens, whole = math.pi * (4 * radius + apart) * (2 * radius - apart) ** 2 / 12, 4 / 3 * math.pi * radius**3
    assert found["RV"].dice == pytest.approx(lens / whole, abs=0.01)
    assert found["LV"].dice == pytest.approx(2 * small**3 / (small**3 + radius**3), abs=0.01)
    assert found["RV"].hd95_mm == pytest.approx(0.95 * apart, abs=0.5)
    assert found["LV"].hd95_mm == pytest.approx(radius - small, abs=max(spacing_mm) / 2)
    # NSD counts border voxels, not area: long voxels make more of them where the border runs along the short edges.
    assert found["RV"].nsd == pytest.approx(6 / 8, abs=0.05 if len(set(spacing_mm)) == 1 else 0.1)
    assert found["LV"].nsd == 1.0
    assert score(prediction, reference, spacing_mm=spacing_mm, nsd_tolerance_mm=2.0)["LV"].nsd == pytest.approx(
        0, abs=0.03
    )


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (1.5, 1.5, 8.0), (0.7, 2.0, 3.0)])
@pytest.mark.parametrize("grown", [(1, 1, 1), (2, 1, 0), (0, 3, 1)])
def test_nested_boxes_have_exactly_the_figures_of_their_distance(
    grown: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    # A voxel outside of a box is as far from it as the norm of its excess over the box's sides. One inside of a box as
    # far from its border as the smallest depth below a side.
    inner = (8, 7, 5)
    outer = tuple(n + 2 * g for n, g in zip(inner, grown, strict=True))
    shape = tuple(n + 4 for n in outer)
    boxes = [tuple(slice(2 + margin, 2 + margin + n) for n, margin in zip(size, margins, strict=True))
             for size, margins in ((inner, grown), (outer, (0, 0, 0)))]  # fmt: skip
    inside, around = (labels(shape, RV=box) == 1 for box in boxes)  # type: ignore[arg-type]

    def distances(of: str) -> NDArray[np.float64]:
        found = []
        for voxel in np.argwhere(inside if of == "inner" else around) - 2:
            depths = [min(i, n - 1 - i) for i, n in zip(voxel, outer, strict=True)]
            excesses = [max(g - i, i - (g + n - 1), 0) for i, n, g in zip(voxel, inner, grown, strict=True)]
            if of == "inner" and any(i in (g, g + n - 1) for i, n, g in zip(voxel, inner, grown, strict=True)):
                found.append(min(depth * mm for depth, mm in zip(depths, spacing_mm, strict=True)))
            elif of == "outer" and min(depths) == 0:
                # On the outer border; without excess there, it is a border of the inner box, too.
                found.append(math.hypot(*(excess * mm for excess, mm in zip(excesses, spacing_mm, strict=True))))
        return np.array(found)

    ways = [distances("inner"), distances("outer")]
    tolerance = 1.6
    found = score(inside.astype(np.int16), around.astype(np.int16), spacing_mm=spacing_mm, nsd_tolerance_mm=tolerance)
    sizes = math.prod(inner), math.prod(outer)
    assert found["RV"].dice == pytest.approx(2 * sizes[0] / sum(sizes))
    assert found["RV"].hd95_mm == pytest.approx(max(np.percentile(way, 95) for way in ways), abs=1e-4)
    within = [int((way <= tolerance).sum()) for way in ways]
    assert found["RV"].nsd == pytest.approx(sum(within) / sum(map(len, ways)), abs=1e-6)


def test_a_box_grown_by_one_voxel_has_the_counted_figures() -> None:
    # 10^3 inside of 12^3 of 2 mm: 600 voxels of the outer border are 1 voxel away, 120 along edges root 2, 8 corners root
    # 3; all 488 of the inner border 1. The 95th percentile of the 728 is an edge's.
    inner = labels((14, 14, 14), LV=(slice(2, 12),) * 3)
    outer = labels((14, 14, 14), LV=(slice(1, 13),) * 3)
    found = score(inner, outer, spacing_mm=(2.0, 2.0, 2.0), nsd_tolerance_mm=2.0)["LV"]
    assert found.dice == pytest.approx(2 * 1000 / (1000 + 1728))
    assert found.hd95_mm == pytest.approx(2 * math.sqrt(2))
    assert found.nsd == pytest.approx((488 + 600) / (488 + 728))


def test_a_phantom_without_one_organ_scores_by_the_rules_and_the_other_by_geometry() -> None:
    shape, spacing_mm = (20, 20, 6), (1.5, 1.5, 8.0)
    diagonal_mm = math.sqrt(30**2 + 30**2 + 48**2)
    left, shifted = (slice(2, 8), slice(2, 8), slice(1, 5)), (slice(2, 8), slice(2, 8), slice(2, 6))
    right = (slice(12, 18), slice(2, 8), slice(1, 5))
    found = {
        "both": score(labels(shape, RV=left), labels(shape, RV=shifted), spacing_mm=spacing_mm),
        "prediction": score(labels(shape, RV=left), labels(shape, RV=shifted, LV=right), spacing_mm=spacing_mm),
        "reference": score(labels(shape, RV=left, LV=right), labels(shape, RV=shifted), spacing_mm=spacing_mm),
        "none": score(labels(shape, RV=left, LV=right), labels(shape, RV=shifted, LV=right), spacing_mm=spacing_mm),
    }
    for absent, scores in found.items():
        assert scores["RV"].dice == pytest.approx(3 / 4)  # four slices, three of them shared
        # Border: 36 + 20 + 20 + 36 voxels. The first 36 are a slice of 8 mm away. The inner voxels of the last slice are at
        # most 3 mm from the other border, within the slice.
        assert scores["RV"].hd95_mm == pytest.approx(8.0)
        expected = {
            "both": Score(None, None, None, "both"),
            "prediction": Score(0.0, pytest.approx(diagonal_mm), 0.0, "prediction"),  # type: ignore[arg-type]
            "reference": Score(0.0, pytest.approx(diagonal_mm), 0.0, "reference"),  # type: ignore[arg-type]
            "none": Score(1.0, 0.0, 1.0, "none"),
        }
        assert scores["LV"] == expected[absent]
    summary = summarise(found.items())
    assert summary.dice["LV"] == pytest.approx(1 / 3)  # of three: the patient without the class is left out
    assert summary.dice_mean == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert summary.absent["LV"] == {"both": 1, "prediction": 1, "reference": 1}
    assert summary.dice_by_subject == {
        "both": pytest.approx(3 / 4),
        "prediction": pytest.approx(3 / 8),
        "reference": pytest.approx(3 / 8),
        "none": pytest.approx(7 / 8),
    }


def test_thirds_tell_where_along_the_slices_a_model_fails() -> None:
    # RV in slices 2 to 8 (thirds 2-3, 4-6, 7-8), missed in 7 and 8, and half found in 4 to 6. LV in slice 5 only.
    shape = (6, 4, 10)
    reference = labels(shape, RV=(slice(0, 2), slice(0, 2), slice(2, 9)), LV=(slice(4, 6), slice(0, 2), slice(5, 6)))
    prediction = labels(shape, RV=(slice(0, 2), slice(0, 2), slice(2, 7)), LV=(slice(4, 6), slice(0, 2), slice(5, 6)))
    prediction[0, :, 4:7] = 0
    prediction[4, 0, 3] = 2
    found = dice_by_thirds(prediction, reference, classes=CLASSES, axis=2)
    assert found == {"RV": [1.0, pytest.approx(2 * 6 / (6 + 12)), 0.0], "LV": [0.0, 1.0, None]}


@pytest.mark.parametrize(
    ("num_slices", "expected"), [(1, (0, 1, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (1, 2, 1)), (5, (2, 1, 2))]
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thirds_are_alike_from_both_ends(num_slices: int, expected: tuple[int, int, int], axis: int) -> None:
    reference = np.moveaxis(np.zeros((9, 3, 3), np.int16), 0, axis)
    np.moveaxis(reference, axis, 0)[2 : 2 + num_slices, 1, 1] = 1
    prediction = np.zeros_like(reference)
    found = dice_by_thirds(prediction, reference, classes=CLASSES, axis=axis)["RV"]
    assert found == [0.0 if count else None for count in expected]
    # Slices that the prediction has right, one by one, show which third they belong to.
    counts = [0, 0, 0]
    for index in range(num_slices):
        np.moveaxis(prediction, axis, 0)[:] = 0
        np.moveaxis(prediction, axis, 0)[2 + index, 1, 1] = 1
        right = dice_by_thirds(prediction, reference, classes=CLASSES, axis=axis)["RV"]
        counts[next(third for third, dice in enumerate(right) if dice)] += 1
    assert tuple(counts) == expected


def test_a_reference_without_organs_has_no_thirds() -> None:
    empty = np.zeros((4, 4, 4), np.int16)
    assert dice_by_thirds(empty + 1, empty, classes=CLASSES, axis=2) == {"RV": [None] * 3, "LV": [None] * 3}


def test_soft_dice_with_background_is_the_released_codes_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(4, 5, 6, 3, generator=generator).softmax(dim=0)
    reference = torch.randint(0, 3, (5, 6, 3), generator=generator)  # class 3 is absent
    by_class = []
    for value in range(4):
        p, t = probabilities[value].flatten().tolist(), (reference == value).flatten().float().tolist()
        shared = sum(a * b for a, b in zip(p, t, strict=True))
        by_class.append((2 * shared + 1e-5) / (sum(p) + sum(t) + 1e-5))
    assert soft_dice_with_background(probabilities, reference) == pytest.approx(sum(by_class) / 4, abs=1e-6)
    with pytest.raises(ValueError, match="must have the same grid"):
        soft_dice_with_background(probabilities, reference[:-1])


def test_soft_dice_with_background_flatters_a_model_that_finds_nothing() -> None:
    reference = torch.zeros(10, 10, 10, dtype=torch.int64)
    reference[4:6, 4:6, 4:6] = 1
    nothing = torch.stack([torch.ones(10, 10, 10), torch.zeros(10, 10, 10)])
    assert soft_dice_with_background(nothing, reference) == pytest.approx((2 * 992 / 1992) / 2, abs=1e-5)
    assert score((nothing.argmax(0)).numpy(), reference.numpy())["RV"].dice == 0.0


def test_of_each_class_the_largest_part_stays() -> None:
    parts = labels((8, 8, 4), RV=(slice(0, 3), slice(0, 3), slice(0, 2)), LV=(slice(5, 8), slice(0, 2), slice(0, 2)))
    cleaned = parts.copy()
    parts[6, 6, 3], parts[3, 3, 2], parts[0, 7, 3] = 1, 1, 2  # far, over a corner, far
    cleaned[3, 3, 2] = 1
    assert (largest_components(parts, classes=CLASSES) == cleaned).all()
    assert parts[6, 6, 3] == 1  # the input is left as it is
    only_right = largest_components(parts, classes=[1])
    assert only_right[0, 7, 3] == 2
    assert only_right.dtype == parts.dtype


def test_frames_are_cleaned_one_by_one() -> None:
    large, small = (slice(0, 3),) * 3, (slice(5, 7),) * 3
    first, second = labels((8, 8, 8), RV=large), labels((8, 8, 8), RV=small)
    both = first + second
    cleaned = largest_components(np.stack([both, second], axis=3), classes=[1])
    assert (cleaned == np.stack([first, second], axis=3)).all()
    empty = np.zeros((3, 3, 3), np.uint8)
    assert (largest_components(empty, classes=[1]) == empty).all()
    with pytest.raises(ValueError, match=r"\(X, Y, Z\) or"):
        largest_components(empty[0], classes=[1])
