"""Pretraining from a corpus of sessions: any subset of three contrasts, views across them, and figures of each pair."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from p2r.config import IngestConfig, SessionsConfig
from p2r.data.corpus import ingest_locally
from p2r.engine.health import embedding_health, health_by_contrasts
from p2r.engine.pretrain import pretrain
from p2r.engine.step import equivariance_error
from p2r.job import Job, read_job
from p2r.storage import Storage
from p2r.views.contrasts import pair_names
from tests.engine_runs import losses, train
from tests.ranks import join_ranks, start_ranks

JobOf = Callable[..., Job]
NAMES = ("flair", "t1", "t1ce")
RULES = SessionsConfig(contrasts={"t1": "T1w", "t1ce": "ce-*", "flair": "FLAIR"}, reference="flair")
JOINED = f"ingest.sessions={RULES.model_dump_json(exclude_unset=True)}"  # the job's own corpus has these contrasts, too


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Eight sessions of which two lack T1 and four the contrast agent."""
    folder, rng = tmp_path_factory.mktemp("sessions"), np.random.default_rng(0)
    for number in range(8):
        anatomy = rng.normal(0, 1, (32, 32, 4)).cumsum(0).cumsum(1)
        lacking = (set() if number % 4 else {"T1w"}) | ({"ce-G_T1w"} if number % 2 else set())
        for power, name in enumerate(["FLAIR", "T1w", "ce-G_T1w"], start=1):
            if name in lacking:
                continue
            voxels = 500 + 100 * np.sin(anatomy / 8 * power) + rng.normal(0, 5, anatomy.shape)
            path = folder / "scans" / f"sub-{number}_{name}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([2.0, 2.0, 8.0, 1.0])), path)
    storage = Storage(str(folder / "corpus"))
    config = IngestConfig(sources=(str(folder / "scans"),), licence="CC0-1.0", shard_size_mib=0.03, sessions=RULES)
    list(ingest_locally(config, storage))
    return storage


def test_a_run_across_contrasts_resumes_to_the_same_digits_and_states_each_pair(
    job_of: JobOf, sessions: Storage, tmp_path: Path
) -> None:
    settings = (
        JOINED,
        "pretrain.model.contrasts=[flair, t1, t1ce]",
        "pretrain.views={contrasts: mixed, contrast_dropout: 0.3}",
        "pretrain.micro_batch=2",
        "pretrain.balance={by: contrast}",
    )
    job = job_of(tmp_path, *settings)
    whole, broken = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "broken"))
    reports = train(job, whole, sessions)
    for report in reports:
        assert report.contrast_pairs and set(report.contrast_pairs) <= set(pair_names(NAMES))
        for metrics in report.contrast_pairs.values():
            assert {"pairs", "equivariance_error", "loss", "alignment"} <= set(metrics)
            assert metrics["pairs"] >= 2 and 0 <= metrics["equivariance_error"] < 3 and metrics["loss"] > 0
    seen = {name for report in reports for name in report.contrast_pairs or {}}
    assert len(seen) >= 3 and seen & {"flair-t1", "flair-t1ce", "t1-t1ce"}
    train(job, broken, sessions, most=1)
    resumed = train(job, broken, sessions)
    assert resumed[0].resumed_from == 2 and losses(broken) == losses(whole)
    assert resumed[-1].images_by_value == reports[-1].images_by_value
    assert sum((reports[-1].images_by_value or {}).values()) == reports[-1].samples_seen


def train_on_ranks(rank: int, job: Path, storage: str, corpus: str, settings: tuple[str, ...], until: int) -> None:
    """Train as one of several ranks, from the newest checkpoint to a step."""
    config = read_job(job, settings).pretrain
    assert config is not None
    run = pretrain(config, storage=Storage(storage), corpus=Storage(corpus), device=torch.device("cpu"))
    for report in run:
        if report.step >= until:
            break
    run.close()


