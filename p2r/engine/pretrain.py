"""Pretraining as a generator of reports: corpus -> stream -> steps -> checkpoints.

The same function runs in a for-loop on a laptop and on every worker of a cluster; whoever calls it decides what to do
with a report. All ranks yield at the same steps, because saving is collective.

On a GPU the host runs ahead of the device: what steps have to say is read at reports and before checkpoints, so that no
checkpoint is made of weights that a bad step has touched. On a CPU every step is read at once.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from p2r.config import PretrainConfig
from p2r.counters import Counters
from p2r.data.stream import Quarantine, Replaced, stream, stream_state
from p2r.device import is_waited_for
from p2r.engine.build import DTYPES, build_engine, join_process_group
from p2r.engine.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    path_of,
    refuse_other_config,
    save_checkpoint,
)
from p2r.engine.compiling import compile_in_place, warm_up
from p2r.engine.corpora import agreed_corpora
from p2r.engine.feed import feed
from p2r.engine.profile import Profiler
from p2r.engine.schedule import learning_rate
from p2r.engine.step import Step, equivariance_error, take_step
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
    """Mean loss: nats for InfoNCE."""
    learning_rate: float
    """Rate of the last step."""
    gradient_norm: float
    """Global norm of the last step, before clipping."""
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
    equivariance_error: float | None = None
    """Of the last step: 0 if embeddings follow the warp perfectly, 1 if no better than chance; see `p2r.engine.step`."""
    resumed_from: int | None = None
    """In the first report of a resumed run: the step it went on from."""
    checkpoint: str | None = None
    """Path of the checkpoint that this step made, below `<storage>/pretrain`."""
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
            + f"ETA {minutes}:{seconds:02d}"
            + (f" | {self.compiled}" if self.compiled else "")
            + (f" | negatives {self.negatives}" if "micro" in self.negatives else "")
            + (f" | {self.num_images_without_pairs} images without pairs" if self.num_images_without_pairs else "")
            + (f" | {self.num_replaced} damaged samples replaced" if self.num_replaced else "")
            + (f" | checkpoint {self.checkpoint}" if self.checkpoint else "")
            + (f" | {self.profile}" if self.profile else "")
        )


def pretrain(
    config: PretrainConfig,
    *,
    storage: Storage,
    corpus: Storage,
    device: torch.device,
    max_seconds: float | None = None,
    profile_steps: int = 0,
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
        should_stop: Asked after every step on every rank; once it is true on any, all save a checkpoint and end early.

    Raises:
        InputError: for a corpus, checkpoint or number of workers that does not fit.
        TrainingError: when the loss is no longer finite.
    """
    began = time.monotonic()
    checkpoint = newest_checkpoint(storage)
    if checkpoint is not None:
        refuse_other_config(checkpoint, config, where=storage.at(checkpoint["path"]))
        if checkpoint["step"] >= config.steps:
            return
    rank, world_size = join_process_group(device)
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
    if checkpoint is not None:
        load_checkpoint(engine, storage, checkpoint, config=config)
        resumed_from = checkpoint["step"]
        running = _Running(**checkpoint["state"]["running"])
        state = state.resumed(checkpoint["state"]["stream"])
    history = _History(storage, rank, first_step=resumed_from or 0)

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
    batches, unread, profile = feed(decoded, device, timed=timed), _Unread(), None
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
                    taken = take_step(engine, batch, config=config, learning_rate=rate, aligns=aligns, timed=timed)
                except EmbeddingError as error:
                    raise _diverged(step, error) from error
            unread.add(step, taken)
            clock.add(batch.wait_s)
            timed_out = _any_rank(
                None
                if max_seconds is None and should_stop is None
                else (max_seconds is not None and time.monotonic() - began > max_seconds)
                or (should_stop is not None and should_stop()),
                device,
            )
            saves = _is_due(step, config.checkpoint_interval, config.steps) or timed_out
            if reports or saves or not is_waited_for(device):
                unread.read_into(running)
            if profiler is not None:
                profiler.waited(batch.wait_s)
                with clock.stopped():
                    profile = profiler.written(is_last=step == config.steps or timed_out) or profile
            mean_loss, num_without_pairs = running.mean(), running.num_images_without_pairs
            if reports:
                running.reset()
            if saves:
                _refuse_lost_weights(engine, step)
            if reports or saves:
                seconds = clock.lap()
                report = Report(
                    step=step,
                    num_steps=config.steps,
                    samples_seen=step * config.global_batch,
                    loss=mean_loss,
                    learning_rate=rate,
                    gradient_norm=float(engine.get_global_grad_norm() or 0.0),
                    images_per_s=clock.steps * config.global_batch / seconds,
                    wait_fraction=clock.wait_s / seconds,
                    num_replaced=int(counters.snapshot().get("replaced_records", 0)),
                    data=counters.snapshot(),
                    eta_s=(config.steps - step) * seconds / clock.steps,
                    negatives=config.negatives,
                    num_images_without_pairs=num_without_pairs,
                    equivariance_error=_equivariance_error(taken),
                    resumed_from=resumed_from,
                    checkpoint=path_of(step) if saves else None,
                    compiled=compiled,
                    profile=profile,
                )
                resumed_from = compiled = profile = None
                # Before the checkpoint: whatever goes on from it finds the rows of all steps before.
                history.add(report, flush=saves)
                clock = _Clock()
                if saves:
                    save_checkpoint(
                        engine,
                        storage,
                        step=step,
                        config=config,
                        keep=config.keep_checkpoints,
                        state={"stream": state.to_dict(), "running": asdict(running)},
                    )
                yield report
            if timed_out:
                return
    finally:
        batches.close()
        engine.destroy()


