"""Rules, configurations and dashboards: current, valid, and about metrics that exist (`tests/cluster/test_metrics.py` scrapes them)."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics import METRICS
from infra.grafana.generate import dashboards, expressions
from infra.grafana.generate import written as written_dashboard
from infra.prometheus.generate import ALERTS, RECORDS, configuration, duration, kubernetes, rendered, rules, written

NAMES = {metric.name for metric in METRICS} | {record.name for record in RECORDS}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool: apt install prometheus")
    return found


def check(promtool: str, *arguments: str | Path) -> str:
    done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names_in(expression: str) -> set[str]:
    without_strings = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"[\w:]*\bp2r_\w+(?::\w+)?", without_strings))


def test_committed_files_are_current(repository: Path) -> None:
    folder = repository / "infra/prometheus"
    for name, value in {
        "rules.yml": rules(),
        "prometheus.yml": configuration(),
        "kubernetes.yml": kubernetes(),
    }.items():
        assert (folder / name).read_text() == written(value), "run: python -m infra.prometheus.generate"
    folder = repository / "infra/grafana/dashboards"
    made = dashboards()
    assert {path.name for path in folder.iterdir()} == set(made)
    for name, dashboard in made.items():
        assert (folder / name).read_text() == written_dashboard(dashboard), "run: python -m infra.grafana.generate"


def test_every_name_in_rules_and_dashboards_exists() -> None:
    used = set()
    for expression in [
        *(record.expression for record in RECORDS),
        *(alert.expression for alert in ALERTS),
        *(expression for dashboard in dashboards().values() for expression in expressions(dashboard)),
    ]:
        assert names_in(expression) <= NAMES, expression
        used |= names_in(expression)
    assert used == NAMES, "a name that nobody sees"


def test_every_alert_has_a_line_in_the_runbook_and_a_test(repository: Path) -> None:
    headings = re.findall(r"^## (\w+)$", (repository / "infra/RUNBOOK.md").read_text(), re.MULTILINE)
    assert headings == [
        "P2RNoProgress", "P2RProcessUnreachable", "P2RRunEnded", "P2RLossNotFinite", "P2RCollapse", "P2RCheckpointTooOld",
        "P2RRestartsNearLimit", "P2RDataWaitHigh", "P2RDiskFull", "P2RCacheFull", "P2RQuarantineGrowing",
    ] == [alert.name for alert in ALERTS]  # fmt: skip
    tests = (repository / "infra/prometheus/rules_test.yml").read_text()
    for rule in rules()["groups"][0]["rules"][len(RECORDS) :]:
        assert rule["annotations"]["runbook"] == f"infra/RUNBOOK.md#{rule['alert'].lower()}"
        assert rule["alert"] in tests


def test_a_speed_divides_every_window_and_nothing_else() -> None:
    assert rendered("rate(x[window(600)]) > 0.3 and y < seconds(900)", speed=60) == "rate(x[10s]) > 0.3 and y < 15"
    assert [duration(x) for x in (0.5, 5, 90, 900, 7200)] == ["500ms", "5s", "90s", "15m", "2h"]
    slow, fast = (rules(speed=speed)["groups"][0]["rules"][len(RECORDS) :] for speed in (1, 60))
    assert [rule.get("for") for rule in fast][:5] == [None, "5s", "5s", None, "15s"]
    assert [rule["alert"] for rule in fast] == [rule["alert"] for rule in slow]
    assert configuration(speed=60)["global"]["scrape_interval"] == "500ms"


def test_promtool_accepts_configuration_rules_and_their_tests(promtool: str, repository: Path, tmp_path: Path) -> None:
    folder = repository / "infra/prometheus"
    check(promtool, "check", "config", folder / "prometheus.yml")
    assert "SUCCESS" in check(promtool, "test", "rules", folder / "rules_test.yml")
    # Debian builds Prometheus without Kubernetes: the rest of that file is checked with another kind of discovery.
    for speed, value in ((60, configuration(speed=60)), (1, _without_kubernetes(kubernetes()))):
        (tmp_path / "rules.yml").write_text(written(rules(speed=speed)))
        (tmp_path / "prometheus.yml").write_text(written(value))
        check(promtool, "check", "config", tmp_path / "prometheus.yml")


def test_prometheus_can_read_every_expression_of_the_dashboards(promtool: str, tmp_path: Path) -> None:
    asked = [expression for dashboard in dashboards().values() for expression in expressions(dashboard)]
    rows = [
        {"record": f"x:{number}", "expr": text.replace("$__rate_interval", "5m")} for number, text in enumerate(asked)
    ]
    (tmp_path / "asked.yml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rows}]}))
    assert f"SUCCESS: {len(asked)} rules found" in check(promtool, "check", "rules", tmp_path / "asked.yml")


def test_grafana_finds_what_it_is_given(repository: Path) -> None:
    folder = repository / "infra/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/p2r.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards/p2r.yml").read_text())["providers"]
    assert provider["type"] == "file"
    for dashboard in dashboards().values():
        used = set(re.findall(r'"uid": "(p2r-prometheus)"', json.dumps(dashboard)))
        assert used == {source["uid"]}
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids) > 0


def _without_kubernetes(config: dict[str, Any]) -> dict[str, Any]:
    jobs = [
        {**{key: value for key, value in job.items() if key != "kubernetes_sd_configs"}, "static_configs": []}
        for job in config["scrape_configs"]
    ]
    return {**config, "scrape_configs": jobs}
