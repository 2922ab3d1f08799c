"""The notebook in examples/ runs, cell by cell, on small data, with as few open files as some systems allow."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import pytest


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """A limit of 256 open files, as on older systems."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_open_files")
def test_the_first_hour_leads_from_scans_to_a_segmentation(
    repository: Path,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((repository / "examples/first_hour.ipynb").read_text())
    cells = {cell["id"]: cell for cell in notebook["cells"] if cell["cell_type"] == "code"}
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells.values())
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
    names: dict[str, Any] = {}
    for name, cell in cells.items():
        exec(compile("".join(cell["source"]), f"first_hour.ipynb, cell {name}", "exec"), names)
        if name == "settings":
            names |= {
                "folder": tmp_path,
                "scans": toy_data,
                "licence": "CC0-1.0",
                "provenance": "Toys",
                "changes": small,
            }
    assert nibabel.load(tmp_path / "segmentation.nii.gz").shape == (36, 40, 3)
    said = capsys.readouterr().out
    assert "fine_tune       1 labelled, draw 0: test Dice" in said and "(3, 4, 32, 32)" in said
    assert "label1: " in said and "licence: CC0-1.0" in (tmp_path / "job.yaml").read_text()
