"""Pretraining as a generator of reports: corpus -> stream -> steps -> checkpoints.

The same function runs in a for-loop on a laptop and on every worker of a cluster; whoever calls it decides what to do
with a report. All ranks yield at the same steps, because saving is collective.

On a GPU the host runs ahead of the device: what steps have to say is read at reports and before checkpoints, so that no
checkpoint is made of weights that a bad step has touched. On a CPU every step is read at once.

A step whose loss or gradients are not finite is left out on every rank (see `p2r.engine.update`): its batch is used up, `step`
and schedule go on, and it is counted. While steps are left out, no checkpoint is made only because it is due: it would push
out one from before.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from p2r.config import PretrainConfig
from p2r.counters import Counters
from p2r.data.order import check_micro_batch
from p2r.data.stream import Quarantine, Replaced, StreamState, stream, stream_state
from p2r.device import is_waited_for
from p2r.engine.build import DTYPES, build_engine, full_weights, join_process_group, masters, set_mean_weights
from p2r.engine.checkpoint import Checkpoints, Fetched, Note, newest_checkpoint, refuse_other_config
from p2r.engine.corpora import agreed_corpora
from p2r.engine.determinism import deterministic
from p2r.engine.feed import Batches, Timed, feed
from p2r.engine.health import embedding_health
from p2r.engine.history import history_bytes, read_history
from p2r.engine.online_probe import OnlineProbe
from p2r.engine.peers import refuse_mixed_gpus
from p2r.engine.profile import Profiler, peak_mib
from p2r.engine.step import Step, equivariance_error, loss_parts, loss_without_kernels, take_step
from p2r.engine.uploading import path_of
from p2r.engine.weights import backbone_weights, init_weights
from p2r.errors import CheckpointError, EmbeddingError, InputError, TrainingError
from p2r.model.compiling import compile_in_place, warm_up
from p2r.model.pix2rep import Pix2Rep
from p2r.schedule import averaging, learning_rate
from p2r.storage import Storage

HISTORY = "history.jsonl"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What a caller learns about a run. Means are over the steps since the report before."""

    step: int
    """Optimizer steps taken."""
    num_steps: int
    """Length of the run."""
    samples_seen: int
    """Images consumed by all ranks, each giving two views."""
    loss: float
    """Mean loss: nats for InfoNCE. Of steps that were not left out; if all were, what the report before said."""
    learning_rate: float
    """Rate of the last step."""
    gradient_norm: float
    """Global norm of the last step that was not left out, before clipping."""
    images_per_s: float
    """All ranks together."""
    wait_fraction: float
    """Part of the time in which this rank waited for data, and its device had nothing else to do."""
    num_replaced: int
    """Damaged samples that this rank has replaced by others, since it started."""
    data: dict[str, float]
    """What this rank's stream has done since it started: bytes, seconds, retries, cache hits (see `p2r.counters`)."""
    eta_s: float
    """Seconds to the end at this speed."""
    negatives: str
    """Which pixels were contrasted with one another."""
    num_images_without_pairs: int = 0
    """Images of all ranks, since the report before, of which no pixel could be paired; they take no part in the loss."""
    skipped_steps: int = 0
    """Steps left out because the loss or a gradient was not finite, since the run's beginning."""
    pixel_pairs_per_s: float = 0.0
    """All ranks together."""
    step_s: float = 0.0
    """Mean time of a step, seconds."""
    memory_mib: float = 0.0
    """This rank's peak: tensors on its GPU; the process's resident set on a CPU."""
    world_size: int = 1
    """Number of ranks."""
    loss_parts: dict[str, float] = field(default_factory=dict)
    """Of the last step. InfoNCE: mean cosine of pairs (positive), mean log-sum-exp of logits over negatives (negatives, nats). Barlow
    Twins: the two terms of the loss (invariance, redundancy)."""
    health: dict[str, float] | None = None
    """Of the last step's embeddings, where the equivariance error is stated: alignment, uniformity, effective_rank,
    dead_dimensions_fraction; see `p2r.engine.health`."""
    equivariance_error: float | None = None
    """Of the last step: 0 if embeddings follow the warp perfectly, 1 if no better than chance; see `p2r.engine.step`."""
    probe_dice: float | None = None
    """Of the newest online probe since the report before, on rank 0: mean Dice of the labelled task; see `p2r.engine.online_probe`."""
    resumed_from: int | None = None
    """In the first report of a resumed run: the step it went on from."""
    fell_back: str | None = None
    """In the first report of a resumed run: which checkpoints could not be used, and why."""
    checkpoint: str | None = None
    """Path below `<storage>/pretrain` of a checkpoint that was completed since the report before: of an earlier step, for uploads go on
    beside training; after the last step, of that step."""
    checkpoint_s: float | None = None
    """Seconds that the newest complete checkpoint of this process took, from the beginning of the save to its manifest."""
    checkpoint_bytes: int | None = None
    """Its size."""
    compiled: str | None = None
    """In the first report of a run that compiles: what came of it."""
    loss_without_kernels: str | None = None
    """In the first report of a run on a GPU whose loss is computed without its kernels: why, and the way out."""
    profile: str | None = None
    """Path of the profile that was made since the report before, below `<storage>/pretrain`."""

    def line(self) -> str:
        """Return the report as one line for a terminal."""
        minutes, seconds = divmod(round(self.eta_s), 60)
        return (
            f"step {self.step}/{self.num_steps} | loss {self.loss:.4f} | {self.images_per_s:.1f} img/s | "
            f"wait {self.wait_fraction:.1%} | lr {self.learning_rate:.1e} | grad {self.gradient_norm:.2f} | "
            + (f"equivariance error {self.equivariance_error:.3f} | " if self.equivariance_error is not None else "")
            + (f"effective rank {self.health['effective_rank']:.1f} | " if self.health is not None else "")
            + (f"probe Dice {self.probe_dice:.3f} | " if self.probe_dice is not None else "")
            + f"ETA {minutes}:{seconds:02d}"
            + (f" | {self.compiled}" if self.compiled else "")
            + (f" | {self.loss_without_kernels}" if self.loss_without_kernels else "")
            + (f" | negatives {self.negatives}" if "micro" in self.negatives else "")
            + (f" | {self.skipped_steps} steps skipped" if self.skipped_steps else "")
            + (f" | {self.num_images_without_pairs} images without pairs" if self.num_images_without_pairs else "")
            + (f" | {self.num_replaced} damaged samples replaced" if self.num_replaced else "")
            + (f" | checkpoint {self.checkpoint}" if self.checkpoint else "")
            + (f" | {self.profile}" if self.profile else "")
            + (f" | {self.fell_back}" if self.fell_back else "")
        )


