"""InfoNCE against a naive implementation of its definition, one anchor at a time, in float64.

Mutants of `p2r/loss/contrast.py` that this file cannot kill, and why:

    of_ranks; to_anchors, to_candidates of `all_queries`     used by several ranks only, see `test_ranks.py`
    len(contrast.counts) == 1 -> != 1                        equal sums, in two products instead of one
    contrast.num_pairs // PANEL -> * PANEL                   equal sums, shared less evenly among ranks
    first < last -> <=                                       an empty block adds nothing
    any(count % PANEL ...) -> all(...)                       one rank has one count
    of_columns=False -> True                                 column sums that are not used
"""

import importlib
import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2r.errors import EmbeddingError
from p2r.loss import Findings, SameImage, contrast, info_nce, tiles
from p2r.loss.tiles import TILE, sharpest, static_shift

Form = Literal["cross_view", "nt_xent"]


FORMS: tuple[Form, ...] = ("cross_view", "nt_xent")


def embeddings(num: int, channels: int, *, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num, channels, generator=generator, dtype=torch.float64)
    keys = queries + noise * torch.randn(num, channels, generator=generator, dtype=torch.float64)
    return queries * 3, keys


def written_out(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    form: Form,
    decoupled: bool = False,
    weights: Tensor | None = None,
    exclude: SameImage | None = None,
) -> Tensor:
    """Return minus the log of the probability of picking the partner, averaged over anchors."""
    q = [row / row.norm() for row in queries]
    k = [row / row.norm() for row in keys]
    weight = [1.0] * len(q) if weights is None else weights.tolist()

    def is_negative(i: int, j: int) -> bool:
        if i == j or weight[j] == 0:
            return False
        if exclude is None or exclude.image[i] != exclude.image[j]:
            return True
        if exclude.position_mm is None:
            return False
        return bool((exclude.position_mm[i] - exclude.position_mm[j]).norm() > exclude.radius_mm)

    total = queries.new_zeros(())
    for i in range(len(q)):
        negatives = [j for j in range(len(q)) if is_negative(i, j)]
        for anchor, partner, same_view, other_view in ((q[i], k[i], q, k), (k[i], q[i], k, q)):
            candidates = [other_view[j] for j in negatives]
            candidates += [same_view[j] for j in negatives] if form == "nt_xent" else []
            positive = anchor @ partner / temperature
            scores = [anchor @ row / temperature for row in candidates]
            if scores or not decoupled:
                lse = torch.stack(scores if decoupled else [*scores, positive]).logsumexp(0)
                total = total + weight[i] * (lse - positive)
    return total / (2 * sum(weight))


def matrix_form(queries: Tensor, keys: Tensor, *, temperature: float, form: Form) -> Tensor:
    """Compute the dense textbook form, for sizes at which the naive one takes too long."""
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
def test_loss_and_gradient_equal_the_definition(form: Form, temperature: float) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(9, 5))
    expected = written_out(queries, keys, temperature=temperature, form=form)
    loss = info_nce(queries, keys, temperature=temperature, form=form)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, queries, keys), gradients(expected, queries, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_equals_finite_differences(form: Form) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(7, 4, seed=1))
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, temperature=0.3, form=form), (queries, keys))


