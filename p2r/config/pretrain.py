"""Section `pretrain`: corpus -> pixel representation."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from p2r.config.ingest import SessionsConfig
from p2r.config.loss import LossConfig
from p2r.config.model import ModelConfig
from p2r.config.section import Artefact, Fraction, Location, Section, is_none
from p2r.config.views import ImageConfig, ViewsConfig
from p2r.contrasts import Contrast


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay."""
    warmup_fraction: Fraction = 0.05
    """Fraction of all steps in which the learning rate rises linearly."""
    clip_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 disables."""


class CorpusShare(Section):
    """One of several corpora."""

    url: Location
    """URL of the corpus."""
    weight: PositiveFloat | None = None
    """Weight of this corpus in every batch, relative to the others. None for all: in proportion to their sizes."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of a manifest. None: the current revision when the run starts; a resumed run keeps it."""
    contrast: Contrast | None = Field(default=None, exclude_if=is_none)
    """Name of the contrast of a corpus whose records do not state it; it is needed beside `model.contrasts`."""


class BalanceConfig(Section):
    """Shares of a batch by a property of the scans, so that rare values are drawn as often as frequent ones.

    Each value has its own passes over its records: a rare one repeats more often. A session with several contrasts, or scans of several
    scanners, counts for each of them. Scans that do not state the property have the value `not stated`.
    """

    by: Literal["contrast", "scanner", "field_strength"]
    """Property, as the corpus states it: contrast (`t1`), scanner (manufacturer and model), or field strength (`1.5 T`). The
    corpus's `report/report.md` lists the values."""
    weights: Annotated[dict[str, NonNegativeFloat], Field(min_length=1, max_length=1024)] | None = None
    """Weight of each value in every batch, rounded to the lanes of the sample order; 0 leaves its records out. None: equal weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights must not all be 0")
        return self


class ProbeConfig(Section):
    """A quick linear probe on a labelled task during pretraining, which shows a collapse within minutes.

    It reads a few train and validation patients of the task, never a test patient, and does not affect training.
    """

    task: Location
    """Path of the task's YAML, relative to the job file."""
    interval: PositiveInt = 500
    """Steps between two probes; the last step is always probed. The next report states the result."""
    num_labelled: PositiveInt = 1
    """Train patients whose pixels the probe is fitted to."""
    num_validation: PositiveInt = 4
    """Validation patients to segment; all of them, if there are fewer."""
    planes_per_scan: PositiveInt = 16
    """Largest number of planes (for volumes: frames) read from each scan, evenly spaced."""
    seed: int = 0
    """Seed for drawing the patients."""


