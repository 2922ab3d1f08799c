"""Host values -> tensors on a device, and random bits computed there, without waiting for the device.

A random number per pixel is a hash of its sample's key and its position, in 32-bit integers, which every device multiplies
quickly. A generator per sample would have to run on the host, one sample at a time. CPU and CUDA give the same bits.

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
    """Return this process's first GPU, or the CPU.

    Raises:
        InputError: The GPU driver is too old for this torch, which would silently train on the CPU.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if torch.version.cuda is not None and _DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        found = re.search(r"\b\d{3}\.\d+(\.\d+)*", _DRIVER.read_text(errors="replace"))
        raise InputError(
            f"this machine's NVIDIA driver ({found[0] if found else 'of unknown version'}) does not run torch {torch.__version__} for CUDA "
            f"{torch.version.cuda}: install a newer driver, or an older torch (pip install torch --index-url "
            "https://download.pytorch.org/whl/cu126). To compute on the CPU, set CUDA_VISIBLE_DEVICES= (empty)"
        )
    return torch.device("cpu")


def on_device(
    values: NDArray[np.generic], device: torch.device | None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Copy host values to a device, without waiting for its queued work."""
    return to_device(torch.as_tensor(values, dtype=dtype), device)


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Copy a tensor to a device if it is elsewhere, through pinned memory: from other memory CUDA would block the host."""
    if device is None or device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def is_waited_for(device: torch.device) -> bool:
    """Return whether reading a value waits for an asynchronous device; False on a CPU."""
    return device.type != "cpu"


def random_bits(keys: NDArray[np.uint64], num: int, *, device: torch.device | None = None) -> Tensor:
    """Return (B, num) int32 of 32 random bits each, computed on the device from the samples' keys (B,)."""
    words = keys.astype("<u8").view("<i4").reshape(-1, 2)
    low, high = on_device(words, device, dtype=torch.int32).chunk(2, dim=1)
    return _hash_counters(torch.arange(num, dtype=torch.int32, device=device), low, high)


def _hash_counters(counter: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Hash (n,) counters with (B, 1) keys to (B, n) int32. A mask follows each shift: torch shifts copies of the sign bit in."""
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
