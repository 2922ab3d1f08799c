"""Results of many scans: which scan becomes which file, and which results are there already.

A folder's results keep the relative paths of the scans; a list's results keep their paths below the scans' common folder; results of
patients with scans by contrast are named by their keys (`cluster.patients`). The file
`.p2r-results.jsonl` in the output folder names each result with the digests of scan, inputs and result. A later call with the same inputs
skips a result that is still whole, so an interrupted call is resumed by repeating it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from p2r.data.folders import images_below
from p2r.data.label_maps import label_map_by_name
from p2r.data.names import local_path, pair_of, scan_key
from p2r.data.opening import remote_version
from p2r.documents import JsonRow, checked, read_json
from p2r.errors import InputError, RefusedScan
from p2r.files import file_sha256
from p2r.logs import Say

ENDINGS = (".nii", ".nii.gz", ".zarr")
RECORD = ".p2r-results.jsonl"
_FORMS = {"nifti": ".nii.gz", "zarr": ".zarr"}
_MAX_RECORD_BYTES = 2**28


class Target(NamedTuple):
    """A scan, or the scans of a patient by contrast, and the path of the result."""

    scan: str
    """The scan; of several, the first, whose grid the result has."""
    path: Path
    beside: Path | None = None
    """A second file of the result."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Name and scan of each contrast that the patient has; empty for a scan without a name."""
    key: str = ""
    """Name of one of many patients; empty for a scan."""

    @property
    def given(self) -> str | dict[str, str]:
        """The scan, or the scans by contrast."""
        return dict(self.contrasts) or self.scan

    @property
    def scans(self) -> tuple[str, ...]:
        """All scans that the result depends on."""
        return tuple(dict(self.contrasts).values()) or (self.scan,)

    @property
    def title(self) -> str:
        """Name for the log: the scan, or the patient and the contrasts that are there."""
        return f"{self.key} ({', '.join(dict(self.contrasts))})" if self.key else self.scan

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the result."""
        return (self.path,) if self.beside is None else (self.path, self.beside)


class Result(NamedTuple):
    """Outcome of one scan."""

    text: str
    """Description for the log."""
    rows: list[list[str | int | float]]
    """Rows of the table of volumes."""


def is_many(scans: Sequence[str], output: str) -> bool:
    """Return whether the results go into a folder: several scans, or a folder of scans; not one DICOM series with a file as output."""
    return len(scans) > 1 or (is_folder(scans[0]) and not (output.endswith(ENDINGS) and holds_only_dicom(scans[0])))


def holds_only_dicom(folder: str) -> bool:
    """Return whether a local folder holds files, and none of NIfTI."""
    root = (local_path(folder) or Path(folder)).expanduser()
    return next(images_below(root), None) is None and any(path.is_file() for path in root.rglob("*"))


def is_folder(scan: str) -> bool:
    """Return whether a scan is a local folder."""
    path = local_path(scan)
    return path is not None and path.expanduser().is_dir()


def list_targets(scans: Sequence[str], output: str, *, form: str = "nifti") -> list[Target]:
    """Return each scan of a list, or of folders, with the path of its result.

    Args:
        scans: Scans (NIfTI, or folders of one DICOM series) and folders of NIfTI scans.
        output: Folder of the results.
        form: nifti or zarr.

    Raises:
        InputError: The output is not a folder, or a folder holds no scan.
    """
    to, suffix = result_folder(output, form=form)
    made = to.resolve()
    singles = [scan for scan in scans if not is_folder(scan) or holds_only_dicom(scan)]
    found = [(scan, _below_common(scan, singles)) for scan in singles]
    for folder in (scan for scan in scans if scan not in singles):
        root = (local_path(folder) or Path(folder)).expanduser()
        is_inside = root.resolve() in made.parents  # results of an earlier call are not scans
        paths = [
            path
            for path in sorted(images_below(root))
            if label_map_by_name(path.relative_to(root).as_posix()) is None
            and not (is_inside and path.resolve().is_relative_to(made))
        ]
        if not paths:
            raise InputError(f"{folder} holds no NIfTI scan, at any depth; name the folder that has them")
        found += [(str(path), path.relative_to(root).parent) for path in paths]
    return list(dict.fromkeys(Target(scan, to / below / f"{scan_key(scan)}{suffix}") for scan, below in found))


def result_folder(output: str, *, form: str) -> tuple[Path, str]:
    """Return the folder of several results, and the ending of their names.

    Raises:
        InputError: The output is not a folder of this machine, or there is no such form.
    """
    if form not in _FORMS:
        raise InputError(f"--as {form}: results are written as {' or '.join(_FORMS)}")
    if "://" in output or "{key}" in output or output.endswith(ENDINGS) or Path(output).is_file():
        raise InputError(
            f"output {output}: results of a folder or of several scans go into a folder; name one. Files in it are named by their scans"
        )
    return Path(output), _FORMS[form]


def check_targets(targets: Sequence[Target]) -> None:
    """Refuse results that would replace one another, or one of the scans.

    Raises:
        InputError: naming both files.
    """
    scans = (scan for target in targets for scan in target.scans)
    read = {path.expanduser().resolve(): scan for scan in scans if (path := local_path(scan)) is not None}
    by_path: dict[Path, str] = {}
    for target in targets:
        for file in target.files:
            other = by_path.setdefault(file, target.scan)
            if other != target.scan:
                raise InputError(
                    f"{other} and {target.scan} would both become {file}: give them in two calls with different output folders"
                )
            if (scan := read.get(file.resolve())) is not None:
                raise InputError(f"output {file} would replace the scan {scan}: give another output")


def _below_common(scan: str, scans: Sequence[str]) -> Path:
    """Return the folder of a scan below the common folder of the local scans of a list; it has no `..`."""
    folders = [_folder_of(path) for one in scans if (path := local_path(one)) is not None]
    mine = local_path(scan)
    if mine is None or len(folders) < 2:
        return Path()
    return _folder_of(mine).relative_to(os.path.commonpath(folders))


def _folder_of(path: Path) -> Path:
    """Return the folder of a path, absolute and without `..`; links are kept."""
    return Path(os.path.abspath(path.expanduser())).parent  # noqa: PTH100 (Path.absolute keeps `..`)


def process_each(
    targets: Sequence[Target], work: Callable[[Target], Result], folder: Path, *, inputs: Mapping[str, object], say: Say
) -> list[Result]:
    """Process every scan that has no whole result yet, with a log line for each.

    Args:
        targets: The scans.
        work: Writes the result of a scan.
        folder: Output folder.
        inputs: Everything besides the scan that a result depends on.
        say: Receives the log lines.

    Returns:
        The results, also those of earlier calls.

    Raises:
        InputError: No scan can be used.
    """
    digest = _digest_of_inputs(inputs)
    known = _read_record(folder / RECORD)
    began, num_new, results, refused = time.monotonic(), 0, list[Result](), 0
    for number, target in enumerate(targets, start=1):
        name = target.path.relative_to(folder).as_posix()
        try:
            scan_sha256 = _scan_sha256(target)
            before = known.get(name)
            if before is not None and before.is_of(scan_sha256, digest) and _digests(target) == before.sha256:
                results.append(Result(before.text, before.rows))
                told = "there already"
            else:
                num_new += 1
                found = work(target)
                results.append(found)
                told = found.text
                done = _Done(
                    result=name,
                    inputs=digest,
                    scan_sha256=scan_sha256,
                    sha256=_digests(target),
                    text=found.text,
                    rows=found.rows,
                )
                _append(folder / RECORD, done)
        except RefusedScan as error:
            refused += 1
            told = f"refused: {error}"
        left_s = (time.monotonic() - began) / max(1, num_new) * (len(targets) - number)
        say(f"{number}/{len(targets)} | {target.title} | {told}" + f" | {left_s:.0f} s left" * (number < len(targets)))
    if refused == len(targets):
        raise InputError(f"none of the {len(targets)} scans could be used; the lines above say why")
    return results


def rows_of_earlier_calls(
    targets: Sequence[Target], folder: Path, *, inputs: Mapping[str, object]
) -> list[list[str | int | float]]:
    """Return the table rows of whole results that the folder has of other scans with the same inputs. Arguments as in `process_each`.

    A scan that has results of several names, such as NIfTI and Zarr, is listed once.
    """
    digest, names = _digest_of_inputs(inputs), {target.path.relative_to(folder).as_posix() for target in targets}
    listed: set[str | int | float] = {target.key or target.scan for target in targets}
    found: list[list[str | int | float]] = []
    for name, done in _read_record(folder / RECORD).items():
        if name in names or done.inputs != digest or not done.rows or done.rows[0][0] in listed:
            continue
        if _digest(folder / name) == done.sha256.partition(" ")[0]:
            listed.add(done.rows[0][0])
            found += done.rows
    return found


def _digest_of_inputs(inputs: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(dict(inputs), sort_keys=True).encode()).hexdigest()


def _scan_sha256(target: Target) -> str:
    """Return the digest of a scan, or of the scans of a patient with their contrasts."""
    if target.contrasts:
        lines = "".join(f"{name} {_digest_of_scan(scan)}\n" for name, scan in target.contrasts)
        return hashlib.sha256(lines.encode()).hexdigest()
    return _digest_of_scan(target.scan)


def _digest_of_scan(scan: str) -> str:
    """Return the digests of a scan's files. For a remote file, digest its size and version, which are known without reading it.

    Raises:
        RefusedScan: `unreadable`, for a local file.
        StorageError: A remote file exists but cannot be fetched.
    """
    found = ((file, local_path(file)) for file in pair_of(scan) or (scan,))
    return " ".join(
        hashlib.sha256(remote_version(file).encode()).hexdigest() if path is None else _digest_of_input(path)
        for file, path in found
    )


def _digest_of_input(path: Path) -> str:
    try:
        return _digest(path.expanduser())
    except OSError as error:  # one file without permission does not end the whole folder
        raise RefusedScan(
            "unreadable", f"cannot read {path}: {type(error).__name__}: {error}; check the path and its permissions"
        ) from error


def _digests(target: Target) -> str:
    """Return the digests of all files of a result; empty for a file that is absent."""
    return " ".join(_digest(file) for file in target.files)


def _digest(path: Path) -> str:
    """Return the digest of a file, or of all files of a folder; empty if there is none."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for one in sorted(path.rglob("*")) if path.is_dir() else ():
        if one.is_file():
            digest.update(f"{one.relative_to(path)} {file_sha256(one)}\n".encode())
    return digest.hexdigest() if path.is_dir() else ""


class _Done(JsonRow):
    """Record of a result in the folder."""

    result: str
    """Its path below the folder."""
    inputs: str
    """Digest of everything besides the scan that it depends on."""
    scan_sha256: str
    """Digest of the scan. Remote: digest of its size and version."""
    sha256: str
    """Digests of the result's files."""
    text: str
    rows: list[list[str | int | float]]

    def is_of(self, scan_sha256: str, inputs: str) -> bool:
        """Return whether it is the result of this scan and these inputs."""
        return (self.scan_sha256, self.inputs) == (scan_sha256, inputs)


_DONE = TypeAdapter(_Done)


def _read_record(path: Path) -> dict[str, _Done]:
    """Return the newest record of each result. A line that was cut off by an interruption is ignored: its scan is processed again."""
    found: dict[str, _Done] = {}
    if not path.is_file() or path.stat().st_size > _MAX_RECORD_BYTES:
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = read_json(line.encode(), where=str(path), max_bytes=_MAX_RECORD_BYTES)
            done = checked(_DONE, row, where=str(path))
        except InputError:
            continue
        found[done.result] = done
    return found


def _append(path: Path, done: _Done) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(done.to_json()) + "\n")
