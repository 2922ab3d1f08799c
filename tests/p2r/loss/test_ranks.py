"""The loss of several ranks is the loss of their rows in one process, and so are its gradients.

Four processes are started once, over gloo. Each computes everything in groups of one, two and four, and writes the results
for the tests.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from p2r.errors import EmbeddingError
from p2r.loss import SameImage, barlow_twins, contrast, info_nce, info_nce_within_images
from p2r.loss.tiles import TILE

PROCESSES = 4
WORLDS = (2, 4)
NUM = 52
FORMS = ("cross_view", "nt_xent")
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_view": partial(info_nce, form="cross_view"),
    "nt_xent": partial(info_nce, form="nt_xent"),
    "ring, cross_view": partial(info_nce, form="cross_view", exchange="ring"),
    "ring, nt_xent": partial(info_nce, form="nt_xent", exchange="ring"),
    "decoupled": partial(info_nce, decoupled=True),
    "barlow_twins": lambda a, b, *, temperature, **rest: barlow_twins(a, b, off_diagonal_weight=0.1, **rest),
}
ZERO = [(stage, prescale) for stage in (0, 1, 2) for prescale in (False, True)]  # prescale_gradients


PANEL = NUM // PROCESSES
"""Ranks that have equally many rows have whole panels."""


@contextmanager
def panels_of(num_rows: int) -> Iterator[None]:
    """Compute entries within a view once for two panels of so many rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast, "PANEL", num_rows)
        yield


@pytest.fixture(autouse=True)
def small_panels() -> Iterator[None]:
    with panels_of(PANEL):
        yield