def test_a_run_across_contrasts_may_change_its_number_of_ranks(
    write_toy_job: Callable[..., Path], sessions: Storage, tmp_path: Path
) -> None:
    views = "{contrasts: mixed, contrast_dropout: 0.3}"
    job = write_toy_job(tmp_path)
    settings = (
        JOINED,
        "pretrain.model.contrasts=[flair, t1, t1ce]",
        f"pretrain.views={views}",
        "pretrain.report_interval=1",
        "pretrain.balance={by: contrast}",
    )

    def train_on(name: str, world_size: int, until: int) -> None:
        given = (job, str(tmp_path / name), sessions.url, settings, until)
        if world_size == 1:
            train_on_ranks(0, *given)
            return
        folder = tmp_path / f"ranks-{name}"
        folder.mkdir()
        join_ranks(start_ranks(world_size, folder, train_on_ranks, *given))

    for name, parts in {"1": [(1, 4)], "1-2": [(1, 2), (2, 4)], "2-1": [(2, 2), (1, 4)]}.items():
        for world_size, until in parts:
            train_on(name, world_size, until)
    expected = losses(Storage(str(tmp_path / "1")))
    assert sorted(expected) == [1, 2, 3, 4]
    for name in ("1-2", "2-1"):
        assert losses(Storage(str(tmp_path / name))) == pytest.approx(expected, rel=1e-5)


def test_a_network_of_one_contrast_of_the_sessions_has_no_figures_by_pair(
    job_of: JobOf, sessions: Storage, tmp_path: Path
) -> None:
    job = job_of(
        tmp_path, JOINED, "pretrain.model.contrasts=[flair]", "pretrain.steps=2", "pretrain.checkpoint_interval=2"
    )
    (report,) = train(job, Storage(str(tmp_path / "pretrain")), sessions)
    assert report.contrast_pairs is None and report.health is not None and report.num_images_without_pairs == 0


def sample(num: int, numbers: list[int], *, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pairs (M, 2E + 1) whose keys are the queries plus noise for odd numbers, and their numbers."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num * len(numbers), 8, generator=generator)
    of = torch.tensor(numbers).repeat_interleave(num)
    keys = queries + noise * (of % 2)[:, None] * torch.randn(queries.shape, generator=generator)
    return torch.cat([queries, keys, torch.ones(len(queries), 1)], 1), of


def test_figures_of_each_pair_of_contrasts_are_those_of_its_pixel_pairs() -> None:
    pairs, numbers = sample(40, [0, 1, 6], noise=1.0)
    found = health_by_contrasts(pairs, numbers, names=pair_names(NAMES), temperature=0.2)
    assert set(found) == {"flair-flair", "flair-t1", "several"}
    queries, keys = (torch.nn.functional.normalize(part, dim=1).double() for part in pairs[:, :-1].chunk(2, dim=1))
    for name, number in (("flair-flair", 0), ("flair-t1", 1), ("several", 6)):
        rows = numbers == number
        q, k = queries[rows], keys[rows]
        sums = [*q.sum(0).tolist(), *k.sum(0).tolist(), float((q * k).sum()), 40.0]
        assert found[name]["equivariance_error"] == pytest.approx(equivariance_error(sums), abs=1e-6)
        assert found[name]["pairs"] == 40
        whole = embedding_health(pairs[rows])
        assert whole is not None and found[name]["alignment"] == pytest.approx(whole["alignment"])
        own = torch.nonzero(rows)[:, 0]
        one_way = torch.nn.functional.cross_entropy(q @ keys.T / 0.2, own)
        other_way = torch.nn.functional.cross_entropy(k @ queries.T / 0.2, own)
        assert found[name]["loss"] == pytest.approx(float(one_way + other_way) / 2)
    assert found["flair-t1"]["loss"] > found["flair-flair"]["loss"]


def test_pairs_without_content_and_too_few_of_them_have_no_figures() -> None:
    pairs, numbers = sample(3, [0, 1], noise=0.5)
    pairs[:2, -1] = 0
    found: dict[str, Any] = health_by_contrasts(pairs, numbers, names=pair_names(NAMES), temperature=None)
    assert set(found) == {"flair-t1"} and "loss" not in found["flair-t1"]
    assert health_by_contrasts(pairs[:3], numbers[:3], names=pair_names(NAMES), temperature=None) == {}
