"""Attacks on a published folder: each is refused by name, and before memory of its size is taken."""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from p2r.backbone import MODEL_FORMAT, ArtefactConfig, load_backbone, load_model, publish
from p2r.errors import CheckpointError, DamagedError, InputError
from p2r.model.backbones import build_backbone
from p2r.model.heads import SegmentationHead
from p2r.model.pix2rep import Segmenter
from p2r.storage import Storage
from tests.p2r.artefact.conftest import file_of, manifest_of, put, put_manifest, verify, with_manifest
from tests.publishing import MODEL, PREPARATION, publish_toy

# Attacks: whoever may write the folder may write its manifest, too


def flat(shape: tuple[int, ...] = (2,), dtype: Any = torch.float32) -> bytes:
    content: bytes = safetensors.torch.save({"x": torch.zeros(shape, dtype=dtype)})
    return content


def with_weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        state = safetensors.torch.load(file_of(folder, "weights").read_bytes())
        put(folder, "weights", safetensors.torch.save(change(state)))

    return attack


def first(value: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change one tensor."""
    return with_weights(lambda state: {**state, (key := sorted(state)[-1]): value(state[key])})


def header(value: object, *, length: int | None = None) -> Callable[[Path], None]:
    """Exchange the header of the weights; their size stays about what it was."""

    def attack(folder: Path) -> None:
        content = file_of(folder, "weights").read_bytes()
        begun = struct.unpack("<Q", content[:8])[0] + 8
        words = value if isinstance(value, bytes) else json.dumps(value).encode()
        stated = len(words) if length is None else length
        put(folder, "weights", struct.pack("<Q", stated) + words + content[begun:].ljust(4096, b"\0"))

    return attack


def with_config(**changes: Any) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        config = json.loads(file_of(folder, "config").read_bytes())
        for key, value in changes.items():
            target = config["model"] if key in config["model"] else config
            target[key] = value
        put(folder, "config", json.dumps(config).encode())

    return attack


def with_entry(role: str, **changes: Any) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        manifest = manifest_of(folder)
        manifest["files"][role] |= changes
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return attack


def a_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({}))
    return content.getvalue().ljust(2000, b"\0")


def a_checkpoint() -> bytes:
    content = io.BytesIO()
    torch.save({"x": torch.zeros(400)}, content)
    return content.getvalue()


def an_npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, x=np.zeros(300))
    return content.getvalue()


DEEP = b'{"a":' * 20_000 + b"1" + b"}" * 20_000


RUBBISH = {
    "a pickle": pickle.dumps({"x": list(range(500))}),
    "a zip": a_zip(),
    "weights by torch.save": a_checkpoint(),
    "an npz": an_npz(),
    "a list": b"[1, 2]".ljust(2000),
    "a number": b"1".ljust(2000),
    "null": b"null".ljust(2000),
    "deep lists": b"[" * 20_000 + b"]" * 20_000,
    "deep objects": DEEP,
    "nothing": b"",
    "text": b"hello".ljust(2000),
    "not UTF-8": b"\xff\xfe" * 1000,
}


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"{role}: {name}": (partial(put, role=role, content=content), message)
        for role, message in (
            ("weights", "is not a safetensors file|do not fit its config.json"),
            ("config", "is not JSON|is not valid"),
        )
        for name, content in RUBBISH.items()
    },
    **{
        f"manifest: {name}": (
            partial(put_manifest, content=content),
            "is not JSON|is not valid|has format None",
        )
        for name, content in RUBBISH.items()
    },
    "weights: NaN": (first(lambda value: value * torch.nan), "holds NaN or infinity"),
    "weights: infinity": (first(lambda value: value - torch.inf), "holds NaN or infinity"),
    "weights: int8": (first(lambda value: value.to(torch.int8)), r"is I8; published weights are float32|they have"),
    "weights: float64": (first(lambda value: value.double()), "is F64; published weights are float32"),
    "weights: bf16": (first(lambda value: value.bfloat16()), "is BF16; published weights are float32|they have"),
    "weights: one missing": (with_weights(lambda state: dict(sorted(state.items())[1:])), "do not fit its config.json"),
    "weights: one more": (with_weights(lambda state: {**state, "x": torch.zeros(1)}), "x: 1 there, none here"),
    "weights: another shape": (first(lambda value: value.flatten()[None]), r"there, 2( x \d+)* here"),
    "weights: of another network": (lambda folder: put(folder, "weights", flat((2000,))), "do not fit its config.json"),
    "header: longer than the file": (header({}, length=2**40), "its header would have 1,099,511,627,776 bytes"),
    "header: of no length": (header({}, length=0), "its header would have 0 bytes"),
    "header: a list": (header([1]), "is not a safetensors file"),
    "header: deep": (header(DEEP[:5000].replace(b"1", b"") + b"1" + b"}" * 1000), "is not valid|is not JSON"),
    "header: an entry twice": (header(b'{"x": 1, "x": 2}'), "is twice in one object"),
    "header: many wrong entries": (
        header(b"{" + b",".join(b'"%x":0' % number for number in range(150_000)) + b"}"),
        "may have 100,000 keys, got 150,000",
    ),
    "header: negative size": (
        header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        "is not a safetensors file: x.shape.0",
    ),
    "header: too large a size": (
        header({"x": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}),
        "is not a safetensors file: x.shape.0",
    ),
    "config: channels of ten gigabytes": (with_config(channels=[4000] * 5), "do not fit its config.json: they have"),
    "config: channels beyond any memory": (with_config(channels=[2**62] * 5), "cannot be built|do not fit"),
    "config: channels beyond 64 bits": (with_config(channels=[2**70] * 5), "is not a whole number of 64 bits"),
    "config: features of ten gigabytes": (with_config(feature_channels=2**31), "cannot be built|do not fit"),
    "config: an unknown key": (with_config(hook="os.system"), "hook: unknown key"),
    "config: an unknown network": (with_config(name="torch.hub.load"), "model.name"),
    "config: NaN": (lambda folder: put(folder, "config", b'{"model": NaN}'), "NaN is not a number in JSON"),
    "config: 2 MB": (lambda folder: put(folder, "config", b" " * 2**21), "config may have 1,048,576 bytes"),
    "config: another level": (with_config(level=2), "do not fit its config.json"),
    "manifest: an unknown key": (with_manifest(hook="os.system"), "hook: Extra inputs are not permitted"),
    "manifest: without files": (with_manifest(files={}), "files.weights: Field required"),
    "manifest: files are a list": (with_manifest(files=[]), "files: "),
    "manifest: of another format": (with_manifest(format="p2r-corpus/2"), "has format 'p2r-corpus/2', expected"),
    "manifest: of a later version": (with_manifest(format="p2r-backbone/3"), "has format 'p2r-backbone/3', expected"),
    "manifest: a format that is a list": (with_manifest(format=["p2r-backbone/2"]), "has format .*, expected"),
    "manifest: a licence of a megabyte": (with_manifest(licence="x" * 2**20), "licence: String should have at most"),
    "manifest: a corpus that is none": (with_manifest(corpora=[{}]), "corpora.0.url: Field required"),
    "manifest: a step that is text": (with_manifest(step="4"), "step: Input should be a valid integer"),
    "manifest: a section of the job of a million values": (
        with_manifest(pretrain={"a": [0] * 1_000_000}),
        "pretrain: .*may have 20,000 keys and values",
    ),
    "manifest: a million wrong digests": (
        with_manifest(corpora=[{"subject_digests": [0] * 1_000_000}]),
        "corpora.0.url: Field required",
    ),
    "manifest: lists by the million": (
        lambda folder: (folder / "manifest.json").write_bytes(b"[" + b"[]," * 5_000_000 + b"0]"),
        "would take about .* MiB of memory, more than the 512 MiB",
    ),
    "manifest: an old format with rubbish": (
        with_manifest(format="p2r-backbone/1", files=[{}]),
        "files.weights: Field",
    ),
    "entry: a path that leads out": (with_entry("weights", name="../../etc/passwd"), "files.weights.name"),
    "entry: an absolute path": (with_entry("weights", name="/etc/passwd"), "files.weights.name"),
    "entry: a name without its digest": (with_entry("config", name="config.json"), "its name must be config-"),
    "entry: another digest": (with_entry("config", sha256="0" * 64), "its name must be config-000"),
    "entry: a digest that is a path": (with_entry("config", sha256="../x"), "files.config.sha256"),
    "entry: negative size": (with_entry("weights", num_bytes=-1), "files.weights.num_bytes"),
    "entry: a terabyte": (with_entry("weights", num_bytes=2**40), "do not fit its config.json: they have|absent, or"),
    "entry: a size that is not the file's": (with_entry("weights", num_bytes=3000), "do not fit|absent, or"),
    "a file is a folder": (
        lambda folder: (file_of(folder, "config").unlink(), file_of(folder, "config").mkdir()),
        "does not exist|absent, or",
    ),
    "a file is a pipe": (
        lambda folder: (file_of(folder, "config").unlink(), os.mkfifo(file_of(folder, "config"))),
        "does not exist|absent, or",
    ),
    "the weights are a device": (
        lambda folder: (path := file_of(folder, "weights"), path.unlink(), path.symlink_to("/dev/zero")),
        "does not exist|absent, or",
    ),
    "the manifest is a pipe": (
        lambda folder: ((folder / "manifest.json").unlink(), os.mkfifo(folder / "manifest.json")),
        "holds no manifest.json",
    ),
    "the manifest is a folder": (
        lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()),
        "holds no manifest.json",
    ),
    "a bit of the weights": (lambda folder: flip(file_of(folder, "weights")), "the sha256 of its manifest"),
    "a bit of the configuration": (lambda folder: flip(file_of(folder, "config")), "the sha256 of its manifest"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(publish_toy(str(tmp_path_factory.mktemp("sound")))["url"].removeprefix("file://"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_name_and_costs_no_memory(attack: str, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "1")
    change, message = ATTACKS[attack]
    change(folder)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (load_backbone, verify):
        with pytest.raises(InputError, match=message) as refusal:
            use(str(folder))
        assert str(tmp_path) in str(refusal.value) and len(str(refusal.value)) < 4000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200_000


def test_the_card_is_checked_by_verify(folder: Path) -> None:
    flip(file_of(folder, "card"))
    with pytest.raises(DamagedError, match=r"README-.*: absent, or without the sha256"):
        verify(folder)


def test_a_model_whose_head_would_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    config = ArtefactConfig(model=MODEL, preparation=PREPARATION, classes={1: "one"})
    weights = Segmenter(build_backbone(MODEL), SegmentationHead(2, 2)).state_dict()
    publish(Storage(str(tmp_path)), format=MODEL_FORMAT, weights=weights, config=config, card="", facts={})
    segmenter, found, manifest = load_model(str(tmp_path))
    assert found.classes == {1: "one"} and manifest["format"] == MODEL_FORMAT
    assert segmenter(torch.rand(1, 1, 32, 32)).shape == (1, 2, 32, 32)
    with_config(num_prototypes=[2**60])(tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit its config.json|cannot be built"):
        load_model(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has format 'p2r-model/2', expected p2r-backbone/1"):
        load_backbone(str(tmp_path))