def rows(num: int, dtype: torch.dtype, channels: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(num, channels, generator=generator, dtype=torch.float64)
    return a.to(dtype), (a + 0.5 * torch.randn(num, channels, generator=generator, dtype=torch.float64)).to(dtype)


def parts(num: int, world: int, *, unequal: bool) -> list[slice]:
    """Split rows over the ranks; if unequal, the last rank has none."""
    if not unequal:
        bounds = [num * rank // world for rank in range(world + 1)]
    else:
        bounds = [0, *(num - 3 * rank for rank in range(world - 2, -1, -1)), num]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


class Network(nn.Module):
    """A layer and a temperature, with the loss in the forward pass, to test reducers."""

    def __init__(self, loss: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 5, dtype=dtype)
        self.log_temperature = nn.Parameter(torch.tensor([-2.0], dtype=dtype))
        self.loss = LOSSES[loss]

    def forward(self, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        temperature = self.log_temperature.exp()
        used = 0 * self.log_temperature  # by Barlow Twins too: a reducer waits for every parameter
        return (self.loss(self.layer(a), self.layer(b), temperature=temperature, **options) + used).squeeze()

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self.parameters() if parameter.grad is not None]


def through_network(loss: str, a: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    model = Network(loss, a.dtype)
    value = model(a, b, **options)
    value.backward()
    return value.detach(), model.gradients()


def of_rows(loss: Callable[..., Tensor], a: Tensor, b: Tensor, **options: Any) -> list[Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return list(torch.autograd.grad(loss(a, b, temperature=0.1, **options), (a, b)))


def metadata(part: slice) -> SameImage:
    position_mm = torch.arange(NUM).double()[:, None].expand(-1, 2) % 7
    return SameImage((torch.arange(NUM) // 9)[part], position_mm[part], radius_mm=4.0)


def within_images(a: Tensor, b: Tensor, *, num: int, group: Any) -> list[Tensor]:
    """The loss of four images over all ranks, and the gradients of a rank's own rows for a reducer that adds."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    loss = info_nce_within_images(a, b, num_images=num, temperature=0.1, group=group, gradient_scale="sum")
    return [loss.detach(), *torch.autograd.grad(loss, (a, b))]


def in_group(group: Any, world: int) -> dict[Any, Any]:
    rank = dist.get_rank(group)
    results: dict[Any, Any] = {}
    for loss in LOSSES:
        for unequal in (False, True):
            part = parts(NUM, world, unequal=unequal)[rank]
            a, b = (x[part] for x in rows(NUM, torch.float64))
            model = Network(loss, torch.float64)
            ddp = DistributedDataParallel(model, process_group=group)
            value = ddp(a, b, group=group)
            value.backward()
            added = through_network(loss, a, b, group=group, gradient_scale="sum")[1]
            for gradient in added:
                dist.all_reduce(gradient, group=group)
            options = {"group": group, "gradient_scale": "sum"}
            results[loss, unequal] = {
                "loss": value.detach(),
                "averaged": model.gradients(),
                "added": added,
                "rows": of_rows(LOSSES[loss], a, b, **options),
            }
            if loss != "barlow_twins":
                results[loss, unequal]["excluding"] = of_rows(LOSSES[loss], a, b, exclude=metadata(part), **options)
    part = parts(NUM, world, unequal=False)[rank]
    results["within images"] = within_images(*(x[part] for x in rows(NUM, torch.float64)), num=4 // world, group=group)
    for form in FORMS:
        part = parts(PROCESSES * TILE, world, unequal=False)[rank]
        a, b = (x[part] for x in rows(PROCESSES * TILE, torch.float32))
        with panels_of(TILE):
            results["whole tiles", form] = of_rows(LOSSES[form], a, b, group=group, gradient_scale="sum")
    return results


def refusals(rank: int) -> Iterator[str]:
    """Return the errors on this rank if rank 2 passes invalid values, or other arguments than the other ranks."""
    odd = rank == 2
    a = torch.ones(3, 4)
    for loss in (partial(info_nce, temperature=0.1), partial(barlow_twins, off_diagonal_weight=0.1)):
        wide, broken = torch.ones(3, 5 if odd else 4), a.clone()
        broken[1] = torch.nan if odd else 1.0
        for x, y in ((wide, wide), (a, torch.ones(2 if odd else 3, 4)), (a, broken)):
            try:
                loss(x, y)
            except ValueError as error:
                yield f"{type(error).__name__}: {error}"
    for options in (
        {"temperature": 0.2 if odd else 0.1},
        {"temperature": -1.0 if odd else 0.1},
        {"temperature": 0.1, "form": FORMS[odd]},
    ):
        try:
            info_nce(a, a, **options)
        except ValueError as error:
            yield f"{type(error).__name__}: {error}"


def through_deepspeed(stage: int, prescale: bool, rank: int) -> list[Tensor]:
    """Return gradients of the layer and the temperature, recovered from one step of plain gradient descent."""
    import deepspeed

    model = Network("nt_xent", torch.float32)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        dist_init_required=False,
        config={
            "train_batch_size": PROCESSES,
            "zero_optimization": {"stage": stage, "reduce_scatter": not prescale},  # it refuses both together
            "zero_allow_untested_optimizer": True,
            "prescale_gradients": prescale,
            "gradient_clipping": 0.0,  # it clips at 1 if not told otherwise
            "steps_per_print": 2**62,
        },
    )
    part = parts(NUM, PROCESSES, unequal=True)[rank]
    engine.backward(engine(*(x[part] for x in rows(NUM, torch.float32))))
    engine.step()
    after = [parameter.detach() for parameter in engine.module.parameters()]
    engine.destroy()
    return [old - new for old, new in zip(before, after, strict=True)]


def run_rank(rank: int, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed insists
    torch.set_num_threads(1)
    minutes = timedelta(seconds=240)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES, timeout=minutes
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([member]) for member in range(PROCESSES)][rank]
    with panels_of(PANEL):
        results: dict[Any, Any] = {4: in_group(dist.group.WORLD, 4), 2: in_group(pairs[rank // 2], 2)}
        a, b = rows(NUM, torch.float64)
        results["alone"] = {name: loss(a, b, temperature=0.1, group=alone) for name, loss in LOSSES.items()}
    results["refusals"] = list(refusals(rank))
    from p2r.engine.build import join_process_group

    join_process_group(torch.device("cpu"))
    results["deepspeed"] = {case: through_deepspeed(*case, rank) for case in ZERO}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_rank_returns_the_loss_of_all_rows(ranks: list[Any], loss: str, world: int, unequal: bool) -> None:
    expected, _ = through_network(loss, *rows(NUM, torch.float64))
    for results in ranks:
        torch.testing.assert_close(results[world][loss, unequal]["loss"], expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(results[world][loss, unequal]["loss"], ranks[0][world][loss, unequal]["loss"])


@pytest.mark.parametrize("reduced", ["averaged", "added"])
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_reduced_gradients_of_weights_and_temperature_are_those_of_one_process(
    ranks: list[Any], loss: str, world: int, unequal: bool, reduced: str
) -> None:
    _, expected = through_network(loss, *rows(NUM, torch.float64))
    for results in ranks:
        for ours, theirs in zip(results[world][loss, unequal][reduced], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_rank_computes_the_gradient_of_its_own_rows(ranks: list[Any], loss: str, world: int, unequal: bool) -> None:
    expected = of_rows(LOSSES[loss], *rows(NUM, torch.float64))
    for rank, results in enumerate(ranks):
        part = parts(NUM, world, unequal=unequal)[rank % world]
        for ours, theirs in zip(results[world][loss, unequal]["rows"], expected, strict=True):
            torch.testing.assert_close(ours, theirs[part], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "barlow_twins"])
def test_negatives_are_excluded_across_ranks(ranks: list[Any], loss: str, world: int, unequal: bool) -> None:
    expected = of_rows(LOSSES[loss], *rows(NUM, torch.float64), exclude=metadata(slice(None)))
    assert not torch.allclose(expected[0], of_rows(LOSSES[loss], *rows(NUM, torch.float64))[0])
    for rank, results in enumerate(ranks):
        part = parts(NUM, world, unequal=unequal)[rank % world]
        for ours, theirs in zip(results[world][loss, unequal]["excluding"], expected, strict=True):
            torch.testing.assert_close(ours, theirs[part], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_within_images_is_the_mean_over_all_ranks_images(ranks: list[Any], world: int) -> None:
    loss, *of_rows = within_images(*rows(NUM, torch.float64), num=4, group=None)
    for rank in range(world):
        found, *own = ranks[rank][world]["within images"]
        torch.testing.assert_close(found, loss)
        part = parts(NUM, world, unequal=False)[rank]
        torch.testing.assert_close(own, [gradient[part] for gradient in of_rows])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_whole_tiles_are_bitwise_equal(ranks: list[Any], form: str, world: int) -> None:
    num = PROCESSES * TILE
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with panels_of(TILE):
        expected = of_rows(LOSSES[form], *rows(num, torch.float32))
    torch.set_num_threads(threads)
    for rank, results in enumerate(ranks):
        part = parts(num, world, unequal=False)[rank % world]
        for ours, theirs in zip(results[world]["whole tiles", form], expected, strict=True):
            assert torch.equal(ours, theirs[part])


@pytest.mark.parametrize(("stage", "prescale"), ZERO)
def test_deepspeed_computes_the_gradients_of_one_process(ranks: list[Any], stage: int, prescale: bool) -> None:
    _, expected = through_network("nt_xent", *rows(NUM, torch.float32))
    for results in ranks:
        for ours, theirs in zip(results["deepspeed"][stage, prescale], expected, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_group_of_one_rank_is_one_process(ranks: list[Any], loss: str) -> None:
    expected = LOSSES[loss](*rows(NUM, torch.float64), temperature=0.1)
    for results in ranks:
        assert results["alone"][loss] == expected


def test_an_error_on_one_rank_is_raised_on_all_ranks(ranks: list[Any]) -> None:
    for results in ranks:
        assert results["refusals"] == ranks[0]["refusals"]
    of_info_nce, of_barlow, rest = (ranks[0]["refusals"][start : start + 3] for start in (0, 3, 6))
    for channels, shapes, values in (of_info_nce, of_barlow):
        assert channels.endswith("embedding channels must be the same on every rank, got by rank [4.0, 4.0, 5.0, 4.0]")
        assert shapes.startswith("ValueError: rank 2: expected ")
        assert "(3, 4) and (2, 4)" in shapes
        assert values.startswith(f"{EmbeddingError.__name__}: rank 2: ")
        assert "1 of 3 embeddings are not finite" in values
    assert "temperature must be the same on every rank, got by rank [0.1, 0.1, 0.2, 0.1]" in rest[0]
    assert "rank 2: temperature must be positive and finite, got -1.0" in rest[1]
    assert "form (1: nt_xent) must be the same on every rank" in rest[2]
