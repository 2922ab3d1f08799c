"""Processes that are the ranks of a process group, quickly.

Every process that is started afresh imports torch and DeepSpeed for many seconds. Here one process does, and all ranks are
forked from it; it is one that has computed nothing yet, so that nothing is shared with the tests' own.
"""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest


def start_ranks(world_size: int, folder: Path, work: Callable[..., None], *arguments: Any) -> list[ForkServerProcess]:
    """Start ranks that meet over a file in `folder`, join a gloo group and call `work(rank, *arguments)`.

    Args:
        world_size: How many.
        folder: Of which other groups make no use.
        work: At the top level of a module.
        arguments: Its further arguments.
    """
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        # What the server imports is this checkout's, and says nothing about GPUs that it does not look for.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        patch.setenv("DS_ACCELERATOR", "cpu")
        forkserver.set_forkserver_preload(["p2r.engine.pretrain", "deepspeed"])
        forkserver.ensure_running()
    ranks = [
        context.Process(target=_run_rank, args=(rank, world_size, folder, work, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def join_ranks(ranks: list[ForkServerProcess]) -> None:
    """Wait until all have ended, as they should; end the others as soon as one has failed."""
    running = {rank.sentinel: rank for rank in ranks}
    try:
        while running and not any(rank.exitcode for rank in ranks):
            for sentinel in wait(list(running)):
                running.pop(sentinel).join()  # type: ignore[arg-type]
        codes = [rank.exitcode for rank in ranks]
        assert codes == [0] * len(ranks), f"ranks ended with {codes}; what they said is on stderr"
    finally:
        for rank in ranks:
            rank.kill()


def _run_rank(rank: int, world_size: int, folder: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    from p2r.engine.build import join_process_group

    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=600),
    )
    join_process_group(torch.device("cpu"))
    work(rank, *arguments)
    dist.destroy_process_group()
