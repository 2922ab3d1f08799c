"""File names and URLs of scans.

Names are compared in Unicode's composed form (NFC), because a Mac may write `ü` as `u` and a diaeresis, and Linux as one
character. Paths stay unchanged.
"""

import unicodedata
from pathlib import Path
from urllib.parse import unquote

SUFFIXES = (".nii.gz", ".nii")
"""File endings of NIfTI files."""
HEADER_SUFFIXES = (".hdr.gz", ".hdr")
"""File endings of headers whose voxels are in another file."""
VOXEL_SUFFIXES = (".img.gz", ".img")
"""File endings of these voxel files, in the same order."""


def scan_key(path: str | Path) -> str:
    """Return the file name of a path or URL without `.nii`, `.nii.gz` or a similar suffix, in Unicode's composed form."""
    name = composed(str(path)).rstrip("/").rsplit("/", 1)[-1]
    for suffix in (*SUFFIXES, *HEADER_SUFFIXES, *VOXEL_SUFFIXES):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def lower_suffix(path: str) -> str:
    """Return a path or name with its suffix in lower case: `P01.NII.GZ` as `P01.nii.gz`."""
    for suffix in (*SUFFIXES, *HEADER_SUFFIXES, *VOXEL_SUFFIXES):
        if path.lower().endswith(suffix):
            return path[: -len(suffix)] + suffix
    return path


def local_path(path: str | Path) -> Path | None:
    """Return the file of a path or `file://` URL; None for another URL.

    As in a storage's URL, every character is part of the name: `%20` is not a space.
    """
    text = str(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(path)


def unquoted_hint(url: str) -> str:
    """Return the end of a message about an absent file: its name without `%20` and the like, if that file exists."""
    path = unquote(url.partition("@sha256:")[0].removeprefix("file://"))
    is_quoted = url.startswith("file://") and path != url.removeprefix("file://")
    return (
        f"; a file URL is not percent-encoded: did you mean file://{path}?" if is_quoted and Path(path).exists() else ""
    )


def pair_of(path: str) -> tuple[str, str] | None:
    """Return the header file and the voxel file of a scan in two files, given either; None for other names."""
    for header, voxels in zip(HEADER_SUFFIXES, VOXEL_SUFFIXES, strict=True):
        for suffix in (header, voxels):
            if path.lower().endswith(suffix):
                stem, is_upper = path[: -len(suffix)], path[-len(suffix) :].isupper()
                return (stem + header.upper(), stem + voxels.upper()) if is_upper else (stem + header, stem + voxels)
    return None


def composed(name: str) -> str:
    """Return a name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)
