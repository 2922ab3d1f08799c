"""How far a job has come, read from its storage: it works from any machine, while the job runs or after it died."""

import json
from typing import Any

from p2r.data.manifest import load_manifest
from p2r.errors import StorageError
from p2r.job import Job
from p2r.storage import Storage


def show(job: Job) -> None:
    """Print one line per stage."""
    storage = Storage(job.storage)
    print(f"{job.name} | {job.kind} | {storage.url}")
    for stage, line in (
        ("ingest", _corpus(storage)),
        ("pretrain", _pretrain(storage, job)),
        ("publish", _published(storage, "backbones")),
        ("finetune", _trials(storage)),
        ("report", storage.at("report/report.md") if storage.exists("report/report.md") else None),
    ):
        print(f"{stage:9} {line or '-'}")


def _corpus(storage: Storage) -> str | None:
    if not storage.exists("corpus/manifest.json"):
        num_built = len(storage.list("corpus/receipts"))
        return f"{num_built} shards built, no revision yet" if num_built else None
    manifest = load_manifest(storage.child("corpus"))
    return (
        f"{manifest['num_records']} scans, {manifest['num_samples']} planes, {len(manifest['shards'])} shards, "
        f"revision {manifest['revision']}"
    )


def _pretrain(storage: Storage, job: Job) -> str | None:
    try:
        rows: list[dict[str, Any]] = [
            json.loads(line) for line in storage.read_bytes("pretrain/history.jsonl").decode().splitlines()
        ]
    except StorageError:
        return None
    checkpoints = [name for name in storage.list("pretrain/checkpoints") if name.endswith("manifest.json")]
    last = rows[-1]
    return f"step {last['step']}/{last['num_steps']} | loss {last['loss']:.4f} | {len(checkpoints)} checkpoints"


def _published(storage: Storage, folder: str) -> str | None:
    found = [
        storage.at(name.removesuffix("/manifest.json"))
        for name in storage.list(folder)
        if name.endswith("/manifest.json")
    ]
    return ", ".join(found) or None


def _trials(storage: Storage) -> str | None:
    done = [name for name in storage.list("finetune") if name.endswith(".json") and "/trials/" in name]
    finals = sum("-final-" in name for name in done)
    return f"{len(done) - finals} search and {finals} final trials done" if done else None
