"""Every error that p2r raises on purpose, drawn as a tree.

    P2RError
    ├── InputError          the user's input: a job, a path, a scan, a storage URL -> exit code 2, one message
    │   ├── JobError        a job file or an override of it
    │   ├── DataError       a corpus, a task or a label that breaks a rule
    │   │   └── RefusedScan one scan that cannot be used; carries the reason code of the ledger
    │   ├── StorageError    a storage URL that cannot be read or written
    │   │   └── DamagedError something there is absent or is not what was written: trying again will not help
    │   └── CheckpointError a checkpoint or published artefact that does not fit
    ├── OutOfTime           a run's time is over; everything is saved, and the same command resumes it
    └── TrainingError       training itself went wrong (a loss that is not finite) -> exit code 1
        └── EmbeddingError  embeddings that a loss cannot compare; a ValueError as well

An `InputError`'s message names what, where, the rule, and the way out; the command line prints it without a traceback.
Messages often repeat what a library or a server answered: secrets in them are masked when the error is made.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from p2r.masking import masked


class P2RError(Exception):
    """Root of the tree: `except P2RError` catches what p2r itself refuses, and nothing else."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(masked(one) if isinstance(one, str) else one for one in arguments))


class InputError(P2RError):
    """Something that the user gave cannot be used as it is."""


class JobError(InputError):
    """A job file, or a `--set` override, breaks the schema or a rule between its fields."""


class DataError(InputError):
    """A corpus, task or label breaks a rule that the whole job depends on."""


class RefusedScan(DataError):
    """One scan cannot be used. Ingest writes it into the ledger and goes on.

    Args:
        code: The ledger's reason code, in snake case, such as `truncated`.
        message: What was found, where, and which rule it breaks.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = str(self.args[1])

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class StorageError(InputError):
    """A storage URL cannot be read or written, or what lies there is damaged."""


class DamagedError(StorageError):
    """What a storage holds is absent, cut off, or has other bytes than its manifest says: trying again will not help."""


class CheckpointError(InputError):
    """A checkpoint, backbone or model does not fit what it is asked for."""


class OutOfTime(P2RError):
    """The time that a run was given is over. Its state is saved: the same command resumes it."""


class TrainingError(P2RError):
    """Training cannot go on, for a reason that is not in the user's input."""


class EmbeddingError(TrainingError, ValueError):
    """Embeddings are not finite, or zero: weights have diverged, or a network has died."""


def error_text(error: BaseException) -> str:
    """Return an exception as text to show or to store, without secrets; of one that is not p2r's, with the name of its class."""
    text = str(error)
    if isinstance(error, P2RError):
        return text
    return masked(f"{type(error).__name__}: {text}" if text else type(error).__name__)


@contextmanager
def masked_errors() -> Iterator[None]:
    """Replace an exception that leaves the block by one without secrets, if its traceback holds any.

    Ray writes tracebacks of tasks and actors into its own logs, which others on the machine can read.

    Raises:
        P2RError: What left the block, without its causes if these hold a secret.
        RuntimeError: In place of any other exception with a secret; its text is that of `error_text`.
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
