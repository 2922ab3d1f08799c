"""Checkpoints on the job's storage: everything that the next step depends on, and a manifest that is written last.

    <storage>/pretrain/checkpoints/step-00000100/
        model.safetensors        the whole model in fp32: what `publish` reads
        ema.safetensors          the running mean of its weights, if one is kept: what `publish` reads then
        deepspeed/...            each rank's part of the engine: what resuming reads (pickles, from the job's own storage only)
        generators/rank-*...     the state of each rank's generators of random numbers
        manifest.json            step, stream state, config, code, digests of all files; a folder without it does not exist

Saving: every rank writes its files to a local folder, which training waits for, and uploads them while training goes on
(`p2r.engine.uploading`). Loading: rank 0 finds the newest checkpoint whose every byte is as it was written; one process of
each node fetches it for all. A damaged one is set aside, and told of: its manifest is renamed to damaged.json.
"""

import hashlib
import logging
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2r.config import PretrainConfig, ProbeConfig
from p2r.documents import FewKeys, FileEntry, RelativePath, checked
from p2r.engine.build import full_weights
from p2r.engine.peers import Peers
from p2r.engine.universal import TAG, convert, is_plain, load_universal, refuse_inconvertible
from p2r.engine.uploading import MANIFEST, Uploaded, Uploader, own_folder, path_of, step_of
from p2r.errors import CheckpointError, DamagedError
from p2r.storage import Storage, json_bytes
from p2r.version import __version__, code_version

FORMAT = "p2r-checkpoint/1"
Note = Callable[[Mapping[str, Any]], None]
"""Receives a fault, as a row of faults.jsonl without time and attempt."""

# What may change between a run and its resumption: none of these touches the numbers, but for the last bits.
_FREE = (
    *("report_interval", "equivariance_interval", "checkpoint_interval", "keep_checkpoints", "keep_every", "corpus"),
    *("compile", "model.channels_last", "model.checkpoint_activations", "zero_stage"),
    *("deterministic", "max_skipped_steps"),
    *("probe", *(f"probe.{name}" for name in ProbeConfig.model_fields)),
)
_MAX_MANIFEST_BYTES = 1 << 26
_DAMAGED = "damaged.json"
_LOG = logging.getLogger(__name__)


class _Config(BaseModel):
    """Of a run, what is read before it is compared with the job's."""

    model_config = ConfigDict(strict=True)  # all other keys are compared as they are
    zero_stage: Annotated[int, Field(ge=0, le=3)]


class _Manifest(BaseModel):
    """A checkpoint's `manifest.json`. Its paths and names lead nowhere but into its folder."""

    model_config = ConfigDict(strict=True)
    step: Annotated[int, Field(ge=0, lt=2**53)]
    state: dict[str, JsonValue]
    config: _Config
    world_size: Annotated[int, Field(ge=1, le=2**24)]
    files: Annotated[dict[RelativePath, FileEntry], FewKeys]
    tensors: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]], FailFast()] = []
    init_from: dict[str, JsonValue] | None = None


_MANIFEST = TypeAdapter(_Manifest)


@dataclass(frozen=True)
class Fetched:
    """A checkpoint of which every byte is as it was written, in a folder of this node."""

    manifest: dict[str, Any]
    """With the checkpoint's `path` below `<storage>/pretrain`."""
    url: str
    """Of the checkpoint, for messages."""
    folder: Path
    """Its files; the same for all ranks of the node."""
    is_mine: bool
    """Whether this rank has fetched it, and so converts and removes it."""
    note: str | None = None
    """What was wrong with newer ones, if there are any."""


