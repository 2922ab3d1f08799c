"""The corpora that a run streams from, each at the revision that the run began with.

A corpus grows while runs read it. The first process to start decides which revision is current and tells the others; the
checkpoint keeps it, so a resumed run, and the backbone that is published from it, see what the run began with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from p2r.config import CorpusShare, PretrainConfig
from p2r.data.manifest import load_manifest, manifest_sha256, revision_path
from p2r.data.stream import Corpus, stream_state
from p2r.errors import CheckpointError
from p2r.storage import Storage


def corpora_of(config: PretrainConfig, own: Storage, *, stream: Mapping[str, Any] | None = None) -> list[Corpus]:
    """Find the corpora of a run.

    Args:
        config: Names them.
        own: The job's own corpus, where `config` names none.
        stream: A checkpoint's stream state: take the revisions that it names.

    Raises:
        DataError: A corpus or revision is absent.
        CheckpointError: The checkpoint has other corpora, or other revisions of them.
    """
    if config.corpus is None or isinstance(config.corpus, str):
        shares: Sequence[CorpusShare] = [CorpusShare(url=config.corpus or own.url)]
    else:
        shares = config.corpus
    revisions = [share.revision for share in shares]
    if stream is not None:
        revisions = [corpus["manifest_sha256"] for corpus in stream.get("corpora", [])]
        if len(revisions) != len(shares):
            raise CheckpointError(
                f"the checkpoint streams from {len(revisions)} corpora, this run names {len(shares)}: "
                "restore them, or start a new run from the weights with --fork NAME"
            )
    found = []
    for share, revision in zip(shares, revisions, strict=True):
        storage = Storage(share.url)
        if stream is not None and share.revision not in (None, revision):
            raise _other_revision(storage, revision, share.revision)
        if stream is not None and revision is not None and not storage.exists(revision_path(revision)):
            raise _other_revision(storage, revision, manifest_sha256(load_manifest(storage)))
        found.append(Corpus(storage, load_manifest(storage, revision=revision), share.weight))
    return found


def refuse_other_stream(config: PretrainConfig, own: Storage, saved: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if a run with these corpora would not go on with the stream that a checkpoint has saved."""
    corpora = corpora_of(config, own, stream=saved)
    state = stream_state(corpora, seed=config.seed, global_batch=config.global_batch, neighbours=config.neighbours)
    state.resumed(saved)


def _other_revision(storage: Storage, saved: str | None, wanted: str | None) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint streams from revision {saved} of {storage.url}, this run from {wanted}: restore the revision, "
        "or start a new run from the weights with --fork NAME"
    )


def agreed_corpora(
    config: PretrainConfig, own: Storage, *, stream: Mapping[str, Any] | None, device: torch.device
) -> list[Corpus]:
    """Like `corpora_of`, the same revisions on every rank: those that rank 0 found. Collective."""
    mine = corpora_of(config, own, stream=stream) if torch.distributed.get_rank() == 0 else []
    agreed: list[Any] = [[{"manifest_sha256": manifest_sha256(corpus.manifest)} for corpus in mine]]
    torch.distributed.broadcast_object_list(agreed, src=0, device=device)
    return mine or corpora_of(config, own, stream={"corpora": agreed[0]})
