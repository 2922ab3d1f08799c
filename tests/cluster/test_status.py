"""What `p2r status` says of a run: read from its storage alone, by what is new, and whatever lies there."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import cli, status_files, status_reader
from cluster.status import target_of
from cluster.status_files import FAULTS, HISTORY, Resumption
from cluster.status_reader import Reader
from cluster.status_terminal import plain_lines, view
from p2r.errors import InputError, StorageError
from p2r.storage import Storage

HOSTILE = '<img src=x onerror="alert(1)">'


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        **{"step": step, "num_steps": 100, "loss": 8.0 - step / 50, "images_per_s": 20.0, "wait_fraction": 0.01},
        **{"eta_s": (100 - step) * 0.5, "learning_rate": 1e-3, "gradient_norm": 2.0, "resumed_from": None},
        **{"health": {"alignment": 0.5, "effective_rank": 12.5}, "negatives": "of the global batch", **changes},
    }


def lines_of(*rows: Any) -> str:
    return "".join(f"{json.dumps(one)}\n" for one in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The storage of a run of which ten reports have come, two resumptions and a fault."""
    run = tmp_path / "run"
    (run / "pretrain").mkdir(parents=True)
    rows = [row(step, resumed_from={30: 20, 70: 60}.get(step)) for step in range(10, 90, 10)]
    (run / HISTORY).write_text(lines_of(*rows))
    fault = {"time": "2026-01-02T03:04:05+00:00", "attempt": 1, "cause": "worker", "what": "rank 1 was killed"}
    (run / FAULTS).write_text(lines_of({**fault, "decision": "restart", "from_step": 20, "count": 1, "limit": 3}))
    checkpoint = run / "pretrain/checkpoints/step-00000060/manifest.json"
    checkpoint.parent.mkdir(parents=True)
    files = {"a": {"num_bytes": 100}, "b": {"num_bytes": 24}}
    checkpoint.write_text(json.dumps({"step": 60, "world_size": 2, "files": files}))
    trial = run / "finetune/heart/trials/heart-final-fine_tune-n1-d0-0.json"
    trial.parent.mkdir(parents=True)
    for draw, dice in enumerate((0.5, 0.7)):
        about = {
            "id": f"t{draw}",
            "task": "heart",
            "mode": "fine_tune",
            "purpose": "final",
            "num_labelled": 1,
            "draw": draw,
        }
        result = {
            "trial": about,
            "validation": {"dice_mean": 0.6},
            "row": {"split": "test", "dice_mean": dice},
            "seconds": 9,
        }
        trial.with_name(f"{draw}.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def reader(folder: Path) -> Reader:
    return Reader("run", Storage(str(folder)))


@pytest.fixture
def p2r(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        return cli.main([*map(str, arguments)]), *capsys.readouterr()

    return call


def test_the_status_is_what_the_files_say(reader: Reader) -> None:
    found = reader.read()
    assert found.training is not None
    assert (found.training.step, found.training.num_steps, found.training.state) == (80, 100, "running")
    assert found.training.last["loss"] == 6.4 and found.training.last["health.effective_rank"] == 12.5
    assert found.series["loss"] == [(step, 8.0 - step / 50) for step in range(10, 90, 10)]
    assert found.resumed == (Resumption(30, 20), Resumption(70, 60))
    assert [(fault.cause, fault.from_step, fault.limit) for fault in found.faults] == [("worker", 20, 3)]
    (checkpoint,) = found.checkpoints
    assert (checkpoint.step, checkpoint.num_bytes, checkpoint.world_size) == (60, 124, 2)
    (curve,) = found.sweep.curves
    assert (curve.task, curve.split, curve.mode) == ("heart", "test", "fine_tune")
    assert curve.points == [(1, pytest.approx(0.6), 2)]
    assert found.problems == ()
    json.dumps(found.__dict__["series"], allow_nan=False)


class Watched(Storage):
    """Counts what is read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[tuple[str, int]] = []

    def read_bytes(self, path: str, *, max_bytes: int | None = None) -> bytes:
        self.reads.append((path, -1))
        return super().read_bytes(path, max_bytes=max_bytes)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        self.reads.append((path, stop - start))
        return super().read_range(path, start, stop)


def test_what_is_known_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_reader, "_LOCAL_SLOW_S", -1.0)  # everything is looked at each time
    monkeypatch.setattr(status_files, "_OVERLAP_BYTES", 64)
    storage = Watched(str(folder))
    reader = Reader("run", storage)
    reader.read()
    storage.reads.clear()
    for _ in range(3):
        reader.read()
    assert storage.reads == []
    with (folder / HISTORY).open("a") as file:
        file.write(lines_of(row(90)))
    found = reader.read()
    assert found.training is not None and found.training.step == 90 and len(found.series["loss"]) == 9
    assert storage.reads == [(HISTORY, 64 + len(lines_of(row(90))))]


def test_a_history_that_was_written_anew_is_read_anew(folder: Path, reader: Reader) -> None:
    reader.read()
    # A run that fell back writes other rows, and may soon have more of them than before.
    (folder / HISTORY).write_text(lines_of(*(row(step, loss=1.0) for step in range(10, 130, 10))))
    found = reader.read()
    assert found.series["loss"] == [(step, 1.0) for step in range(10, 130, 10)]
    assert found.resumed == ()
    (folder / HISTORY).write_text(lines_of(row(10)))
    assert len(reader.read().series["loss"]) == 1
    (folder / HISTORY).unlink()
    assert reader.read().training is None


def test_rows_that_are_none_are_left_out_and_said(folder: Path, reader: Reader) -> None:
    whole = (folder / HISTORY).read_text()
    bad = [
        "not JSON",
        "[1, 2]",
        "null",
        '{"step": "9"}',
        '{"step": -1}',
        '{"step": true}',
        "[" * 100_000,
        '{"loss": 1}',
    ]
    (folder / HISTORY).write_text(whole + "".join(f"{one}\n" for one in bad) + '{"step": 90, "lo')
    (folder / FAULTS).write_bytes(b"\xff\xfe\n{}\n")
    found = reader.read()
    assert len(found.series["loss"]) == 8
    history, half, faults = found.problems
    assert "pretrain/history.jsonl: 8 rows are damaged and left out" in history
    assert "last row is half-written" in half
    assert "pretrain/faults.jsonl: 2 rows are damaged" in faults
    # The rest of the half-written row comes.
    with (folder / HISTORY).open("a") as file:
        file.write('ss": 5.0, "num_steps": 100}\n')
    found = reader.read()
    assert found.series["loss"][-1] == (90, 5.0)
    assert not any("half-written" in problem for problem in found.problems)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "x", True, None, [1], {"a": 1}, 1e308])
def test_a_figure_that_is_no_number_is_left_out(folder: Path, reader: Reader, value: Any) -> None:
    changes = {"loss": value, "eta_s": value, "num_steps": value, "health": value, "data": value, "resumed_from": value}
    (folder / HISTORY).write_text(lines_of(row(10), {**row(20), **changes}, row(30, data={"x": value})))
    found = reader.read()
    assert [step for step, _ in found.series["loss"]] == [10, 30]
    assert found.training is not None and found.training.data == {}
    for line in plain_lines(found):
        assert line


@pytest.mark.parametrize("value", ["1" * 400, "1e999", "[" * 40 + "]" * 40, '1, "loss": 2'])
def test_a_row_that_leaves_a_bound_is_damaged(folder: Path, reader: Reader, value: str) -> None:
    (folder / HISTORY).write_text(lines_of(row(10)) + f'{{"step": 20, "loss": {value}}}\n' + lines_of(row(30)))
    found = reader.read()
    assert [step for step, _ in found.series["loss"]] == [10, 30]
    assert any("1 row is damaged" in problem for problem in found.problems)


@pytest.mark.parametrize(
    "path",
    [
        "corpus/manifest.json",
        "pretrain/checkpoints/step-00000060/manifest.json",
        "finetune/heart/trials/0.json",
        "report/report.json",
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"null", b"[[]]", b'{"format": 1, "files": [], "step": "x"}', b"[" * 99_999]
)
def test_a_file_that_is_not_what_it_should_be_spoils_nothing_else(
    folder: Path, reader: Reader, path: str, content: bytes
) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    found = reader.read()
    assert found.training is not None and found.training.step == 80
    Console(width=100, file=sys.stderr).print(view(found, width=100))


def test_a_long_run_is_as_small_as_a_short_one_and_keeps_its_spikes(folder: Path, reader: Reader) -> None:
    losses = [5.0] * 20_000
    losses[12_345], losses[77] = 99.0, 0.5
    (folder / HISTORY).write_text(
        lines_of(*({"step": step, "num_steps": 20_000, "loss": loss} for step, loss in enumerate(losses, 1)))
    )
    points = reader.read().series["loss"]
    assert len(points) <= 600
    assert {(12_346, 99.0), (78, 0.5), (1, 5.0), (20_000, 5.0)} <= set(points)
    assert points == sorted(points)


def test_of_a_history_without_end_only_the_end_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_files, "_MAX_HISTORY_BYTES", 2 * len(lines_of(row(10))) + 10)
    reader = Reader("run", Storage(str(folder)))
    reader._history._most_bytes = status_files._MAX_HISTORY_BYTES
    found = reader.read()
    assert [step for step, _ in found.series["loss"]] == [70, 80]
    assert "only its last" in found.problems[0]


def test_a_run_that_is_silent_for_long_says_so(folder: Path, reader: Reader) -> None:
    for age_s, state in ((30, "running"), (3600, "silent")):
        os.utime(folder / HISTORY, (time.time() - age_s,) * 2)
        training = reader.read().training
        assert training is not None and training.state == state
    (folder / HISTORY).write_text(lines_of(row(100)))
    os.utime(folder / HISTORY, (time.time() - 3600,) * 2)
    training = reader.read().training
    assert training is not None and training.state == "done"


def test_secrets_in_what_a_fault_says_are_masked(folder: Path, reader: Reader) -> None:
    (folder / FAULTS).write_text(lines_of({"cause": "node", "what": "cannot read http://user:planted@host/x"}))
    assert reader.read().faults[0].what == "cannot read http://***@host/x"


def test_variants_of_an_ablation_are_listed(tmp_path: Path) -> None:
    for name in ("many", "few"):
        (tmp_path / "variants" / name / "pretrain").mkdir(parents=True)
        (tmp_path / "variants" / name / HISTORY).write_text(lines_of(row(10), row(20)))
    found = Reader("run", Storage(str(tmp_path))).read()
    assert [(one.name, one.step, one.num_steps) for one in found.variants] == [
        ("few", 20, 100),
        ("many", 20, 100),
    ]


@pytest.mark.s3
def test_a_bucket_is_read_like_a_folder(folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_reader, "_REMOTE_SLOW_S", -1.0)
    storage = Storage(s3_url)
    for path in sorted(folder.rglob("*.json*")):
        storage.write_bytes(path.relative_to(folder).as_posix(), path.read_bytes())
    reader = Reader("run", storage)
    local = Reader("run", Storage(str(folder))).read()
    found = reader.read()
    assert (found.series, found.resumed, found.faults, found.sweep) == (
        local.series,
        local.resumed,
        local.faults,
        local.sweep,
    )
    storage.write_bytes(HISTORY, (folder / HISTORY).read_bytes() + lines_of(row(90)).encode())
    training = reader.read().training
    assert training is not None and training.step == 90
    with pytest.raises(StorageError, match="holds no run"):
        Reader("x", Storage(f"{s3_url}/nothing")).read()


def test_a_run_that_does_not_exist_is_named(
    p2r: Callable[..., tuple[int, str, str]], tmp_path: Path, write_toy_job: Callable[..., Path]
) -> None:
    job = write_toy_job(tmp_path)
    for target, words in (
        (job, "holds no run"),
        (f"file://{tmp_path}/nothing", "holds no run"),
        (tmp_path / "nothing", "neither a job file (.yaml) nor the folder or URL"),
        (tmp_path / "absent.yaml", "cannot be read"),
        ("ftp://bucket/run", "scheme 'ftp' is not supported"),
    ):
        for options in ((), ("--web", "--port", "0"), ("--watch",), ("--json",)):
            code, said, why = p2r("status", target, *options)
            assert (code, said) == (2, "")
            assert words in why and str(target).removesuffix("toy.yaml") in why and "Traceback" not in why
    code, _, why = p2r("status", job, "--web", "--json")
    assert code == 2 and "exclude one another" in why
    code, _, why = p2r("status", tmp_path, "--set", "pretrain.steps=3")
    assert code == 2 and "--set overrides fields of a job file" in why


def test_a_job_and_its_storage_have_the_same_status(
    p2r: Callable[..., tuple[int, str, str]], folder: Path, write_toy_job: Callable[..., Path]
) -> None:
    job = write_toy_job(folder.parent)
    by_job, by_url = p2r("status", job, "--set", f"storage={folder}"), p2r("status", f"file://{folder}")
    assert by_job[1].replace("toy |", "run |") == by_url[1]
    assert "pretrain  step 80/100 | loss 6.4000 | 1 checkpoints" in by_url[1]
    assert (
        "fault     2026-01-02T03:04:05+00:00 | worker: rank 1 was killed | restart from step 20 (1 of 3)" in by_url[1]
    )
    assert "few-shot  heart | fine-tuned | 1: 0.600 (2 draws) | test Dice" in by_url[1]
    as_json = json.loads(p2r("status", folder, "--json")[1])
    assert as_json["training"]["step"] == 80 and as_json["format"] == "p2r-status/1"
    assert as_json["resumed"] == [{"step": 30, "from": 20}, {"step": 70, "from": 60}]
    assert [*as_json["faults"][0]] == ["time", "cause", "what", "decision", "attempt", "from_step", "count", "limit"]
    assert [*as_json["checkpoints"][0]] == ["step", "path", "num_bytes", "world_size", "written_at_s"]
    assert [*as_json["sweep"]["curves"][0]] == ["task", "split", "mode", "points"]


def test_set_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--set overrides"):
        target_of(str(tmp_path), ("a=1",))


def shown(reader: Reader, width: int) -> Iterator[str]:
    console = Console(width=width, record=True, file=sys.stderr)
    console.print(view(reader.read(), width=width))
    yield from console.export_text().splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_terminal_shows_the_curve_its_marks_and_the_figures(reader: Reader, width: int) -> None:
    found = list(shown(reader, width))
    text = "\n".join(found)
    assert all(len(line) <= width for line in found)
    assert found[0].startswith("run") and "running, last report" in text
    assert "80 of 100" in text and "loss 6.4000, steps 0 to 80" in text
    assert any(0x2801 <= ord(letter) <= 0x28FF for letter in text)
    marks = next(line for line in found if "┆" in line)
    assert "✕" in marks and "▴" not in marks  # the checkpoint's step is one at which it was resumed
    assert "effective rank" in text and "12.5" in text and "0.600 (2)" in text


def test_no_text_of_a_run_commands_the_terminal(folder: Path) -> None:
    name = "[red]\x1b[2Jrun"
    (folder / FAULTS).write_text(
        lines_of({"cause": "[bold]x[/]", "what": "\x1b]0;title\x07 [link=x]", "decision": "\r"})
    )
    reader = Reader(name, Storage(str(folder)))
    for text in ("\n".join(shown(reader, 100)), "\n".join(plain_lines(reader.read()))):
        assert "\x1b" not in text and "\x07" not in text and "\r" not in text
        assert "[red]?[2Jrun" in text and "[bold]x[/]" in text