@pytest.mark.parametrize("form", FORMS)
def test_the_result_does_not_depend_on_tiles(form: Form) -> None:
    num = 2 * TILE + 37  # several tiles both ways, none of them whole at the end
    queries, keys = (x.requires_grad_() for x in embeddings(num, 8, seed=2))
    expected = matrix_form(queries, keys, temperature=0.1, form=form)
    loss = info_nce(queries, keys, temperature=0.1, form=form)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, queries, keys), gradients(expected, queries, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("num_panels", [3, 4, 5])
def test_entries_within_a_view_are_computed_once_for_two_panels(
    num_panels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrast, "PANEL", 8)
    queries, keys = (x.requires_grad_() for x in embeddings(8 * num_panels, 6, seed=2))
    computed = 0
    sums = tiles.sums

    def counting(anchors: Any, candidates: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal computed
        computed += len(anchors) * len(candidates)
        return sums(anchors, candidates, *arguments, **options)

    monkeypatch.setattr(tiles, "sums", counting)
    exclude = SameImage(torch.arange(8 * num_panels) // 3)
    expected = written_out(queries, keys, temperature=0.2, form="nt_xent", exclude=exclude)
    loss = info_nce(queries, keys, temperature=0.2, form="nt_xent", exclude=exclude)
    assert computed == 64 * (num_panels**2 + num_panels * (num_panels + 1))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, queries, keys), gradients(expected, queries, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_ranks_whose_rows_are_no_whole_panels_compute_every_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "PANEL", 8)
    queries, keys = embeddings(29, 6, seed=2)
    expected = written_out(queries, keys, temperature=0.2, form="nt_xent")
    torch.testing.assert_close(
        info_nce(queries, keys, temperature=0.2, form="nt_xent"), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("form", FORMS)
def test_float32_keeps_its_digits_when_training_has_converged(form: Form) -> None:
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
def test_small_temperatures_neither_overflow_nor_vanish(form: Form) -> None:
    queries, keys = (x.float().requires_grad_() for x in embeddings(50, 8, seed=4, noise=10.0))
    loss = info_nce(queries, keys, temperature=1e-3, form=form)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, queries, keys))


@pytest.mark.parametrize("form", FORMS)
def test_length_of_rows_and_order_of_pairs_do_not_matter(form: Form) -> None:
    queries, keys = embeddings(20, 6, seed=5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    loss = info_nce(queries, keys, temperature=0.2, form=form)
    torch.testing.assert_close(info_nce(queries * 7, keys / 3, temperature=0.2, form=form), loss)
    torch.testing.assert_close(info_nce(queries[order], keys[order], temperature=0.2, form=form), loss)


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

    queries, keys = (x.float().requires_grad_() for x in embeddings(4 * TILE, 4))
    with Largest() as largest:
        info_nce(queries, keys, temperature=0.1, form="nt_xent").backward()
    assert 0 < largest.num_elements <= TILE**2


OPTIONS: dict[str, dict[str, Any]] = {
    "decoupled": {"decoupled": True},
    "weights": {"weights": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.1, 3.0, 0.0, 1.0], dtype=torch.float64)},
    "same image": {"exclude": SameImage(torch.tensor([0, 0, 0, 4, 4, 7, 7, 7, 9]))},
    "radius": {
        "exclude": SameImage(
            torch.tensor([0, 0, 0, 4, 4, 7, 7, 7, 9]),
            torch.tensor([[0, 0], [0, 5], [9, 9], [0, 0], [30, 0], [1, 1], [2, 2], [3, 3], [0, 0]]).double(),
            radius_mm=5.0,
        )
    },
}


OPTIONS["all"] = {key: value for name in ("decoupled", "weights", "radius") for key, value in OPTIONS[name].items()}


