"""Pretraining of an ablation's variants side by side: a thread of the driver for each that has room on the cluster.

    room / workers of a variant -> threads -> `cluster.pretrain.pretrain` (a worker group of Ray Train each) -> outcomes
    lines with online probes -> Ray Tune's ASHA -> request to stop -> checkpoint, <variant>/pretrain/stopped.json

Variants run in threads, not in trials of Ray Tune around Ray Train. So restarts, preemption, SIGTERM and resumption work as for a
single run, and a waiting thread is cheap. Tune does not restore a scheduler: it loses the rungs of ASHA, and steps count from 1
again (ray#30838). Here both are derived from stored files. Checkpoints show which variants are finished; unfinished ones resume from
theirs. Every `history.jsonl` fills the rungs again.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from pydantic import BaseModel, ConfigDict, ValidationError
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from cluster.faults import Fault
from cluster.metrics import ExporterSettings
from cluster.pretrain import allowed_sizes, pretrain, room_for
from cluster.session import Places
from cluster.stopping import StopRequest, catch_sigterm
from p2r.config import ProbeConfig
from p2r.engine.checkpoint import newest_checkpoint, refuse_other_config
from p2r.engine.history import read_history
from p2r.engine.report import HISTORY
from p2r.errors import P2RError
from p2r.job import AshaConfig, Resources
from p2r.logs import Say, fields_of
from p2r.pipeline.executor import StoppedVariant, VariantOutcome, VariantRun
from p2r.pipeline.lines import say_for_variant

_STOPPED = "stopped.json"
_POLL_S = 0.5


@dataclass(frozen=True)
class VariantSettings:
    """Arguments that all variants share."""

    resources: Resources
    retries: int
    metrics: ExporterSettings
    on_fault: Callable[[Fault], None] | None = None
    profile_steps: int = 0


def pretrain_variants(
    runs: Mapping[str, VariantRun], settings: VariantSettings, *, asha: AshaConfig | None, say: Say
) -> dict[str, VariantOutcome]:
    """Train variants to their last steps, as many at a time as the cluster has room for.

    Args:
        runs: Variants by name.
        settings: Arguments of every variant.
        asha: Rule that stops variants; None: all are trained to their ends.
        say: Receives lines of progress.

    Returns:
        The outcome of every variant. A variant that was not reached before a SIGTERM is unfinished.
    """
    say_safely = _with_lock(say)
    outcomes, shares = _share_out(runs, settings.resources)
    work = _Work(runs, shares, settings, _Halving(asha, runs) if asha is not None else None, say_safely)
    if shares:
        at_a_time = _num_at_a_time(shares, len(runs))
        workers = ", ".join(sorted({str(share.num_workers) for share in shares.values()}))
        say(f"pretrain | {len(shares)} variants, {at_a_time} at a time; workers of each: {workers}")
        outcomes |= _run_all(work, at_a_time)
    return {name: outcomes[name] for name in runs}


@dataclass(frozen=True)
class _Share:
    """Part of the cluster for one variant."""

    resources: Resources
    num_workers: int
    room: int
    """Workers of this kind that the whole cluster has room for."""


@dataclass
class _Work:
    """Variants to train, and the requests to stop them."""

    runs: Mapping[str, VariantRun]
    shares: Mapping[str, _Share]
    settings: VariantSettings
    halving: "_Halving | None"
    say: Say
    places: Places = field(default_factory=Places)
    stops: dict[str, StopRequest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stops = {name: StopRequest() for name in self.runs}

    def ask_all(self, why: str) -> None:
        for stop in self.stops.values():
            stop.ask(why)


def _share_out(
    runs: Mapping[str, VariantRun], resources: Resources
) -> tuple[dict[str, VariantOutcome], dict[str, _Share]]:
    """Return the outcomes of variants that cannot run on this cluster, and the shares of the others.

    A number of workers in the job is kept. A range or `auto` is limited to an equal part of the cluster.
    """
    refused: dict[str, VariantOutcome] = {}
    shares: dict[str, _Share] = {}
    wanted = resources.num_workers
    for name, run in runs.items():
        # `auto` means the largest number for the whole cluster. An equal part of it may need any of the smaller ones.
        asked = (
            resources.model_copy(update={"num_workers": (1, run.config.global_batch)})
            if wanted == "auto"
            else resources
        )
        try:
            sizes, per_worker = allowed_sizes(run.config, asked)
        except P2RError as error:
            refused[name] = VariantOutcome(error=error)
            continue
        room = room_for(per_worker)
        most = max([size for size in sizes if size <= max(1, room // len(runs))], default=sizes[0])
        if isinstance(wanted, tuple):
            given = resources.model_copy(update={"num_workers": (wanted[0], max(wanted[0], most))})
        elif wanted == "auto":
            given = resources.model_copy(update={"num_workers": most})
        else:
            given = resources
        shares[name] = _Share(given, most, room)
    return refused, shares


def _num_at_a_time(shares: Mapping[str, _Share], num_variants: int) -> int:
    room = min(share.room // share.num_workers for share in shares.values())
    return max(1, min(num_variants, room))


def _run_all(work: _Work, at_a_time: int) -> dict[str, VariantOutcome]:
    """Run the variants in threads, and pass on SIGTERM: every running variant then saves a checkpoint."""
    with catch_sigterm() as sigterm, ThreadPoolExecutor(at_a_time, thread_name_prefix="p2r-variant") as pool:
        found = {name: pool.submit(_run_one, name, work) for name in work.shares}
        waiting: set[Future[VariantOutcome]] = set(found.values())
        try:
            while waiting:
                waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED).not_done
                if sigterm.event.is_set():
                    work.ask_all(sigterm.why)
        except BaseException:  # Ctrl-C, too: the pool ends when all variants have saved
            work.ask_all("interrupt")
            raise
    return {name: future.result() for name, future in found.items()}


def _run_one(name: str, work: _Work) -> VariantOutcome:
    run, stop, halving = work.runs[name], work.stops[name], work.halving
    say = say_for_variant(work.say, name, len(work.runs))
    if stop.event.is_set():
        return VariantOutcome()
    try:
        if halving is not None and (before := halving.stopped_before(name)) is not None:
            return VariantOutcome(stopped=before)
        is_done = pretrain(
            run.config,
            storage=run.storage,
            corpus=run.corpus,
            resources=work.shares[name].resources,
            retries=work.settings.retries,
            say=say if halving is None else halving.watching(name, say, stop),
            profile_steps=work.settings.profile_steps,
            metrics=replace(work.settings.metrics, run=f"{work.settings.metrics.run}-{name}"),
            on_fault=work.settings.on_fault,
            stop=stop,
            places=work.places,
        )
        if is_done or halving is None:
            return VariantOutcome(is_done=is_done)
        return VariantOutcome(stopped=halving.record(name))
    except P2RError as error:
        return VariantOutcome(error=error)


class _Stopped(BaseModel):
    """`stopped.json` of a variant."""

    model_config = ConfigDict(strict=True, extra="forbid")
    step: int
    probe_dice: float
    asha: AshaConfig
    probe: ProbeConfig | None = None
    """Probe that measured the Dice; None: an older version wrote the file."""

    def state(self) -> StoppedVariant:
        return StoppedVariant(step=self.step, probe_dice=self.probe_dice)


class _Halving:
    """ASHA over variants, by Ray Tune's own rule. Its state follows from the histories, so a new driver continues it."""

    def __init__(self, asha: AshaConfig, runs: Mapping[str, VariantRun]) -> None:
        self._asha, self._runs, self._lock = asha, runs, threading.Lock()
        probes = [run.config.probe for run in runs.values() if run.config.probe is not None]
        longest = max(run.config.steps for run in runs.values())
        grace = asha.grace_steps or min((probe.interval for probe in probes), default=1)
        self._scheduler = AsyncHyperBandScheduler(
            time_attr="step",
            metric="probe_dice",
            mode="max",
            max_t=max(longest, grace),
            grace_period=grace,
            reduction_factor=asha.reduction_factor,
            stop_last_trials=False,
        )
        self._behind: dict[str, float] = {}
        for name in runs:
            self._scheduler.on_trial_add(None, _trial(name))
        rows = [
            (row.step, name, row.probe_dice)
            for name, run in runs.items()
            if run.storage.exists(HISTORY)
            for row in read_history(run.storage, HISTORY)
        ]
        for step, name, dice in sorted(row for row in rows if row[2] is not None):
            self._is_behind(name, step, float(dice or 0.0))

    def watching(self, name: str, say: Say, stop: StopRequest) -> Say:
        """Return a logger that compares the probes in a variant's lines, and asks the variant to stop when it is behind."""

        def watch(line: str) -> None:
            say(line)
            fields = fields_of(line)
            step, dice = fields.get("step"), fields.get("probe_dice")
            if isinstance(step, int) and isinstance(dice, float) and self._is_behind(name, step, dice):
                self._behind.setdefault(name, dice)
                stop.ask(f"asha: probe Dice {dice:.3f} at step {step} is behind the other variants")

        return watch

    def record(self, name: str) -> StoppedVariant | None:
        """Store and return the state of a variant that ended early; None if another request ended it."""
        storage, probe = self._runs[name].storage, self._runs[name].config.probe
        checkpoint = newest_checkpoint(storage)
        if name not in self._behind or checkpoint is None:
            return None
        found = _Stopped(step=checkpoint.step, probe_dice=self._behind[name], asha=self._asha, probe=probe)
        storage.write_json(_STOPPED, found.model_dump(mode="json"))
        return found.state()

    def stopped_before(self, name: str) -> StoppedVariant | None:
        """Return the state of a variant that an earlier call stopped by the same rule and probe.

        Raises:
            CheckpointError: The variant was stopped with another configuration.
        """
        storage, config = self._runs[name].storage, self._runs[name].config
        if not storage.exists(_STOPPED):
            return None
        try:
            found = _Stopped.model_validate(storage.read_json(_STOPPED, max_bytes=2**16))
        except ValidationError:
            return None  # written by another version: the variant is compared again
        if found.asha != self._asha or found.probe not in (None, config.probe):
            return None
        checkpoint = newest_checkpoint(storage)
        if checkpoint is not None:
            refuse_other_config(checkpoint.manifest, config, where=storage.at(checkpoint.path))
        return found.state()

    def _is_behind(self, name: str, step: int, dice: float) -> bool:
        with self._lock:
            action = self._scheduler.on_trial_result(None, _trial(name), {"step": step, "probe_dice": dice})
        return bool(action == TrialScheduler.STOP)


def _trial(name: str) -> SimpleNamespace:
    """Return the only part of a trial that Ray Tune's scheduler reads: its id."""
    return SimpleNamespace(trial_id=name)


def _with_lock(say: Say) -> Say:
    """Return a logger that several threads may call."""
    lock = threading.Lock()

    def say_safely(line: str) -> None:
        with lock:
            say(line)

    return say_safely
