"""What went wrong is told from Ray's errors, and written down; what cannot be right is refused before a worker starts."""

import errno
import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from cluster.faults import FaultLog, cause_of, refusal_of
from cluster.group import GroupState
from cluster.pretrain import (
    _allowed_world_sizes,
    _count_room,
    _gpus_per_worker,
    _record_failure,
    _train_to_end,
    _watch_group,
    network_environment,
)
from cluster.pretrain_worker import _poll_end_flag
from cluster.session import Places
from cluster.stopping import StopRequest
from p2r.config import PretrainConfig
from p2r.engine.peers import Peers
from p2r.errors import DataError, InputError, StorageError, TrainingError
from p2r.job import Resources, read_job
from p2r.storage import Storage

ADDRESSES = {0: "10.0.0.1", 1: "10.0.0.2"}


def failed(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("", {int(rank.removeprefix("rank")): failure for rank, failure in failures.items()})


def died() -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:2314")
SLOW = RuntimeError(
    "[gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 30000ms for recv operation to complete"
)


@pytest.mark.parametrize(
    ("error", "lost", "cause", "words"),
    [
        (failed(rank1=died()), {}, "worker", "rank 1 on 10.0.0.2 died"),
        (failed(rank0=CLOSED, rank1=died()), {}, "worker", "rank 1 on 10.0.0.2 died"),
        (failed(rank0=CLOSED), {}, "worker", "rank 0 lost another one"),
        (failed(rank0=CLOSED, rank1=died()), {1: "10.0.0.2"}, "node", "node 10.0.0.2 with rank 1 is gone"),
        (failed(rank0=SLOW), {1: "10.0.0.2"}, "node", "node 10.0.0.2 with rank 1 is gone"),
        (failed(rank0=SLOW), {}, "hang", "Timed out waiting 30000ms"),
        (failed(rank0=CLOSED, rank1=TrainingError("step 7: the loss is nan")), {}, "divergence", "step 7"),
        (PreemptionError(PreemptionInfo(0, {"node": [1]})), {}, "preemption", "was removed"),
        (failed(rank0=ZeroDivisionError("division")), {}, "unknown", "ZeroDivisionError: division"),
    ],
)
def test_the_cause_is_what_explains_the_other_errors(
    error: Exception, lost: dict[int, str], cause: str, words: str
) -> None:
    found, what = cause_of(error, lost=lost, addresses=ADDRESSES)
    assert found == cause
    assert words in what


def test_what_a_worker_refuses_is_not_tried_again_but_a_storage_that_was_there_before_is() -> None:
    refused, away = DataError("no such corpus"), StorageError("cannot read")
    assert refusal_of(failed(rank0=refused), was_running=True) is refused
    assert refusal_of(failed(rank0=away), was_running=False) is away
    assert refusal_of(failed(rank0=away), was_running=True) is None


def test_faults_are_rows_on_the_storage_and_lines_of_the_log(tmp_path: Path) -> None:
    lines: list[str] = []
    log = FaultLog(Storage(str(tmp_path)), say=lines.append)
    log.add("worker", "rank 1 died\nwith a long trace", decision="restart", from_step=40, count=1, limit=2)
    log.add("checkpoint", "step 40 is damaged", decision="fall back", from_step=20)
    again = FaultLog(Storage(str(tmp_path)), say=lines.append)
    assert (again.attempt, again.has_ended_at(20)) == (2, False)
    again.add("stop", "SIGTERM", decision="end", from_step=60)
    rows = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(row["attempt"], row["cause"], row["decision"], row["from_step"]) for row in rows] == [
        (1, "worker", "restart", 40),
        (2, "checkpoint", "fall back", 20),
        (2, "stop", "end", 60),
    ]
    assert lines[0] == "fault | worker: rank 1 died | restart from step 40 | 1 of 2"
    assert again.has_ended_at(60)
    assert not again.has_ended_at(80), "a later start saved this checkpoint, and ended without a row"


