"""Several nodes on one machine: network namespaces with addresses of their own, a Ray head and Ray nodes in them.

    bridge on the host, 10.77.S.254 -- veth -- namespace p2r-S-1, 10.77.S.1: head
                                    -- veth -- namespace p2r-S-2, 10.77.S.2: node ...

A node can be stopped (SIGTERM), killed with all its processes, cut off (its cable is pulled) and started again. Each has its
own /tmp/ray and /dev/shm: raylets that share them take one another's sockets. It needs root; `refusal` says why where it may
not be.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
_RAY = [str(Path(sys.executable).parent / "ray")]
_GCS_PORT = 6379
_START_LIMIT_S = 180.0
# Chosen by us: raylets wait but 15 s for agents to tell theirs, which a busy machine exceeds.
_PORTS = {
    "metrics-export-port": 8090,
    "dashboard-agent-grpc-port": 8091,
    "dashboard-agent-listen-port": 8092,
    "runtime-env-agent-port": 8093,
}


def refusal() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"p2r-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    mounted = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return f"mounts are not allowed here: {mounted.stderr.strip()}" if mounted.returncode else None


@dataclass
class Node:
    """One namespace, and what runs in it."""

    name: str
    address: str
    cable: str
    """The host's end of its cable."""
    num_cpus: int
    main: subprocess.Popen[bytes] | None = None
    """`ray start --block`."""

    def pids(self) -> list[int]:
        """All processes in the namespace."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def pids_of(self, *words: str) -> list[int]:
        """Processes whose command line holds one of these words."""
        return [pid for pid in self.pids() if any(word in _command(pid) for word in words)]


@dataclass
class Cluster:
    """A head and nodes, all of them up."""

    folder: Path
    """For logs."""
    host: str
    """The host's address, as nodes see it."""
    nodes: list[Node]
    """The head is the first."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of every process in the cluster."""

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def address(self) -> str:
        """Of the cluster, for `RAY_ADDRESS`."""
        return f"{self.head.address}:{_GCS_PORT}"

    def start(self, node: Node) -> None:
        """Start Ray on a node; returns when the process runs, not when the node is up."""
        role = (
            ["--head", f"--port={_GCS_PORT}", "--include-dashboard=false"]
            if node is self.head
            else [f"--address={self.address}"]
        )
        ray = [*_RAY, "start", *role, f"--node-ip-address={node.address}"]
        ray += [f"--{name}={port}" for name, port in _PORTS.items()]
        ray += [f"--num-cpus={node.num_cpus}", "--num-gpus=0", "--object-store-memory=80000000", "--block"]
        own = 'mount --bind "$1" /tmp/ray && mount -t tmpfs -o size=512m none /dev/shm && shift && exec "$@"'
        sessions = self.folder / node.name
        for place in (sessions, Path("/tmp/ray")):
            place.mkdir(exist_ok=True)
        with (self.folder / f"{node.name}.log").open("ab") as log:
            node.main = subprocess.Popen(
                ["ip", "netns", "exec", node.name, "unshare", "-m", "sh", "-c", own, "sh", str(sessions), *ray],
                env={**os.environ, **self.environment},
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def popen(self, node: Node, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a process on a node, beside its Ray."""
        assert node.main is not None
        inside = ["nsenter", f"--target={node.main.pid}", "--mount", "--net", f"--wd={REPOSITORY}", "--", *command]
        environment = {**os.environ, **self.environment, "RAY_ADDRESS": self.address}
        return subprocess.Popen(inside, env=environment, **options)  # type: ignore[call-overload]

    def wait(self, *, num_nodes: int | None = None) -> None:
        """Return when all nodes (or so many) have joined.

        Raises:
            TimeoutError: They do not.
        """
        wanted = len(self.nodes) if num_nodes is None else num_nodes
        count = (
            "import ray; ray.init(address='auto', logging_level='error'); print(sum(n['Alive'] for n in ray.nodes()))"
        )
        deadline = time.monotonic() + _START_LIMIT_S
        found = ""
        while time.monotonic() < deadline:
            for node in self.nodes[:wanted]:
                if node.main is not None and node.main.poll() is not None:  # Ray gave up: it has little patience
                    self.kill(node)
                    self.start(node)
            if self.is_up():
                asked = self.popen(
                    self.head, [sys.executable, "-c", count], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                found = asked.communicate()[0].decode().strip()
                if found == str(wanted):
                    return
            time.sleep(0.5)
        raise TimeoutError(f"{found or 'no'} of {wanted} nodes are up after {_START_LIMIT_S:.0f} s: see {self.folder}")

    def is_up(self) -> bool:
        """Whether the head answers at all."""
        probe = ["ip", "netns", "exec", self.head.name, "python3", "-c"]
        connect = f"import socket; socket.create_connection(('{self.head.address}', {_GCS_PORT}), 1)"
        return subprocess.run([*probe, connect], capture_output=True).returncode == 0

    def stop(self, node: Node) -> None:
        """SIGTERM to Ray's main process: what a machine does that is shut down. What is left after 20 s is killed."""
        if node.main is not None:
            node.main.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.main.wait(20)
        self.kill(node)

    def kill(self, node: Node) -> None:
        """`kill -9` to every process: what a machine does whose power is cut."""
        for _ in range(20):
            pids = node.pids()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not pids:
                break
            time.sleep(0.1)
        if node.main is not None:
            node.main.wait()
            node.main = None

    def cut(self, node: Node) -> None:
        """Pull the cable: nothing is refused, nothing answers."""
        _ip("link", "set", node.cable, "down")

    def mend(self, node: Node) -> None:
        """Plug the cable in again."""
        _ip("link", "set", node.cable, "up")


@contextlib.contextmanager
def cluster(folder: Path, *, num_cpus: Sequence[int], environment: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster of as many nodes as there are numbers of CPUs; the first is the head. At the end nothing is left of it."""
    subnet = _free_subnet()
    bridge, prefix = f"p2r{subnet}", f"10.77.{subnet}"
    nodes = [
        Node(f"p2r-{subnet}-{number}", f"{prefix}.{number}", f"p2r{subnet}v{number}", cpus)
        for number, cpus in enumerate(num_cpus, start=1)
    ]
    made = Cluster(
        folder,
        f"{prefix}.254",
        nodes,
        {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_enable_worker_prestart": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "P2R_LOG_FORMAT": "text",
            **(environment or {}),
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{prefix}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for node in nodes:
            _ip("netns", "add", node.name)
            _ip("link", "add", node.cable, "type", "veth", "peer", "name", "eth0", "netns", node.name)
            _ip("link", "set", node.cable, "master", bridge, "up")
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", node.name, "link", "set", "eth0", "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        made.start(made.head)
        made.wait(num_nodes=1)
        for node in nodes[1:]:
            made.start(node)
        made.wait()
        yield made
    finally:
        for node in nodes:
            made.kill(node)
            subprocess.run(["ip", "netns", "delete", node.name], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _free_subnet() -> int:
    taken = subprocess.run(["ip", "-o", "-4", "addr"], check=True, capture_output=True, text=True).stdout
    start = os.getpid() % 250
    for offset in range(250):
        number = 1 + (start + offset) % 250
        if f"10.77.{number}." not in taken:
            return number
    raise RuntimeError("all subnets 10.77.x are taken")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
