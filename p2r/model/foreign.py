"""Weights of other tools -> weights of a p2r network, with a reason for every tensor that is not taken.

    their names -> without a common prefix -> our names -> shapes compared -> `Transfer`, or a refusal

The encoder must match completely. The decoder matches completely, or is new; layers whose size is the number of classes are always
new. A checkpoint with any other difference is refused: half of a network's weights is not a start.

Sources: MONAI's BasicUNet, UNet, DynUNet and SwinUNETR; `PlainConvUNet` and `ResidualEncoderUNet` of nnU-Net and nnssl (OpenMind).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from p2r.config import ModelConfig
from p2r.errors import CheckpointError
from p2r.model.anatomix import MARKER as ANATOMIX
from p2r.tensors import Shape, shapes_of
from p2r.weights_file import as_float32

Part = Literal["encoder", "decoder", "head"]
Names = Callable[[str, int], str]
"""(our name without `unet.`, depth of the network) -> their name."""

_NUM_NAMED = 6
_NORM = re.compile(r"(?:^|\.)(?:norm\d*|adn\.N)\.(?:weight|bias)$")
_NOT_WEIGHTS = re.compile(r"(?:relative_position_index|num_batches_tracked)$")
_HEADS = re.compile(
    r"^(?:final_conv|output_block|deep_supervision_heads|out|seg_layers|decoder\.seg_layers|seg_outputs)\.|\.super_head\."
)
_COPIES = (
    (re.compile(r"^skip_layers\."), "a second name of the same blocks in DynUNet"),
    (re.compile(r"^decoder\.encoder\."), "the decoder's reference to the encoder"),
    (re.compile(r"\.all_modules\.\d+\."), "a second name of the same layers in nnU-Net"),
)


@dataclass(frozen=True)
class Source:
    """A network of another tool whose weights fit one of ours."""

    title: str
    """Name of the network, for messages and reports."""
    marker: re.Pattern[str]
    """Pattern of a name that only this network's checkpoints have."""
    names: Mapping[str, Names]
    """Our network -> renaming."""
    is_instance_normalised: bool = False
    """True if the network always has instance normalisation."""


class Row(NamedTuple):
    """A line of the table of a transfer."""

    outcome: Literal["matched", "new", "left out"]
    part: str
    num_tensors: int
    num_values: int
    reason: str


@dataclass(frozen=True)
class Transfer:
    """Weights for our network from another tool's checkpoint."""

    source: str
    """Name of the other network."""
    prefix: str
    """Prefix removed from their names."""
    weights: dict[str, Tensor]
    """Matched tensors under our names, as stored in the checkpoint."""
    rows: tuple[Row, ...]

    def table(self) -> str:
        """Return the table as text."""
        head = ("outcome", "part", "tensors", "values", "reason")
        cells = [
            head,
            *((row.outcome, row.part, f"{row.num_tensors:,}", f"{row.num_values:,}", row.reason) for row in self.rows),
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)).rstrip()
            for line in cells
        )

    def facts(self) -> dict[str, object]:
        """Return the transfer as JSON, for a checkpoint's record and the report."""
        return {"source": self.source, "prefix": self.prefix, "table": [row._asdict() for row in self.rows]}


def transfer(
    tensors: Mapping[str, Tensor], build: Callable[[ModelConfig], nn.Module], config: ModelConfig, *, where: str
) -> Transfer:
    """Map another tool's weights to one of our networks.

    Args:
        tensors: Tensors of the checkpoint, by their names.
        build: Builds a backbone of a model section; its weights are not read, and may be unallocated.
        config: Model section of the job.
        where: Name of the checkpoint, for messages.

    Raises:
        CheckpointError: The network is of an unknown kind, or does not fit; the message gives the rule and the way out.
    """
    _refuse_anatomix(tensors, where)
    _refuse_batch_norm(tensors, where)
    source = _recognise(tensors, config, where)
    where = f"{where} ({source.title})"
    if source.is_instance_normalised and config.normalisation != "instance":
        raise CheckpointError(f"{where} has instance normalisation: set model.normalisation to instance")
    wanted = build(config).state_dict()
    whole = wanted if config.level == 0 else build(config.model_copy(update={"level": 0})).state_dict()
    ours = _names_of(wanted, source, config)
    theirs, prefix, beside = _strip_prefix(tensors, ours.values())
    _check_stem(theirs, ours, wanted, config, where=where)
    _check_copies(theirs, where)
    matched, new = _match(theirs, ours, wanted, config, where=where)
    taken = {ours[name] for name in matched}
    finer = set(_names_of(whole, source, config).values()) - set(ours.values())
    rows = [
        *_rows_of_matched(matched, wanted, config),
        *_rows_of_new(new, wanted, config),
        *_rows_left_out(theirs, taken, finer, where=where, has_decoder=_has_decoder(matched, config)),
        *(
            [Row("left out", "theirs", len(beside), _num_values(beside.values()), "beside the network")]
            if beside
            else []
        ),
    ]
    weights = {name: as_float32(theirs[ours[name]], name=ours[name], where=where) for name in matched}
    return Transfer(source.title, prefix, weights, tuple(rows))


