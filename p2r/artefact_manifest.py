"""Manifest of a published artefact: strict, immutable models of `manifest.json`, and the names of the files that it lists."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from p2r.config.section import is_none
from p2r.documents import Details, Digests, FewKeys, Sha256
from p2r.files import file_sha256

Role = Literal["weights", "config", "card", "head", "unaveraged", "metrics", "picture"]

MAX_TEXT_BYTES = 2**20
_MAX_WEIGHTS_BYTES = 2**40
_NAMES: dict[Role, tuple[str, str]] = {
    "weights": ("model", ".safetensors"),
    "config": ("config", ".json"),
    "card": ("README", ".md"),
    "head": ("head", ".safetensors"),
    "unaveraged": ("unaveraged", ".safetensors"),
    "metrics": ("metrics", ".json"),
    "picture": ("training", ".png"),
}
"""Stem and suffix of each file."""

Text = Annotated[str, Field(max_length=20_000)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Strict):
    """Name, digest and size of a file in the folder."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0, le=_MAX_WEIGHTS_BYTES)]


class Files(_Strict):
    """Files of an artefact, by role."""

    weights: FileEntry
    config: FileEntry
    card: FileEntry | None = None
    """Model card; None only in version 1."""
    head: FileEntry | None = Field(default=None, exclude_if=is_none)
    """Projection head of pretraining."""
    unaveraged: FileEntry | None = Field(default=None, exclude_if=is_none)
    """Weights of the last step, if `weights` are their moving average."""
    metrics: FileEntry | None = Field(default=None, exclude_if=is_none)
    """Metrics of pretraining."""
    picture: FileEntry | None = Field(default=None, exclude_if=is_none)
    """Curves of pretraining."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for role in ("config", "card", "metrics", "picture"):
            entry: FileEntry | None = getattr(self, role)
            if entry is not None and entry.num_bytes > MAX_TEXT_BYTES:
                raise ValueError(f"{role} may have {MAX_TEXT_BYTES:,} bytes, got {entry.num_bytes:,}")
        return self

    def entries(self) -> dict[Role, FileEntry]:
        """Return the files that exist."""
        found: dict[Role, FileEntry | None] = {role: getattr(self, role) for role in _NAMES}
        return {role: entry for role, entry in found.items() if entry is not None}


class Parent(_Strict):
    """Origin of a run's initial weights."""

    reference: Text
    """Pin of a backbone or a checkpoint; the file's name of another tool's weights."""
    format: Text
    sha256: Sha256
    """Digest of its manifest; of another tool's weights, of the file."""
    step: Count | None = None


class Lineage(_Strict):
    """Origin of a backbone. Its corpora are listed in the manifest itself."""

    parents: Annotated[list[Parent], Field(max_length=100)] = []
    """Initial weights; empty: random ones."""
    origins: Annotated[list[Text], Field(max_length=1000)] = []
    """Pins of all corpora and backbones behind the parents."""
    checkpoint_sha256: Sha256
    """Digest of the manifest of the checkpoint that was published."""
    code: Annotated[str, Field(max_length=100)] = ""
    """Commit of the program that trained."""


class CorpusFacts(_Strict):
    """Facts about a corpus, kept with a backbone: enough to tell whether it contains a patient or scan."""

    url: Text
    sha256: Sha256
    weight: Annotated[float, Field(gt=0)] | None
    licence: Text
    provenance: Text
    cohort: Text
    num_samples: Count
    num_subjects: Count
    salt: Sha256
    subject_digests: Digests
    voxel_digests: Digests
    deidentification: Annotated[dict[Text, Text], FewKeys]


class Provenance(_Strict):
    """Origin of weights, and the terms of their use."""

    p2r_version: Annotated[str, Field(max_length=100)] = ""
    code: Annotated[str, Field(max_length=100)] = ""
    """Commit of the program that published the artefact."""
    licence: Text = "unknown"
    corpora: Annotated[list[CorpusFacts], Field(max_length=1000)] | None = None
    """Corpora on which the weights were pretrained; None: unknown. Of a backbone, an empty list counts as unknown, too."""


class Manifest(Provenance):
    """`manifest.json` of a backbone or a model."""

    format: Annotated[str, Field(pattern=r"^p2r-(backbone|model)/[12]$")]
    files: Files

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.format.endswith("/1"):
            return self
        if self.files.card is None:
            raise ValueError("files.card: missing")
        for role, entry in self.files.entries().items():
            if entry.name != file_name(role, entry.sha256):
                raise ValueError(f"files.{role}: its name must be {file_name(role, entry.sha256)}, got {entry.name}")
        return self


class BackboneManifest(Manifest):
    """`manifest.json` of a backbone."""

    job: Text | None = None
    description: Text | None = None
    step: Count | None = None
    samples_seen: Count | None = None
    pretrain: Details | None = None
    negatives: Text | None = None
    initial_weights: Details | None = Field(default=None, exclude_if=is_none)
    """Origin of initial weights from another tool, with the table of what was matched; None: none were used."""
    lineage: Lineage | None = Field(default=None, exclude_if=is_none)
    """Parents, checkpoint and commit; None: not trained by a job, or published by an earlier version."""


class ModelManifest(Manifest):
    """`manifest.json` of a segmentation model."""

    task: Text | None = None
    trial: Details | None = None
    validation: Details | None = None
    transductive: bool | None = None
    backbone_sha256: Sha256 | None = None


def file_name(role: Role, sha256: str) -> str:
    """Return the name of a file with this content."""
    stem, suffix = _NAMES[role]
    return f"{stem}-{sha256}{suffix}"


def entry_of(role: Role, local: Path) -> FileEntry:
    """Return the entry for a local file that is to be published."""
    sha256 = file_sha256(local)
    return FileEntry(name=file_name(role, sha256), sha256=sha256, num_bytes=local.stat().st_size)


def is_file_name(name: str) -> bool:
    """Return whether a file has a name that publishers give, of any role and content."""
    return any(re.fullmatch(rf"{stem}-[0-9a-f]{{64}}{re.escape(suffix)}", name) for stem, suffix in _NAMES.values())
