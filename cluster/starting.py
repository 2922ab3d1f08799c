"""Starting Ray: a line before it, one more attempt after a failure, and one message instead of Ray's traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2r.errors import P2RError, TrainingError
from p2r.logs import Say


@contextmanager
def started_session(address: str | None, *, job: Path, show_worker_logs: bool, say: Say) -> Iterator[None]:
    """Be connected to Ray, as `session`.

    Args:
        address: Of a cluster; None: `RAY_ADDRESS`, else a local one.
        job: The job file, for the way out.
        show_worker_logs: As for `session`.
        say: Receives a line before Ray is imported, and one if the first attempt fails.

    Raises:
        TrainingError: if Ray does not start on this machine, twice; if a cluster cannot be joined.
    """
    where = address or os.environ.get("RAY_ADDRESS")
    say(f"joining the Ray cluster at {where} ..." if where else "starting Ray on this machine ...")
    import ray

    from cluster.session import session

    context = session(address, show_worker_logs=show_worker_logs)
    try:
        context.__enter__()
    except P2RError:
        raise
    except Exception as first:
        ray.shutdown()
        if where is not None:  # it has been waited for long enough
            raise TrainingError(_message(where, job, first)) from first
        say(f"Ray did not start ({_first_line(first)}): one more attempt")
        context = session(address, show_worker_logs=show_worker_logs)
        try:
            context.__enter__()
        except P2RError:
            raise
        except Exception as second:
            ray.shutdown()
            raise TrainingError(_message(where, job, second)) from second
    try:
        yield
    finally:
        context.__exit__(None, None, None)


def _message(where: str | None, job: Path, error: Exception) -> str:
    reason = _first_line(error)
    if where is not None:
        return (
            f"the Ray cluster at {where} cannot be joined ({reason}): check --address or RAY_ADDRESS, and that it runs; without a "
            f"cluster: python -m p2r {job}"
        )
    return (
        f"Ray did not start on this machine, twice ({reason}): it gives its own processes 30 s, which a busy machine may exceed; try "
        f"again later, or run the job in this process, without Ray: python -m p2r {job}"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
