"""A user's folder -> its scans, subjects, contrasts, label maps, and the pairs of scans and label maps.

    nnU-Net     imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json
    msd         imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz, dataset.json
    bids        sub-X/anat/sub-X_T1w.nii.gz, derivatives/NAME/.../sub-X_..._dseg.nii.gz, dataset_description.json
    folder      anything else: one folder for scans and one for label maps, both in one folder, or a folder per patient

Only names are used; voxels are read elsewhere. A guess that does not fit every file is shown before it is used.
"""

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Literal

from p2r.config import IngestConfig
from p2r.contrasts import LONGEST_NAME, MOST_CONTRASTS
from p2r.data import bids
from p2r.data.dataset_json import NAME as DATASET_JSON
from p2r.data.dataset_json import DatasetJson
from p2r.data.folders import images_below
from p2r.data.growth import subject_of
from p2r.data.label_maps import LABEL_SUFFIX
from p2r.data.names import composed, local_path, lower_suffix, scan_key
from p2r.data.pairs import key_of, label_finder
from p2r.data.scans import Scan, dataset_in, matches, search_scans
from p2r.data.sessions import contrast_words
from p2r.errors import DataError

Form = Literal["nnunet", "msd", "bids", "folder"]
NAMES: dict[Form, str] = {
    "nnunet": "nnU-Net folder",
    "msd": "Medical Segmentation Decathlon folder",
    "bids": "BIDS data set",
    "folder": "folder",
}

_DEFAULT_PATTERN = str(IngestConfig.model_fields["subject_pattern"].default)
_EVERY_FILE = r"^(.+?)\.nii"
_NUMBERED = r"^((?:[A-Za-z]+[-_])*[A-Za-z]*\d+)"
_FIRST_FOLDER = r"^([^/]+)/"
_OWN_FOLDER = r"([^/]+)/[^/]*$"
_CONTRAST_WORD = re.compile(r"(t1|t2|pd|flair|dwi|adc|swi|tof|lge|cine)[a-z]{0,4}", re.IGNORECASE)
_MAX_VOTERS, _MAX_RULES, _MAX_WORDS = 50, 24, 4


@dataclass(frozen=True)
class Pairing:
    """A rule that pairs scans with label maps, in the form of a task."""

    images: Path
    labels: Path
    image_name: str
    label_name: str
    pairs: tuple[tuple[Path, Path], ...]
    """Scan and label map of each case."""
    num_unlabelled: int
    """Number of scans that match the rule but have no label map."""
    others: tuple[str, ...] = ()
    """Other `image_name`s with as many pairs: further contrasts."""
    contrasts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """`image_name` and words of each contrast of a case, by name; empty if cases have one contrast."""


@dataclass(frozen=True)
class Survey:
    """Facts about a folder, derived from its file names."""

    root: str
    """Folder, or URL of a prefix in a bucket."""
    form: Form
    dataset: DatasetJson | None
    scans: tuple[Scan, ...]
    """Scans, without label maps."""
    label_maps: tuple[Scan, ...]
    """Label maps below the root, which a corpus leaves out by their names."""
    subject_pattern: str
    subjects: Mapping[str, tuple[Scan, ...]]
    """Scans by subject; scans without a subject have the empty name."""
    contrasts: Mapping[str, int]
    """Number of scans by contrast."""
    pairing: Pairing | None
    """Best pairing; None without label maps, or if none of them pairs with a scan."""
    passed_over: tuple[Scan, ...] = ()
    """Folders of a BIDS data set whose files are not read."""
    test: tuple[Scan, ...] = ()
    """Test images: scans listed as such in a `dataset.json`, and those in imagesTs."""
    test_patterns: tuple[str, ...] = ()
    """Patterns for `ingest.exclude` that match the test images."""
    title: str = ""
    """Name or description, as the data set states it."""
    licence: str = ""
    """Licence, as the data set states it."""
    reference: str = ""
    """Citation that the data set requests."""
    label_names: Mapping[int, str] = field(default_factory=dict)
    """Names of label values, as the data set states them."""

    @cached_property
    def fourth_axis(self) -> Mapping[str, str]:
        """Contrasts along the fourth axis of the images: a name, and the channel in `dataset.json`; empty if the axis is time."""
        if self.dataset is None or self.scans[0].num_channels == 1 or len(self.dataset.channels) > MOST_CONTRASTS:
            return {}
        found: dict[str, str] = {}
        for number, channel in enumerate(self.dataset.channels):
            name = re.sub(r"[^a-z0-9]+", "_", channel.lower()).strip("_")[:LONGEST_NAME]
            if not name or name in found:
                name = f"channel_{number}"
            while name in found:
                name += "_"
            found[name] = channel
        return found

    @cached_property
    def dataset_above(self) -> Path | None:
        """The `dataset.json` beside a folder of images, such as imagesTr, which was surveyed alone; None if there is none."""
        local = local_path(self.root)
        if self.dataset is not None or local is None or not local.name.lower().startswith("images"):
            return None
        above = local.parent / DATASET_JSON
        return above if above.is_file() else None


