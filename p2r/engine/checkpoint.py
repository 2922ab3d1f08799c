"""Checkpoints on the job's storage: the complete state of training, and a manifest that is written last.

    <storage>/pretrain/checkpoints/step-00000100/
        model.safetensors        the whole model in fp32; read by `publish`
        ema.safetensors          the moving average of its weights, if enabled; then read by `publish`
        deepspeed/...            each rank's part of the engine; read on resume (pickles, from the job's own storage only)
        generators/rank-*...     the state of each rank's random generators
        manifest.json            step, stream state, config, code, digests of all files; a folder without it does not count

Saving: every rank writes its files to a local folder, while training waits, and uploads them while training continues
(`p2r.engine.uploading`). Loading: rank 0 finds the newest checkpoint with all bytes intact; one process per node fetches it.
A damaged checkpoint is set aside and reported: its manifest is renamed to damaged.json.
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
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2r.config import PretrainConfig, ProbeConfig
from p2r.engine.build import full_weights
from p2r.engine.checkpoint_manifest import (
    FORMAT,
    MANIFEST,
    CheckpointManifest,
    InitialWeights,
    SavedCheckpoint,
    read_checkpoint,
)
from p2r.engine.peers import Peers
from p2r.engine.universal import TAG, convert, is_plain, load_universal, refuse_inconvertible
from p2r.engine.uploading import Uploaded, Uploader, own_folder, path_of, step_of
from p2r.errors import CheckpointError, DamagedError
from p2r.storage import Storage, json_bytes
from p2r.version import __version__, code_version

Note = Callable[[str, int], None]
"""Receives a fault, as a row of faults.jsonl without time and attempt."""

# Keys that may change between a run and its resumption: they do not affect the results beyond rounding.
_CHANGEABLE_KEYS = (
    *("report_interval", "equivariance_interval", "checkpoint_interval", "keep_checkpoints", "keep_every", "corpus"),
    *("compile", "model.channels_last", "model.checkpoint_activations", "zero_stage"),
    *("deterministic", "max_skipped_steps", "max_replaced"),
    *("probe", *(f"probe.{name}" for name in ProbeConfig.model_fields)),
)
_DAMAGED = "damaged.json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """A checkpoint with all bytes intact, in a folder on this node."""

    saved: SavedCheckpoint
    url: str
    """URL of the checkpoint, for messages."""
    folder: Path
    """Folder of its files; the same for all ranks of the node."""
    is_mine: bool
    """True if this rank fetched it, and therefore converts and removes it."""
    note: str | None = None
    """Problems of newer checkpoints, if there are any."""


class Checkpoints:
    """The checkpoints of one run. Every rank has an instance; creating it is collective, as are `newest`, `load`, `save`, `finish`.

    Args:
        storage: `<storage>/pretrain`.
        config: Configuration of the run.
        note: Receives, on rank 0, every checkpoint that could not be used.
    """

    def __init__(self, storage: Storage, config: PretrainConfig, *, note: Note | None = None) -> None:
        self._storage, self._config, self._note = storage, config, note
        self._peers = Peers()
        self._uploader = Uploader(storage, self._peers, keep=config.keep_checkpoints, keep_every=config.keep_every)
        self._reported: Uploaded | None = None
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(own_folder())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Let a running upload finish: the run may have to resume from it."""
        self._uploader.close()
        self._stack.close()
        self._peers.close()

    @property
    def uploaded(self) -> Uploaded | None:
        """The newest complete checkpoint made by this process; only known on rank 0."""
        return self._uploader.newest

    def completed(self) -> str | None:
        """Return the path of a checkpoint completed since the last call; None if there is none."""
        before, self._reported = self._reported, self.uploaded
        return None if self._reported is None or self._reported == before else self._reported.path

    def newest(self) -> Fetched | None:
        """Fetch the newest sound checkpoint; see `usable_checkpoint`."""
        return usable_checkpoint(self._storage, self._peers, config=self._config, into=self._folder, note=self._note)

    def load(self, engine: Any, fetched: Fetched) -> dict[str, dict[str, Tensor]]:
        """Load a fetched checkpoint; see `load_checkpoint`."""
        return load_checkpoint(engine, fetched, self._peers, config=self._config)

    def save(
        self,
        engine: Any,
        *,
        step: int,
        state: Mapping[str, object],
        init_from: InitialWeights | None = None,
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Save the engine; the upload runs in the background. See `save_checkpoint`."""
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
        """Wait until the last saved checkpoint is complete.

        Raises:
            StorageError: The upload failed; raised on every rank.
        """
        self._uploader.finish()


def newest_checkpoint(storage: Storage) -> SavedCheckpoint | None:
    """Return the newest complete checkpoint below `storage` (`<storage>/pretrain`), or None.

    Its files are not checked; see `usable_checkpoint`.
    """
    for path in _complete_checkpoints(storage):
        try:
            return read_checkpoint(storage, path)
        except DamagedError:
            continue
    return None


def usable_checkpoint(
    storage: Storage, peers: Peers, *, config: PretrainConfig, into: Path, note: Note | None = None
) -> Fetched | None:
    """Fetch the newest sound checkpoint, the same on all ranks; None if there are no checkpoints. Collective.

    Args:
        storage: `<storage>/pretrain`.
        peers: The ranks.
        config: Configuration of the run, to which the newest checkpoint must belong.
        into: Folder of this process.
        note: Receives, on rank 0, every newer checkpoint that was skipped.

    Raises:
        CheckpointError: No checkpoint is sound, or they belong to another run. Or DeepSpeed cannot convert their number of
            workers and ZeRO stage to this run's.
        StorageError: The storage cannot be read at the moment.
    """
    folder = into / "fetched"
    found = peers.first(lambda: _fetch_newest_sound(storage, config, peers.world_size, folder, note))
    if found is None:
        return None
    saved, told = found
    hosts = peers.gather((socket.gethostname(), str(folder)))
    leader = next(rank for rank, (host, _) in enumerate(hosts) if host == hosts[peers.rank][0])

    def fetch_unless_there() -> None:
        if not folder.is_dir():
            _fetch_files(storage, saved, folder)

    is_mine = leader == peers.rank
    peers.together(fetch_unless_there if is_mine else _do_nothing)
    if Path(hosts[leader][1]).is_dir():
        folder = Path(hosts[leader][1])
    else:
        is_mine = True  # another machine with the same host name
    peers.together(fetch_unless_there)
    return Fetched(saved, storage.at(saved.path), folder, is_mine, told)


def save_checkpoint(
    engine: Any,
    uploader: Uploader,
    *,
    into: Path,
    step: int,
    config: PretrainConfig,
    state: Mapping[str, object],
    init_from: InitialWeights | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Save the engine at the same step on every rank. Waits for the previous upload, but not for its own.

    Args:
        engine: DeepSpeed engine.
        uploader: Uploads the files to the storage.
        into: Folder of this process.
        step: Number of optimizer steps taken.
        config: Configuration of the run, stored in the manifest.
        state: JSON values that the next step depends on (stream state, running sums).
        init_from: Origin of the run's initial weights.
        tensors: Further tensors that the next step depends on, equal on every rank: one file NAME.safetensors per entry.

    Raises:
        StorageError: The previous checkpoint could not be uploaded; raised on every rank.
    """
    began_s = time.monotonic()
    uploader.finish()
    peers = uploader.peers
    folder = into / path_of(step).rpartition("/")[2]
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    for script in folder.rglob("*.py"):
        script.unlink()  # DeepSpeed adds a conversion script
    weights = full_weights(engine)
    if peers.rank == 0:
        for name, values in {"model": weights, **(tensors or {})}.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in values.items()}, _tensor_file(folder, name)
            )
    generators = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(engine.device)
    _generator_file(folder, peers.rank).parent.mkdir(exist_ok=True)
    save_file(generators, _generator_file(folder, peers.rank))
    configuration = config.model_dump(mode="json")
    manifest = CheckpointManifest.model_validate(
        {
            "format": FORMAT,
            "step": step,
            "state": dict(state),
            "config": configuration,
            "config_sha256": hashlib.sha256(json_bytes(configuration)).hexdigest(),
            "world_size": peers.world_size,
            "init_from": None if init_from is None else init_from.to_json(),
            "tensors": sorted(tensors or {}),
            "code_version": __version__,
            "code": code_version(),
            "torch_version": str(torch.__version__),
            "files": {},  # known once they are uploaded
        }
    )
    uploader.start(folder, step, manifest=manifest, began_s=began_s)


