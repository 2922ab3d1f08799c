"""File names of the Brain Imaging Data Structure (BIDS): `sub-01_ses-2_task-rest_bold.nii.gz` -> its entities.

A data set is a folder with a `dataset_description.json`. Outside a data set, names follow no rule and are not parsed.
"""

import re
from pathlib import Path

from p2r.data.names import scan_key

DESCRIPTION = "dataset_description.json"
"""File that marks a folder as a data set."""
NOT_RAW = frozenset({"derivatives", "sourcedata", "code"})
"""Folders of a data set that do not hold raw scans."""


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


def applies(sidecar: str, name: str) -> bool:
    """Return whether a scan inherits a JSON file: both have the same suffix, and the scan has every entity of the file."""
    inherited, own = entities_of(sidecar), entities_of(name)
    return sidecar.endswith(".json") and bool(inherited) and inherited.items() <= own.items()
