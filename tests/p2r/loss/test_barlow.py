"""Barlow Twins against a naive implementation of its definition, one pair of channels at a time."""

import math

import pytest
import torch
from torch import Tensor

from p2r.errors import EmbeddingError
from p2r.loss import Findings, barlow_twins


def embeddings(num: int, channels: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num, channels, generator=generator, dtype=torch.float64) * 2 + 5
    return a, a + torch.randn(num, channels, generator=generator, dtype=torch.float64)


def written_out(a: Tensor, b: Tensor, weight: float) -> Tensor:
    total = a.new_zeros(())
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            correlation = (x * y).mean() / ((x * x).mean().sqrt() * (y * y).mean().sqrt())
            total = total + ((1 - correlation) ** 2 if i == j else weight * correlation**2)
    return total


def test_loss_and_gradient_equal_the_definition() -> None:
    a, b = (x.requires_grad_() for x in embeddings(15, 6))
    loss, expected = barlow_twins(a, b, off_diagonal_weight=0.3), written_out(a, b, 0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradient_equals_finite_differences() -> None:
    a, b = (x.requires_grad_() for x in embeddings(8, 3, seed=1))
    assert torch.autograd.gradcheck(lambda x, y: barlow_twins(x, y, off_diagonal_weight=0.1), (a, b))


def test_shift_and_scale_of_a_channel_do_not_matter() -> None:
    a, b = embeddings(50, 4)
    loss = barlow_twins(a, b, off_diagonal_weight=0.1)
    factor = torch.tensor([2.0, 0.1, 30.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(barlow_twins(a * factor + 3, b / factor - 1, off_diagonal_weight=0.1), loss)


def test_equal_views_of_independent_channels_cost_nothing() -> None:
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow_twins(a, a, off_diagonal_weight=1.0) == pytest.approx(0, abs=1e-12)


def test_a_large_mean_does_not_cost_float32_its_digits() -> None:
    a, b = embeddings(200, 5)
    expected = barlow_twins((a + 1000).float().double(), (b + 1000).float().double(), off_diagonal_weight=0.1)
    loss = barlow_twins((a + 1000).float(), (b + 1000).float(), off_diagonal_weight=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_a_constant_channel_correlates_with_nothing_and_has_no_gradient() -> None:
    a, b = embeddings(20, 3)
    a[:, 1] = 0.0
    a.requires_grad_()
    loss = barlow_twins(a, b, off_diagonal_weight=0.0)
    expected = barlow_twins(a[:, [0, 2]].detach(), b[:, [0, 2]], off_diagonal_weight=0.0) + 1
    torch.testing.assert_close(loss.detach(), expected)
    assert torch.isfinite(torch.autograd.grad(loss, a)[0]).all()


def test_bfloat16_embeddings_are_summed_in_float32() -> None:
    a, b = (x.bfloat16() for x in embeddings(60, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = barlow_twins(a, b, off_diagonal_weight=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), barlow_twins(a.double(), b.double(), off_diagonal_weight=0.1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("shape_a", "shape_b"), [((5, 4), (6, 4)), ((5, 4), (5, 3)), ((4,), (4,))])
def test_shapes_that_do_not_fit_are_refused(shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a and b"):
        barlow_twins(torch.ones(shape_a), torch.ones(shape_b), off_diagonal_weight=0.1)


def test_a_pair_of_weight_zero_is_ignored_and_one_of_weight_two_counts_twice() -> None:
    a, b = embeddings(12, 4)
    weights = torch.ones(12)
    weights[3], weights[5] = 0, 2
    rows = [0, 1, 2, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    expected = barlow_twins(a[rows], b[rows], off_diagonal_weight=0.1)
    a[3] = math.nan  # arbitrary values
    torch.testing.assert_close(barlow_twins(a, b, off_diagonal_weight=0.1, weights=weights), expected)


def test_embeddings_that_are_not_finite_are_refused_and_counted() -> None:
    a, b = embeddings(12, 4)
    b[[2, 7], 1] = math.inf
    with pytest.raises(EmbeddingError, match="b: 2 of 12 embeddings are not finite"):
        barlow_twins(a, b, off_diagonal_weight=0.1)


def test_fewer_than_two_pairs_and_towers_of_different_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        barlow_twins(torch.ones(1, 3), torch.ones(1, 3), off_diagonal_weight=0.1)
    with pytest.raises(ValueError, match="one floating dtype"):
        barlow_twins(torch.ones(5, 3), torch.ones(5, 3).double(), off_diagonal_weight=0.1)
    with pytest.raises(ValueError, match=r"weights \(5,\)"):
        barlow_twins(torch.ones(5, 3), torch.ones(5, 3), off_diagonal_weight=0.1, weights=torch.ones(4))


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="off_diagonal_weight"):
        barlow_twins(torch.ones(2, 3), torch.ones(2, 3), off_diagonal_weight=weight)


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_with_findings_pairs_of_weight_zero_are_ignored_and_fewer_than_two_have_no_gradient(
    is_waited_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2r.loss.ranks.is_waited_for", lambda device: is_waited_for)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    with torch.no_grad():
        a[4] = torch.nan
    weights = torch.ones(12).index_fill(0, torch.tensor([4]), 0)
    findings = Findings()
    ours = barlow_twins(a, b, off_diagonal_weight=0.1, weights=weights, findings=findings)
    theirs = barlow_twins(a, b, off_diagonal_weight=0.1, weights=weights)
    torch.testing.assert_close(ours, theirs)
    for got, expected in zip(*(torch.autograd.grad(loss, [a, b]) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, expected)
    assert len(findings.counts()) == (3 if is_waited_for else 2)  # checks for finite values are always postponed
    for num in (0, 1):
        loss = barlow_twins(
            a, b, off_diagonal_weight=0.1, weights=(torch.arange(12) < num).float(), findings=Findings()
        )
        assert loss == 0
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, [a, b]))


def test_the_parts_add_up_to_the_loss() -> None:
    a, b = (torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    parts: dict[str, torch.Tensor] = {}
    loss = barlow_twins(a, b, off_diagonal_weight=0.1, parts=parts)
    assert list(parts) == ["invariance", "redundancy"]
    assert float(sum(total / weight for total, weight in parts.values())) == pytest.approx(float(loss))
    correlation = torch.corrcoef(torch.cat([a, b], 1).T)[:5, 5:]
    assert float(parts["invariance"][0]) == pytest.approx(float((1 - correlation.diagonal()).square().sum()), rel=1e-4)
