"""Events: readable on a terminal, JSON elsewhere, one a line, and without a secret in either."""

import io
import json
import logging
import pickle
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import p2r.__main__ as one_process
from cluster import cli
from cluster.progress import _number_attempt
from p2r import logs
from p2r.errors import DataError, InputError
from p2r.logs import Line, as_text, configure, counted, duration, fields_of, say, say_crash, say_error, within
from p2r.masking import masked

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaD==/+planted",
    "RAY_AUTH_TOKEN": "8f14e45fceea167a5a36dedd4bea2543",
    "P2R_PSEUDONYM_KEY": 'a "quoted" \\ pseudonym key',
    "MY_API_KEY": "planted-api-key",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("P2R_LOG_FORMAT")
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    yield
    logs.reset()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def test_a_terminal_gets_the_line_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    configure(run="demo")
    say(Line("pretrain | step 3/9 | loss 1.0", step=3))
    say_error(InputError("job x: no such file"), code=2)
    logging.getLogger("p2r.s3").warning("cannot read %s", "s3://b/k")
    said = "pretrain | step 3/9 | loss 1.0\np2r: job x: no such file\nwarning: p2r.s3: cannot read s3://b/k\n"
    assert sys.stderr.getvalue() == said  # type: ignore[union-attr]


def test_whoever_is_no_terminal_gets_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure(run="demo", rank=1)
    say(Line("pretrain | step 3/9", step=3, attempt=2, loss=float("nan"), images_per_s=8.5))
    say("two\nlines")
    say_error(InputError("no"), code=2)
    logging.getLogger("p2r.s3").warning("cannot read %s", "s3://b/k")
    logging.getLogger("p2r.cache").info("evicted")
    report, text, refused, warned = events(capsys.readouterr().err)
    assert report.pop("time").endswith("+00:00")
    assert list(report) == ["level", "run", "stage", "attempt", "rank", "step", "message", "loss", "images_per_s"]
    assert report == {
        **{"level": "info", "run": "demo", "stage": "pretrain", "attempt": 2, "rank": 1, "step": 3},
        **{"message": "pretrain | step 3/9", "loss": None, "images_per_s": 8.5},
    }
    assert text["message"] == "two\nlines" and "stage" not in text
    assert (refused["level"], refused["error"], refused["exit_code"]) == ("error", "InputError", 2)
    assert (warned["level"], warned["logger"]) == ("warning", "p2r.s3")


def test_a_worker_knows_the_name_of_the_run_from_its_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("P2R_RUN", "of-the-driver")
    configure("json", rank=3)
    say("x")
    (event,) = events(capsys.readouterr().err)
    assert (event["run"], event["rank"]) == ("of-the-driver", 3)


def test_the_environment_chooses_and_the_command_line_overrules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("P2R_LOG_FORMAT", "text")
    configure()
    say("plain")
    configure("json")
    say("object")
    plain, line = capsys.readouterr().err.splitlines()
    assert plain == "plain" and json.loads(line)["message"] == "object"
    monkeypatch.setenv("P2R_LOG_FORMAT", "xml")
    with pytest.raises(InputError, match="P2R_LOG_FORMAT must be one of auto, text, json, got 'xml'"):
        configure()


def test_fields_travel_through_stages_and_processes() -> None:
    said: list[str] = []
    within(said.append, "finetune")(pickle.loads(pickle.dumps(Line("trial", trial="a", step=4))))
    (line,) = said
    assert line == "finetune | trial" and logs.fields_of(line) == {"trial": "a", "step": 4}


def test_a_new_group_of_workers_is_a_new_attempt() -> None:
    groups: list[str] = []
    lines = [Line("x", group="first", step=1), Line("y", group="first"), "z", Line("x", group="second", step=1)]
    found = [logs.fields_of(_number_attempt(line, groups)) for line in lines]
    assert found == [{"step": 1, "attempt": 1}, {"attempt": 1}, {}, {"step": 1, "attempt": 2}]


PRESIGNED = (
    "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAPLANTED%2F20260101&X-Amz-Date=1"
    "&X-Amz-Security-Token=planted%2Ftoken&X-Amz-Signature=0123456789abcdefplanted"
)
LEAKS = [
    *PLANTED.values(),
    "denied: key wJalrXUtnFEMI%2FK7MDENG%2BbPxRfiCYEXAMPLEKEY",
    "http://user:planted-password@proxy:3128/x",
    "s3://AKIAIOSFODNN7PLANTED:planted-secret@bucket/k",
    PRESIGNED,
    "http://127.0.0.1:8000/?token=planted-token",
    "Authorization: Bearer planted-bearer-token",
    "Authorization: AWS4-HMAC-SHA256 Credential=planted/20260101/us/s3/aws4_request, SignedHeaders=host, Signature=0badplanted0bad",
    "aws_secret_access_key = planted-in-a-file",
    "{'SecretAccessKey': 'planted-in-a-dict'}",
    "AKIAIOSFODNN7PLANTE1",
    "-----BEGIN RSA PRIVATE KEY-----\nplanted\n-----END RSA PRIVATE KEY-----",
]


