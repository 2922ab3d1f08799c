"""What fits is found by trying; how it is shared follows from the global batch."""

import shutil
import sys

import pytest
import torch

from p2r.config import ImageConfig, PretrainConfig
from p2r.errors import InputError, TrainingError
from p2r.planning import tune_batch as module
from p2r.planning.tune_batch import BatchTrial, Cut, cuts_of, noise_batch, run_batch_trial, tune_batch

CPU = torch.device("cpu")
CONFIG = PretrainConfig.model_validate(
    {
        "image": {"size": 16, "spacing_mm": 2.0},
        "model": {"name": "unet", "channels": [4, 4, 8], "feature_channels": 4, "head_channels": 8},
        "loss": {"pixel_pairs_per_image": 8},
        "steps": 10,
        "global_batch": 24,
    }
)


def test_a_trial_measures_memory_and_speed_in_a_process_of_its_own() -> None:
    trial = run_batch_trial(CONFIG, BatchTrial(2, 8), device=CPU, limit_mib=8192)
    assert trial.fits
    assert trial.peak_mib is not None and 50 < trial.peak_mib < 8192
    assert trial.images_per_s is not None and trial.images_per_s > 0


def test_a_trial_beyond_the_limit_does_not_fit() -> None:
    assert not run_batch_trial(CONFIG, BatchTrial(2, 8), device=CPU, limit_mib=100).fits


def test_a_trial_that_fails_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(TrainingError, match="a trial of 2 images with 8 pairs failed: exit code 1"):
        run_batch_trial(CONFIG, BatchTrial(2, 8), device=CPU, limit_mib=8192)


def test_images_are_doubled_then_halved_and_pairs_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measured(config: PretrainConfig, trial: BatchTrial, *, device: torch.device, limit_mib: float) -> BatchTrial:
        tried.append((trial.images, trial.pairs))
        peak = trial.images * (100 + trial.pairs)
        return BatchTrial(trial.images, trial.pairs, peak, 1.0) if peak <= limit_mib else trial

    monkeypatch.setattr(module, "run_batch_trial", measured)
    found = tune_batch(CONFIG, device=CPU, memory_gib=3000 / 1024 / 0.9, say=lambda line: None)
    assert tried == [*((n, 8) for n in (1, 2, 4, 8, 16, 32, 24, 28)), (24, 16), (24, 32)]
    assert (found.images, found.pairs) == (24, 16)
    with pytest.raises(InputError, match="one image with 8 pixel pairs does not fit"):
        tune_batch(CONFIG, device=CPU, memory_gib=0.1, say=lambda line: None)


def test_every_allowed_number_of_workers_gets_the_largest_micro_batch_that_fits() -> None:
    assert cuts_of(24, 5) == (
        Cut(1, 24, 4),
        Cut(2, 12, 4),
        Cut(3, 8, 4),
        Cut(4, 6, 3),
        Cut(6, 4, None),
        Cut(8, 3, None),
        Cut(12, 2, None),
        Cut(24, 1, None),
    )


def test_a_cpu_has_to_be_told_its_memory() -> None:
    with pytest.raises(InputError, match="--memory-gib"):
        tune_batch(CONFIG, device=CPU, memory_gib=None, say=lambda line: None)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_noise_is_a_batch_like_any_other(dimensions: int) -> None:
    images, inside = noise_batch(ImageConfig.model_validate({"dimensions": dimensions, "size": 8}), 3).images()
    assert images.shape == (3, 1, *[8] * dimensions)
    assert inside.all() and 0.3 < images.mean() < 0.7
