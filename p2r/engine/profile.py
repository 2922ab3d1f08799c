"""Some steps of a run -> where their time and memory go: a trace, tables, a picture, below `<storage>/pretrain/profile`.

The run goes on as it would: the first steps pass, then one in which what the backward pass keeps is counted, then those that
are recorded. Parts of a step are measured by the device's own events on a GPU and by the clock on a CPU. Decoding (on threads)
and copying (on a stream of its own) go on beside the steps, and are no part of them.
"""

import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

from p2r.documents import checked
from p2r.engine.counting import SavedTensors, storages_of
from p2r.errors import DamagedError
from p2r.storage import Storage

NUM_WARM_UP = 3
"""Steps that pass before those that are recorded."""
PARTS = ("wait", "images", "views", "points", "forward", "loss", "backward", "optimizer")
"""Of a step, in order: what `p2r.engine.step.take_step` names, after waiting for data."""
BESIDE = ("decode", "copy")
"""What goes on at the same time."""

_MIB = 2**20
_NUM_OPERATORS = 10
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class Part:
    """Where time goes."""

    name: str
    seconds_per_step: float
    share: float
    """Of a step's time."""


@dataclass(frozen=True)
class Operator:
    """A kernel on a GPU, an operator on a CPU."""

    name: str
    seconds_per_step: float
    """Its own, without what it calls."""
    share: float
    """Of the time of all of them."""
    calls_per_step: float


@dataclass(frozen=True)
class Memory:
    """What one process holds, counted in tensors."""

    weights_mib: float
    gradients_mib: float
    """With the buffers in which ranks reduce them."""
    optimizer_mib: float
    """The optimizer's states and, with bf16, its fp32 copy of the weights; this process's part of them."""
    activations_mib: float
    """The most that forward passes keep for backward ones."""
    peak_mib: float
    """The most that the recorded steps held. On a GPU: in tensors; on a CPU: of the whole process since it began."""


@dataclass(frozen=True)
class Profile:
    """What was found."""

    device: str
    first_step: int
    num_steps: int
    seconds_per_step: float
    parts: tuple[Part, ...]
    """Of a step; they add up to it with `other`, what none of them names."""
    beside: tuple[Part, ...]
    """On threads and streams of their own."""
    operators: tuple[Operator, ...]
    """The dearest."""
    memory: Memory


_PROFILE = TypeAdapter(Profile)


