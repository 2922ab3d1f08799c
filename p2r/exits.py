"""Exit codes of the commands `p2r` and `python -m p2r`, and the error messages that precede them.

0    done
1    any other error: a message of p2r, or a traceback
2    invalid input: one message, no traceback unless debugging
130  interrupted; running the command again resumes it
143  stopped by SIGTERM, with a checkpoint to resume from
"""

import signal
import traceback
from collections.abc import Callable

from p2r.errors import InputError, P2RError, missing_package
from p2r.files import lack_of_space
from p2r.identity import ensure_identity
from p2r.logs import reset, say, say_crash, say_error

FAILED = 1
INVALID_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT
STOPPED = 128 + signal.SIGTERM


def exit_code_of(command: Callable[[], int], *, what: str, is_debug: bool) -> int:
    """Run a command, log the error that ends it, and return the exit code.

    Args:
        command: Returns an exit code, or raises.
        what: Name of the command, for the message about a missing package.
        is_debug: Log the traceback of every error.
    """
    try:
        if (notice := ensure_identity()) is not None:
            say(notice)
        return command()
    except KeyboardInterrupt:
        say("p2r: interrupted; run the same command again to resume from the newest checkpoint")
        return INTERRUPTED
    except Exception as error:
        return _log_error(error, what=what, is_debug=is_debug)
    finally:
        reset()


def _log_error(error: Exception, *, what: str, is_debug: bool) -> int:
    """Log an error as one message if its cause is known, and with its traceback otherwise; return the exit code."""
    known: P2RError | None = error if isinstance(error, P2RError) else None
    if isinstance(error, ModuleNotFoundError):
        known = missing_package(error, what=what)
    code = INVALID_INPUT if isinstance(known, InputError) else FAILED
    if known is None and not is_debug:
        known = lack_of_space(error)
    if known is None:
        say_crash(error)
        return FAILED
    if is_debug:
        say("".join(traceback.format_exception(error)).rstrip())
    say_error(known, code=code)
    return code
