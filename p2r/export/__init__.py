"""Exports: a published backbone or model -> a folder that another tool reads with its own commands.

Each format is one module with a function `write(source, folder)`, and one row of `p2r.exports.EXPORTS`. A module checks that the written
thing gives the outputs of p2r, and raises otherwise. The folder appears under its name only after that.
"""

import os
import re
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2r.errors import InputError, how_to_install
from p2r.exports import EXPORTS, Export, ExportName, reason_against
from p2r.files import expanded

if TYPE_CHECKING:
    from p2r.export.source import Source, Written

_URL = re.compile(r"(?:file|s3|gs|az|hf):/")
"""Start of a URL after a `Path` has joined its slashes."""


def export_name(text: str) -> ExportName:
    """Return the name of a format.

    Raises:
        InputError: The format is unknown.
    """
    for name in EXPORTS:
        if name == text:
            return name
    raise InputError(f"--to {text}: must be one of {', '.join(EXPORTS)}")


def export(reference: str, *, to: ExportName, folder: Path, key: str | None = None) -> list[str]:
    """Export a published backbone or model, and return lines about the result.

    Args:
        reference: URL or path of the backbone or model, with or without a pin.
        to: Format.
        folder: New or empty folder for the result.
        key: Public key that must have signed the backbone or model; None: no signature required.

    Raises:
        InputError: The folder is not empty, the backbone or model cannot be read, or the format cannot hold it. Or a package is
            missing, or the result does not give the outputs of p2r.
    """
    check_folder(folder)
    from p2r.export.source import open_source

    return export_source(open_source(reference, key=key), to=to, folder=folder)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something, or cannot be written, before anything is computed.

    Raises:
        InputError: The folder cannot be used.
    """
    if _URL.match(str(folder)):
        raise InputError(
            f"-o {folder}: an export is written to a folder of this machine; give a path, and copy the folder"
        )
    folder = expanded(folder).absolute()
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"-o {folder} is not empty: name a new folder, or empty this one")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"-o {folder} is a file: name a new folder")
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"-o {folder}: {parent} cannot be written")


def export_source(source: "Source", *, to: ExportName, folder: Path) -> list[str]:
    """Export a loaded backbone or model. Arguments and errors as in `export`."""
    found = EXPORTS[to]
    model = source.model
    reason = reason_against(
        to,
        network=model.name,
        level=model.level,
        normalisation=model.normalisation,
        num_contrasts=model.in_channels,
    )
    if reason is not None:
        raise InputError(f"{source.name} cannot be exported as {found.title}: {reason}")
    write: Callable[[Source, Path], Written] = _import(found).write
    lines: list[str] = []

    def fill(temporary: Path) -> None:
        written = write(source, temporary)
        lines.extend(
            [
                f"wrote {folder}: {found.title} of the {source.noun} {source.name}, {_describe_size(temporary)}",
                *(f"  {path}  {size}" for path, size in _list_files(temporary)),
                *(f"checked: {check}" for check in written.checks),
                *(f"note: {note}" for note in written.notes),
                *(f"next: {command}" for command in written.commands),
            ]
        )

    write_folder(folder, fill)
    return lines


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside `folder`, and give it that name only once it is complete.

    Raises:
        InputError: The name was taken meanwhile.
    """
    target = folder.expanduser().absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        temporary = Path(name, target.name)
        temporary.mkdir()
        fill(temporary)
        _move(temporary, target)


def _import(found: Export) -> Any:
    try:
        return import_module(found.module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "p2r") or found.extra is None:
            raise
        raise InputError(
            f"the {found.title} needs the package {package}, which is not installed here: {how_to_install(found.extra)}"
        ) from None


def _move(temporary: Path, target: Path) -> None:
    """Give a finished folder its name. A target that got files meanwhile is left as it is."""
    try:
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise InputError(f"-o {target}: the finished folder cannot get its name: {error.strerror}") from error


def _list_files(folder: Path) -> list[tuple[str, str]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), _format_bytes(path.stat().st_size)) for path in paths]


def _describe_size(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{len(files)} files, {_format_bytes(sum(path.stat().st_size for path in files))}"


def _format_bytes(num_bytes: int) -> str:
    if num_bytes < 2**10:
        return f"{num_bytes} bytes"
    return f"{num_bytes / 2**10:.1f} KiB" if num_bytes < 2**20 else f"{num_bytes / 2**20:.1f} MiB"
