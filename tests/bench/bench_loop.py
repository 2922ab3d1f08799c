"""What our loop costs beside one written by hand: images a second of `p2r run` on one worker, and of a bare torch loop.

    python tests/bench/bench_loop.py                                         # this machine: the GPU if there is one
    python tests/bench/bench_loop.py --size 96 --batch 8 --width 16 --json loop.json --picture loop.png
    python tests/bench/bench_loop.py --scans /data/acdc/images --spacing 1.5

Ours is the path of a job: a Ray Train worker of its own, started by `cluster.pretrain`, with DeepSpeed's engine. It includes
our stream, checks, reports (one a turn, with health and history), lines to the driver and the endpoint of metrics. Checkpoints
are not in it: `bench_checkpoint.py` measures them. Bare is what one would write without all this, and nothing slower. It has
the same network from the same seed, and batches of the same corpus by the same stream. It has the same views, points and loss;
torch's fused AdamW, clip_grad_norm_; the loss read once a turn. It has neither Ray nor DeepSpeed, and checks and reports
nothing. It runs in a process of its own with the number of threads and the niceness that Ray gave our worker. bf16 is autocast
there. Mean losses of the first turn must agree.

Both live at the same time and take turns: ours is held inside its worker where it has handed a report over, bare after as many
steps. A turn is timed by who gives turns, from the word to the answer; the first does not count. Batches that a stream has made
ahead while the other one ran are in both alike. Ratios are of rounds, each beginning with another contender, and medians are
stated. `CPU ms/image` is what a contender's process used of the processor: a second opinion where other programs run. `beside` is
what all other processes of the benchmark and of its Ray used meanwhile, in cores: it slows down both where no core is free for it.
Losses are means over a turn. Lines of the run, on stderr, count its pauses as its own time; the table does not.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from charts import OTHERS_COLOUR, OURS_COLOUR, bar_picture
from rounds import cpu_name, progress, ratios, spread, take_turns
from training import Setting, add_options, add_variant, setting_of

import cluster.pretrain
from cluster.executor import RayExecutor
from cluster.progress import relay
from cluster.session import session
from p2r.config import IngestConfig, PretrainConfig
from p2r.data.corpus import ingest_locally
from p2r.data.stream import stream
from p2r.engine.corpora import corpora_of
from p2r.engine.feed import feed
from p2r.job import Job, MetricsConfig, Resources
from p2r.logs import Say, fields_of
from p2r.loss import Findings, corresponding_points, info_nce
from p2r.model.pix2rep import Pix2Rep
from p2r.randomness import keyed_generator
from p2r.schedule import learning_rate
from p2r.storage import Storage
from p2r.views.pair import make_views

OURS, BARE = "p2r run, one worker", "bare torch loop"
AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}
"""How far mean losses of the first turn may lie apart, relative, by precision: the two round differently in bf16."""
LIMIT_S = 900.0
"""Time after which a contender that does not answer is given up."""


class Gate:
    """Where a contender waits for its turn; at the other end of the connection is a `Contender`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def wait(self, **facts: float) -> None:
        """Say what the turn was like that is over, and return when the next one begins.

        Raises:
            EOFError: Nobody gives turns any more.
        """
        own = {"pid": os.getpid(), "num_threads": torch.get_num_threads(), "niceness": os.nice(0)}
        self._connection.send_bytes(json.dumps({**facts, **own}).encode())
        self._connection.recv_bytes()


class GatedQueue:
    """The queue that a run's worker puts its lines into; after every report the worker waits for its next turn.

    Args:
        queue: The run's own.
        address: Of who gives turns.
        num_turns: After so many reports the run goes on without waiting.
    """

    def __init__(self, queue: Any, address: str, num_turns: int) -> None:
        self._queue, self._address, self._turns_left = queue, address, num_turns
        self._gate: Gate | None = None

    def put(self, line: str) -> None:
        """Hand a line over, and wait if it is a report."""
        self._queue.put(line)
        fields = fields_of(line)
        step, loss = fields.get("step"), fields.get("loss")
        if isinstance(step, int) and isinstance(loss, float) and self._turns_left:
            self._turns_left -= 1
            self._gate = self._gate or Gate(Client(self._address))
            self._gate.wait(step=step, loss=loss)


