"""A folder -> its files that may be scans: the search used for corpora and for tasks.

Skipped:
    - hidden files and folders: macOS leaves `._sub-01.nii.gz` beside every file that it copies, file servers keep
      snapshots in `.snapshot`, and git-annex keeps its objects in `.git`
    - other folders created by systems
    - `derivatives`, `sourcedata` and `code` of a BIDS data set, unless the search starts in them

Links are followed, including links to folders, and each folder is searched once, under its own path if that is below the
root. So loops end, and a link to a folder above the root is not followed. A broken link is listed if its name could
belong to a scan or to a subject's folder: reading it then refuses it, with a row in the ledger.
"""

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from p2r.data import bids
from p2r.data.names import HEADER_SUFFIXES, SUFFIXES, VOXEL_SUFFIXES, pair_of
from p2r.errors import DataError

_SYSTEM_FOLDERS = frozenset(
    ("__macosx", "__pycache__", "lost+found", "~snapshot", "#snapshot", "#recycle", "@recycle", "@eadir", "$recycle.bin",
     "system volume information")
)  # fmt: skip
_ANNEX_TARGET = "annex/objects"  # part of the target of every git-annex link


@dataclass(frozen=True)
class Folder:
    """A searched folder."""

    path: Path
    names: tuple[str, ...]
    """Names of its files, sorted."""
    is_bids: bool
    """True inside a BIDS data set."""
    not_raw: tuple[str, ...] = ()
    """Subfolders that are not searched: derivatives, sourcedata and code of a BIDS data set."""


def walk(root: Path) -> Iterator[Folder]:
    """Yield a folder and all folders below it, in an order that is independent of the file system.

    Raises:
        DataError: if a folder cannot be listed.
    """
    waiting = [(root, bids.is_dataset(root.parent))]
    links: list[tuple[Path, bool]] = []
    searched: set[str] = set()
    above = {str(folder) for folder in Path(os.path.realpath(root)).parents}
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)  # a folder with two links is searched under the first
            waiting = [links.pop()]
        folder, is_bids = waiting.pop()
        place = os.path.realpath(folder)
        if place in searched or place in above:
            continue
        searched.add(place)
        names, folders, linked = _list_folder(folder)
        is_dataset = bids.DESCRIPTION in names
        is_bids = is_bids or is_dataset
        skipped = bids.NOT_RAW if is_dataset else frozenset()
        not_raw = tuple(sorted(skipped.intersection((*folders, *linked))))
        yield Folder(folder, tuple(sorted(name for name in names if not is_passed_over(name))), is_bids, not_raw)
        wanted = {name for name in (*folders, *linked) if not is_passed_over(name) and name not in skipped}
        links += [(folder / name, is_bids) for name in linked if name in wanted]
        waiting += [(folder / name, is_bids) for name in sorted(wanted.intersection(folders), reverse=True)]


def images_below(root: Path) -> Iterator[Path]:
    """Yield every NIfTI file below a folder; a scan in two files is yielded once, as its header.

    Raises:
        DataError: if a folder cannot be listed.
    """
    for folder in walk(root):
        images = {name for name in folder.names if is_image(name)}
        yield from (folder.path / name for name in folder.names if name in images and not has_header(name, images))


def files_of(scan: Path) -> tuple[Path, ...]:
    """Return the files that hold a scan: header and voxels of a scan in two files, without absent ones; otherwise the scan's own."""
    pair = pair_of(str(scan))
    return tuple(path for path in map(Path, pair or ()) if path.exists()) or (scan,)


def is_image(name: str) -> bool:
    """Return whether a name, or the last part of a path, belongs to a NIfTI file."""
    name = name.rpartition("/")[2]
    return name.lower().endswith((*SUFFIXES, *HEADER_SUFFIXES, *VOXEL_SUFFIXES)) and not is_passed_over(name)


def has_header(name: str, names: Container[str]) -> bool:
    """Return whether a file holds the voxels of a scan whose header is in `names`; such a scan is listed by its header."""
    pair = pair_of(name)
    return pair is not None and name == pair[1] and pair[0] in names


def is_passed_over(name: str) -> bool:
    """Return whether a file or folder of this name does not belong to a data set."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def is_dead_link(path: Path) -> bool:
    """Return whether a path is a broken link whose name could belong to a scan or to a subject's folder."""
    try:
        if not path.is_symlink() or path.exists():
            return False
        return is_image(path.name) or (not path.suffix and _ANNEX_TARGET not in str(path.readlink()))
    except OSError:  # a loop of links
        return is_image(path.name) or not path.suffix


def _list_folder(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the files, folders and links to folders in a folder."""
    files, folders, linked = [], [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_symlink() and Path(entry).is_dir():  # entry.is_dir() fails on a loop of links
                    linked.append(entry.name)
                else:
                    files.append(entry.name)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be listed: {error}; check its permissions") from error
    return files, folders, linked
