"""File names of the Brain Imaging Data Structure (BIDS): `sub-01_ses-2_task-rest_bold.nii.gz` -> its entities.

A data set is a folder with a `dataset_description.json`. Outside a data set, names follow no rule and are not parsed.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2r.data.names import scan_key
from p2r.documents import read_json, read_start
from p2r.errors import InputError

DESCRIPTION = "dataset_description.json"
"""File that marks a folder as a data set."""
NOT_RAW = frozenset({"derivatives", "sourcedata", "code"})
"""Folders of a data set that do not hold raw scans."""
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Description:
    """Content of a `dataset_description.json` that p2r uses; a missing value is empty."""

    title: str = ""
    licence: str = ""
    reference: str = ""
    """Citation that the file requests."""


def read_description(path: Path) -> Description:
    """Read a `dataset_description.json`; an absent or broken file has an empty description."""
    try:
        found = read_json(read_start(path, max_bytes=_MAX_BYTES), where=str(path), max_bytes=_MAX_BYTES)
    except (OSError, InputError):
        return Description()
    if not isinstance(found, dict):
        return Description()
    cited = (found.get(key) for key in ("DatasetDOI", "HowToAcknowledge", "ReferencesAndLinks"))
    return Description(
        _single_line(found.get("Name")),
        _single_line(found.get("License")),
        next((text for text in map(_single_line, cited) if text), ""),
    )


def label_names(folders: Iterable[Path]) -> dict[int, str]:
    """Return the names of label values from the `dseg.tsv` files in folders of label maps."""
    names: dict[int, str] = {}
    for folder in folders:
        for path in sorted(folder.glob("*dseg.tsv")):
            try:
                text = read_start(path, max_bytes=_MAX_BYTES).decode("utf-8-sig")
                for row in csv.DictReader(text.splitlines(), delimiter="\t"):
                    index, name = (row.get("index") or "").strip(), _single_line(row.get("name"))
                    if index.isascii() and index.isdecimal() and name:
                        names.setdefault(int(index[:9]), name)
            except (OSError, UnicodeDecodeError, csv.Error):
                continue
    return names


def _single_line(value: Any) -> str:
    if isinstance(value, list):
        value = "; ".join(item for item in value if isinstance(item, str))
    return " ".join(value.split())[:1000] if isinstance(value, str) else ""


def is_dataset(folder: Path) -> bool:
    """Return whether `folder` is a data set, or inside one."""
    return any((level / DESCRIPTION).is_file() for level in (folder, *folder.parents))


def entities_of(name: str) -> dict[str, str]:
    """Return the entities and the suffix of a file name, such as {sub: 01, ses: 2, suffix: T1w}; {} if it is not valid BIDS."""
    *pairs, suffix = scan_key(name).removesuffix(".json").split("_")
    entities: dict[str, str] = {}
    for pair in pairs:
        match = re.fullmatch(r"([A-Za-z0-9]+)-([A-Za-z0-9+]+)", pair)
        if match is None or match[1] in entities:
            return {}
        entities[match[1]] = match[2]
    if not re.fullmatch(r"[A-Za-z0-9]+", suffix) or "suffix" in entities:
        return {}
    return {**entities, "suffix": suffix}


def subject_of(entities: Mapping[str, str]) -> str | None:
    """Return the subject of a scan from the entities of its name."""
    return f"sub-{entities['sub']}" if "sub" in entities else None


def applies(sidecar: str, name: str) -> bool:
    """Return whether a scan inherits a JSON file: both have the same suffix, and the scan has every entity of the file."""
    inherited, own = entities_of(sidecar), entities_of(name)
    return sidecar.endswith(".json") and bool(inherited) and inherited.items() <= own.items()
