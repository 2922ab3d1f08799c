"""The scripts in examples/ run, on small data."""

import importlib.util
from pathlib import Path

import nibabel
import pytest


def test_the_first_hour_leads_from_scans_to_a_segmentation(
    repository: Path,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("P2R_LICENCE", "P2R_PROVENANCE"):
        monkeypatch.setenv(name, "CC0-1.0")
    spec = importlib.util.spec_from_file_location("first_hour", repository / "examples/first_hour.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = {
        "pretrain__steps": 2,
        "pretrain__global_batch": 4,
        "pretrain__image": {"size": 32, "spacing_mm": 2.0},
        "pretrain__model": {"channels": [4, 4, 8, 8, 8], "feature_channels": 4, "head_channels": 8},
        "finetune__steps": 4,
        "finetune__num_labelled": [1],
        "finetune__draws": 1,
        "finetune__modes": ["fine_tune"],
        "finetune__batch_size": 2,
    }
    output = script.main(tmp_path, toy_data, **small)
    assert nibabel.load(output).shape == (36, 40, 3)
    said = capsys.readouterr().out
    assert "fine_tune       1 labelled, draw 0: test Dice" in said and "features (3, 4, 32, 32)" in said
    assert "label1: " in said
