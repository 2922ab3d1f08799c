import subprocess
from pathlib import Path
from typing import Any

import pytest

from p2r.artefact import open_artefact
from p2r.config import PublishConfig
from p2r.errors import JobError, StorageError
from p2r.job import read_job
from p2r.pipeline.exporting import sign_exports, write_exports
from p2r.reference import parse_reference
from p2r.storage import Storage
from tests.publishing import publish_toy


def test_publishing_writes_the_named_formats_once(tmp_path: Path) -> None:
    made = publish_toy(f"file://{tmp_path}/storage/backbones/toy/1")
    config = PublishConfig(name="toy", exports=("huggingface", "monai"))
    storage = Storage(f"{tmp_path}/storage")
    lines: list[object] = []
    urls = write_exports(config, storage, made, lines.append)
    assert urls == [f"{storage.url}/exports/toy-1/{name}" for name in config.exports]
    assert storage.read_json("exports/toy-1/monai/export.json")["pin"] == made["pin"]
    assert storage.exists("exports/toy-1/huggingface/README.md")
    write_exports(config, storage, made, lines.append)
    assert [str(line).endswith("was exported already") for line in lines] == [False, False, True, True]


def test_the_export_of_a_version_that_is_signed_later_gets_its_signature(tmp_path: Path) -> None:
    config = PublishConfig(name="toy", exports=("huggingface", "monai"))
    storage = Storage(f"{tmp_path}/storage")
    made = publish_toy(storage.at("backbones/toy/1"))
    write_exports(config, storage, made, print)
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    key.chmod(0o600)
    public = open_artefact(parse_reference(made.pin)).sign(key)
    for again in (
        lambda: sign_exports(config, storage, made),
        lambda: write_exports(config, storage, made, print),
    ):
        storage.delete("exports/toy-1/huggingface/manifest.sig")
        again()
        open_artefact(parse_reference(storage.at("exports/toy-1/huggingface")), key=public)
        assert not storage.exists("exports/toy-1/monai/manifest.sig")
    storage.delete("backbones")
    other = publish_toy(storage.at("backbones/toy/1"), seed=1)
    write_exports(config, storage, other, print)
    assert not storage.exists("exports/toy-1/huggingface/manifest.sig")


def test_a_checkpoint_s_exports_leave_those_of_the_final_version_alone(tmp_path: Path) -> None:
    config = PublishConfig(name="toy", exports=("huggingface",))
    storage = Storage(f"{tmp_path}/storage")
    final = publish_toy(storage.at("backbones/toy/1"))
    write_exports(config, storage, final, print)
    step = publish_toy(storage.at("backbones/toy/1-step-2"), seed=1)
    assert write_exports(config, storage, step, print) == [storage.at("exports/toy-1-step-2/huggingface")]
    assert storage.read_json("exports/toy-1/huggingface/export.json")["pin"] == final.pin
    assert storage.read_json("exports/toy-1-step-2/huggingface/export.json")["pin"] == step.pin


def test_an_interrupted_export_over_another_is_not_taken_for_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PublishConfig(name="toy", exports=("huggingface",))
    storage = Storage(f"{tmp_path}/storage")
    first = publish_toy(storage.at("backbones/toy/1"))
    write_exports(config, storage, first, print)
    storage.delete("backbones")
    second = publish_toy(storage.at("backbones/toy/1"), seed=1)

    def fail(*_: Any) -> None:
        raise StorageError("the bucket is gone")

    with monkeypatch.context() as failing, pytest.raises(StorageError):
        failing.setattr(Storage, "upload", fail)
        write_exports(config, storage, second, print)
    assert not storage.exists("exports/toy-1/huggingface/export.json")
    write_exports(config, storage, second, print)
    assert storage.read_json("exports/toy-1/huggingface/export.json")["pin"] == second.pin


def test_a_job_whose_network_the_tool_lacks_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"kind: publish\nname: toy\nstorage: {tmp_path}/storage\n"
        "pretrain: {image: {spacing_mm: 1.0, size: 32}, steps: 1, global_batch: 4}\n"
        "publish: {name: toy, exports: [nnunet]}\n"
    )
    with pytest.raises(JobError, match=r"publish.exports nnunet: the tool has no basic_unet, but dynunet"):
        read_job(job)
