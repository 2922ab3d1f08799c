import gzip
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from p2r.artefact import open_artefact
from p2r.config import PretrainConfig
from p2r.data.manifest import load_manifest
from p2r.data.shards import open_shard
from p2r.data.stream import Corpus, stream
from p2r.documents import FileEntry
from p2r.engine.build import build_engine, join_process_group, masters
from p2r.engine.pretrain import _count_lost_weights, _round_products, finished_checkpoint, pretrain
from p2r.engine.profile import PARTS, profile_text
from p2r.engine.step import Step, take_step
from p2r.engine.weights import checked_weights, init_weights
from p2r.errors import CheckpointError, DataError, InputError, StorageError, TrainingError
from p2r.job import Job
from p2r.loss import corresponding_points
from p2r.model.pix2rep import Pix2Rep
from p2r.pipeline.publishing import publish_backbone
from p2r.pointers import resolve
from p2r.published.metrics import metrics_of
from p2r.reference import parse_reference
from p2r.storage import Storage
from p2r.views.pair import make_views
from tests.engine_runs import losses, train

CPU = torch.device("cpu")


JobOf = Callable[..., Job]


@pytest.fixture
def job(job_of: JobOf, tmp_path: Path) -> Job:
    return job_of(tmp_path)


def test_training_reports_checkpoints_and_a_history(job: Job, corpus: Storage, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "pretrain"))
    reports = train(job, storage, corpus)
    assert [report.step for report in reports] == [2, 4, 6]
    assert [report.samples_seen for report in reports] == [8, 16, 24]
    for report in reports:
        assert report.pixel_pairs_per_s == pytest.approx(16 * report.images_per_s)
        assert report.step_s == pytest.approx(4 / report.images_per_s)
        assert report.memory_mib > 100 and report.world_size == 1 and report.skipped_steps == 0
        assert set(report.loss_parts) == {"positive", "negatives"} and report.loss_parts["positive"] < 1
        assert report.health is not None and 1 <= report.health["effective_rank"] <= 8
        assert f"rank {report.health['effective_rank']:.1f}" in report.line() and "skipped" not in report.line()
    assert list(losses(storage)) == [2, 4, 6]
    kept = sorted({path.split("/")[1] for path in storage.list("checkpoints")})
    assert kept == ["step-00000004", "step-00000006"]  # keep_checkpoints: 2
    assert job.pretrain is not None
    assert finished_checkpoint(storage, job.pretrain).step == 6


def test_a_damaged_sample_costs_a_note_and_not_the_run(job: Job, corpus: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.url.removeprefix("file://"), folder)
    name = load_manifest(corpus)["shards"][0]["name"]
    content = bytearray((folder / name).read_bytes())
    row = open_shard(folder / name).locate(0)[0]
    content[row.chunk_offsets[0] + 30] ^= 1
    (folder / name).write_bytes(content)
    storage = Storage(str(tmp_path / "pretrain"))
    reports = train(job, storage, Storage(str(folder)))
    assert reports[-1].num_replaced >= 1 and "damaged samples replaced" in reports[-1].line()
    (note,) = storage.list("quarantine")
    assert storage.read_json(note)["shard"].endswith(name) and storage.read_json(note)["sample"] == 0
    strict = job.model_copy(update={"pretrain": job.pretrain.model_copy(update={"max_replaced": 0})})  # type: ignore[union-attr]
    with pytest.raises(DataError, match=f"{name}.*is damaged"):
        train(strict, Storage(str(tmp_path / "strict")), Storage(str(folder)))


@pytest.mark.parametrize("name", ["unet", "dynunet", "residual_dynunet"])
def test_every_network_trains_in_bfloat16(job_of: JobOf, corpus: Storage, tmp_path: Path, name: str) -> None:
    model = f"{{name: {name}, channels: [4, 8, 8], feature_channels: 4, head_channels: 16, embedding_channels: 8}}"
    job = job_of(tmp_path, f"pretrain.model={model}", "pretrain.precision=bf16", "pretrain.micro_batch=2")
    assert len(train(job, Storage(str(tmp_path / "pretrain")), corpus)) == 3


