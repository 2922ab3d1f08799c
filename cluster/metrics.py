"""All metrics of p2r, and the exporter of a process: `PretrainReport`s, faults and trial counts -> Prometheus.

Only this file names metrics. Rules and dashboards are generated from `METRICS` (`infra/prometheus`, `infra/grafana`), and a
test compares them with a scrape of a real run.

Choices. A report is stored unchanged and converted to samples on a scrape: a step costs nothing, a report a few assignments.
Counters start at 0 with their process, as Prometheus expects, so that the first increase is visible. Values of the whole run
(its step, its skipped steps, its faults) are gauges, restored from the checkpoint through the report, or from `faults.jsonl`.
A label takes only the values listed below; anything else becomes `other`. A series therefore contains no path, message or
URL that could hold a secret or a patient's name. `run` is the job's name, whose characters the job restricts.
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
    from cluster.faults import Fault
    from p2r.engine.report import PretrainReport

Role = Literal["worker", "driver"]
Values = Mapping[str, float]

LABELS = ("run", "role", "rank")
"""Labels of every series: the job's name; worker or driver; the rank of a worker, 0 for the driver."""
OTHER = "other"

_PUSH_LIMIT_S = 5.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """Definition of one metric."""

    name: str
    """Name; counters end in `_total`."""
    unit: Literal["", "seconds", "bytes", "ratio", "per second", "nats", "timestamp"]
    help: str
    """One sentence, for Prometheus and above a panel."""
    scope: Literal["run", "process", "driver"]
    """Processes that have it: rank 0, every worker, or the process that runs the job."""
    group: Literal["training", "embedding", "data", "cache", "checkpoint", "faults", "sweep"]
    """Section of the dashboards."""
    source: str
    """`report.x`, `report.x.key`, `data.x` (a sum of `p2r.counters`), or `own.x`."""
    label: str | None = None
    """Name of its label, if it has one besides `LABELS`."""
    values: tuple[str, ...] = ()
    """All values of that label except `other`."""

    @property
    def is_counter(self) -> bool:
        """True if the value only grows until the process ends."""
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
    # Progress of the run.
    Metric("p2r_train_loss", "nats", "Mean loss since the previous report.", "run", "training", "report.loss"),
    Metric("p2r_train_loss_part", "nats", "Parts of the loss, by name.", "run", "training", "report.loss_parts",
           "part", ("positive", "negatives", "invariance", "redundancy", "reconstruction")),
    Metric("p2r_train_step", "", "Optimizer steps since the run began.", "run", "training", "report.step"),
    Metric("p2r_train_target_steps", "", "Length of the run in steps.", "run", "training", "report.num_steps"),
    Metric("p2r_train_images_seen", "", "Images since the run began.", "run", "training", "report.samples_seen"),
    Metric("p2r_train_steps_total", "", "Optimizer steps of this process.", "run", "training", "own.steps"),
    Metric("p2r_train_images_per_second", "per second", "Images of all ranks together.", "run", "training", "report.images_per_s"),
    Metric("p2r_train_pixel_pairs_per_second", "per second", "Pixel pairs of all ranks together.", "run", "training",
           "report.pixel_pairs_per_s"),
    Metric("p2r_train_eta_seconds", "seconds", "Time to the end at the current speed.", "run", "training", "report.eta_s"),
    Metric("p2r_train_learning_rate", "", "Learning rate of the last step.", "run", "training", "report.learning_rate"),
    Metric("p2r_train_gradient_norm", "", "Gradient norm of the last step, before clipping.", "run", "training", "report.gradient_norm"),
    Metric("p2r_train_skipped_steps_total", "", "Steps of this process without an update, because something was not finite.",
           "run", "training", "own.skipped_steps"),
    Metric("p2r_run_skipped_steps", "", "Steps without an update, since the run began.", "run", "training", "report.skipped_steps"),
    Metric("p2r_train_images_without_pairs_total", "", "Images of which no pixel could be paired.", "run", "training",
           "own.images_without_pairs"),
    Metric("p2r_train_workers", "", "Ranks of the run.", "run", "training", "report.world_size"),
    Metric("p2r_train_probe_dice_ratio", "ratio", "Validation Dice of the online probe.", "run", "training", "report.probe_dice"),
    Metric("p2r_train_progress_timestamp_seconds", "timestamp", "Time of this process's last report; before the first, its start.",
           "process", "training", "own.progress"),
    Metric("p2r_train_step_seconds", "seconds", "Mean duration of a step.", "process", "training", "report.step_s"),
    Metric("p2r_train_wait_ratio", "ratio", "Fraction of time that this rank waited for data.", "process", "training",
           "report.wait_fraction"),
    Metric("p2r_train_memory_bytes", "bytes", "Peak memory of this rank.", "process", "training", "own.memory_bytes"),
    # Health of the embeddings.
    Metric("p2r_embedding_equivariance_error_ratio", "ratio", "0: embeddings follow the warp; 1: no better than chance.",
           "run", "embedding", "report.equivariance_error"),
    Metric("p2r_embedding_alignment", "", "Mean squared distance of the embeddings of a pair.", "run", "embedding",
           "report.health.alignment"),
    Metric("p2r_embedding_uniformity", "", "Logarithm of the mean Gaussian potential; 0: all embeddings are one point.",
           "run", "embedding", "report.health.uniformity"),
    Metric("p2r_embedding_effective_rank", "", "Dimensions in use (RankMe); 1: all embeddings are on one line.", "run", "embedding",
           "report.health.effective_rank"),
    Metric("p2r_embedding_dead_dimensions_ratio", "ratio", "Fraction of the channels that do not vary.", "run", "embedding",
           "report.health.dead_dimensions_fraction"),
    # The data plane.
    Metric("p2r_data_fetched_bytes_total", "bytes", "Bytes from object storage.", "process", "data", "data.bytes_fetched"),
    Metric("p2r_data_fetch_seconds_total", "seconds", "Fetching time, summed over threads.", "process", "data", "data.fetch_seconds"),
    Metric("p2r_data_decode_seconds_total", "seconds", "Decoding time, summed over threads.", "process", "data", "data.decode_seconds"),
    Metric("p2r_data_wait_seconds_total", "seconds", "Time spent waiting for batches.", "process", "data", "data.wait_seconds"),
    Metric("p2r_data_batches_total", "", "Batches taken.", "process", "data", "data.batches"),
    Metric("p2r_data_samples_without_contrast_total", "", "Samples exchanged because their session lacks every contrast drawn.", "process",
           "data", "data.samples_without_contrast"),
    Metric("p2r_data_ready_batches_total", "", "Batches ready when one was taken, summed over batches.", "process", "data",
           "data.ready_batches"),
    Metric("p2r_data_range_reads_total", "", "Range reads from object storage, made without a local copy of the shard.", "process", "data",
           "data.range_reads"),
    Metric("p2r_data_retries_total", "", "Requests and reads that were retried.", "process", "data", "data.retries",
           "cause", RETRY_CAUSES),
    Metric("p2r_data_replaced_records_total", "", "Damaged samples replaced by others; each is recorded under quarantine/.",
           "process", "data", "data.replaced_records"),
    Metric("p2r_cache_hits_total", "", "Shards found in the node's cache.", "process", "cache", "data.cache_hits"),
    Metric("p2r_cache_misses_total", "", "Shards that had to be fetched.", "process", "cache", "data.cache_misses"),
    Metric("p2r_cache_evictions_total", "", "Shards evicted from the cache.", "process", "cache", "data.cache_evictions"),
    Metric("p2r_cache_evicted_bytes_total", "bytes", "Bytes of the evicted shards.", "process", "cache",
           "data.cache_evicted_bytes"),
    Metric("p2r_cache_refusals_total", "", "Shards for which there was no room.", "process", "cache", "data.cache_refusals",
           "cause", ("size", "leased", "disk")),
    Metric("p2r_disk_free_bytes", "bytes", "Free space on the disk of a folder.", "process", "cache", "own.disk_free",
           "folder", FOLDERS),
    Metric("p2r_disk_size_bytes", "bytes", "Size of the disk of a folder.", "process", "cache", "own.disk_size",
           "folder", FOLDERS),
    # Checkpoints and faults.
    Metric("p2r_checkpoint_timestamp_seconds", "timestamp", "Time of this process's newest checkpoint; before the first, its start.",
           "run", "checkpoint", "own.checkpoint"),
    Metric("p2r_checkpoint_step", "", "Step of the newest checkpoint of this process.", "run", "checkpoint", "own.checkpoint_step"),
    Metric("p2r_checkpoint_seconds", "seconds", "Duration of saving the newest checkpoint.", "run", "checkpoint",
           "report.checkpoint_s"),
    Metric("p2r_checkpoint_bytes", "bytes", "Size of the newest checkpoint.", "run", "checkpoint", "report.checkpoint_bytes"),
    Metric("p2r_faults_total", "", "Faults seen by this driver.", "driver", "faults", "own.faults", "cause", FAULT_CAUSES),
    Metric("p2r_run_faults", "", "Failures in a row without a new checkpoint, of all causes, up to the last one of this cause.", "driver",
           "faults", "own.run_faults", "cause", FAULT_CAUSES),
    Metric("p2r_run_fault_limit", "", "Failures in a row that the job allows; causes without a limit have none.", "driver", "faults",
           "own.fault_limit", "cause", FAULT_CAUSES),
    Metric("p2r_fault_timestamp_seconds", "timestamp", "Time of the last fault seen by this driver.", "driver", "faults", "own.fault_at",
           "cause", FAULT_CAUSES),
    Metric("p2r_sweep_trials", "", "Trials of the current experiment, by state.", "driver", "sweep", "own.trials",
           "state", TRIAL_STATES),
)
# fmt: on