def survey(
    root: str | Path, *, labels: Path | None = None, form: Form | None = None, contrast: str | None = None, cache: Path
) -> Survey:
    """Survey a folder by its file names.

    Args:
        root: The folder, or the `s3://` URL of a prefix. In a bucket label maps are not paired, because tasks read folders.
        labels: Folder of the label maps, if known; None: search below `root`.
        form: Layout; None: guess it.
        contrast: Part of the name of the labelled scans, to choose among several contrasts.
        cache: Folder for generated data, as for `find_scans`.

    Raises:
        DataError: as `find_scans`; also if the folder does not have the requested layout.
    """
    local = local_path(root)
    folder = _without_dots(local) if local is not None else None
    where = str(root).rstrip("/") if folder is None else str(folder)
    everything = search_scans([where], cache=cache)
    found = everything.scans
    dataset = dataset_in(where)
    form = _choose_form(where, found, dataset, form)
    scans = tuple(scan for scan in found if not scan.label_map)
    if not scans:
        raise DataError(
            f"{where} holds {len(found)} label maps but no scan ({found[0].path} {found[0].label_map}); name the folder of the scans"
        )
    pattern = subject_pattern_for(scans, form)
    config = IngestConfig(sources=(where,), licence="unknown", subject_pattern=pattern)
    subjects: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        subjects[subject_of(scan, config) or ""].append(scan)
    by_path = {scan.path: scan for scan in scans}
    patterns = _test_patterns(dataset, scans)
    label_folders: list[Path] = []
    pairing, description = None, bids.Description()
    if labels is not None:
        label_folders = [_without_dots(labels)]
    elif folder is not None:
        label_folders = _find_label_folders(folder, form)
    if folder is not None:
        pairing = _find_best_pairing(folder, label_folders, form, contrast, by_path)
        description = bids.read_description(folder / bids.DESCRIPTION)
    stated = dataset or description
    return Survey(
        where,
        form,
        dataset,
        scans,
        tuple(scan for scan in found if scan.label_map),
        pattern,
        {subject: tuple(subjects[subject]) for subject in sorted(subjects)},
        dict(sorted(Counter(map(contrast_of, scans)).items())),
        pairing,
        tuple(everything.passed_over),
        tuple(scan for scan in scans if matches(scan.below, patterns)),
        patterns,
        stated.title,
        stated.licence,
        stated.reference,
        dataset.labels
        if dataset is not None
        else bids.label_names([folder, *label_folders] if folder else label_folders),
    )


def _without_dots(path: Path) -> Path:
    """Return an absolute path without `..`; links stay, because people recognise the names that they gave."""
    absolute = path.expanduser().absolute()
    return absolute.resolve() if ".." in absolute.parts else absolute


def _test_patterns(dataset: DatasetJson | None, scans: Sequence[Scan]) -> tuple[str, ...]:
    """Return patterns that match the test images: a folder of them, or single files in a folder with training images."""
    if dataset is None:
        return ()
    training = {image.rpartition("/")[0] for image, _ in dataset.training} | {"imagesTr"}
    patterns = {"imagesTs/*"}
    for image in dataset.test:
        folder = image.rpartition("/")[0]
        patterns.add(
            glob.escape(image if folder in training or not folder else folder) + "/*" * (folder not in training)
        )
    return tuple(sorted(pattern for pattern in patterns if any(matches(scan.below, [pattern]) for scan in scans)))


def contrast_of(scan: Scan) -> str:
    """Return the contrast in a scan's name: a channel, a BIDS suffix, or the last word of the name."""
    entities = dict(scan.entities)
    if "channel" in entities:
        return entities["channel"]
    entities = entities if "suffix" in entities else bids.entities_of(scan.path.rpartition("/")[2])
    if "suffix" in entities and "sub" in entities:
        return f"ce-{entities['ce']}_{entities['suffix']}" if "ce" in entities else entities["suffix"]
    word = re.split(r"[_.\s-]", scan_key(scan.path))[-1]
    return word if re.fullmatch(r"[A-Za-z]\w{0,15}", word) and not re.search(r"\d{3}|^[a-z]+\d{2,}$", word) else "scan"


