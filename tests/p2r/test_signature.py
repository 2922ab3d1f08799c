"""A signature over a manifest is by its key, over these bytes, or refused by name."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from p2r.artefact import Manifest, Published, open_artefact
from p2r.backbone import load_backbone
from p2r.errors import CheckpointError, DamagedError, InputError
from p2r.reference import parse_reference
from p2r.signature import check_signature
from tests.publishing import publish_toy


def write_keys(folder: Path, name: str, private: Any = None, *, password: bytes | None = None) -> tuple[Path, Path]:
    """Write a private and a public key, and return their paths."""
    private = private or Ed25519PrivateKey.generate()
    protection = NoEncryption() if password is None else BestAvailableEncryption(password)
    paths = folder / f"{name}.pem", folder / f"{name}.pub"
    paths[0].touch(mode=0o600)
    paths[0].write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection))
    paths[1].write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return paths


@pytest.fixture
def made(tmp_path: Path) -> Published[Manifest]:
    return publish_toy(str(tmp_path / "toy/1"))


def sign(made: Published[Manifest], key: Path) -> str:
    return open_artefact(parse_reference(made["pin"])).sign(key)


def test_what_its_owner_signed_loads_with_the_public_key_as_file_or_text(
    made: Published[Manifest], tmp_path: Path
) -> None:
    private, public = write_keys(tmp_path, "mine")
    name = sign(made, private)
    assert name.startswith("ed25519:") and sign(made, private) == name
    for key in (str(public), name):
        assert load_backbone(made["url"], key=key).manifest["pin"] == made["pin"]
    assert open_artefact(parse_reference(made["url"])).unnamed_files() == []
    assert publish_toy(made["url"])["pin"] == made["pin"]  # a signature changes nothing that is compared


def test_no_signature_another_key_and_another_manifest_are_refused(made: Published[Manifest], tmp_path: Path) -> None:
    (mine, _), (_, theirs) = write_keys(tmp_path, "mine"), write_keys(tmp_path, "theirs")
    with pytest.raises(DamagedError, match=r"is not signed: it has no manifest\.sig"):
        load_backbone(made["url"], key=str(theirs))
    name = sign(made, mine)
    with pytest.raises(DamagedError, match=r"is not by ed25519:[0-9a-f]{64} over this manifest"):
        load_backbone(made["url"], key=str(theirs))
    manifest = Path(made["url"].removeprefix("file://"), "manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "licence": "none at all"}))
    load_backbone(made["url"])
    with pytest.raises(DamagedError, match="is not by ed25519:"):
        load_backbone(made["url"], key=name)


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 64, b"x" * 65, b"x" * 10_000])
def test_what_is_no_signature_is_refused(made: Published[Manifest], tmp_path: Path, content: bytes) -> None:
    private, public = write_keys(tmp_path, "mine")
    signature = Path(made["url"].removeprefix("file://"), "manifest.sig")
    signature.write_bytes(content)
    with pytest.raises(DamagedError, match="is not by ed25519:"):
        load_backbone(made["url"], key=str(public))
    if len(content) == 64:  # it may be another key's
        with pytest.raises(
            CheckpointError, match=r"has a signature that is not by .*; delete manifest\.sig to replace it"
        ):
            sign(made, private)
    else:
        load_backbone(made["url"], key=sign(made, private))


def test_a_private_key_in_the_home_folder_is_found(
    made: Published[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = write_keys(tmp_path, "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sign(made, Path("~", private.name)).startswith("ed25519:")


@pytest.mark.parametrize("key", ["01" + "00" * 31, "01" + "00" * 30 + "80", "ec" + "ff" * 30 + "7f"])
def test_a_key_for_which_anybody_can_sign_is_refused(key: str) -> None:
    forged = bytes([1, *[0] * 63])  # R is the neutral point, S is 0
    with pytest.raises(InputError, match="is of small order: anybody can sign for it"):
        check_signature(b"any bytes", forged, key=f"ed25519:{key}", where="a manifest")


def test_keys_that_cannot_be_used_are_refused(made: Published[Manifest], tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "mine")
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    rsa_private, rsa_public = write_keys(tmp_path, "rsa", other)
    encrypted, _ = write_keys(tmp_path, "encrypted", password=b"secret")
    rubbish = tmp_path / "rubbish"
    rubbish.touch(mode=0o600)
    for key, message in (
        (tmp_path / "absent", "cannot be read"),
        (rubbish, "is not a private key in PEM; make one with openssl genpkey"),
        (public, "can be read by other users|is not a private key"),
        (rsa_private, "is not an Ed25519 key"),
        (encrypted, "is encrypted: decrypt it"),
        (Path("~nobody-of-this-name/key"), "cannot be read"),
        (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            sign(made, key)
    for mode in (0o640, 0o604):  # the group's, and everybody's
        private.chmod(mode)
        with pytest.raises(InputError, match="can be read by other users: chmod 600"):
            sign(made, private)
    for text, message in (
        ("ed25519:12", "a public key is ed25519: and 64 digits"),
        (str(rsa_public), "is not an Ed25519 key"),
        (str(private), "is a private key: give the public one"),
        (str(rubbish), "is not a public key in PEM"),
    ):
        with pytest.raises(InputError, match=message):
            load_backbone(made["url"], key=text)


def test_openssl_makes_the_keys_and_checks_the_signature_as_the_documentation_says(
    made: Published[Manifest], tmp_path: Path
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl")
    folder = Path(made["url"].removeprefix("file://"))
    for command in (
        "genpkey -algorithm ed25519 -out private.pem",
        "pkey -in private.pem -pubout -out public.pem",
    ):
        subprocess.run([openssl, *command.split()], cwd=tmp_path, check=True, capture_output=True)
    load_backbone(made["url"], key=sign(made, tmp_path / "private.pem"))
    load_backbone(made["url"], key=str(tmp_path / "public.pem"))
    check = f"pkeyutl -verify -rawin -pubin -inkey public.pem -in {folder}/manifest.json -sigfile {folder}/manifest.sig"
    done = subprocess.run([openssl, *check.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Verified Successfully" in done.stdout
