"""The loss kernels' machine code, compiled on a CPU for absent GPUs.

A subset that covers every kernel, dtype, number of channels, mask and architecture is compiled and counted; a command compiles
the whole product, every night (`python -m tests.p2r.loss.machine_code`). Triton caches compiled kernels in pytest's cache. Versions of
Triton schedule registers differently, so the numbers are bounds, slightly above those of Triton 3.7.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.p2r.loss.machine_code import ARCHITECTURES, KERNELS, Counted, accepted, compiled, problems

Case = tuple[int, str, torch.dtype, int, str]
Compile = Callable[[int, str, torch.dtype, int, str], Counted]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CEILINGS: dict[Case, float] = {
    (90, "sums", BF16, 128, "none"): 6.5,
    (90, "push", BF16, 128, "none"): 7.5,
    (90, "sums", BF16, 128, "radius_2d"): 8.5,
    (90, "push", BF16, 128, "radius_2d"): 9.5,
    (90, "push", BF16, 64, "image"): 9.5,
    (90, "push", BF16, 64, "radius_3d"): 9.5,
    (90, "sums", BF16, 32, "none"): 6.5,
    (90, "push", BF16, 16, "none"): 7.0,
    (90, "sums", BF16, 256, "none"): 9.5,
    (90, "push", BF16, 256, "radius_2d"): 10.0,
    (90, "push", BF16, 512, "radius_3d"): 54.0,
    (100, "push", BF16, 512, "none"): 46.0,
    (90, "push", FP16, 128, "none"): 13.0,
    (90, "push", FP32, 128, "none"): 14.5,
    (80, "sums", BF16, 128, "none"): 10.0,
    (80, "push", BF16, 128, "none"): 14.5,
    (80, "push", BF16, 256, "radius_2d"): 24.5,
    (80, "push", FP32, 128, "none"): 27.5,
    (100, "sums", BF16, 128, "none"): 6.5,
    (100, "push", BF16, 128, "none"): 7.5,
}
"""Instructions of the hot loop per entry."""


@pytest.fixture(scope="module")
def compile_kernel(request: pytest.FixtureRequest) -> Compile:
    """Return a function that compiles a kernel and counts; pytest's cache stores the compiled kernels."""
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("triton")

    def compile_it(arch: int, name: str, dtype: torch.dtype, channels: int, masks: str) -> Counted:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(folder))
            return compiled(name, dtype, channels, masks=masks, arch=arch)

    return compile_it


@pytest.mark.parametrize("case", CEILINGS, ids=lambda case: "-".join(map(str, case)))
def test_a_kernel_fits_its_gpu_and_its_hot_loop_is_short(compile_kernel: Compile, case: Case) -> None:
    found = compile_kernel(*case)
    assert problems(found, case[0]) == []
    assert found.per_entry <= CEILINGS[case]


def test_machine_code_that_a_gpu_cannot_launch_or_that_spills_is_named() -> None:
    good = Counted((128, 64), 4, 3, 230, 82_000, 2, 350, 5.5, spills=0, products=8, warpgroup_products=8)
    assert problems(good, 90) == []
    bad = replace(good, shared_bytes=262_432, spills=30, products=0, warpgroup_products=0)
    assert problems(bad, 100) == [
        "takes 262432 bytes of shared memory, of 232448",
        "spills 30 registers",
        "has no products",
    ]
    assert problems(replace(good, warpgroup_products=0), 90) == ["has no products of warpgroups"]


def test_the_subset_covers_all_that_fit_accepts() -> None:
    product = {arch: set(accepted(arch)) for arch in ARCHITECTURES}
    for arch, *case in CEILINGS:
        assert tuple(case) in product[arch]
    assert {case[:2] for case in CEILINGS} == {(arch, name) for arch in ARCHITECTURES for name in KERNELS}
    for place in range(4):  # kernel, dtype, channels, masks
        of_product = {case[place] for cases in product.values() for case in cases}
        assert {case[1:][place] for case in CEILINGS} == of_product


def test_an_a100_has_no_shared_memory_for_512_channels() -> None:
    assert {channels for _, dtype, channels, _ in accepted(80) if dtype == BF16} == {16, 32, 64, 128, 256}
