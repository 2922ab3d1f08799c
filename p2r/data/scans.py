"""Sources of a job -> the list of scans that will be ingested, in an order that does not depend on the file system.

A source is one of

    a folder               searched for NIfTI, at any depth, and for DICOM series
    a file                 a scan, or a list of scans (`.csv`, `.tsv`, `.jsonl`; see `lists`)
    file://, s3://         the same by URL; DICOM is read from folders only
    template://            see `phantom`

Folders are searched by `folders`: links are followed, hidden files and folders are skipped. In a BIDS data set entities are
read from the names.

Files that are taken for label maps (`label_maps`) are found too, and marked. A `dataset.json` of nnU-Net or the Medical
Segmentation Decathlon gives its images their cases and channels.

DICOM is a file that ends in `.dcm` or `.ima`; in folders without NIfTI, any with DICOM's magic number. Files are grouped
by folder and series, and series that are one slice each of one acquisition are joined; a key has the folder's name and the
series' number. Nothing else of a header is used, unless the
job asks for PatientID.
"""

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from p2r.data import bids, dicom, lists
from p2r.data.buckets import scans_at, scans_in_bucket, small_object
from p2r.data.dataset_json import MAX_BYTES as MAX_DATASET_BYTES
from p2r.data.dataset_json import NAME as DATASET_JSON
from p2r.data.dataset_json import DatasetJson, case_of, parse_dataset_json, read_dataset_json
from p2r.data.folders import has_header, is_dead_link, is_image, walk
from p2r.data.label_maps import label_map_by_name
from p2r.data.names import composed, local_path, pair_of, scan_key
from p2r.data.opening import bucket_client
from p2r.data.scan import Scan as Scan
from p2r.data.scan import folder_passed_over
from p2r.data.subjects import expand_subjects as expand_subjects
from p2r.documents import read_start
from p2r.errors import DataError

DicomSubject = Literal["folder", "patient_id"]

_KINDS = ".nii, .nii.gz, .hdr/.img or DICOM file"


@dataclass(frozen=True)
class _Search:
    """What is looked for below the sources."""

    include: Sequence[str]
    exclude: Sequence[str]
    dicom_subject: DicomSubject

    def wants(self, below: str) -> bool:
        """Tell whether a file is wanted, by its path below the source."""
        below = composed(below)
        return (not self.include or matches(below, self.include)) and not matches(below, self.exclude)


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    scans: list[Scan]
    """Sorted by path, each once."""
    passed_over: list[Scan]
    """Folders of BIDS data sets whose files are not read: derivatives, sourcedata, code."""


def find_scans(
    sources: Iterable[str],
    *,
    cache: Path,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dicom_subject: DicomSubject = "folder",
) -> list[Scan]:
    """List every scan of the sources, sorted by path, each once; as `search_scans`."""
    return search_scans(sources, cache=cache, include=include, exclude=exclude, dicom_subject=dicom_subject).scans


def search_scans(
    sources: Iterable[str],
    *,
    cache: Path,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dicom_subject: DicomSubject = "folder",
) -> Found:
    """Search the sources for scans.

    Args:
        sources: Folders, files and URLs.
        cache: Folder for data that `template://` sources generate.
        include: Patterns of paths below a source (for lists: below the list's folder); only files that match one are
            scans. `*` matches any characters, `/` too; `**/` also matches nothing. Empty: all.
        exclude: Such patterns; files that match one are no scans.
        dicom_subject: Whether the subject of a DICOM series is its PatientID.

    Raises:
        DataError: for a source that is absent or cannot be listed, that is no scan, or holds none; for a broken list.
    """
    search = _Search(include, exclude, dicom_subject)
    found: dict[str, Scan] = {}
    passed_over: dict[str, Scan] = {}
    datasets: dict[str, DatasetJson | None] = {}
    for source in sources:
        everything = _scans_of(source, cache, search, datasets)
        scans = [scan for scan in everything if not scan.passed_over]
        passed_over |= {scan.path: scan for scan in everything if scan.passed_over}
        if not scans:
            rule = " that ingest.include and ingest.exclude leave" if include or exclude else ""
            raise DataError(f"source {source} holds no {_KINDS}{rule}; name the folder that has them, at any depth")
        # What a list says of a scan counts more than that a folder has it too.
        found |= {scan.path: scan for scan in scans if scan.path not in found or scan.subject or scan.entities}
        root = _root_of(source)
        found |= {scan.path: _described(found[scan.path], root, datasets) for scan in scans}
    keys = _unique_keys([found[path] for path in sorted(found)])
    return Found(
        [replace(found[path], key=keys[path]) for path in sorted(found)],
        [passed_over[path] for path in sorted(passed_over)],
    )


