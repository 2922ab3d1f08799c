"""Secrets: which names and values are secret, and text without them.

    variables whose names say so, patterns of known tokens -> `masked` text, refused jobs, variables that Ray never sees

Every message passes here before anybody can read it: `P2RError` masks its text when it is made, `p2r.errors.error_text` that of any other
exception, and the log masks each line. A value is found as it is, and as `repr`, JSON, percent-encoding and base64 write it. A part of a
value, or one that another program has encoded otherwise, is not found.
"""

import base64
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|PRIVATE_?KEY|API_?KEY|ACCESS_?KEY|CONNECTION_STRING|(?:^|_)(?:KEY|PAT|SAS)$",
    re.IGNORECASE,
)
_NO_SECRET_NAME = re.compile(r"_(FILE|PATH|DIR|URI|URL|ENDPOINT|MODE|FORMAT)$", re.IGNORECASE)
_MIN_SECRET = 6
"""Letters: masking a shorter value would hide half of every line."""
_MASK = "***"
_TOKENS = (
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS
    r"\bhf_[A-Za-z0-9]{16,}",  # Hugging Face
    r"\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_[A-Za-z0-9_]{16,}",
    r"\bglpat-[A-Za-z0-9_-]{16,}",
    r"\bAIza[A-Za-z0-9_-]{30,}|\bya29\.[A-Za-z0-9_-]{16,}",  # Google
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",  # JSON web tokens
)
_SIGNED = (
    r"X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|sig|token|access_token|api_?key|password"
)
_AUTHORITY = r"\b[a-z][a-z0-9+.-]*://(?=[^/?#\s'\"]*@)"
_PATTERNS = (
    # https://user:password@host, and s3://KEY:SECRET@bucket
    (re.compile(rf"({_AUTHORITY})[^/?#\s'\"]*@", re.IGNORECASE), rf"\1{_MASK}@"),
    # signatures of presigned URLs, and tokens in queries
    (re.compile(rf"([?&;](?:{_SIGNED})=)[^&\s'\"]+", re.IGNORECASE), rf"\1{_MASK}"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1 {_MASK}"),
    (re.compile(r"\b(AWS4-HMAC-SHA256)\s+Credential=.*?Signature=[^\s'\"]+", re.IGNORECASE), rf"\1 {_MASK}"),
    # aws_secret_access_key = ..., "SecretAccessKey": "...", RAY_AUTH_TOKEN=...
    (
        re.compile(
            r"((?:secret_?(?:access_?)?key|session_?token|auth_?token|security_?token|password|passwd|pseudonym_key)['\"]?\s*[=:]\s*['\"]?)"
            r"[^\s'\",;&}]{6,}",
            re.IGNORECASE,
        ),
        rf"\1{_MASK}",
    ),
    (re.compile("|".join(_TOKENS)), _MASK),
    (
        re.compile(r"-----BEGIN ([A-Z ]*)PRIVATE KEY-----.*?(?:-----END \1PRIVATE KEY-----|\Z)", re.DOTALL),
        _MASK,
    ),
)
_SECRET_VALUE = re.compile(
    "|".join(
        (
            *_TOKENS,
            rf"(?i:{_AUTHORITY})",
            rf"(?i:[?&;](?:{_SIGNED})=[^&\s])",
            r"(?i:\b(?:Bearer|Basic)\s+(?=[^\s]*[0-9])[A-Za-z0-9._~+/=-]{16,})",  # a digit: a sentence has none
            r"-----BEGIN [A-Z ]*PRIVATE KEY",
        )
    )
)


@functools.lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Tell whether a variable, or a key of a job, holds a secret by its name; a path or URL of one does not."""
    return _SECRET_NAME.search(name) is not None and _NO_SECRET_NAME.search(name) is None


def looks_secret(value: str) -> bool:
    """Tell whether a value holds a known form of secret: a token, user info in a URL, a signature of one, a private key."""
    return _SECRET_VALUE.search(value) is not None


def masked(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """Return the text without secrets.

    Args:
        text: Of any length.
        environment: Variables whose secret values are masked; None: this process's.
    """
    for secret in sorted(_secrets(os.environ if environment is None else environment), key=len, reverse=True):
        text = text.replace(secret, _MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _secrets(environment: Mapping[str, str]) -> Iterable[str]:
    for name, value in environment.items():
        if len(value) >= _MIN_SECRET and is_secret_name(name):
            yield from _forms(value)


@functools.lru_cache(maxsize=64)
def _forms(value: str) -> frozenset[str]:
    encoded = value.encode(errors="surrogateescape")
    plain, safe = base64.b64encode(encoded).decode(), base64.urlsafe_b64encode(encoded).decode()
    forms = {
        value,
        repr(value)[1:-1],
        repr(encoded)[2:-1],
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        quote(value, safe="", errors="surrogateescape"),
        quote(value, errors="surrogateescape"),
        quote_plus(value, errors="surrogateescape"),
        plain.rstrip("="),
        safe.rstrip("="),
    }
    return frozenset(forms)
