"""Names of subjects, scans and files -> what a corpus publishes of them: the names themselves, or keyed hashes.

A pseudonym is the beginning of HMAC-SHA256 under the secret in `P2R_PSEUDONYM_KEY`: without the secret nobody can tell
whose it is, not even by trying names; with it, the same name always gives the same pseudonym, so that a corpus can grow
and a leak can still be found. The secret comes from the environment alone and is written nowhere. A corpus holds the
`key_id` instead: enough to tell that another secret is set, useless for undoing anything.

Sizes and times of files, and the job's own sources, become keyed digests as well. Voxels speak for themselves: their shape,
spacing and digest stay, so that whoever has the same scan can recognise it.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2r.documents import as_utf8
from p2r.errors import DataError

VARIABLE = "P2R_PSEUDONYM_KEY"
SCHEME = "hmac-sha256"

_DIGITS = 16
_MIN_SECRET = 16
# What may stay of BIDS names: words of the standard and numbers, nothing that somebody made up.
_SUFFIXES = frozenset(
    ("T1w", "T2w", "T2starw", "PDw", "FLAIR", "UNIT1", "MP2RAGE", "MEGRE", "MESE", "VFA", "MTS", "MTR", "angio", "bold", "sbref",
     "dwi", "asl", "m0scan", "epi", "fieldmap", "phasediff", "magnitude", "magnitude1", "magnitude2", "phase1", "phase2",
     "T1map", "T2map", "T2starmap", "R1map", "R2map", "R2starmap", "PDmap", "MTsat")
)  # fmt: skip
_DATATYPES = frozenset(("anat", "func", "dwi", "fmap", "perf"))
_NUMBERED = frozenset(("run", "echo", "flip", "inv", "split", "chunk"))
_FIXED = {"part": frozenset(("mag", "phase", "real", "imag")), "mt": frozenset(("on", "off"))}


@dataclass(frozen=True)
class Names:
    """How the names of one cohort appear in its corpus."""

    cohort: str
    secret: bytes | None = None
    """None: as they are."""

    def subject(self, name: str) -> str:
        """Name of a subject."""
        return self._published("subject", f"{self.cohort}/{name}", name)

    def key(self, key: str) -> str:
        """Name of a record."""
        return self._published("key", key, key)

    def source(self, path: str) -> str:
        """Name of a file, folder or URL."""
        return self._published("source", path, path)

    def state(self, num_bytes: int, modified: str) -> tuple[int | None, str]:
        """Size of a file and its time or tag, by which a change is noticed.

        A size tells known files apart, and a time when somebody was scanned: under pseudonyms both are in one digest.
        """
        if self.secret is None:
            return num_bytes, modified
        return None, _digest(self.secret, "state", f"{num_bytes}\n{modified}")

    def is_state(self, row: Mapping[str, Any], num_bytes: int, modified: str) -> bool:
        """Tell whether a ledger's row is of a file as it is now. Corpora of earlier versions have its size beside its digest."""
        states = [self.state(num_bytes, modified)]
        if self.secret is not None:
            states.append((num_bytes, _digest(self.secret, "modified", modified) if modified else ""))
        return (row["num_bytes"], row["modified"]) in states

    def asked(self, digest: str) -> str:
        """Digest of an ingest section, which has paths and names: without the secret nobody can try a section."""
        if self.secret is None:
            return digest
        return hmac.new(self.secret, f"p2r/asked\n{digest}".encode(), hashlib.sha256).hexdigest()

    def message(self, text: str) -> str:
        """Text that may quote names: nothing is left of it under pseudonyms."""
        return as_utf8(text) if self.secret is None else ""

    def entities(self, found: Mapping[str, str]) -> dict[str, str]:
        """Entities of a BIDS name; under pseudonyms only numbers and words of the standard."""
        if self.secret is None:
            return dict(sorted(found.items()))
        return {name: value for name, value in sorted(found.items()) if _is_technical(name, value)}

    def statement(self) -> dict[str, str]:
        """What the manifest says about names."""
        if self.secret is None:
            return {"names": "plain"}
        return {"names": SCHEME, "key_id": _digest(self.secret, "key_id", "")}

    def _published(self, kind: str, name: str, plain: str) -> str:
        return as_utf8(plain) if self.secret is None else _digest(self.secret, kind, as_utf8(name))


def names_of(cohort: str, *, pseudonyms: bool) -> Names:
    """Return the names of a cohort, with the secret from the environment if they are to be pseudonyms.

    Raises:
        DataError: if the secret is not set, or is shorter than 16 characters.
    """
    if not pseudonyms:
        return Names(cohort)
    secret = os.environ.get(VARIABLE, "")
    if len(secret) < _MIN_SECRET:
        raise DataError(
            f"pseudonyms need a secret of {_MIN_SECRET} or more characters in the environment variable {VARIABLE} "
            f"({'it has ' + str(len(secret)) if secret else 'it is not set'}): make one with `openssl rand -hex 32`, and keep it "
            "as long as the corpus"
        )
    return Names(cohort, secret.encode())


def names_if_known(cohort: str, *, pseudonyms: bool) -> Names | None:
    """Return the names of a cohort; None if they are to be pseudonyms and the environment has no secret."""
    try:
        return names_of(cohort, pseudonyms=pseudonyms)
    except DataError:
        return None


def names_for(statement: Mapping[str, Any], cohort: str) -> Names:
    """Return the names as a corpus has them, from the `deidentification` of its manifest.

    Raises:
        DataError: if they are pseudonyms, and the secret that made them is not the one in the environment.
    """
    if statement.get("names", "plain") == "plain":
        return Names(cohort)
    names = names_of(cohort, pseudonyms=True)
    if names.statement()["key_id"] != statement.get("key_id"):
        raise DataError(
            f"the corpus's subjects are pseudonyms under another secret than the one in {VARIABLE}: whether a subject is in it "
            "cannot be told; set the secret that made the corpus"
        )
    return names


def _digest(secret: bytes, kind: str, name: str) -> str:
    return hmac.new(secret, f"p2r/{kind}\n{name}".encode(), hashlib.sha256).hexdigest()[:_DIGITS]


def _is_technical(name: str, value: str) -> bool:
    if name in _NUMBERED:
        return re.fullmatch(r"\d{1,4}", value, re.ASCII) is not None
    known = {"suffix": _SUFFIXES, "datatype": _DATATYPES, **_FIXED}.get(name)
    return known is not None and value in known
