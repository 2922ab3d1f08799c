"""`p2r push`: a published backbone or model -> a repository of a Hugging Face hub; `p2r pull`: a published folder -> this machine."""

import tempfile
from pathlib import Path
from typing import Any

from p2r.artefact import open_artefact
from p2r.backbone import check_pulled
from p2r.errors import StorageError
from p2r.export import check_folder, write_folder
from p2r.export.hub_folder import copy_artefact, write
from p2r.export.source import open_source
from p2r.hub import SCHEME, HubURL, hub_errors, import_client, parse_hub_url
from p2r.reference import Reference, parse_reference

_OWN_FILES = [
    *("model-*.safetensors", "config-*.json", "README-*.md", "manifest.sig"),
    *("head-*.safetensors", "unaveraged-*.safetensors", "metrics-*.json", "training-*.png"),
]
"""Patterns of the files that an older version may have left in the repository; its commit keeps them."""


def push(reference: str, target: str, *, is_private: bool = False, tag: str | None = None) -> list[str]:
    """Upload a published backbone or model in one commit, and return lines about it.

    Args:
        reference: URL or path of the backbone or model, with or without a pin.
        target: `hf://ORG/NAME`; the repository is created if it is absent.
        is_private: Create the repository as private.
        tag: Name that the commit gets.

    Raises:
        StorageError: The target is not a repository, a token is missing, or the hub cannot be reached. Or the tag exists; the commit is
            pushed then.
        InputError: The card of an artefact of version 1 has the name of the hub's.
    """
    url = parse_hub_url(target)
    if url.revision is not None:
        raise StorageError(
            f"{target}: a push makes a new commit: write {SCHEME}{url.repository}, and --tag for its name"
        )
    client = import_client()
    source = open_source(reference)
    with tempfile.TemporaryDirectory(prefix="p2r-push-") as name:
        folder = Path(name, "files")
        folder.mkdir()
        write(source, folder, address=str(url))
        with hub_errors(url, "push to"):
            api = client.HfApi(library_name="p2r")
            api.create_repo(url.repository, private=is_private or None, exist_ok=True)
            commit = api.upload_folder(
                repo_id=url.repository,
                folder_path=folder,
                commit_message=f"p2r: {source.name}, sha256:{source.manifest.sha256}",
                delete_patterns=_OWN_FILES,
            )
        pushed = HubURL(url.repository, str(commit.oid))
        if tag is not None:
            _create_tag(api, pushed, tag)
    pin = Reference(str(pushed), source.manifest.sha256)
    return [
        f"pushed {source.noun} {source.name}: {pushed}" + (f" (tag {tag})" if tag else ""),
        f"pin: {pin}",
        f"next: p2r inspect {pushed}",
    ]


def _create_tag(api: Any, pushed: HubURL, tag: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with hub_errors(pushed, f"name {tag} the commit"):
            try:
                api.create_tag(pushed.repository, tag=tag, revision=pushed.revision)
            except HfHubHTTPError as error:
                if getattr(error.response, "status_code", None) != 409:
                    raise
                raise StorageError(
                    f"the tag {tag} exists already, and was left as it is: push with another --tag, or delete it on the page of the "
                    "repository"
                ) from None
    except StorageError as error:
        raise StorageError(f"{pushed} was pushed, and has no tag: {error}") from None


def pull(reference: str, *, folder: Path, key: str | None = None) -> list[str]:
    """Copy a published backbone or model from anywhere to a new folder, every digest checked, and return lines about it.

    Args:
        reference: `hf://`, `s3://` or `file://` URL, with or without a pin.
        folder: New or empty folder.
        key: Public key that must have signed it; None: no signature required.

    Raises:
        InputError: The folder is not empty, or the backbone or model is absent, damaged, or not the pinned one.
    """
    check_folder(folder)
    artefact = open_artefact(parse_reference(reference), key=key)

    def copy(temporary: Path) -> None:
        copy_artefact(artefact, temporary)
        check_pulled(temporary, artefact)

    write_folder(folder, copy)
    num_bytes = sum(entry.num_bytes for entry in artefact.manifest.files.entries().values())
    return [
        f"pulled {artefact.storage.url}: {folder}, {num_bytes / 2**20:.1f} MiB, every digest is right",
        f"pin: {Reference(str(folder.expanduser().absolute()), artefact.sha256)}",
    ]
