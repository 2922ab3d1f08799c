#!/usr/bin/env python3
"""Generator of Grafana's dashboards: one panel for every metric and recorded series.

    python -m infra.grafana.generate       # writes dashboards/*.json, which are committed

Four dashboards: a run, its data plane, its faults, its sweep. A new metric appears on its group's dashboard without further
changes. A test compares the committed files with this program's output, and checks every expression with promtool.
"""

import json
from pathlib import Path
from typing import Any

from cluster.metrics import METRICS, Metric
from infra.prometheus.generate import RECORDS, Record

HERE = Path(__file__).parent / "dashboards"

_BOARDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "run": (
        "p2r: run",
        ("run:p2r_train_progress_age:seconds", "run:p2r_train_steps:rate", "run:p2r_checkpoint_age:seconds"),
        ("training", "embedding"),
    ),
    "data": (
        "p2r: data plane",
        (
            *("run:p2r_train_wait_ratio:max", "run:p2r_data_fetched_bytes:rate", "run:p2r_cache_hit:ratio"),
            "node:p2r_disk_free:ratio",
        ),
        ("data", "cache"),
    ),
    "faults": (
        "p2r: faults",
        ("run:p2r_run_faults_of_limit:ratio", "run:p2r_checkpoint_age:seconds"),
        ("faults", "checkpoint"),
    ),
    "sweep": ("p2r: sweep", (), ("sweep",)),
}
_UNITS = {
    "": "short",
    "nats": "short",
    "seconds": "s",
    "bytes": "bytes",
    "ratio": "percentunit",
    "per second": "ops",
    "timestamp": "s",
}
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 8
_SOURCE = {"type": "prometheus", "uid": "p2r-prometheus"}


def dashboards() -> dict[str, dict[str, Any]]:
    """Return every dashboard by the name of its file."""
    records = {record.name: record for record in RECORDS}
    found = {}
    for name, (title, recorded, groups) in _BOARDS.items():
        panels = [_record_panel(records[series]) for series in recorded]
        panels += [_metric_panel(metric) for group in groups for metric in METRICS if metric.group == group]
        found[f"{name}.json"] = _new_dashboard(f"p2r-{name}", title, panels)
    return found


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """Return the queries of a dashboard."""
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def written(dashboard: dict[str, Any]) -> str:
    """Return the text of a dashboard's file."""
    return json.dumps(dashboard, indent=1) + "\n"


def main() -> None:
    """Write the files."""
    for name, dashboard in dashboards().items():
        (HERE / name).write_text(written(dashboard))
        print(HERE / name)


def _record_panel(record: Record) -> dict[str, Any]:
    extra = {"node:p2r_disk_free:ratio": " {{node}} {{folder}}", "run:p2r_run_faults_of_limit:ratio": " {{cause}}"}
    unit = "Bps" if record.unit == "bytes" else _UNITS[record.unit]
    return _new_panel(record.help, f'{record.name}{{run=~"$run"}}', unit, "{{run}}" + extra.get(record.name, ""))


def _metric_panel(metric: Metric) -> dict[str, Any]:
    series = f'{metric.name}{{run=~"$run"}}'
    by = ["run", *([] if metric.scope != "process" else ["rank"]), *([metric.label] if metric.label else [])]
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    if metric.is_counter:
        unit = {"bytes": "Bps", "seconds": "percentunit"}.get(metric.unit, "ops")
        return _new_panel(
            f"{metric.help.removesuffix('.')}, per second",
            f"sum by ({', '.join(by)}) (rate({series}[$__rate_interval]))",
            unit,
            legend,
        )
    if metric.unit == "timestamp":
        return _new_panel(f"Time since: {metric.help}", f"time() - {series}", "s", legend)
    return _new_panel(metric.help, series, _UNITS[metric.unit], legend)


def _new_panel(title: str, expression: str, unit: str, legend: str) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": title.removesuffix("."),
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"showPoints": "never"}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [{"refId": "A", "datasource": _SOURCE, "expr": expression, "legendFormat": legend}],
    }


def _new_dashboard(uid: str, title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    placed = [
        {
            "id": number + 1,
            "gridPos": {
                "x": number % _COLUMNS * _WIDTH,
                "y": number // _COLUMNS * _HEIGHT,
                "w": _WIDTH,
                "h": _HEIGHT,
            },
            **panel,
        }
        for number, panel in enumerate(panels)
    ]
    variable = {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": 'label_values({__name__=~"p2r_.*"}, run)', "refId": "run"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }
    return {
        "uid": uid,
        "title": title,
        "tags": ["p2r"],
        "editable": False,
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [variable]},
        "annotations": {"list": [_ALERT_ANNOTATION]},
        "panels": placed,
    }


_ALERT_ANNOTATION = {
    "name": "alerts",
    "enable": True,
    "datasource": _SOURCE,
    "expr": 'ALERTS{alertname=~"P2R.*", alertstate="firing"}',
    "titleFormat": "{{alertname}}",
    "iconColor": "red",
}


if __name__ == "__main__":
    main()
