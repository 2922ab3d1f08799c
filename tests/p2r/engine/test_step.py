"""However a step is cut over ranks and micro-batches, it is the same step; and it is the step that plain torch takes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p2r.config import ImageConfig, PretrainConfig
from p2r.data.batch import Batch, Group
from p2r.engine.build import build_engine, full_weights, inner_optimizer, join_process_group, set_mean_weights
from p2r.engine.objectives import PixelPairs, pixel_pair_loss
from p2r.engine.step import _alignment_sums, equivariance_error, take_step
from p2r.loss import corresponding_points
from p2r.model.pix2rep import Pix2Rep
from p2r.randomness import keyed_generator
from p2r.schedule import averaging
from p2r.views.pair import make_views
from tests.ranks import join_ranks, start_ranks

IMAGES = 4
STEPS = 2
LOSSES: dict[str, dict[str, Any]] = {
    "info_nce": {"temperature": 0.3, "learn_temperature": True, "exclude_within_mm": 6.0, "foreground_share": 0.5},
    "barlow_twins": {"name": "barlow_twins"},
    "reconstruction": {"reconstruction": {"weight": 2.0, "block_mm": 8.0}},
    "within images": {"negatives": "image", "reconstruction": {"weight": 2.0, "block_mm": 8.0}},
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
    engine = build_engine(Pix2Rep.of(settings), settings, world_size=world_size)
    losses, norms = [], []
    for step in range(STEPS):
        taken = take_step(engine, batch(step, rank, world_size), config=settings, learning_rate=1e-3)
        losses.append(float(taken.loss))
        norms.append(float(taken.update.gradient_norm))
    temperature = [] if engine.module.log_temperature is None else engine.module.log_temperature.tolist()
    engine.destroy()
    return {"losses": losses, "norms": norms, "temperature": temperature}


def run_rank(rank: int, folder: str, world_size: int, cases: dict[str, PretrainConfig]) -> None:
    results = {name: train(settings, rank, world_size) for name, settings in cases.items()}
    Path(folder, f"{world_size}-{rank}.json").write_text(json.dumps(results))
    if world_size == 2:
        Path(folder, f"guarded-{rank}.json").write_text(json.dumps({name: guarded(name, rank) for name in GUARDED}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("steps")
    cases: dict[int, dict[str, PretrainConfig]] = {1: {}, 2: {}, 4: {}}
    for loss, options in LOSSES.items():
        cases[1][f"{loss}, {WHOLE}"] = config(options, None)
        for cut, (world_size, micro_batch) in CUTS.items():
            cases[world_size][f"{loss}, {cut}"] = config(options, micro_batch)
    for loss in ("info_nce", "reconstruction"):
        for stage, micro_batch in {0: 2, 2: 1, 3: 2}.items():
            cases[1][f"{loss}, zero {stage}"] = config(LOSSES[loss], micro_batch, zero_stage=stage)
    cases[2]["cheap"] = config({**LOSSES["info_nce"], "negatives": "micro_batch"}, 1)
    starts = {size: start_ranks(size, folder, run_rank, str(folder), size, cases[size]) for size in (2, 4)}
    join_process_group(torch.device("cpu"))
    found: dict[str, Any] = {name: train(settings, 0, 1) for name, settings in cases[1].items()}
    for size, start in starts.items():
        join_ranks(start)
        of_ranks = [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)  # every rank reports the same
        found |= of_ranks[0]
    found["guarded"] = [json.loads((folder / f"guarded-{rank}.json").read_text()) for rank in range(2)]
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


@pytest.mark.parametrize("loss", ["info_nce", "reconstruction"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_nor_does_the_zero_stage(runs: dict[str, Any], stage: int, loss: str) -> None:
    whole, ours = runs[f"{loss}, {WHOLE}"], runs[f"{loss}, zero {stage}"]
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
    sums = _alignment_sums(queries[:4], keys[:4], weights[:4]) + _alignment_sums(queries[4:], keys[4:], weights[4:])
    assert equivariance_error(sums.tolist()) == pytest.approx(expected, rel=1e-5)
    same = _alignment_sums(queries, queries, torch.ones(9))
    assert equivariance_error(same.tolist()) == pytest.approx(0, abs=1e-6)
    collapsed = _alignment_sums(torch.ones(9, 5), torch.ones(9, 5), torch.ones(9))
    assert equivariance_error(collapsed.tolist()) == 1
    assert equivariance_error(_alignment_sums(queries[:1], keys[:1], weights[:1]).tolist()) is None


# Steps on two ranks, in two micro-batches, of which one cannot be taken; clipped, and with a mean of weights.
GUARDED = {
    f"{precision}, zero {stage}, {which}": (stage, precision, which)
    for precision, stages in {"fp32": (0, 1, 2, 3), "bf16": (1, 3)}.items()
    for stage in stages
    for which in (("gradient", "loss") if (precision, stage) == ("fp32", 2) else ("gradient",))
}
DECAY, CLIP_NORM, BAD = 0.6, 0.05, 1
STEPS_GUARDED = 3


def of_guarded(stage: int, precision: str) -> PretrainConfig:
    settings = config({"temperature": 0.3, "learn_temperature": True}, 1, zero_stage=stage)
    optimizer = settings.optimizer.model_copy(update={"clip_norm": CLIP_NORM})
    return settings.model_copy(update={"optimizer": optimizer, "precision": precision, "ema_decay": DECAY})


def state_of(engine: Any) -> dict[str, Any]:
    """Whole weights and their mean, and this rank's moments."""
    moments = [value.clone() for state in inner_optimizer(engine).state.values() for _, value in sorted(state.items())]
    return {"weights": full_weights(engine), "mean": full_weights(engine, mean=True), "moments": moments}


