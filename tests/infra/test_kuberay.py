"""The manifests as kustomize composes them: every object by a strict schema, and what they must not be by name. No cluster runs them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate.utils
import pytest
import yaml

from infra.kuberay.leave import find_raylet, leave
from infra.prometheus.generate import kubernetes
from p2r.data.order import check_world_size
from p2r.job import read_job

KUBERAY = Path(__file__).parents[2] / "infra/kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())
KUBERNETES = "1.37.0"
BY_DIGEST = re.compile(r"(registry\.example/p2r|chrislusf/seaweedfs)@sha256:[0-9a-f]{64}")

# It reads all of Kubernetes' definitions from disk for every object, a quarter of a second each.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

Object = dict[str, Any]


@pytest.fixture(scope="module")
def composed(pinned_infra: Path) -> dict[str, list[Object]]:
    """The objects of every overlay."""
    return {name: compose(pinned_infra / "kuberay/overlays" / name) for name in OVERLAYS}


def compose(folder: Path) -> list[Object]:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if not shutil.which(command[0]):
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60, check=True)
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def check(thing: Object) -> None:
    """Refuse an object that has a field which its kind does not have, or a value of another type."""
    if thing["kind"] in SCHEMA["$defs"]:
        jsonschema.validate(thing, {"$ref": f"#/$defs/{thing['kind']}", "$defs": SCHEMA["$defs"]})
    else:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    for template in templates(thing):
        spec = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
        kubernetes_validate.validate(spec, KUBERNETES, strict=True)


def templates(value: Any) -> Iterator[Object]:
    """Every pod template, wherever it is."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key in ("template", "submitterPodTemplate"):
                yield child
            yield from templates(child)
    elif isinstance(value, list):
        for child in value:
            yield from templates(child)


def one(things: list[Object], kind: str, name: str | None = None) -> Object:
    (found,) = [x for x in things if x["kind"] == kind and name in (None, x["metadata"]["name"])]
    return found


