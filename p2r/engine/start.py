"""Start of a run: configuration and newest checkpoint -> a run that is ready for its next step."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from p2r.config import PretrainConfig
from p2r.counters import Counters
from p2r.data.order import check_micro_batch
from p2r.data.parts import Balance
from p2r.data.stream import Corpus, Quarantine, Replaced, StreamState, stream
from p2r.engine.build import DTYPES, build_engine, set_mean_weights
from p2r.engine.checkpoint import Checkpoints, Fetched
from p2r.engine.checkpoint_manifest import CheckpointManifest, InitialWeights, SavedCheckpoint
from p2r.engine.corpora import agreed_balance, agreed_corpora, state_of
from p2r.engine.feed import Batches, Timed, feed
from p2r.engine.objectives import explain_missing_kernels
from p2r.engine.online_probe import OnlineProbe
from p2r.engine.peers import Peers
from p2r.engine.profile import Profiler
from p2r.engine.running import Clock, HistoryRows, OnAnyRank, Sums, UnreadSteps, never
from p2r.engine.weights import init_weights
from p2r.errors import CheckpointError, InputError
from p2r.model.compiling import compile_in_place, warm_up
from p2r.model.pix2rep import Pix2Rep
from p2r.pointers import resolve
from p2r.reference import parse_reference
from p2r.storage import Storage

_LOG = logging.getLogger(__name__)


@dataclass
class PendingReport:
    """Fields of `PretrainReport` that only the next report contains."""

    resumed_from: int | None = None
    fell_back: str | None = None
    compiled: str | None = None
    loss_without_kernels: str | None = None
    profile: str | None = None
    probe_dice: float | None = None


@dataclass
class PretrainRun:
    """State of a run on this rank between two steps."""

    config: PretrainConfig
    storage: Storage
    device: torch.device
    checkpoints: Checkpoints
    engine: Any
    batches: Batches
    counters: Counters
    history: "HistoryRows"
    is_over: Callable[[], bool]
    """True if the run should end; collective."""
    profiler: Profiler | None
    probe: OnlineProbe | None
    """On rank 0 only."""
    timed: Timed
    init_from: InitialWeights | None
    """Origin of the initial weights."""
    first_step: int
    state: StreamState
    """State of the data after the last step."""
    images_per_step: dict[str, int] | None
    """Images of each value of `pretrain.balance` in a global batch."""
    running: "Sums"
    unread: "UnreadSteps"
    good: str | None
    """Path of the newest checkpoint since which no step was skipped."""
    pending: PendingReport
    clock: "Clock"


def begin_run(
    config: PretrainConfig,
    *,
    storage: Storage,
    corpus: Storage,
    device: torch.device,
    checkpoints: Checkpoints,
    fetched: Fetched | None,
    profile_steps: int,
    is_over: Callable[[], bool] | None,
) -> PretrainRun:
    """Prepare the first step, restoring the newest checkpoint if there is one. Collective."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    saved = None if fetched is None else fetched.saved
    checkpoint = None if saved is None else saved.manifest
    _check_batch_and_checkpoint(config, saved, storage, world_size=world_size)
    saved_stream = None if checkpoint is None else checkpoint.state.stream
    corpora = agreed_corpora(config, corpus, stream=saved_stream, device=device)
    balance = agreed_balance(config, corpora, device)
    state = state_of(config, corpora, balance)
    model, init_from = _build_network(config, checkpoint)
    engine, compiled = _build_compiled_engine(model.to(device), config, world_size=world_size)
    reason = explain_missing_kernels(config, device=device) if device.type == "cuda" else None
    pending = PendingReport(compiled=compiled, loss_without_kernels=reason)
    if rank == 0:
        _warn_of_slow_steps(compiled, reason)
    running = Sums()
    if fetched is not None and checkpoint is not None:
        tensors = checkpoints.load(engine, fetched)
        if "ema" in tensors:
            set_mean_weights(engine, tensors["ema"])
        pending.resumed_from, pending.fell_back = checkpoint.step, fetched.note
        running = Sums(**checkpoint.state.running)
        state = state.resumed(checkpoint.state.stream)
    resumed_from = pending.resumed_from or 0
    counters = Counters()
    decoded = _open_stream(config, corpora, storage, balance=balance, state=state, counters=counters, device=device)
    profiler = _make_profiler(storage, profile_steps, device, counters) if profile_steps and rank == 0 else None
    timed = record_function if profiler is None else profiler.timed
    return PretrainRun(
        config=config,
        storage=storage,
        device=device,
        checkpoints=checkpoints,
        engine=engine,
        batches=feed(decoded, device, timed=timed),
        counters=counters,
        history=HistoryRows(storage, rank, first_step=resumed_from),
        is_over=never if is_over is None else OnAnyRank(is_over, device),
        profiler=profiler,
        probe=OnlineProbe(config, device) if config.probe is not None and rank == 0 else None,
        timed=timed,
        init_from=init_from,
        first_step=resumed_from + 1,
        state=state,
        images_per_step=None if balance is None else balance.images_per_step(config.global_batch),
        running=running,
        unread=UnreadSteps(config.max_skipped_steps),
        good=None if saved is None else saved.path,
        pending=pending,
        clock=Clock(),
    )


