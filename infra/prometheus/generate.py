#!/usr/bin/env python3
"""Generator of Prometheus's configuration: scraping, recorded series, alerts.

    python -m infra.prometheus.generate                                # writes the files that are committed beside this one
    python -m infra.prometheus.generate --speed 60 --output /tmp/fast  # divides every window by 60: minutes become seconds

`rules.yml` belongs to both configurations: `prometheus.yml` reads the discovery files of this node and of Ray, `kubernetes.yml`
the annotations of pods. Expressions write a window as `window(seconds)` and a number of seconds as `seconds(n)`. Both are
divided by the speed, so a fast demonstration uses the same rules as production. Ages and levels leave out `pushed`, the last values
of ended processes in a Pushgateway, which keeps them until somebody deletes them. Every alert names its section of
`infra/RUNBOOK.md`; `tests/infra/test_prometheus.py` compares everything with a scrape of a real run.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FOLDER = "/var/lib/p2r/metrics"
RAY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"
SCRAPE_S = 30.0
_HEADER = "# Made by `python -m infra.prometheus.generate`: change the generator, not this file.\n"


@dataclass(frozen=True)
class Record:
    """A series that Prometheus computes, for alerts and dashboards."""

    name: str
    """`level:metric:operation`; the level is the remaining labels."""
    expression: str
    help: str
    unit: str = ""


@dataclass(frozen=True)
class Alert:
    """A condition that needs attention, and its urgency."""

    name: str
    expression: str
    for_s: float
    """Time for which the condition must hold, s."""
    severity: str
    """page: the run has stopped or its work is at risk; ticket: it continues, slower or with worse data."""
    summary: str


RECORDS = (
    Record(
        "run:p2r_train_progress_age:seconds",
        'time() - max by (run) (p2r_train_progress_timestamp_seconds{pushed=""})',
        "Time since any rank last reported.",
        "seconds",
    ),
    Record(
        "run:p2r_train_steps:rate",
        "sum by (run) (rate(p2r_train_steps_total[window(600)]))",
        "Optimizer steps, over ten minutes.",
        "per second",
    ),
    Record(
        "run:p2r_train_wait_ratio:max",
        'max by (run) (avg_over_time(p2r_train_wait_ratio{pushed=""}[window(600)]))',
        "Largest fraction of time that a rank waited for data, over ten minutes.",
        "ratio",
    ),
    Record(
        "run:p2r_checkpoint_age:seconds",
        'time() - max by (run) (p2r_checkpoint_timestamp_seconds{pushed=""})',
        "Age of the newest checkpoint: the work that a fault would cost.",
        "seconds",
    ),
    Record(
        "run:p2r_data_fetched_bytes:rate",
        "sum by (run) (rate(p2r_data_fetched_bytes_total[window(300)]))",
        "Bytes from object storage, all ranks.",
        "bytes",
    ),
    Record(
        "run:p2r_cache_hit:ratio",
        "sum by (run) (rate(p2r_cache_hits_total[window(300)]))"
        " / (sum by (run) (rate(p2r_cache_hits_total[window(300)])) + sum by (run) (rate(p2r_cache_misses_total[window(300)])))",
        "Fraction of shards found in the node's cache.",
        "ratio",
    ),
    Record(
        "node:p2r_disk_free:ratio",
        'min by (run, node, folder) (p2r_disk_free_bytes{pushed=""} / p2r_disk_size_bytes{pushed=""})',
        "Free fraction of the disks that p2r writes to.",
        "ratio",
    ),
    Record(
        "run:p2r_run_faults_of_limit:ratio",
        "max by (run, cause) (p2r_run_faults / p2r_run_fault_limit)",
        "Failures in a row without a new checkpoint, as a fraction of those that the job allows.",
        "ratio",
    ),
)

ALERTS = (
    Alert(
        "P2RNoProgress",
        "run:p2r_train_progress_age:seconds > seconds(900)",
        for_s=0,
        severity="page",
        summary="{{ $labels.run }} has not reported a step for {{ $value | humanizeDuration }}",
    ),
    Alert(
        "P2RProcessUnreachable",
        'up{job="p2r", ended=""} == 0',
        for_s=300,
        severity="page",
        summary="{{ $labels.instance }} does not answer: it was killed, or its node is gone",
    ),
    # The series of an ended run say only that it is gone, as after a stop. Its driver therefore leaves a target behind if it failed.
    Alert(
        "P2RRunEnded",
        'up{job="p2r", ended="failed"} == 0',
        for_s=300,
        severity="page",
        summary="{{ $labels.run }} has ended with an error",
    ),
    Alert(
        "P2RLossNotFinite",
        "sum by (run) (increase(p2r_train_skipped_steps_total[window(900)])) > 0"
        ' or sum by (run) (increase(p2r_faults_total{cause="divergence"}[window(900)])) > 0'
        ' or max by (run) (p2r_train_loss{pushed=""} != p2r_train_loss)'
        ' or max by (run) (abs(p2r_train_loss{pushed=""}) == Inf)',
        for_s=0,
        severity="page",
        summary="{{ $labels.run }}: a loss or gradient was not finite",
    ),
    Alert(
        "P2RCollapse",
        'min by (run) (p2r_embedding_effective_rank{pushed=""}) < 2'
        ' or max by (run) (p2r_embedding_dead_dimensions_ratio{pushed=""}) > 0.5',
        for_s=900,
        severity="page",
        summary="{{ $labels.run }}: embeddings use hardly any dimensions",
    ),
    Alert(
        "P2RCheckpointTooOld",
        "run:p2r_checkpoint_age:seconds > seconds(3600)",
        for_s=0,
        severity="page",
        summary="{{ $labels.run }}: a fault now would cost {{ $value | humanizeDuration }} of work",
    ),
    Alert(
        "P2RRestartsNearLimit",
        "run:p2r_run_faults_of_limit:ratio >= 0.5"
        " and on (run, cause) (time() - max by (run, cause) (p2r_fault_timestamp_seconds) < seconds(3600))",
        for_s=0,
        severity="page",
        summary="{{ $labels.run }}: {{ $value | humanizePercentage }} of the failures in a row that the job allows, the last by "
        "{{ $labels.cause }}",
    ),
    Alert(
        "P2RDataWaitHigh",
        "run:p2r_train_wait_ratio:max > 0.3",
        for_s=300,
        severity="ticket",
        summary="{{ $labels.run }} waits for data {{ $value | humanizePercentage }} of the time",
    ),
    Alert(
        "P2RDiskFull",
        "node:p2r_disk_free:ratio < 0.05",
        for_s=300,
        severity="page",
        summary="{{ $labels.node }}: the disk of the {{ $labels.folder }} folder has {{ $value | humanizePercentage }} left",
    ),
    Alert(
        "P2RCacheFull",
        "sum by (run) (increase(p2r_cache_refusals_total[window(900)])) > 0"
        " or sum by (run) (increase(p2r_data_range_reads_total[window(900)])) > 0",
        for_s=0,
        severity="ticket",
        summary="{{ $labels.run }}: shards do not fit into the node's cache and are read by range repeatedly",
    ),
    Alert(
        "P2RQuarantineGrowing",
        "sum by (run) (increase(p2r_data_replaced_records_total[window(3600)])) > 0",
        for_s=0,
        severity="ticket",
        summary="{{ $labels.run }}: about {{ $value | humanize }} damaged samples were replaced within the hour",
    ),
)


def rules(*, speed: float = 1.0) -> dict[str, Any]:
    """Return Prometheus's rules."""
    records = [{"record": record.name, "expr": rendered(record.expression, speed=speed)} for record in RECORDS]
    alerts = [
        {
            "alert": alert.name,
            "expr": rendered(alert.expression, speed=speed),
            **({"for": duration(alert.for_s / speed)} if alert.for_s else {}),
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook": f"infra/RUNBOOK.md#{alert.name.lower()}"},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "p2r", "rules": records + alerts}]}  # one group: alerts use the latest records


def configuration(*, speed: float = 1.0, folder: str = FOLDER, ray_file: str = RAY_FILE) -> dict[str, Any]:
    """Return Prometheus's configuration for one machine, or for several with mounted discovery folders."""

    def files(name: str, path: str) -> dict[str, Any]:
        found = {"files": [path], "refresh_interval": duration(SCRAPE_S / speed)}
        return {"job_name": name, **_LIMITS, "file_sd_configs": [found]}

    return {**_global_section(speed), "scrape_configs": [files("p2r", f"{folder}/*.json"), files("ray", ray_file)]}


def kubernetes() -> dict[str, Any]:
    """Return Prometheus's configuration for Kubernetes: pods with the annotation `prometheus.io/scrape`, and their ports.

    If a pod declares several ports, those named `p2r-metrics*` are scraped; Ray's are named `metrics`.
    """
    relabel = [
        {
            "source_labels": ["__meta_kubernetes_pod_annotation_prometheus_io_scrape"],
            "regex": "true",
            "action": "keep",
        },
        {"source_labels": ["__meta_kubernetes_pod_container_port_name"], "regex": "p2r-metrics.*", "action": "keep"},
        {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
        {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
        {"source_labels": ["__meta_kubernetes_pod_node_name"], "target_label": "node"},
    ]
    # Not named `p2r`: only the declared ports that processes took answer, and Kubernetes checks that the pod lives.
    job = {
        "job_name": "p2r-pods",
        **_LIMITS,
        "kubernetes_sd_configs": [{"role": "pod"}],
        "relabel_configs": relabel,
    }
    ray = {**job, "job_name": "ray", "relabel_configs": [relabel[0], {**relabel[1], "regex": "metrics"}, *relabel[2:]]}
    return {**_global_section(1.0), "scrape_configs": [job, ray]}


def rendered(expression: str, *, speed: float = 1.0) -> str:
    """Return an expression with its windows and seconds divided by the speed."""
    fast = re.sub(r"window\((\d+)\)", lambda found: duration(float(found[1]) / speed), expression)
    return re.sub(r"\bseconds\((\d+)\)", lambda found: f"{float(found[1]) / speed:g}", fast)


def duration(seconds: float) -> str:
    """Format a duration for Prometheus: `15m`, `500ms`."""
    left = round(seconds * 1000)
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if left % size == 0:
            return f"{left // size}{unit}"
    return f"{left}ms"


def written(value: dict[str, Any]) -> str:
    """Return the text of a configuration file."""
    return _HEADER + yaml.safe_dump(value, sort_keys=False, width=140)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="Write Prometheus's configuration and rules.")
    parser.add_argument("--speed", type=float, default=1.0, help="divide every window by this (default: 1)")
    parser.add_argument("--folder", default=FOLDER, help=f"folder of p2r's discovery files (default: {FOLDER})")
    parser.add_argument("--ray-file", default=RAY_FILE, help=f"Ray's discovery file (default: {RAY_FILE})")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the files (default: beside this program)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    base = configuration(speed=options.speed, folder=options.folder, ray_file=options.ray_file)
    files = {"rules.yml": rules(speed=options.speed), "prometheus.yml": base, "kubernetes.yml": kubernetes()}
    for name, value in files.items():
        (options.output / name).write_text(written(value))
        print(options.output / name)


# A target may not be ours: these limits bound the memory that one target can use.
_LIMITS = {"sample_limit": 20_000, "label_limit": 30, "label_value_length_limit": 500, "body_size_limit": "10MB"}


def _global_section(speed: float) -> dict[str, Any]:
    scrape = duration(SCRAPE_S / speed)
    timeout = duration(min(10.0, SCRAPE_S / speed))
    return {
        "global": {"scrape_interval": scrape, "scrape_timeout": timeout, "evaluation_interval": scrape},
        "rule_files": ["rules.yml"],
    }


if __name__ == "__main__":
    main()
