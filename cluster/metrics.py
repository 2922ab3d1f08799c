"""Every metric of p2r, and the object through which a process shows them: `PretrainReport`s, faults and counts of trials -> Prometheus.

This file alone names metrics. Rules and dashboards are generated from `METRICS` (`infra/prometheus`, `infra/grafana`), and a test
compares them with a scrape of a real run.

Choices. A report is kept as it is, and turned into samples when somebody scrapes: a step costs nothing, a report some assignments.
Counters begin at 0 with their process, as Prometheus expects, and exist from its start, so that a first increase is seen; what has to
hold for a whole run (its step, its skipped steps, its faults) is a gauge, whose value comes from the checkpoint through the report, or
from `faults.jsonl`. A label has a value of a list below; anything else becomes `other`. So a series carries no path, no message, no
URL: nothing in which a secret or a patient's name could stand. `run` is the job's name, whose characters the job restricts.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, generate_latest, push_to_gateway
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from cluster.endpoint import Endpoint, discovery_folder, first_port, listening_host
from p2r.cache import cache_folder
from p2r.errors import P2RError
from p2r.job import MetricsConfig
from p2r.storage import Storage

if TYPE_CHECKING:
    from p2r.engine.report import PretrainReport

Role = Literal["worker", "driver"]
Values = Mapping[str, float]

LABELS = ("run", "role", "rank")
"""Of every series: the job's name; worker or driver; the rank of a worker, 0 for the driver."""
OTHER = "other"

_PUSH_LIMIT_S = 5.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """What one name means."""

    name: str
    """Counters end in `_total`."""
    unit: Literal["", "seconds", "bytes", "ratio", "per second", "nats", "timestamp"]
    help: str
    """One sentence, for Prometheus and above a panel."""
    scope: Literal["run", "process", "driver"]
    """Who has it: rank 0, every worker, or the process that runs the job."""
    group: Literal["training", "embedding", "data", "cache", "checkpoint", "faults", "sweep"]
    """Where dashboards show it."""
    source: str
    """`report.x`, `report.x.key`, `data.x` (a sum of `p2r.counters`), or `own.x`."""
    label: str | None = None
    """Name of its label, if it has one besides `LABELS`."""
    values: tuple[str, ...] = ()
    """All values of that label, but for `other`."""

    @property
    def is_counter(self) -> bool:
        """Whether it only grows, until its process ends."""
        return self.name.endswith("_total")


RETRY_CAUSES = (
    *("409", "429", "500", "502", "503", "504", "timeout", "connection", "truncated", "answer", "keys"),
    *("digest", "changed", "damaged_read", "damaged_cache"),
)
FAULT_CAUSES = ("worker", "node", "preemption", "hang", "stop", "checkpoint", "divergence", "driver", "unknown")
TRIAL_STATES = ("pending", "running", "paused", "done", "failed")
FOLDERS = ("cache", "storage")

