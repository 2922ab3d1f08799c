"""InfoNCE against its definition written out, one anchor at a time, in float64."""

import math

import pytest
import torch
from torch import Tensor

from p2r.loss import info_nce
from p2r.loss.info_nce import _TILE

FORMS = ("cross_view", "nt_xent")


def embeddings(num: int, channels: int, *, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num, channels, generator=generator, dtype=torch.float64)
    keys = queries + noise * torch.randn(num, channels, generator=generator, dtype=torch.float64)
    return queries * 3, keys


def written_out(queries: Tensor, keys: Tensor, *, temperature: float, form: str) -> Tensor:
    """Minus the log of the probability of picking the partner, averaged over anchors."""
    q = [row / row.norm() for row in queries]
    k = [row / row.norm() for row in keys]
    losses = []
    for i in range(len(q)):
        for anchor, partner, same_view, other_view in ((q[i], k[i], q, k), (k[i], q[i], k, q)):
            candidates = list(other_view)
            if form == "nt_xent":
                candidates += [row for j, row in enumerate(same_view) if j != i]
            scores = torch.stack([anchor @ row / temperature for row in candidates])
            losses.append(scores.logsumexp(0) - anchor @ partner / temperature)
    return torch.stack(losses).mean()


def matrix_form(queries: Tensor, keys: Tensor, *, temperature: float, form: str) -> Tensor:
    """The dense textbook form, for sizes at which the written-out one takes too long."""
    q, k = queries / queries.norm(dim=1, keepdim=True), keys / keys.norm(dim=1, keepdim=True)
    index = torch.arange(len(q))
    if form == "cross_view":
        scores = q @ k.T / temperature
        one, other = (torch.nn.functional.cross_entropy(side, index) for side in (scores, scores.T))
        return (one + other) / 2
    z = torch.cat((q, k))
    scores = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return torch.nn.functional.cross_entropy(scores, torch.cat((index + len(q), index)))


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.05])
def test_loss_and_gradient_equal_the_definition(form: str, temperature: float) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(9, 5))
    expected = written_out(queries, keys, temperature=temperature, form=form)
    loss = info_nce(queries, keys, temperature=temperature, form=form)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, queries, keys), gradients(expected, queries, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_equals_finite_differences(form: str) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(7, 4, seed=1))
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, temperature=0.3, form=form), (queries, keys))


@pytest.mark.parametrize("form", FORMS)
def test_tiles_do_not_show(form: str) -> None:
    num = 2 * _TILE + 37  # several tiles both ways, none of them whole at the end
    queries, keys = (x.requires_grad_() for x in embeddings(num, 8, seed=2))
    expected = matrix_form(queries, keys, temperature=0.1, form=form)
    loss = info_nce(queries, keys, temperature=0.1, form=form)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, queries, keys), gradients(expected, queries, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_float32_keeps_its_digits_when_training_has_converged(form: str) -> None:
    queries, keys = embeddings(300, 64, seed=3, noise=0.01)
    exact = [x.clone().requires_grad_() for x in (queries.float().double(), keys.float().double())]
    single = [x.float().requires_grad_() for x in (queries, keys)]
    expected = info_nce(*exact, temperature=0.02, form=form)
    assert expected < 1e-6
    loss = info_nce(*single, temperature=0.02, form=form)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for ours, theirs in zip(gradients(loss, *single), gradients(expected, *exact), strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("form", FORMS)
def test_small_temperatures_neither_overflow_nor_vanish(form: str) -> None:
    queries, keys = (x.float().requires_grad_() for x in embeddings(50, 8, seed=4, noise=10.0))
    loss = info_nce(queries, keys, temperature=1e-3, form=form)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, queries, keys))


@pytest.mark.parametrize("form", FORMS)
def test_length_of_rows_and_order_of_pairs_do_not_matter(form: str) -> None:
    queries, keys = embeddings(20, 6, seed=5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    loss = info_nce(queries, keys, temperature=0.2, form=form)
    torch.testing.assert_close(info_nce(queries * 7, keys / 3, temperature=0.2, form=form), loss)
    torch.testing.assert_close(info_nce(queries[order], keys[order], temperature=0.2, form=form), loss)


def test_one_pair_has_no_negatives_and_costs_nothing() -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(1, 4))
    for form in FORMS:
        loss = info_nce(queries, keys, temperature=0.2, form=form)
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients(loss, queries, keys))


def test_indistinguishable_embeddings_cost_the_log_of_the_number_of_candidates() -> None:
    same = torch.ones(10, 4)
    assert info_nce(same, same, temperature=0.2, form="cross_view") == pytest.approx(math.log(10), rel=1e-6)
    assert info_nce(same, same, temperature=0.2, form="nt_xent") == pytest.approx(math.log(19), rel=1e-6)


def test_bfloat16_embeddings_are_summed_in_float32() -> None:
    queries, keys = (x.bfloat16().requires_grad_() for x in embeddings(40, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(queries, keys, temperature=0.1)
    assert loss.dtype == torch.float32
    expected = info_nce(queries.double(), keys.double(), temperature=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(loss, queries)[0].dtype == torch.bfloat16


def test_the_inputs_are_left_as_they_were_and_two_backward_passes_agree() -> None:
    queries, keys = (x.float().requires_grad_() for x in embeddings(30, 8))
    before = queries.detach().clone()
    loss = info_nce(queries, keys, temperature=0.1, form="nt_xent")
    first = torch.autograd.grad(loss, (queries, keys), retain_graph=True)
    second = torch.autograd.grad(loss, (queries, keys))
    assert torch.equal(queries, before)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_memory_does_not_grow_with_the_square_of_the_pairs() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        num_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    self.num_elements = max(self.num_elements, tensor.numel())
            return result

    queries, keys = (x.float().requires_grad_() for x in embeddings(4 * _TILE, 4))
    with Largest() as largest:
        info_nce(queries, keys, temperature=0.1, form="nt_xent").backward()
    assert 0 < largest.num_elements <= 2 * _TILE**2


@pytest.mark.parametrize(
    ("shape_queries", "shape_keys"), [((5, 4), (6, 4)), ((5, 4), (5, 3)), ((0, 4), (0, 4)), ((2, 5, 4), (2, 5, 4))]
)
def test_shapes_that_do_not_fit_are_refused(shape_queries: tuple[int, ...], shape_keys: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="queries and keys"):
        info_nce(torch.ones(shape_queries), torch.ones(shape_keys), temperature=0.1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), temperature=temperature)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="form"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), temperature=0.1, form="nt-xent")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient_scale"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), temperature=0.1, gradient_scale="avg")  # type: ignore[arg-type]
