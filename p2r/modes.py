"""The modes of fine-tuning, one entry each: the only place that lists their names, titles, looks and kinds.

A new mode is an entry here, a rate in `SearchConfig.learning_rates` unless nothing of it is trained, and its code in
`p2r.fewshot`. The order is that of tables and keys.
"""

from dataclasses import dataclass
from typing import Literal

Mode = Literal[
    "scratch",
    "scratch_long",
    "scratch_weak_to_strong",
    "linear_probe",
    "fine_tune",
    "mean_teacher",
    "weak_to_strong",
    "prototype",
]
Setting = Literal[
    "weight_decay",
    "steps",
    "warmup_head_steps",
    "backbone_learning_rate_factor",
    "ema_decay",
    "ramp_up_fraction",
    "consistency_weight",
    "confidence_threshold",
    "cutmix_probability",
    "cutmix_labelled_fraction",
    "feature_dropout",
    "background_prototypes",
]

SCRATCH: Mode = "scratch"
"""The mode that others are measured against."""

_OF_TRAINING: tuple[Setting, ...] = ("weight_decay", "steps")
_OF_A_BACKBONE: tuple[Setting, ...] = (*_OF_TRAINING, "warmup_head_steps", "backbone_learning_rate_factor")
_OF_A_TEACHER: tuple[Setting, ...] = ("ema_decay", "ramp_up_fraction", "consistency_weight")
_OF_PSEUDO_LABELS: tuple[Setting, ...] = (
    *_OF_A_TEACHER,
    "confidence_threshold",
    "cutmix_probability",
    "cutmix_labelled_fraction",
    "feature_dropout",
)


@dataclass(frozen=True)
class ModeFacts:
    """Properties of one mode."""

    title: str
    """Its name for people."""
    colour: str
    """On white. A mode is told by its colour, its marker and, where there is room, its title."""
    dark_colour: str
    """On a dark page."""
    marker: str
    """Of matplotlib."""
    settings: tuple[Setting, ...]
    """The settings of a fine-tuning section that it reads, beside a learning rate (which prototype has not)."""
    weights: Literal["random", "frozen", "pretrained"] = "random"
    """Initial weights of its backbone; frozen: pretrained, and not trained further."""
    unlabelled: Literal["none", "consistency", "pseudo_labels"] = "none"
    """What it learns from the images of the train patients who were not drawn; their label files are not opened."""
    control: Mode | None = None
    """The same training from random weights, at equal settings: the difference is what pretraining adds."""

    @property
    def is_from_scratch(self) -> bool:
        """Whether it takes nothing of the backbone but its architecture and its way to prepare a scan."""
        return self.weights == "random"


MODES: dict[Mode, ModeFacts] = {
    "scratch": ModeFacts("from scratch", "#6b6b6b", "#a9adb3", "o", _OF_TRAINING),
    "scratch_long": ModeFacts("scratch, long", "#3f4a5a", "#c9d1dc", "h", _OF_TRAINING),
    "scratch_weak_to_strong": ModeFacts(
        "W2S, scratch",
        "#7d5a3c",
        "#cfa985",
        "X",
        (*_OF_TRAINING, *_OF_PSEUDO_LABELS),
        unlabelled="pseudo_labels",
    ),
    "linear_probe": ModeFacts("linear probe", "#d98200", "#f0a43f", "s", _OF_TRAINING, weights="frozen"),
    "fine_tune": ModeFacts(
        "fine-tuned", "#0072b2", "#5ab1e6", "D", _OF_A_BACKBONE, weights="pretrained", control="scratch"
    ),
    "mean_teacher": ModeFacts(
        "Mean Teacher",
        "#00835f",
        "#3cc79c",
        "^",
        (*_OF_A_BACKBONE, *_OF_A_TEACHER),
        weights="pretrained",
        unlabelled="consistency",
    ),
    "weak_to_strong": ModeFacts(
        "weak to strong",
        "#b3261e",
        "#ff8f84",
        "*",
        (*_OF_A_BACKBONE, *_OF_PSEUDO_LABELS),
        weights="pretrained",
        unlabelled="pseudo_labels",
        control="scratch_weak_to_strong",
    ),
    "prototype": ModeFacts("prototypes", "#a8488a", "#dd92c4", "v", ("background_prototypes",), weights="frozen"),
}

SETTINGS_OF: dict[Mode, tuple[Setting, ...]] = {mode: facts.settings for mode, facts in MODES.items()}


def facts_of(mode: str) -> ModeFacts | None:
    """Return the properties of a mode; None for a name that this version does not know, as an old report may hold."""
    return MODES.get(mode)  # type: ignore[call-overload, no-any-return]
