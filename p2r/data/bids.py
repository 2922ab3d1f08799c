"""What the Brain Imaging Data Structure says with names: `sub-01_ses-2_task-rest_bold.nii.gz` -> its entities.

A data set is a folder with a `dataset_description.json`. Names outside of one are nobody's promise, and are not read.
"""

import re
from pathlib import Path

from p2r.data.names import scan_key

DESCRIPTION = "dataset_description.json"
"""The file that makes a folder a data set."""
NOT_RAW = frozenset({"derivatives", "sourcedata", "code"})
"""Folders of a data set that hold other things than its scans."""


def is_dataset(folder: Path) -> bool:
    """Tell whether `folder` lies in a data set, or is one."""
    return any((level / DESCRIPTION).is_file() for level in (folder, *folder.parents))


def entities_of(name: str) -> dict[str, str]:
    """Return the entities in a file name and its suffix, such as {sub: 01, ses: 2, suffix: T1w}; {} if it breaks the rules."""
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
    """Tell whether a JSON file is inherited by a scan: same suffix, and no entity that the scan does not have."""
    inherited, own = entities_of(sidecar), entities_of(name)
    return sidecar.endswith(".json") and bool(inherited) and inherited.items() <= own.items()
