"""Pretraining on Ray Train: the engine's generator on every worker, restarted from the newest checkpoint when one dies."""

import os
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.metrics import Exporter
from cluster.progress import Say, relay
from cluster.session import num_cpus, num_gpus
from p2r.config import PretrainConfig
from p2r.data.order import check_world_size
from p2r.data.stream import order_of
from p2r.engine.checkpoint import newest_checkpoint, refuse_other_config
from p2r.engine.corpora import corpora_of
from p2r.errors import CheckpointError, InputError, TrainingError
from p2r.job import Resources
from p2r.storage import Storage


def pretrain(
    config: PretrainConfig,
    *,
    storage: Storage,
    corpus: Storage,
    resources: Resources,
    retries: int,
    say: Say,
    profile_steps: int = 0,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Train to the end on as many workers as `resources` says; rank 0 may profile some of its steps.

    `metrics` are the arguments of every worker's `Exporter`, but for its rank.

    Raises:
        InputError: found before a worker is started: corpus, number of workers or checkpoint do not fit.
        TrainingError: if it still fails after `retries` restarts.
    """
    gpus = num_gpus() if resources.gpus_per_worker == "auto" else resources.gpus_per_worker
    num_workers = _num_workers(config, resources, uses_gpu=gpus > 0)
    check_world_size(config.global_batch, num_workers)
    checkpoint = newest_checkpoint(storage)
    if checkpoint is None:
        order_of(corpora_of(config, corpus), image=config.image, seed=config.seed, global_batch=config.global_batch)
    else:
        refuse_other_config(checkpoint, config, where=storage.at(checkpoint["path"]))
        if checkpoint["step"] >= config.steps:
            return
        if checkpoint["world_size"] != num_workers and config.zero_stage > 0:
            raise CheckpointError(
                f"{storage.at(checkpoint['path'])} was made by {checkpoint['world_size']} workers with ZeRO stage {config.zero_stage}, "
                f"this run would have {num_workers}: set resources.num_workers={checkpoint['world_size']}"
            )
    workers = f"{num_workers} worker{'s' * (num_workers > 1)} on {'GPU' if gpus else 'CPU'}"
    say(f"pretrain | {workers}, {config.steps} steps of {config.global_batch} images")
    with relay(say) as queue:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "config": config,
                "storage": storage.url,
                "corpus": corpus.url,
                "queue": queue,
                "profile_steps": profile_steps,
                "metrics": metrics or {"run": "", "storage_url": storage.url, "endpoint": None},
            },
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": resources.cpus_per_worker} | ({"GPU": 1} if gpus else {}),
            ),
            run_config=RunConfig(
                name=f"pretrain-{time.strftime('%Y%m%d-%H%M%S')}",
                storage_path=ray_folder(storage),
                failure_config=FailureConfig(max_failures=retries),
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error


def ray_folder(storage: Storage) -> str:
    """Where Ray keeps its own state, beside the job's: what resumes a run is never read from there."""
    url = storage.url.rsplit("/", 1)[0] + "/.ray"
    return url.removeprefix("file://")


def _worker(settings: dict[str, Any]) -> None:
    # Imported here: the driver has no use for DeepSpeed.
    from p2r.engine.pretrain import pretrain as run
    from p2r.engine.profile import profile_text

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    # Ray sets the number of threads by CPUs of the worker; torch reads it when it is imported, which may have been before.
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    storage = Storage(settings["storage"])
    reports = run(
        settings["config"],
        storage=storage,
        corpus=Storage(settings["corpus"]),
        device=device,
        profile_steps=settings["profile_steps"],
    )
    with closing(Exporter(**settings["metrics"], rank=context.get_world_rank())) as exporter:
        for report in reports:
            exporter.observe(report)
            if context.get_world_rank() == 0:
                if report.resumed_from is not None:
                    settings["queue"].put(f"pretrain | resumed from step {report.resumed_from}")
                settings["queue"].put(f"pretrain | {report.line()}")
                if report.profile is not None:
                    settings["queue"].put(profile_text(storage))
            ray.train.report({"step": report.step, "loss": report.loss})


def _num_workers(config: PretrainConfig, resources: Resources, *, uses_gpu: bool) -> int:
    if resources.num_workers != "auto":
        available = num_gpus() if uses_gpu else num_cpus() / resources.cpus_per_worker
        if resources.num_workers > available:
            raise InputError(
                f"resources.num_workers asks for {resources.num_workers} workers, the cluster has room for {int(available)}: "
                "ask for fewer, or add nodes"
            )
        return resources.num_workers
    limit = max(1, num_gpus() if uses_gpu else int(num_cpus() / resources.cpus_per_worker))
    return max(count for count in range(1, limit + 1) if config.global_batch % count == 0)


def _cause(error: BaseException) -> Exception:
    """What a worker refused, as itself; anything else as a `TrainingError` with the worker's message."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        while failure is not None:
            if isinstance(failure, InputError | TrainingError):
                return failure
            failure = getattr(failure, "cause", None) or failure.__cause__
    return TrainingError(f"pretraining failed: {error}")