class PretrainConfig(Section):
    """Pretraining: corpus -> pixel representation."""

    corpus: Location | Annotated[tuple[CorpusShare, ...], Field(min_length=1)] | None = None
    """URL of the corpus, or several with weights. None: `<storage>/corpus`, made by this job's ingest section if absent."""
    image: ImageConfig = ImageConfig()
    """The network's input."""
    views: ViewsConfig = ViewsConfig()
    """Augmentation: geometry, to which the representation is equivariant, and intensity, to which it is invariant."""
    model: ModelConfig = ModelConfig()
    """Network."""
    loss: LossConfig = LossConfig()
    """Objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    steps: PositiveInt
    """Optimizer steps."""
    global_batch: PositiveInt
    """Images per optimizer step, over all workers."""
    neighbours: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Fraction of the batch's images that are the next plane of another image in it: nearly alike, hence hard negatives."""
    balance: BalanceConfig | None = Field(default=None, exclude_if=is_none)
    """Draw images so that contrasts, scanners or field strengths occur equally often, or by weight. None: each image equally often."""
    max_replaced: NonNegativeInt = 100
    """Damaged samples that a worker may replace by others before it stops. Each is recorded under `quarantine/` and counted. 0: none."""
    micro_batch: PositiveInt | None = None
    """Images that a worker encodes at once, if its part of the global batch does not fit into memory. None: all of its part."""
    seed: int = 0
    """Seed for weights, order, views and points."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the network. Normalisation statistics, sampling at points, the projection head and the sums of the loss are always
    fp32. tf32: fp32, with products that GPUs of compute capability 8.0 or newer may round to 10 bits. The loss kernels support tf32 and
    bf16; with fp32 a GPU computes the loss in torch's tiles, several times slower."""
    compile: bool | Literal["reduce-overhead"] = False
    """Compile the backbone (torch.compile) before the first step. Takes seconds to minutes, stated in the first report; the result is
    cached in `$P2R_CACHE`. Without a compiler the report says so, and training runs uncompiled. reduce-overhead: GPUs also replay the
    kernels as CUDA graphs, for networks so small that kernel launches dominate; it uses more memory."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage, by state partitioned over the workers: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights. Each
    saves memory with several workers. Stage 3 fetches weights layer by layer; on GPUs its step waits for the device."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, in fp32, which is then published (0.999: about the last 1000 steps). Over
    the first steps it is the plain mean. None: publish the last weights."""
    max_skipped_steps: NonNegativeInt = 10
    """Consecutive steps that may be skipped because the loss or a gradient is not finite; then the run stops and names the last good
    checkpoint. A skipped step uses up its batch and its place in the schedule and changes nothing. 0: the first one stops the run."""
    deterministic: bool = False
    """Use only deterministic algorithms (torch.use_deterministic_algorithms, cuDNN, cuBLAS with a fixed workspace). A resumed run is then
    bitwise equal to an uninterrupted one on GPUs, too, but slower. On CPUs this holds without it."""
    report_interval: PositiveInt = 10
    """Steps between two reports (a line on the terminal, a line in history.jsonl)."""
    equivariance_interval: NonNegativeInt = 1
    """Reports from one that states the equivariance error to the next. The error is 0 if the embeddings of a step's pixel pairs follow
    the warp perfectly, 1 if no better than chance. 0 disables."""
    checkpoint_interval: PositiveInt = 100
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints kept on the storage."""
    keep_every: NonNegativeInt = 0
    """Keep checkpoints whose step is a multiple of this permanently, besides the newest. 0 disables."""
    init_from: Artefact | None = None
    """URL of the initial weights. A published backbone (`STORAGE/backbones/NAME/1`, or `STORAGE/backbones/NAME@stable`): its projection
    head is taken over if it was published and has the same shapes. Another run's checkpoint:
    `STORAGE/pretrain/checkpoints/step-00001000`. A weights file (.safetensors, .pth, .pt, .ckpt) of MONAI's networks, nnU-Net or nnssl,
    whose names are mapped to `model`. `@sha256:HEX` pins each. Step, schedule and order start from zero. None: random weights, drawn by
    `seed`."""
    probe: ProbeConfig | None = None
    """Linear probe on a labelled task during training. None: no probe."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.model.check_size(self.image.size, what="image.size")
        if self.model.in_channels != 1 and self.model.contrasts is None:
            raise ValueError(
                f"model.in_channels {self.model.in_channels} needs the names of the contrasts: give model.contrasts, such as [t1, flair]"
            )
        several = self.model.contrasts is not None and len(self.model.contrasts) > 1
        for name, default in (("contrasts", "same"), ("contrast_dropout", 0.0)):
            if not several and getattr(self.views, name) != default:
                raise ValueError(f"views.{name} {getattr(self.views, name)} needs model.contrasts with several names")
        levels, first, last = self.loss.levels, self.model.level, self.model.depth
        if len(set(levels)) < len(levels) or not all(first < level <= last for level in levels):
            raise ValueError(
                f"loss.levels must be different levels from {first + 1} to {last}, coarser than model.level, got {list(levels)}"
            )
        if levels and self.compile:
            raise ValueError("loss.levels need compile: false, which compiles only the features of the finest level")
        self._check_reconstruction()
        if self.neighbours and self.image.dimensions == 3:
            raise ValueError(
                f"neighbours {self.neighbours:g} are planes next to each other: they need image.dimensions 2; views.frames_apart pairs the "
                "frames of a series"
            )
        self._check_balance()
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile needs zero_stage 0, 1 or 2: stage 3 fetches weights between layers, where a compiled graph breaks"
            )
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision bf16 needs zero_stage 1, 2 or 3 (DeepSpeed's stage 0 drifts), got 0")
        return self

    def _check_reconstruction(self) -> None:
        reconstruction = self.loss.reconstruction
        if reconstruction is None:
            return
        edge = reconstruction.block_size(self.image.spacing_mm)
        num_blocks = math.ceil(self.image.size / edge) ** self.image.dimensions
        if not 0 < (num_masked := reconstruction.num_masked(num_blocks)) < num_blocks:
            raise ValueError(
                f"loss.reconstruction must mask some blocks of an image and leave others, got {num_masked} of {num_blocks} blocks of "
                f"{edge} pixels: give a smaller block_mm, or a masked_fraction nearer to a half"
            )

    def check_sessions(self, sessions: SessionsConfig | None) -> None:
        """Raise `ValueError` if the network reads contrasts that the job's own corpus will not have, before it is made."""
        read = self.model.contrasts
        if sessions is None:
            if read is not None:
                raise ValueError(
                    f"pretrain.model.contrasts names {', '.join(read)}, and ingest joins no contrasts: give ingest.sessions, or leave "
                    "pretrain.model.contrasts out"
                )
            return
        known = ", ".join(sessions.contrasts)
        if read is None:
            raise ValueError(
                f"ingest.sessions makes records of {known}: choose some of them in pretrain.model.contrasts"
            )
        if others := [name for name in read if name not in sessions.contrasts]:
            raise ValueError(
                f"pretrain.model.contrasts names {', '.join(others)}, ingest.sessions.contrasts {known}: correct one of them"
            )

    def _check_balance(self) -> None:
        if self.balance is None:
            return
        if self.neighbours:
            raise ValueError(
                f"balance needs neighbours 0, got {self.neighbours:g}: the neighbour of an image replaces one of another value"
            )
        if not (self.corpus is None or isinstance(self.corpus, str)) and any(share.weight for share in self.corpus):
            raise ValueError(
                "balance gives the shares of a batch, and so do the weights of corpora: leave out one of them"
            )
        if self.balance.by == "contrast" and self.model.contrasts is None:
            raise ValueError(
                "balance.by contrast needs the names of the contrasts: give model.contrasts, such as [t1, flair]"
            )
        others = sorted((self.balance.weights or {}).keys() - set(self.model.contrasts or ()))
        if self.balance.by == "contrast" and others:
            raise ValueError(
                f"balance.weights names {', '.join(others)}, model.contrasts {', '.join(self.model.contrasts or ())}: correct one of them"
            )

    @property
    def negatives(self) -> str:
        """Description of the negatives of a pixel, for reports."""
        if self.loss.negatives == "micro_batch" and self.micro_batch is not None:
            return f"of micro-batches only ({self.micro_batch} images of each worker)"
        return "of the same image" if self.loss.negatives == "image" else "of the global batch"