def test_preemptions_do_not_count_against_the_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.pretrain.usable_nodes", dict)
    faults = FaultLog(Storage(str(tmp_path)), say=lambda line: None)
    run: Any = SimpleNamespace(faults=faults, retries=1, stop=StopRequest())
    state = GroupState(reason=None, what="", nodes={}, fallbacks=[], step=7)
    preempted = PreemptionError(PreemptionInfo(0, {"node": [1]}))

    def record(failure: Exception, in_a_row: int) -> int:
        return _record_failure(run, failure, state, from_step=5, in_a_row=in_a_row)

    assert record(preempted, 0) == 0
    assert record(failed(rank1=died()), 0) == 1
    assert record(preempted, 1) == 1
    with pytest.raises(TrainingError, match="failed 2 times in a row"):
        record(failed(rank1=died()), 1)
    rows = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(row["cause"], row["decision"], row.get("limit")) for row in rows] == [
        ("preemption", "restart", None),
        ("worker", "restart", 1),
        ("preemption", "restart", None),
        ("worker", "end", 1),
    ]


def test_a_resumed_run_whose_storage_is_away_for_one_group_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.pretrain.usable_nodes", dict)
    faults = FaultLog(Storage(str(tmp_path)), say=lambda line: None)
    run: Any = SimpleNamespace(faults=faults, retries=1, stop=StopRequest())
    state = GroupState(reason=None, what="", nodes={}, fallbacks=[], step=None)
    away = failed(rank0=StorageError("cannot read the checkpoint"))
    assert _record_failure(run, away, state, from_step=5, in_a_row=0) == 1
    with pytest.raises(StorageError, match="cannot read the checkpoint"):
        _record_failure(run, away, state, from_step=None, in_a_row=0)


def test_places_are_returned_if_a_group_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(prefix: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cluster.pretrain.tempfile.TemporaryDirectory", full)
    monkeypatch.setattr("cluster.pretrain.usable_nodes", lambda: {"node": {"CPU": 1.0}})
    monkeypatch.setattr("cluster.pretrain._watch_group", lambda *_: nullcontext())
    places = Places()
    run: Any = SimpleNamespace(
        channel=SimpleNamespace(begin=Remote(lambda group: None)),
        config=config(),
        per_worker={"CPU": 1.0},
        places=places,
        say=lambda line: None,
        sizes=[1],
        step=lambda: None,
        stop=StopRequest(),
        storage=Storage(str(tmp_path)),
        uses_gpu=False,
    )
    with pytest.raises(OSError, match="No space left"):
        _train_to_end(run)
    assert places.held_by_others("another run") == 0


def test_a_foreign_error_of_one_rank_is_no_divergence() -> None:
    def divide() -> float:
        return 1 / 0

    peers = Peers.__new__(Peers)
    peers.rank, peers.world_size = 1, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "_group", object(), raising=False)
        patch.setattr(peers, "gather", lambda mine: [([1.0], None), mine])
        with pytest.raises(RuntimeError, match=r"^rank 1: ZeroDivisionError: ") as raised:
            peers.together(divide)
    found, what = cause_of(failed(rank0=raised.value), lost={}, addresses=ADDRESSES)
    assert found == "unknown" and "ZeroDivisionError" in what


