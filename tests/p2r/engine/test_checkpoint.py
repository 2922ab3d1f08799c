"""What a run goes on from: the newest checkpoint that is whole, and no other run's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from p2r.backbone import BACKBONE_FORMAT, ArtefactConfig, publish
from p2r.config import CorpusShare
from p2r.data.corpus import ingest_locally
from p2r.data.manifest import load_manifest, manifest_sha256
from p2r.data.preprocess import Preparation
from p2r.engine.build import join_process_group
from p2r.engine.checkpoint import Checkpoints, Fetched, load_checkpoint, newest_checkpoint
from p2r.engine.corpora import refuse_other_stream
from p2r.engine.peers import Peers
from p2r.engine.pretrain import pretrain
from p2r.engine.report import PretrainReport
from p2r.engine.uploading import step_of
from p2r.engine.weights import init_weights
from p2r.errors import CheckpointError, JobError, StorageError
from p2r.job import Job, read_job
from p2r.model.pix2rep import Pix2Rep
from p2r.pipeline.fork import forked
from p2r.pipeline.publishing import publish_backbone
from p2r.reference import parse_reference
from p2r.storage import Storage, file_sha256
from tests.fault_proxy import ALWAYS, Fault, FaultProxy

CPU = torch.device("cpu")
JobOf = Callable[..., Job]


@pytest.fixture(scope="module")
def job_of(write_toy_job: Callable[..., Path]) -> JobOf:
    overrides = ("kind=pretrain", "pretrain.report_interval=1", "pretrain.keep_checkpoints=3")
    return lambda folder, *more: read_job(write_toy_job(folder), (*overrides, *more))


@pytest.fixture(scope="module")
def trained(job_of: JobOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a job that has run: a corpus, checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    job = job_of(folder)
    storage = Storage(job.storage)
    assert job.ingest is not None
    list(ingest_locally(job.ingest.model_copy(update={"subjects_of": None}), storage.child("corpus")))
    train(job)
    return folder / "storage"


@pytest.fixture
def job(job_of: JobOf, trained: Path, tmp_path: Path) -> Job:
    """The same job with a copy of this storage."""
    shutil.copytree(trained, tmp_path / "storage")
    return job_of(tmp_path)


def train(job: Job, **options: Any) -> list[PretrainReport]:
    assert job.pretrain is not None
    storage = Storage(job.storage)
    return list(
        pretrain(job.pretrain, storage=storage.child("pretrain"), corpus=storage.child("corpus"), device=CPU, **options)
    )


def losses(job: Job) -> dict[int, float]:
    lines = Storage(job.storage).read_bytes("pretrain/history.jsonl").decode().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def found(job: Job, folder: Path) -> tuple[int | None, list[tuple[str, int]]]:
    """Return the step that the job would go on from, and what it says of others."""
    assert job.pretrain is not None
    notes: list[tuple[str, int]] = []
    join_process_group(CPU)
    storage = Storage(job.storage).child("pretrain")
    with Checkpoints(storage, job.pretrain, note=lambda what, step: notes.append((what, step))) as checkpoints:
        fetched = checkpoints.newest()
    return None if fetched is None else fetched.saved.step, notes


def a_file_of(job: Job, step: int, pattern: str = "*.pt") -> Path:
    return next((Path(job.storage) / f"pretrain/checkpoints/step-{step:08d}").rglob(pattern))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a bit flipped": (flip, "*.pt", "does not have the sha256"),
    "cut off": (lambda path: os.truncate(path, 100), "model.safetensors", "has 100 bytes, its manifest says"),
    "missing": (Path.unlink, "rank-00000.safetensors", "rank-00000.safetensors does not exist"),
    "no json": (lambda path: path.write_text("{"), "manifest.json", "is not JSON"),
    "no manifest's keys": (
        lambda path: path.write_text('{"format": "p2r-checkpoint/1"}'),
        "manifest.json",
        "step: Field required",
    ),
    "a file elsewhere": (
        lambda path: path.write_text(path.read_text().replace('"model.safetensors"', '"/tmp/model.safetensors"')),
        "manifest.json",
        "files./tmp/model.safetensors.*below the folder",
    ),
    "half uploaded": (Path.unlink, "manifest.json", "has no manifest: its upload was interrupted"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    job: Job, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, pattern, reason = DAMAGES[damage]
    change(a_file_of(job, 6, pattern))
    step, (note,) = found(job, tmp_path)
    assert step == 4
    what, from_step = note
    assert from_step == 4
    for text in (what, caplog.text):
        assert re.search(rf"step-00000006.*{reason}.*using instead: .*step-00000004", text)
    assert found(job, tmp_path)[0] == 4  # and it is not asked again
    newest = newest_checkpoint(Storage(job.storage).child("pretrain"))
    assert newest is not None and newest.step == 4


def test_a_run_goes_on_from_the_one_before_to_the_same_digits(job: Job, trained: Path) -> None:
    whole = losses(job)
    flip(a_file_of(job, 6))
    os.truncate(a_file_of(job, 4), 50)
    reports = train(job)
    assert [report.step for report in reports] == [3, 4, 5, 6]
    assert reports[0].resumed_from == 2
    assert "step-00000006" in reports[0].line() and "using instead" in reports[0].line()
    assert reports[1].fell_back is None
    assert losses(job) == whole
    digests = [
        json.loads((folder / "pretrain/checkpoints/step-00000006/manifest.json").read_text())["files"]
        for folder in (trained, Path(job.storage))
    ]
    assert digests[0]["model.safetensors"] == digests[1]["model.safetensors"]


def test_when_no_checkpoint_is_sound_all_are_named_and_nothing_begins_anew(job: Job, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        flip(a_file_of(job, step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"(?s)none of its 3.*step-00000006.*step-00000004.*step-00000002"):
            found(job, tmp_path)


def test_a_storage_that_cannot_be_read_is_no_reason_to_fall_back(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise StorageError("the bucket does not answer")

    monkeypatch.setattr(Storage, "download", fails)
    with pytest.raises(StorageError, match="does not answer"):
        found(job, tmp_path)
    newest = newest_checkpoint(Storage(job.storage).child("pretrain"))
    assert newest is not None and newest.step == 6


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from p2r.engine.pretrain import pretrain
from p2r.job import read_job
from p2r.storage import Storage

class Killing(Storage):
    def write_json(self, path, value):
        if path.endswith("step-00000004/manifest.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        super().write_json(path, value)

if __name__ == "__main__":
    job = read_job(Path(sys.argv[1]), tuple(sys.argv[2:]))
    corpus = Storage(job.storage).child("corpus")
    storage = Killing(job.storage + "/pretrain")
    list(pretrain(job.pretrain, storage=storage, corpus=corpus, device=torch.device("cpu")))
"""


