"""How fast batches come out of a corpus, beside an in-memory take and other loaders: slices a second on one core.

    python tests/bench/bench_stream.py --folder ~/p2r-runs/bench --json stream.json --picture stream.png

The samples are 256 x 256 planes of virtual subjects with Rician noise, int16; lz4 decodes them about as fast as cine MRI of patients.
Every contender gets the same ones in the form that its own writer gives, one core for all of its threads, and delivers
batches (B, 256, 256) of integers in shuffled order. What it delivers is compared with the truth before anything is timed.

From the local disk (its page cache) every contender runs on from turn to turn, as in a training. A turn is as many batches
as an epoch has, after a few that do not count, so that nothing counts that was made ahead. The yardstick is `numpy.take` of
planes in memory into one batch buffer, as it is written by default. Beside it is the same with `mode="clip"`, which spares
numpy a buffer of its own. It is the limit that no loader can reach, since it neither reads, checks nor decodes. From
object storage (SeaweedFS on loopback, on another core if there is one) a turn is a whole pass with an empty cache, all
set-up included. The yardstick is GET to a file, SHA-256 of the file, then decoding the same planes in the same order.

Contenders take turns; each is compared with the yardstick of the same round, and medians over the rounds are stated. Peers
that are not installed or cannot run here are named with the reason: `pip install litdata mosaicml-streaming` brings them.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zlib import crc32

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from rounds import cpu_name, pin_to_one_core, progress, ratios, resident_mib, spread, take_turns
from stream_data import BUCKET, FORMS, IMAGE, SEED, Batches, Data, bucket_on, prepare, read_shards, uploaded
from stream_peers import litdata, mosaicml, webdataset

from p2r.data.order import Order
from p2r.data.shards import index_name, open_shard
from p2r.data.stream import Corpus, order_of, stream, stream_state
from p2r.report.canvas import FAINT, INK, headline, new_figure, to_png
from p2r.storage import Storage

TAKE, TAKE_CLIP = "numpy.take from memory", "numpy.take from memory, mode clip"
GET, FETCH = "GET to file, check, decode", "GET to file and check alone"
OURS, OURS_IMAGES, OURS_COLD, OURS_RANGES = (
    "p2r, lz4",
    "p2r, lz4, to the network's input",
    "p2r, lz4, cold cache",
    "p2r, lz4, by ranges",
)
OURS_COLOUR = "#0072b2"
UNCOUNTED = 4  # batches at the beginning of a turn


def take(data: Data, *, mode: Literal["raise", "clip"]) -> Batches:
    """Planes in memory -> the batch buffer, for ever."""
    buffer = np.empty((data.batch, *data.planes.shape[1:]), data.planes.dtype)
    for positions in cycle(data.steps):
        yield np.take(data.planes, positions, axis=0, out=buffer, mode=mode)


def ours(data: Data, name: str, storage: Storage | None = None, *, images: bool = False) -> Batches:
    """Our stream: batches as they were stored, or as the network gets them."""
    source = stream(data.corpus(name, storage), image=IMAGE, seed=SEED, global_batch=data.batch, num_threads=1)
    with contextlib.closing(source):
        for batch, _ in source:
            if images:
                yield batch.images()[0]
            else:
                yield from (group.voxels.numpy() for group in batch.groups)


LOCAL: dict[str, Callable[[Data], Batches]] = {
    TAKE: partial(take, mode="raise"),  # numpy's default
    TAKE_CLIP: partial(take, mode="clip"),
    OURS: partial(ours, name="lz4"),
    "p2r, zstd": partial(ours, name="zstd"),
    "p2r, npy": partial(ours, name="npy"),
    "litdata, raw": litdata,
    "mosaicml-streaming, raw": partial(mosaicml, compression=None),
    "mosaicml-streaming, zstd": partial(mosaicml, compression="zstd"),
    "webdataset, a slice per member": webdataset,
    OURS_IMAGES: partial(ours, name="lz4", images=True),
}


def get_and_decode(data: Data, bucket: Mapping[str, str], fetched_s: list[float]) -> Batches:
    """GET every shard to a file, check it, then decode what ours does; append the seconds before the first is decoded."""
    import botocore.session

    client = botocore.session.Session().create_client("s3", endpoint_url=bucket["AWS_ENDPOINT_URL"])
    entries = data.corpus("lz4").manifest["shards"]
    ends = np.cumsum([entry["num_samples"] for entry in entries])
    buffer = np.empty((data.batch, *data.planes.shape[1:]), data.planes.dtype)
    with tempfile.TemporaryDirectory(dir=data.folder) as folder:
        began, readers = time.perf_counter(), []
        for entry in entries:
            tar = Path(folder, entry["name"])
            for name, sha256 in ((tar.name, "sha256"), (index_name(tar.name), "index_sha256")):
                body, digest = client.get_object(Bucket=BUCKET, Key=f"lz4/{name}")["Body"], hashlib.sha256()
                with (tar.parent / name).open("wb") as file:
                    while piece := body.read(1 << 20):
                        digest.update(piece)
                        file.write(piece)
                if digest.hexdigest() != entry[sha256]:
                    raise ValueError(f"{name} is damaged")
            readers.append(open_shard(tar))
        fetched_s.append(time.perf_counter() - began)
        for positions in data.steps:
            shards = np.searchsorted(ends, positions, side="right")
            samples = positions - (ends - [reader.num_samples for reader in readers])[shards]
            for shard, sample, out in zip(shards.tolist(), samples.tolist(), buffer, strict=True):
                readers[shard].read_plane(sample, out)
            yield buffer


def ours_cold(data: Data, storage: Storage, cache_gib: float) -> Batches:
    """Our stream from object storage into a cache that is empty."""
    with tempfile.TemporaryDirectory(dir=data.folder) as folder:
        os.environ["P2R_CACHE"], os.environ["P2R_CACHE_GIB"] = folder, str(cache_gib)
        yield from ours(data, "lz4", storage)


def local_rows(data: Data, *, rounds: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Measure all that read from the local disk; each of them runs on from turn to turn."""
    running: dict[str, Callable[[], Turn]] = {}
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        for name, make in LOCAL.items():
            if only is None or name in (TAKE, TAKE_CLIP, OURS, *only):
                batches = stack.enter_context(contextlib.closing(make(data)))
                rows[name] = checked(name, islice(batches, len(data.steps)), data)
                if "skipped" not in rows[name]:
                    running[name] = partial(turn, batches, len(data.steps), UNCOUNTED)
        return measured(rows, take_turns(running, rounds=rounds), data, yardstick=TAKE, ours=OURS)


