"""Section `finetune`: backbone x task x labelled patients x draw x mode."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from p2r.config.imported import ImportedConfig
from p2r.config.other import OtherConfig
from p2r.config.search import Distribution, SearchConfig
from p2r.config.section import Artefact, Fraction, Location, NumLabelled, Section, is_none, is_zero
from p2r.config.views import GeometryConfig, IntensityConfig, ViewsConfig
from p2r.contrasts import Contrasts
from p2r.modes import MODES, Mode
from p2r.reference import names_weights_file


class FinetuneConfig(Section):
    """Few-shot fine-tuning: backbone x task x labelled patients x draw x mode -> results on test (or validation) patients."""

    tasks: Annotated[tuple[Location, ...], Field(min_length=1)]
    """Paths of task YAMLs, relative to the job file."""
    backbone: Artefact | None = None
    """URL of a published backbone; `URL@sha256:HEX` pins its manifest, and `NAME@stable` follows a pointer when the job
    starts. Or a weights file of another tool (see `imported`), which is first published as `backbones/imported/<digest>` in the job's
    storage. None: the backbone that this job publishes."""
    imported: ImportedConfig | None = Field(default=None, exclude_if=is_none)
    """Only if `backbone` is a weights file (.safetensors, .pth, .pt, .ckpt) of MONAI's networks, nnU-Net or nnssl: its network, image and
    licence. Its pretraining patients are unknown, so `allow_transductive` must be set."""
    other: OtherConfig | None = Field(default=None, exclude_if=is_none)
    """Frozen network of another tool, for comparison. Required by the mode other_probe, and used by it only."""
    backbone_signed_by: Annotated[str, Field(pattern=r"^ed25519:[0-9a-f]{64}$")] | None = None
    """Public key that must have signed the backbone, as `p2r sign` prints it. None: no signature is required."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("scratch", "linear_probe", "fine_tune")
    """Modes to compare. scratch: no pretraining. scratch_long: the same with more steps. linear_probe: a 1x1 convolution on frozen
    features. other_probe: the same on the frozen network of `other`. fine_tune: train all weights.
    mean_teacher: fine_tune, plus consistency with an average of its own weights on the train
    split's unlabelled patients. weak_to_strong: fine_tune, plus pseudo-labels from such an average on strongly augmented, mixed images of
    these patients. scratch_weak_to_strong: the same from random weights. prototype_self_training: weak_to_strong with rounds of
    pseudo-labels first, made from class prototypes on frozen features. prototype: nearest class prototype by cosine similarity on
    frozen features, without training."""
    protocol: Literal["leak_free", "paper_compat"] = "leak_free"
    """leak_free: whole scans, split by patient. paper_compat: the released code of Pix2Rep, only for comparison with the paper; its rows
    say so. It crops every scan to its label's box + 10 px and drops empty slices, even at test. It validates on slices of the labelled
    patients."""
    contrasts: Contrasts | None = Field(default=None, exclude_if=is_none)
    """Contrasts that the models read, of those of the task. None: all. A backbone of several contrasts must have seen them; one of one
    contrast has its first layer repeated."""
    contrast_subsets: Annotated[tuple[Contrasts, ...], Field(min_length=1)] | None = Field(
        default=None, exclude_if=is_none
    )
    """Contrasts of the reported patients that each model is also scored with, the others withheld, as in `[[flair], [flair, t1]]`. None:
    only with all that a patient has."""
    num_labelled: Annotated[tuple[NumLabelled, ...], Field(min_length=1)] = (1, 5)
    """Numbers of labelled patients; all: the whole train split."""
    num_labelled_by_mode: dict[Mode, Annotated[tuple[NumLabelled, ...], Field(min_length=1)]] = {}
    """Modes that run for only some of these numbers, as in `{mean_teacher: [1, 2]}`."""
    draws: PositiveInt | dict[NumLabelled, PositiveInt] = 3
    """Number of draws of labelled patients: one number, or one per number of patients, as in `{1: 5, 10: 3, all: 3}`. Every mode gets the
    same draws."""
    stratify: bool = False
    """Draw the labelled patients in proportion to the strata named by the task, such as pathologies."""
    seed: int = 0
    """Seed for draws, weights and augmentation."""
    steps: PositiveInt = 300
    """Optimizer steps of every trial, equal for all modes except those in `steps_by_mode`."""
    steps_by_mode: dict[Mode, PositiveInt] = {}
    """Optimizer steps of particular modes, as in `{weak_to_strong: 4000}`. Default of scratch_long: three times `steps`. Every row states
    its steps."""
    batch_size: PositiveInt = 8
    """Images per step."""
    foreground_share: Fraction = Field(default=0.0, exclude_if=is_zero)
    """Fraction of these images drawn among labelled images with foreground; volumes and large planes are then cut about a pixel of it. The
    rest is drawn anywhere. It helps where structures are small or rare, such as tumours. A linear probe on stored features ignores it."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay of AdamW."""
    warmup_head_steps: NonNegativeInt = 0
    """Modes that train pretrained weights: first steps that train only the head; they count towards all steps."""
    backbone_learning_rate_factor: PositiveFloat = 1.0
    """Modes that train pretrained weights: learning rate of the backbone, as a multiple of the head's."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Modes that learn from unlabelled patients: decay of the teacher's weights per step; smaller in the first steps, while the average
    covers few of them."""
    ramp_up_fraction: Fraction = 0.3
    """The same modes: fraction of the steps in which the weight of the unlabelled loss rises."""
    consistency_weight: NonNegativeFloat = 1.0
    """The same modes: weight of the loss on unlabelled images, relative to the labelled loss. mean_teacher: the mean squared difference of
    the student's and teacher's probabilities. weak_to_strong: Dice + cross-entropy with the teacher's pseudo-labels."""
    confidence_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Modes with pseudo-labels (weak_to_strong, scratch_weak_to_strong, prototype_self_training): smallest teacher probability at which
    a pixel's pseudo-label counts."""
    cutmix_probability: Fraction = 0.5
    """The same modes: probability that a strong view exchanges a box (2 to 40 % of the image) with another image. The label or
    pseudo-label is exchanged with it."""
    cutmix_labelled_fraction: Fraction = 0.5
    """The same modes: fraction of these exchanges made with a labelled image; half paste its box into the unlabelled image, half the
    reverse. The others are between two unlabelled images."""
    feature_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same modes: fraction of the backbone's output channels dropped in a third view of unchanged appearance. 0: no third view."""
    strong_intensity: IntensityConfig | None = None
    """The same modes: appearance of the strong views. None: as in `views`."""
    prototypes_per_class: PositiveInt = 4
    """prototype and prototype_self_training: number of prototypes of each class but the background (k-means). 1: its mean. A class with
    fewer pixels has fewer prototypes. RESULTS.md ("Better prototypes") compares these settings."""
    background_prototypes: PositiveInt = 16
    """The same modes: number of background prototypes (k-means). With many more than `prototypes_per_class`, small classes vanish."""
    prototype_clusterings: PositiveInt = 4
    """The same modes: number of k-means clusterings whose similarity maps are averaged. One depends on its initial centres."""
    prototype_smoothing_pixels: Annotated[float, Field(ge=0, le=20)] = 2.0
    """The same modes: standard deviation of a Gaussian filter on the similarity map of each class, pixels of the image; 0 disables."""
    self_training_rounds: PositiveInt = 3
    """prototype_self_training: largest number of rounds. Each labels all unlabelled images at once, the first by prototypes, the others by
    the teacher. After the last round the teacher labels the images of each step, as in weak_to_strong."""
    self_training_fraction: Annotated[float, Field(gt=0, le=1)] = 0.15
    """prototype_self_training: fraction of the steps in each round."""
    self_training_min_change: Fraction = 0.05
    """prototype_self_training: rounds stop when a smaller fraction of foreground pixels changes its pseudo-label. No label is read for
    this rule."""
    agreement_views: PositiveInt = 3
    """prototype_self_training: number of views that must agree on a pixel's pseudo-label. 1: only the unchanged image."""
    plausible_size_factor: Annotated[float, Field(ge=1)] = 3.0
    """prototype_self_training: largest ratio of a class's size to its sizes in the labelled patients, both ways. A larger class does not
    count; a smaller one excludes its frame."""
    plausible_margin_mm: NonNegativeFloat = 40.0
    """prototype_self_training: distance beyond the labelled patients' organs, relative to the scan's centre, within which foreground
    counts, mm."""
    probe_augmentation: Literal["views", "none"] = "views"
    """linear_probe: training images. views: augmented, as in every other mode. none: unaugmented; their features are computed once for all
    probes of a task, which is much faster."""
    search: SearchConfig = SearchConfig()
    """Search for the learning rate and other settings."""
    compile: bool = False
    """Compile a trial's network (torch.compile) before its first step. Takes about a minute, which a thousand steps recover, also on CPUs.
    The result is cached in `$P2R_CACHE`. Results equal uncompiled ones up to rounding, which training amplifies."""
    score_on: Literal["test", "validation"] = "test"
    """Split whose results are reported. validation: while recipes are still compared, so that test patients stay unread."""
    curve_steps: PositiveInt | None = None
    """Optimizer steps between two validations during training; the row keeps their Dice as `curve`. Nothing is chosen by it. Finished
    trials are not run again for it. None: validate only the last weights."""
    views: ViewsConfig = ViewsConfig(geometry=GeometryConfig(rotation_deg=180.0))
    """Augmentation of labelled images, equal for all modes."""
    planes: Literal["whole", "centre"] = "whole"
    """Region that a model reads of a plane or volume. whole: all of it, in overlapping windows of the image size; training windows
    are drawn anywhere. centre: that size about its centre; the rest is background. Neither uses a label."""
    spacing_mm: Annotated[float, Field(ge=1e-3, lt=1e4)] | None = Field(default=None, exclude_if=is_none)
    """Pixel size of the trials' models, mm. None: the task's, or else the backbone's. Finer pixels suit a backbone whose pretraining
    views were enlarged (`views.geometry.scale` above 1)."""
    image_size: Annotated[int, Field(ge=1, le=2**14)] | None = Field(default=None, exclude_if=is_none)
    """Every side of the trials' images, pixels. None: the backbone's."""
    largest_component: bool = False
    """Keep only the largest connected component of each predicted class; assumes that every organ is in one piece."""
    nsd_tolerance_mm: PositiveFloat = 2.0
    """Tolerance of the normalised surface Dice, mm."""
    allow_transductive: bool = False
    """Continue although validation or test patients are in the backbone's corpus. Every row of the report is then labelled: such results
    do not hold for patients that the backbone has not seen."""
    publish_model: bool = True
    """Publish the model with the best validation Dice among `published_mode` as `models/<task>/<version>`. Publish a second, trained in the
    same mode on all labelled train patients, as `models/<task>/all`; its validation Dice is computed, its test Dice is not."""
    publish_draws: bool = False
    """Also publish the other draws of the best model's mode and number of labelled patients, for `p2r predict --ensemble`."""
    published_mode: Literal["fine_tuned", "any"] = "fine_tuned"
    """Candidates for the published model. fine_tuned: models that train the pretrained backbone's weights (fine_tune, mean_teacher,
    weak_to_strong, prototype_self_training); all models, if the job has none of these. any: also models from scratch and on frozen
    features."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, given in (("tasks", self.tasks), ("modes", self.modes)):
            if len(set(given)) < len(given):
                raise ValueError(f"{key} must differ, got {', '.join(given)}")
        self._check_imported()
        if self.views.shown_fraction is not None:
            raise ValueError(
                "views.shown_fraction is for pretraining only: a labelled image is shown whole; leave it out"
            )
        self._check_protocol()
        self._check_modes()
        self._check_draws()
        self._check_search()
        return self

    def _check_protocol(self) -> None:
        """Refuse modes with images of unlabelled patients where images are cropped by their labels."""
        unlabelled = [mode for mode in self.modes if MODES[mode].unlabelled != "none"]
        if self.protocol == "paper_compat" and unlabelled:
            mode = unlabelled[0]
            raise ValueError(
                f"protocol paper_compat crops by the label, and {mode} reads no label of unlabelled patients: "
                f"take {mode} out of modes"
            )

    def _check_modes(self) -> None:
        """Refuse settings of single modes that the job does not run."""
        for mode in self.steps_by_mode:
            if mode not in self._trained_modes:
                why = "is not in modes" if mode not in self.modes else "trains nothing"
                raise ValueError(f"steps_by_mode names {mode}, which {why}")
        for mode, numbers in self.num_labelled_by_mode.items():
            if mode not in self.modes:
                raise ValueError(f"num_labelled_by_mode names {mode}, which is not in modes")
            if others := [number for number in numbers if number not in self.num_labelled]:
                raise ValueError(
                    f"num_labelled_by_mode.{mode} has {', '.join(map(str, others))}, which is not in num_labelled "
                    f"{list(self.num_labelled)}"
                )

    def _check_draws(self) -> None:
        if isinstance(self.draws, dict):
            without = [number for number in self.num_labelled if number not in self.draws]
            if without:
                raise ValueError(f"draws gives no number of draws for {', '.join(map(str, without))} labelled patients")

    def _check_search(self) -> None:
        """Refuse a search that lacks a mode, treats modes unequally, or has candidates that break their setting's rule."""
        missing = [mode for mode in self._trained_modes if mode not in self.search.learning_rates]
        if missing:
            example = f"{missing[0]}: [{MODES[missing[0]].learning_rates[0]:g}]"
            raise ValueError(
                f"search.learning_rates has no candidates for {', '.join(missing)}: add them, as in {example}"
            )
        sizes = {mode: self._num_candidates(mode) for mode in self._trained_modes}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{mode} {size}" for mode, size in sizes.items())
            raise ValueError(
                f"search must hold equally many candidates for every mode, got {found}: "
                + (
                    "some modes have only lists, which are not drawn; give them a distribution, too"
                    if self.search.is_drawn
                    else "search.space has settings that only some modes have; give the others more learning_rates"
                )
            )
        for name, candidates in self.search.space.items():
            field = type(self).model_fields[name]
            rule: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, *field.metadata])  # type: ignore[arg-type]
            values = candidates.named()[1] if isinstance(candidates, Distribution) else candidates
            for value in values:
                try:
                    rule.validate_python(value)
                except ValidationError as error:
                    raise ValueError(f"search.space.{name}: {error.errors()[0]['msg']}, got {value}") from None

    @property
    def _trained_modes(self) -> list[Mode]:
        return [mode for mode in self.modes if "steps" in MODES[mode].settings]

    def _check_imported(self) -> None:
        is_file = self.backbone is not None and names_weights_file(self.backbone)
        if is_file and self.imported is None:
            raise ValueError(
                f"backbone {self.backbone} is a weights file, which states neither network nor image nor licence: give them as imported: "
                "{model: ..., image: ..., licence: ...}"
            )
        if self.imported is not None and not is_file:
            raise ValueError("imported describes a weights file, and backbone names none: leave imported out")
        if (self.other is None) == any(MODES[mode].weights == "other" for mode in self.modes):
            raise ValueError("other and the mode other_probe need each other: give both, or neither")

    def steps_of(self, mode: Mode) -> int:
        """Return the optimizer steps of a mode's trials, unless the search chooses them."""
        longer = 3 if mode == "scratch_long" else 1
        return self.steps_by_mode.get(mode, longer * self.steps)

    def strong_intensity_of(self, mode: Mode) -> IntensityConfig:
        """Return the appearance of the views of unlabelled images that a mode's student learns from."""
        own = self.strong_intensity if MODES[mode].unlabelled == "pseudo_labels" else None
        return own or self.views.intensity

    def _num_candidates(self, mode: Mode) -> int:
        space = [
            self.search.learning_rates[mode],
            *(self.search.space.get(name, (0,)) for name in MODES[mode].settings),
        ]
        lists = [candidates for candidates in space if not isinstance(candidates, Distribution)]
        is_proposed = self.search.searcher != "grid" or len(lists) < len(space)
        return self.search.num_samples if is_proposed else math.prod(map(len, lists))
