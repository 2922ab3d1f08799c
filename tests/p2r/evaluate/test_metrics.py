"""Figures against counts and distances written out by hand, and the rules for absent classes."""

import json
import math
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray

from p2r.evaluate.metrics import Score, score_volume, summarise

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


@pytest.mark.parametrize(("axis", "spacing_mm"), [(0, 1.5), (1, 2.0), (2, 10.0)])
def test_hd95_of_two_single_voxels_is_their_distance_in_mm(axis: int, spacing_mm: float) -> None:
    found = score(row_of(2, along=axis), row_of(5, along=axis), spacing_mm=(1.5, 2.0, 10.0))["RV"]
    assert found.hd95_mm == pytest.approx(3 * spacing_mm)
    assert (found.dice, found.nsd) == (0.0, 0.0)


def test_hd95_interpolates_the_sorted_distances_and_takes_the_worse_direction() -> None:
    # Voxels 1..4 to voxel 1: 0, 2, 4, 6 mm. The 95th percentile lies at index 0.95 * 3 = 2.85: 4 + 0.85 * 2.
    # The other way the one distance is 0.
    found = score(row_of(1, 2, 3, 4), row_of(1), spacing_mm=(2.0, 1.0, 1.0))["RV"]
    assert found.hd95_mm == pytest.approx(5.7)


def test_nsd_counts_border_voxels_within_the_tolerance_in_mm() -> None:
    # Distances 0, 2, 4, 6 mm one way, 0 the other: within 2 mm lie 2 of 4 and 1 of 1.
    prediction, reference = row_of(1, 2, 3, 4), row_of(1)
    for tolerance, expected in ((1.9, 2 / 5), (2.0, 3 / 5), (6.0, 1.0)):
        found = score(prediction, reference, spacing_mm=(2.0, 1.0, 1.0), nsd_tolerance_mm=tolerance)["RV"]
        assert found.nsd == pytest.approx(expected)


def test_the_interior_of_an_organ_is_no_border() -> None:
    # A 5 x 5 x 5 cube against the same cube with its centre removed. The hole makes 6 more border voxels (the centre's
    # neighbours), 1 voxel from the nearest of the outer 98: of 98 + 98 + 6 all lie within 1, and 196 within 0.5.
    cube = labels((7, 7, 7), RV=(slice(1, 6), slice(1, 6), slice(1, 6)))
    hollow = cube.copy()
    hollow[3, 3, 3] = 0
    assert score(hollow, cube)["RV"].nsd == pytest.approx(1.0)
    assert score(hollow, cube, nsd_tolerance_mm=0.5)["RV"].nsd == pytest.approx(196 / 202)
    assert score(hollow, cube)["RV"].dice == pytest.approx(2 * 124 / 249)


def test_an_organ_at_the_edge_of_the_grid_has_its_border_there() -> None:
    whole, part = np.ones((4, 4, 4), np.int16), np.ones((4, 4, 4), np.int16)
    part[3] = 0
    # Border of the whole: 64 - 8 = 56 voxels, of which the 16 of the last layer are 1 from the part's border, which has
    # 48 - 4 = 44 voxels: of these the inner 2 x 2 of layer 2 are 1 from the whole's border, all others on it.
    assert score(part, whole, nsd_tolerance_mm=0.5)["RV"].nsd == pytest.approx((40 + 40) / 100)


def test_a_class_that_nobody_has_is_left_out_and_counted() -> None:
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
    with pytest.raises(ValueError, match="one 3D grid"):
        score(mask, mask[:-1])
    with pytest.raises(ValueError, match=r"prediction holds labels \[7\]"):
        score(mask * 7, mask)
    with pytest.raises(ValueError, match="three positive numbers"):
        score(mask, mask, spacing_mm=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