def _scans_of(source: str, cache: Path, search: _Search, datasets: dict[str, DatasetJson | None]) -> list[Scan]:
    scheme = source.partition("://")[0] if "://" in source else ""
    if scheme == "template":
        # Without a path the URL is the whole data set; a corpus holds its images, never the labels beside them.
        from p2r.data.phantom import resolve_source  # SciPy takes a second to import

        part = "" if urlsplit(source).path.strip("/") else "images"
        return list(_in_folder(resolve_source(source, cache) / part, search))
    if scheme == "s3":
        return list(_in_list(source, search) if _is_list(source) else scans_in_bucket(source, search.wants, datasets))
    local = local_path(source)
    if local is None or (scheme == "file" and not local.is_absolute()):
        rule = (
            "a file URL has three slashes, as in file:///data/scans" if local else f"scheme {scheme!r} is not supported"
        )
        raise DataError(f"source {source}: {rule}; use a path, file://, s3:// or template://")
    root = local.expanduser().absolute()
    if root.is_dir():
        return list(_in_folder(root, search))
    if not root.exists():
        raise DataError(f"source {source} does not exist (looked for {root})")
    if _is_list(root.name):
        return list(_in_list(str(root), search))
    if not is_image(root.name) and not dicom.is_dicom(root):
        raise DataError(f"source {source} is not a {_KINDS}, nor a list of them ({', '.join(lists.SUFFIXES)})")
    return [scan for scan in _from_file(root, search) if search.wants(root.name)]


# Folders


def _in_folder(root: Path, search: _Search) -> Iterator[Scan]:
    of_series: list[Path] = []
    for folder in walk(root):
        below = folder.path.relative_to(root)
        wanted = [name for name in folder.names if search.wants((below / name).as_posix())]
        images = {name for name in folder.names if is_image(name)}
        for name in wanted:
            if (name in images and not has_header(name, images)) or is_dead_link(folder.path / name):
                yield _image(folder.path / name, folder.is_bids)
        of_series += (
            folder.path / name
            for name in wanted
            if name.lower().endswith(dicom.SUFFIXES) or (not images and dicom.is_dicom(folder.path / name))
        )
        for name in folder.not_raw:
            if count := _num_wanted(folder.path / name, root, search):
                yield folder_passed_over(str(folder.path / name), count)
    yield from _series(of_series, root, search)


def _num_wanted(folder: Path, root: Path, search: _Search) -> int:
    """Count the NIfTI and DICOM files below a folder, by their names."""
    num = 0
    for one in walk(folder):
        below = one.path.relative_to(root)
        images = {name for name in one.names if is_image(name)}
        files = [
            name
            for name in one.names
            if name.lower().endswith(dicom.SUFFIXES) or (name in images and not has_header(name, images))
        ]
        num += sum(search.wants((below / name).as_posix()) for name in files)
    return num


def _from_file(path: Path, search: _Search) -> Iterator[Scan]:
    if is_image(path.name):
        yield _image(path, bids.is_dataset(path.parent))
    else:
        for scan in _series([path], path.parent, search):
            yield replace(scan, path=str(path))


def _image(path: Path, is_bids: bool) -> Scan:
    pair = pair_of(str(path))
    if pair is not None and Path(pair[0]).exists():
        path = Path(pair[0])
    entities = bids.entities_of(path.name) if is_bids else {}
    num_bytes, modified = _state(pair or [str(path)])
    return Scan(
        str(path),
        scan_key(path),
        num_bytes,
        modified,
        files=pair or (),
        subject=bids.subject_of(entities),
        entities=tuple(sorted(entities.items())),
    )


