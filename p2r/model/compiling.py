"""torch.compile for the backbone, tried on a copy before training begins, so that a failure is logged and does not end the run.

Shapes are static: a step consists of equal micro-batches of one image size, so each of the two or three graphs (with and
without gradients) is compiled once. Only the backbone is compiled: points are too few to matter, and the loss has its own
kernels. Compiled code is cached in `$P2R_CACHE/inductor` for later runs and for the other ranks of a node.

CUDA graphs are left to torch.compile (`reduce-overhead`). It records them for these static shapes, keeps their memory separate,
and records again if an address changes. A capture by p2r would have to guarantee this for views, where the host decides at
every step which images get a transform, and for DeepSpeed's hooks.
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
    """Compile a backbone at its first use, for static shapes."""
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
        backbone: The backbone on its device; not changed.
        shape: (B, C, *S) of every image batch.
        dtype: Type of the weights in training.
        how: Setting of `pretrain.compile`.

    Returns:
        True if compilation succeeded, and a message for the log.
    """
    _choose_cache()
    device = next(backbone.parameters()).device
    missing = _find_missing_compiler(device)
    if missing is not None:
        return False, f"not compiled: {missing}; training continues without it"
    began = time.monotonic()
    trial = copy.deepcopy(backbone).to(dtype).requires_grad_(True)  # a backbone may be frozen only at first
    compile_in_place(trial, how)
    image = torch.zeros(shape, dtype=dtype, device=device)
    try:
        with torch.no_grad():
            trial(image)
        trial(image).float().sum().backward()
    except (torch._dynamo.exc.TorchDynamoException, torch.OutOfMemoryError) as error:
        reason = error_text(error).strip().splitlines()[0]
        return False, f"not compiled: {reason}; training continues without it"
    finally:
        del trial
    return True, f"compiled in {time.monotonic() - began:.0f} s"


def _choose_cache() -> None:
    """Cache compiled code in `$P2R_CACHE`, unless `TORCHINDUCTOR_CACHE_DIR` names another folder."""
    # Imported here, because it takes seconds.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    variable = "TORCHINDUCTOR_CACHE_DIR"
    # Importing PyTorch's compiler sets the variable to a temporary folder.
    if os.environ.get(variable) in (None, default_cache_dir()):
        os.environ[variable] = str(cache_folder() / "inductor")


def _find_missing_compiler(device: torch.device) -> str | None:
    """Return which compiler is missing, with the search of PyTorch (for CPUs) or Triton (for GPUs); None if one is found."""
    variable, names = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang", "cc"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if any(shutil.which(name) for name in names):
        return None
    return f"no compiler ({' or '.join(names)}) on this machine, install one or name it in {variable}"
