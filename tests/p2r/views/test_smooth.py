"""Spline fields: against scipy's uniform B-splines, and within their control values."""

import numpy as np
import torch
from scipy.interpolate import BSpline

from p2r.views.smooth import num_controls, spline_field


def test_a_field_equals_the_tensor_product_of_uniform_cubic_b_splines() -> None:
    controls = np.random.default_rng(0).standard_normal((2, 3, 6, 5))
    field = spline_field(controls, size=(31, 17))
    rows = BSpline(np.arange(-3.0, 7.0), np.eye(6), 3)(np.linspace(0, 3, 31))
    columns = BSpline(np.arange(-3.0, 6.0), np.eye(5), 3)(np.linspace(0, 2, 17))
    expected = np.einsum("hk,bckl,wl->bchw", rows, controls, columns)
    np.testing.assert_allclose(field.numpy(), expected, atol=1e-6)


def test_a_field_in_a_volume_is_such_a_product_too() -> None:
    controls = np.random.default_rng(0).standard_normal((2, 3, 4, 6, 5))
    field = spline_field(controls, size=(7, 19, 12))
    bases = [
        BSpline(np.arange(-3.0, k + 1.0), np.eye(k), 3)(np.linspace(0, k - 3, n)) for k, n in ((4, 7), (6, 19), (5, 12))
    ]
    expected = np.einsum("xi,yj,zk,bcijk->bcxyz", *bases, controls)
    np.testing.assert_allclose(field.numpy(), expected, atol=1e-6)


def test_a_field_stays_within_its_control_values() -> None:
    controls = np.random.default_rng(1).uniform(0.5, 2.0, (4, 1, 5, 5))
    field = spline_field(controls, size=(40, 40))
    assert field.min() >= 0.5
    assert field.max() <= 2.0
    torch.testing.assert_close(spline_field(np.ones((1, 1, 4, 7)), size=(9, 1)), torch.ones(1, 1, 9, 1))


def test_control_points_are_at_most_their_spacing_apart() -> None:
    assert num_controls(1, 10.0) == 4
    assert num_controls(11, 10.0) == 4
    assert num_controls(12, 10.0) == 5