def test_a_corpus_smaller_than_a_global_batch_is_refused(job_of: JobOf, corpus: Storage, tmp_path: Path) -> None:
    job = job_of(tmp_path, "pretrain.global_batch=512")
    with pytest.raises(DataError, match=r"24 .*512"):
        train(job, Storage(str(tmp_path / "pretrain")), corpus)


def test_a_missing_corpus_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no corpus at"):
        train(job, Storage(str(tmp_path / "pretrain")), Storage(str(tmp_path / "nothing")))


def test_a_damaged_shard_is_refused_by_name(job: Job, corpus: Storage, tmp_path: Path) -> None:
    copy = Storage(str(tmp_path / "copy"))
    for path in corpus.list():
        copy.write_bytes(path, corpus.read_bytes(path))
    (first, *_) = [path for path in copy.list() if path.endswith(".tar")]
    copy.write_bytes(first, copy.read_bytes(first)[:-2048])
    with pytest.raises((StorageError, DataError), match="shard-000000"):
        train(job, Storage(str(tmp_path / "pretrain")), copy)


def test_a_loss_that_is_not_finite_stops_the_run(job_of: JobOf, corpus: Storage, tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        *("pretrain.optimizer.learning_rate=1.0e+30", "pretrain.optimizer.clip_norm=0"),
        *("pretrain.max_skipped_steps=2", "pretrain.checkpoint_interval=1"),
    )
    storage = Storage(str(tmp_path / "pretrain"))
    with pytest.raises(
        TrainingError,
        match=r"^step 4: queries: .* embeddings are not finite; skipped steps in a row: 3, "
        r"pretrain.max_skipped_steps allows 2; the last good checkpoint is .*/checkpoints/step-00000001\. Lower",
    ):
        train(job, storage, corpus)
    # None was made while steps were left out.
    assert {path.split("/")[1] for path in storage.list("checkpoints")} == {"step-00000001"}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that has the step of this number, from now on, see what is not a number; 0: none."""

    def spoil(bad: int) -> None:
        steps = itertools.count(1)

        def spoilt(image: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            return make_views(image * math.nan if next(steps) == bad else image, *arguments, **options)

        monkeypatch.setattr("p2r.engine.step.make_views", spoilt)

    return spoil


@pytest.mark.parametrize("loss", ["info_nce", "barlow_twins"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    loss: str,
    spoil: Callable[[int], None],
    job_of: JobOf,
    corpus: Storage,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    job = job_of(tmp_path, f"pretrain.loss.name={loss}", "pretrain.report_interval=1", "pretrain.checkpoint_interval=3")
    waiting, going = Storage(str(tmp_path / "waiting")), Storage(str(tmp_path / "going"))
    spoil(3)
    reports = train(job, waiting, corpus)
    assert [report.skipped_steps for report in reports] == [0, 0, 1, 1, 1, 1]
    assert reports[2].loss == reports[1].loss and reports[2].gradient_norm == reports[1].gradient_norm
    assert "| 1 steps skipped" in reports[2].line()
    assert reports[2].health is None and reports[2].equivariance_error is None and not reports[2].loss_parts
    assert all(math.isfinite(report.loss) and math.isfinite(report.gradient_norm) for report in reports)
    assert [report.samples_seen for report in reports] == [4, 8, 12, 16, 20, 24]  # the batch is used up
    assert [report.checkpoint for report in reports if report.checkpoint] == ["checkpoints/step-00000006"]
    # The same where nobody waits for the device, with a stop right after that step.
    request.getfixturevalue("waited_for")
    spoil(3)
    steps = itertools.count(1)
    assert job.pretrain is not None
    *_, last = pretrain(job.pretrain, storage=going, corpus=corpus, device=CPU, should_stop=lambda: next(steps) == 3)
    assert last.checkpoint == "checkpoints/step-00000003" and last.skipped_steps == 1
    spoil(0)
    *_, last = train(job, going, corpus)
    assert last.skipped_steps == 1
    assert losses(going) == losses(waiting)
    assert _weights(going, "step-00000006") == _weights(waiting, "step-00000006")


def test_barlow_twins_is_one_key_away(job_of: JobOf, corpus: Storage, tmp_path: Path) -> None:
    job = job_of(tmp_path, "pretrain.loss.name=barlow_twins")
    assert len(train(job, Storage(str(tmp_path / "pretrain")), corpus)) == 3


def _weights(storage: Storage, checkpoint: str) -> str:
    manifest = storage.read_json(f"checkpoints/{checkpoint}/manifest.json")
    digest: str = manifest["files"]["model.safetensors"]["sha256"]
    return digest


def test_a_profile_says_where_time_and_memory_go(job_of: JobOf, corpus: Storage, tmp_path: Path) -> None:
    job = job_of(tmp_path, "pretrain.micro_batch=2")
    assert job.pretrain is not None
    plain, profiled = Storage(str(tmp_path / "plain")), Storage(str(tmp_path / "profiled"))
    train(job, plain, corpus)
    run = pretrain(job.pretrain, storage=profiled, corpus=corpus, device=CPU, profile_steps=2)
    assert [report.profile for report in run] == [None, None, "profile"]  # steps 4 and 5, told of at step 6
    assert losses(profiled) == losses(plain)
    found = profiled.read_json("profile/profile.json")
    assert (found["first_step"], found["num_steps"]) == (4, 2)
    assert [part["name"] for part in found["parts"]] == [*PARTS, "other"]
    assert all(part["seconds_per_step"] > 0 for part in found["parts"] if part["name"] not in ("wait", "other"))
    assert sum(part["seconds_per_step"] for part in found["parts"]) == pytest.approx(found["seconds_per_step"], rel=0.1)
    assert len(found["operators"]) == 10
    weights = sum(weight.numel() for weight in Pix2Rep(job.pretrain.model).parameters()) * 4 / 2**20
    memory = found["memory"]
    assert memory["weights_mib"] == pytest.approx(weights, rel=0.05)
    assert memory["optimizer_mib"] == pytest.approx(3 * weights, rel=0.05)  # two moments and DeepSpeed's own copy
    assert memory["gradients_mib"] >= weights
    assert memory["peak_mib"] > memory["activations_mib"] > 0
    assert "| backward |" in profile_text(profiled)
    trace = json.loads(gzip.decompress(profiled.read_bytes("profile/trace.json.gz")))
    assert {"views", "backward"} <= {event.get("name") for event in trace["traceEvents"]}
    assert profiled.read_bytes("profile/profile.png").startswith(b"\x89PNG")


def test_a_run_that_is_too_short_for_its_profile_profiles_what_there_is(
    job: Job, corpus: Storage, tmp_path: Path
) -> None:
    assert job.pretrain is not None
    storage = Storage(str(tmp_path / "pretrain"))
    run = pretrain(job.pretrain, storage=storage, corpus=corpus, device=CPU, profile_steps=100)
    assert [report.profile for report in run] == [None, None, "profile"]
    assert storage.read_json("profile/profile.json")["num_steps"] == 3


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device that must not be waited for."""
    for module in ("p2r.loss.ranks", "p2r.engine.pretrain"):
        monkeypatch.setattr(f"{module}.is_waited_for", lambda device: True)


