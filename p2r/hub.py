"""Published backbones and models on a Hugging Face hub: `hf://ORG/NAME@REVISION` -> a local folder, read-only.

The client is `huggingface_hub`, an optional package. It keeps files in its own cache by content, so a second load needs no
network, and a hub that is down does not matter for files that are there. A revision is a branch, a tag or a commit; the folder
belongs to the commit. Only the manifest and the files that it names are fetched, after the sizes that the hub states were checked.

The client reads its token from HF_TOKEN or its own file. p2r neither reads nor writes it, and masks it in messages.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from p2r.documents import read_json
from p2r.errors import DamagedError, InputError, StorageError, how_to_install

SCHEME = "hf://"
MANIFEST = "manifest.json"
_OPTIONAL_FILE = "manifest.sig"
_MAX_MANIFEST_BYTES = 2**27
_MAX_FILES = 8
_URL = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,127}))?/?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RULE = "write hf://ORG/NAME, or hf://ORG/NAME@REVISION with a branch, tag or commit"


class HubURL(NamedTuple):
    """A repository of a hub, and the revision."""

    repository: str
    """ORG/NAME."""
    revision: str | None = None
    """Branch, tag or commit; None: the branch main."""

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


class Snapshot(NamedTuple):
    """The files of one commit in the client's cache."""

    url: HubURL
    """The repository, with the commit as revision."""
    folder: Path


def parse_hub_url(url: str) -> HubURL:
    """Split `hf://ORG/NAME@REVISION`.

    Raises:
        StorageError: The URL does not have this form.
    """
    match = _URL.fullmatch(url)
    if match is None or any(".." in part for part in match.groups() if part):
        raise StorageError(f"{url[:300]!r} is not an address on a hub: {_RULE}")
    return HubURL(match["repository"], match["revision"])


def fetch_snapshot(url: HubURL) -> Snapshot:
    """Fetch the manifest of a revision, and the files that it names, unless they are in the cache.

    Raises:
        StorageError: The repository, the revision or a file does not exist, or a file is larger than the manifest states. Or a
            token is missing, or the hub cannot be reached and the files are not in the cache.
        InputError: `huggingface_hub` is not installed.
    """
    client = import_client()
    manifest = Path(_download(client, url, MANIFEST, max_bytes=_MAX_MANIFEST_BYTES))
    commit = HubURL(url.repository, manifest.parent.name)
    content = _read_bounded(manifest, str(url))
    value = read_json(content, where=f"{url}, {MANIFEST}", max_bytes=_MAX_MANIFEST_BYTES, max_depth=16)
    for name, num_bytes in _named_files(value).items():
        _download(client, commit, name, max_bytes=num_bytes)
    _download_optional(client, commit, _OPTIONAL_FILE)
    return Snapshot(commit, manifest.parent)


def import_client() -> Any:
    """Return the module `huggingface_hub`.

    Raises:
        InputError: It is not installed.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "huggingface_hub":
            raise
        raise InputError(
            f"hf:// needs the package huggingface_hub, which is not installed here: {how_to_install('hub')}"
        ) from None
    return huggingface_hub


@contextmanager
def hub_errors(url: HubURL, doing: str) -> Iterator[None]:
    """Turn errors of the client into one message that names the cause and the way out.

    Raises:
        StorageError: The client failed.
    """
    from huggingface_hub import errors

    where = f"cannot {doing} {url}"
    try:
        yield
    except errors.GatedRepoError:
        raise StorageError(
            f"{where}: it is gated; accept its terms on its page, then set HF_TOKEN, or run hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise StorageError(
            f"{where}: the repository does not exist, or is private and the token is missing or may not read it; correct the "
            "name, or set HF_TOKEN, or run hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise DamagedError(
            f"{where}: it has no revision {url.revision}; name a branch, tag or commit of its page"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise StorageError(
            f"{where}: the files are not in the cache, and the hub cannot be reached or HF_HUB_OFFLINE is set. Run once with a "
            "network, or copy the folder here with p2r pull"
        ) from None
    except errors.EntryNotFoundError:
        raise DamagedError(
            f"{where}: it holds no {MANIFEST} of p2r, or a file that this names is absent; only backbones and models that p2r push "
            "uploaded can be read"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        token = "; the token is missing or may not do this: set HF_TOKEN, or run hf auth login" * (status in (401, 403))
        raise StorageError(f"{where}: the hub answers {status}{token}") from None
    except (_connection_error(), OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise StorageError(f"{where}: {str(error)[:300]} ({type(cause).__name__}: {str(cause)[:300]})") from None


def _download(client: Any, url: HubURL, name: str, *, max_bytes: int) -> str:
    with hub_errors(url, "read"):
        num_bytes = _stated_size(client, url, name)
    if num_bytes is not None and num_bytes > max_bytes:
        raise StorageError(
            f"{name} of {url} has {num_bytes:,} bytes, more than the {max_bytes:,} that it may have: it is not what was published"
        )
    with hub_errors(url, "read"):
        path: str = client.hf_hub_download(url.repository, name, revision=url.revision, library_name="p2r")
    return path


def _stated_size(client: Any, url: HubURL, name: str) -> int | None:
    """Return the size of a file by the hub, bytes; None if the file is cached, or the hub does not answer.

    Where the hub does not answer, the download raises the error, or finds the file in the cache.
    """
    is_commit = url.revision is not None and _COMMIT.fullmatch(url.revision) is not None
    if is_commit and client.try_to_load_from_cache(url.repository, name, revision=url.revision) is not None:
        return None
    try:
        address = client.hf_hub_url(url.repository, name, revision=url.revision)
        size: int | None = client.get_hf_file_metadata(address, library_name="p2r").size
    except (_connection_error(), OSError):
        return None
    return size


def _connection_error() -> type[BaseException]:
    """Return the base of the errors of the HTTP library that the client uses; versions of the client use different libraries."""
    from huggingface_hub.errors import HfHubHTTPError

    found: type[BaseException] = next(
        (base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"), HfHubHTTPError
    )
    return found


def _download_optional(client: Any, url: HubURL, name: str) -> None:
    """Fetch a file of a commit that may be absent, once: the cache also records absence."""
    from huggingface_hub import errors

    if client.try_to_load_from_cache(url.repository, name, revision=url.revision) is not None:
        return
    with hub_errors(url, "read"):
        try:
            client.hf_hub_download(url.repository, name, revision=url.revision, library_name="p2r")
        except errors.EntryNotFoundError:  # absent, or the hub cannot be reached
            return


def _read_bounded(path: Path, where: str) -> bytes:
    with path.open("rb") as file:
        content = file.read(_MAX_MANIFEST_BYTES + 1)
    if len(content) > _MAX_MANIFEST_BYTES:
        raise StorageError(f"{where}: its {MANIFEST} has more than {_MAX_MANIFEST_BYTES:,} bytes")
    return content


def _named_files(manifest: Any) -> dict[str, int]:
    """Return the files that a manifest of version 1 or 2 names, and their sizes; `p2r.artefact` checks the manifest itself."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or len(files) > _MAX_FILES:
        return {}
    named = {entry.get("name", key): entry.get("num_bytes") for key, entry in files.items() if isinstance(entry, dict)}
    return {
        name: num_bytes
        for name, num_bytes in named.items()
        if isinstance(name, str) and _FILE.fullmatch(name) and isinstance(num_bytes, int)
    }
