"""A probe tells features that hold the classes from those that do not, and nothing of the training notices it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from p2r.config import PretrainConfig, ProbeConfig
from p2r.engine.online_probe import OnlineProbe, _even_indices, fit_readout
from p2r.errors import DataError
from p2r.job import Job, read_job
from p2r.model.backbones import build_backbone
from p2r.storage import Storage
from tests.engine_runs import train_config

CPU = torch.device("cpu")
JobOf = Callable[..., Job]


@pytest.fixture(scope="module")
def disc_task(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy task whose test patients are not what they are called: whoever opens one of their files is refused."""
    folder = Path(shutil.copytree(toy_data, tmp_path_factory.mktemp("probe") / "toy"))
    for number in (7, 8):
        for part in ("images", "labels"):
            (folder / part / f"sub-{number:02d}_T1w.nii.gz").write_bytes(b"no scan")
    return folder / "task.yaml"


def _config(job: Job, task: Path, **options: object) -> PretrainConfig:
    assert job.pretrain is not None
    probe = ProbeConfig.model_validate({"task": str(task), "interval": 3, **options})
    return job.pretrain.model_copy(update={"probe": probe})


def test_the_readout_is_the_weighted_ridge_regression_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 60 + [1] * 10 + [2] * 30)
    features = torch.randn(100, 4, generator=generator) * torch.tensor([1.0, 20.0, 0.1, 3.0]) + 5
    features[:, 1] += 30 * (labels == 1)
    readout = fit_readout([(features[:50], labels[:50]), (features[50:], labels[50:])], num_classes=3)
    weights = torch.tensor([60.0, 10.0, 30.0]).double().rsqrt()[labels]
    weights = (weights / weights.sum())[:, None]
    rows = features.double()
    rows = rows - (weights * rows).sum(0)
    rows = rows / (weights * rows**2).sum(0).sqrt()
    targets = torch.eye(3, dtype=torch.float64)[labels]
    mean = (weights * targets).sum(0)
    gram = rows.T @ (weights * rows) + 1e-3 * torch.eye(4)
    expected = rows @ torch.linalg.inv(gram) @ (rows.T @ (weights * (targets - mean))) + mean
    assert readout(features).tolist() == expected.argmax(1).tolist()
    assert len(set(readout(features).tolist())) == 3


@pytest.mark.parametrize("value", [0.7, float("nan")])
def test_features_that_say_nothing_are_read_as_the_largest_class(value: float) -> None:
    labels = torch.tensor([0, 0, 0, 1, 2])
    features = torch.full((5, 3), value)
    assert fit_readout([(features, labels)], num_classes=3)(features).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("num", "most", "expected"), [(3, 16, [0, 1, 2]), (10, 2, [2, 7]), (5, 1, [2]), (4, 4, [0, 1, 2, 3])]
)
def test_planes_are_spread_evenly(num: int, most: int, expected: list[int]) -> None:
    assert _even_indices(num, most).tolist() == expected


def test_a_collapse_shows_in_the_probe(job_of: JobOf, disc_task: Path, tmp_path: Path) -> None:
    config = _config(job_of(tmp_path), disc_task, num_labelled=2)
    probe = OnlineProbe(config, CPU)
    torch.manual_seed(0)
    weights = build_backbone(config.model).state_dict()
    # Even random features of a bright disc are read well; a network that answers the same everywhere is not.
    sound = probe.dice(weights)
    assert sound > 0.6
    assert probe.dice(weights) == sound
    collapsed = probe.dice({name: torch.zeros_like(weight) for name, weight in weights.items()})
    assert collapsed == 0.0
    halved = {name: weight.bfloat16() for name, weight in weights.items()}
    assert probe.dice(halved) == pytest.approx(sound, abs=0.05)


def test_training_does_not_notice_the_probe_which_opens_no_test_patient(
    job_of: JobOf, corpus: Storage, disc_task: Path, tmp_path: Path
) -> None:
    job = job_of(tmp_path)
    assert job.pretrain is not None
    plain, probed = Storage(str(tmp_path / "plain")), Storage(str(tmp_path / "probed"))
    without = train_config(job.pretrain, plain, corpus)
    # Probes after steps 3 and 6 are stated in the reports of steps 4 and 6.
    found = train_config(_config(job, disc_task), probed, corpus)
    assert [report.probe_dice is not None for report in found] == [False, True, True]
    assert all(0 <= (report.probe_dice or 0) <= 1 for report in found)
    assert f"| probe Dice {found[1].probe_dice:.3f} |" in found[1].line()
    assert "probe" not in found[0].line() + without[1].line()
    assert [(report.loss, report.gradient_norm) for report in found] == [
        (report.loss, report.gradient_norm) for report in without
    ]
    files = [storage.read_bytes("checkpoints/step-00000006/model.safetensors") for storage in (plain, probed)]
    assert files[0] == files[1]
    rows = [json.loads(line) for line in probed.read_bytes("history.jsonl").decode().splitlines()]
    assert [row["probe_dice"] for row in rows] == [report.probe_dice for report in found]


def test_a_run_may_go_on_with_another_probe(job_of: JobOf, corpus: Storage, disc_task: Path, tmp_path: Path) -> None:
    job, storage = job_of(tmp_path), Storage(str(tmp_path / "pretrain"))
    assert job.pretrain is not None
    assert [report.probe_dice for report in train_config(job.pretrain, storage, corpus, most=1)] == [None]
    resumed = train_config(_config(job, disc_task, interval=4, seed=3), storage, corpus, most=1)
    assert resumed[0].resumed_from == 2 and resumed[0].probe_dice is not None
    last = train_config(job.pretrain, storage, corpus)
    assert last[0].resumed_from == 4 and last[0].probe_dice is None


def test_more_patients_than_there_are_is_refused(job_of: JobOf, disc_task: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="6 labelled patients were requested"):
        OnlineProbe(_config(job_of(tmp_path), disc_task, num_labelled=6), CPU)


def test_the_task_of_a_probe_is_relative_to_the_job(write_toy_job: Callable[..., Path], tmp_path: Path) -> None:
    job = read_job(write_toy_job(tmp_path), ("pretrain.probe={task: tasks/disc.yaml, interval: 2}",))
    assert job.pretrain is not None and job.pretrain.probe is not None
    assert job.pretrain.probe.task == str(tmp_path / "tasks/disc.yaml")
