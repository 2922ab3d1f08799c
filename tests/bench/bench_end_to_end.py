"""What of a step's speed is left when its batches come from shards: images a second, beside the same batches in memory.

    python tests/bench/bench_end_to_end.py                                   # this machine: the GPU if there is one
    python tests/bench/bench_end_to_end.py --folder ~/p2r-runs/bench --json end.json --picture end.png
    python tests/bench/bench_end_to_end.py --dimensions 3

The corpus is that of `bench_stream.py` (int16 planes of virtual subjects with Rician noise, 1 x 1 x 2 mm, lz4), cut to
planes or, in 3D, patches of 1.5 mm. One engine takes our step on the same batches in the same order. The yardstick
reads them from memory (on a GPU: its own). `p2r.data.stream` reads them from the local disk (its page cache), then from
object storage (SeaweedFS on loopback) with a cache that holds the shards already, and with an empty cache. There every
turn is the first minute of a run: stream set up, shards fetched, batches taken, all counted. Elsewhere a turn counts
after a few steps, so that nothing counts that was made ahead. On a CPU one core is left to the server for all
contenders alike, since a server has its own in use.

`wait` is the part of a turn in which the loop stood still for a batch while the device had at most one step left to do.
Contenders take turns; each is compared with the yardstick of the same round, and medians over the rounds are stated.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from charts import OTHERS_COLOUR, OURS_COLOUR, bar_picture
from rounds import cpu_name, ratios, spread, take_turns
from stream_data import BUCKET, bucket_on, prepare, read_shards, uploaded
from training import LEARNING_RATE, Setting, add_options, add_variant, engine_of, loss_of, setting_of, wait_for

from p2r.config import PretrainConfig
from p2r.data.batch import Batch
from p2r.data.stream import Corpus, stream
from p2r.engine.build import join_process_group
from p2r.engine.feed import feed
from p2r.engine.step import pretrain_step
from p2r.storage import Storage

Batches = Generator[Batch, None, None]

MEMORY, DISK, CACHED, COLD = "step only, batches in memory", "from disk", "from S3, cached", "from S3, empty cache"
UNCOUNTED = 4
AHEAD = 2
"""Steps that the device may have left to do when the next batch is asked for, that one included."""


class Turn(NamedTuple):
    """One turn of a contender."""

    images_per_s: float
    wait_fraction: float
    first_batch_s: float
    """From the beginning of the turn."""
    loss: float

    def __str__(self) -> str:
        return f"{self.images_per_s:,.1f} images/s, wait {self.wait_fraction:.1%}"


def in_memory(batches: list[Batch]) -> Batches:
    """Yield batches again and again."""
    yield from cycle(batches)


def streamed(corpus: Corpus, config: PretrainConfig, *, device: torch.device, cache: Path | None = None) -> Batches:
    """Yield a stream's batches from its beginning, as a run is fed with them."""
    if cache is not None:
        os.environ["P2R_CACHE"] = str(cache)
    image, seed, batch = config.image, config.seed, config.global_batch
    decoded = stream(corpus, image=image, seed=seed, global_batch=batch, pin_memory=device.type == "cuda")
    with contextlib.closing(feed(decoded, device)) as source:
        yield from (batch for batch, _ in source)


