"""`dataset.json` of nnU-Net (v2) and of the Medical Segmentation Decathlon -> channels, labels, and the role of each file.

    nnU-Net   {"channel_names": {"0": "T1"}, "labels": {"background": 0, "organ": 1}, "numTraining": 20, "file_ending": ".nii.gz"}
              imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz; or, by name, {"dataset": {CASE: {"images": [...], "label": ...}}}
    Decathlon {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "training": [{"image", "label"}], "test": [...]}
              imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz

Older nnU-Net files mix both forms. A `dataset.json` without labels and channels belongs to another program and is ignored.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from p2r.data.names import scan_key
from p2r.documents import read_json
from p2r.errors import DataError

NAME = "dataset.json"
"""Name of the file."""
MAX_BYTES = 16 << 20
"""Largest file that is read; those of the Decathlon have about 100 KB."""

_CHANNEL = re.compile(r"^(.+)_(\d{4})$")


@dataclass(frozen=True)
class DatasetJson:
    """Content of a `dataset.json`: a description of the files around it."""

    form: Literal["nnunet", "msd"]
    """nnunet: file names end in a channel number. msd: they do not."""
    channels: tuple[str, ...]
    """Name of each channel, by number."""
    labels: Mapping[int, str]
    """Name of each label above 0, without regions and the ignore label."""
    ignored: tuple[str, ...]
    """Labels that p2r does not use: nnU-Net's regions of several values, and its ignore label."""
    file_ending: str
    """File ending of images and label maps."""
    training: tuple[tuple[str, str], ...] = ()
    """(image, label) of each training case, as paths below the folder; empty: all of imagesTr."""
    test: tuple[str, ...] = ()
    """Images of the test cases, as paths below the folder; empty: all of imagesTs."""
    licence: str = ""
    """Licence, as the file states it."""
    reference: str = ""
    """Citation that the file requests."""
    title: str = ""
    """Name or description."""

    @property
    def label_maps(self) -> frozenset[str]:
        """Paths that are listed as label maps."""
        return frozenset(label for _, label in self.training)

    @cached_property
    def cases(self) -> frozenset[str]:
        """Names of the listed images, without folder and suffix."""
        return frozenset(map(scan_key, (*(image for image, _ in self.training), *self.test)))


def read_dataset_json(path: Path) -> DatasetJson | None:
    """Read a `dataset.json`; None if the file is absent or belongs to another program.

    Raises:
        DataError: naming the file, the key and the rule.
    """
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; check its permissions") from None
    return parse_dataset_json(content, str(path))


def parse_dataset_json(content: bytes, path: str) -> DatasetJson | None:
    """Parse a `dataset.json`; None if it belongs to another program.

    Args:
        content: Bytes of the file.
        path: Path or URL of the file, for messages.

    Raises:
        DataError: naming the file, the key and the rule.
    """
    found = read_json(content, where=path, max_bytes=MAX_BYTES, error=DataError)
    if not isinstance(found, dict) or "labels" not in found or not ("channel_names" in found or "modality" in found):
        return None
    channels = _parse_channels(found, path)
    training, test = _parse_cases(found, path)
    labels, ignored = _parse_labels(found["labels"], path)
    is_numbered = "channel_names" in found or any(_CHANNEL.match(scan_key(image)) for image, _ in training[:1])
    return DatasetJson(
        form="nnunet" if is_numbered else "msd",
        channels=channels,
        labels=labels,
        ignored=ignored,
        file_ending=_single_line(found.get("file_ending"), ".nii.gz"),
        training=training,
        test=test,
        licence=_single_line(found.get("licence") or found.get("license")),
        reference=_single_line(found.get("reference")),
        title=_single_line(found.get("description")) or _single_line(found.get("name")),
    )


def case_of(name: str, dataset: DatasetJson) -> tuple[str, int]:
    """Return the case and the channel number in an image's file name.

    The first version of nnU-Net lists images without their numbers: CASE.nii.gz for CASE_0000.nii.gz.
    """
    key = scan_key(name)
    match = _CHANNEL.match(key)
    if match is None or (dataset.form == "msd" and (key in dataset.cases or match[1] not in dataset.cases)):
        return key, 0
    return match[1], int(match[2])


def _parse_channels(found: Mapping[str, object], path: str) -> tuple[str, ...]:
    named = found.get("channel_names", found.get("modality"))
    if isinstance(named, list):
        named = {str(number): name for number, name in enumerate(named)}
    if (
        not isinstance(named, dict)
        or not named
        or sorted(named, key=lambda name: _parse_number(name) or 0) != [str(n) for n in range(len(named))]
    ):
        raise DataError(
            f'{path}: channel_names (or modality) must name the channels "0", "1", ..., got {_shorten(named)}'
        )
    return tuple(_single_line(named[str(number)], f"channel {number}") for number in range(len(named)))


def _parse_labels(found: Any, path: str) -> tuple[dict[int, str], tuple[str, ...]]:
    """Return the names of single labels, and the names of all other entries."""
    if not isinstance(found, dict) or not found:
        raise DataError(
            f'{path}: labels must map names to numbers, as {{"background": 0, "organ": 1}}, got {_shorten(found)}'
        )
    labels: dict[int, str] = {}
    ignored = []
    for key, value in found.items():
        # The Decathlon maps numbers to names, nnU-Net names to numbers.
        name, number = (
            (str(value), _parse_number(key)) if _parse_number(key) is not None else (str(key), _parse_number(value))
        )
        if isinstance(value, list) or number is None or name.lower() == "ignore":
            ignored.append(str(key))
        elif number < 0 or labels.setdefault(number, name) != name:
            raise DataError(f"{path}: labels has {_shorten(found)}: each number from 0 on has one name")
    return {number: name for number, name in sorted(labels.items()) if number > 0}, tuple(ignored)


def _parse_cases(found: Mapping[str, object], path: str) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    training: list[tuple[str, str]] = []
    cases = found.get("dataset")
    if isinstance(cases, dict):
        for case in cases.values():
            if isinstance(case, dict) and isinstance(case.get("images"), list) and isinstance(case.get("label"), str):
                training += [
                    (_relative_path(image, path), _relative_path(case["label"], path)) for image in case["images"]
                ]
    elif isinstance(pairs := found.get("training"), list):
        for pair in pairs:
            if not isinstance(pair, dict) or not {"image", "label"} <= pair.keys():
                raise DataError(f'{path}: training must list {{"image": ..., "label": ...}}, got {_shorten(pair)}')
            training.append((_relative_path(pair["image"], path), _relative_path(pair["label"], path)))
    test = found.get("test")
    listed = [item.get("image") if isinstance(item, dict) else item for item in test] if isinstance(test, list) else []
    return tuple(training), tuple(_relative_path(item, path) for item in listed)


def _relative_path(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value or ".." in value.split("/"):
        raise DataError(f"{path}: a case names a file below this folder, got {_shorten(value)}")
    return value.removeprefix("./")


def _parse_number(value: Any) -> int | None:
    text = str(value)
    return int(text) if re.fullmatch(r"-?\d{1,6}", text, re.ASCII) and not isinstance(value, bool) else None


def _single_line(value: Any, default: str = "") -> str:
    return " ".join(value.split())[:1000] if isinstance(value, str) and value.strip() else default


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
