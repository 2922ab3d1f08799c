"""Arguments of InfoNCE: rules, and checks that do not wait for a device."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from p2r.errors import EmbeddingError
from p2r.loss import Findings, SameImage, info_nce

Form = Literal["cross_view", "nt_xent"]


FORMS: tuple[Form, ...] = ("cross_view", "nt_xent")


def embeddings(num: int, channels: int, *, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num, channels, generator=generator, dtype=torch.float64)
    keys = queries + noise * torch.randn(num, channels, generator=generator, dtype=torch.float64)
    return queries * 3, keys


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(
    ("shape_queries", "shape_keys"), [((5, 4), (6, 4)), ((5, 4), (5, 3)), ((5,), (5,)), ((2, 5, 4), (2, 5, 4))]
)
def test_shapes_that_do_not_fit_are_refused(shape_queries: tuple[int, ...], shape_keys: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="queries and keys"):
        info_nce(torch.ones(shape_queries), torch.ones(shape_keys), temperature=0.1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "keys: 2 of 5 embeddings are not finite"),
        (math.inf, "not finite"),
        (0.0, "keys: 2 of 5 .* all zeros"),
    ],
)
def test_embeddings_without_a_direction_are_refused_and_counted(value: float, message: str) -> None:
    keys = torch.ones(5, 4)
    keys[[1, 4]] = value
    with pytest.raises(EmbeddingError, match=message):
        info_nce(torch.ones(5, 4), keys, temperature=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": torch.ones(4)}, r"weights \(5,\)"),
        ({"weights": torch.tensor([1.0, -1, 1, 1, 1])}, "not negative"),
        ({"weights": torch.tensor([1.0, 0, 0, 0, 0])}, "at least 2 pixel pairs .* got 1"),
        ({"weights": torch.zeros(5)}, "got 0"),
        ({"temperature": torch.tensor([0.1, 0.2])}, "temperature must be one number"),
        ({"exchange": "all-gather"}, "exchange"),
        ({"exclude": SameImage(torch.zeros(5))}, "integers"),
        ({"exclude": SameImage(torch.zeros(4).long())}, r"exclude.image \(5,\)"),
        ({"exclude": SameImage(torch.zeros(5).long(), radius_mm=3.0)}, "position_mm is needed"),
        (
            {"exclude": SameImage(torch.zeros(5).long(), torch.zeros(5, 2), radius_mm=-1.0)},
            "radius_mm must be positive",
        ),
        ({"exclude": SameImage(torch.zeros(5).long(), torch.full((5, 2), math.nan), 1.0)}, "must be finite"),
        ({"exclude": SameImage(torch.zeros(5).long(), torch.zeros(4, 2), 1.0)}, r"position_mm \(5, D\)"),
    ],
)
def test_options_that_break_a_rule_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce(torch.ones(5, 4), torch.ones(5, 4), **{"temperature": 0.1, **options})


def test_towers_of_different_kinds_are_refused() -> None:
    for keys in (torch.ones(5, 4).double(), torch.ones(5, 4).long()):
        with pytest.raises(ValueError, match="one floating dtype"):
            info_nce(torch.ones(5, 4), keys, temperature=0.1)
    with pytest.raises(ValueError, match="on one device"):
        info_nce(torch.ones(5, 4), torch.ones(5, 4, device="meta"), temperature=0.1)
    with pytest.raises(ValueError, match="at least 2"):
        info_nce(torch.ones(1, 4), torch.ones(1, 4), temperature=0.1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), temperature=temperature)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="form"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), temperature=0.1, form="nt-xent")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient_scale"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), temperature=0.1, gradient_scale="avg")  # type: ignore[arg-type]


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device with which code must not synchronise."""
    monkeypatch.setattr("p2r.loss.ranks.is_waited_for", lambda device: True)