# fmt: off
METRICS = (
    # What the run is about.
    Metric("p2r_train_loss", "nats", "Mean loss since the report before.", "run", "training", "report.loss"),
    Metric("p2r_train_loss_part", "nats", "Parts of the loss, by name.", "run", "training", "report.loss_parts",
           "part", ("positive", "negatives", "invariance", "redundancy")),
    Metric("p2r_train_step", "", "Optimizer steps since the run began.", "run", "training", "report.step"),
    Metric("p2r_train_target_steps", "", "Length of the run in steps.", "run", "training", "report.num_steps"),
    Metric("p2r_train_images_seen", "", "Images since the run began.", "run", "training", "report.samples_seen"),
    Metric("p2r_train_steps_total", "", "Optimizer steps of this process.", "run", "training", "own.steps"),
    Metric("p2r_train_images_per_second", "per second", "Images of all ranks together.", "run", "training", "report.images_per_s"),
    Metric("p2r_train_pixel_pairs_per_second", "per second", "Pixel pairs of all ranks together.", "run", "training",
           "report.pixel_pairs_per_s"),
    Metric("p2r_train_eta_seconds", "seconds", "Time to the end at this speed.", "run", "training", "report.eta_s"),
    Metric("p2r_train_learning_rate", "", "Learning rate of the last step.", "run", "training", "report.learning_rate"),
    Metric("p2r_train_gradient_norm", "", "Gradient norm of the last step, before clipping.", "run", "training", "report.gradient_norm"),
    Metric("p2r_train_skipped_steps_total", "", "Steps of this process without an update, because something was not finite.",
           "run", "training", "own.skipped_steps"),
    Metric("p2r_run_skipped_steps", "", "Steps without an update, since the run began.", "run", "training", "report.skipped_steps"),
    Metric("p2r_train_images_without_pairs_total", "", "Images of which no pixel could be paired.", "run", "training",
           "own.images_without_pairs"),
    Metric("p2r_train_workers", "", "Ranks of the run.", "run", "training", "report.world_size"),
    Metric("p2r_train_probe_dice_ratio", "ratio", "Validation Dice of the online probe.", "run", "training", "report.probe_dice"),
    Metric("p2r_train_progress_timestamp_seconds", "timestamp", "When this process last reported; before that, when it started.",
           "process", "training", "own.progress"),
    Metric("p2r_train_step_seconds", "seconds", "Mean duration of a step.", "process", "training", "report.step_s"),
    Metric("p2r_train_wait_ratio", "ratio", "Part of the time in which this rank waited for data.", "process", "training",
           "report.wait_fraction"),
    Metric("p2r_train_memory_bytes", "bytes", "Peak memory of this rank.", "process", "training", "own.memory_bytes"),
    # Whether it still learns something.
    Metric("p2r_embedding_equivariance_error_ratio", "ratio", "0: embeddings follow the warp; 1: no better than chance.",
           "run", "embedding", "report.equivariance_error"),
    Metric("p2r_embedding_alignment", "", "Mean squared distance of the embeddings of a pair.", "run", "embedding",
           "report.health.alignment"),
    Metric("p2r_embedding_uniformity", "", "Logarithm of the mean Gaussian potential; 0: all embeddings are one point.",
           "run", "embedding", "report.health.uniformity"),
    Metric("p2r_embedding_effective_rank", "", "Dimensions in use (RankMe); 1: all embeddings lie on one line.", "run", "embedding",
           "report.health.effective_rank"),
    Metric("p2r_embedding_dead_dimensions_ratio", "ratio", "Part of the channels that do not vary.", "run", "embedding",
           "report.health.dead_dimensions_fraction"),
    # The data plane.
    Metric("p2r_data_fetched_bytes_total", "bytes", "Bytes from object storage.", "process", "data", "data.bytes_fetched"),
    Metric("p2r_data_fetch_seconds_total", "seconds", "Time of fetching, over threads.", "process", "data", "data.fetch_seconds"),
    Metric("p2r_data_decode_seconds_total", "seconds", "Time of decoding, over threads.", "process", "data", "data.decode_seconds"),
    Metric("p2r_data_wait_seconds_total", "seconds", "Time of waiting for a batch.", "process", "data", "data.wait_seconds"),
    Metric("p2r_data_batches_total", "", "Batches taken.", "process", "data", "data.batches"),
    Metric("p2r_data_ready_batches_total", "", "How many batches were ready whenever one was taken, summed.", "process", "data",
           "data.ready_batches"),
    Metric("p2r_data_range_reads_total", "", "Reads from object storage by range: no local copy of the shard.", "process", "data",
           "data.range_reads"),
    Metric("p2r_data_retries_total", "", "Requests and reads that were tried again.", "process", "data", "data.retries",
           "cause", RETRY_CAUSES),
    Metric("p2r_data_replaced_records_total", "", "Damaged samples that others replaced; each leaves a note under quarantine/.",
           "process", "data", "data.replaced_records"),
    Metric("p2r_cache_hits_total", "", "Shards found in the node's cache.", "process", "cache", "data.cache_hits"),
    Metric("p2r_cache_misses_total", "", "Shards that had to be fetched.", "process", "cache", "data.cache_misses"),
    Metric("p2r_cache_evictions_total", "", "Shards that made room for others.", "process", "cache", "data.cache_evictions"),
    Metric("p2r_cache_evicted_bytes_total", "bytes", "Bytes of the shards that made room.", "process", "cache",
           "data.cache_evicted_bytes"),
    Metric("p2r_cache_refusals_total", "", "Shards for which there was no room.", "process", "cache", "data.cache_refusals",
           "cause", ("size", "leased", "disk")),
    Metric("p2r_disk_free_bytes", "bytes", "Free space on the disk of a folder.", "process", "cache", "own.disk_free",
           "folder", FOLDERS),
    Metric("p2r_disk_size_bytes", "bytes", "Size of the disk of a folder.", "process", "cache", "own.disk_size",
           "folder", FOLDERS),
    # What a fault would cost, and which faults there were.
    Metric("p2r_checkpoint_timestamp_seconds", "timestamp", "When this process made its newest checkpoint; before that, when it started.",
           "run", "checkpoint", "own.checkpoint"),
    Metric("p2r_checkpoint_step", "", "Step of the newest checkpoint of this process.", "run", "checkpoint", "own.checkpoint_step"),
    Metric("p2r_checkpoint_seconds", "seconds", "How long saving the newest checkpoint took.", "run", "checkpoint",
           "report.checkpoint_s"),
    Metric("p2r_checkpoint_bytes", "bytes", "Size of the newest checkpoint.", "run", "checkpoint", "report.checkpoint_bytes"),
    Metric("p2r_faults_total", "", "Faults that this driver has seen.", "driver", "faults", "own.faults", "cause", FAULT_CAUSES),
    Metric("p2r_run_faults", "", "Faults that count against their limit, over all starts of the run.", "driver", "faults",
           "own.run_faults", "cause", FAULT_CAUSES),
    Metric("p2r_run_fault_limit", "", "How many faults the job allows.", "driver", "faults", "own.fault_limit",
           "cause", FAULT_CAUSES),
    Metric("p2r_fault_timestamp_seconds", "timestamp", "When this driver last saw a fault.", "driver", "faults", "own.fault_at",
           "cause", FAULT_CAUSES),
    Metric("p2r_sweep_trials", "", "Trials of the experiment that runs, by state.", "driver", "sweep", "own.trials",
           "state", TRIAL_STATES),
)
# fmt: on

