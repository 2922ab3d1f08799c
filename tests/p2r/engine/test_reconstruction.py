"""Masked reconstruction: blocks of view b are hidden, and the features predict the intensities there."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from p2r.config import LossConfig, ModelConfig, PretrainConfig, ReconstructionConfig
from p2r.data.batch import Batch
from p2r.engine.build import build_engine, join_process_group
from p2r.engine.step import _draw_pairs, take_step
from p2r.engine.weights import head_weights, init_weights
from p2r.job import Job
from p2r.model.pix2rep import Pix2Rep
from p2r.model.reconstruction import ReconstructionHead, reconstruction_errors
from p2r.pipeline import report_pictures
from p2r.planning.tune_batch import noise_batch
from p2r.storage import Storage
from p2r.views.blocks import draw_blocks, mask_view
from p2r.views.draws import Draws
from p2r.views.pair import ViewPair
from tests.engine_runs import losses, train

JobOf = Callable[..., Job]
SMALL = ModelConfig(name="unet", channels=(8, 16, 24), feature_channels=8, head_channels=16, embedding_channels=12)
ON = "pretrain.loss.reconstruction={weight: 2.0, block_mm: 6}"


def draws_of(*samples: tuple[int, int], seed: int = 0) -> Draws:
    epochs, positions = (np.array(column) for column in zip(*samples, strict=True))
    return Draws.of_samples(seed, epochs=epochs, positions=positions)


@pytest.mark.parametrize("size", [(22, 16), (9, 12, 16)])
@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_masks_cover_the_stated_fraction_of_whole_blocks(size: tuple[int, ...], fraction: float) -> None:
    config = ReconstructionConfig(masked_fraction=fraction, block_mm=8.1)
    masked = draw_blocks(draws_of((0, 3), (0, 4), (1, 3)), size, config=config, spacing_mm=2.0)
    grid = [math.ceil(length / 4) for length in size]
    for mask in masked:
        found = 0
        for block in itertools.product(*map(range, grid)):
            pixels = mask[tuple(slice(4 * place, 4 * place + 4) for place in block)]
            assert pixels.all() or not pixels.any()
            found += bool(pixels.any())
        assert found == round(fraction * math.prod(grid))
    assert not torch.equal(masked[0], masked[1])  # of another sample
    assert not torch.equal(masked[0], masked[2])  # of another epoch
    alone = draw_blocks(draws_of((0, 4)), size, config=config, spacing_mm=2.0)
    assert torch.equal(alone[0], masked[1])
    assert not torch.equal(alone, draw_blocks(draws_of((0, 4), seed=1), size, config=config, spacing_mm=2.0))


def views_of(size: tuple[int, ...]) -> ViewPair:
    """Two images of two contrasts, of which the second image has only one; some pixels are outside the scan."""
    generator = torch.Generator().manual_seed(0)
    b = torch.rand(2, 2, *size, generator=generator)
    b[1, 0] = 0
    valid = torch.rand(2, *size, generator=generator) > 0.2
    shown = np.array([[True, True], [False, True]])
    return ViewPair(a=b, b=b, warp=torch.zeros(2, *size, len(size)), valid=valid, shown_a=shown, shown_b=shown)


@pytest.mark.parametrize("size", [(16, 16), (8, 8, 8)])
def test_the_error_is_that_of_masked_pixels_inside_the_scan_in_the_contrasts_shown(size: tuple[int, ...]) -> None:
    views, config = views_of(size), ReconstructionConfig(block_mm=4.0)
    draws = draws_of((0, 0), (0, 1))
    view = mask_view(views, draws, config=config, spacing_mm=1.0)
    blocks = draw_blocks(draws, size, config=config, spacing_mm=1.0)
    assert torch.equal(view.visible, views.valid & ~blocks)
    predicted = torch.randn(2, 2, *size, requires_grad=True)
    errors = reconstruction_errors(predicted, view.target, view.scored)
    expected, reached = [], torch.zeros_like(predicted, dtype=torch.bool)
    for image, contrasts in enumerate(([0, 1], [1])):
        squares = []
        for contrast in contrasts:
            inside = views.b[image, contrast][views.valid[image]]
            for pixel in itertools.product(*map(range, size)):
                is_masked, at = bool(blocks[(image, *pixel)]), (image, contrast, *pixel)
                assert float(view.image[at]) == (0.0 if is_masked else float(views.b[at]))
                if is_masked and views.valid[(image, *pixel)]:
                    wanted = (views.b[at] - inside.mean()) / inside.std(correction=0)
                    squares.append(float((predicted[at] - wanted).detach() ** 2))
                    reached[at] = True
        expected.append(sum(squares) / len(squares))
    assert errors.tolist() == pytest.approx(expected, rel=1e-4)
    errors.sum().backward()
    assert predicted.grad is not None and torch.equal(predicted.grad != 0, reached)
    # The mean of each view is an error of about 1; an image without scored pixels has none.
    means = reconstruction_errors(torch.zeros_like(predicted), view.target, view.scored)
    assert means.tolist() == pytest.approx([1.0, 1.0], abs=0.2)
    assert reconstruction_errors(predicted, view.target, torch.zeros_like(view.scored)).tolist() == [0.0, 0.0]


class Recorded(nn.Module):
    """A backbone that keeps its features."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        self.features: Tensor = self.backbone(images)
        self.features.retain_grad()
        return self.features


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_gradient_enters_the_features_of_view_b_at_scored_pixels_only(dimensions: int) -> None:
    torch.manual_seed(0)
    model = Pix2Rep(SMALL, dimensions=dimensions, reconstructs=True)
    model.backbone = Recorded(model.backbone)
    images = torch.rand(2, 2, 1, *[16] * dimensions)
    scored = torch.rand(2, 1, *[16] * dimensions) > 0.5
    points = torch.zeros(2, 2, 3, dimensions)
    model(*images, *points, images[1], scored)[2].sum().backward()
    gradient = model.backbone.features.grad
    assert gradient is not None
    assert torch.equal((gradient != 0).any(1), torch.cat([torch.zeros_like(scored), scored])[:, 0])
    assert all(weight.grad is not None and weight.grad.any() for weight in model.backbone.parameters())