def _names_of(state: Mapping[str, Tensor], source: Source, config: ModelConfig) -> dict[str, str]:
    rename = source.names[config.name]
    return {name: rename(name.removeprefix("unet."), config.depth) for name in state if name.startswith("unet.")}


def _refuse_anatomix(tensors: Mapping[str, Tensor], where: str) -> None:
    if any(ANATOMIX.search(name) for name in tensors):
        raise CheckpointError(
            f"{where} is anatomix's U-Net, which no network of p2r can continue (reflected borders, its own normalisation): use it frozen, "
            'as finetune.other with build: "p2r.model.anatomix:anatomix" and options: {weights: FILE}'
        )


def _refuse_batch_norm(tensors: Mapping[str, Tensor], where: str) -> None:
    if any(name.endswith("running_mean") for name in tensors):
        raise CheckpointError(
            f"{where} has batch normalisation, which makes features depend on the other images of a batch: p2r's networks have instance or "
            "group normalisation. Use it frozen, as finetune.other"
        )


def _recognise(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> Source:
    for source in SOURCES:
        if any(source.marker.search(name) for name in tensors):
            if config.name not in source.names:
                raise CheckpointError(
                    f"{where} is {source.title}, and model.name is {config.name}: set it to {' or '.join(source.names)}"
                )
            return source
    shown = ", ".join(list(tensors)[:3])
    raise CheckpointError(
        f"{where} is of no known network, or lacks its first layer; known are {', '.join(source.title for source in SOURCES)}. Its "
        f"first names are {shown:.300}. Use it frozen, as finetune.other"
    )


def _strip_prefix(tensors: Mapping[str, Tensor], wanted: Any) -> tuple[dict[str, Tensor], str, dict[str, Tensor]]:
    """Return the tensors below the prefix under which most wanted names are found, that prefix, and the other tensors."""
    names = set(wanted)
    prefixes = {""} | {name[: -len(one)] for name in tensors for one in _endings(name) if one in names}
    best = max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in tensors for name in names))
    below = {name.removeprefix(best): value for name, value in tensors.items() if name.startswith(best)}
    return below, best, {name: value for name, value in tensors.items() if not name.startswith(best)}


def _endings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(min(4, len(parts))))


def _check_stem(
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    where: str,
) -> None:
    """Refuse another dimension or number of contrasts by its name, before shapes are compared."""
    first = next(name for name in ours if wanted[name].ndim >= 4)
    dimensions, stem = wanted[first].ndim - 2, theirs.get(ours[first])
    if stem is None:
        return
    if stem.ndim != 2 + dimensions:
        raise CheckpointError(
            f"{where} reads images with {stem.ndim - 2} dimensions, and image.dimensions is {dimensions}: set it to {stem.ndim - 2}, "
            f"or use a checkpoint of a {dimensions}D network"
        )
    if stem.shape[1] != config.in_channels:
        raise CheckpointError(
            f"{where} reads images with {stem.shape[1]} channels (its stem is {_text(stem.shape)}), and this network has "
            f"{config.in_channels}: use a checkpoint with the same number of contrasts"
        )
    if stem.shape != wanted[first].shape:
        raise CheckpointError(
            f"{where}: its stem is {_text(stem.shape)}, this network's is {_text(wanted[first].shape)}: set model.channels to the "
            f"checkpoint's, which begin with {stem.shape[0]}; kernels other than 3 are not supported"
        )


def _part(name: str, config: ModelConfig) -> Part:
    """Return the part of our network that a weight belongs to."""
    name = name.removeprefix("unet.")
    if name.startswith("projection.") or (config.name == "unet" and name.startswith("up.0.") and config.level == 0):
        return "head"
    decoder: tuple[str, ...] = ("upcat_", "up.", "upsamples.", "decoder")
    if config.name == "swin_unetr":  # its encoder is the transformer; these blocks serve the skips
        decoder += ("encoder1.", "encoder2.", "encoder3.", "encoder4.", "encoder10.")
    return "decoder" if name.startswith(decoder) else "encoder"


