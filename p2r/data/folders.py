"""A folder -> its files that may be scans: the one search behind a corpus and a task.

Skipped: hidden files and folders (macOS leaves `._sub-01.nii.gz` beside every file it copies; file servers keep snapshots in
`.snapshot`, git-annex its objects in `.git`), other folders that systems make on their own, and, in a BIDS data set,
`derivatives`, `sourcedata` and `code`, unless the search starts in them.

Links are followed, links to folders too, and each folder is searched once, under its own path if it has one below the
root. So a loop ends, and a link to a folder above the root is not followed. A link that leads nowhere is listed where its
name may be that of a scan or of a subject's folder: reading refuses it, and the ledger says so.
"""

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from p2r.data import bids
from p2r.data.names import HEADER_SUFFIXES, SUFFIXES, VOXEL_SUFFIXES, pair_of
from p2r.errors import DataError

_MADE_BY_SYSTEMS = frozenset(
    ("__macosx", "__pycache__", "lost+found", "~snapshot", "#snapshot", "#recycle", "@recycle", "@eadir", "$recycle.bin",
     "system volume information")
)  # fmt: skip
_NO_SUFFIX_NEEDED = "annex/objects"  # part of the target of every link that git-annex makes


@dataclass(frozen=True)
class Folder:
    """A folder that was searched."""

    path: Path
    names: tuple[str, ...]
    """Its files, sorted."""
    is_bids: bool
    """It is in a BIDS data set."""
    not_raw: tuple[str, ...] = ()
    """Folders in it that are not searched: results and sources of a BIDS data set."""


def walk(root: Path) -> Iterator[Folder]:
    """Yield a folder and every folder below it, in an order that does not depend on the file system.

    Raises:
        DataError: for a folder that cannot be listed.
    """
    waiting = [(root, bids.is_dataset(root.parent))]
    links: list[tuple[Path, bool]] = []
    searched: set[str] = set()
    above = {str(folder) for folder in Path(os.path.realpath(root)).parents}
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)  # a folder that two links name is searched under the first
            waiting = [links.pop()]
        folder, is_bids = waiting.pop()
        place = os.path.realpath(folder)
        if place in searched or place in above:
            continue
        searched.add(place)
        names, folders, linked = _listed(folder)
        is_dataset = bids.DESCRIPTION in names
        is_bids = is_bids or is_dataset
        skipped = bids.NOT_RAW if is_dataset else frozenset()
        not_raw = tuple(sorted(skipped.intersection((*folders, *linked))))
        yield Folder(folder, tuple(sorted(name for name in names if not is_passed_over(name))), is_bids, not_raw)
        wanted = {name for name in (*folders, *linked) if not is_passed_over(name) and name not in skipped}
        links += [(folder / name, is_bids) for name in linked if name in wanted]
        waiting += [(folder / name, is_bids) for name in sorted(wanted.intersection(folders), reverse=True)]


def images_below(root: Path) -> Iterator[Path]:
    """Yield every NIfTI file below a folder, of two files the header.

    Raises:
        DataError: for a folder that cannot be listed.
    """
    for folder in walk(root):
        images = {name for name in folder.names if is_image(name)}
        yield from (folder.path / name for name in folder.names if name in images and not has_header(name, images))


def is_image(name: str) -> bool:
    """Tell whether a name, or the last part of a path, is that of a NIfTI file."""
    name = name.rpartition("/")[2]
    return name.lower().endswith((*SUFFIXES, *HEADER_SUFFIXES, *VOXEL_SUFFIXES)) and not is_passed_over(name)


def has_header(name: str, names: Container[str]) -> bool:
    """Tell whether a file has the voxels of a scan whose header is among `names`: one scan, listed by its header."""
    pair = pair_of(name)
    return pair is not None and name == pair[1] and pair[0] in names


def is_passed_over(name: str) -> bool:
    """Tell whether a file or folder of this name is no part of a data set."""
    return name.startswith(".") or name.lower() in _MADE_BY_SYSTEMS


def is_dead_link(path: Path) -> bool:
    """Tell whether a path is a link that leads nowhere and may stand for a scan or for a subject's folder."""
    try:
        if not path.is_symlink() or path.exists():
            return False
        return is_image(path.name) or (not path.suffix and _NO_SUFFIX_NEEDED not in str(path.readlink()))
    except OSError:  # links that form a loop
        return is_image(path.name) or not path.suffix


def _listed(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the files, folders and links to folders in a folder."""
    files, folders, linked = [], [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_symlink() and Path(entry).is_dir():  # is_dir() of an entry fails where links loop
                    linked.append(entry.name)
                else:
                    files.append(entry.name)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be listed: {error}; check its permissions") from error
    return files, folders, linked
