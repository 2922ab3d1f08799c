import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import p2r.s3
from infra.local.s3 import S3Server, make_bucket
from p2r.counters import Counters
from p2r.errors import StorageError
from p2r.files import file_sha256
from p2r.retries import S3Settings
from p2r.storage import Storage
from tests.fault_proxy import ALWAYS, Fault, FaultProxy

pytestmark = pytest.mark.s3

CONTENT = np.random.default_rng(0).bytes(2**20)


@pytest.fixture
def storage(s3_url: str, proxy: FaultProxy) -> Storage:
    """A bucket behind the proxy, with one object in it; nothing is counted yet."""
    Storage(s3_url).write_bytes("run/x", CONTENT)
    proxy.clear()
    return Storage(f"{s3_url}/run", counters=Counters())


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    return path


def retries(storage: Storage) -> dict[str, float]:
    found = storage.counters.snapshot()
    return {key.split('"')[1]: value for key, value in found.items() if key.startswith("retries")}


def fetched(storage: Storage, folder: Path, *, sha256: str | None = None) -> bytes:
    storage.download("x", folder / "x", sha256=sha256)
    return (folder / "x").read_bytes()


def test_a_busy_server_is_asked_again_and_each_time_is_counted(storage: Storage, proxy: FaultProxy) -> None:
    proxy.add(Fault("status", times=3, status=503))
    proxy.add(Fault("status", times=1, status=500))
    assert storage.read_bytes("x") == CONTENT
    assert retries(storage) == {"503": 3, "500": 1}
    assert len(proxy.seen("GET")) == 5
    proxy.add(Fault("status", on="PUT", times=2))
    storage.write_bytes("y", b"1")
    assert retries(storage)["503"] == 5
    assert storage.read_bytes("y") == b"1"


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault("drop"), "connection"),
        (Fault("lose"), "connection"),
        (Fault("truncate", after_bytes=300_000), "truncated"),
    ],
)
def test_a_connection_that_breaks_costs_a_counted_retry_and_no_byte(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, fault: Fault, cause: str
) -> None:
    proxy.add(fault)
    assert fetched(storage, tmp_path) == CONTENT
    assert retries(storage) == {cause: 1}
    assert storage.counters.snapshot()["bytes_fetched"] == len(CONTENT)


