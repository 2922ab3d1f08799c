"""Compile the loss kernels for absent GPUs, and count the instructions and registers of their machine code.

    python -m tests.p2r.loss.machine_code [--arch 80,90,100] [--dtype bfloat16] [--channels 64,128] [--masks none,image,radius_2d]

Triton's wheel includes the assembler and the disassembler. Arguments and options come from the project's own host code. It
prints a row per kernel; all kernels that `fit` accepts take about ten minutes of CPU time.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from p2r.loss import kernel_tiles, kernels
from p2r.loss.tiles import Rows, Scale

KERNELS = ("sums", "push")
ARCHITECTURES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Compute capability, times ten, and the shared memory that a program may take there."""
MASKS = {"none": None, "image": 0, "radius_2d": 2, "radius_3d": 3}
"""Spatial dimensions of the positions; 0: only images."""

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_REGISTERS, _THREADS = 65_536, 2048  # of a multiprocessor
_PRODUCT = r"\bHGMMA|\bHMMA|UTC\w*MMA"
_MOST_SPILLS = 0.005  # of the instructions; one register
_SPILL = r"\bLDL|\bSTL"


@dataclass(frozen=True)
class Counted:
    """Machine code of one kernel. Its hot loop is the one over tiles without masks."""

    tile: tuple[int, int]
    num_warps: int
    num_stages: int
    registers: int
    """Of a thread."""
    shared_bytes: int
    """Of a program."""
    programs: int
    """That fit on a multiprocessor at once."""
    instructions: int
    """Of the hot loop."""
    per_entry: float
    """Instructions of the hot loop by entries of a thread's part of the tile."""
    spills: int
    """Loads and stores of local memory in the hot loop."""
    products: int
    """Instructions of the tensor cores there."""
    warpgroup_products: int
    """Number of them issued by a warpgroup (wgmma)."""


class _Recorder:
    """Stand-in for a kernel that records its launches."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: object) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.arguments, self.options = arguments, options

        return launch


def launched(name: str, dtype: torch.dtype, channels: int, *, masks: str, arch: int) -> _Recorder:
    """Return the arguments and options with which the host code launches a kernel on an architecture."""
    dimensions = MASKS[masks]
    rows = Rows(
        torch.zeros(16, channels, dtype=dtype),
        0,
        None if dimensions is None else torch.zeros(16, dtype=torch.int64),
        torch.zeros(16, dimensions) if dimensions else None,
        torch.ones(16),
        torch.ones(16, dtype=torch.uint8),
    )
    recorder = _Recorder()
    facts = {
        "shared_limit": lambda device: ARCHITECTURES[arch],
        "has_descriptors": lambda device: arch >= 90,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, f"_{name}_kernel", recorder))
        for attribute, value in facts.items():
            stack.enter_context(mock.patch.object(kernel_tiles, attribute, value))
        if name == "sums":
            kernels.sums(rows, rows, Scale(10.0, 8.0), of_columns=True)
        else:
            kernels.push(rows, rows, Scale(10.0, 8.0))
    return recorder


def compiled(name: str, dtype: torch.dtype, channels: int, *, masks: str, arch: int) -> Counted:
    """Compile a kernel for an architecture, and count."""
    call = launched(name, dtype, channels, masks=masks, arch=arch)
    function = getattr(kernels, f"_{name}_kernel")
    options = dict(call.options)
    meta = {option: options.pop(option) for option in ("num_warps", "num_stages")}
    given = dict(zip(function.arg_names, call.arguments, strict=False))
    signature = {argument: _type(given.get(argument)) for argument in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(function.arg_names)
        if signature[argument].startswith("*")
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={argument: value for argument, value in options.items() if argument in function.arg_names},
        attrs=aligned,
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=meta)
    code, registers = _disassembled(built.asm["cubin"])
    threads = 32 * meta["num_warps"]
    hot = _hot_loop(code)
    fitting = (
        _REGISTERS // (-(-registers // 8) * 8 * threads),
        (ARCHITECTURES[arch] + 1024) // (built.metadata.shared + 1024),
        _THREADS // threads,
    )
    return Counted(
        tile=(options["BLOCK_A"], options["BLOCK_C"]),
        **meta,
        registers=registers,
        shared_bytes=built.metadata.shared,
        programs=min(fitting),
        instructions=len(hot),
        per_entry=round(len(hot) * threads / (options["BLOCK_A"] * options["BLOCK_C"]), 2),
        spills=_count(_SPILL, hot),
        products=_count(_PRODUCT, hot),
        warpgroup_products=_count(r"\bHGMMA", hot),
    )


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{[*value.block_shape]}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) else "constexpr"


def _disassembled(cubin: bytes) -> tuple[list[tuple[int, str]], int]:
    """Return instructions by address, and registers of a thread."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([program, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    lines = re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)
    return [(int(line[1], 16), line[2]) for line in lines], int(found[1])


def _hot_loop(code: list[tuple[int, str]]) -> list[str]:
    """Return the shortest loop that takes exponentials: the one without masks."""
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < at:
            loops.append([other for place, other in code if int(target[1], 16) <= place <= at])
    return min((loop for loop in loops if _count(r"MUFU\.EX2", loop)), key=len, default=[])


def _count(pattern: str, code: list[str]) -> int:
    return sum(re.search(pattern, text) is not None for text in code)


def accepted(arch: int) -> Iterator[tuple[str, torch.dtype, int, str]]:
    """Yield all that `fit` accepts on an architecture: kernel, dtype, channels, masks."""
    for dtype, widths in kernel_tiles.CHANNELS.items():
        for channels in widths:
            tables = (kernel_tiles.SUMS_TILES, kernel_tiles.PUSH_TILES)
            limit, is_new = ARCHITECTURES[arch], arch >= 90
            if all(
                kernel_tiles.fitting_tiles(table, dtype, channels, limit, has_image=True, descriptors=is_new)
                for table in tables
            ):
                yield from ((name, dtype, channels, masks) for masks in MASKS for name in KERNELS)


def problems(found: Counted, arch: int) -> list[str]:
    """Return which rules a kernel's machine code breaks."""
    most = ARCHITECTURES[arch]
    rules = {
        f"takes {found.shared_bytes} bytes of shared memory, of {most}": found.shared_bytes > most,
        f"spills {found.spills} registers": found.spills > _MOST_SPILLS * found.instructions,
        "has no products": found.products == 0,
        "has no products of warpgroups": arch == 90 and found.warpgroup_products == 0,
    }
    return [rule for rule, is_broken in rules.items() if is_broken]


def main() -> int:
    """Print a row per requested kernel; return 1 if one breaks a rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="80,90,100")
    parser.add_argument("--dtype", default="bfloat16,float16,float32")
    parser.add_argument("--channels", default="16,32,64,128,256,512")
    parser.add_argument("--masks", default=",".join(MASKS))
    asked = {name: text.split(",") for name, text in vars(parser.parse_args()).items()}
    num_broken = 0
    for arch in map(int, asked["arch"]):
        for name, dtype, channels, masks in accepted(arch):
            kind = str(dtype).removeprefix("torch.")
            if kind in asked["dtype"] and str(channels) in asked["channels"] and masks in asked["masks"]:
                found = compiled(name, dtype, channels, masks=masks, arch=arch)
                case = {"kernel": name, "arch": arch, "dtype": kind, "channels": channels, "masks": masks}
                broken = problems(found, arch)
                num_broken += bool(broken)
                print(json.dumps({**case, **asdict(found), "problems": broken}), flush=True)
    return int(num_broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
