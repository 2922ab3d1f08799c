"""Calibration of the confidence, near the organs and in the whole scan."""

import numpy as np
import pytest
import torch

from p2r.evaluate.calibration import (
    MARGIN_MM,
    NUM_BINS,
    CalibrationSums,
    calibration_row,
    calibration_sums,
    near_organs,
)


def random_case(number: int = 4, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    probabilities = (torch.randn(number, classes, 7, 5, generator=generator) * 2).softmax(1)
    reference = torch.randint(0, classes, (number, 7, 5), generator=generator)
    return probabilities, reference, torch.rand(number, 7, 5, generator=generator) < 0.4


def naive(probabilities: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """ECE and Brier score of voxels (n, K), one after another."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    squares = []
    for of_voxel, true in zip(probabilities.double().numpy(), reference.numpy(), strict=True):
        confidence = float(of_voxel.max())
        inside = [b for b in range(NUM_BINS) if b / NUM_BINS < confidence <= (b + 1) / NUM_BINS]
        bins.setdefault(inside[0], []).append((confidence, int(of_voxel.argmax()) == int(true)))
        squares.append(sum((p - (k == int(true))) ** 2 for k, p in enumerate(of_voxel)))
    distances = [
        abs(np.mean([c for c, _ in found]) - np.mean([r for _, r in found])) * len(found) for found in bins.values()
    ]
    return float(sum(distances)) / len(squares), float(np.mean(squares))


def test_both_figures_are_those_of_the_definition() -> None:
    probabilities, reference, near = random_case()
    found = calibration_sums(probabilities, reference, near).figures()
    voxels = probabilities.movedim(1, -1)
    for ending, region in (("", near), ("_whole", torch.ones_like(near))):
        ece, brier = naive(voxels[region], reference[region])
        assert found[f"ece{ending}"] == pytest.approx(ece, abs=1e-6)
        assert found[f"brier{ending}"] == pytest.approx(brier, abs=1e-6)


def test_confidence_that_is_always_right_costs_nothing_and_certainty_that_is_wrong_costs_all() -> None:
    reference = torch.tensor([[0, 1, 1, 0]])
    sure = torch.nn.functional.one_hot(reference, 2).movedim(-1, 1).float()
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    right, wrong = (calibration_sums(p, reference, everywhere).figures() for p in (sure, sure.flip(1)))
    assert right == {"ece": 0.0, "brier": 0.0, "ece_whole": 0.0, "brier_whole": 0.0}
    assert wrong == {"ece": 1.0, "brier": 2.0, "ece_whole": 1.0, "brier_whole": 2.0}


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    case = random_case(6)
    parts = [calibration_sums(*(of_case[rows] for of_case in case)) for rows in (slice(0, 2), slice(2, 6))]
    whole, together = calibration_sums(*case), parts[0] + parts[1]
    np.testing.assert_allclose(together.bins, whole.bins)
    np.testing.assert_allclose(together.squares, whole.squares)


def test_a_patient_counts_once_however_many_voxels_it_has() -> None:
    large, small = (calibration_sums(*random_case(number)) for number in (9, 1))
    row = calibration_row({"a": large, "b": small})
    assert row["ece"] == pytest.approx((large.figures()["ece"] + small.figures()["ece"]) / 2)  # type: ignore[operator]
    assert sum(row["reliability"]["num_voxels"]) == (large + small).bins[0, :, 0].sum()
    nobody = calibration_row({"c": CalibrationSums.empty()})
    assert nobody["ece"] is None and nobody["reliability"]["accuracy"] == [None] * NUM_BINS


def test_the_region_near_the_organs_is_a_box_of_each_frame_in_millimetres() -> None:
    reference = np.zeros((40, 30, 9, 2), np.int16)
    reference[20:22, 15, 4, 0] = 2
    near = near_organs(reference, (2.0, 1.0, 8.0))
    assert not near[..., 1].any()
    places = [(int(axis.min()), int(axis.max())) for axis in np.nonzero(near[..., 0])]
    assert places == [(15, 26), (5, 25), (3, 5)], f"{MARGIN_MM} mm are 5, 10 and 1 voxels"
    assert near[..., 0].sum() == 12 * 21 * 3


def test_grids_that_differ_are_refused() -> None:
    probabilities, reference, near = random_case()
    with pytest.raises(ValueError, match="must have the same grid"):
        calibration_sums(probabilities, reference[:, :3], near)
