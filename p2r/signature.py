"""Ed25519 signatures over the bytes of `manifest.json`, stored beside it in `manifest.sig`: 64 bytes, without a header.

OpenSSL makes the keys, and can check a signature without p2r:

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem
    openssl pkeyutl -verify -rawin -pubin -inkey public.pem -in manifest.json -sigfile manifest.sig

The package `model-signing` was not chosen: it requires sigstore, in-toto and blake3, and its identities need network
servers. It would hash the folder file by file, which our manifest has already done.

A public key is short, so a job or command may give it in place of its file: `ed25519:` and 64 digits.
"""

import re
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from p2r.errors import DamagedError, InputError

SIGNATURE = "manifest.sig"
SIGNATURE_BYTES = 64
_MAX_KEY_BYTES = 2**14
# Keys of small order, for which anyone can make signatures without a private key. These are the y of the points of order 1, 2, 4
# and 8, and of two points encoded beyond the field. The highest bit is the sign of x.
_SMALL_ORDER = frozenset(
    bytes.fromhex(digits)
    for digits in (
        "01" + "00" * 31,
        "ec" + "ff" * 30 + "7f",
        "00" * 32,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
_MAKE_KEY = "openssl genpkey -algorithm ed25519 -out private.pem"


def sign(content: bytes, *, key: Path) -> tuple[bytes, str]:
    """Sign the bytes of a manifest.

    Args:
        content: The bytes.
        key: PEM file of an Ed25519 private key that only its owner may read.

    Returns:
        The signature, and the public key as text.

    Raises:
        InputError: The key file cannot be used.
    """
    private = _read_private_key(key)
    return private.sign(content), _key_text(private.public_key())


def check_signature(content: bytes, signature: bytes | None, *, key: str, where: str) -> str:
    """Check that the owner of a key signed the bytes of a manifest.

    Args:
        content: The bytes.
        signature: Content of `manifest.sig`; None: absent.
        key: The public key: `ed25519:HEX`, or the path of a PEM file.
        where: Name of the signed artefact, for messages.

    Returns:
        The public key as text.

    Raises:
        DamagedError: The signature is absent, or was not made by this key over these bytes.
        InputError: The key cannot be used.
    """
    public = public_key(key)
    name = _key_text(public)
    *low, high = public.public_bytes_raw()
    if bytes([*low, high & 0x7F]) in _SMALL_ORDER:
        raise InputError(f"key {name} is of small order: anybody can sign for it; make another with {_MAKE_KEY}")
    if signature is None:
        raise DamagedError(f"{where} is not signed: it has no {SIGNATURE}; a signature by {name} is required")
    try:
        public.verify(signature, content)
    except InvalidSignature:
        raise DamagedError(
            f"the signature of {where} is not by {name} over this manifest: another key signed it, or manifest.json or "
            f"{SIGNATURE} was changed"
        ) from None
    return name


def public_key(key: str) -> Ed25519PublicKey:
    """Read a public key from `ed25519:HEX`, or from a PEM file.

    Raises:
        InputError: The key is neither.
    """
    if key.startswith("ed25519:"):
        digits = key.removeprefix("ed25519:")
        if not re.fullmatch(r"[0-9a-f]{64}", digits):
            raise InputError(f"key {key[:100]!r}: a public key is ed25519: and 64 digits, 0 to f, or a PEM file")
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(digits))
    content = _read_pem(Path(key))
    if b"PRIVATE KEY" in content:
        raise InputError(f"key {key} is a private key: give the public one, openssl pkey -in {key} -pubout")
    try:
        found = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"key {key} is not a public key in PEM; make one with openssl pkey -pubout") from None
    if not isinstance(found, Ed25519PublicKey):
        raise InputError(f"key {key} is not an Ed25519 key; make one with {_MAKE_KEY}")
    return found


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    content = _read_pem(path)
    if stat.S_IMODE(path.expanduser().stat().st_mode) & 0o077:
        raise InputError(f"key {path} can be read by other users: chmod 600 {path}")
    try:
        found = load_pem_private_key(content, password=None)
    except TypeError:
        raise InputError(f"key {path} is encrypted: decrypt it for this command with openssl pkey -in {path}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"key {path} is not a private key in PEM; make one with {_MAKE_KEY}") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise InputError(f"key {path} is not an Ed25519 key; make one with {_MAKE_KEY}")
    return found


def _read_pem(path: Path) -> bytes:
    try:
        with path.expanduser().open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # ValueError: the path has a NUL; RuntimeError: no home folder for `~`
        raise InputError(f"key {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _key_text(public: Ed25519PublicKey) -> str:
    return f"ed25519:{public.public_bytes_raw().hex()}"