def load_checkpoint(
    engine: Any, fetched: Fetched, peers: Peers, *, config: PretrainConfig
) -> dict[str, dict[str, Tensor]]:
    """Load a checkpoint into the engine, and remove the local copy. Collective.

    A different number of ranks or ZeRO stage is reached through a universal checkpoint, made by one process per node.

    Returns:
        The `tensors` that were passed to `save_checkpoint`.

    Raises:
        CheckpointError: DeepSpeed cannot convert the checkpoint.
    """
    then, now = fetched.saved.manifest.ranks_and_stage, (peers.world_size, config.zero_stage)
    if is_plain(then, now):
        engine.load_checkpoint(str(fetched.folder), tag=TAG)
    else:
        target = fetched.folder / "universal"
        peers.together(partial(convert, fetched.folder, target) if fetched.is_mine else _do_nothing)
        load_universal(engine, target, weights=_tensor_file(fetched.folder, "model"))
    generators = _generator_file(fetched.folder, peers.rank)
    if then[0] == now[0] and generators.is_file():  # with another number of ranks they start from the seed
        states = load_file(generators)
        torch.set_rng_state(states["cpu"])
        if engine.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], engine.device)
    tensors = {name: load_file(_tensor_file(fetched.folder, name)) for name in fetched.saved.manifest.tensors}
    peers.gather(None)
    if fetched.is_mine:
        shutil.rmtree(fetched.folder, ignore_errors=True)
    return tensors