def s3_rows(
    data: Data, *, rounds: int, range_steps: int, only: list[str] | None, cores: set[int]
) -> list[dict[str, Any]]:
    """Measure all that read from object storage, each turn with an empty cache; a server runs meanwhile on other cores."""
    with tempfile.TemporaryDirectory(dir=data.folder) as folder, contextlib.ExitStack() as stack:
        try:
            bucket = stack.enter_context(bucket_on(cores, Path(folder)))
        except RuntimeError as error:
            return [{"contender": name, "skipped": str(error)} for name in (GET, OURS_COLD)]
        storage = Storage(f"s3://{BUCKET}/{uploaded(data.folder / 'lz4')}")
        fetched_s: list[float] = []
        contenders: dict[str, Callable[[], Batches]] = {
            GET: partial(get_and_decode, data, bucket, fetched_s),
            OURS_COLD: partial(ours_cold, data, storage, 8.0),
            OURS_RANGES: partial(ours_cold, data, storage, 1e-6),
            "litdata, raw, cold": partial(litdata, data, bucket),
            "mosaicml-streaming, raw, cold": partial(mosaicml, data, None, bucket),
            "mosaicml-streaming, zstd, cold": partial(mosaicml, data, "zstd", bucket),
        }
        rows, running = {}, {}
        for name, make in contenders.items():
            if only is None or name in (GET, OURS_COLD, OURS_RANGES, *only):
                num_steps = min(len(data.steps), range_steps) if name == OURS_RANGES else len(data.steps)
                with contextlib.closing(make()) as batches:
                    rows[name] = checked(name, islice(batches, num_steps), data)
                if "skipped" not in rows[name]:
                    running[name] = partial(whole_turn, make, num_steps)
                if name == GET:
                    rows[FETCH] = {"contender": FETCH}
        turns = take_turns(running, rounds=rounds)
    del fetched_s[0]  # of the check
    num_slices = len(data.steps) * data.batch
    turns[FETCH] = [Turn(num_slices / seconds, None) for seconds in fetched_s]
    return measured(rows, turns, data, yardstick=GET, ours=OURS_COLD)