def test_a_run_killed_between_files_and_manifest_goes_on_from_the_checkpoint_before(
    job: Job, tmp_path: Path, repository: Path
) -> None:
    whole = losses(job)
    shutil.rmtree(tmp_path / "storage/pretrain")
    (tmp_path / "killed.py").write_text(KILLED)
    overrides = ["kind=pretrain", "pretrain.report_interval=1", "pretrain.keep_checkpoints=3"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "toy.yaml"), *overrides],
        env={**os.environ, "PYTHONPATH": str(repository), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert a_file_of(job, 4).is_file()
    (left,) = tmp_path.glob("p2r-checkpoint-*.lock")
    reports = train(job)
    assert reports[0].resumed_from == 2
    assert reports[0].fell_back is not None and "step-00000004 has no manifest" in reports[0].fell_back
    assert losses(job) == whole
    assert left.exists()  # another TMPDIR: another machine, so to speak


def test_reports_name_a_checkpoint_once_it_is_complete(job: Job) -> None:
    shutil.rmtree(Path(job.storage) / "pretrain")
    assert job.pretrain is not None
    storage = Storage(job.storage)
    run = pretrain(job.pretrain, storage=storage.child("pretrain"), corpus=storage.child("corpus"), device=CPU)
    named = []
    for report in run:
        if report.checkpoint is not None:
            assert storage.exists(f"pretrain/{report.checkpoint}/manifest.json")
            assert report.checkpoint_s is not None and report.checkpoint_s > 0
            assert report.checkpoint_bytes is not None and report.checkpoint_bytes > 10_000
            named.append(report.checkpoint)
    assert named[-1] == "checkpoints/step-00000006"
    manifest = storage.read_json("pretrain/checkpoints/step-00000006/manifest.json")
    assert len(manifest["config_sha256"]) == 64 and manifest["code"] and manifest["init_from"] is None


def test_an_upload_that_fails_is_named_at_the_next_save_and_the_last_good_checkpoint_stays(job: Job) -> None:
    folder = Path(job.storage) / "pretrain"
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoints/step-{step:08d}")
    (folder / "checkpoints/step-00000004").write_text("in the way")
    with pytest.raises(StorageError, match=r"checkpoint of step 4 could not be uploaded: cannot write .*step-00000004"):
        train(job)
    newest = newest_checkpoint(Storage(job.storage).child("pretrain"))
    assert newest is not None and newest.step == 2
    (folder / "checkpoints/step-00000004").unlink()
    assert train(job)[-1].step == 6


@pytest.mark.s3
def test_a_bucket_that_refuses_an_upload_keeps_the_last_good_checkpoint(
    job_of: JobOf, trained: Path, tmp_path: Path, s3_url: str, proxy: FaultProxy
) -> None:
    job = job_of(tmp_path, "ingest=null", f"pretrain.corpus={trained}/corpus", f"storage={s3_url}")
    proxy.add(Fault("status", on=".*step-00000004/.*model.safetensors", times=ALWAYS, status=403))
    with pytest.raises(StorageError, match=r"checkpoint of step 4 could not be uploaded: .*step-00000004"):
        train(job)
    proxy.clear()
    reports = train(job)
    assert reports[0].resumed_from == 2 and reports[-1].checkpoint == "checkpoints/step-00000006"


def test_generators_are_part_of_a_checkpoint(job: Job, tmp_path: Path) -> None:
    assert job.pretrain is not None
    join_process_group(CPU)
    peers = Peers()
    path = a_file_of(job, 6, "rank-00000.safetensors")
    generator = torch.Generator().manual_seed(7)
    save_file({"cpu": generator.get_state()}, path)
    loaded: list[str] = []
    engine = SimpleNamespace(load_checkpoint=lambda folder, tag: loaded.append(tag), device=CPU)
    storage = Storage(job.storage).child("pretrain")
    saved = newest_checkpoint(storage)
    assert saved is not None
    before = torch.get_rng_state()
    copy = tmp_path / "copy"
    shutil.copytree(path.parents[1], copy)
    load_checkpoint(engine, Fetched(saved, "", copy, True), peers, config=job.pretrain)
    drawn = torch.rand(3)
    torch.set_rng_state(before)
    assert torch.equal(drawn, torch.rand(3, generator=generator))
    assert loaded == ["deepspeed"] and not copy.exists()


def test_stages_1_and_2_take_over_from_each_other_and_no_other_ones_do(job_of: JobOf, job: Job, tmp_path: Path) -> None:
    whole = losses(job)
    for step in (4, 6):
        shutil.rmtree(Path(job.storage) / f"pretrain/checkpoints/step-{step:08d}")
    with pytest.raises(CheckpointError, match=r"step-00000002 was made with pretrain.zero_stage 1, this run has 0"):
        train(job_of(tmp_path, "pretrain.zero_stage=0"))
    reports = train(job_of(tmp_path, "pretrain.zero_stage=2"))
    assert reports[0].resumed_from == 2
    assert losses(job) == pytest.approx(whole, rel=1e-6)


def rewrite(job: Job, step: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's manifest, and remove later checkpoints."""
    for path in Path(job.storage).glob("pretrain/checkpoints/step-*"):
        if step_of(f"checkpoints/{path.name}") > step:
            shutil.rmtree(path)
    path = a_file_of(job, step, "manifest.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_checkpoint_of_an_older_version_resumes_with_the_defaults_of_newer_keys(job: Job) -> None:
    whole = losses(job)

    def age(manifest: dict[str, Any]) -> None:
        manifest["code_version"] = "0.0.1"
        for name in ("zero_stage", "neighbours", "max_skipped_steps", "deterministic", "views"):
            del manifest["config"][name]
        del manifest["config"]["optimizer"]["weight_decay"], manifest["config"]["loss"]["form"]
        del manifest["state"]["stream"]["neighbours"], manifest["state"]["running"]["skipped_in_a_row"]

    rewrite(job, 4, age)
    report, *_ = train(job)
    assert report.resumed_from == 4 and losses(job) == whole


def test_an_older_checkpoint_is_refused_if_the_job_sets_a_newer_key(job_of: JobOf, job: Job, tmp_path: Path) -> None:
    rewrite(job, 4, lambda manifest: manifest["config"].pop("neighbours"))
    with pytest.raises(CheckpointError, match=r"pretrain\.neighbours: 0\.0 in the checkpoint, 0\.5 in the job"):
        train(job_of(tmp_path, "pretrain.neighbours=0.5"))


NEWER: dict[str, tuple[tuple[str, ...], str]] = {
    "a key of the configuration": (
        ("config", "sharper"),
        r"(?s)pretrain\.sharper: 1 in the checkpoint; this version of p2r has no such key\n"
        r"p2r 99\.0 wrote it, this is p2r .*: resume with that version.*--fork NAME",
    ),
    "a nested key": (("config", "views", "sharper"), r"pretrain\.views\.sharper: 1 in the checkpoint; this version"),
    "a sum": (
        ("state", "running", "sharper"),
        r"has sharper, which this version .*version of p2r that wrote it \(99\.0\)",
    ),
    "the data stream": (("state", "stream", "sharper"), r"stream has sharper, which this version .*--fork NAME"),
}


@pytest.mark.parametrize("case", NEWER)
def test_a_checkpoint_of_a_newer_version_is_refused_by_the_name_of_the_key(job: Job, case: str) -> None:
    (*place, last), message = NEWER[case]

    def renew(manifest: dict[str, Any]) -> None:
        manifest["code_version"] = "99.0"
        part = manifest
        for name in place:
            part = part[name]
        part[last] = 1

    rewrite(job, 4, renew)
    with pytest.raises(CheckpointError, match=message):
        train(job)


def test_another_revision_of_the_corpus_is_refused_with_both_values_and_the_way_out(job: Job, tmp_path: Path) -> None:
    assert job.pretrain is not None
    checkpoint = newest_checkpoint(Storage(job.storage).child("pretrain"))
    assert checkpoint is not None
    stream, corpus = checkpoint.manifest.state.stream, Storage(job.storage).child("corpus")
    refuse_other_stream(job.pretrain, corpus, stream)
    began_with = stream["corpora"][0]["manifest_sha256"]
    pinned = job.pretrain.model_copy(update={"corpus": (CorpusShare(url=corpus.url, revision="0" * 64),)})
    with pytest.raises(CheckpointError, match=f"from revision {began_with} of .*this run from {'0' * 64}.*--fork"):
        refuse_other_stream(pinned, corpus, stream)
    assert job.ingest is not None
    few = job.ingest.model_copy(update={"subjects_of": None, "subjects": ("sub-[01-05]",)})
    list(ingest_locally(few, Storage(str(tmp_path / "other"))))
    current = manifest_sha256(load_manifest(Storage(str(tmp_path / "other"))))
    with pytest.raises(CheckpointError, match=f"from revision {began_with} of .*this run from {current}.*--fork"):
        refuse_other_stream(job.pretrain, Storage(str(tmp_path / "other")), stream)
    with pytest.raises(CheckpointError, match=r"data stream has seed 0, this run has 1.*--fork NAME"):
        refuse_other_stream(job.pretrain.model_copy(update={"seed": 1}), corpus, stream)


@pytest.fixture
def backbone(job: Job, tmp_path: Path) -> str:
    assert job.pretrain is not None
    storage = Storage(str(tmp_path / "backbone/1"))
    torch.manual_seed(9)
    publish(
        storage,
        format=BACKBONE_FORMAT,
        weights=Pix2Rep(job.pretrain.model).backbone.state_dict(),
        config=ArtefactConfig(
            model=job.pretrain.model,
            preparation=Preparation(
                dimensions=2, slice_axis="auto", intensity_percentiles=(0.5, 99.5), spacing_mm=2.0, image_size=32
            ),
        ),
        card="",
        facts={},
    )
    return storage.url


def test_first_weights_may_be_a_published_backbone_s(job: Job, backbone: str) -> None:
    assert job.pretrain is not None
    model = Pix2Rep(job.pretrain.model)
    head = {name: value.clone() for name, value in model.head.state_dict().items()}
    facts = init_weights(model, backbone)
    (file,) = Path(backbone.removeprefix("file://")).glob("model-*.safetensors")
    published = load_file(file)
    assert all(torch.equal(value, published[name]) for name, value in model.backbone.state_dict().items())
    assert all(torch.equal(value, head[name]) for name, value in model.head.state_dict().items())
    assert facts.url == backbone and facts.format == BACKBONE_FORMAT
    assert [parse_reference(one).url for one in facts.origins or ()] == [backbone]
    assert facts.weights_sha256 == file_sha256(file) != facts.manifest_sha256
    assert init_weights(model, f"{backbone}@sha256:{facts.manifest_sha256}") == facts
    assert init_weights(model, f"{backbone}/{file.name}") == facts
    with pytest.raises(StorageError, match="is pinned to the manifest with sha256 0000"):
        init_weights(model, f"{backbone}@sha256:{'0' * 64}")


def test_first_weights_that_do_not_fit_or_are_damaged_are_refused(job: Job, backbone: str, tmp_path: Path) -> None:
    assert job.pretrain is not None
    wider = job.pretrain.model.model_copy(update={"channels": (8, 4, 8, 8, 8)})
    with pytest.raises(
        CheckpointError, match=r"(?s)do not fit pretrain.model:.*: 4 x 1 x 3 x 3 there, 8 x 1 x 3 x 3 here"
    ):
        init_weights(Pix2Rep(wider), backbone)
    checkpoint = f"{job.storage}/pretrain/checkpoints/step-00000004"
    with pytest.raises(CheckpointError, match=r"(?s)backbone\..* there, .* here"):
        init_weights(Pix2Rep(wider), checkpoint)
    learnt = Pix2Rep(job.pretrain.model, learnt_temperature=0.3)
    assert init_weights(learnt, f"{checkpoint}/model.safetensors").step == 4
    with pytest.raises(StorageError, match="is pinned to the manifest with sha256 0000"):
        init_weights(learnt, f"{checkpoint}@sha256:{'0' * 64}")
    assert learnt.log_temperature is not None and learnt.log_temperature.exp().item() == pytest.approx(0.3)
    flip(Path(checkpoint) / "model.safetensors")
    with pytest.raises(StorageError, match="does not have the sha256"):
        init_weights(learnt, checkpoint)
    with pytest.raises(CheckpointError, match=r"holds no manifest.json: give the folder of a published backbone"):
        init_weights(learnt, str(tmp_path))


def test_a_fork_starts_anew_from_the_newest_weights_beside_the_run_and_resumes_as_itself(
    job_of: JobOf, job: Job, tmp_path: Path
) -> None:
    changed = job_of(tmp_path, "pretrain.loss.temperature=0.5", "pretrain.seed=3", "pretrain.steps=4")
    with pytest.raises(CheckpointError, match=r"temperature: 0.2 in the checkpoint, 0.5 in the job[\s\S]*--fork NAME"):
        train(changed)
    before = {path: path.stat().st_mtime_ns for path in Path(job.storage).rglob("*")}
    fork = forked(changed, "warmer")
    assert fork.storage == f"file://{tmp_path}/storage-warmer" and fork.ingest is None
    reports = train(fork)
    assert [report.step for report in reports] == [1, 2, 3, 4] and reports[0].resumed_from is None
    newest = newest_checkpoint(Storage(fork.storage).child("pretrain"))
    assert newest is not None and newest.manifest.init_from is not None
    init_from = newest.manifest.init_from
    source = f"{Storage(job.storage).url}/pretrain/checkpoints/step-00000006"
    assert init_from.url == source == newest.manifest.config.to_json()["init_from"]
    corpus = Storage(job.storage).child("corpus")
    assert init_from.origins == [f"{corpus.url}@sha256:{manifest_sha256(load_manifest(corpus))}"]
    made = publish_backbone(fork, Storage(fork.storage), lambda line: None)
    assert [one["url"] for one in made["corpora"]] == [corpus.url] and made["licence"] == "CC0-1.0"
    assert {path: path.stat().st_mtime_ns for path in Path(job.storage).rglob("*")} == before
    shutil.rmtree(Path(job.storage) / "pretrain/checkpoints/step-00000006")  # the run goes on, say
    assert train(forked(changed, "warmer")) == []


def test_what_cannot_be_forked_is_refused(job_of: JobOf, job: Job, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="this is the storage of the run itself"):
        forked(job, job.storage)
    with pytest.raises(JobError, match="give a name of letters"):
        forked(job, "../other")
    with pytest.raises(JobError, match=r"pretrain\.init_from names others"):
        forked(job_of(tmp_path, "pretrain.init_from=/x"), "a")
    with pytest.raises(CheckpointError, match="holds no checkpoint to take weights from"):
        forked(job.model_copy(update={"storage": str(tmp_path / "none")}), "a")
    with pytest.raises(JobError, match="holds a run that was not forked"):
        forked(job.model_copy(update={"storage": str(tmp_path / "none")}), job.storage)