class Profiler:
    """Follows a run of one process and profiles some of its steps.

    Args:
        storage: `<storage>/pretrain`.
        num_steps: How many steps are recorded.
        device: This process's.
        decode_s: Gives the seconds that threads have decoded for so far.
    """

    def __init__(
        self, storage: Storage, *, num_steps: int, device: torch.device, decode_s: Callable[[], float]
    ) -> None:
        self._storage, self._num_steps, self._device, self._decode_s = storage, num_steps, device, decode_s
        self._num_seen, self._records, self._is_done = 0, False, False
        self._first_step, self._num_recorded = 0, 0
        self._began, self._decode_began, self._wait_s = 0.0, 0.0, 0.0
        self._spans: list[tuple[str, Any, Any]] = []
        self._gradients_mib, self._saved = 0.0, SavedTensors(frozenset())
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._recorder = torch.profiler.profile(activities=activities, acc_events=True)
        self._engine: Any = None

    @contextmanager
    def step(self, step: int, engine: Any) -> Iterator[None]:
        """Everything that a step does, waiting for its data included."""
        self._engine = engine
        self._num_seen += 1
        if self._num_seen > NUM_WARM_UP and not self._records and not self._is_done:
            self._begin(step)
        with ExitStack() as stack:
            if self._counts:
                self._saved = SavedTensors(frozenset(storages_of(engine.module.parameters())))
                stack.enter_context(self._saved.hooks())
                self._recorder.prepare_trace()
            yield
        self._num_recorded += self._records

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A part of a step."""
        if self._counts and name == "optimizer":
            self._gradients_mib = max(self._gradients_mib, _gradients_mib(self._engine))
        with record_function(name):
            begin = self._now() if self._records else None
            yield
            if begin is not None:
                self._spans.append((name, begin, self._now()))

    def waited(self, seconds: float) -> None:
        """Add to the time in which a step could not begin for want of data."""
        self._wait_s += seconds * self._records

    def written(self, *, is_last: bool) -> str | None:
        """Return where the profile lies below the storage, right after it was written; None before and afterwards.

        Args:
            is_last: No further step follows: what was recorded is all there will be.
        """
        if not self._records or not (is_last or self._num_recorded == self._num_steps):
            return None
        profile, trace = self._end()
        with tempfile.TemporaryDirectory(prefix="p2r-profile-") as name:
            local = Path(name, "trace.json.gz")
            trace(str(local))
            self._storage.upload(local, "profile/trace.json.gz")
        self._storage.write_json("profile/profile.json", asdict(profile))
        self._storage.write_bytes("profile/profile.md", f"# Profile\n\n{to_text(profile)}".encode())
        self._storage.write_bytes("profile/profile.png", picture(profile))
        return "profile"

    @property
    def _counts(self) -> bool:
        return self._num_seen == NUM_WARM_UP

    def _begin(self, step: int) -> None:
        self._first_step, self._records = step, True
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._synchronise()
        self._recorder.start_trace()
        self._began, self._decode_began = time.perf_counter(), self._decode_s()

    def _end(self) -> tuple[Profile, Callable[[str], None]]:
        self._synchronise()
        seconds = time.perf_counter() - self._began
        decode_s = self._decode_s() - self._decode_began
        self._recorder.stop_trace()
        self._records, self._is_done = False, True
        of_parts = dict.fromkeys((*PARTS, *BESIDE), 0.0) | {"wait": self._wait_s, "decode": decode_s}
        for name, begin, end in self._spans:
            of_parts[name] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        num = self._num_recorded
        of_parts["other"] = max(0.0, seconds - sum(of_parts[name] for name in PARTS))
        parts = {name: Part(name, value / num, value / seconds) for name, value in of_parts.items()}
        profile = Profile(
            device=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU",
            first_step=self._first_step,
            num_steps=num,
            seconds_per_step=seconds / num,
            parts=tuple(parts[name] for name in (*PARTS, "other")),
            beside=tuple(parts[name] for name in BESIDE if name == "decode" or self._device.type == "cuda"),
            operators=_dearest(self._recorder.key_averages(), num, on_gpu=self._device.type == "cuda"),
            memory=Memory(
                weights_mib=_mib(self._engine.module.parameters()),
                gradients_mib=self._gradients_mib,
                optimizer_mib=_optimizer_mib(self._engine),
                activations_mib=self._saved.peak_bytes / _MIB,
                peak_mib=peak_mib(self._device),
            ),
        )
        return profile, self._recorder.export_chrome_trace

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def to_text(profile: Profile) -> str:
    """Return the profile as Markdown tables, which a terminal shows as well."""
    steps = (
        f"{profile.num_steps} steps from step {profile.first_step} on, {1000 * profile.seconds_per_step:.1f} ms each"
    )
    lines = [f"{steps}, on {profile.device}.", "", "| part | ms per step | share |", "|---|---:|---:|"]
    lines += [_row(part.name, part) for part in profile.parts]
    lines += [_row(f"{part.name} (beside)", part) for part in profile.beside]
    lines += ["", "| dearest, without what they call | ms per step | share | calls |", "|---|---:|---:|---:|"]
    lines += [
        f"| {one.name[:80].replace('|', '/')} | {1000 * one.seconds_per_step:.2f} | {one.share:.1%} | {one.calls_per_step:.0f} |"
        for one in profile.operators
    ]
    lines += ["", "| memory | MiB |", "|---|---:|"]
    lines += [f"| {name.removesuffix('_mib')} | {value:.1f} |" for name, value in asdict(profile.memory).items()]
    return "\n".join(lines) + "\n"


def _row(name: str, part: Part) -> str:
    return f"| {name} | {1000 * part.seconds_per_step:.2f} | {part.share:.1%} |"


def picture(profile: Profile) -> bytes:
    """Draw time by part and memory by kind, as a PNG."""
    # Matplotlib takes seconds to import; a worker that is not profiled needs none.
    from p2r.report.canvas import INK, new_figure, plain, to_png

    figure = new_figure(9, 3.6)
    memory = {name.removesuffix("_mib"): value for name, value in asdict(profile.memory).items()}
    charts: tuple[tuple[str, dict[str, float]], ...] = (
        ("ms per step", {part.name: 1000 * part.seconds_per_step for part in profile.parts}),
        ("MiB", memory),
    )
    for place, (unit, bars) in enumerate(charts, start=1):
        axes = figure.add_subplot(1, 2, place)
        plain(axes)
        drawn = axes.bar(list(bars), list(bars.values()), color="#0072b2", width=0.7)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7, color=INK)
        axes.set_title(unit, fontsize=9, loc="left", color=INK)
        axes.tick_params(axis="x", labelrotation=40, labelsize=8)
    figure.tight_layout()
    return to_png(figure)


def peak_mib(device: torch.device) -> float:
    """Return the most memory in tensors since the last reset on a GPU, of this process since it began on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def _dearest(events: Iterable[Any], num_steps: int, *, on_gpu: bool) -> tuple[Operator, ...]:
    named = {*PARTS, *BESIDE}
    if on_gpu:
        found = [
            (one.self_device_time_total, one)
            for one in events
            if str(one.device_type).endswith("CUDA") and one.key not in named
        ]
    else:
        found = [(one.self_cpu_time_total, one) for one in events if one.key not in named]
    total = max(sum(micros for micros, _ in found), 1e-9)
    found.sort(key=lambda pair: pair[0], reverse=True)
    return tuple(
        Operator(one.key, micros / 1e6 / num_steps, micros / total, one.count / num_steps)
        for micros, one in found[:_NUM_OPERATORS]
    )


def _gradients_mib(engine: Any) -> float:
    optimizer = engine.optimizer
    tensors = [weight.grad for weight in engine.module.parameters()]
    tensors += [part for parts in getattr(optimizer, "averaged_gradients", {}).values() for part in parts or ()]
    tensors += [part for bucket in getattr(optimizer, "ipg_buckets", {}).values() for part in bucket.buffer]
    return _mib(tensor for tensor in tensors if tensor is not None)


def _optimizer_mib(engine: Any) -> float:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    masters = [weight for group in inner.param_groups for weight in group["params"]]
    return _mib((*states, *masters, *(engine.mean_weights or ())), apart=storages_of(engine.module.parameters()))


def _mib(tensors: Iterable[Tensor], *, apart: Iterable[int] = ()) -> float:
    storages = storages_of(tensors)
    return sum(size for pointer, size in storages.items() if pointer not in set(apart)) / _MIB


def profile_text(storage: Storage) -> str:
    """Return the tables that lie at `<storage>/pretrain/profile`."""
    where = "profile/profile.json"
    value = storage.read_json(where, max_bytes=_MAX_BYTES)
    return to_text(checked(_PROFILE, value, where=f"{storage.at(where)} is damaged:", error=DamagedError))