class Turn(NamedTuple):
    """One turn of a contender."""

    slices_per_s: float
    cpu_us_per_slice: float | None
    """Of all its threads."""

    def __str__(self) -> str:
        return f"{self.slices_per_s:,.0f} slices/s"


def turn(batches: Batches, num_steps: int, num_uncounted: int = 0) -> Turn:
    """Take batches, and see how long that takes."""
    for _ in islice(batches, num_uncounted):
        pass
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    num_slices = sum(len(batch) for batch in islice(batches, num_steps))
    return Turn(num_slices / (time.perf_counter() - began_s), 1e6 * (time.process_time() - cpu_began_s) / num_slices)


def whole_turn(make: Callable[[], Batches], num_steps: int) -> Turn:
    """Take batches of a contender that begins anew."""
    with contextlib.closing(make()) as batches:
        return turn(batches, num_steps)


def checked(name: str, batches: Iterable[Any], data: Data) -> dict[str, Any]:
    """Compare what a contender delivers with the truth; return the beginning of its row, with the reason if it fails."""
    seen: list[int] = []
    try:
        for batch in batches:
            if len(batch) != data.batch:
                raise ValueError(f"a batch has {len(batch)} slices instead of {data.batch}")
            seen += [crc32(np.ascontiguousarray(plane).data) for plane in batch]
        num_true, num_different = sum(one in data.truth for one in seen), len(set(seen))
        # Who runs on may begin the next epoch before the last slices of this one have come.
        if name != OURS_IMAGES and (num_true < len(seen) or num_different < 0.7 * len(seen) or not seen):
            raise ValueError(
                f"{len(seen)} slices: {num_true} are those that were written, {num_different} are different"
            )
    except Exception as error:
        if name in (TAKE, GET) or name.startswith("p2r"):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        progress(f"{name}: skipped, {reason}")
        return {"contender": name, "skipped": reason}
    return {"contender": name}


def measured(
    rows: Mapping[str, dict[str, Any]], turns: Mapping[str, list[Turn]], data: Data, *, yardstick: str, ours: str
) -> list[dict[str, Any]]:
    """Fill the rows in."""
    rates = {name: [one.slices_per_s for one in of_name] for name, of_name in turns.items()}
    for name, values in rates.items():
        row, cpu_us = rows[name], [one.cpu_us_per_slice for one in turns[name]]
        row["slices_per_s"], row["of_rounds"] = spread(values), values
        row["mb_per_s"] = row["slices_per_s"]["median"] * data.planes[0].nbytes / 1e6
        row["cpu_us_per_slice"] = (
            None if None in cpu_us else statistics.median(used for used in cpu_us if used is not None)
        )
        row["of_yardstick"] = ratios(values, rates[yardstick])
        row["times_ours"] = ratios(rates[ours], values)
    return list(rows.values())


def memory_over_epochs(folder: Path, batch: int, num_epochs: int) -> list[float]:
    """Resident MiB of a fresh process after each epoch of our stream."""
    pin_to_one_core()
    corpus = Corpus(Storage(str(folder)), read_shards(folder))
    order = order_of([corpus], image=IMAGE, seed=SEED, global_batch=batch)
    after = []
    with contextlib.closing(stream(corpus, image=IMAGE, seed=SEED, global_batch=batch, num_threads=1)) as source:
        for _ in range(num_epochs):
            for _ in islice(source, order.steps_per_epoch[0]):
                pass
            after.append(resident_mib())
    return after


