"""Start of Ray: a log line before it, a second attempt after a failure, and one message in place of Ray's traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2r.errors import P2RError, TrainingError
from p2r.logs import Say


@contextmanager
def started_session(address: str | None, *, job: Path, show_worker_logs: bool, say: Say) -> Iterator[None]:
    """Connect to Ray as in `session`.

    Args:
        address: Address of a cluster; None: `RAY_ADDRESS`, or a local Ray.
        job: The job file, named in the error message.
        show_worker_logs: See `session`.
        say: Receives a line before Ray is imported, and one if the first attempt fails.

    Raises:
        TrainingError: Ray failed twice to start on this machine, or a cluster cannot be joined.
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
        if where is not None:  # joining a cluster has its own long timeout
            raise TrainingError(_start_error(where, job, first)) from first
        say(f"Ray did not start ({_first_line(first)}): retrying once")
        context = session(address, show_worker_logs=show_worker_logs)
        try:
            context.__enter__()
        except P2RError:
            raise
        except Exception as second:
            ray.shutdown()
            raise TrainingError(_start_error(where, job, second)) from second
    try:
        yield
    finally:
        context.__exit__(None, None, None)


def _start_error(where: str | None, job: Path, error: Exception) -> str:
    reason = _first_line(error)
    if where is not None:
        return (
            f"the Ray cluster at {where} cannot be joined ({reason}): check --address or RAY_ADDRESS, and that the cluster runs; "
            f"without a cluster: python -m p2r {job}"
        )
    return (
        f"Ray failed twice to start on this machine ({reason}): it gives its own processes 30 s, which may be too short on a busy "
        f"machine. Try again later, or run the job in this process, without Ray: python -m p2r {job}"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
