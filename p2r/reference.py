"""References to published artefacts: `URL`, `URL@sha256:HEX` or `NAME@stable` -> a location, and the digest that pins it.

A pin is the SHA-256 of the bytes of `manifest.json`. The manifest has the digest of every other file, so a pin fixes all of
them: weights, configuration, card, licence. Rows of a report record it as `backbone_sha256`.

A pointer is a word such as `stable` that can be moved from version to version. `NAME` is then the folder that holds the
versions, and `p2r.pointers` turns the reference into the pin of one. In `hf://ORG/NAME@REVISION`, the hub does so. A folder whose
own name ends like a pointer is given with a slash at its end.
"""

import hashlib
import re
from typing import NamedTuple

from p2r.errors import DamagedError, InputError

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".model")
"""Endings of weights files of other tools; any other reference names a folder of p2r."""

POINTER = r"[a-z][a-z0-9-]{0,31}"
"""Pattern of a pointer's name."""
_POINTED = re.compile(rf"(?P<url>(?:.*/)?[^/@]+)@(?P<pointer>{POINTER})", re.DOTALL)
_PIN_LIKE = re.compile(r"@(?:sha\d+|md5)\b", re.IGNORECASE)
_RULE = "a pin is URL@sha256: and the 64 digits, 0 to f, that `p2r verify URL` prints"


class Reference(NamedTuple):
    """A location, and the manifest that must be there."""

    url: str
    sha256: str | None = None
    """Digest of `manifest.json`; None: any."""
    pointer: str | None = None
    """Pointer to follow; `url` is then the folder that holds the versions."""

    def __str__(self) -> str:
        url = self.url if self.pointer is None else f"{self.url}@{self.pointer}"
        return url if self.sha256 is None else f"{url}@sha256:{self.sha256}"

    def check(self, content: bytes) -> None:
        """Compare the bytes of a `manifest.json` with the pin.

        Raises:
            DamagedError: The digest differs from the pin.
        """
        found = hashlib.sha256(content).hexdigest()
        if self.sha256 not in (None, found):
            raise DamagedError(
                f"{self.url} is pinned to the manifest with sha256 {self.sha256}, and its manifest.json has {found}: it was "
                "exchanged or damaged, or the pin is for another version"
            )


def names_weights_file(text: str) -> bool:
    """Return whether a reference names a weights file, by its ending."""
    return text.partition("@sha256:")[0].endswith(WEIGHTS_SUFFIXES)


def parse_reference(text: str) -> Reference:
    """Split a reference into its URL, its pointer and its pin.

    Raises:
        InputError: The pin is invalid.
    """
    url, mark, digest = text.rpartition("@sha256:")
    if mark and url and re.fullmatch(r"[0-9a-f]{64}", digest) and not _PIN_LIKE.search(url):
        return _split_pointer(url)._replace(sha256=digest)
    if _PIN_LIKE.search(text):
        raise InputError(f"{text[:300]!r} has no valid pin: {_RULE}")
    return _split_pointer(text)


def _split_pointer(url: str) -> Reference:
    scheme, has_scheme, place = url.partition("://")
    match = _POINTED.fullmatch(url)
    if match is None or scheme == "hf" or (has_scheme and "/" not in place):  # a name is below a bucket or folder
        return Reference(url)
    return Reference(match["url"], pointer=match["pointer"])


def pinned(text: str, sha256: str | None) -> Reference:
    """Parse a reference whose pin may be given separately.

    Raises:
        InputError: The pin is invalid, or two pins differ.
    """
    if sha256 is None:
        return parse_reference(text)
    found = parse_reference(text)
    if found.sha256 not in (None, sha256):
        raise InputError(f"{text[:300]!r} has a pin, and sha256 gives another: {sha256}; leave one of them out")
    return found._replace(sha256=parse_reference(f"{found.url}@sha256:{sha256}").sha256)
