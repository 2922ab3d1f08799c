"""Pretraining as a generator of reports: corpus -> stream -> steps -> checkpoints.

The same function runs in a for-loop on a laptop and on every worker of a cluster; whoever calls it decides what to do
with a report. All ranks yield at the same steps, because saving is collective.

On a GPU the host runs ahead of the device: what steps have to say is read at reports and before checkpoints, so that no
checkpoint is made of weights that a bad step has touched. On a CPU every step is read at once.

A step whose loss or gradients are not finite is left out on every rank (see `p2r.engine.update`): its batch is used up, `step`
and schedule go on, and it is counted. While steps are left out, no checkpoint is made only because it is due: it would push
out one from before.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from p2r.config import PretrainConfig
from p2r.counters import Counters
from p2r.data.stream import Quarantine, Replaced, stream, stream_state
from p2r.device import is_waited_for
from p2r.engine.build import DTYPES, build_engine, full_weights, join_process_group, masters, set_mean_weights
from p2r.engine.checkpoint import Checkpoints, Note, newest_checkpoint, refuse_other_config
from p2r.engine.compiling import compile_in_place, warm_up
from p2r.engine.corpora import agreed_corpora
from p2r.engine.determinism import deterministic
from p2r.engine.feed import feed
from p2r.engine.health import embedding_health
from p2r.engine.online_probe import OnlineProbe
from p2r.engine.profile import Profiler, peak_mib
from p2r.engine.schedule import averaging, learning_rate
from p2r.engine.step import Step, equivariance_error, loss_parts, take_step
from p2r.engine.uploading import path_of
from p2r.engine.weights import backbone_weights, init_weights
from p2r.errors import CheckpointError, EmbeddingError, InputError, TrainingError
from p2r.model.pix2rep import Pix2Rep
from p2r.storage import Storage

HISTORY = "history.jsonl"


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

    with deterministic(config.deterministic):
        join_process_group(device)
        with Checkpoints(storage, config, note=note) as checkpoints:
            yield from _steps(
                config,
                storage=storage,
                corpus=corpus,
                device=device,
                checkpoints=checkpoints,
                profile_steps=profile_steps,
                is_over=None if max_seconds is None and should_stop is None else is_over,
            )


def _steps(
    config: PretrainConfig,
    *,
    storage: Storage,
    corpus: Storage,
    device: torch.device,
    checkpoints: Checkpoints,
    profile_steps: int,
    is_over: Callable[[], bool] | None,
) -> Iterator[Report]:
    """Do what `pretrain` says, to the end or until it is over on any rank."""
    fetched = checkpoints.newest()
    checkpoint = None if fetched is None else fetched.manifest
    if checkpoint is not None:
        if checkpoint["step"] >= config.steps:
            return
        if "skipped_steps" not in checkpoint["state"]["running"]:
            raise CheckpointError(
                f"{storage.at(checkpoint['path'])} holds the state of an optimizer that could not leave out a step, and cannot be "
                f"resumed: use the version of p2r that wrote it ({checkpoint['code_version']}), or another storage URL"
            )
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if config.global_batch % world_size:
        raise InputError(
            f"pretrain.global_batch must be divisible by the number of workers, got {config.global_batch} for {world_size}"
        )
    if config.micro_batch is not None and config.global_batch // world_size % config.micro_batch:
        raise InputError(
            f"pretrain.micro_batch must divide a worker's part of the global batch, got {config.micro_batch} "
            f"for {config.global_batch} images over {world_size} workers: {config.global_batch // world_size} each"
        )
    saved_stream = None if checkpoint is None else checkpoint["state"]["stream"]
    corpora = agreed_corpora(config, corpus, stream=saved_stream, device=device)
    state = stream_state(corpora, seed=config.seed, global_batch=config.global_batch, neighbours=config.neighbours)
    torch.manual_seed(config.seed)
    learnt_temperature = config.loss.temperature if config.loss.learn_temperature else None
    model = Pix2Rep(config.model, dimensions=config.image.dimensions, learnt_temperature=learnt_temperature)
    init_from = None if checkpoint is None else checkpoint.get("init_from")
    if checkpoint is None and config.init_from is not None:
        init_from = init_weights(model, config.init_from)
    is_compiled, compiled = False, None
    if config.compile:
        is_compiled, compiled = warm_up(
            model.to(device).backbone,
            shape=_encoded_shape(config, world_size),
            dtype=DTYPES[config.precision],
            how=config.compile,
        )
    engine = build_engine(model.to(device), config, world_size=world_size)
    if is_compiled and config.compile:
        compile_in_place(engine.module.backbone, config.compile)
    resumed_from, running = None, _Running()
    fell_back = None
    if fetched is not None and checkpoint is not None:
        tensors = checkpoints.load(engine, fetched)
        if "ema" in tensors:
            set_mean_weights(engine, tensors["ema"])
        resumed_from, fell_back = checkpoint["step"], fetched.note
        running = _Running(**checkpoint["state"]["running"])
        state = state.resumed(checkpoint["state"]["stream"])
    history = _History(storage, rank, first_step=resumed_from or 0)
    good = None if checkpoint is None else checkpoint["path"]
    any_rank = None if is_over is None else _AnyRank(device)

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
    probe = OnlineProbe(config, device) if config.probe is not None and rank == 0 else None
    timed = record_function if profiler is None else profiler.timed
    batches, unread, profile = feed(decoded, device, timed=timed), _Unread(config.max_skipped_steps), None
    probe_dice = None
    try:
        clock = _Clock()
        for step in range((resumed_from or 0) + 1, config.steps + 1):
            in_step = nullcontext() if profiler is None else profiler.step(step, engine)
            rate = learning_rate(
                step - 1,
                peak=config.optimizer.learning_rate,
                num_steps=config.steps,
                warmup_fraction=config.optimizer.warmup_fraction,
            )
            reports = _is_due(step, config.report_interval, config.steps)
            aligns = reports and _is_due(step, config.report_interval * config.equivariance_interval, config.steps)
            with in_step:
                batch, state = next(batches)
                try:
                    taken = take_step(
                        engine,
                        batch,
                        config=config,
                        learning_rate=rate,
                        averaging=None if config.ema_decay is None else averaging(step - 1, decay=config.ema_decay),
                        aligns=aligns,
                        timed=timed,
                    )
                except EmbeddingError as error:
                    raise _diverged(step, error, storage, good) from error
            unread.add(step, taken)
            clock.add(batch.wait_s)
            stops = any_rank is not None and is_over is not None and any_rank(is_over())
            is_last = step == config.steps or stops
            saves = _is_due(step, config.checkpoint_interval, config.steps) or stops
            if reports or saves or not is_waited_for(device):
                try:
                    unread.read_into(running)
                except _Bad as bad:
                    raise _diverged(bad.step, bad, storage, good) from bad
            saves = saves and (is_last or not running.skipped_in_a_row)
            if profiler is not None:
                profiler.waited(batch.wait_s)
                with clock.stopped():
                    profile = profiler.written(is_last=is_last) or profile
            if config.probe is not None and _is_due(step, config.probe.interval, config.steps):
                weights = full_weights(engine)
                if probe is not None:
                    with clock.stopped():  # the other ranks wait in the next step's first exchange
                        probe_dice = probe.dice(backbone_weights(weights))
            mean_loss, num_without_pairs = running.mean(), running.num_images_without_pairs
            if reports:
                running.reset()
            if saves and (lost := _num_lost(engine)):
                raise _diverged(step, f"{lost} weights are no longer finite", storage, good)
            if reports or saves:
                seconds = clock.lap()
                report = Report(
                    step=step,
                    num_steps=config.steps,
                    samples_seen=step * config.global_batch,
                    loss=mean_loss,
                    learning_rate=rate,
                    gradient_norm=running.gradient_norm,
                    images_per_s=clock.steps * config.global_batch / seconds,
                    wait_fraction=clock.wait_s / seconds,
                    num_replaced=int(counters.snapshot().get("replaced_records", 0)),
                    data=counters.snapshot(),
                    eta_s=(config.steps - step) * seconds / clock.steps,
                    negatives=config.negatives,
                    num_images_without_pairs=num_without_pairs,
                    skipped_steps=running.skipped_steps,
                    pixel_pairs_per_s=clock.steps * config.global_batch * config.loss.pixel_pairs_per_image / seconds,
                    step_s=seconds / clock.steps,
                    memory_mib=peak_mib(device),
                    world_size=world_size,
                    loss_parts=_loss_parts(taken),
                    health=_health(taken),
                    equivariance_error=_equivariance_error(taken),
                    probe_dice=probe_dice,
                    resumed_from=resumed_from,
                    fell_back=fell_back,
                    checkpoint=path_of(step) if is_last else checkpoints.completed(),
                    **_upload_facts(checkpoints),
                    compiled=compiled,
                    profile=profile,
                )
                resumed_from = compiled = profile = fell_back = probe_dice = None
                # Before the checkpoint: whatever goes on from it finds the rows of all steps before.
                history.add(report, flush=saves)
                clock = _Clock()
                if saves:
                    checkpoints.save(
                        engine,
                        step=step,
                        state={"stream": state.to_dict(), "running": asdict(running)},
                        init_from=init_from,
                        tensors={"ema": full_weights(engine, mean=True)} if config.ema_decay is not None else None,
                    )
                    good = good if running.skipped_in_a_row else path_of(step)
                if is_last:
                    checkpoints.finish()  # whoever gets the last report finds its checkpoint
                    report = replace(report, **_upload_facts(checkpoints))
                yield report
            if stops:
                return
    finally:
        batches.close()
        engine.destroy()


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
            rows = (json.loads(line) for line in storage.read_bytes(HISTORY).decode().splitlines())
            self._rows = [row for row in rows if row["step"] <= first_step]

    def add(self, report: Report, *, flush: bool) -> None:
        self._rows.append(asdict(report))
        if self._rank == 0 and (flush or time.monotonic() - self._written_at > 10):
            self._storage.write_bytes(HISTORY, "".join(json.dumps(row) + "\n" for row in self._rows).encode())
            self._written_at = time.monotonic()


def _note_damage(storage: Storage, replaced: Replaced) -> None:
    """Leave a note for whoever mends the corpus; the same damage gives the same note on every rank and in every epoch."""
    shard = replaced.shard.rsplit("/", 1)[-1]
    storage.write_json(f"quarantine/{shard}-{replaced.sample:08d}.json", asdict(replaced))


def _diverged(step: int, error: object, storage: Storage, good: str | None) -> TrainingError:
    last = "there is no checkpoint yet" if good is None else f"the last good checkpoint is {storage.at(good)}"
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


class _AnyRank:
    """Asks whether a flag is up on any rank. On GPUs, by a group of hosts, so that none waits for its device."""

    def __init__(self, device: torch.device) -> None:
        self._alone = torch.distributed.get_world_size() == 1
        self._group = None
        if device.type == "cuda" and not self._alone:
            self._group = torch.distributed.new_group(backend="gloo")

    def __call__(self, flag: bool) -> bool:
        if self._alone:
            return flag
        value = torch.tensor([int(flag)])
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
