"""Trackers get what the driver reports, a resumed job continues its runs, and a tracker that fails costs one warning."""

import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from p2r.errors import InputError, StorageError
from p2r.job import Job, read_job
from p2r.logs import Line
from p2r.pipeline import tracking
from p2r.pipeline.trackers import TRACKERS, Target, flat_parameters
from p2r.pipeline.tracking import tracked
from p2r.storage import Storage


class Recorder:
    """A tracker that keeps what it is given."""

    calls: ClassVar[list[tuple[str, Any]]] = []
    by_run: ClassVar[dict[str, list[int]]] = {}
    sends_on_close = False

    def __init__(self, target: Target) -> None:
        self.run = target.run or ("run-1" if target.variant is None else f"run-{target.name}")
        self.calls.append(("open", target.run if target.variant is None else (target.variant, target.run)))

    def parameters(self, values: Mapping[str, str]) -> None:
        self.calls.append(("parameters", dict(values)))

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        self.calls.append(("metrics", (step, dict(values))))
        self.by_run.setdefault(self.run, []).append(step)

    def picture(self, name: str, png: bytes) -> None:
        self.calls.append(("picture", name))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.calls.append(("table", (name, tuple(columns), list(rows))))

    def close(self, *, is_done: bool) -> None:
        self.calls.append(("close", is_done))


class Down(Recorder):
    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        raise ConnectionError("no route to tracker")