@dataclass(frozen=True)
class Turn:
    """One turn of a contender."""

    images_per_s: float
    loss: float
    """Mean over its steps."""
    cpu_s_per_image: float
    """What its process used of the processor."""
    beside: float
    """What all but the contenders used of the processor meanwhile, in cores."""

    def __str__(self) -> str:
        return f"{self.images_per_s:,.2f} images/s, loss {self.loss:.4f}"


class Contender:
    """A training that waits at a `Gate`, from the side of who gives turns; it begins with one that nobody has to give."""

    def __init__(self, name: str, connection: Connection, config: PretrainConfig) -> None:
        self.name, self._connection, self._batch = name, connection, config.global_batch
        self.first = self._last = self._answer()
        self.num_images = 0

    def turn(self, contenders: Sequence["Contender"]) -> Turn:
        """Let it go on to its next answer, while all of `contenders` but this one wait."""
        before, before_cpu_s = self._last, cpu_s_by_process()
        began = time.perf_counter()
        self.release()
        self._last = self._answer()
        seconds = time.perf_counter() - began
        num_images = (self._last["step"] - before["step"]) * self._batch
        self.num_images += num_images
        used_s = {pid: cpu_s - before_cpu_s.get(pid, 0.0) for pid, cpu_s in cpu_s_by_process().items()}
        own_s = used_s[self.first["pid"]]
        beside_s = sum(used_s.values()) - sum(used_s[contender.first["pid"]] for contender in contenders)
        return Turn(num_images / seconds, self._last["loss"], own_s / num_images, beside_s / seconds)

    def release(self) -> None:
        """Let it go on."""
        self._connection.send_bytes(b"go")

    def _answer(self) -> dict[str, Any]:
        if not self._connection.poll(LIMIT_S):
            raise RuntimeError(f"{self.name} has not answered for {LIMIT_S:.0f} s")
        try:
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(f"{self.name} ended before its last turn; why is said above") from error
        return answer


def cpu_s_by_process() -> dict[int, float]:
    """Return the processor's time that this process and all below it have used, by their ids."""
    own = psutil.Process()
    used: dict[int, float] = {}
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used[process.pid] = times.user + times.system
    return used


@contextlib.contextmanager
def ours(job: Job, folder: Path, *, num_turns: int) -> Iterator[Contender]:
    """Run a job's pretraining on Ray as `p2r run` does; yield it at its first report, and let it end afterwards."""
    assert job.pretrain is not None
    address, storage = str(folder / "turns"), Storage(job.storage)

    @contextlib.contextmanager
    def gated(say: Say) -> Iterator[GatedQueue]:
        with relay(say) as queue:
            yield GatedQueue(queue, address, num_turns)

    config = job.pretrain
    assert config is not None

    def run() -> None:
        try:
            executor.pretrain(config, storage=storage.child("pretrain"), corpus=storage.child("corpus"), say=progress)
        except Exception as error:
            progress(f"{OURS}: {error}")
            raise
        finally:
            with contextlib.suppress(OSError):  # whoever still waits for the worker to call is told that it will not
                Client(address).close()

    with (
        mock.patch.object(cluster.pretrain, "relay", gated),
        RayExecutor(job) as executor,
        ThreadPoolExecutor(1) as pool,
        Listener(address, "AF_UNIX") as listener,
    ):
        running = pool.submit(run)
        with listener.accept() as connection:
            yield Contender(OURS, connection, job.pretrain)
        running.result()


