"""A published folder: committed once, compared whole, and repaired."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import p2r
import p2r.artefact
import p2r.backbone
from p2r.artefact import Artefact, Manifest, Published, open_artefact
from p2r.backbone import ArtefactConfig, load_backbone, publish
from p2r.errors import CheckpointError, DamagedError, InputError
from p2r.model.backbones import build_backbone
from p2r.reference import Reference
from p2r.storage import Storage
from tests.p2r.artefact.conftest import file_of, manifest_of, put, verify
from tests.publishing import MODEL, PREPARATION, publish_toy

ROLES = ("weights", "config", "card")


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