def _match(
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    where: str,
) -> tuple[list[str], dict[str, str]]:
    """Return our weights that are in the checkpoint, and the others with a reason."""
    found = shapes_of(theirs)
    fits = {name: found.get(their) == tuple(wanted[name].shape) for name, their in ours.items()}
    is_identity = _find_absent_norms(ours, fits, found)
    expected: dict[Part, list[str]] = {"encoder": [], "decoder": [], "head": []}
    for name in ours:
        if name not in is_identity:
            expected[_part(name, config)].append(name)
    encoder, decoder = ([name for name in expected[part] if not fits[name]] for part in ("encoder", "decoder"))
    if encoder or 0 < len(decoder) < len(expected["decoder"]):
        part = "encoder" if encoder else "decoder"
        rule = "complete" if encoder else "complete, or absent"
        raise CheckpointError(_explain(encoder or decoder, part, rule, found, ours, wanted, where))
    new = dict.fromkeys(is_identity, "theirs has a normalisation without scale and shift: 1 and 0")
    new |= dict.fromkeys(decoder, "the checkpoint has no such decoder")
    own = [name for name in wanted if _part(name, config) == "head" and name not in is_identity]
    if not all(fits.get(name, False) for name in own):
        new |= dict.fromkeys(own, "layers to this network's own number of channels")
    return [name for name in ours if name not in new], new


def _find_absent_norms(ours: Mapping[str, str], fits: Mapping[str, bool], found: Mapping[str, Shape]) -> set[str]:
    """Return our scales and shifts of normalisations that the checkpoint lacks, if it has none of them at all."""
    norms = {
        name for name in ours if _NORM.search(name) and "swinViT." not in name
    }  # those of tokens always have a scale
    return set() if any(fits[name] for name in norms) else {name for name in norms if ours[name] not in found}


def _explain(
    missing: list[str],
    part: str,
    rule: str,
    found: Mapping[str, Shape],
    ours: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    where: str,
) -> str:
    lines = [
        f"  {ours[name]:.100}: {_text(found.get(ours[name]))} there, {_text(wanted[name].shape)} here"
        for name in missing[:_NUM_NAMED]
    ]
    lines += [f"  and {len(missing) - _NUM_NAMED} more"] if len(missing) > _NUM_NAMED else []
    return (
        f"{where}: {len(missing)} of {len(ours)} weights do not fit, and the {part} must be {rule}:\n"
        + "\n".join(lines)
        + "\nSet the model section (name, channels, blocks, feature_channels) to the checkpoint's network, or leave the checkpoint out"
    )


def _check_copies(theirs: Mapping[str, Tensor], where: str) -> None:
    """Refuse a checkpoint in which a layer that nnU-Net registers under several names has different values."""
    for name, value in theirs.items():
        original = re.sub(r"\.all_modules\.0\.", ".conv.", re.sub(r"^decoder\.encoder\.", "encoder.", name))
        original = re.sub(r"\.all_modules\.1\.", ".norm.", original)
        if original != name and original in theirs and not torch.equal(value, theirs[original]):
            raise CheckpointError(
                f"{where}: {name:.120} and {original:.120} are one layer, and have different values: the file is damaged"
            )


def _has_decoder(matched: list[str], config: ModelConfig) -> bool:
    return any(_part(name, config) == "decoder" for name in matched)


def _rows_of_matched(matched: list[str], wanted: Mapping[str, Tensor], config: ModelConfig) -> Iterator[Row]:
    for part in ("encoder", "decoder", "head"):
        names = [name for name in matched if _part(name, config) == part]
        if names:
            yield Row("matched", part, len(names), _num_values(wanted[name] for name in names), "equal name and shape")


def _rows_of_new(new: Mapping[str, str], wanted: Mapping[str, Tensor], config: ModelConfig) -> Iterator[Row]:
    groups = Counter((_part(name, config), reason) for name, reason in new.items())
    for (part, reason), count in groups.items():
        names = [name for name, one in new.items() if (_part(name, config), one) == (part, reason)]
        yield Row("new", part, count, _num_values(wanted[name] for name in names), reason)


def _rows_left_out(
    theirs: Mapping[str, Tensor], taken: set[str], finer: set[str], *, where: str, has_decoder: bool
) -> Iterator[Row]:
    """Explain every tensor of the checkpoint that is not taken.

    Raises:
        CheckpointError: A tensor has no known reason: the network has layers that ours lacks.
    """
    reasons: dict[str, list[str]] = {}
    unexplained = []
    for name in theirs:
        if name in taken:
            continue
        reason = _reason(name, taken, finer, has_decoder=has_decoder)
        if reason is None:
            unexplained.append(name)
        else:
            reasons.setdefault(reason, []).append(name)
    if unexplained:
        lines = "\n".join(f"  {name:.100}: {_text(theirs[name].shape)}" for name in unexplained[:_NUM_NAMED])
        raise CheckpointError(
            f"{where} has {len(unexplained)} weights for which this network has no place:\n{lines}\nSet the model section (name, channels, "
            "blocks) to the checkpoint's network, or leave the checkpoint out"
        )
    for reason, names in reasons.items():
        yield Row("left out", "theirs", len(names), _num_values(theirs[name] for name in names), reason)


