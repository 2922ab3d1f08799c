"""`p2r verify`: check every digest of a corpus, backbone or model, its pin, and its signature."""

import hashlib

from p2r.artefact import MANIFEST, RESULTS, open_artefact
from p2r.data.manifest import FORMAT, MAX_MANIFEST_BYTES
from p2r.documents import way_out
from p2r.errors import InputError
from p2r.pointers import resolve
from p2r.reference import Reference, parse_reference
from p2r.signature import SIGNATURE
from p2r.storage import Storage


def verify(url: str, *, key: str | None) -> list[str]:
    """Check a published folder or corpus, and return the lines to print.

    Args:
        url: `URL`, or `URL@sha256:HEX`, of a corpus, backbone or model.
        key: Public key that must have signed a backbone or model; None: no signature required.

    Raises:
        InputError: It is damaged, differs from the pin, or is not signed by this key; names every problem.
    """
    reference = resolve(parse_reference(url), is_fresh=True)
    storage = Storage(reference.url)
    if not storage.exists(MANIFEST):
        raise InputError(
            f"{storage.url} has no manifest.json: give a corpus, backbone or model, such as corpus, backbones/NAME/VERSION or "
            "models/TASK/VERSION of a job's storage (p2r inspect lists them)"
        )
    return _verify_artefact(reference, key) if _is_artefact(storage) else _verify_corpus(reference, key)


def _is_artefact(storage: Storage) -> bool:
    with way_out("restore the file from a copy; nothing beside it can be checked without it"):
        manifest = storage.read_json(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    return isinstance(manifest, dict) and str(manifest.get("format")).startswith(("p2r-backbone/", "p2r-model/"))


def _verify_artefact(reference: Reference, key: str | None) -> list[str]:
    from p2r.backbone import verify_artefact

    artefact = open_artefact(reference, key=key, is_fresh=True)
    verify_artefact(artefact)
    lines = [f"unreferenced  {name}" for name in artefact.unnamed_files()]
    lines += [f"sound    {artefact.manifest.format}  {artefact.storage.url}", f"pin      {artefact.pin}"]
    if artefact.storage.exists(RESULTS):
        lines.append(f"unchecked  {RESULTS}: grows after publishing, so no digest in the manifest covers it")
    if key is not None:
        lines.append(f"signed   {artefact.check_signature(key)}")
    elif artefact.storage.exists(SIGNATURE):
        lines.append(f"unchecked  {SIGNATURE}: give --key to check it")
    return lines


def _verify_corpus(reference: Reference, key: str | None) -> list[str]:
    from p2r.data.verify import unreferenced_files, verify_corpus

    storage = Storage(reference.url)
    if key is not None:
        raise InputError(f"{storage.url} is a corpus: backbones and models are signed, corpora are not")
    content = storage.read_bytes(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    reference.check(content)
    problems = verify_corpus(storage)
    if problems:
        raise InputError(f"{storage.url} is damaged:\n" + "\n".join(f"  {problem}" for problem in problems))
    pin = Reference(storage.url, hashlib.sha256(content).hexdigest())
    return [
        *(f"unreferenced  {name}" for name in unreferenced_files(storage)),
        f"sound    {FORMAT}  {storage.url}",
        f"pin      {pin}",
    ]