def hides(text: str) -> bool:
    gone = (*PLANTED.values(), "planted", "EXAMPLEKEY", "PLANTE", "0badplanted", "0123456789abcdef")
    return not any(secret in text for secret in gone)


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_secret_is_said(leak: str, log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format)
    say(Line(f"before {leak} after", url=leak, nested={leak: [leak]}))
    logging.getLogger("p2r.retries").warning("asked again: %s", leak)
    try:
        raise ValueError(leak)
    except ValueError as error:
        say_crash(error)
        logging.getLogger("cluster.x").exception("failed")
    printed = capsys.readouterr().err
    assert "***" in printed
    assert hides(printed), printed


def test_what_is_no_secret_stays() -> None:
    for text in (
        "s3://bucket/runs/demo/pretrain | step 3/9 | loss 6.2 | 21.2 img/s",
        "check the bucket, and AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION",
        "file:///home/you/p2r-runs/demo at 10:30 by you@example.org",
        "sha256 a99f2866010f",
    ):
        assert masked(text) == text
    assert masked("auto", environment={"RAY_AUTH_MODE": "token", "SHORT_TOKEN": "auto"}) == "auto"


@pytest.mark.parametrize("arguments", [["p2r", "run"], ["python -m p2r"]])
def test_a_refused_job_is_an_event(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "absent.yaml")])
    code = cli.main() if arguments[0] == "p2r" else one_process.main()
    (event,) = events(capsys.readouterr().err)
    assert code == 2
    assert (event["level"], event["error"], event["exit_code"]) == ("error", "JobError", 2)
    assert "absent.yaml cannot be read" in event["message"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # another test has imported p2r.__main__
def test_the_former_name_of_the_command_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["p2r.engine", str(tmp_path / "absent.yaml")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("p2r.engine", run_name="__main__", alter_sys=True)
    note, refusal = events(capsys.readouterr().err)
    assert stop.value.code == 2
    assert "python -m p2r" in note["message"]
    assert "absent.yaml cannot be read" in refusal["message"]


def test_who_follows_a_job_reads_the_messages_of_its_events(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", run="demo")
    say(Line("pretrain | step 3/9", step=3))
    say_error("no", code=2)
    first, second = capsys.readouterr().err.splitlines()
    assert (as_text(first), as_text(second)) == ("pretrain | step 3/9", "p2r: no")
    for line in ("not JSON", "[1]", '{"level": "x", "message": 1}', '{"a": 1}'):
        assert as_text(line) == line


def test_a_name_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text")
    say("run \x1b[2J\r\u202e x")
    assert capsys.readouterr().err == "run ?[2J?? x\n"


def test_a_line_break_in_a_name_begins_no_line_that_looks_like_one_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text")
    say("reading x\nstep 500 | loss 0.1")
    say_error(DataError("a\nsound    b\n\n  key: rule\n\ttab\nc"), code=2)
    logging.getLogger("p2r.x").warning("cannot read %s", "y\np2r: done")
    said = capsys.readouterr().err
    assert said == (
        "reading x\n  step 500 | loss 0.1\np2r: a\n  sound    b\n\n  key: rule\n\ttab\n  c\nwarning: p2r.x: cannot read y\n  p2r: done\n"
    )


def test_a_reader_of_the_log_who_has_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", Terminal())
    configure("text")
    monkeypatch.setattr(sys, "stderr", closed)
    say("nobody hears this")


def test_lines_of_trials_that_are_done_are_numbered_and_say_what_is_left() -> None:
    said: list[str] = []
    say = counted(said.append, 2)
    say("searching")
    say(Line("a | validation Dice 0.5", trial="a", seconds=3.0))
    say(Line("b | validation Dice 0.6", trial="b", seconds=3.0))
    assert said[0] == "searching"
    assert said[1].startswith("1/2 | a | validation Dice 0.5 | ") and said[1].endswith(" left")
    assert said[2] == "2/2 | b | validation Dice 0.6" and fields_of(said[2])["trial"] == "b"
    assert [duration(seconds) for seconds in (85, 600, 12_000)] == ["85 s", "10 min", "3.3 h"]
