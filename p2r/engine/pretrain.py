"""Pretraining as a generator of reports: corpus -> stream -> steps -> checkpoints.

The same function runs in a for-loop on a laptop and on every worker of a cluster; the caller decides what to do with a
report. All ranks yield at the same steps, because saving is collective.

On a GPU the host runs ahead of the device. Results of steps are read at reports and before checkpoints, so no checkpoint
contains weights affected by a bad step. On a CPU every step is read at once.

A step with a non-finite loss or gradient is skipped on every rank (see `p2r.engine.update`). Its batch is consumed, `step` and
schedule advance, and the skip is counted. While steps are skipped, checkpoints that are only due by interval are not saved: they
would push out good ones.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from p2r.allocator import keep_freed_memory
from p2r.config import PretrainConfig
from p2r.device import is_waited_for
from p2r.engine.build import full_weights, join_process_group, masters
from p2r.engine.checkpoint import Checkpoints, Note, complete_steps, newest_checkpoint, refuse_other_config
from p2r.engine.checkpoint_manifest import MANIFEST, SavedCheckpoint, read_checkpoint
from p2r.engine.determinism import deterministic
from p2r.engine.peers import refuse_mixed_gpus
from p2r.engine.profile import peak_mib
from p2r.engine.report import PretrainReport
from p2r.engine.running import (
    BadStep,
    Clock,
    gather_contrast_health,
    gather_equivariance_error,
    gather_health,
    gather_loss_parts,
    gather_values,
)
from p2r.engine.start import PendingReport, PretrainRun, begin_run
from p2r.engine.step import Step, take_step
from p2r.engine.uploading import path_of
from p2r.engine.weights import backbone_weights
from p2r.errors import CheckpointError, EmbeddingError, InputError, TrainingError
from p2r.schedule import averaging, learning_rate
from p2r.storage import Storage


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
) -> Generator[PretrainReport, None, None]:
    """Train to `config.steps`, resuming from the newest checkpoint if there is one.

    Args:
        config: Configuration of the run.
        storage: `<storage>/pretrain`.
        corpus: The job's own corpus, used if `config` names none.
        device: Device of this process.
        max_seconds: Time after which to save a checkpoint and end early; a later call resumes.
        profile_steps: Number of steps to profile on rank 0, after a few others, into `<storage>/pretrain/profile`; 0: none.
        should_stop: Called after every step. Once it is true on any rank, all save a checkpoint of that step and end. Given
            on all ranks or on none.
        note: Receives, on rank 0, every checkpoint that could not be used.

    Raises:
        InputError: A corpus, checkpoint or number of workers does not fit.
        StorageError: The previous checkpoint could not be uploaded.
        TrainingError: Too many steps in a row were not finite, or the network has died.
    """
    began = time.monotonic()
    if device.type == "cpu":
        keep_freed_memory()

    def is_over() -> bool:
        return (max_seconds is not None and time.monotonic() - began > max_seconds) or (
            should_stop is not None and should_stop()
        )

    with deterministic(config.deterministic), _round_products(config, device):
        join_process_group(device)
        refuse_mixed_gpus(device)
        with Checkpoints(storage, config, note=note) as checkpoints:
            fetched = checkpoints.newest()
            if fetched is not None and fetched.saved.step >= config.steps:
                return
            run = begin_run(
                config,
                storage=storage,
                corpus=corpus,
                device=device,
                checkpoints=checkpoints,
                fetched=fetched,
                profile_steps=profile_steps,
                is_over=None if max_seconds is None and should_stop is None else is_over,
            )
            yield from _train_steps(run)


@contextmanager
def _round_products(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """Allow float32 products to be rounded to TF32 for the duration of a run that asks for it.

    Raises:
        InputError: The device does not support TF32.
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