@pytest.mark.parametrize("temperature", [0.2, 0.001])  # a static shift, and a maximum per row
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_options_equal_the_definition(form: Form, options: str, temperature: float) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(9, 5))
    tau, their_tau = (torch.tensor(temperature, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = written_out(queries, keys, temperature=their_tau, form=form, **OPTIONS[options])
    loss = info_nce(queries, keys, temperature=tau, form=form, **OPTIONS[options])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    theirs = gradients(expected, queries, keys, their_tau)
    for ours, their in zip(gradients(loss, queries, keys, tau), theirs, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("exchange", "temperature"), [("ring", 0.2), ("ring", 0.001), ("all_gather", 0.001)])
@pytest.mark.parametrize("form", FORMS)
def test_directions_computed_one_by_one_equal_the_definition(
    form: Form, exchange: Literal["ring", "all_gather"], temperature: float
) -> None:
    queries, keys = embeddings(9, 5, seed=3)
    keys = keys.roll(1, dims=0)  # unrelated pairs: the negatives of both views count, also with a sharp softmax
    queries, keys = queries.requires_grad_(), keys.detach().requires_grad_()
    expected = written_out(queries, keys, temperature=temperature, form=form)
    loss = info_nce(queries, keys, temperature=temperature, form=form, exchange=exchange)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, queries, keys), gradients(expected, queries, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", ["decoupled", "radius"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_with_options_and_temperature_equals_finite_differences(form: Form, options: str) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(9, 4, seed=1))
    tau = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, t: info_nce(q, k, temperature=t, form=form, **OPTIONS[options]), (queries, keys, tau)
    )


@pytest.mark.parametrize("radius_mm", [math.inf, 6.0])
@pytest.mark.parametrize("form", FORMS)
def test_excluded_negatives_are_found_in_every_tile(form: Form, radius_mm: float) -> None:
    num = 2 * TILE + 37
    queries, keys = (x.requires_grad_() for x in embeddings(num, 8, seed=2))
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(num) // 90  # images cross the borders of tiles
    position_mm = 30 * torch.rand(num, 3, generator=generator, dtype=torch.float64)
    exclude = SameImage(image, position_mm, radius_mm)
    near = (image[:, None] == image) & ((position_mm[:, None] - position_mm).norm(dim=-1) <= radius_mm)
    assert 3 * num < near.sum() < num**2 / 2
    expected = stable_form(queries, keys, temperature=0.1, form=form, near=near)
    loss = info_nce(queries, keys, temperature=0.1, form=form, exclude=exclude)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(loss, queries, keys), gradients(expected, queries, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    shuffled = torch.randperm(num, generator=generator)
    exclude = SameImage(image[shuffled], position_mm[shuffled], radius_mm)
    again = info_nce(queries[shuffled], keys[shuffled], temperature=0.1, form=form, exclude=exclude)
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def stable_form(q: Tensor, k: Tensor, *, temperature: float, form: Form, near: Tensor | None = None) -> Tensor:
    """Compute the dense form over negatives only, which is exact in float64 for arbitrarily small losses."""
    q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    excluded = torch.eye(len(q), dtype=torch.bool) if near is None else near | torch.eye(len(q), dtype=torch.bool)
    positive = (q * k).sum(1) / temperature
    losses = []
    for anchors, others in ((q, k), (k, q)):
        logits = (anchors @ others.T / temperature).masked_fill(excluded, -math.inf)
        if form == "nt_xent":
            logits = torch.cat((logits, (anchors @ anchors.T / temperature).masked_fill(excluded, -math.inf)), 1)
        losses.append(torch.logaddexp(logits.logsumexp(1) - positive, torch.zeros(()).double()))
    return torch.stack(losses).mean()


REGIMES = {"random": 10.0, "learning": 0.5, "converged": 0.003, "duplicated": 10.0}


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.07, 0.02, 0.0127])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", FORMS)
def test_float32_gradients_are_right_where_the_usual_ones_are_not(
    form: Form, regime: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With respect to the unit rows, because normalising is a separate step with its own rounding.
    monkeypatch.setattr(importlib.import_module("p2r.loss.info_nce"), "_normalise_rows", lambda rows: rows)
    queries, keys = embeddings(700, 128, seed=6, noise=REGIMES[regime])
    if regime == "duplicated":
        queries[100:200], keys[100:200] = queries[:100], keys[:100]
    single = [F.normalize(x.float(), dim=1).requires_grad_() for x in (queries, keys)]
    exact = [x.detach().double().requires_grad_() for x in single]
    loss = info_nce(*single, temperature=temperature, form=form)
    positive = (exact[0] * exact[1]).sum(1)
    expected = of_unit_rows(exact[0], exact[1], positive / temperature, temperature=temperature, form=form)
    bound = 2e-7 / temperature + 1e-6
    assert abs(loss.double() - expected) <= bound * abs(expected)
    for ours, theirs in zip(gradients(loss, *single), gradients(expected, *exact), strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


def of_unit_rows(
    q: Tensor, k: Tensor, positive: Tensor, *, temperature: float, form: Form, both: bool = True
) -> Tensor:
    """Compute `stable_form` without normalising, in both directions or only from queries to keys."""
    diagonal = torch.eye(len(q), dtype=torch.bool)
    losses = []
    for anchors, others in ((q, k), (k, q))[: 2 if both else 1]:
        logits = (anchors @ others.T / temperature).masked_fill(diagonal, -math.inf)
        if form == "nt_xent":
            logits = torch.cat((logits, (anchors @ anchors.T / temperature).masked_fill(diagonal, -math.inf)), 1)
        losses.append(torch.logaddexp(logits.logsumexp(1) - positive, torch.zeros(()).double()))
    return torch.stack(losses).mean()


def test_the_usual_float32_loss_fails_the_bound_that_ours_keeps() -> None:
    queries, keys = embeddings(700, 128, seed=6, noise=0.003)
    single = [F.normalize(x.float(), dim=1).requires_grad_() for x in (queries, keys)]
    exact = [x.detach().double().requires_grad_() for x in single]
    usual = F.cross_entropy(single[0] @ single[1].T / 0.02, torch.arange(700))
    positive = (exact[0] * exact[1]).sum(1) / 0.02
    expected = of_unit_rows(exact[0], exact[1], positive, temperature=0.02, form="cross_view", both=False)
    ours, theirs = gradients(usual, *single)[0], gradients(expected, *exact)[0]
    assert (ours - theirs).norm() > 0.1 * theirs.norm()


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_without_negatives_costs_nothing(form: Form) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(6, 4))
    lonely = SameImage(torch.zeros(6, dtype=torch.long))
    for temperature in (0.2, 0.001):
        loss = info_nce(queries, keys, temperature=temperature, form=form, exclude=lonely)
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients(loss, queries, keys))
        with pytest.raises(ValueError, match="6 of 6 have none"):
            info_nce(queries, keys, temperature=temperature, form=form, exclude=lonely, decoupled=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_of_weight_zero_is_ignored(form: Form) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(10, 4))
    with torch.no_grad():
        queries[3] = math.nan  # arbitrary values
    weights = torch.ones(10).index_fill(0, torch.tensor([3]), 0)
    others = [i for i in range(10) if i != 3]
    loss = info_nce(queries, keys, temperature=0.2, form=form, weights=weights)
    assert loss == info_nce(queries[others], keys[others], temperature=0.2, form=form)
    assert (gradients(loss, keys)[0][3] == 0).all()