def with_empty_cache(corpus: Corpus, config: PretrainConfig, *, device: torch.device, folder: Path) -> Batches:
    """Yield a stream's batches that nothing has been fetched of."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        yield from streamed(corpus, config, device=device, cache=Path(cache))


def turn(
    start: Callable[[], Batches],
    engine: Any,
    config: PretrainConfig,
    *,
    num_steps: int,
    num_uncounted: int,
    device: torch.device,
) -> Turn:
    """Take a step with each batch, and see how long that takes."""
    waited_s = first_batch_s = 0.0
    in_work: deque[torch.cuda.Event] = deque()
    result: Any = None
    wait_for(device)
    began = started = time.perf_counter()
    with contextlib.closing(start()) as batches:
        for number in range(num_uncounted + num_steps):
            if number == num_uncounted and number:
                wait_for(device)
                began, waited_s = time.perf_counter(), 0.0
            if len(in_work) == AHEAD:
                in_work.popleft().synchronize()
            asked = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - asked
            first_batch_s = first_batch_s or time.perf_counter() - started
            result = pretrain_step(engine, batch, config=config, learning_rate=LEARNING_RATE)
            if device.type == "cuda":
                in_work.append(torch.cuda.Event())
                in_work[-1].record()
        wait_for(device)
        seconds = time.perf_counter() - began
    return Turn(num_steps * config.global_batch / seconds, waited_s / seconds, first_batch_s, loss_of(result))


def refuse_others(start: Callable[[], Batches], held: list[Batch]) -> None:
    """Raise ValueError unless a contender delivers the batches in memory."""
    with contextlib.closing(start()) as batches:
        for number, (batch, expected) in enumerate(zip(islice(batches, len(held)), held, strict=True)):
            same = (batch.positions == expected.positions).all() and all(
                torch.equal(group.voxels.cpu(), other.voxels.cpu())
                for group, other in zip(batch.groups, expected.groups, strict=True)
            )
            if not same:
                raise ValueError(f"batch {number} is another than the one in memory")


def measure(
    setting: Setting,
    config: PretrainConfig,
    folder: Path,
    *,
    rounds: int,
    num_steps: int,
    cores: set[int] | None,
) -> list[dict[str, Any]]:
    """Measure every contender; without `cores` for its server, nothing from object storage."""
    manifest = read_shards(folder / "lz4")
    engine, device = engine_of(config, setting.device), setting.device
    disk = partial(streamed, Corpus(Storage(str(folder / "lz4")), manifest), config, device=device)
    with contextlib.closing(disk()) as batches:
        held = list(islice(batches, UNCOUNTED + num_steps))
    contenders: dict[str, Callable[[], Batches]] = {MEMORY: partial(in_memory, held), DISK: disk}
    rows: dict[str, dict[str, Any]] = {name: {"contender": name} for name in contenders}
    with contextlib.ExitStack() as stack:
        if cores is not None:
            try:
                objects = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
                stack.enter_context(bucket_on(cores, objects))
            except RuntimeError as error:
                rows |= {name: {"contender": name, "skipped": str(error)} for name in (CACHED, COLD)}
            else:
                corpus = Corpus(Storage(f"s3://{BUCKET}/{uploaded(folder / 'lz4')}"), manifest)
                cache = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
                contenders[CACHED] = partial(streamed, corpus, config, device=device, cache=cache)
                contenders[COLD] = partial(with_empty_cache, corpus, config, device=device, folder=folder)
                rows |= {name: {"contender": name} for name in (CACHED, COLD)}
        for start in contenders.values():
            refuse_others(start, held)
        one_turn = partial(turn, engine=engine, config=config, num_steps=num_steps, device=device)
        one_turn(contenders[MEMORY], num_uncounted=0)  # compiles and warms up
        turns = take_turns(
            {
                name: partial(one_turn, start, num_uncounted=0 if name == COLD else UNCOUNTED)
                for name, start in contenders.items()
            },
            rounds=rounds,
        )
    for name, of_name in turns.items():
        rates = [one.images_per_s for one in of_name]
        rows[name] |= {
            "images_per_s": spread(rates),
            "of_rounds": rates,
            "of_yardstick": ratios(rates, [one.images_per_s for one in turns[MEMORY]]),
            "wait_fraction": spread([one.wait_fraction for one in of_name]),
            "first_batch_s": spread([one.first_batch_s for one in of_name]),
            "last_loss": of_name[-1].loss,
        }
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> Table:
    columns = ("images/s", "quartiles", "% of step only", "quartiles", "wait, %", "first batch after")
    result = Table("contender", *columns)
    for row in rows:
        if "skipped" in row:
            result.add_row(row["contender"], f"[dim]{row['skipped']}[/dim]")
            continue
        per_s, of = row["images_per_s"], row["of_yardstick"]
        result.add_row(
            row["contender"],
            f"{per_s['median']:,.1f}",
            f"{per_s['low']:,.1f} to {per_s['high']:,.1f}",
            f"{100 * of['median']:.1f}",
            f"{100 * of['low']:.1f} to {100 * of['high']:.1f}",
            f"{100 * row['wait_fraction']['median']:.1f}",
            f"{1e3 * row['first_batch_s']['median']:,.0f} ms",
        )
    return result


def picture(rows: list[dict[str, Any]], subtitle: str) -> bytes:
    """Images a second as bars; whiskers are quartiles over the rounds."""
    measured = [row for row in rows if "skipped" not in row]
    return bar_picture(
        "Images a second, shards to optimizer step",
        subtitle,
        [row["contender"] for row in measured],
        [row["images_per_s"] for row in measured],
        title="images a second, and % of those with the same batches in memory",
        texts=[texts_of(row) for row in measured],
        colours=[OTHERS_COLOUR if row["contender"] == MEMORY else OURS_COLOUR for row in measured],
    )


def texts_of(row: Mapping[str, Any]) -> str:
    """Say at the end of a bar what it stands for."""
    rate = f"{row['images_per_s']['median']:,.3g}"
    return rate if row["contender"] == MEMORY else f"{rate}   {100 * row['of_yardstick']['median']:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=5, steps=12)
    add_variant(parser)
    parser.add_argument("--folder", type=Path, help="keeps the corpus, and finds that of bench_stream.py")
    parser.add_argument("--volumes", type=int, default=16, help="of 88 planes each")
    parser.add_argument("--plane", type=int, default=256, help="edge of a plane in the shards")
    parser.add_argument("--s3", action=argparse.BooleanOptionalAction, default=True, help="measure object storage, too")
    options = parser.parse_args()
    setting = setting_of(options)
    config = setting.config(precision=options.precision, compile=options.compile)
    ours = sorted(os.sched_getaffinity(0))
    server = set(ours[-1:])
    if options.s3 and len(ours) > 1:
        ours = ours[:-1]
    os.sched_setaffinity(0, ours)  # before torch starts threads, which inherit it
    torch.set_num_threads(len(ours))
    with tempfile.TemporaryDirectory(prefix="p2r-bench-") as temporary:
        folder = options.folder or Path(temporary, "data")
        data = prepare(folder, num_volumes=options.volumes, size=options.plane, batch=setting.batch)
        num_planes = len(data.planes)
        del data
        join_process_group(setting.device)
        rows = measure(
            setting,
            config,
            folder,
            rounds=options.rounds,
            num_steps=options.steps,
            cores=server if options.s3 else None,
        )
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else cpu_name()
    how = f"{options.precision}{', compiled' if options.compile else ''}"
    where = f"{name}, {len(ours)} {'core' if len(ours) == 1 else 'cores'}"
    console = Console(width=150)
    console.print(table(rows))
    console.print(f"{num_planes:,} planes of {options.plane} x {options.plane} int16; {setting}, {how}; {where}")
    if options.json:
        found = {"device": name, "cores": len(ours), "setting": str(setting), "variant": how, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1))
    if options.picture:
        options.picture.write_bytes(picture(rows, f"{setting}, {how}, {where}"))


if __name__ == "__main__":
    main()
