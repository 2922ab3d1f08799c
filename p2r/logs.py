"""What a run says -> one event a line: text for people, JSON for machines, secrets masked in both.

    Line("pretrain | step 20/200 | ...", step=20)  ->  pretrain | step 20/200 | ...                            on a terminal
                                                   ->  {"time": ..., "run": "demo", "rank": 0, "step": 20, ...}    elsewhere

A line is a `str` that carries fields: whoever only shows lines (a test, a notebook) needs to know nothing of this, and they
travel between processes like any text. What modules say by `logging` ("p2r.s3: asked again") goes the same way. Only
warnings and worse, and lines of progress, are events: nobody reads a stream of debugging.

Secrets are masked for every line (`p2r.masking`), because a message can hold what another program answered.
"""

import itertools
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, cast, get_args

from p2r.console import UNSEEN, harmless
from p2r.errors import InputError
from p2r.masking import masked

Say = Callable[[str], None]
LogFormat = Literal["auto", "text", "json"]

_VARIABLE = "P2R_LOG_FORMAT"
_RUN = "P2R_RUN"
_PROGRESS = "p2r.progress"
_OURS = ("p2r", "cluster")
_STAGES = frozenset({"ingest", "pretrain", "publish", "finetune"})
_FIRST = ("time", "level", "run", "stage", "attempt", "rank", "step", "message")

_UNSEEN_IN_JSON = re.compile(f"[{UNSEEN}]")
"""What `json.dumps` leaves as it is, and terminals obey."""


class Line(str):
    """A line of progress, and what it is about: `step`, `rank`, a trial, figures. It is its text to all who only show it."""

    fields: dict[str, Any]

    def __new__(cls, text: str, /, **fields: Any) -> "Line":
        """Return the text with these fields, and those that it has already."""
        line = super().__new__(cls, text)
        line.fields = {**getattr(text, "fields", {}), **fields}
        return line

    def __reduce__(self) -> tuple[Any, ...]:
        return _line, (str(self), self.fields)


def _line(text: str, fields: dict[str, Any]) -> Line:
    return Line(text, **fields)


def fields_of(line: str) -> dict[str, Any]:
    """Return what a line carries beside its text."""
    return line.fields if isinstance(line, Line) else {}


def within(say: Say, stage: str) -> Say:
    """Return a `say` whose lines begin with the name of a stage; they keep their fields."""
    return lambda line: say(Line(f"{stage} | {line}", **fields_of(line)))


def counted(say: Say, total: int) -> Say:
    """Return a `say` that numbers the lines of trials that are done (their field is `seconds`) and estimates the time left."""
    began, done = time.monotonic(), itertools.count(1)

    def numbered(line: str) -> None:
        fields = fields_of(line)
        if "seconds" not in fields or "trial" not in fields:
            say(line)
            return
        number = next(done)
        left_s = (time.monotonic() - began) / number * max(0, total - number)
        left = f" | {duration(left_s)} left" if number < total else ""
        say(Line(f"{number}/{total} | {line}{left}", **fields))

    return numbered


def duration(seconds: float) -> str:
    """Return a time for people: 85 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def configure(log_format: str | None = None, *, run: str | None = None, rank: int | None = None) -> None:
    """Send what this process says to stderr, as text or JSON, until `reset`.

    Args:
        log_format: `text`, `json`, or `auto`: text if stderr is a terminal; None: as `P2R_LOG_FORMAT` says, else auto.
        run: Name of the job; this process's workers learn it through the environment.
        rank: Of a worker of pretraining.

    Raises:
        InputError: There is no such format.
    """
    asked = log_format or os.environ.get(_VARIABLE) or "auto"
    if asked not in get_args(LogFormat):
        where = "--log-format" if log_format else _VARIABLE
        raise InputError(f"{where} must be one of {', '.join(get_args(LogFormat))}, got {asked!r}")
    _remove_handlers()
    if run is not None:
        os.environ[_RUN] = run
    as_json = asked == "json" or (asked == "auto" and not sys.stderr.isatty())
    handler = _Stderr()
    handler.setFormatter(JsonFormatter(rank=rank) if as_json else TextFormatter())
    for name in _OURS:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger(_PROGRESS).setLevel(logging.INFO)


def reset() -> None:
    """Undo `configure`."""
    os.environ.pop(_RUN, None)
    _remove_handlers()


def _remove_handlers() -> None:
    for name in _OURS:
        logger = logging.getLogger(name)
        for handler in [one for one in logger.handlers if isinstance(one, _Stderr)]:
            logger.removeHandler(handler)


def say(line: str) -> None:
    """Say a line of progress."""
    _emit(logging.INFO, line)


def say_error(error: object, *, code: int) -> None:
    """Say why the run ends, and with which exit code."""
    _emit(logging.ERROR, Line(str(error), error=type(error).__name__, exit_code=code))


def say_crash(error: BaseException) -> None:
    """Say what nobody expected, with its traceback: without the secrets that this may hold."""
    text = "".join(traceback.format_exception(error)).rstrip()
    _emit(logging.CRITICAL, Line(text, error=type(error).__name__, exit_code=1))


def _emit(level: int, line: str) -> None:
    logger = logging.getLogger(_PROGRESS)
    if any(isinstance(handler, _Stderr) for handler in logging.getLogger(_OURS[0]).handlers):
        logger.log(level, "%s", line, extra={"fields": fields_of(line)})
    else:
        print(_text(level, line), file=sys.stderr, flush=True)


class _Stderr(logging.Handler):
    """Whatever `sys.stderr` is when something is said."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # whoever read it has gone: the run goes on
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Nothing: an error about stderr has no place to go to."""


class TextFormatter(logging.Formatter):
    """What stands on a terminal: the line itself; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return _text(record.levelno, text if record.name == _PROGRESS else f"{record.name}: {text}")


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, run, stage, attempt, rank, step as far as they are known, message, further fields."""

    def __init__(self, *, rank: int | None = None) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """Return the object in one line."""
        message = record.getMessage()
        stage = message.split(" | ", 1)[0]
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "run": os.environ.get(_RUN),
            "stage": stage if stage in _STAGES else None,
            "rank": self._rank,
            "message": message,
            **({} if record.name == _PROGRESS else {"logger": record.name}),
            **cast("dict[str, Any]", getattr(record, "fields", {})),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        order = {name: number for number, name in enumerate(_FIRST)}
        named = sorted(event.items(), key=lambda item: order.get(item[0], len(order)))
        text = json.dumps({key: _plain(value) for key, value in named if value is not None}, ensure_ascii=False)
        return _UNSEEN_IN_JSON.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _text(level: int, text: str) -> str:
    prefix = {logging.INFO: "", logging.CRITICAL: "", logging.ERROR: "p2r: "}.get(level, "warning: ")
    return harmless(masked(f"{prefix}{text}"))


def _plain(value: Any) -> Any:
    """Return what JSON can hold, masked; a number that is not finite is null."""
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {masked(str(key)): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return masked(str(value))


def as_text(line: str) -> str:
    """Return what a person wants to read of a line of a job's log: the message of an event, anything else as it is."""
    try:
        event = json.loads(line)
        level = logging.getLevelNamesMapping()[event["level"].upper()]
        return _text(level, str(event["message"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return harmless(masked(line))
