from pathlib import Path

import pytest

from p2r.config import PublishConfig
from p2r.errors import JobError
from p2r.job import read_job
from p2r.pipeline.exporting import write_exports
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


def test_a_job_whose_network_the_tool_lacks_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"kind: publish\nname: toy\nstorage: {tmp_path}/storage\n"
        "pretrain: {image: {spacing_mm: 1.0, size: 32}, steps: 1, global_batch: 4}\n"
        "publish: {name: toy, exports: [nnunet]}\n"
    )
    with pytest.raises(JobError, match=r"publish.exports nnunet: the tool has no basic_unet, but dynunet"):
        read_job(job)
