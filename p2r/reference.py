"""References to published artefacts: `URL` or `URL@sha256:HEX` -> a location, and the digest that pins it.

A pin is the SHA-256 of the bytes of `manifest.json`. The manifest has the digest of every other file, so a pin fixes all of
them: weights, configuration, card, licence. Rows of a report record it as `backbone_sha256`.
"""

import hashlib
import re
from typing import NamedTuple

from p2r.errors import DamagedError, InputError

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".model")
"""Endings of weights files of other tools; any other reference names a folder of p2r."""

_PIN_LIKE = re.compile(r"@(?:sha\d+|md5)\b", re.IGNORECASE)
_RULE = "a pin is URL@sha256: and the 64 digits, 0 to f, that `p2r verify URL` prints"


class Reference(NamedTuple):
    """A location, and the manifest that must be there."""

    url: str
    sha256: str | None = None
    """Digest of `manifest.json`; None: any."""

    def __str__(self) -> str:
        return self.url if self.sha256 is None else f"{self.url}@sha256:{self.sha256}"

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
    """Split a reference into its URL and its pin.

    Raises:
        InputError: The pin is invalid.
    """
    url, mark, digest = text.rpartition("@sha256:")
    if mark and url and re.fullmatch(r"[0-9a-f]{64}", digest) and not _PIN_LIKE.search(url):
        return Reference(url, digest)
    if _PIN_LIKE.search(text):
        raise InputError(f"{text[:300]!r} has no valid pin: {_RULE}")
    return Reference(text)


def pinned(text: str, sha256: str | None) -> Reference:
    """Parse a reference whose pin may be given separately.

    Raises:
        InputError: The pin is invalid, or two pins differ.
    """
    if sha256 is None:
        return parse_reference(text)
    given = parse_reference(f"{parse_reference(text).url}@sha256:{sha256}")
    if parse_reference(text).sha256 not in (None, sha256):
        raise InputError(f"{text[:300]!r} has a pin, and sha256 gives another: {sha256}; leave one of them out")
    return given