def guarded(name: str, rank: int) -> dict[str, Any]:
    stage, precision, which = GUARDED[name]
    settings = of_guarded(stage, precision)
    torch.manual_seed(0)
    model = Pix2Rep(settings.model, learnt_temperature=0.3)
    spoilt = torch.tensor(False)
    if which == "gradient":
        # What flows back into the head, on one rank: the loss itself is finite.
        model.head.register_full_backward_pre_hook(
            lambda module, gradients: (
                (gradients[0].index_fill(0, torch.tensor(0), math.inf),) if bool(spoilt) and rank == 1 else None  # type: ignore[index]
            )
        )
    engine = build_engine(model, settings, world_size=2)
    facts: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "kept": []}
    for step in range(STEPS_GUARDED):
        of_rank = batch(step, rank, 2)
        spoilt.fill_(step == BAD)
        if which == "loss" and step == BAD and rank == 1:
            of_rank.groups[0].voxels.fill_(math.nan)
        before = state_of(engine) if step == BAD else {}
        taken = take_step(
            engine,
            of_rank,
            config=settings,
            learning_rate=1e-2,
            averaging=averaging(step, decay=DECAY),
            aligns=step == 0,
        )
        facts["losses"].append(float(taken.loss) if math.isfinite(taken.loss) else None)
        facts["skipped"].append(bool(taken.update.is_skipped))
        if not taken.update.is_skipped:
            facts["norms"].append(float(taken.update.gradient_norm))
        if before:
            after = state_of(engine)
            same = [
                torch.equal(before[kind][key], after[kind][key]) for kind in ("weights", "mean") for key in before[kind]
            ]
            same += [torch.equal(*pair) for pair in zip(before["moments"], after["moments"], strict=True)]
            facts["kept"] = [all(same), len(same)]
    whole = state_of(engine)
    mean_before = [part.clone() for part in engine.mean_weights]
    for part in engine.mean_weights:
        part.zero_()
    set_mean_weights(engine, whole["mean"])
    facts["mean comes back"] = all(map(torch.equal, mean_before, engine.mean_weights))
    weights = full_weights(engine)
    facts["weights stay"] = all(torch.equal(weights[key], whole["weights"][key]) for key in weights)
    facts["weights"] = {key: whole["weights"][key].flatten()[:3].tolist() for key in weights}
    facts["mean"] = {key: whole["mean"][key].flatten()[:3].tolist() for key in weights}
    engine.destroy()
    return facts


