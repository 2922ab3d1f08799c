"""A folder for a Hugging Face hub: the published files byte for byte, and a card with front matter.

    manifest.json, manifest.sig            as published: the pin and the signature stay valid
    model-<sha256>.safetensors, ...        as published
    model.safetensors, config.json         the same weights and configuration under the names that the hub and other libraries read
    README.md                              the published card below YAML front matter

`p2r push` uploads such a folder, and `hf://ORG/NAME@REVISION` reads it wherever a backbone or a model is named.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from p2r.artefact import MANIFEST, Artefact, ModelManifest, Provenance, open_artefact
from p2r.artefact_manifest import FileEntry
from p2r.backbone import verify_artefact
from p2r.contrasts import example_scan
from p2r.errors import InputError
from p2r.export.source import Source, Written
from p2r.plain_yaml import read_yaml
from p2r.reference import Reference, parse_reference
from p2r.signature import SIGNATURE, SIGNATURE_BYTES

LICENCES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
        *(
            "cc-by-nc-sa-4.0",
            "cc-by-nc-nd-4.0",
            "cc-by-nd-4.0",
            "cc-by-3.0",
            "cc-by-sa-3.0",
            "odbl",
            "unlicense",
            "gpl-3.0",
        ),
        *("cc-by-2.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "pddl", "mpl-2.0", "isc", "zlib", "bsl-1.0"),
    }
)
"""Licences that the hub knows, by its own names: SPDX in lower case. Others are `other`, with their name beside it."""
_CARD = "README.md"
_PATHS = {"config": "config.json", "weights": "model.safetensors"}
_RESULTS = {"Dice": "dice", "HD95, mm": "hd95_mm_by_class", "surface Dice": "nsd_by_class"}
"""Columns of a model's results on its card, and the fields of its manifest."""
_CODE = re.compile(r"^(?: {4}[^\n]*\n)+\n?", re.MULTILINE)


def write(source: Source, folder: Path, *, address: str = "hf://ORG/NAME") -> Written:
    """Write the folder.

    Args:
        source: The backbone or model.
        folder: Empty folder.
        address: Address on the hub, for the card.

    Raises:
        StorageError: A published file is absent or damaged.
        InputError: The artefact is of version 1, and has a file with the name of the hub's card.
    """
    artefact = open_artefact(parse_reference(source.manifest.pin))
    if any(entry.name == _CARD for entry in artefact.manifest.files.entries().values()):
        raise InputError(
            f"{source.manifest.url} is of version 1, whose manifest names a file {_CARD}; the hub's card needs that name, and the folder "
            "would be damaged. Publish the checkpoint again, as another publish.version"
        )
    copy_artefact(artefact, folder)
    for role, entry in artefact.manifest.files.entries().items():
        if role in _PATHS and not (folder / _PATHS[role]).exists():
            _link(folder / entry.name, folder / _PATHS[role])
    card = write_card(source, address=address, picture=artefact.manifest.files.picture)
    (folder / _CARD).write_text(card, encoding="utf-8")
    copied = open_artefact(Reference(str(folder), artefact.sha256))
    verify_artefact(copied)
    name = folder.name
    return Written(
        checks=(
            f"the copy has the pin sha256:{artefact.sha256}, and every digest is right",
            f"front matter: {', '.join(front_matter(card))}{_check_card(folder / _CARD)}",
        ),
        commands=(
            f"p2r push {source.manifest.url} hf://ORG/{name}",
            f"python -c \"import p2r; print(p2r.load_{source.noun}({str(name)!r}).manifest['licence'])\"",
        ),
        notes=("--to huggingface writes nothing to a hub; p2r push does",),
    )


def copy_artefact(artefact: Artefact, folder: Path) -> None:
    """Copy a published folder past the cache, with every file hashed on the way, and the manifest last.

    Raises:
        StorageError: A file is absent or damaged.
    """
    for entry in artefact.manifest.files.entries().values():
        artefact.storage.download(entry.name, folder / entry.name, sha256=entry.sha256, num_bytes=entry.num_bytes)
    if artefact.storage.exists(SIGNATURE):
        (folder / SIGNATURE).write_bytes(artefact.storage.read_bytes(SIGNATURE, max_bytes=SIGNATURE_BYTES))
    (folder / MANIFEST).write_bytes(artefact.content)