def test_every_object_of_the_base_is_valid() -> None:
    kinds = []
    for path in sorted((KUBERAY / "base").glob("*.yaml")):
        if path.name == "kustomization.yaml":
            continue
        thing = yaml.safe_load(path.read_text())
        if thing["kind"] == "RayJob":  # its cluster is copied in
            assert thing["spec"]["rayClusterSpec"] == {}
            thing["spec"]["rayClusterSpec"] = yaml.safe_load((KUBERAY / "base/cluster.yaml").read_text())["spec"]
        check(thing)
        kinds.append(thing["kind"])
    assert {"RayCluster", "RayJob", "PodMonitor", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"} < set(kinds)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_of_an_overlay_is_valid(composed: dict[str, list[Object]], overlay: str) -> None:
    for thing in composed[overlay]:
        check(thing)
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in composed[overlay]]
    assert len(set(names)) == len(names)
    namespace = one(composed[overlay], "Namespace")["metadata"]["name"]
    assert {x["metadata"]["namespace"] for x in composed[overlay] if x["kind"] != "Namespace"} == {namespace}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpecs"), {}),
        (("spec", "backoffLimit"), "2"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"), 1),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "disabled"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "container"), []),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "securityContext", "root"),
            True,
        ),
        (("spec", "submitterPodTemplate", "spec", "restartPolicy"), 1),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_the_schemas_refuse_what_kuberay_would_ignore(
    composed: dict[str, list[Object]], path: tuple[Any, ...], value: Any
) -> None:
    thing = deepcopy(one(composed["spot"], "RayJob"))
    target = thing
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(thing)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_container_is_root_or_may_become_it_or_write_its_root(
    composed: dict[str, list[Object]], overlay: str
) -> None:
    count = 0
    for thing in composed[overlay]:
        for template in templates(thing):
            spec = template["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert spec["automountServiceAccountToken"] is False
            assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
            assert all({"emptyDir", "configMap"} & volume.keys() for volume in spec["volumes"])
            for container in spec["containers"]:
                count += 1
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert BY_DIGEST.fullmatch(container["image"]), container["image"]
                assert "memory" in container["resources"]["limits"]
                mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
                assert mounted <= {volume["name"] for volume in spec["volumes"]}
    assert count >= 3


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_object_store_fits_its_shared_memory_and_that_the_pod_s(
    composed: dict[str, list[Object]], overlay: str
) -> None:
    gibi = {"Mi": 2**20, "Gi": 2**30}

    def size(text: str) -> int:
        return int(text[:-2]) * gibi[text[-2:]]

    cluster = one(composed[overlay], "RayJob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (shared,) = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
        store, limit = int(group["rayStartParams"]["object-store-memory"]), size(shared["sizeLimit"])
        assert store < 0.75 * limit, "NCCL and the loader's processes use it too"
        assert limit < 0.5 * size(spec["containers"][0]["resources"]["limits"]["memory"]), (
            "it counts as the pod's memory"
        )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_named_and_never_there(composed: dict[str, list[Object]], overlay: str) -> None:
    assert not [thing for thing in composed[overlay] if thing["kind"] == "Secret"]
    for thing in composed[overlay]:
        for template in templates(thing):
            for container in template["spec"]["containers"]:
                for variable in container.get("env", []):
                    assert not any(word in variable["name"] for word in ("KEY", "SECRET", "TOKEN", "PASSWORD"))
    environment = one(composed[overlay], "ConfigMap", "p2r-environment")["data"]
    assert not any(word in name for name in environment for word in ("KEY", "SECRET", "TOKEN", "PASSWORD"))
    cluster = one(composed[overlay], "RayJob")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "p2r-ray-token"}
    (worker,) = cluster["workerGroupSpecs"]
    for template in (cluster["headGroupSpec"]["template"], worker["template"]):
        assert {"secretRef": {"name": "p2r-storage"}} in template["spec"]["containers"][0]["envFrom"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_job_that_is_mounted_is_valid_and_fits_the_machines(
    composed: dict[str, list[Object]], overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in one(composed[overlay], "ConfigMap", "p2r-environment")["data"].items():
        monkeypatch.setenv(name, value)
    text = one(composed[overlay], "ConfigMap", "p2r-job")["data"]["job.yaml"]
    (tmp_path / "job.yaml").write_text(text)
    job = read_job(tmp_path / "job.yaml")
    assert job.pretrain is not None
    assert job.storage.startswith("s3://"), "pods share no folder"
    ray_job = one(composed[overlay], "RayJob")["spec"]
    assert ray_job["entrypoint"].split()[-1] == "/etc/p2r/job.yaml"
    (group,) = ray_job["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = group["replicas"] * int(limits.get("nvidia.com/gpu", 0))
    cpus = group["replicas"] * int(group["rayStartParams"]["num-cpus"])
    workers = gpus or cpus
    check_world_size(job.pretrain.global_batch, workers)
    asked = job.resources.num_workers
    assert asked in ("auto", workers) or (isinstance(asked, tuple) and asked[0] <= workers == asked[1])
    assert workers * job.resources.cpus_per_worker <= cpus
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


@pytest.mark.parametrize(
    ("overlay", "job"), [("cpu-test", "pretrain"), ("one-node-8gpu", "pretrain-8gpu"), ("many-nodes", "pretrain-64gpu")]
)
def test_the_jobs_of_overlays_are_those_of_jobs(repository: Path, overlay: str, job: str) -> None:
    """Kustomize reads no file outside an overlay's folder, so they are copies."""
    copy = KUBERAY / "overlays" / overlay / "job.yaml"
    assert copy.read_bytes() == (repository / f"jobs/{job}.yaml").read_bytes(), f"copy jobs/{job}.yaml to {copy}"


def test_many_nodes_have_infiniband_and_its_names(composed: dict[str, list[Object]]) -> None:
    for overlay in ("many-nodes", "spot"):
        (group,) = one(composed[overlay], "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert any(
            name.startswith("rdma/") for name in group["template"]["spec"]["containers"][0]["resources"]["limits"]
        )
        environment = one(composed[overlay], "ConfigMap", "p2r-environment")["data"]
        assert {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "P2R_STORAGE"} <= environment.keys()


def test_spot_machines_take_workers_only_and_there_is_time_to_leave(composed: dict[str, list[Object]]) -> None:
    cluster = one(composed["spot"], "RayJob")["spec"]["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"]
    head, worker = cluster["headGroupSpec"]["template"]["spec"], worker["template"]["spec"]

    def terms(spec: Object) -> list[Object]:
        rule = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        return [x for term in rule["nodeSelectorTerms"] for x in term["matchExpressions"]]

    assert {x["operator"] for x in terms(worker)} == {"In"}
    assert {x["operator"] for x in terms(head)} == {"NotIn", "DoesNotExist"}
    assert {x["key"] for x in terms(worker)} == {x["key"] for x in terms(head)}
    for overlay, things in composed.items():
        (group,) = one(things, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        spec = group["template"]["spec"]
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:4] == ["python", "-m", "infra.kuberay.leave", "--seconds"], overlay
        assert int(command[4]) < spec["terminationGracePeriodSeconds"]
    assert worker["terminationGracePeriodSeconds"] <= 30


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_head_that_must_go_leaves_its_driver_the_time_of_its_pod(
    composed: dict[str, list[Object]], overlay: str
) -> None:
    from ray._private import ray_constants

    spec = one(composed[overlay], "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, name), "another version of Ray has another variable"
    (seconds,) = [int(each["value"]) for each in spec["containers"][0]["env"] if each["name"] == name]
    assert 30 < seconds < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_policies_and_monitor_speak_of_pods_and_ports_that_exist(
    composed: dict[str, list[Object]], overlay: str
) -> None:
    pods = [template for thing in composed[overlay] for template in templates(thing)]
    ours = {"app.kubernetes.io/part-of": "p2r"}
    assert all(ours.items() <= pod["metadata"]["labels"].items() for pod in pods)
    policy = one(composed[overlay], "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == ours
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    ports = [port for pod in pods for c in pod["spec"]["containers"] for port in c.get("ports", [])]
    for rule in policy["ingress"]:
        for port in rule.get("ports", []):
            assert any(port["port"] <= x["containerPort"] <= port.get("endPort", port["port"]) for x in ports)
    internet = [
        to for rule in policy["egress"] for to in rule["to"] if to.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
    ]
    assert [to["ipBlock"]["except"] for to in internet] == [["169.254.0.0/16"]], "machines' metadata"
    monitor = one(composed[overlay], "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"] == ours
    scraped = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    assert {x["name"] for x in ports if "metrics" in x["name"]} <= scraped
    ray_pods = [pod for pod in pods if pod["spec"]["containers"][0]["name"].startswith("ray-")]
    assert len(ray_pods) == 2
    assert all(pod["metadata"]["annotations"] == {"prometheus.io/scrape": "true"} for pod in ray_pods)


def test_the_monitor_of_the_operator_names_the_node_as_the_rules_expect() -> None:
    monitor = yaml.safe_load((KUBERAY / "base/monitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    (of_rules,) = [
        {"sourceLabels": rule["source_labels"], "targetLabel": rule["target_label"]}
        for rule in kubernetes()["scrape_configs"][0]["relabel_configs"]
        if rule.get("target_label") == "node"
    ]
    assert len(monitor) == 9
    assert all(endpoint["relabelings"] == [of_rules] for endpoint in monitor)


def test_every_process_of_training_has_a_port_that_is_scraped(composed: dict[str, list[Object]]) -> None:
    for things in composed.values():
        (group,) = one(things, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        processes = int(container["resources"]["limits"].get("nvidia.com/gpu", group["rayStartParams"]["num-cpus"]))
        ports = {x["containerPort"] for x in container["ports"] if x["name"].startswith("p2r-metrics-")}
        assert ports == set(range(9400, 9400 + processes))
        monitor = one(things, "PodMonitor")["spec"]["podMetricsEndpoints"]
        assert {f"p2r-metrics-{i}" for i in range(processes)} <= {endpoint["port"] for endpoint in monitor}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_without_digests_nothing_is_applied_and_the_folder_of_their_file_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "kuberay"
    shutil.copytree(KUBERAY, copy, ignore=shutil.ignore_patterns("__pycache__", "images"))
    command = ["kubectl", "kustomize", str(copy / "overlays/spot")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "components/images" in done.stderr


def test_the_cluster_can_be_kept_instead_of_the_job(
    tmp_path: Path, pinned_infra: Path, composed: dict[str, list[Object]]
) -> None:
    copy = tmp_path / "kuberay"
    shutil.copytree(pinned_infra / "kuberay", copy)
    (copy / "kept").mkdir()
    (copy / "kept/kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        "resources: [../overlays/cpu-test]\ncomponents: [../components/cluster]\n"
    )
    things = compose(copy / "kept")
    assert "RayJob" not in {thing["kind"] for thing in things}
    cluster = one(things, "RayCluster")
    check(cluster)
    assert cluster["spec"] == one(composed["cpu-test"], "RayJob")["spec"]["rayClusterSpec"]


def fake_process(folder: Path, *words: str) -> Path:
    folder.mkdir()
    (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    return folder


def test_a_worker_that_must_go_tells_ray_its_node_and_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = fake_process(tmp_path / "7", "/venv/bin/python", "agent.py", "--node-id=ffff")
    raylet = fake_process(tmp_path / "8", "/ray/raylet/raylet", "--agent=x --node-id=eeee", "--node_id=abc123")
    assert find_raylet([agent]) is None
    assert find_raylet([agent, tmp_path / "gone", raylet]) == (raylet, "abc123")
    # The node is drained: its raylet ends.
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nrm -r {raylet}\n')
    ray.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ray.parent}:{os.environ['PATH']}")
    assert leave(25, address="head:6379", processes=lambda: [agent, raylet]) == "left"
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("drain-node --address head:6379 --node-id abc123 --reason DRAIN_NODE_REASON_PREEMPTION")
    assert asked.rstrip().endswith("--deadline-remaining-seconds 25")


def test_a_worker_whose_head_has_gone_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raylet = fake_process(tmp_path / "8", "/ray/raylet/raylet", "--node_id=abc123")
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text("#!/bin/sh\necho no such head >&2\nexit 1\n")
    ray.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ray.parent}:{os.environ['PATH']}")
    assert leave(25, address="head:6379", processes=lambda: [raylet]) == "not drained: no such head"
    assert leave(25, address="head:6379", processes=lambda: []) == "no raylet here"
    ray.write_text("#!/bin/sh\nexec sleep 30\n")
    assert leave(0.3, address="head:6379", processes=lambda: [raylet]) == "the head at head:6379 does not answer"
    ray.write_text("#!/bin/sh\nexit 0\n")
    assert leave(0.3, address="head:6379", processes=lambda: [raylet]) == "still busy after 0.3 s"