def test_very_long_and_very_short_embeddings_are_normalised() -> None:
    queries, keys = (x.float() for x in embeddings(10, 4))
    expected = info_nce(queries, keys, temperature=0.2)
    torch.testing.assert_close(info_nce(queries * 1e30, keys * 1e-30, temperature=0.2), expected)


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device with which code must not synchronise."""
    monkeypatch.setattr("p2r.loss.ranks.is_waited_for", lambda device: True)


@pytest.mark.usefixtures("waited_for")
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.3, 0.0127])
def test_a_learnt_temperature_is_not_read_and_gives_the_same_loss_and_gradients(
    form: Form, value: float, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = (x.float().requires_grad_() for x in embeddings(12, 4))
    temperature = torch.tensor([value], requires_grad=True)
    options: dict[str, Any] = {"form": form, "exchange": exchange, "temperature": temperature}
    expected = info_nce(queries, keys, **options)
    of_expected = gradients(expected, queries, keys, temperature)
    module = importlib.import_module("p2r.loss.info_nce")  # the function of the same name hides it
    monkeypatch.setattr(module, "number_in", lambda value: pytest.fail("it was read"))
    findings = Findings()
    loss = info_nce(queries, keys, findings=findings, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(loss, queries, keys, temperature), of_expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not any(findings.counts())


@pytest.mark.usefixtures("waited_for")
@pytest.mark.parametrize("value", [0.0115, 0.0, -1.0, math.nan])
def test_a_learnt_temperature_without_a_static_shift_is_counted(value: float) -> None:
    findings = Findings()
    info_nce(torch.ones(5, 4), torch.ones(5, 4), temperature=torch.tensor(value), findings=findings)
    with pytest.raises(EmbeddingError, match=r"temperature must be at least 0\.0\d+ for 5 candidates"):
        findings.refuse([int(count) for count in findings.counts()])


@pytest.mark.parametrize("num_candidates", [2, 10**5, 10**8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_sharpest_temperature_is_the_last_with_a_static_shift(dtype: torch.dtype, num_candidates: int) -> None:
    most = sharpest(num_candidates, dtype)
    shift = static_shift(most, num_candidates, dtype)
    assert shift is not None
    assert static_shift(most * 1.0001, num_candidates, dtype) is None
    limits = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype)
    assert most - shift + math.log(num_candidates) < math.log(limits.max)
    assert -most - shift > math.log(limits.tiny)


def test_half_precision_is_summed_in_the_range_of_float32_and_float64_has_its_own() -> None:
    assert sharpest(18, torch.bfloat16) == sharpest(18, torch.float16) == sharpest(18, torch.float32) < 1 / 0.01
    assert 1 / 0.002 < sharpest(18, torch.float64) < 1 / 0.001, "tests of both ways to sum use these temperatures"


@pytest.mark.parametrize("is_waited_for", [False, True])
@pytest.mark.parametrize("form", ["cross_view", "nt_xent"])
def test_the_parts_are_the_cosine_of_pairs_and_the_log_sum_over_negatives(
    form: Form, is_waited_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2r.loss.ranks.is_waited_for", lambda device: is_waited_for)
    queries, keys = embeddings(8, 4)
    weights = torch.tensor([1.0, 2, 1, 0, 1, 1, 1, 1])
    parts: dict[str, torch.Tensor] = {}
    info_nce(queries, keys, temperature=0.2, form=form, weights=weights, findings=Findings(), parts=parts)
    kept, total = weights > 0, weights.sum()
    unit = [torch.nn.functional.normalize(rows[kept], dim=1) for rows in (queries, keys)]
    both = torch.cat(unit)
    logits = both @ both.T / 0.2
    n = len(both) // 2
    rows = []
    for anchor in range(2 * n):
        partner = (anchor + n) % (2 * n)
        others = [
            other
            for other in range(2 * n)
            if other not in (anchor, partner) and (form == "nt_xent" or (other < n) != (anchor < n))
        ]
        rows.append(torch.logsumexp(logits[anchor, others], 0))
    of_negatives = (torch.stack(rows[:n]) + torch.stack(rows[n:])) / 2
    expected = {"positive": (unit[0] * unit[1]).sum(1), "negatives": of_negatives}
    assert set(parts) == set(expected)
    for name, values in expected.items():
        mean = float((values * weights[kept]).sum() / total)
        assert float(parts[name][0] / parts[name][1]) == pytest.approx(mean, rel=1e-4), name
