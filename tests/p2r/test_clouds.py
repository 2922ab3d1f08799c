"""`gs://` and `az://`: Azurite as a real server, Google's documented protocol, and a proxy that makes faults before both."""

import hashlib
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import p2r
from p2r.counters import Counters
from p2r.errors import DamagedError, InputError, StorageError
from p2r.published.promotion import promote
from p2r.storage import Storage
from tests.cloud_servers import (
    GoogleProtocol,
    azure_environment,
    find_azurite,
    google_environment,
    running_azurite,
)
from tests.fault_proxy import Fault, FaultProxy
from tests.publishing import publish_toy

pytest.importorskip("obstore", reason="pip install -e '.[clouds]'")
CONTENT = np.random.default_rng(0).bytes(2**20)
NAME = "run #1? & more/@stable.json"


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    program = find_azurite()
    if program is None:
        pytest.skip("Azurite is not installed: npm install azurite, and AZURITE=.../azurite-blob")
    with running_azurite(program, tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture(scope="module")
def google() -> Iterator[int]:
    protocol = GoogleProtocol()
    yield protocol.port
    protocol.close()


@pytest.fixture(params=["az", "gs"])
def proxy(
    request: pytest.FixtureRequest, few_retries: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultProxy]:
    """A proxy that makes faults, through which clients find the server of a scheme."""
    scheme = request.param
    port: int = request.getfixturevalue("azurite" if scheme == "az" else "google")
    proxy = FaultProxy(f"http://127.0.0.1:{port}")
    own_port = int(proxy.url.rpartition(":")[2])
    environment = azure_environment(own_port) if scheme == "az" else google_environment(own_port)
    for name, value in {**environment, "P2R_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    proxy.scheme = scheme  # type: ignore[attr-defined]
    yield proxy
    proxy.close()


@pytest.fixture
def storage(proxy: FaultProxy) -> Storage:
    return Storage(f"{proxy.scheme}://tests/{uuid.uuid4().hex}", counters=Counters())  # type: ignore[attr-defined]


def retries(storage: Storage) -> dict[str, float]:
    found = storage.counters.snapshot()
    return {key.split('"')[1]: value for key, value in found.items() if key.startswith("retries")}


def test_a_cloud_keeps_files_by_any_name_lists_and_deletes_them(storage: Storage, tmp_path: Path) -> None:
    storage.check_writable()
    storage.check_conditional()
    names = [NAME, "run #1? & more/b%20c", "run #1? & more/deep/d", "run #1? & moreover"]
    for name in names:
        storage.write_bytes(name, name.encode())
    assert storage.list() == sorted(names) and storage.list("run #1? & more") == sorted(names[:3])
    assert storage.read_bytes(NAME) == NAME.encode() and storage.version(NAME)[0] == len(NAME)
    assert storage.facts("nothing") is None and not storage.exists("nothing")
    with pytest.raises(DamagedError, match="does not exist"):
        storage.read_bytes("nothing")
    storage.delete("run #1? & more")
    storage.delete("nothing")
    assert storage.list() == [names[3]]
    storage.write_bytes("x", CONTENT)
    assert storage.read_range("x", 10, 400_000) == CONTENT[10:400_000]
    with pytest.raises(DamagedError, match=r"has 1048576 bytes, but bytes up to 1048577 were requested"):
        storage.read_range("x", 1_000_000, 2**20 + 1)
    with pytest.raises(DamagedError, match="more than the 100 bytes"):
        storage.read_bytes("x", max_bytes=100)
    storage.download("x", tmp_path / "x", sha256=hashlib.sha256(CONTENT).hexdigest(), num_bytes=len(CONTENT))
    with pytest.raises(DamagedError, match="does not have the digest"):
        storage.download("x", tmp_path / "y", sha256="0" * 64)
    with pytest.raises(DamagedError, match="its manifest says 5"):
        storage.download("x", tmp_path / "y", num_bytes=5)
    (tmp_path / "empty").touch()
    assert storage.upload(tmp_path / "empty", "empty", if_absent=True) and storage.read_bytes("empty") == b""
    assert not storage.upload(tmp_path / "x", "empty", if_absent=True)


def test_a_large_file_is_uploaded_in_parts(storage: Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    import p2r.clouds

    (tmp_path / "large").write_bytes(CONTENT * 40)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(p2r.clouds, "_SINGLE_BYTES", 2**20)
        patched.setattr(p2r.clouds, "_PART_BYTES", 2**23)
        storage.upload(tmp_path / "large", "large")
    assert len(proxy.seen("PUT ")) >= 5
    assert hashlib.sha256(storage.read_bytes("large")).digest() == hashlib.sha256(CONTENT * 40).digest()


def test_of_racing_writers_exactly_one_creates_and_exactly_one_replaces(storage: Storage) -> None:
    wins: dict[str, list[bool]] = {"create": [], "replace": []}
    assert storage.create("replaced", b"before")
    tagged = storage.read_tagged("replaced")
    assert tagged is not None
    meeting = threading.Barrier(4)

    def enter(number: int) -> None:
        meeting.wait()
        wins["create"].append(storage.create("created", str(number).encode()))
        wins["replace"].append(storage.replace("replaced", str(number).encode(), tag=tagged[1]))

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: sum(of_name) for name, of_name in wins.items()} == {"create": 1, "replace": 1}
    assert not storage.replace("absent", b"x", tag=tagged[1]) and not storage.exists("absent")


@pytest.mark.parametrize("conditional", ["create", "replace"])
def test_a_conditional_write_whose_answer_is_lost_is_known_to_have_succeeded(
    conditional: str, storage: Storage, proxy: FaultProxy
) -> None:
    storage.write_bytes("x", b"1")
    tagged = storage.read_tagged("x")
    assert tagged is not None
    proxy.add(Fault("lose", on="PUT "))
    written = storage.create("y", b"2") if conditional == "create" else storage.replace("x", b"2", tag=tagged[1])
    assert written and storage.read_bytes("y" if conditional == "create" else "x") == b"2"
    assert retries(storage) == {"connection": 1}
    assert not storage.create("x", b"3")


def test_faults_are_retried_counted_and_cost_no_byte(storage: Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    storage.write_bytes("x", CONTENT)
    proxy.add(Fault("status", times=3, status=503))
    proxy.add(Fault("truncate", after_bytes=300_000))
    proxy.add(Fault("drop"))
    storage.download("x", tmp_path / "x", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert retries(storage) == {"503": 3, "connection": 2}
    assert storage.counters.snapshot()["bytes_fetched"] == len(CONTENT)
    resumed = proxy.seen("GET ")[-1].range
    assert resumed is not None and 2**18 <= int(resumed.removeprefix("bytes=").removesuffix("-1048575")) <= 300_000
    proxy.add(Fault("flip", after_bytes=300_000))
    storage.download("x", tmp_path / "x", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert retries(storage)["digest"] == 1
    proxy.add(Fault("status", on="HEAD ", times=1, status=403))  # the keys are read again, once
    assert storage.exists("x") and retries(storage)["keys"] == 1
    proxy.add(Fault("status", times=9, status=403))
    with pytest.raises(StorageError, match=r"cannot read (gs|az)://tests/.*/x: .*check the (bucket|container), and"):
        storage.read_bytes("x")


def test_a_backbone_is_published_promoted_and_loaded_again_without_its_storage(
    storage: Storage, proxy: FaultProxy
) -> None:
    made = publish_toy(f"{storage.url}/toy/1")
    promote(made["pin"], "stable", forced="a toy without health", say=lambda line: None)
    assert p2r.load_backbone(f"{storage.url}/toy@stable").manifest["pin"] == made["pin"]
    proxy.clear()
    assert p2r.load_backbone(made["pin"]).manifest["sha256"] == made["sha256"]
    assert proxy.exchanges == []


def test_a_bucket_without_its_package_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(
        InputError, match=r"gs:// and az:// need the package obstore.*install p2r again with its extra 'clouds'"
    ):
        Storage("gs://bucket/run")
    with pytest.raises(StorageError, match="names no bucket: write az://BUCKET/PREFIX"):
        Storage("az://")
