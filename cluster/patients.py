"""Scans of many patients by contrast: paths with `{key}` -> patients, and the path of each one's result.

    flair=scans/{key}_flair.nii.gz t1=scans/{key}_t1.nii.gz -> predictions/sub-01.nii.gz, predictions/sub-02.nii.gz

As in a task's `image_name`, the files of one key are one patient, who may lack contrasts. `{key}` matches any text, including folders. If
it occurs twice in a path, both must match the same text. A file that fits several contrasts belongs to the one with the shortest key:
`{key}_T1w` also matches `sub-01_ce-GD_T1w`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.outputs import Target, result_folder
from p2r.data.folders import images_below, is_image, walk
from p2r.data.label_maps import label_map_by_name
from p2r.data.names import SUFFIXES, composed, local_path, lower_suffix, scan_key
from p2r.errors import InputError
from p2r.evaluate.splits import join_few

KEY = "{key}"
_PLACEHOLDER = re.compile(r"\{\w*\}")


class _Pattern(NamedTuple):
    """Path of a contrast with its placeholder."""

    root: Path
    """Folder that is searched, at any depth."""
    regex: re.Pattern[str]
    """Matches paths relative to `root`; the group `key` is the patient."""
    has_suffix: bool
    """False: files match without their suffix, and so do folders of one DICOM series."""


def has_keys(contrasts: Mapping[str, str]) -> bool:
    """Return whether the paths of the contrasts are for many patients: they hold `{key}`.

    Raises:
        InputError: Some of the paths hold `{key}`, or one holds another placeholder.
    """
    named = {name: KEY in path and not Path(path).exists() for name, path in contrasts.items()}
    if any(named.values()) and not all(named.values()):
        lacking = next(name for name, is_named in named.items() if not is_named)
        raise InputError(
            f"{lacking}={contrasts[lacking]} has no {KEY}, but other contrasts do: write {KEY} in the path of each contrast, or give the "
            "scans of one patient"
        )
    for name, path in contrasts.items():
        other = next((found for found in _PLACEHOLDER.findall(path) if found != KEY), None)
        if other is not None and not Path(path).exists():
            raise InputError(f"{name}={path}: the placeholder for a patient is {KEY}, not {other}")
    return any(named.values())


def list_patients(contrasts: Mapping[str, str], output: str, *, form: str = "nifti") -> list[Target]:
    """Return each patient with the scans by contrast, in the order of the contrasts, and the path of the result.

    Args:
        contrasts: A path with `{key}` for each contrast; the same for contrasts along the fourth axis of a file.
        output: Folder of the results; each is named by its key.
        form: nifti or zarr.

    Raises:
        InputError: The output is not a folder, a contrast has no scan, or two scans have the same contrast and key.
    """
    folder, suffix = result_folder(output, form=form)
    sharing: dict[str, list[str]] = {}
    for name, given in contrasts.items():
        sharing.setdefault(given, []).append(name)  # contrasts along the fourth axis of a file are searched once
    patterns = {names[0]: _parse(names[0], given) for given, names in sharing.items()}
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for path, keys in _keys_by_file(patterns, folder).items():
        shortest = min(map(len, keys.values()))
        name, *others = [name for name, key in keys.items() if len(key) == shortest]
        if others:
            raise InputError(
                f"{path} matches {name}={contrasts[name]} and {others[0]}={contrasts[others[0]]}: give each contrast a path of its own"
            )
        if (other := found[keys[name]].setdefault(name, path)) != path:
            raise InputError(
                f"{other} and {path} both are the contrast {name} of {keys[name]}: write the path of {name} so that it matches one of both"
            )
    for given, (name, *_) in sharing.items():
        if not any(name in scans for scans in found.values()):
            raise InputError(
                f"no scan matches {name}={given}, in upper and lower case as written, below {patterns[name].root}: correct the path, or "
                f"leave {name} out"
            )
    return [
        Target(str(next(iter(scans.values()))), folder / f"{key}{suffix}", key=key, contrasts=tuple(scans.items()))
        for key, by_first in sorted(found.items())
        for scans in [
            {
                name: str(by_first[sharing[given][0]])
                for name, given in contrasts.items()
                if sharing[given][0] in by_first
            }
        ]
    ]


def describe_patients(patients: Sequence[Target], contrasts: Sequence[str]) -> Iterator[str]:
    """Yield the number of patients with each set of contrasts, and names of patients who lack some."""
    yield f"{len(patients)} patient{'s' * (len(patients) > 1)}: " + ", ".join(
        f"{name} of {sum(name in dict(one.contrasts) for one in patients)}" for name in contrasts
    )
    for present, number in Counter(tuple(dict(one.contrasts)) for one in patients).most_common():
        if lacking := [name for name in contrasts if name not in present]:
            keys = [one.key for one in patients if tuple(dict(one.contrasts)) == present]
            yield f"{number} without {', '.join(lacking)}: {join_few(keys)}"


def _parse(name: str, path: str) -> _Pattern:
    local = local_path(path)
    if local is None:
        raise InputError(
            f"{name}={path}: only folders of this machine are searched for {KEY}; copy the scans, or call p2r for each patient"
        )
    text = composed(lower_suffix(str(local.expanduser())))
    before, _, after = text.partition(KEY)
    folder, slash, start = before.rpartition("/")
    root = Path((folder or "/") if slash else ".")
    if not root.is_dir():
        raise InputError(f"{name}={path}: there is no folder {root}; correct the path")
    # A key is a path below the output, so it has no slash at its ends.
    rest = "(?P=key)".join(re.escape(part) for part in after.split(KEY))
    regex = re.compile(f"{re.escape(start)}(?P<key>[^/](?:.*[^/])?){rest}", re.DOTALL)
    return _Pattern(root, regex, has_suffix=is_image(text))


def _keys_by_file(patterns: Mapping[str, _Pattern], output: Path) -> dict[Path, dict[str, str]]:
    """Return the scans that match, each with its key by contrast; results of an earlier call and label maps are left out."""
    found: dict[Path, dict[str, str]] = defaultdict(dict)
    made = output.resolve()
    for root in dict.fromkeys(pattern.root for pattern in patterns.values()):
        is_inside = root.resolve() in made.parents
        for path in _scans_below(root):
            if is_inside and path.resolve().is_relative_to(made):
                continue
            below = path.relative_to(root)
            full = composed(lower_suffix(below.as_posix()))
            stem = composed(below.with_name(scan_key(path)).as_posix())
            for name, pattern in patterns.items():
                match = pattern.regex.fullmatch(full if pattern.has_suffix else stem) if pattern.root == root else None
                if match is not None and _is_name(match["key"]):
                    found[path.absolute()][name] = match["key"]
    return found


def _is_name(key: str) -> bool:
    """Return whether a key can name a result, and is not the name of a label map."""
    is_outside = ".." in key.split("/")  # below a folder called `a..`, `a{key}` would match a path out of the output
    return not is_outside and label_map_by_name(f"{key}{SUFFIXES[0]}") is None


def _scans_below(root: Path) -> list[Path]:
    """Return the NIfTI scans below a folder, and the folders that hold other files only, as of DICOM series."""
    series = [folder.path for folder in walk(root) if folder.names and not any(map(is_image, folder.names))]
    return sorted([*images_below(root), *(path for path in series if path != root)])