def test_a_run_that_does_not_wait_for_its_device_has_the_same_digits(
    job_of: JobOf, corpus: Storage, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = job_of(tmp_path, "pretrain.report_interval=3", "pretrain.checkpoint_interval=2")
    waiting, going, broken = (Storage(str(tmp_path / name)) for name in ("waiting", "going", "broken"))
    train(job, waiting, corpus)
    request.getfixturevalue("waited_for")
    train(job, going, corpus)
    assert losses(going) == losses(waiting)
    train(job, broken, corpus, most=1)  # at step 2, in the middle of a report's interval
    train(job, broken, corpus)
    assert losses(broken).items() >= {step: losses(going)[step] for step in (3, 6)}.items()
    assert _weights(broken, "step-00000006") == _weights(waiting, "step-00000006")


def test_tf32_is_refused_on_devices_without_it_and_allowed_only_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig.model_validate({"steps": 1, "global_batch": 2, "precision": "tf32"})
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for device in (CPU, gpu):
        with (
            pytest.raises(
                InputError, match=rf"tf32 needs a GPU of compute capability 8\.0 or newer, not {device}: set"
            ),
            _round_products(config, device),
        ):
            pass
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with _round_products(config, gpu):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("waited_for")
def test_a_step_that_went_wrong_unnoticed_is_named_before_a_checkpoint_is_made(
    job_of: JobOf, corpus: Storage, tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path / "pretrain"))
    job = job_of(
        tmp_path,
        *("pretrain.optimizer.learning_rate=1.0e+30", "pretrain.optimizer.clip_norm=0"),
        *("pretrain.checkpoint_interval=5", "pretrain.report_interval=6", "pretrain.max_skipped_steps=0"),
    )
    with pytest.raises(
        TrainingError,
        match=r"^step 2: queries: .* not finite; pretrain.max_skipped_steps allows 0; there is no checkpoint yet",
    ):
        train(job, storage, corpus)
    assert storage.list("checkpoints") == []


