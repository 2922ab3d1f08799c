"""Manifest of a checkpoint: one immutable model, with one reader and one writer.

Unknown fields are kept. `to_json` returns the fields that were set, so a manifest that was read is written as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, TypeAdapter

from p2r.config import PretrainConfig
from p2r.documents import FewKeys, FileEntry, JsonRow, RelativePath, checked
from p2r.errors import CheckpointError, DamagedError
from p2r.storage import Storage

FORMAT = "p2r-checkpoint/1"
MANIFEST = "manifest.json"
_MAX_BYTES = 1 << 26


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class SavedConfig(_Strict):
    """Configuration of the run; only keys used before it is compared with the job's are named here."""

    steps: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)] = PretrainConfig.model_fields["zero_stage"].default

    def to_json(self) -> dict[str, object]:
        """Return all keys with their values."""
        return self.model_dump(exclude_unset=True)


class SavedState(_Strict):
    """JSON values that the next step depends on."""

    stream: Any = None
    """State of the data, see `p2r.data.stream.StreamState`."""
    running: Any = Field(default_factory=dict)
    """Running sums since the last report, see `p2r.engine.running.Sums`."""


class InitialWeights(JsonRow):
    """Origin of a run's initial weights."""

    url: str = ""
    """Location of the weights; empty in checkpoints of older versions."""
    format: str | None = None
    """Format of the artefact or checkpoint; `foreign`: a weights file of another tool."""
    manifest_sha256: str | None = None
    weights_sha256: str | None = None
    origins: list[str] | None = None
    """Pins of all pretraining data of the weights; None: unknown."""
    step: int | None = None
    source: str = ""
    """Name of another tool's network."""
    table: list[dict[str, JsonValue]] | None = None
    """Tensors of another tool that were matched and left out, with reasons; see `p2r.model.foreign.Row`."""
    citations: str | None = None
    """Citations in another tool's file."""


class CheckpointManifest(_Strict):
    """`manifest.json` of a checkpoint. Its paths and names cannot lead outside its folder."""

    format: str = FORMAT
    step: Annotated[int, Field(ge=0, lt=2**53)]
    state: SavedState
    config: SavedConfig
    world_size: Annotated[int, Field(ge=1, le=2**24)]
    files: Annotated[dict[RelativePath, FileEntry], FewKeys]
    tensors: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]], FailFast()] = []
    init_from: InitialWeights | None = None
    """Origin of the initial weights; None: random."""
    code_version: str = "unknown"
    """Version of p2r that wrote it."""

    @property
    def ranks_and_stage(self) -> tuple[int, int]:
        """Number of ranks and ZeRO stage of the run."""
        return self.world_size, self.config.zero_stage

    def to_json(self) -> dict[str, object]:
        """Return the fields that were set, as JSON values."""
        return self.model_dump(exclude_unset=True)


_CHECKPOINT = TypeAdapter(CheckpointManifest)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on the storage."""

    path: str
    """Path of its folder below `<storage>/pretrain`."""
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return self.manifest.step


def read_checkpoint(storage: Storage, path: str) -> SavedCheckpoint:
    """Read the manifest of the checkpoint at a path below `storage`.

    Raises:
        DamagedError: The manifest is absent or invalid.
        CheckpointError: Another version wrote it.
    """
    where = f"{path}/{MANIFEST}"
    value = storage.read_json(where, max_bytes=_MAX_BYTES)
    if not isinstance(value, dict):
        raise DamagedError(f"{storage.at(where)} is not a manifest: it is damaged")
    return SavedCheckpoint(path, parse_manifest(value, where=storage.at(where)))


def parse_manifest(value: Mapping[str, object], *, where: str) -> CheckpointManifest:
    """Validate the manifest of a checkpoint.

    Raises:
        DamagedError: The manifest breaks a rule; names the key.
        CheckpointError: Another version wrote it.
    """
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{where} has format {value.get('format')!r}, this version reads {FORMAT!r}; "
            "use the version of p2r that wrote it, or another storage URL"
        )
    manifest = checked(_CHECKPOINT, value, where=f"{where} is damaged:", error=DamagedError)
    if absent := [name for name in ("model", *manifest.tensors) if f"{name}.safetensors" not in manifest.files]:
        raise DamagedError(f"{where} is damaged: files lacks {absent[0]}.safetensors")
    return manifest