_OPTIONAL = ("equivariance_error", "health", "probe_dice", "checkpoint_s", "checkpoint_bytes")
"""Fields of a report that are not in every one: the newest value stays."""


class Exporter(Collector):
    """What one process shows. Safe to use from any thread; nothing that goes wrong in it stops training.

    Args:
        run: The job's name.
        storage_url: Of the job; a driver finds there which faults there were before it.
        rank: Of a worker.
        role: What this process does.
        endpoint: The job's section `metrics`; None: no endpoint, and no push.
    """

    def __init__(
        self,
        *,
        run: str,
        storage_url: str,
        rank: int = 0,
        role: Role = "worker",
        endpoint: MetricsConfig | None,
    ) -> None:
        self._constant = (re.sub(r"[^A-Za-z0-9._-]", "_", run)[:64], role, str(rank))
        self._metrics = [metric for metric in METRICS if metric.scope in _scopes(role, rank)]
        self._lock = threading.Lock()
        self._started_at = self._progress_at = self._checkpoint_at = time.time()
        self._report: PretrainReport | None = None
        self._kept: dict[str, Any] = {}
        self._first_step = self._first_skipped = self._without_pairs = 0
        self._checkpoint_step: int | None = None
        self._faults: dict[str, dict[str, float]] = {name: {} for name in ("count", "limit", "at")}
        self._num_faults = dict.fromkeys(FAULT_CAUSES, 0.0)
        self._trials: dict[str, float] = {}
        self._folders = {"cache": cache_folder()}
        if storage_url.startswith("file://"):
            self._folders["storage"] = Path(storage_url.removeprefix("file://"))
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._endpoint: Endpoint | None = None
        self._gateway = os.environ.get("P2R_PUSHGATEWAY") if endpoint is not None else None
        if role == "driver":
            self._restore_faults(storage_url)
        if endpoint is not None:
            node = os.uname().nodename
            self._endpoint = Endpoint(
                self.page,
                host=listening_host(endpoint.host),
                port=first_port(endpoint.port),
                folder=discovery_folder(endpoint.folder),
                run=self._constant[0],
                name=f"{role}-{rank}",
                labels={"instance": "/".join((node, *self._constant)), "node": node},
            )

    @property
    def target(self) -> str | None:
        """`host:port` of the endpoint; None if there is none."""
        return None if self._endpoint is None else self._endpoint.target

    def observe(self, report: "PretrainReport") -> None:
        """Show what a report says."""
        now = time.time()
        with self._lock:
            if self._report is None:
                self._first_step = report.resumed_from or 0
                self._first_skipped = getattr(report, "skipped_steps", 0) if report.resumed_from else 0
            self._report, self._progress_at = report, now
            self._without_pairs += report.num_images_without_pairs
            for name in _OPTIONAL:
                value = getattr(report, name, None)
                if value is not None:
                    self._kept[name] = value
            if report.checkpoint is not None:
                self._checkpoint_at, self._checkpoint_step = now, report.step

    def fault(self, row: Mapping[str, Any]) -> None:
        """Count a fault: a row of `faults.jsonl`."""
        with self._lock:
            self._num_faults[self._note_fault(row, at=time.time())] += 1

    def trials(self, counts: Mapping[str, int]) -> None:
        """Show how many trials are in which state."""
        with self._lock:
            self._trials = {state: float(counts.get(state, 0)) for state in TRIAL_STATES}

    def page(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return bytes(generate_latest(self._registry))

    def collect(self) -> Iterator[Family]:
        """Yield a family of every metric; one whose value is not known yet has no sample."""
        with self._lock:
            own = self._own()
            report, kept = self._report, dict(self._kept)
        for metric in self._metrics:
            labels = (*LABELS, *((metric.label,) if metric.label else ()))
            kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=labels)
            for value_of_label, value in _samples(metric, report, kept, own):
                family.add_metric([*self._constant, *([value_of_label] if metric.label else ())], value)
            yield family

    def close(self) -> None:
        """Push what there is, where `$P2R_PUSHGATEWAY` says, and end the endpoint. A second time nothing happens."""
        if self._gateway:
            gateway, self._gateway = self._gateway, None
            key = dict(zip(LABELS, self._constant, strict=True))
            try:
                push_to_gateway(gateway, "p2r", self._registry, grouping_key=key, timeout=_PUSH_LIMIT_S)
            except (OSError, ValueError) as error:
                host = urlsplit(gateway if "//" in gateway else f"//{gateway}").hostname
                _LOG.warning("metrics were not pushed to P2R_PUSHGATEWAY at %s: %s", host, type(error).__name__)
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _own(self) -> dict[str, float | Values]:
        report = self._report
        memory_mib = getattr(report, "memory_mib", None)
        disks = {name: _disk(folder) for name, folder in self._folders.items()}
        own: dict[str, float | Values | None] = {
            "progress": self._progress_at,
            "steps": 0 if report is None else report.step - self._first_step,
            "skipped_steps": 0 if report is None else getattr(report, "skipped_steps", 0) - self._first_skipped,
            "images_without_pairs": self._without_pairs,
            "memory_bytes": None if memory_mib is None else memory_mib * 2**20,
            "disk_free": {name: disk[0] for name, disk in disks.items() if disk},
            "disk_size": {name: disk[1] for name, disk in disks.items() if disk},
            "checkpoint": self._checkpoint_at,
            "checkpoint_step": self._checkpoint_step,
            "faults": dict(self._num_faults),
            "run_faults": {cause: self._faults["count"].get(cause, 0.0) for cause in FAULT_CAUSES},
            "fault_limit": dict(self._faults["limit"]),
            "fault_at": dict(self._faults["at"]),
            "trials": self._trials,
        }
        return {name: value for name, value in own.items() if value is not None}

    def _note_fault(self, row: Mapping[str, Any], *, at: float) -> str:
        cause = row.get("cause")
        cause = cause if isinstance(cause, str) and cause in FAULT_CAUSES else "unknown"
        self._faults["at"][cause] = at
        for name in ("count", "limit"):
            value = row.get(name)
            if isinstance(value, int):
                self._faults[name][cause] = float(value)
        return cause

    def _restore_faults(self, storage_url: str) -> None:
        path = "pretrain/faults.jsonl"
        try:
            storage = Storage(storage_url)
            if storage.exists(path):
                for row in storage.read_rows(path):
                    self._note_fault(row, at=self._started_at)
                self._faults["at"].clear()  # long ago: nobody has to be told
        except (P2RError, ValueError) as error:
            _LOG.warning("faults of earlier starts are not in the metrics: %s", error)