@contextmanager
def tracker(kind: type, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    with monkeypatch.context() as patch:
        patch.setitem(TRACKERS, "mlflow", ("torch", kind))
        Recorder.calls, Recorder.by_run = [], {}
        yield Recorder.calls


def line(step: int) -> Line:
    return Line(f"pretrain | step {step}", rank=0, step=step, loss=1.0 / step, learning_rate=None)


@pytest.fixture
def job(write_toy_job: Callable[..., Path], tmp_path: Path) -> Job:
    return read_job(write_toy_job(tmp_path), ("trackers=[mlflow]",))


def steps(calls: list[tuple[str, Any]]) -> list[int]:
    return [value[0] for kind, value in calls if kind == "metrics"]


def test_a_tracker_gets_the_drivers_lines_and_a_second_call_continues_the_run_without_repeating_steps(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, said = Storage(job.storage), list[str]()
    with tracker(Recorder, monkeypatch) as calls:
        interrupted = tracked(job, storage, said.append)
        say = interrupted.__enter__()
        for step in (2, 4):
            say(line(step))
        interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert (calls[0], calls[-1]) == (("open", None), ("close", False))
        assert steps(calls) == [2, 4]
        assert calls[2][1][1] == {"pretrain/loss": 0.5}
        assert said == ["pretrain | step 2", "pretrain | step 4"]
        calls.clear()
        with tracked(job, storage, said.append) as say:
            for step in (4, 6):  # repeated from the checkpoint
                say(line(step))
        assert (calls[0], calls[-1]) == (("open", "run-1"), ("close", True))
        assert steps(calls) == [6]


def test_a_tracker_that_is_down_costs_one_warning_and_gets_the_steps_at_the_next_call(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(job.storage)
    rows = "".join(f'{{"step": {step}, "loss": 0.5, "world_size": 1}}\n' for step in (1, 2))
    with tracker(Down, monkeypatch) as calls, caplog.at_level(logging.WARNING, "p2r"):
        with tracked(job, storage, lambda text: None) as say:
            for step in range(1, 50):
                say(line(step))
        (warning,) = [record.message for record in caplog.records]
        assert re.fullmatch(r"tracker mlflow is off for the rest of this run: ConnectionError: no route.*", warning)
        assert ("close", True) not in calls
    storage.write_bytes("pretrain/history.jsonl", rows.encode())
    with tracker(Recorder, monkeypatch) as calls:
        with tracked(job, storage, lambda text: None):
            pass
        assert steps(calls) == [1, 2], "the history of the call in which it was down"


def test_steps_that_tensorboard_could_not_upload_are_sent_at_the_next_call(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    job, storage, uploaded = job.model_copy(update={"trackers": ("tensorboard",)}), Storage(job.storage), list[bytes]()

    def refuse(storage: Storage, local: Path, path: str) -> bool:
        raise StorageError("cannot write to the bucket")

    def upload(storage: Storage, local: Path, path: str) -> bool:
        uploaded.append(local.read_bytes())
        return True

    monkeypatch.setattr(Storage, "is_local", False)
    monkeypatch.setattr(Storage, "upload", refuse)
    with tracked(job, storage, lambda text: None) as say:
        say(line(2))
    assert storage.read_json("trackers.json")["tensorboard"]["step"] == 0
    storage.write_bytes("pretrain/history.jsonl", b'{"step": 2, "loss": 0.5, "world_size": 1}\n')
    monkeypatch.setattr(Storage, "upload", upload)
    with tracked(job, storage, lambda text: None):
        pass
    assert b"pretrain/loss" in b"".join(uploaded)
    assert storage.read_json("trackers.json")["tensorboard"]["step"] == 2


def test_each_pretrained_variant_of_an_ablation_has_a_run_of_its_own_which_a_second_call_continues(
    write_toy_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("kind=ablation", "finetune.score_on=validation", "trackers=[mlflow]")
    job = read_job(
        write_toy_job(tmp_path), (*overrides, "variants={few: {pretrain.steps: 4}, many: {pretrain.steps: 8}}")
    )
    storage = Storage(job.storage)
    with tracker(Recorder, monkeypatch) as calls:
        with tracked(job, storage, lambda text: None) as say:
            for step in (2, 4):
                for name in ("few", "many"):
                    say(Line(f"pretrain | {name} | step {step}", step=step, loss=0.5, variant=name))
            say(Line("pretrain | step 2", step=2, loss=0.5, variant="of another job"))
            say(Line("finetune | trial", trial="a", validation_dice=0.25))
        assert Recorder.by_run == {"run-few": [2, 4], "run-many": [2, 4], "run-1": [1]}
        sent = [value["pretrain.steps"] for kind, value in calls if kind == "parameters"]
        assert sorted(sent) == ["4", "6", "8"], "the settings of the job and of each variant"
        calls.clear()
        rows = "".join(f'{{"step": {step}, "loss": 0.5, "world_size": 1}}\n' for step in (2, 4, 6))
        storage.write_bytes("variants/many/pretrain/history.jsonl", rows.encode())
        with tracked(job, storage, lambda text: None):
            pass
        opened = {value for kind, value in calls if kind == "open"}
        assert opened == {"run-1", ("few", "run-few"), ("many", "run-many")}
        assert Recorder.by_run["run-many"] == [2, 4, 6]


def test_a_tracker_that_hangs_does_not_hold_the_job(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    released = threading.Event()

    class Hanging(Recorder):
        def metrics(self, values: Mapping[str, float], *, step: int) -> None:
            released.wait(30)

    monkeypatch.setattr(tracking, "_CLOSE_S", 0.2)
    monkeypatch.setattr(tracking, "_MAX_WAITING", 3)
    with tracker(Hanging, monkeypatch), caplog.at_level(logging.WARNING, "p2r"):
        with tracked(job, Storage(job.storage), lambda text: None) as say:
            for step in range(1, 50):
                say(line(step))
        released.set()
    assert [record.message for record in caplog.records] == [
        "tracker mlflow is off for the rest of this run: has not answered for 3 records"
    ]


def test_damaged_files_cost_a_warning_each_and_not_the_job(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(job.storage)
    for path in ("trackers.json", "pretrain/history.jsonl", "report/report.json"):
        storage.write_bytes(path, b"[{")
    with tracker(Recorder, monkeypatch) as calls, caplog.at_level(logging.WARNING, "p2r"):
        with tracked(job, storage, lambda text: None) as say:
            say(line(2))
        assert steps(calls) == [2] and calls[-1] == ("close", True)
    assert [record.message.split(":")[1] for record in caplog.records] == [
        " new runs begin",
        " the steps of earlier calls are not sent",
        " the report is not sent to trackers",
    ]


def test_settings_without_paths_are_sent_and_a_missing_package_is_named(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flat_parameters({"a": {"b": 1, "c": None}, "d": [1, 2]}) == {"a.b": "1", "d": "[1, 2]"}
    with tracker(Recorder, monkeypatch) as calls:
        with tracked(job, Storage(job.storage), lambda text: None):
            pass
        (sent,) = [value for kind, value in calls if kind == "parameters"]
        assert sent["pretrain.steps"] == "6" and not [value for value in sent.values() if "/" in value]
    monkeypatch.setitem(TRACKERS, "mlflow", ("no_such_package", Recorder))
    with (
        pytest.raises(
            InputError, match=r"trackers: no_such_package is not installed: install p2r again with its extra 'trackers'"
        ),
        tracked(job, Storage(job.storage), lambda text: None),
    ):
        pass


def test_tensorboard_gets_curves_the_table_and_pictures(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    storage = Storage(job.storage)
    row = {"task": "disc", "mode": "fine_tune", "num_labelled": 1, "draw": 0, "subjects": ["s"], "dice_mean": 0.5}
    row |= {
        "id": "a",
        "backbone_sha256": None,
        "split": "test",
        "dice": {"DISC": 0.5},
        "protocol": "leak_free",
        "predictions": "p",
    }
    storage.write_json("report/report.json", {"format": "p2r-report/1", "rows": [row]})
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    storage.write_bytes("report/pictures/few-shot-disc.png", png.getvalue())
    with tracked(job.model_copy(update={"trackers": ("tensorboard",)}), storage, lambda text: None) as say:
        say(line(2))
        say(Line("finetune | trial", trial="a", validation_dice=0.25, seconds=1.0))
    folder = Path(job.storage.removeprefix("file://"), "tensorboard")
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    words = (b"pretrain/loss", b"finetune/validation_dice", b"report/few-shot-disc", b"fine_tune", b"pretrain.steps")
    for word in words:
        assert word in content