def _train_steps(run: "PretrainRun") -> Generator[PretrainReport, None, None]:
    """Train to the last step, or until the run is over on any rank."""
    config, checkpoints = run.config, run.checkpoints
    try:
        for step in range(run.first_step, config.steps + 1):
            reports = _is_due(step, config.report_interval, config.steps)
            saves = _is_due(step, config.checkpoint_interval, config.steps)
            taken = _take_step(run, step, reports=reports)
            stops = run.is_over()
            is_last = step == config.steps or stops
            if reports or saves or stops or not is_waited_for(run.device):
                _read_results(run)
            saves = is_last or (saves and not run.running.skipped_in_a_row)
            _profile_and_probe(run, step, is_last=is_last)
            if saves:
                _refuse_lost_weights(run, step)
            if reports or saves:
                report = _make_report(run, step, taken, ends_interval=reports, is_last=is_last)
                # Before the checkpoint, so that a resumed run finds the rows of all earlier steps.
                run.history.add(report, flush=saves)
                run.clock = Clock()
                if saves:
                    _save_checkpoint(run, step)
                if is_last:
                    checkpoints.finish()  # the last report must not precede its checkpoint
                    report = _add_upload(report, checkpoints)
                yield report
            if stops:
                return
    finally:
        run.batches.close()
        run.engine.destroy()


def _take_step(run: PretrainRun, step: int, *, reports: bool) -> Step:
    """Take a step with the next batch; its results stay on the device."""
    config = run.config
    every = config.report_interval * config.equivariance_interval
    with nullcontext() if run.profiler is None else run.profiler.step(step, run.engine):
        batch, run.state = next(run.batches)
        try:
            taken = take_step(
                run.engine,
                batch,
                config=config,
                learning_rate=_learning_rate(config, step),
                averaging=None if config.ema_decay is None else averaging(step - 1, decay=config.ema_decay),
                aligns=reports and _is_due(step, every, config.steps),
                timed=run.timed,
            )
        except EmbeddingError as error:
            raise _divergence_error(run, step, error) from error
    run.unread.add(step, taken)
    run.clock.add(batch.wait_s)
    if run.profiler is not None:
        run.profiler.waited(batch.wait_s)
    return taken