def test_a_coarse_vector_predicts_every_pixel_that_it_covers() -> None:
    head = ReconstructionHead(3, 2, stride=2, dimensions=2)
    features = torch.zeros(1, 3, 4, 4)
    features[0, :, 1, 2] = 1.0
    reached = (head(features) - head(torch.zeros_like(features)) != 0).nonzero()
    assert {tuple(place) for place in reached.tolist()} == set(itertools.product([0], [0, 1], [2, 3], [4, 5]))


def test_other_weights_begin_as_without_the_term_and_only_they_are_published() -> None:
    torch.manual_seed(0)
    plain = Pix2Rep(SMALL).state_dict()
    torch.manual_seed(0)
    model = Pix2Rep(SMALL, reconstructs=True).state_dict()
    assert all(torch.equal(model[name], weight) for name, weight in plain.items())
    assert head_weights(model).keys() == head_weights(plain).keys()


def settings_of(**changes: Any) -> PretrainConfig:
    loss = {"pixel_pairs_per_image": 20, **changes.pop("loss", {})}
    model = {**SMALL.model_dump(exclude={"in_channels"}), **changes.pop("model", {})}
    image = {"size": 32, "spacing_mm": 2.0, **changes.pop("image", {})}
    values = {"steps": 2, "global_batch": 4, "image": image, "model": model, "loss": loss, **changes}
    return PretrainConfig.model_validate(values)


def step_of(settings: PretrainConfig, batch: Batch | None = None) -> Any:
    join_process_group(torch.device("cpu"))
    torch.manual_seed(0)
    engine = build_engine(Pix2Rep.of(settings), settings, world_size=1)
    batch = (
        noise_batch(settings.image, settings.global_batch, contrasts=settings.model.contrasts)
        if batch is None
        else batch
    )
    taken = take_step(engine, batch, config=settings, learning_rate=1e-3)
    engine.destroy()
    return taken


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"level": 1}},
        {"loss": {"levels": [1]}},
        {"image": {"dimensions": 3, "size": 16}},
        {"model": {"contrasts": ["flair", "t1"]}, "views": {"contrasts": "mixed"}},
        {"precision": "bf16"},
        {"loss": {"name": "barlow_twins"}},
        {"loss": {"negatives": "image"}},
    ],
    ids=str,
)
def test_the_loss_is_the_contrast_plus_the_weighted_error_in_one_pass_and_in_two(changes: dict[str, Any]) -> None:
    def taken(weight: float, **more: Any) -> Any:
        loss = {**changes.get("loss", {}), "reconstruction": {"weight": weight, "block_mm": 8}}
        return step_of(settings_of(**{**changes, "loss": loss, **more}))

    one, three = taken(1.0), taken(3.0)
    error, num = one.parts["reconstruction"].tolist()
    assert num == 4 and 0.1 < error / num < 10
    assert float(three.loss - one.loss) == pytest.approx(2 * error / num, rel=1e-3)
    split = taken(3.0, micro_batch=2)
    tolerance = 2e-2 if changes.get("precision") == "bf16" else 1e-4
    assert float(split.loss) == pytest.approx(float(three.loss), rel=tolerance)
    norms = [float(step.update.gradient_norm) for step in (split, three)]
    assert norms[0] == pytest.approx(norms[1], rel=tolerance)


