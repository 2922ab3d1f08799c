"""Publishers that race, and publishers that are killed at each write: real processes, on a folder or a bucket.

    python -m tests.publishing races URL --races 100 --publishers 4
    python -m tests.publishing kills URL

Prints JSON, and ends with 1 if a rule was broken. Credentials of a bucket come from the environment. Weights are tiny, for what is
tried is the order of writes. Publishers are forked from one process, so that a race does not wait for imports.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from p2r.artefact import Manifest, Published, open_artefact
from p2r.artefact_manifest import CorpusFacts
from p2r.backbone import BACKBONE_FORMAT, ArtefactConfig, load_backbone, publish, verify_artefact
from p2r.config import ModelConfig
from p2r.data.preprocess import Preparation
from p2r.errors import CheckpointError, StorageError
from p2r.model.backbones import build_backbone
from p2r.model.contrasts import config_for
from p2r.reference import parse_reference
from p2r.storage import Storage

MODEL = ModelConfig(channels=(2, 2, 2, 2, 2), feature_channels=2, head_channels=4, embedding_channels=4)
PREPARATION = Preparation(
    dimensions=2, slice_axis="auto", intensity_percentiles=(0.5, 99.5), spacing_mm=2.0, image_size=32
)
FORK = multiprocessing.get_context("fork")
WRITES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "shutil.copyfile", "http.client.send"}
"""Python's audit events before each thing that changes a folder, or is sent to a server."""


def corpus_facts(
    salt: str = "a" * 64, *, subjects: tuple[str, ...] = ("a" * 64,), voxels: tuple[str, ...] = ("b" * 64,)
) -> CorpusFacts:
    """Return facts of a corpus, with digests of subjects and scans that no task has."""
    return CorpusFacts(
        url="s3://b/corpus", sha256="a" * 64, weight=None, licence="CC BY 4.0", provenance="", cohort="c", num_samples=1,
        num_subjects=1, salt=salt, subject_digests=list(subjects), voxel_digests=list(voxels), deidentification={},
    )  # fmt: skip


def publish_toy(
    url: str,
    *,
    seed: int = 0,
    licence: str = "CC0-1.0",
    card: str = "# toy\n",
    contrasts: tuple[str, ...] | None = None,
    **facts: Any,
) -> Published[Manifest]:
    """Publish a tiny backbone whose weights a seed decides."""
    torch.manual_seed(seed)
    model = config_for(MODEL, contrasts)
    return publish(
        Storage(url),
        format=BACKBONE_FORMAT,
        weights=build_backbone(model).state_dict(),
        config=ArtefactConfig(model=model, preparation=PREPARATION.model_copy(update={"contrasts": contrasts})),
        card=card,
        facts={"licence": licence, "corpora": [], **facts},
    )


def races(url: str, *, num_races: int, num_publishers: int) -> dict[str, Any]:
    """Race publishers on one version, again and again; return what became of them, and which rules were broken."""
    outcomes: Counter[str] = Counter()
    broken: list[str] = []
    for race in range(num_races):
        where = f"{url}/race-{race:03d}"
        # Of four races, one is of publishers that differ in nothing, one in the licence, one in the card, one in the weights.
        kind = ("weights", "licence", "card", "nothing")[race % 4]
        # In half of the races all come to the commit at once; in the others they come as the machine lets them.
        meeting = FORK.Barrier(num_publishers) if race // 4 % 2 == 0 else None
        found = _together(
            lambda number, where=where, kind=kind, meeting=meeting: _entrant(where, kind, number, meeting),  # type: ignore[misc]
            num_publishers,
        )
        outcomes.update(f"{kind}: {one['outcome']}" for one in found)
        broken += [f"race {race} ({kind}): {problem}" for problem in _broken_rules(where, kind, found)]
    return {
        "num_races": num_races,
        "num_publishers": num_publishers,
        "outcomes": dict(sorted(outcomes.items())),
        "broken": broken,
    }


def _entrant(where: str, kind: str, number: int, meeting: Any) -> dict[str, Any]:
    create = Storage.create

    def met(storage: Storage, path: str, data: bytes) -> bool:
        meeting.wait(timeout=120)
        return create(storage, path, data)

    if meeting is not None:
        Storage.create = met  # type: ignore[method-assign, assignment]  # of this process
    differing = {"weights": {"seed": number}, "licence": {"licence": f"L{number}"}, "card": {"card": f"# {number}\n"}}
    try:
        made = publish_toy(where, **differing.get(kind, {}))  # type: ignore[arg-type]
    except CheckpointError as error:
        return {"outcome": "refused", "message": str(error)}
    return {"outcome": "published" if made.is_new else "was published", "pin": made.pin}


