"""Executor that runs the heavy parts of a job on Ray; `p2r run` passes it to `p2r.pipeline.stages.run_job`."""

from collections.abc import Mapping, Sequence

from cluster import finetune, ingest, pretrain, variants
from cluster.metrics import ExporterSettings
from cluster.session import refuse_unshared_folder
from p2r.config import IngestConfig, PretrainConfig
from p2r.fewshot.protocol import Trial
from p2r.fewshot.results import TrialResult
from p2r.fewshot.setup import TrialSetup
from p2r.job import AshaConfig, Job
from p2r.logs import Say
from p2r.modes import Mode
from p2r.pipeline.executor import VariantOutcome, VariantRun
from p2r.storage import Storage


class RayExecutor:
    """Runs ingest as tasks, pretraining with Ray Train and trials with Ray Tune, using the job's resources and retries.

    Closing it ends this process's metrics endpoint.
    """

    runs_variants_together = True

    def __init__(self, job: Job, *, profile_steps: int = 0) -> None:
        self._resources, self._retries, self._profile_steps = job.resources, job.retries, profile_steps
        storage = Storage(job.storage)
        refuse_unshared_folder(storage)
        self._metrics = ExporterSettings(job.name, storage.url, job.metrics)
        self.exporter = self._metrics.open(role="driver")

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.exporter.close(has_failed=isinstance(error, Exception))  # not by Ctrl-C

    def ingest(self, config: IngestConfig, storage: Storage, *, subjects: frozenset[str] | None, say: Say) -> None:
        """Run one Ray task per shard."""
        ingest.ingest(
            config,
            storage,
            subjects=subjects,
            cpus_per_task=self._resources.cpus_per_ingest_task,
            retries=self._retries,
            say=say,
        )

    def pretrain(self, config: PretrainConfig, *, storage: Storage, corpus: Storage, say: Say) -> bool:
        """Run Ray Train worker groups, one after another, until the last step is done or the job is asked to stop."""
        return pretrain.pretrain(
            config,
            storage=storage,
            corpus=corpus,
            resources=self._resources,
            retries=self._retries,
            say=say,
            profile_steps=self._profile_steps,
            metrics=self._metrics,
            on_fault=self.exporter.fault,
        )

    def pretrain_variants(
        self, runs: Mapping[str, VariantRun], *, asha: AshaConfig | None, say: Say
    ) -> dict[str, VariantOutcome]:
        """Run as many pretrainings at a time as the cluster has room for."""
        settings = variants.VariantSettings(
            self._resources,
            self._retries,
            self._metrics,
            on_fault=self.exporter.fault,
            profile_steps=self._profile_steps,
        )
        return variants.pretrain_variants(runs, settings, asha=asha, say=say)

    def run_trials(self, trials: Sequence[tuple[TrialSetup, Trial]], *, say: Say) -> list[TrialResult]:
        """Run the trials in a Ray Tune experiment; with a scheduler, in one per task and mode."""
        return finetune.run_trials(
            trials, resources=self._resources, retries=self._retries, say=say, count=self.exporter.trials
        )

    def suggest(self, setup: TrialSetup, mode: Mode, *, say: Say) -> list[tuple[Trial, TrialResult]]:
        """Run a Ray Tune experiment with a search algorithm."""
        return finetune.suggest(
            setup, mode, resources=self._resources, retries=self._retries, say=say, count=self.exporter.trials
        )

    def num_concurrent(self, num_trials: int) -> int:
        """Return the number of trials that the cluster's CPUs and GPUs can run at once."""
        return finetune.num_concurrent(num_trials, self._resources)