def _series(files: Iterable[Path], root: Path, search: _Search) -> Iterator[Scan]:
    """Group the DICOM files below a folder."""
    found = dicom.join_slices(dicom.group_by_series(files))
    num_known = Counter(series.folder for series in found if series.uid_digest is not None)
    for series in found:
        below = Path(series.folder).relative_to(root).parts
        num_bytes, modified = _state(series.files)
        name = series.folder.rpartition("/")[2]
        if series.uid_digest is None:  # reading refuses it, and the ledger says so
            path = series.files[0]
            stem = path.rpartition("/")[2]
        else:
            path = series.folder if num_known[series.folder] == 1 else f"{series.folder}#{series.uid_digest}"
            stem = f"{name}_{series.uid_digest if series.number is None else f's{series.number:03d}'}"
        yield Scan(
            path,
            stem,
            num_bytes,
            modified,
            files=series.files,
            subject=series.patient_id if search.dicom_subject == "patient_id" else None,
            format="dicom",
            label=below[0] if below else root.name,
        )


def _state(files: Iterable[str]) -> tuple[int, str]:
    """Return the size of some files and when one of them changed last; a broken link has none, and reading refuses it."""
    num_bytes, modified = 0, 0
    for file in files:
        try:
            state = Path(file).stat()
        except OSError:
            continue
        num_bytes, modified = num_bytes + state.st_size, max(modified, state.st_mtime_ns)
    return num_bytes, str(modified or "")


# Names and a dataset.json


def _root_of(source: str) -> str:
    """Return the folder or prefix below which the scans of a source are, or the folder of a single file or list."""
    local = local_path(source)
    if local is None:
        return (source.rpartition("/")[0] if _is_list(source) or is_image(source) else source).rstrip("/")
    root = local.expanduser().absolute()
    return str(root if root.is_dir() else root.parent)


def _described(scan: Scan, root: str, datasets: dict[str, DatasetJson | None]) -> Scan:
    """Add the statements of a scan's path, and of a `dataset.json` above it, which is read once for all."""
    below = composed(scan.path.removeprefix(f"{root}/")) if scan.path.startswith(f"{root}/") else ""
    if scan.format == "dicom":
        return replace(scan, below=below)
    reason = label_map_by_name(below or scan.path.rpartition("/")[2])
    found = _dataset_of(scan.path, datasets)
    if found is None:
        return replace(scan, below=below, label_map=reason or "")
    folder, dataset = found
    path = scan.path.removeprefix(f"{folder}/")
    if path in dataset.label_maps:
        reason = f"is a label of {folder}/{DATASET_JSON}"
    case, channel = case_of(path, dataset)
    entities = dict(scan.entities)
    if channel < len(dataset.channels):
        entities.setdefault("channel", dataset.channels[channel])
    return replace(
        scan, below=below, label_map=reason or "", case=case, entities=tuple(sorted(entities.items()))
    )  # fmt: skip


def dataset_in(folder: str) -> DatasetJson | None:
    """Read the `dataset.json` of a folder or of a prefix in a bucket; None if there is none.

    Raises:
        DataError: if it cannot be read, or breaks its rules.
    """
    url = f"{folder}/{DATASET_JSON}"
    if "://" not in folder:
        return read_dataset_json(Path(url))
    content = small_object(url, max_bytes=MAX_DATASET_BYTES) if folder.startswith("s3://") else None
    return None if content is None else parse_dataset_json(content, url)


def _dataset_of(path: str, datasets: dict[str, DatasetJson | None]) -> tuple[str, DatasetJson] | None:
    """Return the `dataset.json` beside a file or in the folder above, and that folder."""
    beside = path.rpartition("/")[0]
    for folder in (beside, beside.rpartition("/")[0]):
        if folder.endswith(":/") or not folder:  # above a bucket
            return None
        if folder not in datasets:
            datasets[folder] = dataset_in(folder)
        if (dataset := datasets[folder]) is not None:
            return folder, dataset
    return None


# Lists


def _in_list(path: str, search: _Search) -> Iterator[Scan]:
    try:
        if path.startswith("s3://"):
            content = bucket_client().cat_file(path, start=0, end=lists.MAX_BYTES + 1)
        else:
            content = read_start(Path(path), max_bytes=lists.MAX_BYTES)
    except Exception as error:  # botocore's errors have no common root
        raise DataError(f"list {path} cannot be read: {type(error).__name__}: {error}") from error
    rows = lists.parse_list(content, path)
    folder = path.rpartition("/")[0]
    targets = [_target(row, folder, path) for row in rows]
    lines: dict[str, int] = {}
    for row, target, scans in zip(rows, targets, _all_found(targets, search), strict=True):
        where = f"list {path}, line {row.line}"
        if not scans:
            raise DataError(f"{where}: there is no {_KINDS} at {target}; correct the path, or take the row out")
        for scan in scans:
            if scan.path in lines:
                raise DataError(f"{where} names {scan.path}, as line {lines[scan.path]} does; each scan has one row")
            lines[scan.path] = row.line
            if search.wants(target.removeprefix(f"{folder}/").lstrip("/")):
                entities = {**dict(scan.entities), **row.entities}
                yield replace(scan, subject=row.subject or scan.subject, entities=tuple(sorted(entities.items())))