@contextlib.contextmanager
def bare(config: PretrainConfig, corpus: Storage, device: torch.device, *, like: Contender) -> Iterator[Contender]:
    """Run the bare loop in a process that is treated as another contender's; yield it after its first turn."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=train_bare, args=(there, config, corpus.url, device, like.first), daemon=True)
    process.start()
    there.close()
    try:
        yield Contender(BARE, here, config)
    finally:
        here.close()
        process.join(60)
        process.kill()


def train_bare(
    pipe: Connection, config: PretrainConfig, corpus: str, device: torch.device, like: dict[str, Any]
) -> None:
    """Be the bare loop: as many steps a turn as ours has in a report."""
    os.nice(max(0, like["niceness"] - os.nice(0)))
    torch.set_num_threads(like["num_threads"])
    gate, num_steps, taken = Gate(pipe), config.report_interval, 0
    with contextlib.closing(bare_steps(config, Storage(corpus), device)) as steps, contextlib.suppress(EOFError):
        while losses := list(islice(steps, num_steps)):
            taken += len(losses)
            gate.wait(step=taken, loss=float(torch.stack(losses).mean()))


def bare_steps(config: PretrainConfig, corpus: Storage, device: torch.device) -> Generator[Tensor, None, None]:
    """Train, and yield the loss of every step."""
    torch.manual_seed(config.seed)
    model = Pix2Rep(config.model, dimensions=config.image.dimensions).to(device)
    if config.compile:
        model.backbone.compile(dynamic=False)
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    settings, loss_settings = config.optimizer, config.loss
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        fused=True,
    )
    decoded = stream(
        corpora_of(config, corpus),
        image=config.image,
        seed=config.seed,
        global_batch=config.global_batch,
        pin_memory=device.type == "cuda",
    )
    with contextlib.closing(feed(decoded, device)) as batches:
        for step, (batch, _) in enumerate(islice(batches, config.steps)):
            rate = learning_rate(
                step,
                peak=settings.learning_rate,
                num_steps=config.steps,
                warmup_fraction=settings.warmup_fraction,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            image, inside = batch.images(device)
            of_batch: dict[str, Any] = {"seed": config.seed, "epochs": batch.epochs, "positions": batch.positions}
            views = make_views(image, inside, config=config.views, spacing_mm=batch.spacing_mm, **of_batch)
            pairs = corresponding_points(
                views.warp,
                views.valid,
                num_points=loss_settings.pixel_pairs_per_image,
                generators=[
                    keyed_generator(config.seed, "points", int(epoch), int(position))
                    for epoch, position in zip(batch.epochs, batch.positions, strict=True)
                ],
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                queries, keys = model(views.a, views.b, pairs.a, pairs.b)
            loss = info_nce(
                queries,
                keys,
                temperature=loss_settings.temperature,
                form=loss_settings.form,
                weights=pairs.weight.flatten(),
                findings=Findings(),  # nobody reads them, and nobody waits for the device
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            yield loss.detach()


def refuse_another_training(contenders: Sequence[Contender], config: PretrainConfig) -> None:
    """Raise ValueError unless the losses of the first turn agree."""
    one, other = (contender.first["loss"] for contender in contenders)
    if not math.isclose(one, other, rel_tol=AGREEMENT[config.precision]):
        raise ValueError(
            f"these are two trainings: the mean loss of the first turn is {one} in one, {other} in the other"
        )


def measure(job: Job, folder: Path, *, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Measure both contenders; the corpus is there, and so is Ray."""
    config = job.pretrain
    assert config is not None
    with ours(job, folder, num_turns=1 + rounds) as under_ray:
        with bare(config, Storage(job.storage).child("corpus"), device, like=under_ray) as plain:
            both = (under_ray, plain)
            refuse_another_training(both, config)
            turns = take_turns(
                {one.name: lambda one=one: one.turn(both) for one in both},  # type: ignore[misc]
                rounds=rounds,
            )
        under_ray.release()
    rates = {name: [turn.images_per_s for turn in of_name] for name, of_name in turns.items()}
    return [
        {
            "contender": one.name,
            "images": one.num_images,
            "images_per_s": spread(rates[one.name]),
            "of_rounds": rates[one.name],
            "of_bare": ratios(rates[one.name], rates[BARE]),
            "first_loss": one.first["loss"],
            "last_loss": turns[one.name][-1].loss,
            "num_threads": one.first["num_threads"],
            "cpu_s_per_image": spread([turn.cpu_s_per_image for turn in turns[one.name]]),
            "beside": spread([turn.beside for turn in turns[one.name]]),
        }
        for one in both
    ]


