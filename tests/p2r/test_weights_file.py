"""Weights files of other tools: no code of theirs runs, and each broken or hostile file is refused by name."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from p2r import weights_file
from p2r.errors import CheckpointError, StorageError
from p2r.reference import parse_reference
from p2r.storage import Storage
from p2r.weights_file import is_weights_file, read_weights_file

WEIGHTS = {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(3)}


def read(path: Path, pin: str = "") -> Any:
    return read_weights_file(parse_reference(f"{path}{pin}"), where=f"pretrain.init_from {path}")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("container", [None, "state_dict", "network_weights", "model"])
def test_tensors_are_found_under_the_usual_names(tmp_path: Path, container: str | None) -> None:
    path = tmp_path / "a.pth"
    torch.save({container: WEIGHTS, "epoch": 3} if container else WEIGHTS, path)
    found = read(path)
    assert all(torch.equal(found.tensors[name], value) for name, value in WEIGHTS.items())
    assert found.facts == ({"epoch": 3} if container else {})
    assert read(path, f"@sha256:{found.sha256}").sha256 == found.sha256
    with pytest.raises(CheckpointError, match="is pinned to sha256 0000"):
        read(path, f"@sha256:{'0' * 64}")


def test_safetensors_and_numpy_numbers_beside_the_weights_are_read(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").tensors.keys() == WEIGHTS.keys()
    # As nnU-Net writes them.
    facts = {"_best_ema": np.float64(0.7), "logging": {"losses": [np.float32(1.0), np.int64(2)]}, "trainer_name": "T"}
    torch.save({"network_weights": WEIGHTS, **facts}, tmp_path / "checkpoint_final.pth")
    found = read(tmp_path / "checkpoint_final.pth")
    assert found.tensors.keys() == WEIGHTS.keys() and found.facts["trainer_name"] == "T"


def test_a_pickle_with_code_is_refused_by_name_and_its_code_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": WEIGHTS, "hook": Evil()}, "evil.pth")
    with pytest.raises(
        CheckpointError, match=r"pickle that holds posix\.mkdir: reading it could run code .*safetensors"
    ):
        read(tmp_path / "evil.pth")
    torch.save(torch.nn.Linear(1, 1), "network.pth")
    with pytest.raises(CheckpointError, match=r"pickle that holds torch\.nn\.modules\.linear\.Linear"):
        read(tmp_path / "network.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save"):
        read(tmp_path / "plain.pth")
    assert not Path("evil").exists()


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(WEIGHTS, path)
    content = path.read_bytes()
    for name, broken in (("cut", content[: len(content) // 2]), ("empty", b""), ("text", b"no weights")):
        (tmp_path / f"{name}.pth").write_bytes(broken)
        (tmp_path / f"{name}.safetensors").write_bytes(broken)
        for suffix in ("pth", "safetensors"):
            with pytest.raises(CheckpointError, match="is not a"):
                read(tmp_path / f"{name}.{suffix}")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as out:
        for entry in archive.namelist():
            out.writestr(entry, archive.read(entry) + b"\0" * 10_000)
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
        read(tmp_path / "z.pth")
    torch.save({"epoch": 3, "args": "x"}, path)
    with pytest.raises(CheckpointError, match=r"holds no weights: expected tensors by name.*got epoch, args"):
        read(path)
    with pytest.raises(CheckpointError, match="does not exist; correct the path"):
        read(tmp_path / "none.pth")


def test_a_file_of_p2r_is_not_taken_for_one_of_another_tool(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert is_weights_file(parse_reference(str(path))) and not is_weights_file(parse_reference(str(tmp_path)))
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_weights_file(parse_reference(str(path)))


@pytest.mark.parametrize(("suffix", "loader"), [("pth", "_load_pickle"), ("safetensors", "_load_safetensors")])
def test_the_digest_is_of_the_bytes_that_are_loaded(
    tmp_path: Path, suffix: str, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / f"a.{suffix}", tmp_path / f"other.{suffix}"
    save: Any = torch.save if suffix == "pth" else save_file
    save(WEIGHTS, path)
    save({name: value + 1 for name, value in WEIGHTS.items()}, other)
    pin = f"@sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    load = getattr(weights_file, loader)

    def load_after_a_replacement(*arguments: Any) -> Any:
        other.replace(path)
        return load(*arguments)

    monkeypatch.setattr(weights_file, loader, load_after_a_replacement)
    found = read(path, pin)
    assert all(torch.equal(found.tensors[name], value) for name, value in WEIGHTS.items())


def test_a_copy_that_the_cache_evicts_before_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(WEIGHTS, tmp_path / "a.pth")
    monkeypatch.setattr(Storage, "local", lambda storage, path: tmp_path / "evicted")
    with pytest.raises(StorageError, match=r"cannot read file://.*/a\.pth: FileNotFoundError"):
        read(tmp_path / "a.pth")