_OPTIONAL = ("equivariance_error", "health", "probe_dice", "checkpoint_s", "checkpoint_bytes")
"""Report fields that are not in every report: the newest value is kept."""


@dataclass(frozen=True)
class ExporterSettings:
    """Arguments of the `Exporter` of every process of a job."""

    run: str
    storage_url: str
    endpoint: MetricsConfig | None

    def open(self, *, role: Role = "worker", rank: int = 0) -> "Exporter":
        """Start the exporter of this process."""
        return Exporter(run=self.run, storage_url=self.storage_url, endpoint=self.endpoint, role=role, rank=rank)


class Exporter(Collector):
    """Metrics of one process. Thread-safe; its failures never stop training.

    Args:
        run: Name of the job.
        storage_url: Storage of the job; a driver reads earlier faults there.
        rank: Rank of a worker.
        role: Role of this process.
        endpoint: The job's section `metrics`; None: no endpoint, no push.
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
        self._kept: dict[str, object] = {}
        self._first_step = self._first_skipped = self._without_pairs = 0
        self._checkpoint_step: int | None = None
        self._fault_counts: dict[str, float] = {}
        self._fault_limits: dict[str, float] = {}
        self._fault_at: dict[str, float] = {}
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
        """Export the values of a report."""
        from p2r.engine.uploading import step_of  # imports torch, which a process with reports has loaded

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
                self._checkpoint_at, self._checkpoint_step = now, step_of(report.checkpoint)

    def fault(self, fault: "Fault") -> None:
        """Count a fault."""
        with self._lock:
            self._num_faults[self._record_fault(fault, at=time.time())] += 1

    def trials(self, counts: Mapping[str, int]) -> None:
        """Export the number of trials in each state."""
        with self._lock:
            self._trials = {state: float(counts.get(state, 0)) for state in TRIAL_STATES}

    def page(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return bytes(generate_latest(self._registry))

    def collect(self) -> Iterator[Family]:
        """Yield a family for every metric; a metric without a known value has no sample."""
        with self._lock:
            own = self._process_values()
            report, kept = self._report, dict(self._kept)
        for metric in self._metrics:
            labels = (*LABELS, *((metric.label,) if metric.label else ()))
            kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=labels)
            for value_of_label, value in _samples(metric, report, kept, own):
                family.add_metric([*self._constant, *([value_of_label] if metric.label else ())], value)
            yield family

    def close(self, *, has_failed: bool = False) -> None:
        """Push the metrics to `$P2R_PUSHGATEWAY` if set, and end the endpoint. A second call has no effect.

        Args:
            has_failed: The job ends with an error: tell Prometheus by a file that stays (`Endpoint.close`).
        """
        if self._gateway:
            gateway, self._gateway = self._gateway, None
            key = {**dict(zip(LABELS, self._constant, strict=True)), "pushed": "1"}
            try:
                # A gateway keeps the last values for ever: `pushed` tells the rules on ages and levels that nobody is behind them.
                push_to_gateway(gateway, "p2r", self._registry, grouping_key=key, timeout=_PUSH_LIMIT_S)
            except (OSError, ValueError) as error:
                host = urlsplit(gateway if "//" in gateway else f"//{gateway}").hostname
                _LOG.warning("metrics were not pushed to P2R_PUSHGATEWAY at %s: %s", host, type(error).__name__)
        if self._endpoint is not None:
            self._endpoint.close(has_failed=has_failed)
            self._endpoint = None

    def _process_values(self) -> dict[str, float | Values]:
        report = self._report
        memory_mib = getattr(report, "memory_mib", None)
        disks = {name: _disk_space(folder) for name, folder in self._folders.items()}
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
            "run_faults": {cause: self._fault_counts.get(cause, 0.0) for cause in FAULT_CAUSES},
            "fault_limit": dict(self._fault_limits),
            "fault_at": dict(self._fault_at),
            "trials": self._trials,
        }
        return {name: value for name, value in own.items() if value is not None}

    def _record_fault(self, fault: "Fault", *, at: float) -> str:
        cause = fault.cause if fault.cause in FAULT_CAUSES else "unknown"
        self._fault_at[cause] = at
        if fault.count is not None:
            self._fault_counts[cause] = float(fault.count)
        if fault.limit is not None:
            self._fault_limits[cause] = float(fault.limit)
        return cause

    def _restore_faults(self, storage_url: str) -> None:
        from cluster.faults import read_faults  # imports Ray, which workers' exporters do not need

        try:
            for fault in read_faults(Storage(storage_url).child("pretrain")):
                self._record_fault(fault, at=self._started_at)
            self._fault_at.clear()  # old faults must not raise an alert
        except (P2RError, ValueError) as error:
            _LOG.warning("faults of earlier starts are not in the metrics: %s", error)


def _samples(
    metric: Metric, report: "PretrainReport | None", kept: Mapping[str, object], own: Mapping[str, float | Values]
) -> Iterator[tuple[str, float]]:
    """Yield the value of a metric for each value of its label."""
    kind, name, *keys = metric.source.split(".")
    if kind == "own":
        found: Any = own.get(name)
    elif kind == "data":
        found = _counter_values(metric, name, {} if report is None else report.data)
    else:
        found = kept.get(name, getattr(report, name, None))
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
    if metric.label is None:
        if isinstance(found, int | float):
            yield "", float(found)
    elif isinstance(found, Mapping):
        yield from _limit_labels(metric, found.items())


def _counter_values(metric: Metric, name: str, data: Values) -> float | Values:
    """Return the sums of `p2r.counters` under a name; 0 if there are none."""
    if metric.label is None:
        return data.get(name, 0.0)
    by_value = dict.fromkeys(metric.values, 0.0)
    for key, value in data.items():
        if key.startswith(f'{name}{{{metric.label}="'):
            by_value[key.split('"')[1]] = value
    return by_value


def _limit_labels(metric: Metric, items: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Yield the values for listed label values, and the sum of all others as `other`."""
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


def _disk_space(folder: Path) -> tuple[float, float] | None:
    """Return the free bytes and the size of a folder's disk, or of its nearest existing parent's."""
    for place in (folder, *folder.parents):
        try:
            disk = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return float(disk.f_bavail * disk.f_frsize), float(disk.f_blocks * disk.f_frsize)
    return None