def subject_pattern_for(scans: Sequence[Scan], form: Form) -> str:
    """Choose a subject pattern from the scans' names, such that the scans belong to several subjects."""
    if form == "nnunet":
        patterns = [_NUMBERED, r"^(.+)_\d{4}\.nii"]
    elif form == "bids":
        patterns = [_DEFAULT_PATTERN]
    else:
        patterns = [*_patterns_of_folders(scans), _NUMBERED, *_patterns_without_contrast(scans), _EVERY_FILE]
    for pattern in patterns:
        in_folders = pattern in (_FIRST_FOLDER, _OWN_FOLDER)
        matches = [re.search(pattern, lower_suffix(scan.below if in_folders else scan.name)) for scan in scans]
        subjects = {match[1] for match in matches if match}
        if all(matches) and len(subjects) > 1:
            return pattern
    return patterns[-1]


def _patterns_of_folders(scans: Sequence[Scan]) -> Iterator[str]:
    """Yield the pattern by which folders name patients: `P1/t1.nii.gz`, or `BraTS_001/BraTS_001_t1.nii.gz`."""
    if not all("/" in scan.below for scan in scans):
        return
    if all(scan.name.startswith(scan.below.split("/")[-2]) for scan in scans):
        yield _OWN_FOLDER
    names = [scan.name for scan in scans]
    # File names that repeat across folders name contrasts, unless the folders do.
    if len(set(names)) < len(names) and not all(_CONTRAST_WORD.fullmatch(scan.below.split("/")[0]) for scan in scans):
        yield _FIRST_FOLDER


def _patterns_without_contrast(scans: Sequence[Scan]) -> Iterator[str]:
    """Yield a pattern for names that end in several contrasts, such as `anna_t1` and `anna_flair`."""
    words = {re.split(r"[_-]", scan_key(scan.path))[-1] for scan in scans}
    if len(words) > 1 and all(map(_CONTRAST_WORD.fullmatch, words)):
        yield rf"^(.+)[_-](?:{'|'.join(sorted(words))})\.nii"


def _choose_form(root: str, scans: Sequence[Scan], dataset: DatasetJson | None, asked: Form | None) -> Form:
    is_bids = ("://" not in root and bids.is_dataset(Path(root))) or any(_is_bids_subject(scan.below) for scan in scans)
    found: Form = dataset.form if dataset is not None else "bids" if is_bids else "folder"
    if asked in ("nnunet", "msd") and dataset is None:
        raise DataError(
            f"{root} has no {DATASET_JSON} with labels and channel_names (or modality), so it is not a {NAMES[asked]}; "
            "name the folder that has it, or leave --from out"
        )
    if asked == "bids" and not is_bids:
        raise DataError(
            f"{root} has no {bids.DESCRIPTION} and no folder sub-..., so it is not a BIDS data set; leave --from out"
        )
    return asked or found


def _is_bids_subject(below: str) -> bool:
    return re.match(r"sub-[A-Za-z0-9]+/", below) is not None


def _find_label_folders(root: Path, form: Form) -> list[Path]:
    """Return the folders below `root` that may contain label maps, the root itself last."""
    if form in ("nnunet", "msd"):
        return [root / "labelsTr"] if (root / "labelsTr").is_dir() else []
    if form == "bids":
        derivatives = root / "derivatives"
        return sorted(path for path in derivatives.iterdir() if path.is_dir()) if derivatives.is_dir() else []
    beside = [root, root.parent] if root.name.lower().startswith("images") else [root]
    below = [path for folder in beside for path in sorted(folder.iterdir()) if path.is_dir()]
    return [path for path in below if re.match(r"labels?|masks?|seg|gt|annot", path.name.lower())] + [root]


def _find_best_pairing(
    root: Path, folders: Sequence[Path], form: Form, contrast: str | None, by_path: Mapping[str, Scan]
) -> Pairing | None:
    """Return the pairing with the most pairs among these folders of label maps."""
    pairings = [pairing for one in folders if (pairing := _find_pairing(root, one, form, contrast, by_path))]
    return max(pairings, key=lambda one: len(one.pairs), default=None)


