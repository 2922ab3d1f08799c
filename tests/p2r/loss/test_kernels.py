"""Triton kernels against the torch tiles: in Triton's interpreter on a CPU, compiled with a CUDA device."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# In a separate process, because Triton chooses its interpreter at import.
SCRIPT = """
import dataclasses, itertools, json, math, sys
import torch
import torch.nn.functional as F
from p2r.loss import kernels, tiles
from p2r.loss.tiles import Rows, Scale

device, kinds = json.loads(sys.argv[1])
kernels._PANEL, kernels._SPLIT, kernels._PUSH_SPLIT = 256, 256, 128  # several of each at sizes that an interpreter can bear
generator = torch.Generator().manual_seed(0)


def rows(num, first, dtype, channels, exclude):
    values = F.normalize(torch.randn(num, channels, generator=generator), dim=1).to(dtype)
    image = torch.arange(num) // 40 + 3 if exclude in ("image", "radius") else None
    if exclude == "radius" and num == 300:  # images in no order: their tiles are everywhere
        image = image[torch.randperm(num, generator=generator)]
    position_mm = 20 * torch.rand(num, 3, generator=generator) if exclude == "radius" else None
    present = (torch.rand(num, generator=generator) < 0.8).to(torch.uint8) if exclude == "image" else None
    weight = torch.rand(num, generator=generator)
    parts = dict(values=values, image=image, position_mm=position_mm, weight=weight, present=present)
    return Rows(first=first, **{name: None if part is None else part.to(device) for name, part in parts.items()})


def exact(rows):
    return dataclasses.replace(rows, values=rows.values.double(), weight=rows.weight.double())


def part(rows, start):
    fields = ("values", "image", "position_mm", "weight", "present")
    parts = {name: getattr(rows, name) for name in fields}
    kept = {name: None if part is None else part[start:] for name, part in parts.items()}
    return dataclasses.replace(rows, first=rows.first + start, **kept)


def error(ours, theirs):
    return float((ours.double() - theirs).norm() / theirs.norm())


for (dtype, channels), (num, num_candidates, first), exclude in itertools.product(
    kinds, [(300, 257, 0), (129, 300, 100)], [None, "image", "radius"]
):
    dtype = getattr(torch, dtype)
    for width in channels:
        a, b = rows(num, first, dtype, width, exclude), rows(num_candidates, 0, dtype, width, exclude)
        scale = Scale(k=10.0, radius_mm=8.0 if exclude == "radius" else math.inf, shift=3.0)
        ours, theirs = (
            (*module.sums(*pair, scale, of_columns=True), *module.push(*pair, scale, to_candidates=True))
            for module, pair in ((kernels, (a, b)), (tiles, (exact(a), exact(b))))
        )
        there = dataclasses.replace(scale, k=torch.tensor(scale.k, device=device), shift=torch.tensor(scale.shift, device=device))
        again = (*kernels.sums(a, b, there, of_columns=True), *kernels.push(a, b, there, to_candidates=True))
        print(json.dumps({
            "case": f"{dtype}, {num} x {num_candidates}, E {width}, {exclude}",
            "errors": [error(x.sum(0) if place == 1 else x, y.sum(0) if place == 1 else y)
                       for place, (x, y) in enumerate(zip(ours, theirs))],
            "same": all(torch.equal(x, y) for x, y in zip(ours, again)),
            "same_in_parts": torch.equal(kernels.push(part(a, 128), b, scale)[0], ours[2][128:]),
        }))
"""


LOSS = """
import json
import torch
from torch.nn.functional import normalize
from p2r.loss import backends, contrast, info_nce, kernels

backends.choose_backend = lambda rows: kernels
computed = {"sums": 0, "push": 0}


def counted(name, compute):
    def count(anchors, candidates, *arguments, to_anchors=True, to_candidates=False, **options):
        directions = dict(to_anchors=to_anchors, to_candidates=to_candidates) if name == "push" else {}
        computed[name] += len(anchors) * len(candidates) * max(1, sum(directions.values()))
        return compute(anchors, candidates, *arguments, **directions, **options)

    return count