def test_pixel_pairs_are_drawn_outside_masked_blocks_of_the_view_that_the_network_sees() -> None:
    settings = settings_of(loss={"reconstruction": {"block_mm": 8}})
    batch = noise_batch(settings.image, 4)
    drawn = _draw_pairs(batch, torch.device("cpu"), config=settings, timed=torch.profiler.record_function)
    draws = Draws.of_samples(settings.seed, epochs=batch.epochs, positions=batch.positions)
    assert settings.loss.reconstruction is not None
    masked = draw_blocks(draws, (32, 32), config=settings.loss.reconstruction, spacing_mm=2.0)
    assert not drawn.b[:, 0][masked].any() and drawn.b[:, 0][~masked].any()
    rows, columns = drawn.points_b.long().unbind(-1)
    assert drawn.weights.all() and not masked[torch.arange(4)[:, None], rows, columns].any()


def test_a_run_with_reconstruction_resumes_to_the_same_bits_and_may_begin_from_one_without(
    job_of: JobOf, corpus: Storage, tmp_path: Path
) -> None:
    job = job_of(tmp_path, ON)
    whole, broken, plain = (Storage(str(tmp_path / name)) for name in ("whole", "broken", "plain"))
    reports = train(job, whole, corpus)
    assert all(f"reconstruction error {report.loss_parts['reconstruction']:.3f}" in report.line() for report in reports)
    train(job, broken, corpus, most=1)
    train(job, broken, corpus)
    assert losses(broken) == losses(whole)
    newest = sorted(path for path in whole.list("checkpoints") if path.endswith("manifest.json"))[-1]
    assert (
        whole.read_json(newest)["files"]["model.safetensors"] == broken.read_json(newest)["files"]["model.safetensors"]
    )
    without = train(job_of(tmp_path), plain, corpus)
    assert "reconstruction" not in without[0].loss_parts and "reconstruction" not in without[0].line()
    assert job.pretrain is not None
    model = Pix2Rep.of(job.pretrain)
    init_weights(model, plain.at(newest.rpartition("/")[0]))


def test_the_picture_of_view_pairs_shows_the_masked_view(
    job_of: JobOf, corpus: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_pictures, "view_pairs", lambda images, views, *points, **options: views)
    sections = ("ingest=null", "kind=pretrain", "finetune=null", f"pretrain.corpus={corpus.url}")
    plain, masked = (
        report_pictures._draw_view_pairs(job_of(tmp_path, *sections, *more), corpus, source="") for more in ((), (ON,))
    )
    assert isinstance(plain, ViewPair) and isinstance(masked, ViewPair)
    hidden = plain.valid & ~masked.valid
    assert torch.equal(plain.a, masked.a) and hidden.any() and masked.valid.any()
    assert plain.b[:, 0][hidden].any() and not masked.b[:, 0][hidden].any()


def test_a_damaged_error_skips_the_step_and_is_named() -> None:
    settings = settings_of(loss={"reconstruction": {"block_mm": 8}})
    join_process_group(torch.device("cpu"))
    model = Pix2Rep.of(settings)
    assert model.reconstruction_head is not None
    model.reconstruction_head.register_forward_hook(lambda module, inputs, output: output * math.inf)
    engine = build_engine(model, settings, world_size=1)
    taken = take_step(engine, noise_batch(settings.image, 4), config=settings, learning_rate=1e-3)
    engine.destroy()
    assert bool(taken.update.is_skipped)
    counts = [int(count) for count in taken.findings.counts()]
    assert taken.findings.broken(counts) == "the reconstruction errors of 4 images are not finite"


def test_a_configuration_without_the_term_is_as_before_it_and_masks_of_nothing_or_all_are_refused() -> None:
    assert "reconstruction" not in LossConfig().model_dump()
    assert LossConfig.model_validate({"reconstruction": {}}).reconstruction == ReconstructionConfig()
    for options in ({"block_mm": 64}, {"masked_fraction": 0.01, "block_mm": 32}):
        with pytest.raises(ValueError, match="must mask some blocks of an image and leave others"):
            settings_of(loss={"reconstruction": options})
