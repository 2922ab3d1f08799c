"""Pins, `URL@sha256:HEX`: the digest of the manifest, which holds every file."""

import hashlib
from pathlib import Path

import pytest

import p2r
import p2r.artefact
import p2r.backbone
from p2r.artefact import Manifest, Published
from p2r.backbone import load_backbone
from p2r.errors import DamagedError, InputError
from p2r.reference import Reference, parse_reference
from tests.p2r.artefact.conftest import with_manifest

# Pins


def test_a_pin_is_the_digest_of_the_manifest_and_holds_every_file(made: Published[Manifest], folder: Path) -> None:
    sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert made["pin"] == f"{made['url']}@sha256:{sha256}"
    for loaded in (load_backbone(made["pin"]), p2r.load_backbone(made["url"], sha256=sha256)):
        assert loaded.manifest["sha256"] == sha256 and loaded.manifest["pin"] == made["pin"]
    with_manifest(licence="CC0")(folder)
    with pytest.raises(
        DamagedError, match=f"is pinned to the manifest with sha256 {sha256}, and its manifest.json has"
    ):
        load_backbone(made["pin"])


def test_the_digest_of_the_weights_is_no_pin_and_the_message_says_so(made: Published[Manifest]) -> None:
    with pytest.raises(DamagedError, match=f"has the digest of the weights; a pin is .* {made['pin']}"):
        load_backbone(made["url"], sha256=made["files"]["weights"]["sha256"])


@pytest.mark.parametrize(
    "reference",
    [
        *(
            "/x@sha256:",
            "/x@sha256:" + "0" * 63,
            "/x@sha256:" + "A" * 64,
            "@sha256:" + "0" * 64,
            "/x@sha512:00",
            "/x@sha256",
        ),
        "/x@sha256:" + "0" * 64 + "@sha256:" + "0" * 64,
        "/x@sha256:" + "0" * 64 + "/config.json",
    ],
)
def test_a_pin_that_is_none_is_refused(reference: str) -> None:
    with pytest.raises(InputError, match="a pin is URL@sha256: and the 64 digits"):
        parse_reference(reference)


def test_two_pins_must_be_equal(made: Published[Manifest]) -> None:
    assert load_backbone(made["pin"], sha256=made["sha256"]).manifest["pin"] == made["pin"]
    with pytest.raises(InputError, match="has a pin, and sha256 gives another"):
        load_backbone(made["pin"], sha256="0" * 64)


def test_an_at_sign_in_a_url_is_no_pin() -> None:
    assert parse_reference("s3://bucket/a@b/c") == Reference("s3://bucket/a@b/c")
