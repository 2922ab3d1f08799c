"""Connection to a Ray cluster, or a local Ray, and the environment variables of its processes.

this process's variables -> settings: Ray's runtime environment, which Ray logs and stores
                         -> secrets:  inherited from a local Ray; sent to a cluster's workers by an actor call, in memory
                         -> the pseudonym key: stays in the driver
"""

import logging
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from p2r.data.pseudonyms import VARIABLE as PSEUDONYM_KEY
from p2r.errors import StorageError
from p2r.identity import identity_environment, ray_folder
from p2r.logs import say
from p2r.masking import is_secret_name, looks_secret
from p2r.storage import Storage

_FORWARDED_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_", "P2R_", "NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_")
_FORWARDED_NAMES = {"HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"}
"""Variables of `huggingface_hub` that hold on every node; those of its folders belong to one machine."""
_PROFILE_NAMES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")
"""A profile is an entry of ~/.aws of one machine; on a machine without it botocore fails instead of asking for a role."""
_CONNECT_S = 2.0


@contextmanager
def session(address: str | None = None, *, show_worker_logs: bool = False) -> Iterator[None]:
    """Connect to Ray for the duration of the block.

    Args:
        address: Address of a cluster. None: `RAY_ADDRESS` (Ray sets it in a submitted job), or a local Ray that ends with
            the session.
        show_worker_logs: Also print the output of Ray and its workers; Ray's log folder has it in any case.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A submitted job gets its environment from `p2r submit`, and this process adds its own. Without this setting Ray refuses a variable
    # that both name.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our tables replace Tune's
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise a Ray that starts here reports to Ray's authors
    already = ray.is_initialized()
    if not already:
        where = address or os.environ.get("RAY_ADDRESS")
        folder = None if where else ray_folder()
        if folder is not None:
            say(f"TMPDIR is too long for Ray's sockets: using {folder}; set RAY_TMPDIR for another short folder")
        with _hide_pseudonym_key(), _hide_start_errors(is_shown=show_worker_logs):
            ray.init(
                address=where or "local",
                runtime_env={"env_vars": forwarded_settings()},
                log_to_driver=show_worker_logs,
                logging_level="error",
                **({} if where else {"include_dashboard": False, "_temp_dir": folder}),
            )
        if where:
            _share_secrets(forwarded_secrets())
    try:
        yield
    finally:
        if not already:
            _session_credentials.clear()
            ray.shutdown()


@contextmanager
def _hide_start_errors(*, is_shown: bool) -> Iterator[None]:
    """Keep Ray's log of a slow start off the terminal: one message of ours follows, and Ray's log folder has the rest."""
    logger = logging.getLogger("ray._private.services")
    level = logger.level
    logger.setLevel(level if is_shown else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _hide_pseudonym_key() -> Iterator[None]:
    """Hide the key from a Ray started in this block: only the driver makes pseudonyms."""
    key = os.environ.pop(PSEUDONYM_KEY, None)
    try:
        yield
    finally:
        if key is not None:
            os.environ[PSEUDONYM_KEY] = key


def forwarded_settings(*, has_own_identity: bool = False) -> dict[str, str]:
    """Return the non-secret variables for every worker: settings of p2r, the storage and the network.

    Args:
        has_own_identity: The receiver gets no secrets from here, as a submitted job: its machine's role or profile must be looked for.
    """
    forwarded = _forwarded_variables()
    if has_own_identity:
        forwarded = {name: value for name, value in forwarded.items() if name not in _PROFILE_NAMES}
    # With keys, the machine's role is not needed, and looking for it takes seconds on machines without one.
    has_keys = "AWS_ACCESS_KEY_ID" in forwarded and not has_own_identity
    return {
        "PYTHONUNBUFFERED": "1",
        "RAY_DEDUP_LOGS": "0",
        **identity_environment(),
        **({"AWS_EC2_METADATA_DISABLED": "true"} if has_keys else {}),
        **{name: value for name, value in forwarded.items() if not _is_secret(name, value)},
    }


def profile_names() -> list[str]:
    """Return the variables of this process that choose a profile of this machine's AWS files."""
    return [name for name in _PROFILE_NAMES if name in os.environ]


def forwarded_secrets() -> dict[str, str]:
    """Return the secret variables that every worker needs: credentials for the storage and the hub."""
    return {
        name: value
        for name, value in _forwarded_variables().items()
        if _is_secret(name, value) and name != PSEUDONYM_KEY
    }