def _encoded_shape(config: PretrainConfig, world_size: int) -> tuple[int, ...]:
    """Return the shape (B, C, *S) of what the backbone encodes at once: both views of a micro-batch."""
    num_images = config.micro_batch or config.global_batch // world_size
    return 2 * num_images, config.model.in_channels, *[config.image.size] * config.image.dimensions


@dataclass
class _Running:
    """Sums since the last report; part of the checkpoint, so that a resumed curve is the same curve."""

    total: float = 0.0
    count: int = 0
    num_images_without_pairs: int = 0

    def add(self, loss: float, num_images_without_pairs: int) -> None:
        self.total += loss
        self.count += 1
        self.num_images_without_pairs += num_images_without_pairs

    def mean(self) -> float:
        return self.total / max(1, self.count)

    def reset(self) -> None:
        self.total, self.count, self.num_images_without_pairs = 0.0, 0, 0


class _Unread:
    """Steps that were taken, and whose values still lie on the device."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, Step]] = []

    def add(self, step: int, taken: Step) -> None:
        self._steps.append((step, taken))

    def read_into(self, running: _Running) -> None:
        """Wait for the device, once, and add up what the steps have to say. Collective.

        Raises:
            TrainingError: On every rank, for the first step that went wrong on any.
        """
        values = torch.stack(
            [
                torch.stack([value.double() for value in (taken.loss, taken.num_images_without_pairs, *found)])
                for _, taken in self._steps
                for found in [taken.findings.counts()]
            ]
        )  # (steps, 2 + findings)
        of_ranks = torch.stack(_gathered(values)).tolist()
        for number, (step, taken) in enumerate(self._steps):
            num_without_pairs = 0
            for rank, (loss, without_pairs, *counts) in enumerate(of_rank[number] for of_rank in of_ranks):
                try:
                    taken.findings.refuse([int(count) for count in counts])
                    if not math.isfinite(loss):
                        raise EmbeddingError(f"the loss is {loss}")
                except EmbeddingError as error:
                    where = f"rank {rank}: " if len(of_ranks) > 1 else ""
                    raise _diverged(step, f"{where}{error}") from error
                num_without_pairs += int(without_pairs)
            running.add(of_ranks[0][number][0], num_without_pairs)
        self._steps.clear()


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


def _diverged(step: int, error: object) -> TrainingError:
    return TrainingError(
        f"step {step}: {error}; the last good checkpoint stays. "
        "Lower pretrain.optimizer.learning_rate, or use precision fp32"
    )


def _refuse_lost_weights(engine: Any, step: int) -> None:
    """Raise `TrainingError` rather than save weights of which some are not finite, though the loss before them was."""
    counts = [(~torch.isfinite(parameter.detach())).sum() for parameter in engine.module.parameters()]
    if lost := int(torch.stack(counts).sum()):
        raise _diverged(step, f"{lost} weights are no longer finite")


def _equivariance_error(taken: Step) -> float | None:
    if taken.alignment is None:
        return None
    return equivariance_error(torch.stack(_gathered(taken.alignment.double())).sum(0).tolist())


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


def _any_rank(flag: bool | None, device: torch.device) -> bool:
    """Return whether a flag is up on any rank; None on all of them: it is never raised, and nobody has to be asked."""
    if flag is None or torch.distributed.get_world_size() == 1:
        return bool(flag)
    value = torch.tensor([float(flag)], device=device)
    torch.distributed.all_reduce(value)
    return bool(value.item() > 0)


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
