"""torch.compile for the backbone: tried on a copy before training begins, so that a failure costs a line and not the run.

Shapes are static: a step is cut into equal micro-batches of one image size, so each of the two or three graphs (with and
without gradients) is compiled once. Only the backbone is compiled: points are too few to matter, and the loss has kernels
of its own. What was compiled is kept in `$P2R_CACHE/inductor`, where a later run, and the other ranks of a node, find it.

CUDA graphs are left to torch.compile (`reduce-overhead`), which records them for these same static shapes, keeps their memory
apart, and records again where an address has changed. A capture of our own would have to promise that for views, whose
host decides per step which images a transform is for, and for DeepSpeed's hooks.
"""

import copy
import os
import shutil
import time
from typing import Literal

import torch
from torch import nn

from p2r.errors import error_text
from p2r.storage import cache_folder


def compile_in_place(backbone: nn.Module, how: Literal[True, "reduce-overhead"]) -> None:
    """Have a backbone compiled at its first use, for static shapes."""
    backbone.compile(dynamic=False, mode=how if isinstance(how, str) else None)


def warm_up(
    backbone: nn.Module,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    how: Literal[True, "reduce-overhead"] = True,
) -> tuple[bool, str]:
    """Compile a copy of `backbone` for one shape, forwards, backwards and without gradients.

    Args:
        backbone: On its device; left as it is.
        shape: (B, C, *S) of every image batch to come.
        dtype: What the weights will be in training.
        how: See `pretrain.compile`.

    Returns:
        Whether it can be compiled, and what to say of it.
    """
    _choose_cache()
    device = next(backbone.parameters()).device
    missing = _missing_compiler(device)
    if missing is not None:
        return False, f"not compiled: {missing}; training goes on without"
    began = time.monotonic()
    trial = copy.deepcopy(backbone).to(dtype)
    compile_in_place(trial, how)
    image = torch.zeros(shape, dtype=dtype, device=device)
    try:
        with torch.no_grad():
            trial(image)
        trial(image).float().sum().backward()
    except (torch._dynamo.exc.TorchDynamoException, torch.OutOfMemoryError) as error:
        reason = error_text(error).strip().splitlines()[0]
        return False, f"not compiled: {reason}; training goes on without"
    finally:
        del trial
    return True, f"compiled in {time.monotonic() - began:.0f} s"


def _choose_cache() -> None:
    """Keep what is compiled in `$P2R_CACHE`, unless `TORCHINDUCTOR_CACHE_DIR` says where."""
    # Here, because it takes seconds.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    variable = "TORCHINDUCTOR_CACHE_DIR"
    # PyTorch sets the variable itself, to a temporary folder, as soon as anybody imports its compiler.
    if os.environ.get(variable) in (None, default_cache_dir()):
        os.environ[variable] = str(cache_folder() / "inductor")


def _missing_compiler(device: torch.device) -> str | None:
    """Say which compiler is missing, as PyTorch (for CPUs) and Triton (for GPUs) look for one."""
    variable, names = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang", "cc"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if any(shutil.which(name) for name in names):
        return None
    return f"no compiler ({' or '.join(names)}) on this machine, install one or name it in {variable}"