class Checkpoints:
    """Those of one run, as its training meets them. Every rank has one; making it is collective, and so are `newest`, `load`,
    `save` and `finish`.

    Args:
        storage: `<storage>/pretrain`.
        config: The run's.
        note: Is told, on rank 0, of every checkpoint that could not be used.
    """

    def __init__(self, storage: Storage, config: PretrainConfig, *, note: Note | None = None) -> None:
        self._storage, self._config, self._note = storage, config, note
        self._peers = Peers()
        self._uploader = Uploader(storage, self._peers, keep=config.keep_checkpoints, keep_every=config.keep_every)
        self._told: Uploaded | None = None
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(own_folder())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Let an upload come to its end: what was saved last may be what the run goes on from."""
        self._uploader.close()
        self._stack.close()
        self._peers.close()

    @property
    def uploaded(self) -> Uploaded | None:
        """The newest complete checkpoint that this process has made; known to rank 0 alone."""
        return self._uploader.newest

    def completed(self) -> str | None:
        """Return the path of a checkpoint that was completed since this was asked before."""
        before, self._told = self._told, self.uploaded
        return None if self._told is None or self._told == before else self._told.path

    def newest(self) -> Fetched | None:
        """Fetch the newest sound checkpoint; see `usable_checkpoint`."""
        return usable_checkpoint(self._storage, self._peers, config=self._config, into=self._folder, note=self._note)

    def load(self, engine: Any, fetched: Fetched) -> dict[str, dict[str, Tensor]]:
        """Load it; see `load_checkpoint`."""
        return load_checkpoint(engine, fetched, self._peers, config=self._config)

    def save(
        self,
        engine: Any,
        *,
        step: int,
        state: Mapping[str, Any],
        init_from: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Save the engine, to be uploaded while training goes on; see `save_checkpoint`."""
        save_checkpoint(
            engine,
            self._uploader,
            into=self._folder,
            step=step,
            config=self._config,
            state=state,
            init_from=init_from,
            tensors=tensors,
        )

    def finish(self) -> None:
        """Wait until the checkpoint that was saved last is complete.

        Raises:
            StorageError: On every rank, if it could not be uploaded.
        """
        self._uploader.finish()


def newest_checkpoint(storage: Storage) -> dict[str, Any] | None:
    """Return the manifest of the newest complete checkpoint below `storage` (`<storage>/pretrain`), or None.

    Its files are not looked at; `usable_checkpoint` does that.
    """
    for path in _complete(storage):
        try:
            return _manifest(storage, path)
        except DamagedError:
            continue
    return None


def usable_checkpoint(
    storage: Storage, peers: Peers, *, config: PretrainConfig, into: Path, note: Note | None = None
) -> Fetched | None:
    """Fetch the newest checkpoint that is sound, the same on all ranks; None if there is none at all. Collective.

    Args:
        storage: `<storage>/pretrain`.
        peers: The ranks.
        config: The run's: the newest checkpoint must belong to it.
        into: A folder of this process.
        note: Is told, on rank 0, of every newer one that is not taken.

    Raises:
        CheckpointError: There are checkpoints, and none is sound; or they belong to another run, or to a number of workers
            and a ZeRO stage from which DeepSpeed finds no way to those of this run.
        StorageError: The storage cannot be read now.
    """
    folder = into / "fetched"
    found = peers.first(lambda: _newest_sound(storage, config, peers.world_size, folder, note))
    if found is None:
        return None
    manifest, told = found
    hosts = peers.gather((socket.gethostname(), str(folder)))
    leader = next(rank for rank, (host, _) in enumerate(hosts) if host == hosts[peers.rank][0])

    def fetch_unless_there() -> None:
        if not folder.is_dir():
            _fetch(storage, manifest, folder)

    is_mine = leader == peers.rank
    peers.together(fetch_unless_there if is_mine else _do_nothing)
    if Path(hosts[leader][1]).is_dir():
        folder = Path(hosts[leader][1])
    else:
        is_mine = True  # another machine of the same name
    peers.together(fetch_unless_there)
    return Fetched(manifest, storage.at(manifest["path"]), folder, is_mine, told)


