"""Names of scans and label maps -> pairs of a scan and its label map, by a task's `image_name` and `label_name`."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from p2r.data.names import composed, scan_key


def key_of(below: str, name: str) -> str | None:
    """Return the part of a file name that matches `{key}` in `name`; without `{key}`, its folder; None without a match.

    Args:
        below: Path relative to the folder, with or without the suffix.
        name: `image_name` or `label_name` of a task.
    """
    stem, folder = scan_key(below), below.rpartition("/")[0]
    if "{key}" not in name:
        return folder if stem == composed(name) and folder else None
    before, after = (re.escape(composed(part)) for part in name.split("{key}"))
    match = re.fullmatch(f"{before}(.+){after}", stem, re.DOTALL)
    return None if match is None else match[1]


def label_finder(maps: Mapping[str, Path], label_name: str) -> Callable[[str, str], Path | None]:
    """Return a function that finds the label map of a scan: at the same relative path, else the only one of its name.

    Args:
        maps: Label maps by path relative to their folder.
        label_name: `label_name` of a task.

    Returns:
        (relative path of the scan, its key) -> label map or None.
    """
    by_path = {below.rpartition("/")[0] + "/" + scan_key(below): path for below, path in maps.items()}
    by_name: dict[str, list[Path]] = defaultdict(list)
    for below, path in maps.items():
        by_name[scan_key(below)].append(path)

    def find(below: str, key: str) -> Path | None:
        name = composed(label_name).replace("{key}", key)
        beside = by_path.get(f"{below.rpartition('/')[0]}/{name}")
        candidates = by_name.get(name, [])
        return beside or (candidates[0] if len(candidates) == 1 and "{key}" in label_name else None)

    return find
