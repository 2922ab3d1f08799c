"""Profile of some steps of a run: a trace, tables and a picture of time and memory, in `<storage>/pretrain/profile`.

The run is not changed. First come warm-up steps, then one that counts the memory saved for the backward pass, then the
recorded steps. On a GPU, parts of a step are timed by the device's events, on a CPU by the clock. Decoding (on threads) and
copying (on its own stream) run beside the steps, and are not part of them.
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
"""Number of warm-up steps before the recorded ones."""
PARTS = ("wait", "images", "views", "points", "forward", "loss", "backward", "optimizer")
"""Parts of a step, in order: the wait for data, then the names in `p2r.engine.step.take_step`."""
BESIDE = ("decode", "copy")
"""Work that runs beside the steps."""

_MIB = 2**20
_NUM_OPERATORS = 10
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class Part:
    """Time of one part of a step."""

    name: str
    seconds_per_step: float
    share: float
    """Fraction of a step's time."""


@dataclass(frozen=True)
class Operator:
    """A GPU kernel or CPU operator."""

    name: str
    seconds_per_step: float
    """Its own time, without the operators that it calls."""
    share: float
    """Fraction of the time of all operators."""
    calls_per_step: float


@dataclass(frozen=True)
class Memory:
    """Memory of one process, counted in tensors."""

    weights_mib: float
    gradients_mib: float
    """Gradients, and the buffers in which ranks reduce them."""
    optimizer_mib: float
    """This process's part of the optimizer's state and, with bf16, of the fp32 copy of the weights."""
    activations_mib: float
    """Largest size of the tensors that forward passes save for backward."""
    peak_mib: float
    """Peak during the recorded steps. On a GPU: in tensors; on a CPU: of the whole process since it started."""


@dataclass(frozen=True)
class Profile:
    """Time and memory of the recorded steps."""

    device: str
    first_step: int
    num_steps: int
    seconds_per_step: float
    parts: tuple[Part, ...]
    """Parts of a step; together with `other`, the unnamed rest, they add up to it."""
    beside: tuple[Part, ...]
    """Work on separate threads and streams."""
    operators: tuple[Operator, ...]
    """The most expensive operators."""
    memory: Memory


_PROFILE = TypeAdapter(Profile)


