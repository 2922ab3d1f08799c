"""A published folder: committed once, compared whole, repaired, pinned; and every attack on it is refused by name."""

import hashlib
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

import p2r
import p2r.artefact
import p2r.backbone
from p2r.artefact import Artefact, Manifest, Published, open_artefact
from p2r.backbone import MODEL_FORMAT, ArtefactConfig, load_backbone, load_model, publish, verify_artefact
from p2r.errors import CheckpointError, DamagedError, InputError
from p2r.model.backbones import build_backbone
from p2r.model.heads import SegmentationHead
from p2r.model.pix2rep import Segmenter
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage
from tests.publishing import MODEL, PREPARATION, publish_toy

ROLES = ("weights", "config", "card")


@pytest.fixture
def made(tmp_path: Path) -> Published[Manifest]:
    return publish_toy(str(tmp_path / "toy/1"))


@pytest.fixture
def folder(made: Published[Manifest]) -> Path:
    return Path(made["url"].removeprefix("file://"))


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def file_of(folder: Path, role: str) -> Path:
    return folder / manifest_of(folder)["files"][role]["name"]


def put_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)


def put(folder: Path, role: str, content: bytes) -> None:
    """Exchange a file, and have the manifest name it: what someone may do who may write the folder."""
    manifest, sha256 = manifest_of(folder), hashlib.sha256(content).hexdigest()
    stem, suffix = {"weights": ("model", ".safetensors"), "config": ("config", ".json"), "card": ("README", ".md")}[
        role
    ]
    file_of(folder, role).unlink()
    manifest["files"][role] = {"name": f"{stem}-{sha256}{suffix}", "sha256": sha256, "num_bytes": len(content)}
    (folder / f"{stem}-{sha256}{suffix}").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def verify(url: str | Path) -> None:
    verify_artefact(open_artefact(parse_reference(str(url))))


# What is published


def test_every_file_has_its_digest_in_its_name_and_in_the_manifest(folder: Path) -> None:
    manifest = manifest_of(folder)
    assert manifest["format"] == "p2r-backbone/2" and set(manifest["files"]) == set(ROLES)
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        *(entry["name"] for entry in manifest["files"].values()),
    }
    for entry in manifest["files"].values():
        sha256 = hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest()
        assert entry["sha256"] == sha256 and sha256 in entry["name"]
    assert open_artefact(Reference(str(folder))).unnamed_files() == []
    (folder / "evil.py").write_text("")
    assert open_artefact(Reference(str(folder))).unnamed_files() == ["evil.py"]


def test_contrasts_are_published_by_name_and_without_them_nothing_is(folder: Path) -> None:
    assert b"contrasts" not in file_of(folder, "config").read_bytes()
    names = ("flair", "t1")
    model, preparation = MODEL.model_dump() | {"contrasts": names, "in_channels": 2}, PREPARATION.model_dump()
    config = ArtefactConfig.model_validate({"model": model, "preparation": preparation | {"contrasts": names}})
    assert ArtefactConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match=r"must be equal, got flair, t1 and one contrast without a name"):
        ArtefactConfig.model_validate({"model": model, "preparation": preparation})


def test_loading_gives_the_weights_that_were_published_and_draws_no_number(made: Published[Manifest]) -> None:
    torch.manual_seed(0)
    network, image = build_backbone(MODEL).eval(), torch.rand(1, 1, 32, 32)
    before = torch.get_rng_state()
    loaded = load_backbone(made["url"])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded(image), network(image))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["basic_unet", "unet", "dynunet", "residual_dynunet", "swin_unetr"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_network_is_compared_without_memory_and_loads_whole(name: str, dimensions: int, tmp_path: Path) -> None:
    channels = (12, 24, 48, 96, 192) if name == "swin_unetr" else (2, 2, 2, 2, 2)
    model = MODEL.model_copy(update={"name": name, "channels": channels, "feature_channels": 3})
    config = ArtefactConfig(model=model, preparation=PREPARATION.model_copy(update={"dimensions": dimensions}))
    weights = build_backbone(model, dimensions=dimensions).state_dict()
    storage = Storage(str(tmp_path))
    publish(storage, format="p2r-backbone/2", weights=weights, config=config, card="", facts={})
    loaded = load_backbone(str(tmp_path)).network
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))


