"""Joining a Ray cluster, or starting one on this machine, and giving its processes what they need from the environment.

this process's variables -> settings: Ray's runtime environment, which Ray logs and keeps
                         -> secrets:  a local Ray inherits them; to a cluster's workers they go by an actor call, in memory
                         -> the key of pseudonyms: stays in the driver
"""

import os
import socket
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

_FORWARDED_PREFIXES = ("AWS_", "P2R_", "NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_")
_CONNECT_S = 2.0


@contextmanager
def session(address: str | None = None, *, show_worker_logs: bool = False) -> Iterator[None]:
    """Be connected to Ray.

    Args:
        address: Of a cluster; None: the one that `RAY_ADDRESS` names (Ray sets it in a submitted job), else a local one that
            ends with the session.
        show_worker_logs: Print what Ray and its workers print, too; it is in Ray's log folder in any case.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A submitted job has its environment from `p2r submit`, and this process adds its own. Where both name a variable, Ray would
    # refuse.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables: ours are shorter
    already = ray.is_initialized()
    if not already:
        where = address or os.environ.get("RAY_ADDRESS")
        folder = None if where else ray_folder()
        if folder is not None:
            say(f"TMPDIR is too long for the sockets of Ray: it uses {folder}; RAY_TMPDIR names another short folder")
        with _without_pseudonym_key():
            ray.init(
                address=where or "local",
                runtime_env={"env_vars": forwarded_settings()},
                log_to_driver=show_worker_logs,
                logging_level="error",
                **({} if where else {"include_dashboard": False, "_temp_dir": folder}),
            )
        if where:
            _hand_over(forwarded_secrets())
    try:
        yield
    finally:
        if not already:
            _handed.clear()
            ray.shutdown()


@contextmanager
def _without_pseudonym_key() -> Iterator[None]:
    """Hide the key from the Ray that is started here: the driver makes pseudonyms, workers get them ready-made."""
    key = os.environ.pop(PSEUDONYM_KEY, None)
    try:
        yield
    finally:
        if key is not None:
            os.environ[PSEUDONYM_KEY] = key


def forwarded_settings() -> dict[str, str]:
    """Return the variables that every worker gets and everybody may read: p2r's, the storage's and the network's without secrets."""
    forwarded = _forwarded()
    # With keys, the role of the machine is not needed, and asking for it takes seconds where there is none.
    has_keys = "AWS_ACCESS_KEY_ID" in forwarded
    return {
        "PYTHONUNBUFFERED": "1",
        "RAY_DEDUP_LOGS": "0",
        **identity_environment(),
        **({"AWS_EC2_METADATA_DISABLED": "true"} if has_keys else {}),
        **{name: value for name, value in forwarded.items() if not _is_secret(name, value)},
    }


def forwarded_secrets() -> dict[str, str]:
    """Return the secret variables that every worker needs: credentials of the storage."""
    return {name: value for name, value in _forwarded().items() if _is_secret(name, value) and name != PSEUDONYM_KEY}


def _forwarded() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED_PREFIXES)}


def _is_secret(name: str, value: str) -> bool:
    return is_secret_name(name) or looks_secret(value)


@dataclass(frozen=True)
class Credentials:
    """Access to the driver's secret variables. It travels in arguments, which Ray may store; the values do not."""

    holder: Any = None
    """The actor that has them; None: the worker has inherited them, or has an identity of its own."""

    def take(self) -> None:
        """Put the variables into the environment of this process."""
        if self.holder is not None:
            os.environ.update(ray.get(self.holder.values.remote()))


class _Holder:
    """An actor beside the driver. Both calls carry the values from memory to memory: neither is stored, logged or spilled."""

    def keep(self, values: dict[str, str]) -> None:
        self._values = values

    def values(self) -> dict[str, str]:
        return self._values


_handed: list[Credentials] = []


def credentials() -> Credentials:
    """Return the access of this session's workers to the driver's secret variables."""
    return _handed[-1] if _handed else Credentials()


def _hand_over(values: dict[str, str]) -> None:
    if values:
        # Not to the constructor: Ray's head keeps the arguments of that.
        holder = ray.remote(num_cpus=0)(_Holder).options(scheduling_strategy=this_node()).remote()
        ray.get(holder.keep.remote(values))
        _handed.append(Credentials(holder))


def num_gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def gpu_types() -> set[str]:
    """What kinds of GPUs the cluster has, as Ray names them, such as T4 or H100."""
    prefix = "accelerator_type:"
    return {name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix)}


def num_cpus() -> int:
    """CPU cores of the cluster."""
    return int(ray.cluster_resources().get("CPU", 1))


def this_node() -> NodeAffinitySchedulingStrategy:
    """Where an actor must run that the driver cannot do without: anywhere else it would die with another machine."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def usable_nodes() -> dict[str, dict[str, float]]:
    """Resources of each node, by its id, that is alive, answers, and is not about to be taken away.

    Ray needs seconds, up to half a minute, to see that a node is gone; whoever starts workers on it before waits for nothing.
    """
    draining = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = pool.map(lambda node: _answers(node["NodeManagerAddress"], node["NodeManagerPort"]), nodes)
    return {node["NodeID"]: node["Resources"] for node, answer in zip(nodes, answers, strict=True) if answer}


def draining_nodes() -> dict[str, int]:
    """Ids of nodes that will be taken away, and when: ms since 1970, 0 if that is not known."""
    # No public call tells this before a worker is there; Ray Train's own watcher asks here, too.
    return dict(ray._private.state.state.get_draining_nodes())


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def refuse_unshared_folder(storage: Storage) -> None:
    """Refuse a `file://` storage that some node of the cluster does not see.

    Raises:
        StorageError: naming the nodes: their workers would write into folders of their own, and nobody would find the pieces.
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