def plain(settings: PretrainConfig, skipped: int) -> dict[str, Any]:
    """Do the same with plain torch, on one process and all images at once."""
    torch.manual_seed(0)
    model = Pix2Rep(settings.model, learnt_temperature=0.3)
    assert model.log_temperature is not None
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": 1e-4},
            {"params": [weight for weight in model.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        foreach=False,
        fused=False,
    )
    mean: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses, norms = [], []
    for step in range(STEPS_GUARDED):
        of_all = batch(step, 0, 1)
        image, inside = of_all.images(torch.device("cpu"))
        places: dict[str, Any] = {"epochs": of_all.epochs, "positions": of_all.positions}
        views = make_views(
            image, inside, config=settings.views, spacing_mm=of_all.spacing_mm, seed=settings.seed, **places
        )
        pairs = corresponding_points(
            views.warp,
            views.valid,
            num_points=20,
            generators=[keyed_generator(0, "points", 0, int(position)) for position in of_all.positions],
        )
        queries, keys = model(views.a, views.b, pairs.a, pairs.b)
        embedded = PixelPairs(
            queries,
            keys,
            weights=pairs.weight.flatten(),
            image=torch.arange(IMAGES).repeat_interleave(20),
            position_mm=pairs.a.flatten(0, 1),
        )
        loss = pixel_pair_loss(embedded, settings.loss, temperature=model.log_temperature.exp())
        losses.append(float(loss.detach()))
        if step == skipped:
            continue
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)))
        optimizer.step()
        for name, weight in model.named_parameters():
            share = max(1 - DECAY, 1 / (step + 2))
            mean[name] = (1 - share) * mean[name] + share * weight.detach()
    weights = {name: weight.detach().flatten()[:3].tolist() for name, weight in model.named_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "mean": {name: weight.flatten()[:3].tolist() for name, weight in mean.items()},
    }


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return plain(of_guarded(1, "fp32"), BAD)


@pytest.mark.parametrize("name", GUARDED)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all_and_changes_nothing(
    runs: dict[str, Any], name: str
) -> None:
    first, second = (of_rank[name] for of_rank in runs["guarded"])
    assert first["skipped"] == second["skipped"] == [step == BAD for step in range(STEPS_GUARDED)]
    assert first["kept"][0] and second["kept"][0]
    assert first["kept"][1] > 2 * len(first["weights"])  # moments, too
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    assert first["weights"] == second["weights"] and first["mean"] == second["mean"]
    assert first["mean comes back"] and first["weights stay"]
    assert (first["losses"][BAD] is None) == name.endswith("loss")


@pytest.mark.parametrize("name", GUARDED)
def test_every_zero_stage_takes_the_step_of_plain_torch(
    runs: dict[str, Any], reference: dict[str, Any], name: str
) -> None:
    is_exact = name.startswith("fp32")  # of bf16, gradients are rounded to 8 bits
    ours = runs["guarded"][0][name]
    assert min(reference["norms"]) > CLIP_NORM
    shown = [step for step, loss in enumerate(ours["losses"]) if loss is not None]
    assert [ours["losses"][step] for step in shown] == pytest.approx(
        [reference["losses"][step] for step in shown], rel=1e-5 if is_exact else 5e-3
    )
    assert ours["norms"] == pytest.approx(reference["norms"], rel=1e-4 if is_exact else 0.3)
    for kind in ("weights", "mean") if is_exact else ():
        for key, values in reference[kind].items():
            assert ours[kind][key] == pytest.approx(values, rel=1e-4, abs=1e-5), key
    assert ours["weights"] != ours["mean"]