def _do_nothing() -> None:
    """Take part in a collective without work of this rank."""


def refuse_other_config(manifest: CheckpointManifest, config: PretrainConfig, *, where: str) -> None:
    """Raise `CheckpointError` with every differing key if a checkpoint belongs to another run.

    A key that the version of the checkpoint did not have counts as its default.
    """
    saved, wanted = _flatten_keys(_complete_config(manifest)), _flatten_keys(config.model_dump(mode="json"))
    _add_contrasts(saved, wanted)
    changeable = set(_CHANGEABLE_KEYS)
    if config.loss.negatives != "micro_batch":  # otherwise it decides the negatives
        changeable.add("micro_batch")
    differing = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    differing = [key for key in differing if key not in changeable]
    if not differing:
        return
    lines = [f"  pretrain.{key}: {_describe_difference(key, saved, wanted)}" for key in differing]
    way = (
        "Restore these values. Or start a new run from its weights with --fork NAME. "
        "Or give the job another storage URL to start from scratch."
    )
    wrote = manifest.code_version
    if wrote != __version__ and any(key not in saved or key not in wanted for key in differing):
        way = f"p2r {wrote} wrote it, this is p2r {__version__}: resume with that version. {way}"
    raise CheckpointError("\n".join([f"{where} was made with another configuration:", *lines, way]))


def _add_contrasts(saved: dict[str, object], wanted: dict[str, object]) -> None:
    """Give the contrast of each corpus a key of its own: it decides the channel. The rest of `corpus` is compared by the stream."""
    # The stream refuses another number of corpora.
    both = zip(_contrasts_in(saved), _contrasts_in(wanted), strict=False)
    for number, (before, now) in enumerate(both):
        saved[f"corpus[{number}].contrast"], wanted[f"corpus[{number}].contrast"] = before, now


def _contrasts_in(config: Mapping[str, object]) -> list[object]:
    """Return the contrast that a configuration gives to each corpus."""
    corpora = config.get("corpus")
    return [share.get("contrast") for share in corpora] if isinstance(corpora, list) else [None]


def _complete_config(manifest: CheckpointManifest) -> dict[str, object]:
    """Return a checkpoint's configuration, with the defaults of keys that its version did not have.

    The default of a new key must keep the earlier behaviour (CONTRIBUTING.md). A configuration that this version cannot read
    is returned unchanged, and the comparison names the keys.
    """
    try:
        return PretrainConfig.model_validate(manifest.config.to_json()).model_dump(mode="json")
    except ValidationError:
        return manifest.config.to_json()