def _open_stream(
    config: PretrainConfig,
    corpora: Sequence[Corpus],
    storage: Storage,
    *,
    balance: Balance | None,
    state: StreamState,
    counters: Counters,
    device: torch.device,
) -> Batches:
    """Return this rank's batches from `state` on; damaged samples are recorded in the run's storage."""
    return stream(
        corpora,
        image=config.image,
        seed=config.seed,
        global_batch=config.global_batch,
        contrasts=config.model.contrasts,
        neighbours=config.neighbours,
        balance=balance,
        frames_apart=config.views.frames_apart,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        state=state,
        quarantine=Quarantine(config.max_replaced, partial(record_damage, storage)),
        counters=counters,
        pin_memory=device.type == "cuda",
    )


def _warn_of_slow_steps(compiled: str | None, without_kernels: str | None) -> None:
    not_compiled = compiled if compiled is not None and compiled.startswith("not compiled") else None
    for reason in filter(None, (not_compiled, without_kernels)):
        _LOG.warning("steps will be slow: %s", reason)


def _make_profiler(storage: Storage, num_steps: int, device: torch.device, counters: Counters) -> Profiler:
    return Profiler(
        storage,
        num_steps=num_steps,
        device=device,
        decode_s=lambda: counters.snapshot().get("decode_seconds", 0.0),
    )


def _check_batch_and_checkpoint(
    config: PretrainConfig, checkpoint: SavedCheckpoint | None, storage: Storage, *, world_size: int
) -> None:
    """Raise `InputError` if this number of workers cannot share a batch, or cannot resume from a checkpoint."""
    if checkpoint is not None:
        running = checkpoint.manifest.state.running
        reason = None
        if unknown := sorted(running.keys() - {field.name for field in fields(Sums)}):
            reason = f"its state has {', '.join(unknown)}, which this version of p2r does not know"
        elif "skipped_steps" not in running:
            reason = "the optimizer that wrote it could not skip steps"
        if reason is not None:
            raise CheckpointError(
                f"{storage.at(checkpoint.path)} cannot be resumed: {reason}. Use the version of p2r that wrote it "
                f"({checkpoint.manifest.code_version}), or start a new run from its weights with --fork NAME"
            )
    if config.global_batch % world_size:
        raise InputError(
            f"pretrain.global_batch must be divisible by the number of workers, got {config.global_batch} for {world_size}"
        )
    check_micro_batch(config.global_batch, world_size, config.micro_batch)


def _build_network(
    config: PretrainConfig, checkpoint: CheckpointManifest | None
) -> tuple[Pix2Rep, InitialWeights | None]:
    """Return the network with its initial weights, and their origin if they are not random."""
    torch.manual_seed(config.seed)
    model = Pix2Rep.of(config)
    if checkpoint is not None:
        return model, checkpoint.init_from
    if config.init_from is None:
        return model, None
    reference = parse_reference(config.init_from)
    if reference.pointer is not None:  # it may be moved while the ranks read it
        reference = Peers().first(lambda: resolve(reference))
    return model, init_weights(model, str(reference))


def _build_compiled_engine(model: Pix2Rep, config: PretrainConfig, *, world_size: int) -> tuple[Any, str | None]:
    """Return the engine of a network on its device, and a line on its compilation, if requested."""
    is_compiled, compiled = False, None
    if config.compile:
        is_compiled, compiled = warm_up(
            model.backbone,
            shape=_encoded_shape(config, world_size),
            dtype=DTYPES[config.precision],
            how=config.compile,
        )
    engine = build_engine(model, config, world_size=world_size)
    if is_compiled and config.compile:
        compile_in_place(engine.module.backbone, config.compile)
    return engine, compiled


def _encoded_shape(config: PretrainConfig, world_size: int) -> tuple[int, ...]:
    """Return the shape (B, C, *S) of the backbone's input: both views of a micro-batch."""
    num_images = config.micro_batch or config.global_batch // world_size
    return 2 * num_images, config.model.in_channels, *[config.image.size] * config.image.dimensions


def record_damage(storage: Storage, replaced: Replaced) -> None:
    """Record damage for later repair; the same damage gives the same record on every rank and in every epoch."""
    shard = replaced.shard.rsplit("/", 1)[-1]
    storage.write_json(f"quarantine/{shard}-{replaced.sample:08d}.json", asdict(replaced))