def _samples(
    metric: Metric, report: "PretrainReport | None", kept: Mapping[str, Any], own: Mapping[str, float | Values]
) -> Iterator[tuple[str, float]]:
    """Yield the value of a metric for each value of its label."""
    kind, name, *keys = metric.source.split(".")
    if kind == "own":
        found: Any = own.get(name)
    elif kind == "data":
        found = _sums(metric, name, {} if report is None else report.data)
    else:
        found = kept.get(name, getattr(report, name, None))
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
    if metric.label is None:
        if isinstance(found, int | float):
            yield "", float(found)
    elif isinstance(found, Mapping):
        yield from _bounded(metric, found.items())


def _sums(metric: Metric, name: str, data: Values) -> float | Values:
    """Return what `p2r.counters` says of a name: 0 where nothing has happened."""
    if metric.label is None:
        return data.get(name, 0.0)
    by_value = dict.fromkeys(metric.values, 0.0)
    for key, value in data.items():
        if key.startswith(f'{name}{{{metric.label}="'):
            by_value[key.split('"')[1]] = value
    return by_value


def _bounded(metric: Metric, items: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Yield what has a listed value of the label, and the sum of all else as `other`."""
    others = 0.0
    for value_of_label, value in items:
        if value_of_label in metric.values:
            yield value_of_label, float(value)
        else:
            others += value
    if others:
        yield OTHER, others


def _scopes(role: Role, rank: int) -> tuple[str, ...]:
    if role == "driver":
        return ("driver",)
    return ("process", "run") if rank == 0 else ("process",)


def _disk(folder: Path) -> tuple[float, float] | None:
    """Return bytes that are free on the disk of a folder, or of the nearest above it, and its size."""
    for place in (folder, *folder.parents):
        try:
            disk = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return float(disk.f_bavail * disk.f_frsize), float(disk.f_blocks * disk.f_frsize)
    return None