def pretrain(
    config: PretrainConfig,
    *,
    storage: Storage,
    corpus: Storage,
    device: torch.device,
    max_seconds: float | None = None,
    profile_steps: int = 0,
    note: Note | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Report]:
    """Train to `config.steps`, from the newest checkpoint if there is one.

    Args:
        config: What to train.
        storage: `<storage>/pretrain`.
        corpus: The job's own corpus, where `config` names none.
        device: This process's device.
        max_seconds: Save a checkpoint and end early after this time, to go on in a later call.
        profile_steps: Profile so many steps of rank 0, after a few, into `<storage>/pretrain/profile`; 0: none.
        should_stop: Asked after every step; once it is true on any rank, all save a checkpoint of that step and end. Given
            on all ranks or on none.
        note: Is told, on rank 0, of every checkpoint that could not be used.

    Raises:
        InputError: for a corpus, checkpoint or number of workers that does not fit.
        StorageError: when the checkpoint before could not be uploaded.
        TrainingError: when too many steps in a row were not finite, or the network has died.
    """
    began = time.monotonic()

    def is_over() -> bool:
        return (max_seconds is not None and time.monotonic() - began > max_seconds) or (
            should_stop is not None and should_stop()
        )

    with deterministic(config.deterministic), _products(config, device):
        join_process_group(device)
        refuse_mixed_gpus(device)
        with Checkpoints(storage, config, note=note) as checkpoints:
            fetched = checkpoints.newest()
            if fetched is not None and fetched.manifest["step"] >= config.steps:
                return
            run = _begin(
                config,
                storage=storage,
                corpus=corpus,
                device=device,
                checkpoints=checkpoints,
                fetched=fetched,
                profile_steps=profile_steps,
                is_over=None if max_seconds is None and should_stop is None else is_over,
            )
            yield from _steps(run)


