"""Triton's kernels against the torch tiles: in Triton's interpreter on a CPU, compiled where there is a CUDA device."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# In a process of its own: Triton decides when it is imported whether it interprets.
SCRIPT = """
import dataclasses, itertools, json, math, sys
import torch
import torch.nn.functional as F
from p2r.loss import kernels, tiles
from p2r.loss.tiles import Rows, Scale

device, dtypes, channels = json.loads(sys.argv[1])
kernels._PANEL, kernels._SPLIT = 256, 256  # several of each at sizes that an interpreter can bear
generator = torch.Generator().manual_seed(0)


def rows(num, first, dtype, channels, exclude):
    values = F.normalize(torch.randn(num, channels, generator=generator), dim=1).to(dtype)
    image = torch.arange(num) // 40 + 3 if exclude in ("image", "radius") else None
    position_mm = 20 * torch.rand(num, 3, generator=generator) if exclude == "radius" else None
    present = (torch.rand(num, generator=generator) < 0.8).to(torch.uint8) if exclude == "image" else None
    weight = torch.rand(num, generator=generator)
    parts = dict(values=values, image=image, position_mm=position_mm, weight=weight, present=present)
    return Rows(first=first, **{name: None if part is None else part.to(device) for name, part in parts.items()})


def exact(rows):
    return dataclasses.replace(rows, values=rows.values.double(), weight=rows.weight.double())


def error(ours, theirs):
    return float((ours.double() - theirs).norm() / theirs.norm())


for dtype, (num, num_candidates, first), exclude in itertools.product(
    dtypes, [(300, 257, 0), (129, 300, 100)], [None, "image", "radius"]
):
    dtype = getattr(torch, dtype)
    for width in channels:
        a, b = rows(num, first, dtype, width, exclude), rows(num_candidates, 0, dtype, width, exclude)
        scale = Scale(k=10.0, radius_mm=8.0 if exclude == "radius" else math.inf, shift=3.0)
        ours, theirs = (
            (*module.sums(*pair, scale, of_columns=True), *module.push(*pair, scale, to_candidates=True))
            for module, pair in ((kernels, (a, b)), (tiles, (exact(a), exact(b))))
        )
        again = (*kernels.sums(a, b, scale, of_columns=True), *kernels.push(a, b, scale, to_candidates=True))
        print(json.dumps({
            "case": f"{dtype}, {num} x {num_candidates}, E {width}, {exclude}",
            "errors": [error(x.sum(0) if place == 1 else x, y.sum(0) if place == 1 else y)
                       for place, (x, y) in enumerate(zip(ours, theirs))],
            "same": all(torch.equal(x, y) for x, y in zip(ours, again)),
        }))
"""


def run(device: str, dtypes: list[str], channels: list[int], **environment: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([device, dtypes, channels])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_interpreted_kernels_equal_the_tiles_and_themselves() -> None:
    cases = run("cpu", ["float32", "float16"], [32], TRITON_INTERPRET="1")
    assert len(cases) == 12
    for case in cases:
        assert max(case["errors"]) < 1e-6, case  # type: ignore[type-var]
        assert case["same"], case


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_compiled_kernels_equal_the_tiles_and_themselves() -> None:
    for dtype, bound in (("float32", 1e-5), ("float16", 1e-5), ("bfloat16", 4e-3)):  # weights are rounded to bfloat16
        for case in run("cuda", [dtype], [16, 32, 64, 128, 256, 512]):
            assert max(case["errors"]) < bound, case  # type: ignore[type-var]
            assert case["same"], case


def test_only_rows_that_the_kernels_are_written_for_take_them() -> None:
    from p2r.loss.kernels import fit

    assert fit(torch.ones(4, 128, dtype=torch.bfloat16))
    assert not fit(torch.ones(4, 128, dtype=torch.float64))
    assert not fit(torch.ones(4, 48))
