"""Names of subjects, scans and files -> the published names: the names themselves, or keyed hashes.

A pseudonym is a truncated HMAC-SHA256 under the secret in `P2R_PSEUDONYM_KEY`. Without the secret it cannot be reversed,
not even by trying names. With the secret, the same name always gives the same pseudonym, so that a corpus can grow and
leaks can be found. The secret is read only from the environment and never written. A corpus stores the `key_id` instead:
it shows that another secret is set, and reveals nothing else.

Sizes and times of files and the job's sources become keyed digests, too. Shape, spacing and digest of the voxels are not
hidden: anyone with the same scan can recognise it.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from p2r.documents import as_utf8
from p2r.errors import DataError

VARIABLE = "P2R_PSEUDONYM_KEY"
SCHEME = "hmac-sha256"

_DIGITS = 16
_MIN_SECRET = 16
# Parts of BIDS names that stay: numbers and words of the standard, never free text.
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
    """Published names of one cohort."""

    cohort: str
    secret: bytes | None = None
    """Secret of the pseudonyms; None: names are published unchanged."""

    def subject(self, name: str) -> str:
        """Return the published name of a subject."""
        return self._publish("subject", f"{self.cohort}/{name}", name)

    def key(self, key: str) -> str:
        """Return the published name of a record."""
        return self._publish("key", key, key)

    def source(self, path: str) -> str:
        """Return the published name of a file, folder or URL."""
        return self._publish("source", path, path)

    def state(self, num_bytes: int, modified: str) -> tuple[int | None, str]:
        """Return the size of a file and its time or tag, which reveal a change.

        A size can identify a known file, and a time can reveal when a person was scanned: pseudonyms put both into one digest.
        """
        if self.secret is None:
            return num_bytes, modified
        return None, _digest(self.secret, "state", f"{num_bytes}\n{modified}")

    def is_state(self, recorded: tuple[int | None, str], num_bytes: int, modified: str) -> bool:
        """Return whether the state in a ledger is that of a file now. Older corpora store the size beside the digest."""
        states = [self.state(num_bytes, modified)]
        if self.secret is not None:
            states.append((num_bytes, _digest(self.secret, "modified", modified) if modified else ""))
        return recorded in states

    def asked(self, digest: str) -> str:
        """Return the published digest of an ingest section; keyed, because unkeyed it would allow guesses of paths and names."""
        if self.secret is None:
            return digest
        return hmac.new(self.secret, f"p2r/asked\n{digest}".encode(), hashlib.sha256).hexdigest()

    def message(self, text: str) -> str:
        """Return a message that may quote names; empty with pseudonyms."""
        return as_utf8(text) if self.secret is None else ""

    def entities(self, found: Mapping[str, str]) -> dict[str, str]:
        """Return the entities of a BIDS name; with pseudonyms, only numbers and words of the standard."""
        if self.secret is None:
            return dict(sorted(found.items()))
        return {name: value for name, value in sorted(found.items()) if _is_technical(name, value)}

    def statement(self) -> dict[str, str]:
        """Return the manifest's statement about names."""
        if self.secret is None:
            return {"names": "plain"}
        return {"names": SCHEME, "key_id": _digest(self.secret, "key_id", "")}

    def _publish(self, kind: str, name: str, plain: str) -> str:
        return as_utf8(plain) if self.secret is None else _digest(self.secret, kind, as_utf8(name))


def names_of(cohort: str, *, pseudonyms: bool) -> Names:
    """Return the names of a cohort; pseudonyms use the secret in the environment.

    Raises:
        DataError: if the secret is not set, or is shorter than 16 characters.
    """
    if not pseudonyms:
        return Names(cohort)
    secret = os.environ.get(VARIABLE, "")
    if len(secret) < _MIN_SECRET:
        raise DataError(
            f"pseudonyms need a secret of {_MIN_SECRET} or more characters in the environment variable {VARIABLE} "
            f"({'it has ' + str(len(secret)) if secret else 'it is not set'}): make one with `openssl rand -hex 32`. Keep it for "
            "the lifetime of the corpus"
        )
    return Names(cohort, secret.encode())


def names_if_known(cohort: str, *, pseudonyms: bool) -> Names | None:
    """Return the names of a cohort; None for pseudonyms without a secret in the environment."""
    try:
        return names_of(cohort, pseudonyms=pseudonyms)
    except DataError:
        return None


def names_for(statement: Mapping[str, str], cohort: str) -> Names:
    """Return the names of a corpus, from the `deidentification` of its manifest.

    Raises:
        DataError: if they are pseudonyms made with another secret than the one in the environment.
    """
    if statement.get("names", "plain") == "plain":
        return Names(cohort)
    names = names_of(cohort, pseudonyms=True)
    if names.statement()["key_id"] != statement.get("key_id"):
        raise DataError(
            f"the corpus's pseudonyms were made with another secret than the one in {VARIABLE}, so subjects cannot be looked up; "
            "set the secret that made the corpus"
        )
    return names


def _digest(secret: bytes, kind: str, name: str) -> str:
    return hmac.new(secret, f"p2r/{kind}\n{name}".encode(), hashlib.sha256).hexdigest()[:_DIGITS]


def _is_technical(name: str, value: str) -> bool:
    if name in _NUMBERED:
        return re.fullmatch(r"\d{1,4}", value, re.ASCII) is not None
    known = {"suffix": _SUFFIXES, "datatype": _DATATYPES, **_FIXED}.get(name)
    return known is not None and value in known
