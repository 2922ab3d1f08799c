"""Report that pretraining yields at intervals, and its line of progress."""

from dataclasses import dataclass, field

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class PretrainReport:
    """State of a run for its caller. Means are over the steps since the previous report."""

    step: int
    """Optimizer steps taken."""
    num_steps: int
    """Length of the run."""
    samples_seen: int
    """Images consumed by all ranks, each giving two views."""
    loss: float
    """Mean loss of the steps that were not skipped (InfoNCE: nats; with masked reconstruction, plus its weighted error); if all were, the
    value of the previous report."""
    learning_rate: float
    """Learning rate of the last step."""
    gradient_norm: float
    """Global gradient norm of the last step that was not skipped, before clipping."""
    images_per_s: float
    """Throughput of all ranks together."""
    wait_fraction: float
    """Fraction of time that this rank waited for data while its device was idle."""
    num_replaced: int
    """Damaged samples that this rank has replaced since it started."""
    data: dict[str, float]
    """Counters of this rank's stream since it started: bytes, seconds, retries, cache hits (see `p2r.counters`)."""
    eta_s: float
    """Time to the end at the current speed, s."""
    negatives: str
    """Description of the negatives."""
    images_by_value: dict[str, int] | None = None
    """With `pretrain.balance`: images consumed by all ranks since the run began, for each contrast, scanner or field strength."""
    num_images_without_pairs: int = 0
    """Images of all ranks since the previous report of which no pixel could be paired; they do not contribute to the loss."""
    skipped_steps: int = 0
    """Steps since the start of the run that were skipped because the loss or a gradient was not finite."""
    pixel_pairs_per_s: float = 0.0
    """Throughput of all ranks together."""
    step_s: float = 0.0
    """Mean time of a step, seconds."""
    memory_mib: float = 0.0
    """This rank's peak: tensors on its GPU; the process's resident set on a CPU."""
    world_size: int = 1
    """Number of ranks."""
    loss_parts: dict[str, float] = field(default_factory=dict)
    """Parts of the last step's loss. InfoNCE: mean cosine of pairs (positive), mean log-sum-exp of logits over negatives (negatives,
    nats). Barlow Twins: the two terms of the loss (invariance, redundancy). With masked reconstruction its error (reconstruction), to which
    its weight in the loss is not applied; 1: no better than the mean of each view."""
    health: dict[str, float] | None = None
    """Metrics of the last step's embeddings, given with the equivariance error: alignment, uniformity, effective_rank,
    dead_dimensions_fraction; see `p2r.engine.health`."""
    equivariance_error: float | None = None
    """For the last step: 0 if embeddings follow the warp perfectly, 1 if no better than chance; see `p2r.engine.step`."""
    contrast_pairs: dict[str, dict[str, float]] | None = None
    """For images of several contrasts, with the equivariance error: metrics of each pair of contrasts that the two views showed, such as
    `flair-t1`, or `several`; see `p2r.engine.health.health_by_contrasts`."""
    probe_dice: float | None = None
    """Newest online probe since the previous report, on rank 0: mean Dice of the labelled task; see `p2r.engine.online_probe`."""
    resumed_from: int | None = None
    """In the first report of a resumed run: the step of the checkpoint."""
    fell_back: str | None = None
    """In the first report of a resumed run: checkpoints that could not be used, and the reasons."""
    checkpoint: str | None = None
    """Path below `<storage>/pretrain` of a checkpoint completed since the previous report. It is of an earlier step, because uploads
    run beside training; after the last step, of that step."""
    checkpoint_s: float | None = None
    """Time from the start of the save to the manifest, for this process's newest complete checkpoint, s."""
    checkpoint_bytes: int | None = None
    """Size of that checkpoint."""
    compiled: str | None = None
    """In the first report of a run that compiles: the outcome."""
    loss_without_kernels: str | None = None
    """In the first report of a GPU run that computes the loss without its kernels: the reason, and the way out."""
    profile: str | None = None
    """Path below `<storage>/pretrain` of a profile made since the previous report."""

    def line(self) -> str:
        """Return the report as one line for a terminal."""
        minutes, seconds = divmod(round(self.eta_s), 60)
        return (
            f"step {self.step}/{self.num_steps} | loss {self.loss:.4f} | {self.images_per_s:.1f} img/s | "
            f"wait {self.wait_fraction:.1%} | lr {self.learning_rate:.1e} | grad {self.gradient_norm:.2f} | "
            + (
                f"reconstruction error {error:.3f} | "
                if (error := self.loss_parts.get("reconstruction")) is not None
                else ""
            )
            + (f"equivariance error {self.equivariance_error:.3f} | " if self.equivariance_error is not None else "")
            + (f"effective rank {self.health['effective_rank']:.1f} | " if self.health is not None else "")
            + self._contrasts_line()
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

    def _contrasts_line(self) -> str:
        """Return the equivariance error of the best and the worst pair of contrasts."""
        errors = {name: metrics["equivariance_error"] for name, metrics in (self.contrast_pairs or {}).items()}
        if len(errors) < 2:
            return ""
        best, worst = min(errors, key=lambda name: errors[name]), max(errors, key=lambda name: errors[name])
        return f"from {errors[best]:.3f} ({best}) to {errors[worst]:.3f} ({worst}) | "
