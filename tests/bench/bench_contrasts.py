"""Cost of several contrasts: CPU time per voxel of reading, preparing and augmenting images of one and of three contrasts.

    python tests/bench/bench_contrasts.py                               # this machine's CPU, one thread
    python tests/bench/bench_contrasts.py --planes 6 --rounds 1 --json rows.json

All contenders read one corpus of sessions with three contrasts of the same size, and take turns. A voxel is a pixel of one contrast
of an image that reaches the network. `cross` makes two views of one contrast each, so its views cost less per voxel read. CPU time
of the process is measured, not the clock, so that other programs do not count. Ratios are medians of the rounds' ratios.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from rounds import cpu_name, ratios, spread, take_turns

from p2r.config import ImageConfig, IngestConfig, SessionsConfig, ViewsConfig
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.data.stream import Corpus, stream
from p2r.storage import Storage
from p2r.views import make_views

NAMES = ("flair", "t1", "t2")
CONTENDERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "one contrast": (NAMES[:1], {}),
    "three, same": (NAMES, {}),
    "three, cross": (NAMES, {"contrasts": "cross"}),
}
PARTS = ("read", "prepare", "views")


def make_corpus(folder: Path, *, sessions: int, planes: int) -> Corpus:
    """Make a corpus of smooth noise: planes of 192 x 192 voxels in each session, in three contrasts."""
    rng = np.random.default_rng(0)
    for session in range(sessions):
        anatomy = rng.normal(0, 1, (192, 192, planes)).cumsum(0).cumsum(1)
        for number, name in enumerate(NAMES, start=1):
            voxels = 800 + 300 * np.sin(anatomy / 40 * number) + rng.normal(0, 10, anatomy.shape)
            path = folder / "scans" / f"sub-{session}_{name}.nii"
            path.parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([1.0, 1.0, 5.0, 1.0])), path)
    rules = SessionsConfig(contrasts={name: name for name in NAMES})
    config = IngestConfig(sources=(str(folder / "scans"),), licence="CC0-1.0", sessions=rules)
    storage = Storage(str(folder / "corpus"))
    list(ingest_locally(config, storage))
    return Corpus(storage, load_manifest(storage))


def measure(corpus: Corpus, name: str, *, batch: int, steps: int) -> dict[str, float]:
    """Return the CPU time of each part, microseconds per thousand voxels."""
    contrasts, views = CONTENDERS[name]
    image = ImageConfig(size=96, spacing_mm=2.0)
    spent = dict.fromkeys(PARTS, 0.0)
    with closing(stream(corpus, image=image, seed=0, global_batch=batch, contrasts=contrasts)) as source:
        next(source)
        began = time.process_time()
        for loaded, _ in islice(source, steps):
            marks = [began, time.process_time()]
            images, inside = loaded.images()
            marks.append(time.process_time())
            make_views(
                images,
                inside,
                config=ViewsConfig.model_validate(views),
                spacing_mm=image.spacing_mm,
                seed=0,
                epochs=loaded.epochs,
                positions=loaded.positions,
                present=loaded.present,
            )
            marks.append(began := time.process_time())
            for part, start, end in zip(PARTS, marks, marks[1:], strict=False):
                spent[part] += end - start
    thousands = steps * batch * len(contrasts) * image.size**2 / 1e3
    return {part: 1e6 * seconds / thousands for part, seconds in spent.items()} | {
        "total": 1e6 * sum(spent.values()) / thousands
    }


def main() -> None:
    """Measure, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--planes", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder), sessions=given.sessions, planes=given.planes)
        measured = take_turns(
            {name: partial(measure, corpus, name, batch=given.batch, steps=given.steps) for name in CONTENDERS},
            rounds=given.rounds,
        )
    totals = {name: [one["total"] for one in rounds] for name, rounds in measured.items()}
    table = Table("contender", *(f"{part}, us per 1,000 voxels" for part in (*PARTS, "total")), "speed per voxel")
    rows = []
    for name, rounds in measured.items():
        parts = {part: spread([one[part] for one in rounds]) for part in (*PARTS, "total")}
        speed = ratios(totals["one contrast"], totals[name])
        rows.append({"contender": name, **parts, "speed": speed})
        table.add_row(name, *(f"{parts[part]['median']:.1f}" for part in (*PARTS, "total")), f"{speed['median']:.2f}")
    Console(width=120).print(table)
    if given.json:
        setting = {name: value for name, value in vars(given).items() if name != "json"}
        given.json.write_text(json.dumps({"setting": setting, "processor": cpu_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
