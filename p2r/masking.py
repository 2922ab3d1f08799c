"""Secrets: recognise secret names and values, and mask them in text.

    variables with secret names, patterns of known tokens -> `masked` text, refused jobs, variables withheld from Ray

Every message is masked before anyone can read it: `P2RError` masks its text when it is created, `p2r.errors.error_text` masks
other exceptions, and the log masks each line. A value is found in plain form, and as written by `repr`, JSON,
percent-encoding and base64. A part of a value is not found, nor is a value in another encoding.
"""

import base64
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus, unquote

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|PRIVATE_?KEY|API_?KEY|ACCESS_?KEY|CONNECTION_STRING|WEBHOOK|(?:^|_)(?:KEY|PAT|SAS|JWT)$|_(?:PASS|PWD)$",
    re.IGNORECASE,
)
_NO_SECRET_NAME = re.compile(r"_(FILE|PATH|DIR|URI|URL|ENDPOINT|MODE|FORMAT)$", re.IGNORECASE)
_URL_WITH_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@]*:(\S+)@[^\s@]*")
_MIN_SECRET = 6
"""Shortest secret that is masked, characters: masking shorter ones would hide half of every line."""
_MIN_LINE = 16
"""Shortest masked line of a multi-line secret, characters: shorter ones also occur in other texts."""
_MASK = "***"
# Patterns run on text from strangers. Repetitions are bounded or cannot start inside themselves, so none takes quadratic time.
_TOKENS = (
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS
    r"\bhf_[A-Za-z0-9]{16,}",  # Hugging Face
    r"\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_[A-Za-z0-9_]{16,}",
    r"\bglpat-[A-Za-z0-9_-]{16,}",
    r"\bAIza[A-Za-z0-9_-]{30,}|\bya29\.[A-Za-z0-9_-]{16,}",  # Google
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",  # JSON web tokens
    r"\bhooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9_/-]{16,}",
    r"\bdiscord(?:app)?\.com/api/webhooks/[0-9]+/[A-Za-z0-9_-]{16,}",
    r"\bsk-(?:[a-z]{2,12}-)?[A-Za-z0-9_]{20,}|\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",  # OpenAI and similar; Stripe
    r"\bnpm_[A-Za-z0-9]{30,}|\bpypi-AgE[A-Za-z0-9_-]{16,}|\bGOCSPX-[A-Za-z0-9_-]{16,}|\bdop_v1_[a-f0-9]{32,}",
    r"(?i:\b(?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^\s;'\"]{8,}",  # Azure's connection strings
    r"(?i:;\s?(?:Password|Pwd)=)[^\s;'\"]+",  # other connection strings
)
_SIGNED = r"[\w.-]{0,40}(?:signature|credential|token|access_?key_?id|api_?key|password|passwd|secret)|sig"
"""Secret names in queries. In presigned URLs they differ by prefix, as in `X-Amz-`, `X-Goog-`, `x-oss-`, `q-`."""
_AUTHORITY = r"\b[a-z][a-z0-9+.-]{0,31}://(?=[^/?#\s'\"]*@)"
_AUTHORITY_WITH_SLASH = r"\b[a-z][a-z0-9+.-]{0,31}://(?=[^/?#\s'\"@:\[]{0,512}:(?!\d{1,5}[/?#])[^\s'\"]{0,512}@)"
"""A password may hold a slash, as secret keys of AWS do; digits before the first slash are a port."""
_OPTION = r"(?<![\w-])--?[\w-]{0,40}(?:token|password|passwd|passphrase|secret|credentials?|(?:api|access|secret|private)-?key)"
"""An option of a command; its value follows after `=` or a blank, or is the next text of a list."""
_QUOTED = r"'[^'\n]{6,512}'|\"[^\"\n]{6,512}\""
_AUTHORIZATION = r"\b(?:proxy-)?authorization['\"]?\s{0,9}[:=]\s{0,9}['\"]?(?:[\w-]{1,20}\s{1,9})?"
_PATTERNS = (
    # https://user:password@host, and s3://KEY:SECRET@bucket
    (re.compile(rf"({_AUTHORITY})[^/?#\s'\"]*@", re.IGNORECASE), rf"\1{_MASK}@"),
    (re.compile(rf"({_AUTHORITY_WITH_SLASH})[^\s'\"]{{0,1025}}@", re.IGNORECASE), rf"\1{_MASK}@"),
    # signatures of presigned URLs, and tokens in queries
    (re.compile(rf"([?&;#](?:{_SIGNED})=)[^&\s'\"]+", re.IGNORECASE), rf"\1{_MASK}"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1 {_MASK}"),
    (re.compile(r"\b(AWS4-HMAC-SHA256)\s+Credential=.{0,400}?Signature=[^\s'\"]+", re.IGNORECASE), rf"\1 {_MASK}"),
    (
        re.compile(
            rf"({_OPTION}['\"]?(?:=|\s{{0,9}},\s{{0,9}}|\s{{1,9}}))(?:{_QUOTED}|['\"]?[^\s'\",;]{{6,}})", re.IGNORECASE
        ),
        rf"\1{_MASK}",
    ),
    (re.compile(rf"({_AUTHORIZATION})[^\s'\",;]{{4,}}", re.IGNORECASE), rf"\1{_MASK}"),
    (re.compile(r"(\btoken['\"]?\s{0,9}[=:]\s{0,9}['\"]?)[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE), rf"\1{_MASK}"),
    # aws_secret_access_key = ..., "SecretAccessKey": "...", RAY_AUTH_TOKEN=...
    (
        re.compile(
            r"((?:(?:secret|access|account|api)[_-]?(?:access[_-]?)?key(?:[_-]?(?:secret|id))?|(?:session|auth|security|access|api|hf)[_-]?token|"
            r"client[_-]?secret|password|passwd|passphrase|pseudonym_key)['\"]?\s{0,9}[=:]\s{0,9}['\"]?)"
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
            rf"(?i:{_AUTHORITY_WITH_SLASH})",
            rf"(?i:(?:{_AUTHORIZATION}|{_OPTION}[=\s])(?=[^\s]{{0,512}}[0-9])[A-Za-z0-9._~+/=-]{{16,}})",
            rf"(?i:[?&;#](?:{_SIGNED})=[^&\s])",
            r"(?i:\b(?:Bearer|Basic)\s+(?=[^\s]*[0-9])[A-Za-z0-9._~+/=-]{16,})",  # requires a digit, which sentences lack
            r"-----BEGIN [A-Z ]*PRIVATE KEY",
        )
    )
)


@functools.lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Return whether a variable or job key is secret by its name; the path or URL of a secret is not."""
    return _SECRET_NAME.search(name) is not None and _NO_SECRET_NAME.search(name) is None


def looks_secret(value: str) -> bool:
    """Return whether a value has a known form of secret: a token, user info in a URL, a URL signature, a private key."""
    return _SECRET_VALUE.search(value) is not None


def masked(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """Return the text with secrets masked.

    Args:
        text: Text of any length.
        environment: Variables whose secret values are masked; None: this process's.
    """
    for secret in sorted(_list_secrets(os.environ if environment is None else environment), key=len, reverse=True):
        text = text.replace(secret, _MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _list_secrets(environment: Mapping[str, str]) -> Iterable[str]:
    for name, value in environment.items():
        parts = value.splitlines() if "\n" in value else ()
        secret = (
            [value, *(part for part in parts if len(part) >= _MIN_LINE)]
            if is_secret_name(name)
            else _url_passwords(value)
        )
        for one in secret:
            if len(one) >= _MIN_SECRET:
                yield from _encodings(one)


def _url_passwords(value: str) -> list[str]:
    """Return the password in a URL, such as a proxy's, both as written and decoded."""
    found = _URL_WITH_PASSWORD.fullmatch(value)
    return [found[1], unquote(found[1])] if found else []


@functools.lru_cache(maxsize=64)
def _encodings(value: str) -> frozenset[str]:
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