def _find_pairing(
    root: Path, labels: Path, form: Form, contrast: str | None, by_path: Mapping[str, Scan]
) -> Pairing | None:
    """Return the rule that pairs the most label maps of a folder with a scan."""
    if not labels.is_dir():
        raise DataError(f"the folder of label maps {labels} does not exist; correct the path")
    images = _images_folder(root, form)
    maps = _files_by_path(labels)
    if labels == images:
        maps = {below: path for below, path in maps.items() if LABEL_SUFFIX.search(scan_key(below))}
    label_paths = set(maps.values())
    scans = {below: path for below, path in _files_by_path(images).items() if path not in label_paths}
    if form == "bids" and labels != images:
        scans = {below: path for below, path in scans.items() if not below.startswith("derivatives/")}
    rules = [rule for rule in _rank_rules(scans, maps) if contrast is None or contrast.lower() in rule[0].lower()]
    if not rules:
        return None
    best, names = rules[0], [rule[0] for rule in rules]
    image_name, label_name, pairs, num_unlabelled = best
    others = tuple(name for name, rule in zip(names[1:], rules[1:], strict=True) if len(rule[2]) == len(pairs))
    contrasts = {} if contrast is not None else _name_contrasts(rules, by_path)
    return Pairing(images, labels, image_name, label_name, pairs, num_unlabelled, others, contrasts)


def _images_folder(root: Path, form: Form) -> Path:
    """Return the folder of the scans that label maps may belong to."""
    names = {"nnunet": ("imagesTr",), "msd": ("imagesTr",), "folder": ("images", "imagesTr")}.get(form, ())
    return next((root / name for name in names if (root / name).is_dir()), root)


def _files_by_path(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by their paths below it."""
    return {composed(path.relative_to(folder).as_posix()): path for path in images_below(folder)}


_Rule = tuple[str, str, tuple[tuple[Path, Path], ...], int]


def _name_contrasts(rules: Sequence[_Rule], by_path: Mapping[str, Scan]) -> dict[str, tuple[str, str]]:
    """Return the contrasts of the cases: rules with one label map, each for at least half as many cases as the first."""
    _, label_name, best, _ = rules[0]
    named: dict[str, tuple[str, str]] = {}
    for image_name, label, pairs, _ in rules:
        scan = by_path.get(str(pairs[0][0]))
        if label != label_name or 2 * len(pairs) < len(best) or scan is None:
            continue
        words = contrast_of(scan)
        name = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[0-9])w$", "", words).lower()).strip("_")
        if not name or name in named:
            return {}
        is_stated = "channel" in dict(scan.entities) or bids.entities_of(scan.path.rpartition("/")[2]).get("sub")
        named[name] = (image_name, contrast_words(scan) if is_stated else image_name.replace("{key}", "*"))
    return named if len(named) > 1 else {}


def _rank_rules(scans: Mapping[str, Path], maps: Mapping[str, Path]) -> list[_Rule]:
    """Return rules as (image_name, label_name, pairs, number of scans without a label map), most pairs first."""
    votes: Counter[tuple[str, str]] = Counter()
    stems = sorted({scan_key(below) for below in scans})
    named = Counter(map(scan_key, maps))
    for below in sorted(maps)[:: max(1, len(maps) // _MAX_VOTERS)]:
        label = scan_key(below)
        for key in _candidate_keys(label):
            names = ["{key}" + stem[len(key) :] for stem in stems if stem.startswith(key)]
            votes.update((name, "{key}" + label[len(key) :]) for name in names if not name[5:6].isalnum())
        if named[label] > 1:  # the same name in every patient's folder
            votes.update((stem, label) for stem in stems)
    tried = [rule for rule, _ in votes.most_common(_MAX_RULES)]
    rules = [(image, label, *_apply_rule(scans, maps, image, label)) for image, label in tried]
    found = [rule for rule in rules if rule[2]]
    return sorted(
        found, key=lambda rule: (-len(rule[2]), -_common_prefix_length(*rule[:2]), rule[3], len(rule[0]), rule[0])
    )


def _common_prefix_length(image_name: str, label_name: str) -> int:
    """Return the length of the common prefix: `{key}_FLAIR` of `{key}_FLAIR` and `{key}_FLAIR_dseg`."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(image_name, label_name, strict=False)))


def _candidate_keys(stem: str) -> Iterator[str]:
    """Yield the parts of a label map's name that its scan may share: the whole name, then one word less at a time."""
    yield stem
    for _ in range(_MAX_WORDS):
        stem = stem.rpartition("_" if "_" in stem else "-")[0]
        if not stem:
            return
        yield stem


def _apply_rule(
    scans: Mapping[str, Path], maps: Mapping[str, Path], image_name: str, label_name: str
) -> tuple[tuple[tuple[Path, Path], ...], int]:
    """Return the pairs of a rule, and the number of matching scans without a label map."""
    find = label_finder(maps, label_name)
    pairs, num_unlabelled = [], 0
    for below, path in scans.items():
        key = key_of(below, image_name)
        if key is not None:
            label = find(below, key)
            pairs += [(path, label)] if label else []
            num_unlabelled += label is None
    distinct = {label for _, label in pairs}
    return (tuple(pairs), num_unlabelled) if len(distinct) == len(pairs) else ((), 0)
