"""Corpora that a run streams from, each at the revision that was current when the run started.

A corpus grows while runs read it. The first process to start picks the current revision and tells the others. The checkpoint
records it, so a resumed run, and the backbone published from it, use the same revision.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from p2r.config import CorpusShare, PretrainConfig
from p2r.data.balance import read_balance
from p2r.data.manifest import load_manifest, manifest_sha256, revision_path
from p2r.data.parts import Balance
from p2r.data.stream import Corpus, StreamState, stream_state
from p2r.errors import CheckpointError
from p2r.storage import Storage


def corpora_of(config: PretrainConfig, own: Storage, *, stream: Mapping[str, Any] | None = None) -> list[Corpus]:
    """Open the corpora of a run.

    Args:
        config: Configuration that names them.
        own: The job's own corpus, used if `config` names none.
        stream: Stream state of a checkpoint, whose revisions are then used.

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
            raise _revision_error(storage, revision, share.revision)
        if stream is not None and revision is not None and not storage.exists(revision_path(revision)):
            raise _revision_error(storage, revision, manifest_sha256(load_manifest(storage)))
        found.append(Corpus(storage, load_manifest(storage, revision=revision), share.weight, share.contrast))
    return found


def refuse_other_stream(config: PretrainConfig, own: Storage, saved: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if a run with these corpora would not continue the stream saved in a checkpoint."""
    corpora = corpora_of(config, own, stream=saved)
    state_of(config, corpora, balance_of(config, corpora)).resumed(saved)


def state_of(config: PretrainConfig, corpora: Sequence[Corpus], balance: Balance | None) -> StreamState:
    """Return the initial state of a run's stream."""
    return stream_state(
        corpora, seed=config.seed, global_batch=config.global_batch, neighbours=config.neighbours, balance=balance
    )


def balance_of(config: PretrainConfig, corpora: Sequence[Corpus]) -> Balance | None:
    """Return the shares of `pretrain.balance`; None if the job has none.

    Raises:
        DataError: The corpora lack the property, or a value.
    """
    if config.balance is None:
        return None
    return read_balance(corpora, config.balance, image=config.image, contrasts=config.model.contrasts)


def agreed_balance(config: PretrainConfig, corpora: Sequence[Corpus], device: torch.device) -> Balance | None:
    """Return the shares as `balance_of`, read by rank 0 for every rank: a ledger may have a million rows. Collective."""
    if config.balance is None:
        return None
    agreed = [balance_of(config, corpora) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(agreed, src=0, device=device)
    return agreed[0]


def _revision_error(storage: Storage, saved: str | None, wanted: str | None) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint streams from revision {saved} of {storage.url}, this run from {wanted}: restore the revision, "
        "or start a new run from the weights with --fork NAME"
    )


def agreed_corpora(
    config: PretrainConfig, own: Storage, *, stream: Mapping[str, Any] | None, device: torch.device
) -> list[Corpus]:
    """Open the corpora as `corpora_of`, at the revisions chosen by rank 0 on every rank. Collective."""
    mine = corpora_of(config, own, stream=stream) if torch.distributed.get_rank() == 0 else []
    agreed: list[Any] = [[{"manifest_sha256": manifest_sha256(corpus.manifest)} for corpus in mine]]
    torch.distributed.broadcast_object_list(agreed, src=0, device=device)
    return mine or corpora_of(config, own, stream={"corpora": agreed[0]})