def _describe_difference(key: str, saved: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    if key not in wanted:
        return f"{saved[key]!r} in the checkpoint; this version of p2r has no such key"
    before = repr(saved[key]) if key in saved else "absent"
    return f"{before} in the checkpoint, {wanted[key]!r} in the job"


def refuse_other_ranks(manifest: CheckpointManifest, config: PretrainConfig, *, world_size: int, where: str) -> None:
    """Raise `CheckpointError` if `world_size` ranks on the configured ZeRO stage cannot load a checkpoint."""
    refuse_inconvertible(manifest.ranks_and_stage, (world_size, config.zero_stage), where=where)


def complete_steps(storage: Storage) -> list[int]:
    """Return the steps of the complete checkpoints below `<storage>/pretrain`, oldest first."""
    return sorted(map(step_of, _complete_checkpoints(storage)))


def _complete_checkpoints(storage: Storage) -> list[str]:
    """Return the paths of the checkpoints that have a manifest, newest first."""
    ending = f"/{MANIFEST}"
    paths = [path for path in storage.list("checkpoints") if path.endswith(ending) and step_of(path) >= 0]
    return [path.removesuffix(ending) for path in sorted(paths, key=step_of, reverse=True)]


def _fetch_newest_sound(
    storage: Storage, config: PretrainConfig, world_size: int, folder: Path, note: Note | None
) -> tuple[SavedCheckpoint, str | None] | None:
    """Fetch the newest sound checkpoint into a folder; return it, and the problems of newer ones."""
    complete = _complete_checkpoints(storage)
    damaged: dict[str, str] = {}
    taken = None
    for path in complete:
        try:
            saved = read_checkpoint(storage, path)
            refuse_other_config(saved.manifest, config, where=storage.at(path))
            refuse_other_ranks(saved.manifest, config, world_size=world_size, where=storage.at(path))
            _fetch_files(storage, saved, folder)
        except DamagedError as error:
            damaged[path] = str(error)
            continue
        taken = saved
        break
    if damaged and taken is None:
        reasons = "\n".join(f"  {reason}" for reason in damaged.values())
        raise CheckpointError(
            f"{storage.at('checkpoints')}: none of its {len(damaged)} checkpoints can be used:\n{reasons}\n"
            "Restore their files. Or remove the folder, or give the job another storage URL, to start from scratch."
        )
    step = -1 if taken is None else taken.step
    for path in _incomplete_checkpoints(storage, above=step):
        damaged[path] = f"{storage.at(path)} has no manifest: its upload was interrupted"
    if not damaged:
        return None if taken is None else (taken, None)
    way = "the run starts from scratch" if taken is None else f"using instead: {storage.at(taken.path)}"
    for path in damaged.keys() & set(complete):
        _set_aside(storage, path, damaged[path])
    told = "; ".join(damaged.values()) + f"; {way}"
    _LOG.warning("%s", told)
    if note is not None:
        note(told, max(step, 0))
    return None if taken is None else (taken, told)


def _incomplete_checkpoints(storage: Storage, *, above: int) -> list[str]:
    """Return, newest first, the checkpoints above a step that have files but neither a manifest nor the mark of damage."""
    paths = storage.list("checkpoints")
    ended = {step_of(path) for path in paths if path.endswith((f"/{MANIFEST}", f"/{_DAMAGED}"))}
    return [path_of(step) for step in sorted({step_of(path) for path in paths} - ended, reverse=True) if step > above]


def _fetch_files(storage: Storage, saved: SavedCheckpoint, folder: Path) -> None:
    """Download a checkpoint's files into a folder, all verified, or leave none.

    Raises:
        DamagedError: A file is absent, or differs from the manifest.
    """
    try:
        for name, entry in saved.manifest.files.items():
            storage.download(f"{saved.path}/{name}", folder / name, sha256=entry.sha256, num_bytes=entry.num_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _set_aside(storage: Storage, path: str, reason: str) -> None:
    """Exclude a damaged checkpoint, so that its step can be saved again; its files stay until they are outdated."""
    content = storage.read_bytes(f"{path}/{MANIFEST}").decode(errors="replace")
    storage.write_json(f"{path}/{_DAMAGED}", {"reason": reason, "manifest": content})
    storage.delete(f"{path}/{MANIFEST}")


def _tensor_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _generator_file(folder: Path, rank: int) -> Path:
    return folder / "generators" / f"rank-{rank:05d}.safetensors"


def _flatten_keys(value: Any, key: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {
            name: leaf
            for part, child in value.items()
            for name, leaf in _flatten_keys(child, f"{key}.{part}" if key else part).items()
        }
    return {key: value}
