"""Steps of a GPU on tensors that have shapes and no memory: none waits, and the jobs for GPUs run at their full size."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from p2r.job import JOB_VARIABLES, read_job
from p2r.planning.estimate import plan
from tests.gpu.fake_cuda import run_cases
from tests.gpu.operators import NOT_DETERMINISTIC, not_deterministic

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None or shutil.which("g++") is None, reason="needs a torch without CUDA, and g++"
)

SMALL = {"channels": (4, 4, 8, 8, 8), "feature_channels": 6, "head_channels": 8, "embedding_channels": 16}
CASES: dict[str, dict[str, Any]] = {
    "learnt temperature, radius, micro-batches": {
        "precision": "bf16",
        "micro_batch": 1,
        "loss": {"learn_temperature": True, "form": "nt_xent", "exclude_within_mm": 6.0, "foreground_share": 0.5},
    },
    "learnt temperature, ring": {"precision": "bf16", "loss": {"learn_temperature": True, "exchange": "ring"}},
    "within images": {"loss": {"learn_temperature": True, "negatives": "image"}},
    "barlow_twins, coarser level": {"precision": "bf16", "loss": {"name": "barlow_twins"}, "model": {"level": 1}},
    "3D": {"image": {"dimensions": 3, "size": 16}, "model": {"name": "unet", "channels": (4, 8, 8)}},
}
RANKS = 2
LAUNCHES = {
    "learnt temperature, radius, micro-batches": {"sums": 3, "push": 4},
    "learnt temperature, ring": {"sums": 8, "push": 8},  # four directions with the rows of each of two ranks
}
"""Launches of the loss's kernels in a step. Other cases need no kernels, or compute in fp32."""
JOBS = {"acdc": 1, "pretrain-8gpu": 8, "pretrain-64gpu": 64}
"""Number of GPUs by job."""
SUMS = {
    "acdc": {0: 3},
    "pretrain-8gpu": {0: 5, 6: 7, 7: 5},
    "pretrain-64gpu": {0: 5, 48: 7, 63: 5},
}
"""Launches of sums in a step by rank: across views, and within each of two views. Ranks have equal shapes but for the panels within
a view. These are a panel with itself, and the following half of the ring, which wraps around for a rank in the second half."""
RANKS_OF_JOBS = [(name, rank) for name, of_ranks in SUMS.items() for rank in of_ranks]
FOLDER = Path(__file__).parents[2] / "jobs"


def of_case(name: str) -> dict[str, Any]:
    changes = CASES[name]
    config = {
        "views": "pix2rep_v2",
        "steps": 1,
        "global_batch": 4,
        **changes,
        "image": {"size": 32, "spacing_mm": 2.0, **changes.get("image", {})},
        "model": {**SMALL, **changes.get("model", {})},
        "loss": {"pixel_pairs_per_image": 20, **changes.get("loss", {})},
    }
    return {"name": name, "config": config, "world_size": RANKS, "rank": 1, "steps": 1}


@pytest.fixture(scope="module")
def pretraining() -> dict[str, Any]:
    """The section `pretrain` of each job for GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("P2R_DATA", *JOB_VARIABLES):
            patch.setenv(name, "/data/given")
        return {name: read_job(FOLDER / f"{name}.yaml").pretrain for name in JOBS}


@pytest.fixture(scope="module")
def steps(pretraining: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Copies that wait, kernel launches and operators of each case and job."""
    jobs = [
        {
            "name": f"{name}, rank {rank}",
            "config": pretraining[name].model_dump(mode="json"),
            "world_size": JOBS[name],
            "rank": rank,
        }
        for name, rank in RANKS_OF_JOBS
    ]
    cases = [*map(of_case, CASES), *({**job, "steps": 2} for job in jobs)]
    return run_cases(cases, tmp_path_factory.mktemp("device"), timeout_s=900)


@pytest.mark.parametrize("name", [*CASES, *(f"{name}, rank {rank}" for name, rank in RANKS_OF_JOBS)])
def test_no_copy_of_a_step_waits_and_nothing_is_read(steps: dict[str, dict[str, Any]], name: str) -> None:
    assert steps[name]["waits"] == {}
    assert len(steps[name]["operators"]) > 100


@pytest.mark.parametrize("name", [*CASES, *(f"{name}, rank {rank}" for name, rank in RANKS_OF_JOBS)])
def test_every_operator_has_a_deterministic_implementation_on_cuda(steps: dict[str, dict[str, Any]], name: str) -> None:
    assert not_deterministic(steps[name]["operators"]) == []


@pytest.mark.parametrize("name", CASES)
def test_the_loss_launches_its_kernels(steps: dict[str, dict[str, Any]], name: str) -> None:
    assert steps[name]["launches"] == LAUNCHES.get(name, {})


@pytest.mark.parametrize("name", JOBS)
def test_a_job_for_gpus_takes_two_steps_at_its_full_size_on_every_kind_of_rank_and_fits_its_gpus(
    pretraining: dict[str, Any], steps: dict[str, dict[str, Any]], name: str
) -> None:
    for rank, num_sums in SUMS[name].items():
        assert steps[f"{name}, rank {rank}"]["launches"] == {"sums": 2 * num_sums, "push": 2 * 4}
    hardware = re.search(r"Hardware: .*?(\d+) GB", (FOLDER / f"{name}.yaml").read_text())
    assert hardware is not None
    nodes = max(1, JOBS[name] // 8)
    found = plan(
        pretraining[name],
        num_nodes=nodes,
        workers_per_node=JOBS[name] // nodes,
        device="cuda",
        memory_gib=float(hardware[1]) * 1e9 / 2**30,
    )
    assert found.fits and found.loss_time is not None


def test_the_operators_that_raise_are_those_of_this_version_of_torch() -> None:
    _, _, text = (torch.use_deterministic_algorithms.__doc__ or "").partition("operations will throw a")
    named = re.findall(r"\* :(?:class|func):`([\w.]+)`", text.partition("In addition")[0])
    assert set(named) == set(NOT_DETERMINISTIC)
