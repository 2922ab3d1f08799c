"""Table of the fine-tuning modes: the only place that lists their names, titles, colours and settings.

A new mode is an entry here. The entry states the trained part, its initial weights, and the unlabelled images. `p2r.fewshot` reads
these fields, so a mode that combines known parts needs no other change. Tables and legends use the order of the entries.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

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
    "prototypes_per_class",
    "background_prototypes",
    "prototype_clusterings",
    "prototype_smoothing_pixels",
    "self_training_rounds",
    "self_training_fraction",
    "self_training_min_change",
    "agreement_views",
    "plausible_size_factor",
    "plausible_margin_mm",
]

SCRATCH = "scratch"
"""Reference mode: the others are compared with it."""

_TRAINING_SETTINGS: tuple[Setting, ...] = ("weight_decay", "steps")
_BACKBONE_SETTINGS: tuple[Setting, ...] = (*_TRAINING_SETTINGS, "warmup_head_steps", "backbone_learning_rate_factor")
_TEACHER_SETTINGS: tuple[Setting, ...] = ("ema_decay", "ramp_up_fraction", "consistency_weight")
_PSEUDO_LABEL_SETTINGS: tuple[Setting, ...] = (
    *_TEACHER_SETTINGS,
    "confidence_threshold",
    "cutmix_probability",
    "cutmix_labelled_fraction",
    "feature_dropout",
)
_PROTOTYPE_SETTINGS: tuple[Setting, ...] = (
    "prototypes_per_class",
    "background_prototypes",
    "prototype_clusterings",
    "prototype_smoothing_pixels",
)
_ROUND_SETTINGS: tuple[Setting, ...] = (
    *_PROTOTYPE_SETTINGS,
    "self_training_rounds",
    "self_training_fraction",
    "self_training_min_change",
    "agreement_views",
    "plausible_size_factor",
    "plausible_margin_mm",
)


@dataclass(frozen=True)
class ModeFacts:
    """Properties of one mode."""

    title: str
    """Display name."""
    colour: str
    """Colour on white. Charts distinguish modes by colour, marker and, where there is room, title."""
    dark_colour: str
    """Colour on a dark page."""
    marker: str
    """Marker of matplotlib."""
    settings: tuple[Setting, ...]
    """Settings of the fine-tuning section that the mode uses, besides a learning rate (which prototype does not have)."""
    weights: Literal["random", "frozen", "pretrained", "other"] = "random"
    """Initial weights of the backbone. frozen: pretrained, and not trained further. other: another tool's frozen network takes the
    backbone's place (`finetune.other`)."""
    unlabelled: Literal["none", "consistency", "pseudo_labels"] = "none"
    """Training signal from images of the train patients who were not drawn; their label files are not opened."""
    trains: Literal["network", "head", "nothing"] = "network"
    """Part that is trained. head: a linear head; its features are computed once if they are not augmented. nothing: class prototypes."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Default candidates of the search for the peak learning rate; not used where nothing is trained."""
    has_rounds: bool = False
    """True if class prototypes give the first pseudo-labels, followed by rounds of self-training (`p2r.fewshot.rounds`)."""
    training: str = ""
    """Description of the training for the report's page, without a full stop."""
    control: str | None = None
    """The same training from random weights at equal settings; the difference is the effect of pretraining."""

    @property
    def is_from_scratch(self) -> bool:
        """True if the mode uses only the backbone's architecture and preprocessing, not its weights."""
        return self.weights == "random"


MODES: dict[str, ModeFacts] = {
    "scratch": ModeFacts(
        "from scratch", "#6b6b6b", "#a9adb3", "o", _TRAINING_SETTINGS, training="all weights, from random ones"
    ),
    "scratch_long": ModeFacts(
        "scratch, long", "#3f4a5a", "#c9d1dc", "h", _TRAINING_SETTINGS, training="from scratch with more steps"
    ),
    "scratch_weak_to_strong": ModeFacts(
        "W2S, scratch",
        "#7d5a3c",
        "#cfa985",
        "X",
        (*_TRAINING_SETTINGS, *_PSEUDO_LABEL_SETTINGS),
        unlabelled="pseudo_labels",
        training="weak to strong, from random weights",
    ),
    "linear_probe": ModeFacts(
        "linear probe",
        "#d98200",
        "#f0a43f",
        "s",
        _TRAINING_SETTINGS,
        weights="frozen",
        trains="head",
        learning_rates=(3e-3, 1e-2),
        training="a linear layer on the backbone's frozen features",
    ),
    "other_probe": ModeFacts(
        "other, probe",
        "#7a7a00",
        "#cdc94f",
        "P",
        _TRAINING_SETTINGS,
        weights="other",
        trains="head",
        learning_rates=(3e-3, 1e-2),
        training="a linear layer on another tool's frozen features",
    ),
    "fine_tune": ModeFacts(
        "fine-tuned",
        "#0072b2",
        "#5ab1e6",
        "D",
        _BACKBONE_SETTINGS,
        weights="pretrained",
        control="scratch",
        training="all weights, from the backbone's",
    ),
    "mean_teacher": ModeFacts(
        "Mean Teacher",
        "#00835f",
        "#3cc79c",
        "^",
        (*_BACKBONE_SETTINGS, *_TEACHER_SETTINGS),
        weights="pretrained",
        unlabelled="consistency",
        training="fine-tuned, and consistent with an average of its own weights on images without labels",
    ),
    "weak_to_strong": ModeFacts(
        "weak to strong",
        "#b3261e",
        "#ff8f84",
        "*",
        (*_BACKBONE_SETTINGS, *_PSEUDO_LABEL_SETTINGS),
        weights="pretrained",
        unlabelled="pseudo_labels",
        control="scratch_weak_to_strong",
        training="fine-tuned, and trained with confident pseudo-labels of an average of its own weights on augmented images without labels",
    ),
    "prototype_self_training": ModeFacts(
        "self-training",
        "#6a4fb3",
        "#b39cf0",
        "p",
        (*_BACKBONE_SETTINGS, *_PSEUDO_LABEL_SETTINGS, *_ROUND_SETTINGS),
        weights="pretrained",
        unlabelled="pseudo_labels",
        has_rounds=True,
        control="scratch_weak_to_strong",
        training="weak to strong, after rounds of pseudo-labels that start from class prototypes on frozen features",
    ),
    "prototype": ModeFacts(
        "prototypes",
        "#a8488a",
        "#dd92c4",
        "v",
        _PROTOTYPE_SETTINGS,
        weights="frozen",
        trains="nothing",
        training="the nearest class prototype on the backbone's frozen features",
    ),
}


def _known(mode: str) -> str:
    if mode not in MODES:
        *others, last = map(repr, MODES)
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": f"{', '.join(others)} or {last}"}
        )
    return mode


class _ModeNames:
    """Schema of `Mode`: a name in `MODES`."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(MODES), "type": "string"}


Mode = Annotated[str, AfterValidator(_known), _ModeNames]
"""Name of a mode in `MODES`."""


def facts_of(mode: str) -> ModeFacts | None:
    """Return the properties of a mode; None for a name that this version does not know, as an old report may hold."""
    return MODES.get(mode)