def _forwarded_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_FORWARDED_PREFIXES) or name in _FORWARDED_NAMES
    }


def _is_secret(name: str, value: str) -> bool:
    return is_secret_name(name) or looks_secret(value)


@dataclass(frozen=True)
class Credentials:
    """Access to the driver's secret variables. It is passed in arguments, which Ray may store; the values are not."""

    holder: Any = None
    """Actor that holds the values; None: the worker inherited them, or has its own identity."""

    def take(self) -> None:
        """Copy the variables into this process's environment."""
        if self.holder is not None:
            os.environ.update(ray.get(self.holder.values.remote()))


class _SecretHolder:
    """Actor beside the driver. Both calls copy the values from memory to memory: they are never stored, logged or spilled."""

    def keep(self, values: dict[str, str]) -> None:
        self._values = values

    def values(self) -> dict[str, str]:
        return self._values


_session_credentials: list[Credentials] = []


def credentials() -> Credentials:
    """Return the access to the driver's secret variables for this session's workers."""
    return _session_credentials[-1] if _session_credentials else Credentials()


def _share_secrets(values: dict[str, str]) -> None:
    if values:
        # Not passed to the constructor: Ray's head node stores constructor arguments.
        holder = ray.remote(num_cpus=0)(_SecretHolder).options(scheduling_strategy=this_node()).remote()
        ray.get(holder.keep.remote(values))
        _session_credentials.append(Credentials(holder))


def num_gpus() -> int:
    """Return the number of GPUs in the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def gpu_types() -> set[str]:
    """Return the types of the cluster's GPUs by Ray's names, such as T4 or H100."""
    prefix = "accelerator_type:"
    return {name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix)}


def num_cpus() -> int:
    """Return the number of CPU cores in the cluster."""
    return int(ray.cluster_resources().get("CPU", 1))


def this_node() -> NodeAffinitySchedulingStrategy:
    """Return the placement for an actor that the driver depends on: on the driver's node, so that they fail together."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def usable_nodes() -> dict[str, dict[str, float]]:
    """Return the resources of every usable node by node id: alive, reachable, and not about to be removed.

    Ray takes up to half a minute to notice a lost node; workers started on it in the meantime would wait in vain.
    """
    draining = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = pool.map(lambda node: _is_reachable(node["NodeManagerAddress"], node["NodeManagerPort"]), nodes)
    return {node["NodeID"]: node["Resources"] for node, answer in zip(nodes, answers, strict=True) if answer}


class Places:
    """Workers of the runs of this driver that train at the same time, so that none plans with the room of another."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._held: dict[str, int] = {}

    def hold(self, owner: str, num_workers: int) -> None:
        """Record the workers of a run, named by its storage; 0: none."""
        self._held[owner] = num_workers

    def held_by_others(self, owner: str) -> int:
        """Return the workers of all other runs."""
        return sum(held for name, held in list(self._held.items()) if name != owner)


def draining_nodes() -> dict[str, int]:
    """Return the ids of nodes about to be removed, and their deadlines, ms since 1970 (0: unknown)."""
    # No public call returns this before workers run; Ray Train's own watcher uses the same call.
    return dict(ray._private.state.state.get_draining_nodes())


def _is_reachable(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def refuse_unshared_folder(storage: Storage) -> None:
    """Refuse a `file://` storage that some node of the cluster cannot see.

    Raises:
        StorageError: Some nodes do not see the folder. Their workers would write into separate local folders; names the nodes.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if not storage.url.startswith("file://") or len(nodes) < 2:
        return
    probe = f".tmp-probe-{uuid.uuid4().hex}"
    storage.write_bytes(probe, b"p2r")
    try:
        path = str(Path(storage.url.removeprefix("file://")) / probe)
        sees = ray.remote(num_cpus=0)(_is_file)
        seen = ray.get(
            [
                sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    path
                )
                for node in nodes
            ]
        )
    finally:
        storage.delete(probe)
    blind = [node["NodeManagerAddress"] for node, is_seen in zip(nodes, seen, strict=True) if not is_seen]
    if blind:
        raise StorageError(
            f"storage {storage.url} is a folder that {len(blind)} of {len(nodes)} nodes do not see ({', '.join(blind[:5])}): "
            "use a folder that all nodes mount, or s3://"
        )


def _is_file(path: str) -> bool:
    return Path(path).is_file()
