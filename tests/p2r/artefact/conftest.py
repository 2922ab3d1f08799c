"""A small published folder, and ways to change it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2r.artefact import Manifest, Published, open_artefact
from p2r.backbone import verify_artefact
from p2r.reference import parse_reference
from tests.publishing import publish_toy


@pytest.fixture
def made(tmp_path: Path) -> Published[Manifest]:
    return publish_toy(str(tmp_path / "toy/1"))


@pytest.fixture
def folder(made: Published[Manifest]) -> Path:
    return Path(made["url"].removeprefix("file://"))


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def file_of(folder: Path, role: str) -> Path:
    return folder / manifest_of(folder)["files"][role]["name"]


def put_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)


def put(folder: Path, role: str, content: bytes) -> None:
    """Exchange a file, and have the manifest name it: what someone may do who may write the folder."""
    manifest, sha256 = manifest_of(folder), hashlib.sha256(content).hexdigest()
    stem, suffix = {"weights": ("model", ".safetensors"), "config": ("config", ".json"), "card": ("README", ".md")}[
        role
    ]
    file_of(folder, role).unlink()
    manifest["files"][role] = {"name": f"{stem}-{sha256}{suffix}", "sha256": sha256, "num_bytes": len(content)}
    (folder / f"{stem}-{sha256}{suffix}").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def verify(url: str | Path) -> None:
    verify_artefact(open_artefact(parse_reference(str(url))))


def with_manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_text(json.dumps({**manifest_of(folder), **changes}))  # type: ignore[return-value]
