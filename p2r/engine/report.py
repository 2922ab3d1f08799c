"""The report that pretraining yields at intervals, and its line of progress."""

from dataclasses import dataclass, field

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class PretrainReport:
    """What a caller learns about a run. Means are over the steps since the report before."""

    step: int
    """Optimizer steps taken."""
    num_steps: int
    """Length of the run."""
    samples_seen: int
    """Images consumed by all ranks, each giving two views."""
    loss: float
    """Mean loss: nats for InfoNCE. Of steps that were not left out; if all were, what the report before said."""
    learning_rate: float
    """Rate of the last step."""
    gradient_norm: float
    """Global norm of the last step that was not left out, before clipping."""
    images_per_s: float
    """All ranks together."""
    wait_fraction: float
    """Part of the time in which this rank waited for data, and its device had nothing else to do."""
    num_replaced: int
    """Damaged samples that this rank has replaced by others, since it started."""
    data: dict[str, float]
    """What this rank's stream has done since it started: bytes, seconds, retries, cache hits (see `p2r.counters`)."""
    eta_s: float
    """Seconds to the end at this speed."""
    negatives: str
    """Which pixels were contrasted with one another."""
    num_images_without_pairs: int = 0
    """Images of all ranks, since the report before, of which no pixel could be paired; they take no part in the loss."""
    skipped_steps: int = 0
    """Steps left out because the loss or a gradient was not finite, since the run's beginning."""
    pixel_pairs_per_s: float = 0.0
    """All ranks together."""
    step_s: float = 0.0
    """Mean time of a step, seconds."""
    memory_mib: float = 0.0
    """This rank's peak: tensors on its GPU; the process's resident set on a CPU."""
    world_size: int = 1
    """Number of ranks."""
    loss_parts: dict[str, float] = field(default_factory=dict)
    """Of the last step. InfoNCE: mean cosine of pairs (positive), mean log-sum-exp of logits over negatives (negatives, nats). Barlow
    Twins: the two terms of the loss (invariance, redundancy)."""
    health: dict[str, float] | None = None
    """Of the last step's embeddings, where the equivariance error is stated: alignment, uniformity, effective_rank,
    dead_dimensions_fraction; see `p2r.engine.health`."""
    equivariance_error: float | None = None
    """Of the last step: 0 if embeddings follow the warp perfectly, 1 if no better than chance; see `p2r.engine.step`."""
    probe_dice: float | None = None
    """Of the newest online probe since the report before, on rank 0: mean Dice of the labelled task; see `p2r.engine.online_probe`."""
    resumed_from: int | None = None
    """In the first report of a resumed run: the step it went on from."""
    fell_back: str | None = None
    """In the first report of a resumed run: which checkpoints could not be used, and why."""
    checkpoint: str | None = None
    """Path below `<storage>/pretrain` of a checkpoint that was completed since the report before: of an earlier step, for uploads go on
    beside training; after the last step, of that step."""
    checkpoint_s: float | None = None
    """Seconds that the newest complete checkpoint of this process took, from the beginning of the save to its manifest."""
    checkpoint_bytes: int | None = None
    """Its size."""
    compiled: str | None = None
    """In the first report of a run that compiles: what came of it."""
    loss_without_kernels: str | None = None
    """In the first report of a run on a GPU whose loss is computed without its kernels: why, and the way out."""
    profile: str | None = None
    """Path of the profile that was made since the report before, below `<storage>/pretrain`."""

    def line(self) -> str:
        """Return the report as one line for a terminal."""
        minutes, seconds = divmod(round(self.eta_s), 60)
        return (
            f"step {self.step}/{self.num_steps} | loss {self.loss:.4f} | {self.images_per_s:.1f} img/s | "
            f"wait {self.wait_fraction:.1%} | lr {self.learning_rate:.1e} | grad {self.gradient_norm:.2f} | "
            + (f"equivariance error {self.equivariance_error:.3f} | " if self.equivariance_error is not None else "")
            + (f"effective rank {self.health['effective_rank']:.1f} | " if self.health is not None else "")
            + (f"probe Dice {self.probe_dice:.3f} | " if self.probe_dice is not None else "")
            + f"ETA {minutes}:{seconds:02d}"
            + (f" | {self.compiled}" if self.compiled else "")
            + (f" | {self.loss_without_kernels}" if self.loss_without_kernels else "")
            + (f" | negatives {self.negatives}" if "micro" in self.negatives else "")
            + (f" | {self.skipped_steps} steps skipped" if self.skipped_steps else "")
            + (f" | {self.num_images_without_pairs} images without pairs" if self.num_images_without_pairs else "")
            + (f" | {self.num_replaced} damaged samples replaced" if self.num_replaced else "")
            + (f" | checkpoint {self.checkpoint}" if self.checkpoint else "")
            + (f" | {self.profile}" if self.profile else "")
            + (f" | {self.fell_back}" if self.fell_back else "")
        )
