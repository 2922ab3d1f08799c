"""The loss of two ranks is the loss of their rows in one process, and so are the gradients of the weights.

Two processes are started once, over gloo; each computes everything and writes it down, and the tests read it.
"""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from p2r.loss import barlow_twins, info_nce
from p2r.loss.info_nce import _TILE

WORLD_SIZE = 2
FORMS = ("cross_view", "nt_xent")
LOSSES = {
    "cross_view": partial(info_nce, temperature=0.1, form="cross_view"),
    "nt_xent": partial(info_nce, temperature=0.1, form="nt_xent"),
    "barlow_twins": partial(barlow_twins, off_diagonal_weight=0.1),
}


def rows(num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(num, 6, generator=generator, dtype=torch.float64)
    return a.to(dtype), (a + 0.5 * torch.randn(num, 6, generator=generator, dtype=torch.float64)).to(dtype)


def network() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 5).double()


def part(tensor: Tensor, rank: int) -> Tensor:
    return tensor.chunk(WORLD_SIZE)[rank]


def through_network(loss: str, a: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    model = network()
    value = LOSSES[loss](model(a), model(b), **options)
    return value.detach(), list(torch.autograd.grad(value, list(model.parameters())))


def of_rows(loss: str, a: Tensor, b: Tensor, **options: Any) -> list[Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return list(torch.autograd.grad(LOSSES[loss](a, b, **options), (a, b)))


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    minute = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD_SIZE, timeout=minute)
    alone = [dist.new_group([member]) for member in range(WORLD_SIZE)][rank]
    results: dict[str, Any] = {}
    a, b = (part(x, rank) for x in rows(26, torch.float64))
    for loss in LOSSES:
        value, averaged = through_network(loss, a, b)
        _, added = through_network(loss, a, b, gradient_scale="sum")
        for gradient in (*averaged, *added):
            dist.all_reduce(gradient)
        results[loss] = {
            "loss": value,
            "averaged": [gradient / WORLD_SIZE for gradient in averaged],
            "added": added,
            "rows": of_rows(loss, a, b, gradient_scale="sum"),
            "alone": LOSSES[loss](a, b, group=alone),
        }
    whole_tiles = [part(x, rank) for x in rows(WORLD_SIZE * _TILE, torch.float32)]
    results["whole tiles"] = {form: of_rows(form, *whole_tiles, gradient_scale="sum") for form in FORMS}
    try:
        info_nce(torch.ones(3 + rank, 4), torch.ones(3 + rank, 4), temperature=0.1)
    except ValueError as error:
        results["unequal"] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_rank_returns_the_loss_of_all_rows(ranks: list[dict[str, Any]], loss: str) -> None:
    expected = LOSSES[loss](*(network()(x) for x in rows(26, torch.float64)))
    for results in ranks:
        torch.testing.assert_close(results[loss]["loss"], expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(ranks[0][loss]["loss"], ranks[1][loss]["loss"])


@pytest.mark.parametrize("reduced", ["averaged", "added"])
@pytest.mark.parametrize("loss", LOSSES)
def test_reduced_gradients_of_the_weights_are_those_of_one_process(
    ranks: list[dict[str, Any]], loss: str, reduced: str
) -> None:
    _, expected = through_network(loss, *rows(26, torch.float64))
    for results in ranks:
        for ours, theirs in zip(results[loss][reduced], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_rank_computes_the_gradient_of_its_own_rows(ranks: list[dict[str, Any]], loss: str) -> None:
    expected = of_rows(loss, *rows(26, torch.float64))
    for rank, results in enumerate(ranks):
        for ours, theirs in zip(results[loss]["rows"], expected, strict=True):
            torch.testing.assert_close(ours, part(theirs, rank), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_whole_tiles_are_the_same_to_the_bit(ranks: list[dict[str, Any]], form: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = of_rows(form, *rows(WORLD_SIZE * _TILE, torch.float32))
    torch.set_num_threads(threads)
    for rank, results in enumerate(ranks):
        for ours, theirs in zip(results["whole tiles"][form], expected, strict=True):
            assert torch.equal(ours, part(theirs, rank))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_group_of_one_rank_is_one_process(ranks: list[dict[str, Any]], loss: str) -> None:
    a, b = rows(26, torch.float64)
    for rank, results in enumerate(ranks):
        torch.testing.assert_close(results[loss]["alone"], LOSSES[loss](part(a, rank), part(b, rank)))


def test_unequal_numbers_of_rows_are_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "[3, 4]" in results["unequal"]
        assert "[4, 4]" in results["unequal"]