def _target(row: lists.Row, folder: str, path: str) -> str:
    """Return the absolute path or URL that a row names."""
    if row.path.startswith("s3://"):
        return row.path
    local = local_path(row.path)
    if local is None:
        raise DataError(f"list {path}, line {row.line}: {row.path} is neither a path nor a file:// or s3:// URL")
    local = local.expanduser() if row.path.startswith("~") else local
    if local.is_absolute():
        return os.path.normpath(local)
    if not folder.startswith("s3://"):
        return os.path.normpath(f"{folder}/{local}")
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    relative = os.path.normpath(f"{prefix}/{local}".lstrip("/"))
    if relative.split("/")[0] == "..":
        raise DataError(f"list {path}, line {row.line}: {row.path} leads out of the bucket")
    return f"s3://{bucket}/{relative}"


def _all_found(targets: Sequence[str], search: _Search) -> Iterator[list[Scan]]:
    """Yield what lies at each path; objects are looked up several at a time."""
    if not any(target.startswith("s3://") for target in targets):
        yield from (_found_at(target, search) for target in targets)
        return
    bucket, known = bucket_client(), dict[str, bool]()

    def found(target: str) -> list[Scan]:
        return scans_at(target, bucket, known) if target.startswith("s3://") else _found_at(target, search)

    with ThreadPoolExecutor(16) as threads:
        yield from threads.map(found, targets)


def _found_at(target: str, search: _Search) -> list[Scan]:
    path = Path(target)
    try:
        if path.is_dir():
            return list(_series((file for file in path.iterdir() if dicom.is_dicom(file)), path, search))
        # A broken link is a scan that reading will refuse.
        is_scan = (is_image(path.name) and os.path.lexists(path)) or dicom.is_dicom(path)
    except OSError:  # a name too long, a folder that is closed
        return []
    return list(_from_file(path, search)) if is_scan else []


# Names


def _is_list(name: str) -> bool:
    return name.lower().endswith(lists.SUFFIXES)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Tell whether a path below a source matches one of the patterns of `ingest.include` or `exclude`."""
    return any(fnmatchcase(path, variant) for pattern in patterns for variant in _variants(pattern))


@lru_cache
def _variants(pattern: str) -> list[str]:
    """Return a pattern with each `**/` in it left as it is, or left out."""
    first, *others = composed(pattern).split("**/")
    if len(others) > 4:
        raise DataError(f"ingest pattern {pattern!r} has more than four `**/`; `*` matches `/` as well")
    chosen = itertools.product(("*/", ""), repeat=len(others))
    return [first + "".join(map("".join, zip(choice, others, strict=True))) for choice in chosen]


def _unique_keys(scans: Sequence[Scan]) -> dict[str, str]:
    """Name every scan by its stem; those that clash by as many parent folders as it takes."""
    depth = dict.fromkeys((scan.path for scan in scans), 0)
    while True:
        keys = {scan.path: _key(scan, depth[scan.path]) for scan in scans}
        clashes: dict[str, list[str]] = defaultdict(list)
        for path, key in keys.items():
            clashes[key].append(path)
        clashing = [path for group in clashes.values() if len(group) > 1 for path in group]
        longer = [path for path in clashing if depth[path] < path.count("/")]
        if not longer:
            break
        for path in longer:
            depth[path] += 1
    # The images of a series that is split are called KEY_0, KEY_1, and so on.
    series = {keys[scan.path] for scan in scans if scan.format == "dicom"}
    if clashing or any(re.sub(r"_\d+$", "", key) in series - {key} for key in keys.values()):
        # Only dots against underscores or .nii against .nii.gz tell them apart.
        return {path: f"{index:06d}_{key}" for index, (path, key) in enumerate(keys.items())}
    return keys


def _key(scan: Scan, num_parents: int) -> str:
    folders, _, _ = scan.path.rpartition("/")
    parents = [part for part in folders.split("/") if part][-num_parents:] if num_parents else []
    return re.sub(r"[^\w-]", "_", composed("_".join([*parents, scan.key])))
