"""Exit codes of the commands: one for each kind of end, and the message that precedes it."""

import errno
from collections.abc import Callable

import pytest

from cluster import cli
from p2r.errors import JobError, OutOfTime, TrainingError
from p2r.exits import exit_code_of

ENDS: dict[str, tuple[BaseException, int, str]] = {
    "a job that breaks a rule": (
        JobError("jobs/a.yaml: steps must be positive"),
        2,
        "p2r: jobs/a.yaml: steps must be positive",
    ),
    "a run that is out of time": (OutOfTime("saved at step 7"), 1, "p2r: saved at step 7"),
    "a loss that is not finite": (TrainingError("the loss is nan"), 1, "p2r: the loss is nan"),
    "a package that is absent": (
        ModuleNotFoundError("no", name="ray.tune"),
        2,
        "p2r: the command needs the package ray,",
    ),
    "a module of p2r that is absent": (
        ModuleNotFoundError("no module p2r.x", name="p2r.x"),
        1,
        "ModuleNotFoundError: no module",
    ),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), 1, "p2r: "),
    "a mistake in the code": (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "p2r: interrupted; run the same command again to resume"),
}


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize("end", ENDS)
def test_every_end_has_one_exit_code_and_a_message(end: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, words = ENDS[end]
    assert exit_code_of(raising(error), what="the command", is_debug=False) == code
    logged = capsys.readouterr().err
    assert words in logged
    assert ("Traceback" in logged) == (type(error) in (ZeroDivisionError,) or end == "a module of p2r that is absent")


@pytest.mark.parametrize("end", [end for end in ENDS if end != "Ctrl-C"])
def test_debugging_adds_the_traceback_and_keeps_the_exit_code(end: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, _ = ENDS[end]
    assert exit_code_of(raising(error), what="the command", is_debug=True) == code
    assert "Traceback" in capsys.readouterr().err


def test_the_exit_code_of_a_command_that_ends_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: 143, what="the command", is_debug=False) == 143
    assert capsys.readouterr().err == ""


def test_ctrl_c_within_a_command_of_p2r_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("p2r.job.json_schema", raising(KeyboardInterrupt()))
    assert cli.main(["schema"]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["schema", "--wrong"], 2, "No such option: --wrong"),
        (["submit", "absent.yaml"], 2, "absent.yaml cannot be read"),
        (["--version"], 0, "p2r 0."),
        ([], 2, "Usage"),
    ],
)
def test_the_command_line_takes_arguments_and_returns_its_exit_code(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err
