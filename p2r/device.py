"""Numbers of the host -> tensors on a device, and random numbers made there; nothing waits for the device.

A random number per pixel is a hash of its sample's key and of its place, in 32-bit integers, which every device multiplies
fast: a stream per sample would have to be read on the host, one sample after another. It is the same on CPU and CUDA.

Letters: B samples. Source: Wellons 2018, hash-prospector (triple32).
"""

import os
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2r.errors import InputError

_DRIVER = Path("/proc/driver/nvidia/version")


def this_device() -> torch.device:
    """Return this process's first GPU, or the CPU where there is none.

    Raises:
        InputError: There is a driver for GPUs, but too old a one for this torch: it would train on the CPU without a word.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if torch.version.cuda is not None and _DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        found = re.search(r"\b\d{3}\.\d+(\.\d+)*", _DRIVER.read_text(errors="replace"))
        raise InputError(
            f"this machine's NVIDIA driver ({found[0] if found else 'of unknown version'}) does not run torch {torch.__version__} for CUDA "
            f"{torch.version.cuda}: install a newer driver, or an older torch (pip install torch --index-url "
            "https://download.pytorch.org/whl/cu126); CUDA_VISIBLE_DEVICES= (empty) computes on the CPU"
        )
    return torch.device("cpu")


def on_device(
    values: NDArray[np.generic], device: torch.device | None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Bring numbers from the host to a device, without waiting for what the device still has to do."""
    return to_device(torch.as_tensor(values, dtype=dtype), device)


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Copy a tensor to a device if it is elsewhere, through pinned memory: from any other, CUDA would make the host wait."""
    if device is None or device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def is_waited_for(device: torch.device) -> bool:
    """Return whether to look at a value is to wait for a device that works on its own: for any but a CPU."""
    return device.type != "cpu"


def random_bits(keys: NDArray[np.uint64], num: int, *, device: torch.device | None = None) -> Tensor:
    """Return (B, num) int32 of 32 random bits each, made on the device from the samples' keys (B,)."""
    words = keys.astype("<u8").view("<i4").reshape(-1, 2)
    low, high = on_device(words, device, dtype=torch.int32).chunk(2, dim=1)
    return _hash_of_counter(torch.arange(num, dtype=torch.int32, device=device), low, high)


def _hash_of_counter(counter: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Hash (n,) counters with (B, 1) keys to (B, n) int32. A mask after each shift: torch shifts in copies of the sign."""
    bits = counter + low
    bits ^= (bits >> 17) & 0x7FFF
    bits *= 0xED5AD4BB - 2**32
    bits ^= (bits >> 11) & 0x1FFFFF
    bits *= 0xAC4C1B51 - 2**32
    bits ^= high
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x31848BAB
    bits ^= (bits >> 14) & 0x3FFFF
    return bits
