"""Ingest on Ray: one task per shard, a limited number at a time; `p2r.data.corpus` builds the shards."""

from collections.abc import Generator, Sequence
from typing import Any

import ray

from cluster.session import Credentials, credentials
from p2r.config import IngestConfig
from p2r.data.corpus import Built, ShardPlan, build_shard, report_progress
from p2r.data.corpus import ingest as ingest_by
from p2r.errors import masked_errors
from p2r.logs import Say, within
from p2r.storage import Storage


def ingest(
    config: IngestConfig,
    storage: Storage,
    *,
    subjects: frozenset[str] | None,
    cpus_per_task: float,
    retries: int,
    say: Say,
) -> None:
    """Make or extend the corpus at `storage`; a task that dies is run again and writes the same bytes."""

    say_ingest = within(say, "ingest")

    def build_all(plans: Sequence[ShardPlan]) -> Generator[tuple[ShardPlan, Built], None, None]:
        return _build_all(plans, config, storage, cpus_per_task=cpus_per_task, retries=retries)

    report_progress(
        ingest_by(config, storage, build_all=build_all, allowed_subjects=subjects, say=say_ingest), say_ingest
    )


def _build_all(
    plans: Sequence[ShardPlan], config: IngestConfig, storage: Storage, *, cpus_per_task: float, retries: int
) -> Generator[tuple[ShardPlan, Built], None, None]:
    build = ray.remote(num_cpus=cpus_per_task, max_retries=retries)(_build_one)
    limit = max(1, 2 * int(ray.cluster_resources().get("CPU", 1) / cpus_per_task))
    waiting = iter(plans)
    running: dict[Any, ShardPlan] = {}
    try:
        while True:
            while len(running) < limit and (plan := next(waiting, None)) is not None:
                running[build.remote(plan, config, storage, credentials())] = plan
            if not running:
                return
            (ready, *_), _ = ray.wait(list(running))
            yield running.pop(ready), _get_result(ready)
    finally:
        for reference in running:  # not empty if the job stops early
            ray.cancel(reference)


def _build_one(plan: ShardPlan, config: IngestConfig, storage: Storage, given: Credentials) -> Built:
    given.take()
    with masked_errors():
        return build_shard(plan, config, storage)


def _get_result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
