"""Scans in a bucket: by one listing of a prefix, or object by object."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

from p2r.data import bids, dicom
from p2r.data.dataset_json import NAME as DATASET_JSON
from p2r.data.dataset_json import DatasetJson
from p2r.data.folders import has_header, is_image, is_passed_over
from p2r.data.names import pair_of, scan_key
from p2r.data.opening import bucket_client
from p2r.data.scan import Scan, folder_passed_over
from p2r.errors import DataError


def scans_in_bucket(url: str, wants: Callable[[str], bool], datasets: dict[str, DatasetJson | None]) -> Iterator[Scan]:
    """Yield every scan below a prefix, and the folders of a BIDS data set that are not read.

    Args:
        url: URL of the prefix, or of one object.
        wants: Predicate of the path below the prefix: whether a file is wanted.
        datasets: `dataset.json` by folder. Folders without one are added, so that no request is made for it.

    Raises:
        DataError: if the bucket cannot be listed, or holds DICOM.
    """
    objects = _list_objects(url)
    prefix = url.removeprefix("s3://").rstrip("/")
    bids_roots = {path.rpartition("/")[0] for path in objects if path.endswith(f"/{bids.DESCRIPTION}")}
    is_bids = _is_in_dataset(prefix.rpartition("/")[0], bucket_client(), {})
    left_out: Counter[str] = Counter()
    datasets |= {
        f"s3://{folder}": None for folder in _list_folders(objects, prefix) if f"{folder}/{DATASET_JSON}" not in objects
    }
    for path in sorted(objects):
        below = path.removeprefix(prefix).lstrip("/") or path.rpartition("/")[2]
        if any(is_passed_over(part) for part in below.split("/")) or not wants(below):
            continue
        is_dicom = path.lower().endswith(dicom.SUFFIXES)
        is_scan = is_image(path) and not has_header(path, objects)
        is_inside, not_raw = _place_in_dataset(path, bids_roots)
        if not_raw is not None:
            left_out[not_raw] += is_dicom or is_scan
        elif is_dicom:
            raise DataError(
                f"source {url} holds DICOM (s3://{path}), which is read from folders only: copy it to a folder, "
                "or leave it out with ingest.exclude"
            )
        elif is_scan:
            yield _make_object_scan(path, objects, is_bids or is_inside)
    yield from (folder_passed_over(f"s3://{folder}", count) for folder, count in sorted(left_out.items()) if count)


def _place_in_dataset(path: str, bids_roots: Set[str]) -> tuple[bool, str | None]:
    """Return whether an object is in a BIDS data set, and the folder of that data set that is not raw data, if it is in one."""
    folders = path.split("/")[:-1]
    inside = [level for level in range(1, len(folders) + 1) if "/".join(folders[:level]) in bids_roots]
    not_raw = [level for level in inside if folders[level : level + 1] and folders[level] in bids.NOT_RAW]
    return bool(inside), "/".join(folders[: not_raw[0] + 1]) if not_raw else None


def _list_folders(objects: Iterable[str], prefix: str) -> set[str]:
    """Return the folders of the objects, and the parents of these folders, as far as they are not above the prefix."""
    folders = {path.rpartition("/")[0] for path in objects}
    return {
        folder for folder in folders | {folder.rpartition("/")[0] for folder in folders} if len(folder) >= len(prefix)
    }


def small_object(url: str, *, max_bytes: int) -> bytes | None:
    """Return an object's content, or the first `max_bytes` + 1 bytes of a larger object; None if it does not exist.

    Raises:
        DataError: if the bucket cannot be reached.
    """
    try:
        return bytes(bucket_client().cat_file(url, start=0, end=max_bytes + 1))
    except FileNotFoundError:
        return None
    except Exception as error:  # botocore's errors have no common base class
        raise DataError(f"{url} cannot be read: {type(error).__name__}: {error}; check network and keys") from error


class _Object(NamedTuple):
    """An object of a listing."""

    num_bytes: int
    etag: str


def _list_objects(url: str) -> dict[str, _Object]:
    try:
        found: dict[str, dict[str, Any]] = bucket_client().find(url, detail=True)
    except Exception as error:  # botocore's errors have no common base class
        raise DataError(
            f"source {url} cannot be listed: {type(error).__name__}: {error}; check the bucket, AWS_ENDPOINT_URL and keys"
        ) from error
    return {path: _Object(int(state["size"]), str(state.get("ETag", "")).strip('"')) for path, state in found.items()}


def _make_object_scan(path: str, objects: Mapping[str, _Object], is_bids: bool) -> Scan:
    pair = pair_of(path)
    if pair is not None and pair[0] in objects:
        path = pair[0]
    states = [objects[file] for file in pair or (path,) if file in objects]
    entities = bids.entities_of(path) if is_bids else {}
    return Scan(
        f"s3://{path}",
        scan_key(path),
        sum(state.num_bytes for state in states),
        " ".join(state.etag for state in states),
        files=() if pair is None else (f"s3://{pair[0]}", f"s3://{pair[1]}"),
        subject=bids.subject_of(entities),
        entities=tuple(sorted(entities.items())),
    )


def _is_in_dataset(path: str, bucket: Any, known: dict[str, bool]) -> bool:
    """Return whether a folder of a bucket is in a BIDS data set; lookups are cached in `known`."""
    if "/" not in path:
        return False
    if path not in known:
        try:
            is_dataset = bool(bucket.exists(f"{path}/{bids.DESCRIPTION}"))
        except PermissionError:
            is_dataset = False  # folders above the scans may be inaccessible
        known[path] = is_dataset or _is_in_dataset(path.rpartition("/")[0], bucket, known)
    return known[path]


def scans_at(target: str, bucket: Any, known: dict[str, bool]) -> list[Scan]:
    """Return the scan of one object as a list of one; [] if the object is no image or does not exist.

    Args:
        target: URL of the object.
        bucket: Client of the bucket.
        known: Cache by folder: whether it is in a BIDS data set.

    Raises:
        DataError: if the bucket cannot be reached.
    """
    path = target.removeprefix("s3://")
    try:
        objects = {file: bucket.info(file) for file in pair_of(path) or (path,)} if is_image(path) else {}
        is_bids = bool(bids.entities_of(path)) and _is_in_dataset(path.rpartition("/")[0], bucket, known)
    except FileNotFoundError:
        return []
    except Exception as error:  # botocore's errors have no common base class
        raise DataError(f"{target} cannot be looked up: {type(error).__name__}: {error}") from error
    return [_make_object_scan(path, objects, is_bids)] if objects else []
