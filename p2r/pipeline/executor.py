"""Interface between the stages of a job and the programs that do its heavy parts: a loop in this process, or Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from p2r.config import IngestConfig, PretrainConfig
from p2r.errors import P2RError
from p2r.fewshot.search import TrialRunner
from p2r.job import AshaConfig
from p2r.logs import Say
from p2r.storage import Storage


@dataclass(frozen=True)
class VariantRun:
    """Pretraining of one variant of an ablation."""

    config: PretrainConfig
    storage: Storage
    """`<storage of the variant>/pretrain`."""
    corpus: Storage


@dataclass(frozen=True)
class StoppedVariant:
    """State in which a variant was stopped for falling behind."""

    step: int
    """Step of its newest checkpoint."""
    probe_dice: float
    """Online probe that was compared."""

    def text(self) -> str:
        """Return the state for a table."""
        return f"stopped at step {self.step}, probe Dice {self.probe_dice:.3f}"


@dataclass(frozen=True)
class VariantOutcome:
    """End of one variant's pretraining. Without error and state, and not done: running the job again resumes it."""

    is_done: bool = False
    """True if the last step was reached."""
    stopped: StoppedVariant | None = None
    error: P2RError | None = None


class Executor(TrialRunner, Protocol):
    """Runs the heavy parts of a job."""

    runs_variants_together: bool
    """False: the stages of one variant end before the next variant begins."""

    def ingest(self, config: IngestConfig, storage: Storage, *, subjects: frozenset[str] | None, say: Say) -> None:
        """Make a corpus at `storage`, with its manifest."""

    def pretrain(self, config: PretrainConfig, *, storage: Storage, corpus: Storage, say: Say) -> bool:
        """Train to the end, or as far as time allows; return whether the end was reached."""

    def pretrain_variants(
        self, runs: Mapping[str, VariantRun], *, asha: AshaConfig | None, say: Say
    ) -> dict[str, VariantOutcome]:
        """Train variants by name, several at a time if there is room; an error of one does not end the others."""
