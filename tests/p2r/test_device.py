"""Which device a process computes on, and drivers that do not serve it."""

from pathlib import Path

import pytest
import torch

from p2r import device
from p2r.errors import InputError

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver that this torch, built for CUDA 13.0, cannot use."""
    path = tmp_path / "version"
    path.write_text(VERSION)
    monkeypatch.setattr(device, "_DRIVER", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return path


@pytest.mark.usefixtures("driver")
def test_a_driver_too_old_for_this_torch_is_named_with_the_line_that_installs_another() -> None:
    with pytest.raises(
        InputError, match=r"driver \(470\.82\.01\) does not run torch .* for CUDA 13\.0: .*pip install torch"
    ):
        device.this_device()


def test_without_a_driver_or_where_gpus_are_hidden_it_is_the_cpu(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.this_device() == torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver.unlink()
    assert device.this_device() == torch.device("cpu")
