"""Pretraining as a generator of reports: corpus -> stream -> steps -> checkpoints.

The same function runs in a for-loop on a laptop and on every worker of a cluster; whoever calls it decides what to do
with a report. All ranks yield at the same steps, because saving is collective.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from p2r.config import PretrainConfig
from p2r.counters import Counters
from p2r.data.stream import Quarantine, Replaced, stream, stream_state
from p2r.engine.build import DTYPES, build_engine, join_process_group
from p2r.engine.checkpoint import load_checkpoint, newest_checkpoint, refuse_other_config, save_checkpoint
from p2r.engine.compiling import warm_up
from p2r.engine.corpora import agreed_corpora
from p2r.engine.schedule import learning_rate
from p2r.engine.step import pretrain_step
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
    """Part of the time in which this rank waited for data."""
    num_replaced: int
    """Damaged samples that this rank has replaced by others, since it started."""
    data: dict[str, float]
    """What this rank's stream has done since it started: bytes, seconds, retries, cache hits (see `p2r.counters`)."""
    eta_s: float
    """Seconds to the end at this speed."""
    negatives: str
    """Which pixels were contrasted with one another."""
    resumed_from: int | None = None
    """In the first report of a resumed run: the step it went on from."""
    checkpoint: str | None = None
    """Path of the checkpoint that this step made, below `<storage>/pretrain`."""
    compiled: str | None = None
    """In the first report of a run that compiles: what came of it."""

    def line(self) -> str:
        """Return the report as one line for a terminal."""
        minutes, seconds = divmod(round(self.eta_s), 60)
        return (
            f"step {self.step}/{self.num_steps} | loss {self.loss:.4f} | {self.images_per_s:.1f} img/s | "
            f"wait {self.wait_fraction:.1%} | lr {self.learning_rate:.1e} | grad {self.gradient_norm:.2f} | "
            f"ETA {minutes}:{seconds:02d}"
            + (f" | {self.compiled}" if self.compiled else "")
            + (f" | negatives {self.negatives}" if "micro" in self.negatives else "")
            + (f" | {self.num_replaced} damaged samples replaced" if self.num_replaced else "")
            + (f" | checkpoint {self.checkpoint}" if self.checkpoint else "")
        )


def pretrain(
    config: PretrainConfig, *, storage: Storage, corpus: Storage, device: torch.device, max_seconds: float | None = None
) -> Iterator[Report]:
    """Train to `config.steps`, from the newest checkpoint if there is one.

    Args:
        config: What to train.
        storage: `<storage>/pretrain`.
        corpus: The job's own corpus, where `config` names none.
        device: This process's device.
        max_seconds: Save a checkpoint and end early after this time, to go on in a later call.

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
            model.to(device).backbone, shape=_encoded_shape(config, world_size), dtype=DTYPES[config.precision]
        )
    engine = build_engine(model.to(device), config, world_size=world_size)
    if is_compiled:
        engine.module.backbone.compile(dynamic=False)
    resumed_from, running = None, _Running()
    if checkpoint is not None:
        load_checkpoint(engine, storage, checkpoint, config=config)
        resumed_from = checkpoint["step"]
        running = _Running(**checkpoint["state"]["running"])
        state = state.resumed(checkpoint["state"]["stream"])
    history = _History(storage, rank, first_step=resumed_from or 0)

    counters = Counters()
    batches = stream(
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
    try:
        clock = _Clock()
        for step in range((resumed_from or 0) + 1, config.steps + 1):
            batch, state = next(batches)
            rate = learning_rate(
                step - 1,
                peak=config.optimizer.learning_rate,
                num_steps=config.steps,
                warmup_fraction=config.optimizer.warmup_fraction,
            )
            try:
                loss = float(pretrain_step(engine, batch, config=config, learning_rate=rate))
                if not math.isfinite(loss):
                    raise EmbeddingError(f"the loss is {loss}")
            except EmbeddingError as error:
                raise TrainingError(
                    f"step {step}: {error}; the last good checkpoint stays. "
                    "Lower pretrain.optimizer.learning_rate, or use precision fp32"
                ) from error
            running.add(loss)
            clock.add(batch.wait_s)
            timed_out = _any_rank(max_seconds is not None and time.monotonic() - began > max_seconds, device)
            saves = step % config.checkpoint_interval == 0 or step == config.steps or timed_out
            reports = step % config.report_interval == 0 or step == config.steps
            path, mean_loss = None, running.mean()
            if reports:
                running.reset()
            if saves:
                path = save_checkpoint(
                    engine,
                    storage,
                    step=step,
                    config=config,
                    keep=config.keep_checkpoints,
                    state={"stream": state.to_dict(), "running": asdict(running)},
                )
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
                    resumed_from=resumed_from,
                    checkpoint=path,
                    compiled=compiled,
                )
                resumed_from = compiled = None
                history.add(report, flush=saves)
                clock = _Clock()
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
    """Sum of the losses since the last report; part of the checkpoint, so that a resumed curve is the same curve."""

    total: float = 0.0
    count: int = 0

    def add(self, loss: float) -> None:
        self.total += loss
        self.count += 1

    def mean(self) -> float:
        return self.total / max(1, self.count)

    def reset(self) -> None:
        self.total, self.count = 0.0, 0


class _Clock:
    def __init__(self) -> None:
        self.steps, self.wait_s, self._began = 0, 0.0, time.monotonic()

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


def _any_rank(flag: bool, device: torch.device) -> bool:
    if torch.distributed.get_world_size() == 1:
        return flag
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
