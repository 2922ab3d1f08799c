"""`--fork NAME`: a new job beside a trained one, which starts from its weights.

A run can only be resumed unchanged. For another schedule, loss or corpus, a fork starts a new run at step 0 from the weights
of the old run's newest checkpoint. Nothing is written to the old run.
"""

import re
from pathlib import Path

from p2r.engine.checkpoint import newest_checkpoint
from p2r.errors import CheckpointError, JobError
from p2r.job import Job
from p2r.storage import Storage


def forked(job: Job, name: str) -> Job:
    """Return the job of a fork; called again, it returns the same fork, to be resumed.

    Args:
        job: The trained job, with the changes for the fork.
        name: The fork's storage is `<storage>-NAME`, or NAME itself if it is a URL or an absolute path.

    Returns:
        The job with another storage, and `pretrain.init_from`. If the old run has its own corpus, the fork reads that and does
        not ingest.

    Raises:
        JobError: The job does not pretrain, or already sets `init_from`.
        CheckpointError: It has no checkpoint yet.
    """
    if job.pretrain is None or job.kind not in ("pretrain", "pipeline"):
        raise JobError(
            f"--fork {name}: jobs of kind pretrain and pipeline can be forked, this one is of kind {job.kind}"
        )
    if job.pretrain.init_from is not None:
        raise JobError(
            f"--fork {name} takes the weights of the newest checkpoint, and pretrain.init_from names others: leave one of them out"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and "://" not in name and not Path(name).is_absolute():
        raise JobError(
            f"--fork {name!r}: give a name of letters, digits, dots and dashes; or a URL, or an absolute path"
        )
    old, storage = Storage(job.storage), Storage(name if "/" in name else f"{job.storage.rstrip('/')}-{name}")
    if storage.url == old.url:
        raise JobError(f"--fork {name}: this is the storage of the run itself; give another name or URL")
    begun = newest_checkpoint(storage.child("pretrain"))
    if begun is not None:
        init_from = begun.manifest.config.to_json().get("init_from")
        if init_from is None:
            raise JobError(f"--fork {name}: {storage.url} holds a run that was not forked; give another name or URL")
    else:
        newest = newest_checkpoint(old.child("pretrain"))
        if newest is None:
            raise CheckpointError(
                f"--fork {name}: {old.at('pretrain/checkpoints')} holds no checkpoint to take weights from; "
                "run the job without --fork first, or set its storage"
            )
        init_from = old.at(f"pretrain/{newest.path}")
    update: dict[str, object] = {"init_from": init_from}
    ingest = job.ingest
    if job.pretrain.corpus is None and old.exists("corpus/manifest.json"):
        update["corpus"], ingest = old.at("corpus"), None
    return job.model_copy(
        update={"storage": storage.url, "pretrain": job.pretrain.model_copy(update=update), "ingest": ingest}
    )