kernels.sums, kernels.push = counted("sums", kernels.sums), counted("push", kernels.push)


def definition(queries, keys, form):  # cross-entropy of each embedding and its partner among its candidates
    queries, keys = normalize(queries, dim=1), normalize(keys, dim=1)
    num = len(queries)
    if form == "cross_view":
        logits, partner = torch.cat([queries @ keys.T, keys @ queries.T]), torch.arange(num).repeat(2)
    else:
        both = torch.cat([queries, keys])
        logits, partner = (both @ both.T).fill_diagonal_(-torch.inf), torch.arange(2 * num).roll(num)
    return torch.nn.functional.cross_entropy(logits / 0.1, partner)


def loss_and_gradients(function, rows, form):
    rows = [row.clone().requires_grad_() for row in rows]
    value = function(*rows, form)
    return [value.detach(), *torch.autograd.grad(value, rows)]


generator = torch.Generator().manual_seed(0)
for form, panel, num in (("cross_view", 128, 384), ("nt_xent", 128, 384), ("nt_xent", 128, 512), ("nt_xent", 16_384, 384)):
    contrast.PANEL = kernels._PANEL = panel
    rows = [torch.randn(num, 32, generator=generator) for _ in range(2)]
    run = lambda queries, keys, form: info_nce(queries, keys, temperature=0.1, form=form)
    computed.update(sums=0, push=0)
    found = loss_and_gradients(run, rows, form)
    squares = {name: num / panel**2 for name, num in computed.items()}
    again = loss_and_gradients(run, rows, form)
    exact = loss_and_gradients(definition, [row.double() for row in rows], form)
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact)]
    same = all(map(torch.equal, found, again))
    print(json.dumps({"form": form, "panels": -(-num // panel), "computed": squares, "errors": errors, "same": same}))
"""


def run(script: str, *arguments: object, **environment: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_interpreted_kernels_equal_the_tiles_and_themselves() -> None:
    kinds = [("float32", [32]), ("float16", [32, 512])]  # rows of 1024 bytes are loaded by a descriptor
    cases = run(SCRIPT, "cpu", kinds, TRITON_INTERPRET="1")
    assert len(cases) == 18
    for case in cases:
        assert max(case["errors"]) < 1e-6, case
        assert case["same"], case
        assert case["same_in_parts"], case  # as ranks compute them


def test_the_loss_by_interpreted_kernels_equals_its_definition_and_computes_pairs_of_panels_once() -> None:
    cases = run(LOSS, TRITON_INTERPRET="1")
    for case in cases:
        assert max(case["errors"]) < 1e-6, case
        assert case["same"], case
    # Entries of the similarity matrix, in units of panel x panel.
    computed = {(case["form"], case["panels"]): case["computed"] for case in cases}
    assert computed.pop(("nt_xent", 1)) == {"sums": 3 * (384 / 16_384) ** 2, "push": 4 * (384 / 16_384) ** 2}
    assert computed == {
        ("cross_view", 3): {"sums": 9, "push": 2 * 9},
        ("nt_xent", 3): {"sums": 9 + 2 * (3 + 3), "push": 4 * 9},  # panels with themselves, and pairs of panels
        ("nt_xent", 4): {"sums": 16 + 2 * (4 + 6), "push": 4 * 16},
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "channels", "bound"),
    [("bfloat16", [64, 128, 256], 4e-3), ("float16", [64], 1e-3), ("float32", [64], 2e-3)],
)
def test_compiled_kernels_equal_the_tiles_and_themselves(dtype: str, channels: list[int], bound: float) -> None:
    # Weights are rounded to bfloat16 or TF32, float32 rows to TF32.
    for case in run(SCRIPT, "cuda", [(dtype, channels)]):
        assert max(case["errors"]) < bound, case
        assert case["same"], case
        assert case["same_in_parts"], case


CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "channels", "reason"),
    [
        (BF16, 128, None),
        (torch.float32, 128, "set pretrain.precision to bf16 or tf32"),
        (torch.float64, 128, "set pretrain.precision to bf16 or tf32"),
        (
            BF16,
            48,
            "support torch.bfloat16 of 16, 32, 64, 128, 256, 512 channels, got 48: set pretrain.model.embedding",
        ),
        (torch.float16, 512, "got 512"),
    ],
)
def test_rows_that_the_kernels_do_not_support_are_named_with_the_way_out(
    dtype: torch.dtype, channels: int, reason: str | None
) -> None:
    from p2r.loss.kernels import fit, unfit

    found = unfit(dtype, channels, device=CPU, allows_tf32=False)
    assert (found is None) if reason is None else (found is not None and reason in found)
    assert fit(torch.ones(4, channels, dtype=dtype)) == (reason is None)


def test_float32_uses_the_kernels_if_tf32_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from p2r.loss.kernels import fit, unfit

    assert unfit(torch.float32, 128, device=CPU, allows_tf32=True) is None
    assert "got 256" in (unfit(torch.float32, 256, device=CPU, allows_tf32=True) or "")
    assert not fit(torch.ones(4, 128))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert fit(torch.ones(4, 128))


def test_a_gpu_with_little_shared_memory_takes_smaller_tiles_or_fewer_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    from p2r.loss import kernel_tiles, kernels
    from p2r.loss.tiles import Rows

    rows = Rows(torch.ones(4, 128, dtype=BF16), 0)
    usual = kernel_tiles.choose_tile(kernel_tiles.PUSH_TILES, rows)
    monkeypatch.setattr(kernel_tiles, "shared_limit", lambda device: 101_376)  # of an RTX 4090
    assert kernel_tiles.choose_tile(kernel_tiles.PUSH_TILES, rows).block_candidates < usual.block_candidates
    assert kernels.unfit(BF16, 128, device=CPU, allows_tf32=False) is None
    assert "more shared memory than this GPU's 101376 bytes" in (
        kernels.unfit(BF16, 512, device=CPU, allows_tf32=False) or ""
    )


def test_a_gpu_of_an_older_architecture_and_a_missing_compiler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from p2r.loss import kernels

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(kernels, "_has_compiler", lambda: True)
    old = kernels.unfit(BF16, 128, device=gpu, allows_tf32=False)
    assert old == "they need a GPU of compute capability 8.0 or newer, this one has 7.5"
    monkeypatch.undo()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    kernels._has_compiler.cache_clear()
    bare = kernels.unfit(BF16, 128, device=gpu, allows_tf32=False)
    kernels._has_compiler.cache_clear()
    assert bare == "Triton finds no C compiler: install gcc or clang, or name one in CC"


def test_candidates_are_loaded_by_descriptor_only_on_gpus_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from p2r.loss.kernel_tiles import PUSH_TILES, fitting_tiles, has_descriptors

    gpu, capability = torch.device("cuda", 0), [(8, 9), (9, 0), (10, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability.pop(0))
    assert [has_descriptors(gpu) for _ in range(3)] == [False, True, True]
    assert has_descriptors(CPU)
    of_old, of_new = (
        fitting_tiles(PUSH_TILES, BF16, 256, 166_912, has_image=False, descriptors=descriptors)[0]
        for descriptors in (False, True)
    )
    assert of_new.by_descriptor and not of_old.by_descriptor


def test_a_temperature_that_sums_of_float32_cannot_take_is_named() -> None:
    from p2r.engine.objectives import COLDEST
    from p2r.loss import without_kernels

    def found(temperature: float, num_pairs: int) -> str | None:
        return without_kernels(BF16, 128, temperature=temperature, num_pairs=num_pairs, device=CPU, allows_tf32=False)

    assert found(COLDEST, 10**8) is None
    assert found(0.0124, 65_536) is None
    cold = found(0.01, 65_536)
    assert cold is not None and cold.endswith("set pretrain.loss.temperature to 0.0124 or more")
