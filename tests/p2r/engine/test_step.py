"""However a step is cut over ranks and micro-batches, it is the same step."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from p2r.config import ImageConfig, PretrainConfig
from p2r.data.batch import Batch, Group
from p2r.engine.build import _clip_on_device, build_engine, join_process_group
from p2r.engine.step import _alignment, equivariance_error, pretrain_step
from p2r.model.pix2rep import Pix2Rep

IMAGES = 4
STEPS = 2
LOSSES: dict[str, dict[str, Any]] = {
    "info_nce": {"temperature": 0.3, "learn_temperature": True, "exclude_within_mm": 6.0, "foreground_share": 0.5},
    "barlow_twins": {"name": "barlow_twins"},
}
CUTS = {"1 x 4": (1, 1), "2 x 2": (2, 1), "4 x 1": (4, 1)}  # ranks, images of a micro-batch
WHOLE = "1 x 1, whole"


def config(loss: dict[str, Any], micro_batch: int | None, zero_stage: int = 1) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "image": {"size": 32, "spacing_mm": 2.0},
            "model": {"channels": (4, 4, 8, 8, 8), "feature_channels": 6, "head_channels": 8, "embedding_channels": 6},
            "loss": {"pixel_pairs_per_image": 20, **loss},
            "steps": STEPS,
            "global_batch": IMAGES,
            "micro_batch": micro_batch,
            "zero_stage": zero_stage,
        }
    )


def batch(step: int, rank: int, world_size: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    image = torch.rand(IMAGES, 1, 32, 32, generator=generator)
    part = slice(rank * IMAGES // world_size, (rank + 1) * IMAGES // world_size)
    positions = np.arange(IMAGES, dtype=np.int64) + IMAGES * step
    indices = [index for index in range(part.stop - part.start) if (step, part.start + index) != (1, 1)]
    shown = torch.tensor(indices, dtype=torch.long)  # image 1 of step 1 shows nothing
    group = Group(shown, image[part][shown, 0], torch.zeros(len(shown)), torch.ones(len(shown)), (2.0, 2.0))
    epochs = np.zeros_like(positions)
    return Batch((group,) * bool(indices), positions[part], epochs[part], ImageConfig(size=32, spacing_mm=2.0))


def train(settings: PretrainConfig, rank: int, world_size: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    learnt = settings.loss.temperature if settings.loss.learn_temperature else None
    engine = build_engine(Pix2Rep(settings.model, learnt_temperature=learnt), settings, world_size=world_size)
    losses, norms = [], []
    for step in range(STEPS):
        loss = pretrain_step(engine, batch(step, rank, world_size), config=settings, learning_rate=1e-3)
        losses.append(float(loss))
        norms.append(float(engine.get_global_grad_norm() or 0.0))  # DeepSpeed's stage 0 does not tell
    temperature = [] if engine.module.log_temperature is None else engine.module.log_temperature.tolist()
    engine.destroy()
    return {"losses": losses, "norms": norms, "temperature": temperature}


def run_rank(rank: int, folder: str, world_size: int, cases: dict[str, PretrainConfig]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world_size}", rank=rank, world_size=world_size
    )
    join_process_group(torch.device("cpu"))
    results = {name: train(settings, rank, world_size) for name, settings in cases.items()}
    Path(folder, f"{world_size}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("steps")
    cases: dict[int, dict[str, PretrainConfig]] = {1: {}, 2: {}, 4: {}}
    for loss, options in LOSSES.items():
        cases[1][f"{loss}, {WHOLE}"] = config(options, None)
        for cut, (world_size, micro_batch) in CUTS.items():
            cases[world_size][f"{loss}, {cut}"] = config(options, micro_batch)
    cases[1]["zero 2"] = config(LOSSES["info_nce"], 1, zero_stage=2)
    cases[1]["zero 0"] = config(LOSSES["info_nce"], 2, zero_stage=0)
    cases[2]["cheap"] = config({**LOSSES["info_nce"], "negatives": "micro_batch"}, 1)
    starts = {
        size: multiprocessing.spawn(run_rank, (str(folder), size, cases[size]), nprocs=size, join=False)
        for size in (2, 4)
    }
    join_process_group(torch.device("cpu"))
    found = {name: train(settings, 0, 1) for name, settings in cases[1].items()}
    for size, start in starts.items():
        while not start.join():
            pass
        of_ranks = [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)  # every rank reports the same
        found |= of_ranks[0]
    return found


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_and_micro_batches_do_not_change_the_step(runs: dict[str, Any], loss: str, cut: str) -> None:
    whole, ours = runs[f"{loss}, {WHOLE}"], runs[f"{loss}, {cut}"]
    assert len(ours["losses"]) == STEPS
    assert whole["losses"][0] != pytest.approx(whole["losses"][1], rel=1e-3)
    assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert ours["norms"] == pytest.approx(whole["norms"], rel=1e-4)
    assert ours["temperature"] == pytest.approx(whole["temperature"], rel=1e-6)


@pytest.mark.parametrize("stage", [0, 2])
def test_nor_does_the_zero_stage(runs: dict[str, Any], stage: int) -> None:
    whole, ours = runs[f"info_nce, {WHOLE}"], runs[f"zero {stage}"]
    assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-5)


def test_a_learnt_temperature_moves(runs: dict[str, Any]) -> None:
    assert runs[f"info_nce, {WHOLE}"]["temperature"] != pytest.approx([np.log(0.3)], abs=1e-4)


def test_negatives_of_micro_batches_are_another_objective(runs: dict[str, Any]) -> None:
    assert max(runs["cheap"]["losses"]) < min(runs[f"info_nce, {WHOLE}"]["losses"])


def test_reports_name_the_cheap_negatives() -> None:
    assert config({}, 1).negatives == "of the global batch"
    cheap = config({"negatives": "micro_batch"}, 1)
    assert cheap.negatives == "of micro-batches only (1 images of each worker)"


def test_the_equivariance_error_is_that_of_pairs_over_that_of_all_others() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(9, 5, generator=generator)
    keys = queries + 0.3 * torch.randn(9, 5, generator=generator)
    weights = torch.tensor([1.0] * 7 + [0.0] * 2)
    keys[8] = torch.nan
    cosine = torch.nn.functional.cosine_similarity(queries[:7, None], keys[None, :7], dim=2)
    others = torch.stack([1 - cosine[i, j] for i in range(7) for j in range(7) if i != j])
    expected = float((1 - cosine.diagonal()).mean() / others.mean())
    sums = _alignment(queries[:4], keys[:4], weights[:4]) + _alignment(queries[4:], keys[4:], weights[4:])
    assert equivariance_error(sums.tolist()) == pytest.approx(expected, rel=1e-5)
    same = _alignment(queries, queries, torch.ones(9))
    assert equivariance_error(same.tolist()) == pytest.approx(0, abs=1e-6)
    collapsed = _alignment(torch.ones(9, 5), torch.ones(9, 5), torch.ones(9))
    assert equivariance_error(collapsed.tolist()) == 1
    assert equivariance_error(_alignment(queries[:1], keys[:1], weights[:1]).tolist()) is None


@pytest.mark.parametrize(("norm", "factor"), [(5.0, 0.4), (1.5, 1.0)])
def test_clipping_on_the_device_scales_by_the_norm_of_all_ranks(norm: float, factor: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    _clip_on_device(optimizer, SimpleNamespace(_global_grad_norm=torch.tensor(norm)), 2.0)
    weight.grad = torch.tensor([3.0, 0.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -factor * torch.tensor([3.0, 0.0, 4.0]))


def test_clipping_without_waiting_gives_the_same_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    join_process_group(torch.device("cpu"))
    settings = config({}, None).model_copy(update={"precision": "bf16"})
    settings = settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update={"clip_norm": 0.01})})
    expected = train(settings, 0, 1)
    assert min(expected["norms"]) > 0.01
    monkeypatch.setattr("p2r.engine.build.is_waited_for", lambda device: True)
    assert train(settings, 0, 1) == expected
