"""Record of every test-set evaluation: one line each in `<storage>/report/test_reads.jsonl`, never removed.

An object store cannot append to a file, and trials run on many machines. So each evaluation is a separate object,
`report/test_reads/<recipe>.json`, created before the first test patient is read, and never replaced. If a trial dies between
reading and writing its result, the repeated evaluation of the recipe leaves a second object. The lines are assembled from
these objects, oldest first.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from p2r.fewshot.stored import Reading, read_readings
from p2r.storage import Storage, json_bytes
from p2r.version import code_version

_FOLDER = "report/test_reads"


def record_reading(storage: Storage, reading: Mapping[str, object]) -> None:
    """Record a test-set evaluation, before test patients are read.

    Args:
        storage: Storage of the job.
        reading: task, trial, recipe_sha256, backbone_sha256 and num_scans; time and code are added.
    """
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "code": code_version(), **reading}
    name, number = str(reading["recipe_sha256"]), 1
    while not storage.create(f"{_FOLDER}/{name}{f'-{number}' if number > 1 else ''}.json", json_bytes(entry)):
        number += 1


def merge_readings(storage: Storage) -> list[Reading]:
    """Write `report/test_reads.jsonl` from all recorded evaluations, and return them, oldest first."""
    readings = read_readings(storage, _FOLDER)
    readings.sort(key=lambda reading: (reading.time, reading.trial, reading.recipe_sha256))
    if readings:
        lines = "".join(json.dumps(reading.to_json(), sort_keys=True) + "\n" for reading in readings)
        storage.write_bytes("report/test_reads.jsonl", lines.encode())
    return readings