def order_at_scale(
    folder: Path, num_shards: int, num_samples: int, *, global_batch: int, world_size: int
) -> dict[str, float]:
    """Set-up and batches of the order of a corpus that exists only as its manifest; for a fresh process."""
    pin_to_one_core()
    path = folder / "manifest.json"
    rng = np.random.default_rng(SEED)
    counts = np.diff(np.sort(rng.choice(num_samples, num_shards - 1, replace=False)), prepend=0, append=num_samples)
    with path.open("w") as file:
        file.write('{"shards": [')
        for number, count in enumerate(counts.tolist()):
            entry = {"name": f"shard-{number:06d}.tar", "num_records": count // 100 + 1, "num_samples": count}
            entry |= {"num_volumes": count // 100 + 1, "num_bytes": 50_000 * count}
            entry |= {key: hashlib.sha256(f"{number}{key}".encode()).hexdigest() for key in ("sha256", "index_sha256")}
            file.write((", " if number else "") + json.dumps(entry))
        file.write("]}")
    del counts
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before, began = resident_mib(), time.perf_counter()
    corpus = Corpus(Storage(str(folder)), read_shards(folder))
    read_s = time.perf_counter() - began
    stream_state([corpus], seed=SEED, global_batch=global_batch)
    named_s = time.perf_counter() - began
    order = order_of([corpus], image=IMAGE, seed=SEED, global_batch=global_batch)
    order.samples(0, world_size=world_size)
    setup_s = time.perf_counter() - began
    peak = resident_mib("VmHWM")
    return {
        "num_shards": num_shards,
        "num_samples": num_samples,
        "global_batch": global_batch,
        "world_size": world_size,
        "read_manifest_s": read_s,
        "digest_of_manifest_s": named_s - read_s,
        "order_s": setup_s - named_s,
        "setup_s": setup_s,
        "setup_mib": peak - before,
        **_batch_times(order, world_size, rng),
    }


def _batch_times(order: Order, world_size: int, rng: np.random.Generator) -> dict[str, float]:
    """Milliseconds of a rank's batch at random steps of two epochs, and of the first batch of a third."""
    (num_steps,) = order.steps_per_epoch
    order.samples(num_steps, world_size=world_size)
    times = []
    for step in rng.integers(2 * num_steps, size=2000).tolist():
        rank = step % world_size
        began = time.perf_counter()
        samples = order.samples(step, rank=rank, world_size=world_size)
        order.locate(samples.positions)
        times.append(1e3 * (time.perf_counter() - began))
    began = time.perf_counter()
    order.samples(2 * num_steps, world_size=world_size)
    return {
        "batch_median_ms": statistics.median(times),
        "batch_p99_ms": float(np.percentile(times, 99)),
        "first_batch_of_an_epoch_ms": 1e3 * (time.perf_counter() - began),
    }


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function where nothing else has used memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def table(title: str, rows: list[dict[str, Any]], yardstick: str, ours: str) -> Table:
    columns = (
        "slices/s",
        "quartiles",
        "MB/s decoded",
        "us of CPU",
        f"% of {yardstick}",
        "quartiles",
        f"{ours} is x times",
    )
    result = Table("contender", *columns, title=title, title_justify="left")
    for row in rows:
        if "skipped" in row:
            result.add_row(row["contender"], f"[dim]{row['skipped']}[/dim]")
            continue
        per_s, of, cpu_us = row["slices_per_s"], row["of_yardstick"], row["cpu_us_per_slice"]
        result.add_row(
            row["contender"],
            f"{per_s['median']:,.0f}",
            f"{per_s['low']:,.0f} to {per_s['high']:,.0f}",
            f"{row['mb_per_s']:,.0f}",
            "" if cpu_us is None else f"{cpu_us:,.0f}",
            f"{100 * of['median']:.0f}",
            f"{100 * of['low']:.0f} to {100 * of['high']:.0f}",
            f"{row['times_ours']['median']:.2f}",
        )
    return result


def picture(local: list[dict[str, Any]], remote: list[dict[str, Any]], subtitle: str) -> bytes:
    """Horizontal bars, ours in colour; whiskers are quartiles over the rounds."""
    parts = [
        ("From the local disk (% of the take)", [row for row in local if row["contender"] != OURS_IMAGES]),
        ("From object storage, with an empty cache (% of GET to file, check, decode)", remote),
    ]
    parts = [(title, [row for row in rows if "skipped" not in row]) for title, rows in parts]
    parts = [(title, rows) for title, rows in parts if rows]
    heights = [0.33 * len(rows) + 0.8 for _, rows in parts]
    whole = sum(heights) + 0.7
    figure = new_figure(9.0, whole)
    headline(figure, "Slices a second on one core", subtitle)
    top = whole - 0.7
    for (title, rows), height in zip(parts, heights, strict=True):
        axes = figure.add_axes((0.26, (top - height + 0.35) / whole, 0.71, (height - 0.7) / whole))
        top -= height
        widest = max(row["slices_per_s"]["high"] for row in rows)
        for place, row in enumerate(rows):
            per_s, is_yardstick = row["slices_per_s"], row["contender"] in (TAKE, GET)
            colour = (
                OURS_COLOUR
                if row["contender"].startswith("p2r")
                else FAINT
                if row["contender"] in (TAKE, TAKE_CLIP, GET, FETCH)
                else "#c4c4c4"
            )
            axes.barh(place, per_s["median"], height=0.68, color=colour)
            axes.plot([per_s["low"], per_s["high"]], [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
            share = "" if is_yardstick else f"   {100 * row['of_yardstick']['median']:.0f} %"
            end = max(per_s["high"], per_s["median"]) + 0.01 * widest
            axes.text(end, place, f"{per_s['median']:,.0f}{share}", va="center", fontsize=9, color=INK)
        axes.set_yticks(range(len(rows)), [row["contender"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * widest)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(colors=FAINT, labelcolor=INK, length=0, labelsize=9)
        for side in ("top", "right", "bottom", "left"):
            axes.spines[side].set_visible(False)
    return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="keeps the samples in every contender's form; else they are made anew"
    )
    parser.add_argument("--volumes", type=int, default=48, help="of 88 slices each")
    parser.add_argument("--size", type=int, default=256, help="edge of a slice")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--s3-rounds", type=int, default=5, help="0: nothing from object storage")
    parser.add_argument(
        "--range-steps", type=int, default=16, help="batches by ranges; a whole pass would take minutes"
    )
    parser.add_argument("--epochs", type=int, default=10, help="over which memory is watched")
    parser.add_argument("--shards", type=int, default=100_000, help="of the manifest whose order is timed")
    parser.add_argument("--samples", type=int, default=10**9, help="of the manifest whose order is timed")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contenders to measure; the yardsticks and ours always are"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # a peer's own
    torch.set_num_threads(1)
    _, others = pin_to_one_core()
    with tempfile.TemporaryDirectory(prefix="p2r-bench-") as temporary:
        data = prepare(
            options.folder or Path(temporary, "data"),
            num_volumes=options.volumes,
            size=options.size,
            batch=options.batch,
        )
        local = local_rows(data, rounds=options.rounds, only=options.only)
        remote = []
        if options.s3_rounds:
            remote = s3_rows(
                data, rounds=options.s3_rounds, range_steps=options.range_steps, only=options.only, cores=others
            )
        memory = in_a_fresh_process(memory_over_epochs, data.folder / "lz4", data.batch, options.epochs)
        order = in_a_fresh_process(
            order_at_scale, Path(temporary), options.shards, options.samples, global_batch=768, world_size=8
        )
        sizes = {
            name: sum(entry["num_bytes"] for entry in data.corpus(name).manifest["shards"]) / data.planes.nbytes
            for name in FORMS
        }
    edge = f"{options.size} x {options.size}"
    setting = f"{len(data.planes):,} slices of {edge} int16, batches of {data.batch}, one core of {cpu_name()}"
    console = Console(width=170)
    console.print(table("From the local disk", local, "the take", OURS))
    if remote:
        title = "From object storage, with an empty cache"
        console.print(table(title, remote, "GET, check, decode", OURS_COLD))
    console.print(f"{setting}; bytes over raw: " + ", ".join(f"{name} {size:.2f}" for name, size in sizes.items()))
    is_flat = memory[-1] <= 1.05 * memory[0]
    console.print(
        f"memory of a stream: {memory[0]:.0f} MiB after the first epoch, {memory[-1]:.0f} MiB after {len(memory)}, "
        f"{max(memory):.0f} MiB at most: {'flat' if is_flat else 'it grows'}"
    )
    console.print(
        f"order of {order['num_samples']:,} samples in {order['num_shards']:,} shards: set up in {order['setup_s']:.2f} s and "
        f"{order['setup_mib']:.0f} MiB (manifest read {order['read_manifest_s']:.2f} s, its digest "
        f"{order['digest_of_manifest_s']:.2f} s, order {order['order_s']:.2f} s); a rank's batch of "
        f"{order['global_batch'] // order['world_size']}: {order['batch_median_ms']:.2f} ms median, {order['batch_p99_ms']:.2f} ms "
        f"p99, {order['first_batch_of_an_epoch_ms']:.0f} ms for the first of an epoch"
    )
    if options.json:
        found = {"setting": setting, "bytes_over_raw": sizes, "local": local, "object_storage": remote, "order": order}
        found["memory"] = {"mib_after_epoch": memory, "first": memory[0], "last": memory[-1], "is_flat": is_flat}
        options.json.write_text(json.dumps(found, indent=1))
    if options.picture:
        options.picture.write_bytes(picture(local, remote, setting))


if __name__ == "__main__":
    main()