class Remote:
    """A method of an actor without an actor."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


def got(answer: Any, timeout: float | None = None) -> Any:
    """Stand-in for `ray.get`."""
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.mark.parametrize("away", [GetTimeoutError("slow"), ActorUnavailableError("the network is away", None)])
def test_a_worker_polls_on_after_the_network_was_away(away: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.pretrain_worker.ray.get", got)
    monkeypatch.setattr("cluster.pretrain_worker.POLL_S", 0.01)
    answers = [away, False, True]
    channel = SimpleNamespace(is_to_end=Remote(lambda group: answers.pop(0)))
    should_stop = _poll_end_flag(channel, 1)
    end = time.monotonic() + 30
    while not should_stop() and time.monotonic() < end:
        time.sleep(0.01)
    assert should_stop() and not answers


def test_a_stop_is_passed_on_after_the_storage_refused_a_row(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.pretrain.ray.get", got)
    monkeypatch.setattr("cluster.pretrain.POLL_S", 0.01)
    asked, fallbacks = threading.Event(), [[("step 4 is damaged", 2)]]
    reasons: list[str] = []

    def state() -> GroupState:
        told = fallbacks.pop() if fallbacks else []
        return GroupState(reason=None, what="", nodes={}, fallbacks=told, step=7)

    def ask_to_end(reason: str, what: str) -> None:
        reasons.append(reason)
        asked.set()

    def refuse(*row: object, **values: object) -> None:
        raise StorageError("cannot write faults.jsonl")

    stop = StopRequest()
    stop.ask("asha")
    run: Any = SimpleNamespace(
        channel=SimpleNamespace(state=Remote(state), ask_to_end=Remote(ask_to_end)),
        faults=SimpleNamespace(add=refuse),
        resources=Resources(),
        say=lambda line: None,
        sizes=[1],
        stop=stop,
    )
    with caplog.at_level(logging.WARNING), _watch_group(run, 1):
        assert asked.wait(30)
    assert reasons == ["stop"]
    assert "cannot write faults.jsonl" in caplog.text


def test_room_is_counted_node_by_node() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}, {"GPU": 1.0}]
    assert _count_room(nodes, {"CPU": 2}) == 2
    assert _count_room(nodes, {"CPU": 1}) == 6
    assert _count_room(nodes, {"CPU": 1, "GPU": 1}) == 0


def test_the_job_s_words_on_the_network_reach_nccl_and_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    found = network_environment(Resources(network_interface="ib0", nccl={"NCCL_IB_HCA": "mlx5"}))
    assert found["NCCL_SOCKET_IFNAME"] == "=ib0"
    assert found["GLOO_SOCKET_IFNAME"] == "ib0"
    assert found["NCCL_IB_HCA"] == "mlx5"
    assert found["NCCL_DEBUG"] == "INFO"
    assert found["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("resources.num_workers=[4, 2]", "must not decrease"),
        ("resources.nccl={LD_PRELOAD: x}", "NCCL_"),
        ("resources.network_interface=eth0 --x", "pattern"),
        ("resources.collective_timeout_s=0", "greater than 0"),
    ],
)
def test_resources_that_cannot_be_meant(
    write_toy_job: Callable[..., Path], tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_job(write_toy_job(tmp_path), (override,))


def config(**fields: object) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {"image": {"spacing_mm": 2.0, "size": 32}, "steps": 1, "global_batch": 12, **fields}
    )


class TestWorldSizes:
    @pytest.fixture(autouse=True)
    def _room_for_eight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cluster.pretrain.num_cpus", lambda: 8)

    @pytest.mark.parametrize(
        ("wanted", "allowed"), [("auto", [6]), (4, [4]), ([1, 8], [1, 2, 3, 4, 6]), ([5, 64], [6, 12])]
    )
    def test_elastic_numbers_of_workers_are_those_that_can_share_the_batch(
        self, wanted: object, allowed: list[int]
    ) -> None:
        resources = Resources.model_validate({"num_workers": wanted})
        assert _allowed_world_sizes(config(), resources, gpus=0) == allowed

    def test_numbers_that_cannot_share_it_are_refused_with_those_that_can(self) -> None:
        for wanted in (5, [7, 11]):
            with pytest.raises(DataError, match=r"use 1, 2, 3, 4, 6, 12 ranks"):
                _allowed_world_sizes(config(), Resources.model_validate({"num_workers": wanted}), gpus=0)

    def test_a_micro_batch_that_does_not_divide_any_share_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"pretrain\.micro_batch must divide"):
            _allowed_world_sizes(config(micro_batch=5), Resources(num_workers=4), gpus=0)


class TestGpus:
    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def have(*types: str) -> None:
            monkeypatch.setattr("cluster.pretrain.num_gpus", lambda: len(types))
            monkeypatch.setattr("cluster.pretrain.gpu_types", lambda: set(types))

        return have

    def test_auto_takes_them_where_there_are_any(self, gpus: Callable[..., None]) -> None:
        gpus()
        assert _gpus_per_worker(config(), Resources()) == 0
        gpus("H100")
        assert _gpus_per_worker(config(precision="bf16"), Resources()) == 1
        assert _gpus_per_worker(config(), Resources(gpus_per_worker=0)) == 0

    def test_a_gpu_that_is_not_there_is_refused(self, gpus: Callable[..., None]) -> None:
        gpus()
        with pytest.raises(InputError, match=r"resources\.gpus_per_worker asks for a GPU, but the cluster has none"):
            _gpus_per_worker(config(), Resources(gpus_per_worker=1))

    def test_bf16_is_refused_where_a_gpu_does_not_have_it(self, gpus: Callable[..., None]) -> None:
        gpus("H100", "T4")
        with pytest.raises(InputError, match=r"do not support \(T4\): set pretrain\.precision=fp32"):
            _gpus_per_worker(config(precision="bf16"), Resources())
        assert _gpus_per_worker(config(), Resources()) == 1