# Publishing again


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("damage", ["flipped", "cut off", "missing"])
def test_publishing_again_repairs_what_is_damaged(
    folder: Path, made: Published[Manifest], role: str, damage: str
) -> None:
    path = file_of(folder, role)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut off" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=path.name):
        verify(folder)
    again = publish_toy(made["url"])
    assert not again.is_new and again["pin"] == made["pin"] and path.read_bytes() == content
    verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"other weights"),
        ({"licence": "CC BY-NC 4.0"}, r"other licence \('CC0-1.0' there, 'CC BY-NC 4.0' here\)"),
        ({"card": "# another\n"}, r"other card"),
        ({"description": "new words"}, r"other description"),
        ({"corpora": None}, r"other corpora"),
        ({"seed": 1, "licence": "MIT", "step": 4}, r"other weights, licence \(.*\), step \(None there, 4 here\)"),
    ],
)
def test_publishing_something_else_is_refused_and_says_who_was_first_and_what_differs(
    made: Published[Manifest], folder: Path, change: dict[str, Any], message: str
) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=f"already published with {message}") as refusal:
        publish_toy(made["url"], **change)
    assert made["pin"] in str(refusal.value) and "UTC by p2r" in str(refusal.value)
    assert (folder / "manifest.json").read_bytes() == before
    verify(folder)