def lose_two_weights(engine: Any) -> None:
    """Write NaN and infinity over the first weight of the first and of the last fp32 tensor that the engine updates."""
    first, *_, last = masters(engine)
    with torch.no_grad():
        first.view(-1)[0] = math.nan
        last.view(-1)[0] = -math.inf


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_that_are_no_longer_finite_are_counted_at_every_zero_stage(
    job_of: JobOf, tmp_path: Path, stage: int
) -> None:
    settings = job_of(tmp_path, f"pretrain.zero_stage={stage}").pretrain
    assert settings is not None
    join_process_group(CPU)
    engine = build_engine(Pix2Rep(settings.model), settings, world_size=1)
    assert _count_lost_weights(engine) == 0
    lose_two_weights(engine)
    assert _count_lost_weights(engine) == 2
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_saves_no_weights_that_were_lost(
    job_of: JobOf, corpus: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    job, storage = job_of(tmp_path, f"pretrain.zero_stage={stage}"), Storage(str(tmp_path / "pretrain"))
    train(job, storage, corpus, most=1)
    num_steps = itertools.count(3)

    def step_that_loses_weights(engine: Any, *arguments: Any, **settings: Any) -> Step:
        taken = take_step(engine, *arguments, **settings)
        if next(num_steps) == 4:
            lose_two_weights(engine)
        return taken

    monkeypatch.setattr("p2r.engine.pretrain.take_step", step_that_loses_weights)
    with pytest.raises(TrainingError, match=r"step 4: 2 weights are no longer finite; the last good .*step-00000002"):
        train(job, storage, corpus)
    assert {path.split("/")[1] for path in storage.list("checkpoints")} == {"step-00000002"}


def test_deterministic_algorithms_are_asked_for_as_long_as_a_run_lasts(
    job_of: JobOf, job: Job, corpus: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)

    def settings() -> tuple[Any, ...]:
        asked = torch.are_deterministic_algorithms_enabled()
        return asked, cudnn.deterministic, cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    before = settings()
    assert before == (False, False, True, None)
    wanted = job_of(tmp_path, "pretrain.deterministic=true").pretrain
    assert wanted is not None and job.pretrain is not None
    run = pretrain(wanted, storage=Storage(str(tmp_path / "pretrain")), corpus=corpus, device=CPU)
    next(run)
    assert settings() == (True, True, False, ":4096:8")
    run.close()
    assert settings() == before
    # It may be asked for on the way.
    run = pretrain(job.pretrain, storage=Storage(str(tmp_path / "pretrain")), corpus=corpus, device=CPU)
    assert next(run).resumed_from == 2
    assert settings() == before
    run.close()


def test_the_mean_of_weights_is_what_is_published(job_of: JobOf, corpus: Storage, tmp_path: Path) -> None:
    job = job_of(tmp_path, "kind=pretrain", "pretrain.ema_decay=0.5", "ingest=null", f"pretrain.corpus={corpus.url}")
    storage = Storage(job.storage)
    train(job, storage.child("pretrain"), corpus)
    made = publish_backbone(job, storage, lambda line: None)
    published = Storage(made["url"]).read_bytes(made["files"]["weights"]["name"])
    last, mean = (
        safetensors.torch.load(storage.read_bytes(f"pretrain/checkpoints/step-00000006/{name}.safetensors"))
        for name in ("model", "ema")
    )
    found = safetensors.torch.load(published)
    assert set(mean) == set(last) and 0 < len(found) < len(mean)  # the projection head is in a file of its own
    for name, value in found.items():
        assert torch.equal(value, mean[f"backbone.{name}"])
    assert any(not torch.equal(last[name], mean[name]) for name in mean)
    head, unaveraged = (
        safetensors.torch.load(Storage(made["url"]).read_bytes(made["files"][role]["name"]))
        for role in ("head", "unaveraged")
    )
    assert set(head) == {name for name in mean if name.startswith("head.")}
    assert all(torch.equal(value, mean[name]) for name, value in head.items())
    assert all(torch.equal(value, last[f"backbone.{name}"]) for name, value in unaveraged.items())
    # A run that starts from it takes both parts over, and its own backbone names it as its parent.
    assert job.pretrain is not None
    model = Pix2Rep(job.pretrain.model)
    record = init_weights(model, f"{storage.url}/backbones/toy@latest")
    assert record.to_json()["head"] == "taken over" and record.manifest_sha256 == made["sha256"]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in mean.items())


