"""Logging: one event per line, as text for people or JSON for machines, with secrets masked in both.

    Line("pretrain | step 20/200 | ...", step=20)  ->  pretrain | step 20/200 | ...                            on a terminal
                                                   ->  {"time": ..., "run": "demo", "rank": 0, "step": 20, ...}    elsewhere

A line is a `str` with fields: a test or notebook can print it like any text, and it travels between processes like one.
Messages that modules send to `logging` ("p2r.s3: retrying") take the same path. Only progress lines, warnings and errors
are logged; there are no debug messages.

Secrets are masked in every line (`p2r.masking`), because a message can contain another program's answer.
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
_LOGGERS = ("p2r", "cluster")
_STAGES = frozenset({"ingest", "pretrain", "publish", "finetune"})
_FIRST_FIELDS = ("time", "level", "run", "stage", "attempt", "rank", "step", "message")

_UNINDENTED = re.compile(r"\n(?=[^\s])")
_UNSEEN_IN_JSON = re.compile(f"[{UNSEEN}]")
"""Characters that `json.dumps` leaves unescaped and terminals interpret."""


class Line(str):
    """A line of progress with fields, such as `step`, `rank`, a trial or results; to most callers it is only its text."""

    fields: dict[str, object]

    def __new__(cls, text: str, /, **fields: Any) -> "Line":
        """Return the text with these fields, added to those it already has."""
        line = super().__new__(cls, text)
        line.fields = {**getattr(text, "fields", {}), **fields}
        return line

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_line, (str(self), self.fields)


def _restore_line(text: str, fields: dict[str, object]) -> Line:
    return Line(text, **fields)


def fields_of(line: str) -> dict[str, object]:
    """Return the fields of a line."""
    return line.fields if isinstance(line, Line) else {}


def within(say: Say, stage: str) -> Say:
    """Return a logger that prefixes lines with the name of a stage and keeps their fields."""
    return lambda line: say(Line(f"{stage} | {line}", **fields_of(line)))


def counted(say: Say, total: int) -> Say:
    """Return a logger that numbers the lines of finished trials (those with the field `seconds`) and adds the time left."""
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
    """Format a duration: 85 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def configure(log_format: str | None = None, *, run: str | None = None, rank: int | None = None) -> None:
    """Send this process's log to stderr, as text or JSON, until `reset`.

    Args:
        log_format: `text`, `json`, or `auto`: text if stderr is a terminal. None: `P2R_LOG_FORMAT`, or auto.
        run: Name of the job; passed to worker processes in the environment.
        rank: Rank of a pretraining worker.

    Raises:
        InputError: The format is unknown.
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
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger(_PROGRESS).setLevel(logging.INFO)


def reset() -> None:
    """Undo `configure`."""
    os.environ.pop(_RUN, None)
    _remove_handlers()


def _remove_handlers() -> None:
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        for handler in [one for one in logger.handlers if isinstance(one, _Stderr)]:
            logger.removeHandler(handler)


def say(line: str) -> None:
    """Log a line of progress."""
    _emit(logging.INFO, line)


def say_error(error: object, *, code: int) -> None:
    """Log the error that ends the run, and the exit code."""
    _emit(logging.ERROR, Line(str(error), error=type(error).__name__, exit_code=code))


def say_crash(error: BaseException) -> None:
    """Log an unexpected exception with its traceback, secrets masked."""
    text = "".join(traceback.format_exception(error)).rstrip()
    _emit(logging.CRITICAL, Line(text, error=type(error).__name__, exit_code=1))


def _emit(level: int, line: str) -> None:
    logger = logging.getLogger(_PROGRESS)
    if any(isinstance(handler, _Stderr) for handler in logging.getLogger(_LOGGERS[0]).handlers):
        logger.log(level, "%s", line, extra={"fields": fields_of(line)})
    else:
        print(_format_text(level, line), file=sys.stderr, flush=True)


class _Stderr(logging.Handler):
    """Handler that writes to the current `sys.stderr`, which tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # the reader of the pipe is gone: the run continues
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Do nothing: an error about stderr cannot be reported."""


class TextFormatter(logging.Formatter):
    """Text for terminals: the line itself, with a prefix for warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return _format_text(record.levelno, text if record.name == _PROGRESS else f"{record.name}: {text}")


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, run, stage, attempt, rank and step if known, message, further fields."""

    def __init__(self, *, rank: int | None = None) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as one line."""
        message = record.getMessage()
        stage = message.split(" | ", 1)[0]
        event: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "run": os.environ.get(_RUN),
            "stage": stage if stage in _STAGES else None,
            "rank": self._rank,
            "message": message,
            **({} if record.name == _PROGRESS else {"logger": record.name}),
            **cast("dict[str, object]", getattr(record, "fields", {})),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        order = {name: number for number, name in enumerate(_FIRST_FIELDS)}
        named = sorted(event.items(), key=lambda item: order.get(item[0], len(order)))
        text = json.dumps({key: _to_json(value) for key, value in named if value is not None}, ensure_ascii=False)
        return _UNSEEN_IN_JSON.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _format_text(level: int, text: str) -> str:
    prefix = {logging.INFO: "", logging.CRITICAL: "", logging.ERROR: "p2r: "}.get(level, "warning: ")
    shown = harmless(masked(f"{prefix}{text}"))
    # A line break in the name of a file must not begin a line that looks like one of p2r. Tracebacks keep their form.
    return shown if level == logging.CRITICAL else _UNINDENTED.sub("\n  ", shown)


def _to_json(value: Any) -> Any:
    """Convert a value to masked JSON; a non-finite number becomes null."""
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {masked(str(key)): _to_json(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(child) for child in value]
    return masked(str(value))


def as_text(line: str) -> str:
    """Return the readable text of a log line: the message of a JSON event, or the line itself."""
    try:
        event = json.loads(line)
        level = logging.getLevelNamesMapping()[event["level"].upper()]
        return _format_text(level, str(event["message"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return harmless(masked(line))
