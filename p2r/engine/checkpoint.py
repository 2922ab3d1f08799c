"""Checkpoints on the job's storage: everything that the next step depends on, and a manifest that is written last.

    <storage>/pretrain/checkpoints/step-00000100/
        model.safetensors        the whole model in fp32: what `publish` reads
        ema.safetensors          the running mean of its weights, if one is kept: what `publish` reads then
        deepspeed/...            each rank's part of the engine: what resuming reads (pickles, from the job's own storage only)
        manifest.json            step, stream state, config, digests of all files; a folder without it does not exist

Every rank writes its files to a local folder and uploads them; rank 0 writes the manifest when all are there.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from p2r import __version__
from p2r.config import PretrainConfig
from p2r.engine.build import full_weights, set_mean_weights
from p2r.errors import CheckpointError
from p2r.storage import Storage, file_sha256

FORMAT = "p2r-checkpoint/1"
# What may change between a run and its resumption: none of these touches the numbers, but for the last bits.
_FREE = (
    *("report_interval", "equivariance_interval", "checkpoint_interval", "keep_checkpoints", "corpus"),
    *("compile", "model.channels_last", "model.checkpoint_activations", "deterministic", "max_skipped_steps"),
)


def newest_checkpoint(storage: Storage) -> dict[str, Any] | None:
    """Return the manifest of the newest complete checkpoint below `storage` (`<storage>/pretrain`), or None."""
    manifests = [path for path in storage.list("checkpoints") if path.endswith("/manifest.json")]
    if not manifests:
        return None
    manifest: dict[str, Any] = storage.read_json(manifests[-1])
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{storage.at(manifests[-1])} has format {manifest.get('format')!r}, this version reads {FORMAT!r}; "
            "use the version of p2r that wrote it, or another storage URL"
        )
    return {**manifest, "path": manifests[-1].removesuffix("/manifest.json")}


def path_of(step: int) -> str:
    """Return where the checkpoint after a step lies below `<storage>/pretrain`."""
    return f"checkpoints/step-{step:08d}"


def save_checkpoint(
    engine: Any, storage: Storage, *, step: int, config: PretrainConfig, state: Mapping[str, Any], keep: int
) -> None:
    """Save the engine collectively; every rank calls this at the same step.

    Args:
        engine: DeepSpeed engine.
        storage: `<storage>/pretrain`.
        step: Number of optimizer steps taken.
        config: The run's configuration, kept in the manifest.
        state: JSON values that the next step depends on (stream state, running sums).
        keep: How many of the newest checkpoints survive.
    """
    path = path_of(step)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    with tempfile.TemporaryDirectory(prefix="p2r-checkpoint-") as name:
        folder = Path(name)
        engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        models = {"model": full_weights(engine)}
        if engine.mean_weights is not None:
            models["ema"] = full_weights(engine, mean=True)
        for kind, weights in models.items() if rank == 0 else ():
            save_file(weights, folder / f"{kind}.safetensors")
        files = {}
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix != ".py":
                relative = file.relative_to(folder).as_posix()
                storage.upload(file, f"{path}/{relative}")
                files[relative] = {"sha256": file_sha256(file), "num_bytes": file.stat().st_size}
    everyone: list[dict[str, Any] | None] = [None] * world_size
    distributed.all_gather_object(everyone, files)
    if rank == 0:
        manifest = {
            "format": FORMAT,
            "step": step,
            "state": dict(state),
            "config": config.model_dump(mode="json"),
            "world_size": world_size,
            "code_version": __version__,
            "torch_version": torch.__version__,
            "files": {name: entry for part in everyone if part for name, entry in part.items()},
        }
        storage.write_json(f"{path}/manifest.json", manifest)
        _remove_old(storage, keep)
    distributed.barrier()


def load_checkpoint(engine: Any, storage: Storage, manifest: Mapping[str, Any], *, config: PretrainConfig) -> None:
    """Load a checkpoint into the engine, after every check.

    Raises:
        CheckpointError: if it was made with another configuration, or by another number of ranks than ZeRO's partitions allow.
        StorageError: if a file is absent or is not what the manifest says.
    """
    where = storage.at(manifest["path"])
    refuse_other_config(manifest, config, where=where)
    world_size = distributed.get_world_size()
    if manifest["world_size"] != world_size and config.zero_stage > 0:
        raise CheckpointError(
            f"{where} was made by {manifest['world_size']} workers with ZeRO stage {config.zero_stage}, whose optimizer state is "
            f"partitioned among them; this run has {world_size}: set resources.num_workers={manifest['world_size']}"
        )
    with tempfile.TemporaryDirectory(prefix="p2r-checkpoint-") as name:
        for relative, entry in manifest["files"].items():
            local = storage.local(
                f"{manifest['path']}/{relative}", sha256=entry["sha256"], num_bytes=entry["num_bytes"]
            )
            if file_sha256(local) != entry["sha256"]:
                raise CheckpointError(
                    f"{storage.at(manifest['path'])}/{relative} does not have the sha256 of its manifest: it is damaged; "
                    f"remove {where} to resume from the checkpoint before it"
                )
            target = Path(name) / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, target)
        engine.load_checkpoint(name, tag="deepspeed")
        if engine.mean_weights is not None:
            set_mean_weights(engine, load_file(Path(name) / "ema.safetensors"))


def refuse_other_config(manifest: Mapping[str, Any], config: PretrainConfig, *, where: str) -> None:
    """Raise `CheckpointError`, naming every key that differs, if a checkpoint belongs to another run."""
    saved, wanted = _flat(manifest["config"]), _flat(config.model_dump(mode="json"))
    differing = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    differing = [key for key in differing if key not in _FREE]
    if differing:
        lines = "\n".join(
            f"  pretrain.{key}: {saved.get(key)!r} in the checkpoint, {wanted.get(key)!r} in the job"
            for key in differing
        )
        raise CheckpointError(
            f"{where} was made with another configuration:\n{lines}\n"
            "Restore these values, or give the job another storage URL to start anew."
        )


def _remove_old(storage: Storage, keep: int) -> None:
    manifests = [path for path in storage.list("checkpoints") if path.endswith("/manifest.json")]
    for path in manifests[:-keep]:
        storage.delete(path)  # first the manifest: from here on the checkpoint does not exist
        storage.delete(path.removesuffix("/manifest.json"))


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            name: leaf
            for part, child in value.items()
            for name, leaf in _flat(child, f"{key}.{part}" if key else part).items()
        }
    return {key: value}
