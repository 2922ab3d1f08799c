"""Every error that p2r raises on purpose, drawn as a tree.

    P2RError
    ├── InputError          the user's input: a job, a path, a scan, a storage URL -> exit code 2, one message
    │   ├── JobError        a job file, or an override of it
    │   ├── DataError       a corpus, task or label that breaks a rule
    │   │   └── RefusedScan one scan that cannot be used; has the reason code of the ledger
    │   ├── StorageError    a storage URL that cannot be read or written
    │   │   └── DamagedError a file that is absent or not as it was written: retrying will not help
    │   └── CheckpointError a checkpoint or published artefact that does not fit
    ├── OutOfTime           the run's time is over; everything is saved, and the same command resumes it
    └── TrainingError       training itself failed (a loss that is not finite) -> exit code 1
        └── EmbeddingError  embeddings that a loss cannot compare; also a ValueError

The message of an `InputError` names what, where, the rule, and the way out; the command line prints it without a traceback.
Messages often repeat the answer of a library or server, so secrets are masked when the error is created.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from p2r.masking import masked


class P2RError(Exception):
    """Root of the tree: `except P2RError` catches exactly the errors that p2r raises on purpose."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(masked(one) if isinstance(one, str) else one for one in arguments))


class InputError(P2RError):
    """The user's input cannot be used as it is."""


class JobError(InputError):
    """A job file, or a `--set` override, breaks the schema or a rule between its fields."""


class DataError(InputError):
    """A corpus, task or label breaks a rule that the whole job depends on."""


class RefusedScan(DataError):
    """One scan cannot be used. Ingest records it in the ledger and continues.

    Args:
        code: Reason code of the ledger, in snake case, such as `truncated`.
        message: Finding, place, and the rule it breaks.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = str(self.args[1])

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class StorageError(InputError):
    """A storage URL cannot be read or written, or its content is damaged."""


class DamagedError(StorageError):
    """A file is absent, truncated, or differs from its manifest: retrying will not help."""


class CheckpointError(InputError):
    """A checkpoint, backbone or model does not fit the request."""


class OutOfTime(P2RError):
    """The run's time is over. Its state is saved: the same command resumes it."""


class TrainingError(P2RError):
    """Training cannot continue, for a reason other than the user's input."""


class EmbeddingError(TrainingError, ValueError):
    """Embeddings are not finite, or zero: the weights diverged, or a network died."""


def missing_package(error: ModuleNotFoundError, *, what: str) -> InputError | None:
    """Return an error for an installation without an extra of p2r; None if a module of p2r itself is missing.

    Args:
        error: Raised by an import.
        what: Command or function that needs the package, for the message.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "p2r", "cluster"):
        return None
    return InputError(
        f"{what} needs the package {package}, which is not installed here: {how_to_install('cluster')}. "
        "Without that extra, p2r only supports embed, predict, inspect and verify of backbones and models, p2r.load_backbone and "
        "p2r.load_model"
    )


def how_to_install(extra: str) -> str:
    """Return how to add an extra of p2r, for a message. It names no package index: PyPI's project called p2r is another one."""
    return f"install p2r again with its extra '{extra}', from where you installed it (in a clone: pip install -e '.[{extra}]')"


def error_text(error: BaseException) -> str:
    """Return an exception as text without secrets, to show or store; foreign exceptions include their class name."""
    text = str(error)
    if isinstance(error, P2RError):
        return text
    return masked(f"{type(error).__name__}: {text}" if text else type(error).__name__)


@contextmanager
def masked_errors() -> Iterator[None]:
    """Replace an exception that leaves the block by one without secrets, if its traceback contains any.

    Ray writes tracebacks of tasks and actors into its own logs, which other users of the machine can read.

    Raises:
        P2RError: The original error, without its causes if they contain a secret.
        RuntimeError: In place of any other exception with a secret; its text is `error_text` of the original.
    """
    try:
        yield
        return
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        if masked(text) == text:
            raise
        replaced = error if isinstance(error, P2RError) else RuntimeError(error_text(error))
    replaced.__cause__ = replaced.__context__ = None
    raise replaced