@contextmanager
def _products(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """Let products of float32 be rounded to TF32 for as long as a run that asks for it lasts.

    Raises:
        InputError: The device has no TF32.
    """
    if config.precision != "tf32":
        yield
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(
            f"pretrain.precision tf32 needs a GPU of compute capability 8.0 or newer, not {device}: set it to fp32"
        )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _steps(run: "_Run") -> Iterator[Report]:
    """Go on to the last step, or until the run is over on any rank."""
    config, checkpoints = run.config, run.checkpoints
    try:
        for step in range(run.first_step, config.steps + 1):
            reports = _is_due(step, config.report_interval, config.steps)
            saves = _is_due(step, config.checkpoint_interval, config.steps)
            taken = _take(run, step, reports=reports)
            stops = run.is_over()
            is_last = step == config.steps or stops
            if reports or saves or stops or not is_waited_for(run.device):
                _read(run)
            saves = is_last or (saves and not run.running.skipped_in_a_row)
            _profile_and_probe(run, step, is_last=is_last)
            if saves:
                _refuse_lost_weights(run, step)
            if reports or saves:
                report = _report(run, step, taken, ends_interval=reports, is_last=is_last)
                # Before the checkpoint: whatever goes on from it finds the rows of all steps before.
                run.history.add(report, flush=saves)
                run.clock = _Clock()
                if saves:
                    _save(run, step)
                if is_last:
                    checkpoints.finish()  # whoever gets the last report finds its checkpoint
                    report = replace(report, **_upload_facts(checkpoints))
                yield report
            if stops:
                return
    finally:
        run.batches.close()
        run.engine.destroy()


@dataclass
class _News:
    """What the next report says, and none after it; see `Report`."""

    resumed_from: int | None = None
    fell_back: str | None = None
    compiled: str | None = None
    loss_without_kernels: str | None = None
    profile: str | None = None
    probe_dice: float | None = None


@dataclass
class _Run:
    """A run on this rank, between two of its steps."""

    config: PretrainConfig
    storage: Storage
    device: torch.device
    checkpoints: Checkpoints
    engine: Any
    batches: Batches
    counters: Counters
    history: "_History"
    is_over: Callable[[], bool]
    """Collective."""
    profiler: Profiler | None
    probe: OnlineProbe | None
    """On rank 0 alone."""
    timed: Timed
    init_from: dict[str, Any] | None
    """Where the first weights came from."""
    first_step: int
    state: StreamState
    """Of the data after the last step."""
    running: "_Running"
    unread: "_Unread"
    good: str | None
    """Path of the newest checkpoint after which no step was left out."""
    news: _News
    clock: "_Clock"


def _begin(
    config: PretrainConfig,
    *,
    storage: Storage,
    corpus: Storage,
    device: torch.device,
    checkpoints: Checkpoints,
    fetched: Fetched | None,
    profile_steps: int,
    is_over: Callable[[], bool] | None,
) -> _Run:
    """Make what the first step needs: as the newest checkpoint left it, if there is one. Collective."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    checkpoint = None if fetched is None else fetched.manifest
    _refuse(config, checkpoint, storage, world_size=world_size)
    saved_stream = None if checkpoint is None else checkpoint["state"]["stream"]
    corpora = agreed_corpora(config, corpus, stream=saved_stream, device=device)
    state = stream_state(corpora, seed=config.seed, global_batch=config.global_batch, neighbours=config.neighbours)
    model, init_from = _network(config, checkpoint)
    engine, compiled = _engine(model.to(device), config, world_size=world_size)
    news = _News(compiled=compiled, loss_without_kernels=_loss_without_kernels(config, device))
    if rank == 0:
        for reason in (
            news.loss_without_kernels,
            compiled if compiled is not None and "not compiled" in compiled else None,
        ):
            if reason is not None:
                _LOG.warning("steps will be slow: %s", reason)
    running = _Running()
    if fetched is not None and checkpoint is not None:
        tensors = checkpoints.load(engine, fetched)
        if "ema" in tensors:
            set_mean_weights(engine, tensors["ema"])
        news.resumed_from, news.fell_back = checkpoint["step"], fetched.note
        running = _Running(**checkpoint["state"]["running"])
        state = state.resumed(checkpoint["state"]["stream"])
    resumed_from = news.resumed_from or 0
    history = _History(storage, rank, first_step=resumed_from)
    is_over_anywhere = _never if is_over is None else _OnAnyRank(is_over, device)

    counters = Counters()
    decoded = stream(
        corpora,
        image=config.image,
        seed=config.seed,
        global_batch=config.global_batch,
        neighbours=config.neighbours,
        rank=rank,
        world_size=world_size,
        state=state,
        quarantine=Quarantine(config.max_replaced, partial(_note_damage, storage)),
        counters=counters,
        pin_memory=device.type == "cuda",
    )
    profiler = None
    if profile_steps and rank == 0:
        profiler = Profiler(
            storage,
            num_steps=profile_steps,
            device=device,
            decode_s=lambda: counters.snapshot().get("decode_seconds", 0.0),
        )
    timed = record_function if profiler is None else profiler.timed
    return _Run(
        config=config,
        storage=storage,
        device=device,
        checkpoints=checkpoints,
        engine=engine,
        batches=feed(decoded, device, timed=timed),
        counters=counters,
        history=history,
        is_over=is_over_anywhere,
        profiler=profiler,
        probe=OnlineProbe(config, device) if config.probe is not None and rank == 0 else None,
        timed=timed,
        init_from=init_from,
        first_step=resumed_from + 1,
        state=state,
        running=running,
        unread=_Unread(config.max_skipped_steps),
        good=None if checkpoint is None else checkpoint["path"],
        news=news,
        clock=_Clock(),
    )


def _refuse(config: PretrainConfig, checkpoint: Mapping[str, Any] | None, storage: Storage, *, world_size: int) -> None:
    """Raise InputError if so many workers cannot share a batch, or cannot go on from a checkpoint."""
    if checkpoint is not None and "skipped_steps" not in checkpoint["state"]["running"]:
        raise CheckpointError(
            f"{storage.at(checkpoint['path'])} holds the state of an optimizer that could not leave out a step, and cannot be "
            f"resumed: use the version of p2r that wrote it ({checkpoint['code_version']}), or another storage URL"
        )
    if config.global_batch % world_size:
        raise InputError(
            f"pretrain.global_batch must be divisible by the number of workers, got {config.global_batch} for {world_size}"
        )
    check_micro_batch(config.global_batch, world_size, config.micro_batch)


def _network(config: PretrainConfig, checkpoint: Mapping[str, Any] | None) -> tuple[Pix2Rep, dict[str, Any] | None]:
    """Return the network with its first weights, and where these came from if they were not drawn."""
    torch.manual_seed(config.seed)
    learnt_temperature = config.loss.temperature if config.loss.learn_temperature else None
    model = Pix2Rep(config.model, dimensions=config.image.dimensions, learnt_temperature=learnt_temperature)
    if checkpoint is not None:
        return model, checkpoint.get("init_from")
    return model, None if config.init_from is None else init_weights(model, config.init_from)


def _engine(model: Pix2Rep, config: PretrainConfig, *, world_size: int) -> tuple[Any, str | None]:
    """Return the engine of a network on its device, its backbone compiled if asked and possible, and what to say of that."""
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


def _loss_without_kernels(config: PretrainConfig, device: torch.device) -> str | None:
    """Return why a GPU will compute the loss without its kernels, as long as nothing has been computed yet."""
    return loss_without_kernels(config, device=device) if device.type == "cuda" else None


def _take(run: _Run, step: int, *, reports: bool) -> Step:
    """Take a step with the next batch; what it has to say stays on the device."""
    config = run.config
    every = config.report_interval * config.equivariance_interval
    with nullcontext() if run.profiler is None else run.profiler.step(step, run.engine):
        batch, run.state = next(run.batches)
        try:
            taken = take_step(
                run.engine,
                batch,
                config=config,
                learning_rate=_rate(config, step),
                averaging=None if config.ema_decay is None else averaging(step - 1, decay=config.ema_decay),
                aligns=reports and _is_due(step, every, config.steps),
                timed=run.timed,
            )
        except EmbeddingError as error:
            raise _diverged(run, step, error) from error
    run.unread.add(step, taken)
    run.clock.add(batch.wait_s)
    if run.profiler is not None:
        run.profiler.waited(batch.wait_s)
    return taken


def _rate(config: PretrainConfig, step: int) -> float:
    """Return the learning rate of a step, from 1."""
    return learning_rate(
        step - 1,
        peak=config.optimizer.learning_rate,
        num_steps=config.steps,
        warmup_fraction=config.optimizer.warmup_fraction,
    )


def _read(run: _Run) -> None:
    """Wait for the device, and add up what steps had to say since this was done before. Collective."""
    try:
        run.unread.read_into(run.running)
    except _Bad as bad:
        raise _diverged(run, bad.step, bad) from bad


def _profile_and_probe(run: _Run, step: int, *, is_last: bool) -> None:
    """Write a profile and probe the weights, where it is time for that; the clock stands meanwhile. Collective."""
    if run.profiler is not None:
        with run.clock.stopped():
            run.news.profile = run.profiler.written(is_last=is_last) or run.news.profile
    if run.config.probe is not None and _is_due(step, run.config.probe.interval, run.config.steps):
        weights = full_weights(run.engine)
        if run.probe is not None:
            with run.clock.stopped():  # the other ranks wait in the next step's first exchange
                run.news.probe_dice = run.probe.dice(backbone_weights(weights))


def _refuse_lost_weights(run: _Run, step: int) -> None:
    """Raise TrainingError if weights are not finite, though the loss before them was: they are not to be saved. Collective."""
    if lost := _num_lost(run.engine):
        raise _diverged(run, step, f"{lost} weights are no longer finite")


def _report(run: _Run, step: int, taken: Step, *, ends_interval: bool, is_last: bool) -> Report:
    """Say how the run is, and its news. Collective."""
    config, running, clock, data = run.config, run.running, run.clock, run.counters.snapshot()
    mean_loss, num_without_pairs = running.mean(), running.num_images_without_pairs
    if ends_interval:
        running.reset()
    news, run.news = run.news, _News()
    seconds = clock.lap()
    return Report(
        step=step,
        num_steps=config.steps,
        samples_seen=step * config.global_batch,
        loss=mean_loss,
        learning_rate=_rate(config, step),
        gradient_norm=running.gradient_norm,
        images_per_s=clock.steps * config.global_batch / seconds,
        wait_fraction=clock.wait_s / seconds,
        num_replaced=int(data.get("replaced_records", 0)),
        data=data,
        eta_s=(config.steps - step) * seconds / clock.steps,
        negatives=config.negatives,
        num_images_without_pairs=num_without_pairs,
        skipped_steps=running.skipped_steps,
        pixel_pairs_per_s=clock.steps * config.global_batch * config.loss.pixel_pairs_per_image / seconds,
        step_s=seconds / clock.steps,
        memory_mib=peak_mib(run.device),
        world_size=torch.distributed.get_world_size(),
        loss_parts=_loss_parts(taken),
        health=_health(taken),
        equivariance_error=_equivariance_error(taken),
        checkpoint=path_of(step) if is_last else run.checkpoints.completed(),
        **_upload_facts(run.checkpoints),
        **asdict(news),
    )


def _save(run: _Run, step: int) -> None:
    """Save a checkpoint of this step, to be uploaded while training goes on. Collective."""
    run.checkpoints.save(
        run.engine,
        step=step,
        state={"stream": run.state.to_dict(), "running": asdict(run.running)},
        init_from=run.init_from,
        tensors={"ema": full_weights(run.engine, mean=True)} if run.config.ema_decay is not None else None,
    )
    if not run.running.skipped_in_a_row:
        run.good = path_of(step)


def _encoded_shape(config: PretrainConfig, world_size: int) -> tuple[int, ...]:
    """Return the shape (B, C, *S) of what the backbone encodes at once: both views of a micro-batch."""
    num_images = config.micro_batch or config.global_batch // world_size
    return 2 * num_images, config.model.in_channels, *[config.image.size] * config.image.dimensions


def _upload_facts(checkpoints: Checkpoints) -> dict[str, Any]:
    uploaded = checkpoints.uploaded
    return {} if uploaded is None else {"checkpoint_s": uploaded.seconds, "checkpoint_bytes": uploaded.num_bytes}


@dataclass
class _Running:
    """Sums since the last report, and since the beginning; part of the checkpoint, so that a resumed curve is the same curve."""

    total: float = 0.0
    count: int = 0
    num_images_without_pairs: int = 0
    mean_before: float = 0.0
    gradient_norm: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def add(self, loss: float, gradient_norm: float) -> None:
        self.total += loss
        self.count += 1
        self.gradient_norm = gradient_norm
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def mean(self) -> float:
        return self.total / self.count if self.count else self.mean_before

    def reset(self) -> None:
        self.mean_before = self.mean()
        self.total, self.count, self.num_images_without_pairs = 0.0, 0, 0


class _Bad(EmbeddingError):
    """What went wrong at a step."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class _Unread:
    """Steps that were taken, and whose values still lie on the device."""

    def __init__(self, max_skipped: int) -> None:
        self._steps: list[tuple[int, Step]] = []
        self._max_skipped = max_skipped

    def add(self, step: int, taken: Step) -> None:
        self._steps.append((step, taken))

    def read_into(self, running: _Running) -> None:
        """Wait for the device, once, and add up what the steps have to say. Collective.

        Raises:
            _Bad: On every rank, for the first step that went wrong on any beyond being left out, or that was left out after
                as many as may be.
        """
        values = torch.stack([torch.stack([value.double() for value in _facts(taken)]) for _, taken in self._steps])
        of_ranks = torch.stack(_gathered(values)).tolist()  # (ranks, steps, 4 + findings)
        for number, (step, taken) in enumerate(self._steps):
            reasons = []
            loss, skipped, norm, *_ = of_ranks[0][number]
            for rank, (*_, without_pairs, counts) in enumerate((*row[number][:4], row[number][4:]) for row in of_ranks):
                where = f"rank {rank}: " if len(of_ranks) > 1 else ""
                found = [int(count) for count in counts]
                try:
                    taken.findings.refuse(found, may_pass=bool(skipped))
                except EmbeddingError as error:
                    raise _Bad(step, f"{where}{error}") from error
                broken = taken.findings.broken(found)
                reasons += [f"{where}{broken}"] if broken else []
                running.num_images_without_pairs += int(without_pairs)
            if not skipped:
                running.add(loss, norm)
                continue
            running.skip()
            if running.skipped_in_a_row > self._max_skipped:
                reason = next(iter(reasons), f"the loss is {loss}, the norm of its gradient {norm}")
                in_a_row = running.skipped_in_a_row
                raise _Bad(
                    step,
                    f"{reason}; "
                    + (f"steps in a row that could not be taken: {in_a_row}, " if in_a_row > 1 else "")
                    + f"pretrain.max_skipped_steps allows {self._max_skipped}",
                )
        self._steps.clear()


def _facts(taken: Step) -> list[Tensor]:
    updated = taken.update
    return [
        taken.loss,
        updated.is_skipped,
        updated.gradient_norm,
        taken.num_images_without_pairs,
        *taken.findings.counts(),
    ]


class _Clock:
    def __init__(self) -> None:
        self.steps, self.wait_s, self._began = 0, 0.0, time.monotonic()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self._began += time.monotonic() - before

    def add(self, wait_s: float) -> None:
        self.steps += 1
        self.wait_s += wait_s

    def lap(self) -> float:
        return max(1e-9, time.monotonic() - self._began)


class _History:
    """`history.jsonl`: one JSON object per report. Object storage cannot append, so the whole file is written again, not too often."""

    def __init__(self, storage: Storage, rank: int, *, first_step: int) -> None:
        self._storage, self._rank, self._written_at = storage, rank, 0.0
        self._rows: list[dict[str, Any]] = []
        if rank == 0 and first_step and storage.exists(HISTORY):
            self._rows = [row for row in read_history(storage, HISTORY) if row["step"] <= first_step]

    def add(self, report: Report, *, flush: bool) -> None:
        self._rows.append(asdict(report))
        if self._rank == 0 and (flush or time.monotonic() - self._written_at > 10):
            self._storage.write_bytes(HISTORY, history_bytes(self._rows))
            self._written_at = time.monotonic()


def _note_damage(storage: Storage, replaced: Replaced) -> None:
    """Leave a note for whoever mends the corpus; the same damage gives the same note on every rank and in every epoch."""
    shard = replaced.shard.rsplit("/", 1)[-1]
    storage.write_json(f"quarantine/{shard}-{replaced.sample:08d}.json", asdict(replaced))


def _diverged(run: _Run, step: int, error: object) -> TrainingError:
    last = (
        "there is no checkpoint yet" if run.good is None else f"the last good checkpoint is {run.storage.at(run.good)}"
    )
    return TrainingError(f"step {step}: {error}; {last}. Lower pretrain.optimizer.learning_rate, or use precision fp32")


def _num_lost(engine: Any) -> int:
    """Return how many weights are not finite, though the loss before them was: they are not to be saved. Collective."""
    lost = torch.stack([(~torch.isfinite(part.detach())).sum() for part in masters(engine)]).sum()
    of_ranks = [int(count) for count in _gathered(lost)]
    return max(of_ranks) if engine.zero_optimization_stage() == 0 else sum(of_ranks)


def _loss_parts(taken: Step) -> dict[str, float]:
    if not taken.parts:
        return {}
    sums = torch.stack(_gathered(torch.stack(list(taken.parts.values())).double())).sum(0).tolist()
    found = loss_parts(dict(zip(taken.parts, sums, strict=True)))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _health(taken: Step) -> dict[str, float] | None:
    if taken.pairs is None:
        return None
    return embedding_health(torch.cat(_gathered(taken.pairs)).cpu())


def _equivariance_error(taken: Step) -> float | None:
    if taken.alignment is None:
        return None
    alignment = torch.stack(_gathered(taken.alignment.double())).sum(0).tolist()
    return equivariance_error(alignment) if all(map(math.isfinite, alignment)) else None


def _is_due(step: int, interval: int, num_steps: int) -> bool:
    """Return whether something that is done every so many steps, and after the last, is done after this one; 0: never."""
    return interval > 0 and (step % interval == 0 or step == num_steps)


def _gathered(values: Tensor) -> list[Tensor]:
    """Return every rank's values."""
    if torch.distributed.get_world_size() == 1:
        return [values]
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return parts


def _never() -> bool:
    return False


class _OnAnyRank:
    """Asks whether something holds on any rank. On GPUs, by a group of hosts, so that none waits for its device.

    Args:
        holds: Asked on this rank.
        device: This rank's.
    """

    def __init__(self, holds: Callable[[], bool], device: torch.device) -> None:
        self._holds, self._alone = holds, torch.distributed.get_world_size() == 1
        self._group = None
        if device.type == "cuda" and not self._alone:
            self._group = torch.distributed.new_group(backend="gloo")

    def __call__(self) -> bool:
        if self._alone:
            return self._holds()
        value = torch.tensor([int(self._holds())])
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(value.item())


def finished_checkpoint(storage: Storage, config: PretrainConfig) -> dict[str, Any]:
    """Return the manifest of the last step's checkpoint.

    Raises:
        CheckpointError: if there is none yet, or it belongs to another run.
    """
    checkpoint = newest_checkpoint(storage)
    if checkpoint is None:
        raise CheckpointError(f"{storage.at('checkpoints')} holds no checkpoint: run the pretrain stage first")
    refuse_other_config(checkpoint, config, where=storage.at(checkpoint["path"]))
    return checkpoint
