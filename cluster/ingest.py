"""Ingest on Ray: one task per shard, a bounded number in flight, the manifest by the driver, last."""

from typing import Any

import ray

from cluster.progress import Say
from p2r.config import IngestConfig
from p2r.data.corpus import ShardPlan, build_shard, find_scans, finish_corpus, plan_shards
from p2r.storage import Storage, cache_folder


def ingest(
    config: IngestConfig,
    storage: Storage,
    *,
    subjects: frozenset[str] | None,
    cpus_per_task: float,
    retries: int,
    say: Say,
) -> None:
    """Make the corpus at `storage`; a task that dies is run again and writes the same bytes."""
    plans = plan_shards(find_scans(config.sources, cache=cache_folder()), config, allowed_subjects=subjects)
    say(f"ingest | {sum(len(plan.scans) for plan in plans)} scans to read, {len(plans)} shards to write")
    build = ray.remote(num_cpus=cpus_per_task, max_retries=retries)(_build)
    limit = max(1, 2 * int(ray.cluster_resources().get("CPU", 1) / cpus_per_task))
    waiting = list(plans)
    running: dict[Any, ShardPlan] = {}
    done: dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]]]] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            plan = waiting.pop(0)
            running[build.remote(plan, config, storage)] = plan
        (ready, *_), _ = ray.wait(list(running))
        plan = running.pop(ready)
        done[plan.name] = _result(ready)
        say(f"ingest | shard {len(done)}/{len(plans)} | {sum(row['num_samples'] for row in done[plan.name][1])} planes")
    results = [done[plan.name] for plan in plans]
    finish_corpus(
        storage,
        config,
        [entry for entry, _ in results],
        [row for _, rows in results for row in rows],
        allowed_subjects=subjects,
    )


def _build(
    plan: ShardPlan, config: IngestConfig, storage: Storage
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    return build_shard(plan, config, storage)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
