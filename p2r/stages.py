"""Table of the stages of a job, and of its kinds: the only place that lists which stages a kind runs, and which sections it needs.

A stage is a section of the job file of the same name, and a function in `p2r.pipeline.stages`.
"""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["ingest", "pretrain", "publish", "finetune", "variants"]
Section = Literal["ingest", "pretrain", "publish", "finetune"]

STAGES: tuple[Section, ...] = ("ingest", "pretrain", "publish", "finetune")
"""Stages of one run, in order; the report is part of fine-tuning."""


@dataclass(frozen=True)
class KindFacts:
    """Properties of one kind of job."""

    sections: tuple[Section, ...]
    """Sections that the job file must have."""
    stages: tuple[Stage, ...]
    """Stages that the job runs, in order; ingest only if the job has that section."""


KINDS: dict[str, KindFacts] = {
    **{stage: KindFacts((stage,), (stage,)) for stage in STAGES},
    "pipeline": KindFacts(STAGES, STAGES),
    "ablation": KindFacts(("pretrain", "publish", "finetune"), ("ingest", "variants")),
}