class Profiler:
    """Follows the run of one process, and profiles some of its steps.

    Args:
        storage: `<storage>/pretrain`.
        num_steps: Number of recorded steps.
        device: Device of this process.
        decode_s: Returns the seconds that threads have spent decoding so far.
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
        """Cover a whole step, including the wait for its data."""
        self._engine = engine
        self._num_seen += 1
        if self._num_seen > NUM_WARM_UP and not self._records and not self._is_done:
            self._start_recording(step)
        with ExitStack() as stack:
            if self._counts_memory:
                self._saved = SavedTensors(frozenset(storages_of(engine.module.parameters())))
                stack.enter_context(self._saved.hooks())
                self._recorder.prepare_trace()
            yield
        self._num_recorded += self._records

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Cover one part of a step."""
        if self._counts_memory and name == "optimizer":
            self._gradients_mib = max(self._gradients_mib, _gradients_mib(self._engine))
        with record_function(name):
            begin = self._timestamp() if self._records else None
            yield
            if begin is not None:
                self._spans.append((name, begin, self._timestamp()))

    def waited(self, seconds: float) -> None:
        """Add time that a step waited for data."""
        self._wait_s += seconds * self._records

    def written(self, *, is_last: bool) -> str | None:
        """Write the profile once it is complete, and return its path in the storage; None at any other time.

        Args:
            is_last: No further step follows, so the recorded steps are all there will be.
        """
        if not self._records or not (is_last or self._num_recorded == self._num_steps):
            return None
        profile, trace = self._stop_recording()
        with tempfile.TemporaryDirectory(prefix="p2r-profile-") as name:
            local = Path(name, "trace.json.gz")
            trace(str(local))
            self._storage.upload(local, "profile/trace.json.gz")
        self._storage.write_json("profile/profile.json", asdict(profile))
        self._storage.write_bytes("profile/profile.md", f"# Profile\n\n{to_text(profile)}".encode())
        self._storage.write_bytes("profile/profile.png", picture(profile))
        return "profile"

    @property
    def _counts_memory(self) -> bool:
        return self._num_seen == NUM_WARM_UP

    def _start_recording(self, step: int) -> None:
        self._first_step, self._records = step, True
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._synchronise()
        self._recorder.start_trace()
        self._began, self._decode_began = time.perf_counter(), self._decode_s()

    def _stop_recording(self) -> tuple[Profile, Callable[[str], None]]:
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
            operators=_most_expensive(self._recorder.key_averages(), num, on_gpu=self._device.type == "cuda"),
            memory=Memory(
                weights_mib=_size_mib(self._engine.module.parameters()),
                gradients_mib=self._gradients_mib,
                optimizer_mib=_optimizer_mib(self._engine),
                activations_mib=self._saved.peak_bytes / _MIB,
                peak_mib=peak_mib(self._device),
            ),
        )
        return profile, self._recorder.export_chrome_trace

    def _timestamp(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def to_text(profile: Profile) -> str:
    """Return the profile as Markdown tables, which are also readable in a terminal."""
    steps = (
        f"{profile.num_steps} steps from step {profile.first_step} on, {1000 * profile.seconds_per_step:.1f} ms each"
    )
    lines = [f"{steps}, on {profile.device}.", "", "| part | ms per step | share |", "|---|---:|---:|"]
    lines += [_table_row(part.name, part) for part in profile.parts]
    lines += [_table_row(f"{part.name} (beside)", part) for part in profile.beside]
    lines += ["", "| most expensive, without what they call | ms per step | share | calls |", "|---|---:|---:|---:|"]
    lines += [
        f"| {one.name[:80].replace('|', '/')} | {1000 * one.seconds_per_step:.2f} | {one.share:.1%} | {one.calls_per_step:.0f} |"
        for one in profile.operators
    ]
    lines += ["", "| memory | MiB |", "|---|---:|"]
    lines += [f"| {name.removesuffix('_size_mib')} | {value:.1f} |" for name, value in asdict(profile.memory).items()]
    return "\n".join(lines) + "\n"


def _table_row(name: str, part: Part) -> str:
    return f"| {name} | {1000 * part.seconds_per_step:.2f} | {part.share:.1%} |"


def picture(profile: Profile) -> bytes:
    """Draw time by part and memory by kind, as a PNG."""
    # Matplotlib takes seconds to import, so it is loaded only for a profile.
    from p2r.report.canvas import INK, new_figure, plain, to_png

    figure = new_figure(9, 3.6)
    memory = {name.removesuffix("_size_mib"): value for name, value in asdict(profile.memory).items()}
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
    """Return the peak memory: on a GPU in tensors since the last reset, on a CPU of this process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def _most_expensive(events: Iterable[Any], num_steps: int, *, on_gpu: bool) -> tuple[Operator, ...]:
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
    return _size_mib(tensor for tensor in tensors if tensor is not None)


def _optimizer_mib(engine: Any) -> float:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    masters = [weight for group in inner.param_groups for weight in group["params"]]
    return _size_mib((*states, *masters, *(engine.mean_weights or ())), apart=storages_of(engine.module.parameters()))


def _size_mib(tensors: Iterable[Tensor], *, apart: Iterable[int] = ()) -> float:
    storages = storages_of(tensors)
    return sum(size for pointer, size in storages.items() if pointer not in set(apart)) / _MIB


def profile_text(storage: Storage) -> str:
    """Return the tables of the profile in `<storage>/pretrain/profile`."""
    where = "profile/profile.json"
    value = storage.read_json(where, max_bytes=_MAX_BYTES)
    return to_text(checked(_PROFILE, value, where=f"{storage.at(where)} is damaged:", error=DamagedError))