def _learning_rate(config: PretrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1."""
    return learning_rate(
        step - 1,
        peak=config.optimizer.learning_rate,
        num_steps=config.steps,
        warmup_fraction=config.optimizer.warmup_fraction,
    )


def _read_results(run: PretrainRun) -> None:
    """Wait for the device, and add up the results of all steps since the last call. Collective."""
    try:
        run.unread.read_into(run.running)
    except BadStep as bad:
        raise _divergence_error(run, bad.step, bad) from bad


def _profile_and_probe(run: PretrainRun, step: int, *, is_last: bool) -> None:
    """Write a profile and probe the weights if either is due, with the clock stopped. Collective."""
    if run.profiler is not None:
        with run.clock.stopped():
            run.pending.profile = run.profiler.written(is_last=is_last) or run.pending.profile
    if run.config.probe is not None and _is_due(step, run.config.probe.interval, run.config.steps):
        weights = full_weights(run.engine)
        if run.probe is not None:
            with run.clock.stopped():  # the other ranks wait in the next step's first collective
                run.pending.probe_dice = run.probe.dice(backbone_weights(weights))


def _refuse_lost_weights(run: PretrainRun, step: int) -> None:
    """Raise `TrainingError` if weights are not finite although the previous loss was: they must not be saved. Collective."""
    if lost := _count_lost_weights(run.engine):
        raise _divergence_error(run, step, f"{lost} weights are no longer finite")


def _make_report(run: PretrainRun, step: int, taken: Step, *, ends_interval: bool, is_last: bool) -> PretrainReport:
    """Build the report of the current interval. Collective."""
    config, running, clock, data = run.config, run.running, run.clock, run.counters.snapshot()
    mean_loss, num_without_pairs = running.mean(), running.num_images_without_pairs
    if ends_interval:
        running.reset()
    pending, run.pending = run.pending, PendingReport()
    seconds = clock.lap()
    report = PretrainReport(
        step=step,
        num_steps=config.steps,
        samples_seen=step * config.global_batch,
        loss=mean_loss,
        learning_rate=_learning_rate(config, step),
        gradient_norm=running.gradient_norm,
        images_per_s=clock.steps * config.global_batch / seconds,
        wait_fraction=clock.wait_s / seconds,
        num_replaced=int(data.get("replaced_records", 0)),
        data=data,
        eta_s=(config.steps - step) * seconds / clock.steps,
        negatives=config.negatives,
        images_by_value={value: step * num for value, num in run.images_per_step.items()}
        if run.images_per_step
        else None,
        num_images_without_pairs=num_without_pairs,
        skipped_steps=running.skipped_steps,
        pixel_pairs_per_s=clock.steps * config.global_batch * config.loss.pixel_pairs_per_image / seconds,
        step_s=seconds / clock.steps,
        memory_mib=peak_mib(run.device),
        world_size=torch.distributed.get_world_size(),
        loss_parts=gather_loss_parts(taken),
        health=gather_health(taken),
        contrast_pairs=gather_contrast_health(taken, config),
        equivariance_error=gather_equivariance_error(taken),
        checkpoint=path_of(step) if is_last else run.checkpoints.completed(),
        **asdict(pending),
    )
    return _add_upload(report, run.checkpoints)


def _save_checkpoint(run: PretrainRun, step: int) -> None:
    """Save a checkpoint of this step; the upload runs in the background. Collective."""
    run.checkpoints.save(
        run.engine,
        step=step,
        state={"stream": run.state.to_dict(), "running": asdict(run.running)},
        init_from=run.init_from,
        tensors={"ema": full_weights(run.engine, mean=True)} if run.config.ema_decay is not None else None,
    )
    if not run.running.skipped_in_a_row:
        run.good = path_of(step)


def _add_upload(report: PretrainReport, checkpoints: Checkpoints) -> PretrainReport:
    """Add time and size of the last upload, if there was one."""
    uploaded = checkpoints.uploaded
    if uploaded is None:
        return report
    return replace(report, checkpoint_s=uploaded.seconds, checkpoint_bytes=uploaded.num_bytes)


def _divergence_error(run: PretrainRun, step: int, error: object) -> TrainingError:
    last = (
        "there is no checkpoint yet" if run.good is None else f"the last good checkpoint is {run.storage.at(run.good)}"
    )
    return TrainingError(f"step {step}: {error}; {last}. Lower pretrain.optimizer.learning_rate, or use precision fp32")


def _count_lost_weights(engine: Any) -> int:
    """Return the number of weights that are not finite. Collective."""
    lost = torch.stack([(~torch.isfinite(part.detach())).sum() for part in masters(engine)]).sum()
    of_ranks = [int(count) for count in gather_values(lost)]
    return max(of_ranks) if engine.zero_optimization_stage() == 0 else sum(of_ranks)


def _is_due(step: int, interval: int, num_steps: int) -> bool:
    """Return whether an action is due after a step: every `interval` steps and after the last; never if `interval` is 0."""
    return interval > 0 and (step % interval == 0 or step == num_steps)


def finished_checkpoint(storage: Storage, config: PretrainConfig) -> SavedCheckpoint:
    """Return the last step's checkpoint.

    Raises:
        CheckpointError: There is none yet, it belongs to another run, or training has not ended.
    """
    checkpoint = newest_checkpoint(storage)
    if checkpoint is None:
        raise CheckpointError(f"{storage.at('checkpoints')} holds no checkpoint: run the pretrain stage first")
    refuse_other_config(checkpoint.manifest, config, where=storage.at(checkpoint.path))
    if checkpoint.step < config.steps:
        raise CheckpointError(
            f"{storage.at(checkpoint.path)} is the newest checkpoint of {config.steps} steps: run the job to its end, or publish a "
            f"checkpoint on the way with p2r publish JOB --step {checkpoint.step}"
        )
    return checkpoint


def checkpoint_at(storage: Storage, config: PretrainConfig, step: int) -> SavedCheckpoint:
    """Return the complete checkpoint of a step, also of a run at work.

    Raises:
        CheckpointError: There is none of this step, or it belongs to another run.
    """
    path = path_of(step)
    if not storage.exists(f"{path}/{MANIFEST}"):
        found = complete_steps(storage)
        there = f"complete are the steps {', '.join(map(str, found))}" if found else "none is complete yet"
        raise CheckpointError(
            f"{storage.at(path)} is not a complete checkpoint: {there}. Training keeps the newest pretrain.keep_checkpoints "
            f"({config.keep_checkpoints}) and multiples of pretrain.keep_every ({config.keep_every})"
        )
    checkpoint = read_checkpoint(storage, path)
    refuse_other_config(checkpoint.manifest, config, where=storage.at(path))
    return checkpoint
