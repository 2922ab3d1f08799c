"""Sources of a job -> the list of scans that will be ingested, in an order that does not depend on the file system.

A source is a folder, a file, a `file://` or `s3://` URL, or `template://` (see `phantom`). Hidden files are no scans:
macOS leaves `._sub-01.nii.gz` beside every file it copies.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from p2r.data.phantom import resolve_source
from p2r.data.volume import SUFFIXES, scan_key
from p2r.errors import DataError


@dataclass(frozen=True, order=True)
class Scan:
    """One file that may become a record."""

    path: str
    """Absolute path, or URL."""
    key: str
    """Unique name within the corpus, without dots: WebDataset cuts a member's name at its first dot."""
    num_bytes: int
    """Size of the file."""

    @property
    def name(self) -> str:
        """File name."""
        return self.path.rsplit("/", 1)[-1]


def find_scans(sources: Iterable[str], *, cache: Path) -> list[Scan]:
    """List every `.nii` and `.nii.gz` below the sources, sorted by path, each once.

    Args:
        sources: Folders, files and URLs.
        cache: Folder for data that `template://` sources generate.

    Raises:
        DataError: for a source that is absent, is no NIfTI file, or holds none.
    """
    sizes: dict[str, int] = {}
    for source in sources:
        found = _files_below(source, cache)
        if not found:
            raise DataError(
                f"source {source} holds no .nii or .nii.gz file; name the folder that has them, at any depth"
            )
        sizes.update(found)
    keys = _unique_keys(sorted(sizes))
    return [Scan(path, keys[path], sizes[path]) for path in sorted(sizes)]


def expand_subjects(patterns: Iterable[str]) -> list[str]:
    """Expand ranges as in Slurm's host lists: `patient[001-003,007]` -> patient001, patient002, patient003, patient007.

    Zero padding is kept, plain names stay, and a name given twice appears once, where it came first.

    Raises:
        DataError: for brackets that do not close, or a range that does not rise.
    """
    return list(dict.fromkeys(name for pattern in patterns for name in _expand(pattern)))


def _expand(pattern: str) -> list[str]:
    pieces = re.split(r"\[([^\[\]]*)\]", pattern)  # text, ranges, text, ranges, ..., text
    if any(bracket in text for text in pieces[::2] for bracket in "[]") or not pattern:
        raise DataError(f"subjects {pattern!r}: write a name, or ranges in closed brackets as in patient[001-014,020]")
    choices = [[piece] if index % 2 == 0 else _numbers(piece, pattern) for index, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _numbers(ranges: str, pattern: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, flags=re.ASCII)
        if match is None:
            raise DataError(f"subjects {pattern!r}: {part!r} is neither a number nor a range such as 001-014")
        first, last = match[1], match[2] or match[1]
        if int(first) > int(last):
            raise DataError(f"subjects {pattern!r}: the range {part!r} does not rise")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _files_below(source: str, cache: Path) -> dict[str, int]:
    scheme = urlsplit(source).scheme
    if scheme == "template":
        # Without a path the URL is the whole data set; a corpus holds its images, never the labels beside them.
        part = "" if urlsplit(source).path.strip("/") else "images"
        source, scheme = str(resolve_source(source, cache) / part), ""
    if scheme == "s3":
        return _objects_below(source)
    if scheme not in ("", "file"):
        raise DataError(
            f"source {source}: scheme {scheme!r} is not supported; use a path, file://, s3:// or template://"
        )
    root = Path(urlsplit(source).path if scheme == "file" else source).expanduser().absolute()
    if not root.exists():
        raise DataError(f"source {source} does not exist (looked for {root})")
    if root.is_file():
        if not _is_scan(root.name):
            raise DataError(f"source {source} is not a .nii or .nii.gz file")
        return {str(root): root.stat().st_size}
    # A broken link is listed too: reading refuses it, and the ledger says so.
    found = (path for path in root.rglob("*") if _is_scan(path.name) and not path.is_dir())
    return {str(path): path.stat().st_size if path.exists() else 0 for path in found}


def _objects_below(url: str) -> dict[str, int]:
    try:
        found = fsspec.filesystem("s3", skip_instance_cache=True).find(url, detail=True)
    except Exception as error:  # botocore's errors have no common root
        raise DataError(
            f"source {url} cannot be listed: {type(error).__name__}: {error}; check bucket, AWS_ENDPOINT_URL, keys"
        ) from error
    return {f"s3://{path}": int(entry["size"]) for path, entry in found.items() if _is_scan(path.rsplit("/", 1)[-1])}


def _is_scan(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _unique_keys(paths: list[str]) -> dict[str, str]:
    """Name every path by its file name; those that clash by as many parent folders as it takes."""
    depth = dict.fromkeys(paths, 0)
    while True:
        keys = {path: _key(path, depth[path]) for path in paths}
        clashes: dict[str, list[str]] = defaultdict(list)
        for path, key in keys.items():
            clashes[key].append(path)
        clashing = [path for group in clashes.values() if len(group) > 1 for path in group]
        if not clashing:
            return keys
        longer = [path for path in clashing if depth[path] < path.count("/")]
        if not longer:
            # Only dots against underscores or .nii against .nii.gz tell them apart.
            return {path: f"{index:06d}_{keys[path]}" for index, path in enumerate(paths)}
        for path in longer:
            depth[path] += 1


def _key(path: str, num_parents: int) -> str:
    folders, _, _ = path.rpartition("/")
    parents = [part for part in folders.split("/") if part][-num_parents:] if num_parents else []
    return re.sub(r"[^\w-]", "_", "_".join([*parents, scan_key(path)]))