@pytest.mark.usefixtures("waited_for")
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("temperature", [0.2, 0.001])
@pytest.mark.parametrize("form", FORMS)
def test_without_waiting_the_loss_and_its_gradient_are_the_same(
    form: Form, temperature: float, exchange: str, decoupled: bool
) -> None:
    queries, keys = (x.requires_grad_() for x in embeddings(12, 4))
    with torch.no_grad():
        queries[3], keys[7] = math.nan, 0.0  # of weight 0, with arbitrary values
    weights = torch.ones(12).index_fill(0, torch.tensor([3, 7]), 0).index_fill(0, torch.tensor([5]), 2)
    options: dict[str, Any] = {"form": form, "temperature": temperature, "exchange": exchange, "decoupled": decoupled}
    for exclude in (None, SameImage(torch.arange(12) // 3)):
        findings = Findings()
        ours = info_nce(queries, keys, weights=weights, exclude=exclude, findings=findings, **options)
        theirs = info_nce(queries, keys, weights=weights, exclude=exclude, **options)
        torch.testing.assert_close(ours, theirs)
        for got, expected in zip(gradients(ours, queries, keys), gradients(theirs, queries, keys), strict=True):
            torch.testing.assert_close(got, expected)
        assert len(findings.counts()) >= 5 and not any(findings.counts())
        findings.refuse([int(count) for count in findings.counts()])


@pytest.mark.usefixtures("waited_for")
def test_without_waiting_bad_values_are_counted_and_refused_when_they_are_read() -> None:
    keys = torch.ones(5, 4)
    keys[[1, 4]] = math.nan
    findings = Findings()
    info_nce(torch.ones(5, 4), keys, temperature=0.1, findings=findings)
    with pytest.raises(EmbeddingError, match="keys: 2 of 5 embeddings are not finite"):
        findings.refuse([int(count) for count in findings.counts()])
    findings = Findings()
    lonely = SameImage(torch.zeros(5).long())
    info_nce(torch.ones(5, 4), torch.ones(5, 4), temperature=0.1, exclude=lonely, decoupled=True, findings=findings)
    with pytest.raises(EmbeddingError, match="5 of 5 have none"):
        findings.refuse([int(count) for count in findings.counts()])
    findings = Findings()
    nowhere = SameImage(torch.zeros(5).long(), torch.full((5, 2), math.nan), radius_mm=1.0)
    info_nce(torch.ones(5, 4), torch.ones(5, 4), temperature=0.1, exclude=nowhere, findings=findings)
    with pytest.raises(EmbeddingError, match=r"10 numbers of exclude\.position_mm are not finite"):
        findings.refuse([int(count) for count in findings.counts()])


def test_with_findings_values_on_a_cpu_are_still_checked_at_once() -> None:
    with pytest.raises(EmbeddingError, match=r"keys: 5 of 5 .* all zeros"):
        info_nce(torch.ones(5, 4), torch.zeros(5, 4), temperature=0.1, findings=Findings())


@pytest.mark.parametrize("is_waited_for", [False, True])
@pytest.mark.parametrize("num", [0, 1])
def test_with_findings_fewer_than_two_pairs_have_no_loss_and_no_gradient(
    num: int, is_waited_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2r.loss.ranks.is_waited_for", lambda device: is_waited_for)
    queries, keys = (x.requires_grad_() for x in embeddings(6, 4))
    temperature = torch.tensor(0.1, requires_grad=True)
    weights = (torch.arange(6) < num).float()
    loss = info_nce(queries, keys, temperature=temperature, weights=weights, findings=Findings())
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, queries, keys, temperature))


def test_with_findings_embeddings_that_are_not_finite_are_counted_on_a_cpu_too() -> None:
    findings = Findings()
    loss = info_nce(torch.ones(5, 4), torch.full((5, 4), math.nan), temperature=0.1, findings=findings)
    assert not torch.isfinite(loss)
    counts = [int(count) for count in findings.counts()]
    assert findings.broken(counts) == "keys: 5 of 5 embeddings are not finite"
    findings.refuse(counts, may_pass=True)
    with pytest.raises(EmbeddingError, match="not finite"):
        findings.refuse(counts)
