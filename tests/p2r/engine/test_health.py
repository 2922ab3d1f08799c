"""Representations of which the truth is known."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from p2r.engine.health import embedding_health, sample_pairs


def pairs(queries: Tensor, keys: Tensor, weights: Tensor | None = None) -> Tensor:
    return torch.cat([queries, keys, torch.ones(len(queries), 1) if weights is None else weights[:, None]], 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_collapsed_embeddings() -> None:
    one = torch.tensor([3.0, 4.0, 0.0]).expand(50, 3)
    assert embedding_health(pairs(one, 2 * one)) == pytest.approx(
        {"alignment": 0, "uniformity": 0, "effective_rank": 1, "dead_dimensions_fraction": 1}, abs=1e-6
    )


def test_embeddings_spread_evenly_over_a_circle() -> None:
    # Of points at regular angles, the mean of exp(-2 d^2) with d^2 = 2 - 2 cos is that of exp(4 cos - 4): I_0(4) exp(-4).
    angle = 2 * math.pi * torch.arange(1000) / 1000
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    found = embedding_health(pairs(circle, -circle))
    assert found is not None
    everyone = float(torch.special.i0(torch.tensor(4.0, dtype=torch.float64))) * math.exp(-4)
    others = (everyone * 1000 - 1) / 999  # no point with itself
    assert found["uniformity"] == pytest.approx(math.log(others), rel=1e-4)
    assert found["alignment"] == pytest.approx(4, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(2, rel=1e-5)
    assert found["dead_dimensions_fraction"] == 0


def test_embeddings_spread_over_a_sphere_of_many_dimensions() -> None:
    found = embedding_health(pairs(noise(1000, 64), noise(1000, 64, seed=1)))
    assert found is not None
    assert found["alignment"] == pytest.approx(2, abs=0.05)  # a right angle
    assert found["uniformity"] == pytest.approx(-4 + 8 / 64, abs=0.02)  # E exp(4 cos) = exp(8 / E) for large E
    assert 62 < found["effective_rank"] < 64
    assert found["dead_dimensions_fraction"] == 0


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_embeddings_that_use_some_of_their_dimensions(rank: int) -> None:
    axes = torch.eye(16)[:rank].repeat(32, 1) * noise(32 * rank, 1).sign()
    found = embedding_health(pairs(axes, axes))
    assert found is not None
    assert found["effective_rank"] == pytest.approx(rank, rel=1e-5)
    assert found["dead_dimensions_fraction"] == pytest.approx(1 - rank / 16)
    turned = torch.linalg.qr(noise(16, 16))[0]
    found = embedding_health(pairs(axes @ turned, axes @ turned))
    assert found is not None
    assert found["effective_rank"] == pytest.approx(rank, rel=1e-4)


def test_pairs_that_show_nothing_do_not_count() -> None:
    queries, keys, weights = noise(30, 8), noise(30, 8, seed=1), (torch.arange(30) % 3 > 0).float()
    with_noise = pairs(queries.masked_fill(weights[:, None] == 0, math.nan), keys, weights)
    shown = weights > 0
    expected = embedding_health(pairs(queries[shown], keys[shown]))
    assert expected is not None
    assert embedding_health(with_noise) == pytest.approx(expected)
    assert embedding_health(pairs(queries, keys, torch.zeros(30))) is None
    assert embedding_health(pairs(queries * math.nan, keys)) is None


@pytest.mark.parametrize(("global_batch", "taken"), [(4, 200), (16, 50), (4096, 1)])
def test_the_same_pairs_are_taken_however_a_batch_is_cut(global_batch: int, taken: int) -> None:
    queries, keys, weights = noise(8 * 200, 4), noise(8 * 200, 4, seed=1), torch.ones(8 * 200)
    take = partial(sample_pairs, pairs_per_image=200, global_batch=global_batch)
    whole = take(queries, keys, weights)
    assert whole.shape == (8 * taken, 9)
    cut = [take(*(rows[part] for rows in (queries, keys, weights))) for part in (slice(400), slice(400, None))]
    assert torch.equal(torch.cat(cut), whole)