def _reason(name: str, taken: set[str], finer: set[str], *, has_decoder: bool) -> str | None:
    """Return the reason to leave a tensor of the checkpoint out; None: there is none."""
    if name in finer or f"{name.removesuffix('bias')}weight" in finer:
        return "decoder level finer than model.level"
    if _NOT_WEIGHTS.search(name):
        return "follows from the architecture, or counts batches"
    if _HEADS.search(name) or re.match(r"model\.2\.", name):
        return "segmentation layers of another task"
    for pattern, reason in _COPIES:
        if pattern.search(name):
            return reason
    sibling = f"{name.removesuffix('bias')}weight"
    if name.endswith(".bias") and sibling in taken:
        if ".residual." in name or "transpconvs." in name:
            return "bias that the next block's normalisation removes, except at the image's border"
        return "bias that the following normalisation removes"
    if not has_decoder and re.match(r"(?:decoder|up|upcat_\d|upsamples|encoder\d+)\.|model\.", name):
        return "decoder of another shape"
    return None


def _num_values(tensors: Any) -> int:
    return sum(value.numel() for value in tensors)


def _text(shape: Any) -> str:
    return "none" if shape is None else " x ".join(map(str, shape)) or "a number"


def _nnunet_plain(name: str, depth: int) -> str:
    """Rename a weight of our DynUNet to that of nnU-Net's PlainConvUNet."""
    name = re.sub(r"\.conv(\d)\.conv\.", lambda found: f".convs.{int(found[1]) - 1}.conv.", name)
    name = re.sub(r"\.norm(\d)\.", lambda found: f".convs.{int(found[1]) - 1}.norm.", name)
    name = re.sub(r"^input_block\.", "encoder.stages.0.0.", name)
    name = re.sub(r"^bottleneck\.", f"encoder.stages.{depth}.0.", name)
    name = re.sub(r"^downsamples\.(\d+)\.", lambda found: f"encoder.stages.{int(found[1]) + 1}.0.", name)
    name = re.sub(r"^upsamples\.(\d+)\.transp_conv\.conv\.", r"decoder.transpconvs.\1.", name)
    return re.sub(r"^upsamples\.(\d+)\.conv_block\.", r"decoder.stages.\1.", name)


def _monai_unet(name: str, depth: int) -> str:
    """Rename a weight of our UNet, a list of levels, to that of MONAI's, whose levels are nested."""
    part, _, rest = name.partition(".")
    if part == "bottom":
        return f"model.{'1.submodule.' * depth}{rest}"
    level, _, rest = rest.partition(".")
    return f"model.{'1.submodule.' * int(level)}{0 if part == 'down' else 2}.{rest}"


def _same(name: str, depth: int) -> str:
    return name


def _source(title: str, marker: str, names: Mapping[str, Names], *, is_instance_normalised: bool = False) -> Source:
    return Source(title, re.compile(rf"(?:^|\.){marker}"), names, is_instance_normalised)


SOURCES = (
    _source(
        "nnU-Net's ResidualEncoderUNet",
        r"encoder\.stem\.convs\.0\.conv\.weight$",
        {"residual_encoder_unet": _same},
        is_instance_normalised=True,
    ),
    _source(
        "nnU-Net's PlainConvUNet",
        r"encoder\.stages\.0\.0\.convs\.0\.conv\.weight$",
        {"dynunet": _nnunet_plain},
        is_instance_normalised=True,
    ),
    _source("MONAI's BasicUNet", r"conv_0\.conv_0\.conv\.weight$", {"basic_unet": _same}),
    _source("MONAI's DynUNet with residual blocks", r"input_block\.conv3\.", {"residual_dynunet": _same}),
    _source("MONAI's DynUNet", r"input_block\.conv1\.conv\.weight$", {"dynunet": _same}),
    _source("MONAI's SwinUNETR", r"swinViT\.patch_embed\.proj\.weight$", {"swin_unetr": _same}),
    _source("MONAI's UNet", r"model\.0\.conv\.unit0\.conv\.weight$", {"unet": _monai_unet}),
)
"""Networks of other tools, the most specific first."""


def names_in(tool: Literal["MONAI", "nnU-Net"], config: ModelConfig) -> Names | None:
    """Return the renaming of our weights to those of a tool's network; None if the tool has no such network."""
    found = (source.names.get(config.name) for source in SOURCES if source.title.startswith(tool))
    return next((names for names in found if names is not None), None)