def test_a_swin_unetr_is_probed_published_and_starts_another_run(
    job_of: JobOf, corpus: Storage, toy_data: Path, tmp_path: Path
) -> None:
    model = "{name: swin_unetr, channels: [12, 24, 48, 96, 192], feature_channels: 4, head_channels: 8, embedding_channels: 8}"
    job = job_of(
        tmp_path,
        *("kind=pretrain", "ingest=null", f"pretrain.corpus={corpus.url}", f"pretrain.model={model}"),
        *("pretrain.image.size=64", "pretrain.steps=1", "pretrain.global_batch=2", "pretrain.ema_decay=0.5"),
        f"pretrain.probe={{task: {toy_data}/task.yaml, interval: 1, num_labelled: 1, num_validation: 1, planes_per_scan: 1}}",
    )
    storage = Storage(job.storage)
    (report,) = train(job, storage.child("pretrain"), corpus)
    assert report.probe_dice is not None and job.pretrain is not None
    checkpoint = finished_checkpoint(storage.child("pretrain"), job.pretrain)
    made = publish_backbone(job, storage, lambda line: None)
    for url in (f"{storage.url}/pretrain/{checkpoint.path}", made["url"]):
        assert init_weights(Pix2Rep(job.pretrain.model), url).weights_sha256


def test_a_table_of_swin_unetr_in_an_older_checkpoint_is_not_read_as_a_weight(tmp_path: Path) -> None:
    tensors = {"backbone.a.weight": torch.ones(2), "backbone.a.relative_position_index": torch.zeros(4, 4)}
    content = safetensors.torch.save(tensors)
    (tmp_path / "model.safetensors").write_bytes(content)
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
    found = checked_weights(Storage(str(tmp_path)), "model.safetensors", entry)
    assert found.keys() == {"backbone.a.weight"}