def test_another_version_of_p2r_finds_its_own_work_published_though_it_words_the_card_differently(
    made: Published[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2r.backbone, "code_version", lambda: "a later commit")
    again = publish_toy(made["url"], card="# newer words\n")
    assert not again.is_new and again["pin"] == made["pin"]
    with pytest.raises(CheckpointError, match="other licence"):
        publish_toy(made["url"], card="# newer words\n", licence="MIT")


def to_version_1(folder: Path) -> None:
    """Make of a folder what was published before files were named by their content."""
    manifest = manifest_of(folder)
    files = {}
    for role, name in (("weights", "model.safetensors"), ("config", "config.json"), ("card", "README.md")):
        (folder / manifest["files"][role].pop("name")).rename(folder / name)
        files[name] = manifest["files"][role]
    older = {**manifest, "format": "p2r-backbone/1", "files": files, "something": "that nothing reads any more"}
    (folder / "manifest.json").write_text(json.dumps(older))


def test_what_was_published_before_loads_is_found_published_and_is_repaired(
    made: Published[Manifest], folder: Path
) -> None:
    image = torch.rand(1, 1, 32, 32)
    features = load_backbone(made["url"])(image)
    to_version_1(folder)
    assert torch.equal(load_backbone(made["url"])(image), features)
    verify(folder)
    (folder / "model.safetensors").unlink()
    assert not publish_toy(made["url"]).is_new
    assert torch.equal(load_backbone(made["url"])(image), features)
    with pytest.raises(CheckpointError, match="other licence"):
        publish_toy(made["url"], licence="MIT")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files["model.safetensors"].update(name="../../../etc/passwd"), "files.weights.name"),
        (lambda files: files["config.json"].update(sha256="A" * 64), "files.config.sha256"),
        (lambda files: files["config.json"].update(num_bytes=-1), "files.config.num_bytes"),
        (lambda files: files["config.json"].update(hook="os.system"), "files.config.hook"),
        (lambda files: files.pop("config.json"), "files.config: Field required"),
        (lambda files: files.clear(), "files.weights: Field required"),
    ],
)
def test_a_tampered_folder_of_version_1_is_refused_by_name(
    folder: Path, change: Callable[[Any], object], message: str
) -> None:
    to_version_1(folder)
    manifest = manifest_of(folder)
    change(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for use in (load_backbone, verify):
        with pytest.raises(CheckpointError, match=message):
            use(str(folder))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            lambda state: {**state, next(iter(state)): torch.full_like(next(iter(state.values())), torch.nan)},
            "NaN or inf",
        ),
        (lambda state: {key: value.double() for key, value in state.items()}, "is torch.float64"),
        (lambda state: dict(list(state.items())[1:]), "2 x 1 x 3 x 3 here"),
    ],
)
def test_weights_that_are_not_fit_to_be_published_are_refused_before_anything_is_written(
    tmp_path: Path, weights: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    config = ArtefactConfig(model=MODEL, preparation=PREPARATION)
    state = weights(dict(build_backbone(MODEL).state_dict()))
    with pytest.raises(CheckpointError, match=message):
        publish(Storage(str(tmp_path / "x")), format="p2r-backbone/2", weights=state, config=config, card="", facts={})
    assert not (tmp_path / "x").exists()


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


def with_manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_text(json.dumps({**manifest_of(folder), **changes}))  # type: ignore[return-value]


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


def test_what_is_parsed_is_what_was_hashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(1, 1, 32, 32)
    features = load_backbone(str(folder))(image)
    read = Artefact.read

    def exchanged(artefact: Artefact, role: Any) -> bytes:
        content = read(artefact, role)
        file_of(folder, role).write_bytes(b"exchanged")
        return content

    monkeypatch.setattr(Artefact, "read", exchanged)
    assert torch.equal(load_backbone(str(folder))(image), features)


# Pins


def test_a_pin_is_the_digest_of_the_manifest_and_holds_every_file(made: Published[Manifest], folder: Path) -> None:
    sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert made["pin"] == f"{made['url']}@sha256:{sha256}"
    for loaded in (load_backbone(made["pin"]), p2r.load_backbone(made["url"], sha256=sha256)):
        assert loaded.manifest["sha256"] == sha256 and loaded.manifest["pin"] == made["pin"]
    with_manifest(licence="CC0")(folder)
    with pytest.raises(
        DamagedError, match=f"is pinned to the manifest with sha256 {sha256}, and its manifest.json has"
    ):
        load_backbone(made["pin"])


def test_the_digest_of_the_weights_is_no_pin_and_the_message_says_so(made: Published[Manifest]) -> None:
    with pytest.raises(DamagedError, match=f"has the digest of the weights; a pin is .* {made['pin']}"):
        load_backbone(made["url"], sha256=made["files"]["weights"]["sha256"])


@pytest.mark.parametrize(
    "reference",
    [
        *(
            "/x@sha256:",
            "/x@sha256:" + "0" * 63,
            "/x@sha256:" + "A" * 64,
            "@sha256:" + "0" * 64,
            "/x@sha512:00",
            "/x@sha256",
        ),
        "/x@sha256:" + "0" * 64 + "@sha256:" + "0" * 64,
        "/x@sha256:" + "0" * 64 + "/config.json",
    ],
)
def test_a_pin_that_is_none_is_refused(reference: str) -> None:
    with pytest.raises(InputError, match="a pin is URL@sha256: and the 64 digits"):
        parse_reference(reference)


def test_two_pins_must_be_equal(made: Published[Manifest]) -> None:
    assert load_backbone(made["pin"], sha256=made["sha256"]).manifest["pin"] == made["pin"]
    with pytest.raises(InputError, match="has a pin, and sha256 gives another"):
        load_backbone(made["pin"], sha256="0" * 64)


def test_an_at_sign_in_a_url_is_no_pin() -> None:
    assert parse_reference("s3://bucket/a@b/c") == Reference("s3://bucket/a@b/c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing_mm": 1e-9}, "preparation.spacing_mm"),
        ({"spacing_mm": 1e300}, "preparation.spacing_mm"),
        ({"image_size": 10**6}, "preparation.image_size"),
        ({"intensity_percentiles": [99.5, 0.5]}, "two of .* in increasing order"),
        ({"intensity_percentiles": [0.5, 1e300]}, "two of .* in increasing order"),
    ],
)
def test_a_preparation_that_no_scan_could_have_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    config = json.loads(file_of(folder, "config").read_bytes())
    config["preparation"].update(change)
    put(folder, "config", json.dumps(config).encode())
    for use in (load_backbone, verify):
        with pytest.raises(InputError, match=message):
            use(str(folder))


@pytest.mark.parametrize("classes", [{-1: "heart"}, {0: "heart"}, {2: "heart"}])
def test_classes_that_are_no_labels_are_refused(classes: dict[int, str]) -> None:
    with pytest.raises(ValueError, match="without a gap"):
        ArtefactConfig(model=MODEL, preparation=PREPARATION, classes=classes)