def write_card(source: Source, *, address: str, picture: FileEntry | None = None) -> str:
    """Return the card: front matter, the published card, the picture of the training if there is one, and how to load the weights.

    The published card's lines of code name its storage, which a reader of the hub cannot open: lines with the address replace them.
    """
    curves = f"## Training\n\n![Curves of pretraining, by step]({picture.name})\n\n" if picture is not None else ""
    matter = yaml.safe_dump(_matter(source), sort_keys=False, allow_unicode=True, width=10_000)
    published = _CODE.sub("", f"{source.card.strip()}\n")
    contrasts = source.preparation.contrasts
    scans = " ".join(f"{name}={name}.nii.gz" for name in contrasts or ()) or "scan.nii.gz"
    command = "predict" if source.is_model else "embed"
    result = "segmentation" if source.is_model else "features"
    use = "model.predict" if source.is_model else "backbone.features"
    return f"""---
{matter}---

{published}
{_write_results(source)}{curves}## Use

With p2r and its extra `hub`, installed from p2r's own source (the package p2r on PyPI is another project):

```sh
p2r {command} {address} {scans} -o {result}.nii.gz
```

```python
import p2r

{source.noun} = p2r.load_{source.noun}("{address}")  # add @ and a commit of this page to keep this version
{use}({example_scan(contrasts)})
```

Pin: `sha256:{source.manifest.sha256}`, the digest of `manifest.json`, which names every file. {source.model.name},
{source.dimensions}D, {source.num_parameters:,} weights, {source.preparation.spacing_mm:g} mm per pixel.
"""


def _write_results(source: Source) -> str:
    """Return the section with a model's results on its validation patients; empty if they are not known."""
    facts = source.manifest.facts
    found = facts.validation if isinstance(facts, ModelManifest) else None
    by_class = {title: (found or {}).get(key) for title, key in _RESULTS.items()}
    known = {title: one for title, one in by_class.items() if isinstance(one, dict) and any(one.values())}
    if not known:
        return ""
    rows: list[tuple[str, ...]] = [("class", *known), ("---",) * (1 + len(known))]
    for name in source.config.classes.values():
        values = [one.get(name) for one in known.values()]
        cells = [f"{value:.3g}" if isinstance(value, int | float) else "unknown" for value in values]
        rows.append((re.sub(r"[^A-Za-z0-9 _.+-]", "_", name), *cells))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## Results\n\nMeans over the validation patients.\n\n{table}\n\n"


def front_matter(card: str) -> dict[str, object]:
    """Return the YAML front matter of a card.

    Raises:
        InputError: The card has none.
    """
    match = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    value = read_yaml(match[1], where="the card's front matter") if match else None
    if not isinstance(value, dict):
        raise InputError("the card has no front matter")
    return value


def _matter(source: Source) -> dict[str, object]:
    facts = source.manifest.facts
    task = "image-segmentation" if source.is_model else "image-feature-extraction"
    matter: dict[str, object] = {
        **_licence(facts.licence),
        "library_name": "p2r",
        "pipeline_tag": task,
        "tags": ["p2r", "mri", "medical", "self-supervised", f"{source.dimensions}d", source.model.name],
    }
    if datasets := list(dict.fromkeys(_dataset_names(facts))):
        matter["datasets"] = datasets
    if source.is_model:
        matter["metrics"] = ["dice"]
    if isinstance(facts, ModelManifest) and source.validation_dice is not None:
        name = facts.task or "task"
        matter["model-index"] = [
            {
                "name": source.name,
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"type": _slug(name), "name": f"{name}, validation patients"},
                        "metrics": [
                            {"type": "dice", "value": source.validation_dice, "name": "Dice, mean of the classes"}
                        ],
                    }
                ],
            }
        ]
    return matter


def _licence(text: str) -> dict[str, str]:
    known = text.strip().lower()
    if known in LICENCES:
        return {"license": known}
    return {"license": "other", "license_name": _slug(text) or "unknown", "license_link": "README.md"}


def _dataset_names(facts: Provenance) -> Iterator[str]:
    for corpus in facts.corpora or ():
        if slug := _slug(corpus.cohort):
            yield slug


def _slug(text: str) -> str:
    """Return text as the hub's names are written: lower case, digits, and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:96]


def _check_card(path: Path) -> str:
    """Parse the card with the hub's own client where it is installed, and say so."""
    try:
        from huggingface_hub import ModelCard
    except ModuleNotFoundError:
        return ""
    return f" (huggingface_hub reads {len(ModelCard.load(path).data.to_dict())} keys)"


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