def job_of(setting: Setting, options: argparse.Namespace, folder: Path) -> Job:
    """Return the job that a user would run: one worker, a report a turn, one step more than there are turns for."""
    num_steps = (1 + options.rounds) * options.steps + 1
    config = setting.config(
        spacing_mm=options.spacing,
        precision=options.precision,
        compile=options.compile,
        steps=num_steps,
        report_interval=options.steps,
        checkpoint_interval=num_steps,
    )
    gpus: Any = int(setting.device.type == "cuda")
    return Job(
        kind="pretrain",
        name="bench-loop",
        storage=f"file://{folder}/storage",
        retries=0,
        resources=Resources(num_workers=1, cpus_per_worker=options.threads, gpus_per_worker=gpus),
        metrics=MetricsConfig(folder=str(folder / "metrics")),
        ingest=IngestConfig(
            sources=(options.scans,),
            licence="LicenseRef-as-the-source",
            shard_size_mib=8,
            record="planes" if setting.dimensions == 2 else "blocks",
        ),
        pretrain=config,
    )


def table(rows: list[dict[str, Any]]) -> Table:
    columns = (
        "images/s",
        "quartiles",
        "% of bare",
        "quartiles",
        "CPU ms/image",
        "beside, cores",
        "first loss",
        "last loss",
    )
    result = Table("contender", *columns)
    for row in rows:
        per_s, of = row["images_per_s"], row["of_bare"]
        result.add_row(
            row["contender"],
            f"{per_s['median']:,.2f}",
            f"{per_s['low']:,.2f} to {per_s['high']:,.2f}",
            f"{100 * of['median']:.1f}",
            f"{100 * of['low']:.1f} to {100 * of['high']:.1f}",
            f"{1e3 * row['cpu_s_per_image']['median']:,.1f}",
            f"{row['beside']['median']:.2f}",
            f"{row['first_loss']:.5f}",
            f"{row['last_loss']:.5f}",
        )
    return result


def picture(rows: list[dict[str, Any]], subtitle: str) -> bytes:
    """Images a second as bars; whiskers are quartiles over the rounds."""
    return bar_picture(
        "What our loop costs beside a bare one",
        subtitle,
        [row["contender"] for row in rows],
        [row["images_per_s"] for row in rows],
        title="images a second, and % of the bare loop's in the same round",
        texts=[f"{row['images_per_s']['median']:,.3g}   {100 * row['of_bare']['median']:.1f} %" for row in rows],
        colours=[OURS_COLOUR if row["contender"] == OURS else OTHERS_COLOUR for row in rows],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=9, steps=10)
    add_variant(parser)
    parser.add_argument(
        "--scans", default="template://icbm152/images?subjects=16&seed=0", help="folder, list or URL to train on"
    )
    parser.add_argument("--spacing", type=float, default=2.0, help="edge of a pixel of the images, mm")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of both contenders; default: one a core")
    options = parser.parse_args()
    setting = setting_of(options)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # workers get it from here
    os.environ.pop("RAY_ADDRESS", None)  # turns are given on this machine
    with tempfile.TemporaryDirectory(prefix="p2r-bench-") as name:
        job = job_of(setting, options, Path(name))
        assert job.ingest is not None
        for done in ingest_locally(job.ingest, Storage(job.storage).child("corpus")):
            progress(done.line())
        with session():
            rows = measure(job, Path(name), device=setting.device, rounds=options.rounds)
    device = torch.cuda.get_device_name() if setting.device.type == "cuda" else cpu_name()
    how = f"{options.precision}{', compiled' if options.compile else ''}, turns of {options.steps} steps"
    where = f"{device}, {options.threads} thread{'s' * (options.threads > 1)} of {cores} cores"
    console = Console(width=150)
    console.print(table(rows))
    console.print(f"{setting}; {how}; {where}; torch {torch.__version__}")
    if options.json:
        found = {"device": device, "cores": cores, "setting": str(setting), "variant": how, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1))
    if options.picture:
        options.picture.write_bytes(picture(rows, f"{setting}; {how}; {where}"))


if __name__ == "__main__":
    main()