def _broken_rules(where: str, kind: str, found: list[dict[str, Any]]) -> list[str]:
    problems = []
    counts = Counter(one["outcome"] for one in found)
    if counts["published"] != 1:
        problems.append(f"{counts['published']} publishers were told that they had published")
    losers = "was published" if kind == "nothing" else "refused"
    if counts[losers] != len(found) - 1:
        problems.append(f"losers: {dict(counts)}")
    artefact = open_artefact(parse_reference(where))
    for one in found:
        if one["outcome"] == "refused" and (
            artefact.pin not in one["message"] or f"other {kind}" not in one["message"]
        ):
            problems.append(f"a loser was not told who won: {one['message']}")
        if one["outcome"] != "refused" and one.get("pin") != artefact.pin:
            problems.append(f"a publisher has the pin {one.get('pin')}, there is {artefact.pin}")
    try:
        verify_artefact(artefact)
        load_backbone(artefact.pin)
    except Exception as error:
        problems.append(f"the artefact does not load: {error!r}")
    return problems


def kills(url: str) -> dict[str, Any]:
    """Kill a publisher at its first write, at its second, and so on; return how many there are, and which rules were broken.

    After each: what is there loads whole or is not published; publishing again ends with what loads, and leaves nothing damaged.
    """
    with tempfile.TemporaryDirectory() as folder:  # killed publishers leave their temporary files
        tempfile.tempdir = folder
        try:
            return _kills(url)
        finally:
            tempfile.tempdir = None


def _kills(url: str) -> dict[str, Any]:
    broken: list[str] = []
    committed = 0
    for write in range(1, 1000):
        where = f"{url}/kill-{write:03d}"
        (status,) = _statuses(lambda _, where=where, write=write: _killed_at(where, write), 1)  # type: ignore[misc]
        if status == 0:
            return {"num_writes": write - 1, "num_committed_before_the_kill": committed, "broken": broken}
        if status != -signal.SIGKILL:
            broken.append(f"write {write}: the publisher ended with {status}")
        try:
            load_backbone(where)
            committed += 1
        except StorageError as error:
            if "holds no manifest.json" not in str(error):
                broken.append(f"write {write}: after the kill: {error}")
        try:
            made = publish_toy(where)
            verify_artefact(open_artefact(parse_reference(made["pin"])))
            load_backbone(made["pin"])
        except Exception as error:
            broken.append(f"write {write}: publishing again: {error!r}")
    raise AssertionError("a publisher writes less often than that")


def _killed_at(where: str, write: int) -> None:
    """Publish, and die before the write of this number."""
    folder = where.removeprefix("file://")
    counted = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        if event not in WRITES:
            return
        if event != "http.client.send" and not any(
            folder in os.fsdecode(one) for one in arguments if isinstance(one, str | bytes | Path)
        ):
            return
        counted += 1
        if counted == write:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    publish_toy(where)


def _together(work: Callable[[int], dict[str, Any]], num_processes: int) -> list[dict[str, Any]]:
    """Fork processes that begin at one moment, and return what each of them made."""
    with tempfile.TemporaryDirectory() as folder:

        def write(number: int) -> None:
            Path(folder, str(number)).write_text(json.dumps(work(number)))

        statuses = _statuses(write, num_processes)
        return [
            json.loads(Path(folder, str(number)).read_text()) if status == 0 else {"outcome": f"ended with {status}"}
            for number, status in enumerate(statuses)
        ]


def _statuses(work: Callable[[int], None], num_processes: int) -> list[int]:
    """Fork processes, let them go at once, and return how each ended: its exit status, or minus the signal."""
    gate, opener = os.pipe()
    children = []
    for number in range(num_processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(opener)
                os.read(gate, 1)  # until the parent closes its end
                work(number)
                status = 0
            except BaseException as error:
                print(f"publisher {number}: {error!r}", file=sys.stderr)
            finally:
                os._exit(status)
        children.append(child)
    os.close(gate)
    os.close(opener)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("races", "kills", "both"))
    parser.add_argument("url", help="An empty folder or prefix: file:///..., s3://...")
    parser.add_argument("--races", type=int, default=100)
    parser.add_argument("--publishers", type=int, default=4)
    arguments = parser.parse_args()
    if there := Storage(arguments.url).list():
        parser.error(f"{arguments.url} is not empty, which decides every race: it has {there[0]}")
    torch.set_num_threads(1)
    began = time.monotonic()
    found: dict[str, Any] = {"on": arguments.url.partition(":")[0]}
    if arguments.what != "kills":
        found["races"] = races(arguments.url, num_races=arguments.races, num_publishers=arguments.publishers)
    if arguments.what != "races":
        found["kills"] = kills(arguments.url)
    print(json.dumps({**found, "seconds": round(time.monotonic() - began)}, indent=2))
    return 1 if any(found[what]["broken"] for what in found if what != "on") else 0


if __name__ == "__main__":
    sys.exit(main())
