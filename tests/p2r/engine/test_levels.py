"""Multi-level contrast: the same pixel pairs at several decoder levels, each with a head of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from p2r.config import ModelConfig, PretrainConfig
from p2r.engine.weights import head_weights
from p2r.job import Job
from p2r.model.pix2rep import Pix2Rep, read_at
from p2r.storage import Storage
from tests.engine_runs import losses, train

JobOf = Callable[..., Job]
SMALL = ModelConfig(name="unet", channels=(8, 16, 24), feature_channels=8, head_channels=16, embedding_channels=12)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_row_holds_the_embeddings_of_every_level_and_the_finest_is_as_without_levels(dimensions: int) -> None:
    torch.manual_seed(0)
    plain = Pix2Rep(SMALL, dimensions=dimensions)
    torch.manual_seed(0)
    model = Pix2Rep(SMALL, dimensions=dimensions, levels=(1, 2))
    images = torch.randn(2, 2, 1, *[16] * dimensions)
    points = torch.randint(0, 16, (2, 2, 5, dimensions)).float()
    found, expected = (one(*images, *points) for one in (model, plain))
    for rows, finest in zip(found, expected, strict=True):
        assert rows.shape == (10, 36)
        torch.testing.assert_close(rows[:, :12], finest)
    # The last head reads maps with one vector per 4 pixels.
    (maps,) = plain.backbone.levels(torch.cat([*images]), [2])  # type: ignore[operator]
    places = (torch.cat([*points]) + 0.5) / 4 - 0.5
    queries, _ = model.level_heads[1](read_at(maps, places)).flatten(0, 1).chunk(2)
    torch.testing.assert_close(found[0][:, 24:], queries)
    (found[0].square().sum() + found[1].square().sum()).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.level_heads.parameters())
    assert head_weights(model.state_dict()).keys() == head_weights(plain.state_dict()).keys()


def test_a_run_at_several_levels_resumes_and_splits_to_the_same_digits(
    job_of: JobOf, corpus: Storage, tmp_path: Path
) -> None:
    job = job_of(tmp_path, "pretrain.loss.levels=[1, 2]")
    whole, broken, split = (Storage(str(tmp_path / name)) for name in ("whole", "broken", "split"))
    train(job, whole, corpus)
    train(job, broken, corpus, most=1)
    train(job, broken, corpus)
    assert losses(broken) == losses(whole)
    train(job_of(tmp_path, "pretrain.loss.levels=[1, 2]", "pretrain.micro_batch=2"), split, corpus)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)
    plain = Storage(str(tmp_path / "plain"))
    train(job_of(tmp_path), plain, corpus)
    assert losses(plain) != losses(whole)


@pytest.mark.parametrize("levels", [[9], [1, 1]])
def test_levels_that_the_network_lacks_are_refused(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="different levels from 1 to 4"):
        PretrainConfig.model_validate({"steps": 1, "global_batch": 2, "loss": {"levels": levels}})
    with pytest.raises(ValueError, match=r"loss\.levels need compile"):
        PretrainConfig.model_validate({"steps": 1, "global_batch": 2, "loss": {"levels": [1]}, "compile": True})