def test_a_checkpoint_on_the_way_is_published_as_its_step_while_the_run_is_at_work(
    job_of: JobOf, corpus: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("kind=pretrain", "ingest=null", f"pretrain.corpus={corpus.url}", "pretrain.equivariance_interval=1")
    job = job_of(tmp_path, *overrides)
    storage = Storage(job.storage)
    run = pretrain(job.pretrain, storage=storage.child("pretrain"), corpus=corpus, device=CPU)  # type: ignore[arg-type]
    while not storage.exists("pretrain/checkpoints/step-00000002/manifest.json"):
        next(run)
    with pytest.raises(CheckpointError, match=r"is the newest checkpoint of 6 steps: .* p2r publish JOB --step \d"):
        publish_backbone(job, storage, lambda line: None)
    with monkeypatch.context() as ignoring, pytest.raises(StorageError, match="ignores If-Match"):
        ignoring.setattr(Storage, "replace", lambda self, path, data, tag: True)
        publish_backbone(job, storage, lambda line: None, step=2)
    assert storage.list("backbones") == []
    made = publish_backbone(job, storage, lambda line: None, step=2)
    assert made["url"].endswith("/backbones/toy/1-step-2") and made["step"] == 2
    artefact = open_artefact(resolve(parse_reference(f"{storage.url}/backbones/toy@latest")))
    assert artefact.pin == made["pin"]
    metrics = metrics_of(artefact)
    assert (
        metrics is not None
        and metrics.step == 2
        and metrics.health is not None
        and metrics.health["effective_rank"] > 1
    )
    assert made["files"]["picture"]["num_bytes"] > 1000
    content = storage.read_bytes("pretrain/checkpoints/step-00000002/manifest.json")
    assert (
        made["lineage"]["checkpoint_sha256"] == hashlib.sha256(content).hexdigest() and made["lineage"]["parents"] == []
    )
    with pytest.raises(CheckpointError, match=r"step-00000003 is not a complete checkpoint: complete are the steps 2"):
        publish_backbone(job, storage, lambda line: None, step=3)
    list(run)
    again = publish_backbone(job, storage, lambda line: None)
    assert again["url"].endswith("/backbones/toy/1") and again["step"] == 6


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("loss", ["info_nce", "barlow_twins"])
def test_images_that_show_nothing_are_counted_and_teach_nothing(
    loss: str, waits: bool, job_of: JobOf, corpus: Storage, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not waits:
        request.getfixturevalue("waited_for")
    # Of 64 mm, a view shows something if it is moved by less along both axes: most batches show nothing at all.
    job = job_of(tmp_path, f"pretrain.loss.name={loss}", "pretrain.views.geometry.translation_mm=1000")
    reports = train(job, Storage(str(tmp_path / "pretrain")), corpus)
    assert sum(report.num_images_without_pairs for report in reports) >= 20
    assert any(report.num_images_without_pairs == 8 and report.loss == 0 for report in reports)
    assert all(math.isfinite(report.loss) and math.isfinite(report.gradient_norm) for report in reports)
    assert f"{reports[0].num_images_without_pairs} images without pairs" in reports[0].line()


def test_the_equivariance_error_falls_in_training(job_of: JobOf, corpus: Storage, tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        *("pretrain.steps=60", "pretrain.report_interval=10", "pretrain.equivariance_interval=3"),
        *("pretrain.optimizer.learning_rate=1.0e-2", "pretrain.loss.pixel_pairs_per_image=64"),
        *("pretrain.checkpoint_interval=60", "pretrain.global_batch=8"),
    )
    reports = train(job, Storage(str(tmp_path / "pretrain")), corpus)
    errors = {report.step: report.equivariance_error for report in reports if report.equivariance_error is not None}
    assert list(errors) == [30, 60]
    assert 0 < errors[60] < errors[30] < 1


def test_a_scan_smaller_than_the_crop_is_padded_and_its_padding_gives_no_pairs(
    job_of: JobOf, corpus: Storage, tmp_path: Path
) -> None:
    job = job_of(tmp_path, "pretrain.image.size=64", "pretrain.steps=2")  # 128 mm, of scans of 72 x 80 mm
    assert job.pretrain is not None
    (report,) = train(job, Storage(str(tmp_path / "pretrain")), corpus)
    assert math.isfinite(report.loss) and report.num_images_without_pairs == 0
    corpora = Corpus(corpus, load_manifest(corpus))
    batches = stream(corpora, image=job.pretrain.image, seed=0, global_batch=4)
    batch, _ = next(batches)
    batches.close()
    image, inside = batch.images()
    assert [int(scan.sum()) for scan in inside] == [36 * 40] * 4
    views = make_views(
        image,
        inside,
        config=job.pretrain.views,
        spacing_mm=2.0,
        seed=0,
        epochs=batch.epochs,
        positions=batch.positions,
    )
    generators = [np.random.default_rng(number) for number in range(4)]
    pairs = corresponding_points(views.warp, views.valid, num_points=50, generators=generators)
    assert (pairs.weight == 1).all()
    for scan, points in zip(inside, pairs.a, strict=True):
        assert all(scan[tuple(point.round().long())] for point in points)