def save_checkpoint(
    engine: Any,
    uploader: Uploader,
    *,
    into: Path,
    step: int,
    config: PretrainConfig,
    state: Mapping[str, Any],
    init_from: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Save the engine; every rank calls this at the same step. It waits for the upload before, and not for its own.

    Args:
        engine: DeepSpeed engine.
        uploader: Brings it to the storage.
        into: A folder of this process.
        step: Number of optimizer steps taken.
        config: The run's configuration, kept in the manifest.
        state: JSON values that the next step depends on (stream state, running sums).
        init_from: Where the run's first weights came from.
        tensors: More of what the next step depends on, the same on every rank: a file NAME.safetensors for each entry.

    Raises:
        StorageError: The checkpoint before could not be uploaded; on every rank.
    """
    began_s = time.monotonic()
    uploader.finish()
    peers = uploader.peers
    folder = into / path_of(step).rpartition("/")[2]
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    for script in folder.rglob("*.py"):
        script.unlink()  # DeepSpeed adds a program of its own
    weights = full_weights(engine)
    if peers.rank == 0:
        for name, values in {"model": weights, **(tensors or {})}.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, _named(folder, name))
    generators = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(engine.device)
    _generators(folder, peers.rank).parent.mkdir(exist_ok=True)
    save_file(generators, _generators(folder, peers.rank))
    configuration = config.model_dump(mode="json")
    facts = {
        "format": FORMAT,
        "step": step,
        "state": dict(state),
        "config": configuration,
        "config_sha256": hashlib.sha256(json_bytes(configuration)).hexdigest(),
        "world_size": peers.world_size,
        "init_from": None if init_from is None else dict(init_from),
        "tensors": sorted(tensors or {}),
        "code_version": __version__,
        "code": code_version(),
        "torch_version": torch.__version__,
    }
    uploader.start(folder, step, facts=facts, began_s=began_s)


def load_checkpoint(
    engine: Any, fetched: Fetched, peers: Peers, *, config: PretrainConfig
) -> dict[str, dict[str, Tensor]]:
    """Load a checkpoint into the engine, and remove the local copy. Collective.

    Other numbers of ranks, and other ZeRO stages, are led there by a universal checkpoint, which one process of each node
    makes.

    Returns:
        What `save_checkpoint` was given as `tensors`.

    Raises:
        CheckpointError: DeepSpeed cannot convert it.
    """
    then, now = _ranks_and_stage(fetched.manifest), (peers.world_size, config.zero_stage)
    if is_plain(then, now):
        engine.load_checkpoint(str(fetched.folder), tag=TAG)
    else:
        target = fetched.folder / "universal"
        peers.together(partial(convert, fetched.folder, target) if fetched.is_mine else _do_nothing)
        load_universal(engine, target, weights=_named(fetched.folder, "model"))
    generators = _generators(fetched.folder, peers.rank)
    if then[0] == now[0] and generators.is_file():  # else they begin anew: there are more of them, or fewer
        states = load_file(generators)
        torch.set_rng_state(states["cpu"])
        if engine.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], engine.device)
    tensors = {name: load_file(_named(fetched.folder, name)) for name in fetched.manifest.get("tensors", [])}
    peers.gather(None)
    if fetched.is_mine:
        shutil.rmtree(fetched.folder, ignore_errors=True)
    return tensors


def _do_nothing() -> None:
    """What a rank does while another one works for it."""


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
            "Restore these values; or start a new run from its weights, beside this one, with --fork NAME; "
            "or give the job another storage URL to start anew."
        )


def refuse_other_ranks(manifest: Mapping[str, Any], config: PretrainConfig, *, world_size: int, where: str) -> None:
    """Raise `CheckpointError` if a checkpoint cannot be loaded by so many ranks on the stage that `config` names."""
    refuse_inconvertible(_ranks_and_stage(manifest), (world_size, config.zero_stage), where=where)


def _complete(storage: Storage) -> list[str]:
    """Return the paths of the checkpoints that have a manifest, newest first."""
    ending = f"/{MANIFEST}"
    paths = [path for path in storage.list("checkpoints") if path.endswith(ending) and step_of(path) >= 0]
    return [path.removesuffix(ending) for path in sorted(paths, key=step_of, reverse=True)]


def _manifest(storage: Storage, path: str) -> dict[str, Any]:
    """Return a checkpoint's manifest with its path.

    Raises:
        DamagedError: It is absent, or no manifest.
        CheckpointError: Another version's.
    """
    where = f"{path}/{MANIFEST}"
    manifest = storage.read_json(where, max_bytes=_MAX_MANIFEST_BYTES)
    if not isinstance(manifest, dict):
        raise DamagedError(f"{storage.at(where)} is not a manifest: it is damaged")
    check_manifest(manifest, where=storage.at(where))
    return {**manifest, "path": path}


def check_manifest(manifest: Mapping[str, Any], *, where: str) -> None:
    """Refuse what is no manifest of a checkpoint.

    Raises:
        DamagedError: It breaks a rule: names the key.
        CheckpointError: Another version's.
    """
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{where} has format {manifest.get('format')!r}, this version reads {FORMAT!r}; "
            "use the version of p2r that wrote it, or another storage URL"
        )
    found = checked(_MANIFEST, manifest, where=f"{where} is damaged:", error=DamagedError)
    if absent := [name for name in ("model", *found.tensors) if f"{name}.safetensors" not in found.files]:
        raise DamagedError(f"{where} is damaged: files lacks {absent[0]}.safetensors")


def _newest_sound(
    storage: Storage, config: PretrainConfig, world_size: int, folder: Path, note: Note | None
) -> tuple[dict[str, Any], str | None] | None:
    """Fetch the newest sound checkpoint into a folder; return its manifest, and what was wrong with newer ones."""
    complete = _complete(storage)
    damaged: dict[str, str] = {}
    taken = None
    for path in complete:
        try:
            manifest = _manifest(storage, path)
            refuse_other_config(manifest, config, where=storage.at(path))
            refuse_other_ranks(manifest, config, world_size=world_size, where=storage.at(path))
            _fetch(storage, manifest, folder)
        except DamagedError as error:
            damaged[path] = str(error)
            continue
        taken = manifest
        break
    if damaged and taken is None:
        reasons = "\n".join(f"  {reason}" for reason in damaged.values())
        raise CheckpointError(
            f"{storage.at('checkpoints')}: none of its {len(damaged)} checkpoints can be used:\n{reasons}\n"
            "Restore their files; or remove the folder, or give the job another storage URL, to start anew."
        )
    step = -1 if taken is None else int(taken["step"])
    for path in _incomplete(storage, above=step):
        damaged[path] = f"{storage.at(path)} has no manifest: whoever uploaded it did not finish"
    if not damaged:
        return None if taken is None else (taken, None)
    way = "the run begins anew" if taken is None else f"taken instead: {storage.at(taken['path'])}"
    for path in damaged.keys() & set(complete):
        _set_aside(storage, path, damaged[path])
    told = "; ".join(damaged.values()) + f"; {way}"
    _LOG.warning("%s", told)
    if note is not None:
        note({"cause": "checkpoint", "what": told, "decision": "fall back", "from_step": max(step, 0)})
    return None if taken is None else (taken, told)


def _incomplete(storage: Storage, *, above: int) -> list[str]:
    """Return, newest first, the checkpoints above a step of which there are files and neither manifest nor the mark of damage."""
    paths = storage.list("checkpoints")
    ended = {step_of(path) for path in paths if path.endswith((f"/{MANIFEST}", f"/{_DAMAGED}"))}
    return [path_of(step) for step in sorted({step_of(path) for path in paths} - ended, reverse=True) if step > above]


def _fetch(storage: Storage, manifest: Mapping[str, Any], folder: Path) -> None:
    """Make a folder of a checkpoint's files, all of them as they were written, or leave none.

    Raises:
        DamagedError: A file is absent, or is not what the manifest says.
    """
    try:
        for name, entry in manifest["files"].items():
            storage.download(
                f"{manifest['path']}/{name}", folder / name, sha256=entry["sha256"], num_bytes=entry["num_bytes"]
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _set_aside(storage: Storage, path: str, reason: str) -> None:
    """Take a damaged checkpoint out of the count, so that its step may be saved again; its files stay until it is outdated."""
    content = storage.read_bytes(f"{path}/{MANIFEST}").decode(errors="replace")
    storage.write_json(f"{path}/{_DAMAGED}", {"reason": reason, "manifest": content})
    storage.delete(f"{path}/{MANIFEST}")


def _ranks_and_stage(manifest: Mapping[str, Any]) -> tuple[int, int]:
    return int(manifest["world_size"]), int(manifest["config"]["zero_stage"])


def _named(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _generators(folder: Path, rank: int) -> Path:
    return folder / "generators" / f"rank-{rank:05d}.safetensors"


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            name: leaf
            for part, child in value.items()
            for name, leaf in _flat(child, f"{key}.{part}" if key else part).items()
        }
    return {key: value}