@pytest.mark.parametrize("fault", [Fault("delay", seconds=3), Fault("stall", after_bytes=300_000, seconds=60)])
def test_a_server_that_falls_silent_is_left_after_the_time_limit(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setenv("P2R_S3_READ_TIMEOUT_S", "1")
    storage = Storage(storage.url, counters=Counters())
    proxy.add(fault)
    began_s = time.monotonic()
    assert fetched(storage, tmp_path) == CONTENT
    assert time.monotonic() - began_s < 20
    assert set(retries(storage)) == {"timeout"}
    assert storage.counters.snapshot()["bytes_fetched"] == len(CONTENT)


def test_a_truncated_body_is_resumed_and_no_byte_read_twice(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, content: Path
) -> None:
    cuts = [300_001, 17, 0, 400_000]
    for cut in cuts:
        proxy.add(Fault("truncate", after_bytes=cut))
    assert fetched(storage, tmp_path, sha256=file_sha256(content)) == CONTENT
    exchanges = proxy.seen("GET")
    starts = [0, *np.cumsum(cuts).tolist()]
    ranges = [None, *(f"bytes={start}-{len(CONTENT) - 1}" for start in starts[1:])]
    assert [exchange.range for exchange in exchanges] == ranges
    assert sum(exchange.num_bytes for exchange in exchanges) == len(CONTENT)
    assert retries(storage) == {"truncated": 4}


def test_a_truncated_range_is_resumed_within_its_bounds(storage: Storage, proxy: FaultProxy) -> None:
    proxy.add(Fault("truncate", after_bytes=1000))
    assert storage.read_range("x", 5_000, 9_000) == CONTENT[5_000:9_000]
    assert [exchange.range for exchange in proxy.seen("GET")] == ["bytes=5000-8999", "bytes=6000-8999"]


def test_an_object_that_is_replaced_between_two_pieces_is_fetched_anew(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_server["AWS_ENDPOINT_URL"])
        direct = Storage(storage.url)
        direct.exists("x")  # its client is made here, past the proxy
    proxy.add(Fault("truncate", after_bytes=300_000, action=lambda: direct.write_bytes("x", CONTENT[::-1])))
    assert fetched(storage, tmp_path) == CONTENT[::-1]
    assert retries(storage) == {"truncated": 1, "changed": 1}


def test_a_byte_that_flips_on_the_way_is_noticed_and_fetched_again(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, content: Path
) -> None:
    proxy.add(Fault("flip", after_bytes=700_000))
    assert fetched(storage, tmp_path, sha256=file_sha256(content)) == CONTENT
    assert retries(storage) == {"digest": 1}
    proxy.add(Fault("flip", after_bytes=5))
    assert storage.read_bytes("x") == CONTENT  # nobody stated a digest: the bucket has a CRC
    assert retries(storage) == {"digest": 2}
    proxy.add(Fault("flip_request", on="PUT", after_bytes=5))
    storage.write_bytes("y", CONTENT)
    assert retries(storage) == {"digest": 3}
    assert storage.read_bytes("y") == CONTENT


def test_a_byte_that_is_always_wrong_is_an_error_that_names_the_object(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, content: Path
) -> None:
    proxy.add(Fault("flip", after_bytes=700_000, times=ALWAYS))
    with pytest.raises(
        StorageError, match=r"s3://.*/run/x: it does not have the digest .* 3 times in a row: it is damaged"
    ):
        fetched(storage, tmp_path, sha256=file_sha256(content))
    assert len(proxy.seen("GET")) == 3
    assert list(tmp_path.iterdir()) == [content]


def test_an_object_of_another_size_is_refused_before_it_is_read(
    storage: Storage, proxy: FaultProxy, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"/run/x has 1048576 bytes, its manifest says 5: it is damaged"):
        storage.download("x", tmp_path / "x", num_bytes=5)
    with pytest.raises(StorageError, match="has 1048576 bytes, but bytes up to 1048580 were requested"):
        storage.read_range("x", 1_048_570, 1_048_580)
    with pytest.raises(StorageError, match=r"/run/x: .*416"):
        storage.read_range("x", 2_000_000, 2_000_010)
    assert retries(storage) == {}


@pytest.mark.parametrize("status", [403, 404, 400, 501])
def test_what_is_refused_is_not_asked_again(storage: Storage, proxy: FaultProxy, status: int) -> None:
    proxy.add(Fault("status", status=status, times=ALWAYS))
    with pytest.raises(StorageError, match=rf"s3://.*/run/x: .*HTTP {status}.*check the bucket, and AWS_ENDPOINT_URL"):
        storage.read_bytes("x")
    assert len(proxy.exchanges) == 1
    assert retries(storage) == {}


def test_what_is_absent_is_not_asked_again(storage: Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"s3://.*/run/nothing: NoSuchKey"):
        storage.download("nothing", tmp_path / "x")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/nothing: NoSuchBucket"):
        Storage("s3://no-such-bucket").read_bytes("nothing")
    assert not storage.exists("nothing")
    assert storage.read_tagged("nothing") is None
    assert len(proxy.exchanges) == 4


def test_a_server_that_is_not_there_is_given_up_after_the_deadline(
    storage: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.close()
    monkeypatch.setenv("P2R_S3_DEADLINE_S", "0.5")
    alone = Storage(storage.url)
    began_s = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot read s3://.*/run/x: \d+ attempts in .* P2R_S3_DEADLINE_S \(0.5\)"):
        alone.read_bytes("x")
    assert time.monotonic() - began_s < 3


def test_a_conditional_write_whose_answer_got_lost_is_recognised(storage: Storage, proxy: FaultProxy) -> None:
    proxy.add(Fault("lose", on="PUT"))
    assert storage.create("new", b"mine")
    assert retries(storage) == {"connection": 1}
    assert not storage.create("new", b"mine")
    tagged = storage.read_tagged("new")
    assert tagged is not None
    proxy.add(Fault("lose", on="PUT"))
    assert storage.replace("new", b"changed", tag=tagged[1])
    proxy.add(Fault("status", on="PUT"))
    assert not storage.replace("new", b"too late", tag=tagged[1])
    assert storage.read_bytes("new") == b"changed"


def test_a_large_file_is_uploaded_in_parts_through_faults(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2r.s3, "_SINGLE_BYTES", 2**20)
    monkeypatch.setattr(p2r.s3, "_PART_BYTES", 5 * 2**20)
    local = tmp_path / "large"
    local.write_bytes(CONTENT * 11)
    proxy.add(Fault("status", on="PUT .*partNumber=2"))
    proxy.add(Fault("flip_request", on="PUT .*partNumber=3", after_bytes=9))
    proxy.add(Fault("lose", on="POST .*uploadId"))
    assert storage.upload(local, "large", if_absent=True)
    assert retries(storage) == {"503": 1, "digest": 1, "connection": 1}
    assert len(proxy.seen(r"PUT .*partNumber")) == 5
    storage.download("large", tmp_path / "back", sha256=file_sha256(local), num_bytes=local.stat().st_size)
    proxy.clear()
    assert not storage.upload(local, "large", if_absent=True)
    assert [exchange.request.split()[0] for exchange in proxy.exchanges] == ["HEAD"]
    assert storage.upload(local, "large")
    proxy.add(Fault("status", on="PUT .*partNumber=2", status=403))
    with pytest.raises(StorageError, match=r"cannot write s3://.*/run/other"):
        storage.upload(local, "other")
    assert storage.list() == ["large", "x"]
    assert storage._bucket is not None
    client, _ = storage._bucket._client()
    assert "Uploads" not in client.list_multipart_uploads(Bucket=storage._bucket.bucket)


def test_a_listing_goes_on_over_all_its_pages(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1", "a/2", "a b", "a+b", "a/ü", "ab"):
        storage.write_bytes(name, b"1")
    request: Callable[..., object] = p2r.s3.S3.request
    monkeypatch.setattr(p2r.s3.S3, "request", lambda *args, **words: request(*args, **words, **(
        {"MaxKeys": 2} if args[1] == "list_objects_v2" else {})))  # fmt: skip
    assert storage.list() == ["a b", "a+b", "a/1", "a/2", "a/ü", "ab", "x"]
    assert storage.list("a") == ["a/1", "a/2", "a/ü"]
    storage.delete("a")
    assert storage.list() == ["a b", "a+b", "ab", "x"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_a_client_of_its_own(storage: Storage, proxy: FaultProxy) -> None:
    assert storage.read_bytes("x") == CONTENT
    child = os.fork()
    if child == 0:
        os._exit(0 if storage.read_bytes("x") == CONTENT else 1)
    assert storage.read_bytes("x") == CONTENT
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_a_deadline_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("P2R_S3_DEADLINE_S", value)
    with pytest.raises(StorageError, match="P2R_S3_DEADLINE_S must be"):
        S3Settings.from_environment()


def test_a_server_that_is_killed_and_comes_back_costs_time_and_nothing_else(
    own_s3: S3Server, few_retries: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = own_bucket(own_s3, monkeypatch)
    local = tmp_path / "large"
    local.write_bytes(np.random.default_rng(1).bytes(2**25))
    bucket.upload(local, "x")
    proxy = FaultProxy(own_s3.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    back: list[threading.Thread] = []

    def kill() -> None:
        own_s3.kill()
        back.append(threading.Thread(target=own_s3.start))
        back[0].start()

    proxy.add(Fault("call", after_bytes=2**23, action=kill))
    storage = Storage(bucket.url, counters=Counters())
    storage.download("x", tmp_path / "back", sha256=file_sha256(local))
    back[0].join()
    proxy.close()
    assert sum(exchange.num_bytes for exchange in proxy.exchanges if exchange.status in ("200", "206")) == 2**25
    assert storage.counters.snapshot()["bytes_fetched"] == 2**25
    assert sum(retries(storage).values()) > 1


def test_keys_that_are_replaced_in_the_file_are_taken_up_and_others_stop_at_once(
    own_s3: S3Server, few_retries: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    storage = own_bucket(own_s3, monkeypatch)
    storage.write_bytes("x", b"1")
    old = own_s3.access_key, own_s3.secret_key
    own_s3.kill()
    own_s3.set_keys("NEWACCESSKEY", "new-secret-key")
    own_s3.start()

    messages = []
    for file in (None, old, ("NEWACCESSKEY", "mistyped-secret-key")):
        if file:
            keys.write_text(f"[default]\naws_access_key_id = {file[0]}\naws_secret_access_key = {file[1]}\n")
        began_s = time.monotonic()
        for attempt in (lambda: storage.read_bytes("x"), lambda: storage.exists("x"), storage.list):
            with pytest.raises(StorageError, match=r"HTTP 403.*AWS_SECRET_ACCESS_KEY.*or ~/.aws/credentials") as caught:
                attempt()
            messages.append("".join(traceback.format_exception(caught.value)))
        assert time.monotonic() - began_s < 2

    keys.write_text("[default]\naws_access_key_id = NEWACCESSKEY\naws_secret_access_key = new-secret-key\n")
    assert storage.read_bytes("x") == b"1"
    storage.write_bytes("y", b"2")
    assert storage.list() == ["x", "y"]
    for secret in (*old, "NEWACCESSKEY", "new-secret-key", "mistyped-secret-key"):
        assert secret not in "".join(messages)


def own_bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"own-{uuid.uuid4().hex[:8]}"
    make_bucket(server.environment, bucket)
    return Storage(f"s3://{bucket}", counters=Counters())
