import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from infra.local.s3 import free_ports
from p2r.artefact import open_artefact
from p2r.backbone import load_backbone, load_model
from p2r.errors import InputError, StorageError
from p2r.export import check_folder, export
from p2r.export.hub_folder import _licence
from p2r.export.transfer import pull, push
from p2r.hub import parse_hub_url
from p2r.reference import parse_reference
from p2r.storage import Storage
from tests.fake_hub import TOKEN, Hub, Repository, fake_hub
from tests.p2r.artefact.test_artefact import to_version_1

huggingface_hub = pytest.importorskip(
    "huggingface_hub", reason="huggingface_hub is not installed: pip install -e '.[hub]'"
)
Publish = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, a cache of this test's own, and a token."""
    from huggingface_hub import constants

    with fake_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield running
        huggingface_hub.close_session()


def _commit_of(lines: list[str]) -> str:
    return lines[0].split("@")[1].split(" ")[0]


def test_a_pushed_backbone_is_loaded_by_its_address_with_pin_and_features_unchanged(
    publish_toy: Publish, hub: Hub, tmp_path: Path
) -> None:
    own = load_backbone(publish_toy("unet"))
    lines = push(own.manifest["pin"], "hf://team/brain", tag="v1")
    commit = _commit_of(lines)
    assert len(commit) == 40
    for address in ("hf://team/brain", "hf://team/brain@v1", f"hf://team/brain@{commit}"):
        found = load_backbone(f"{address}@sha256:{own.manifest['sha256']}")
        assert found.manifest["url"] == f"hf://team/brain@{commit}"
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(found.features(image), own.features(image))
    files = hub.repositories["team/brain"].commits[commit]
    assert files["model.safetensors"] == files[own.manifest["files"]["weights"]["name"]]
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_what_is_in_the_cache_loads_while_the_hub_is_down_and_without_a_request_by_commit(
    publish_toy: Publish, hub: Hub
) -> None:
    commit = _commit_of(push(publish_toy("unet"), "hf://team/brain"))
    load_backbone("hf://team/brain")
    hub.is_down = True
    before = len(hub.requests)
    load_backbone(f"hf://team/brain@{commit}")
    assert hub.requests[before:] in ([], ["HEAD /team/brain/resolve/" + commit + "/manifest.sig"])
    load_backbone("hf://team/brain")


def test_a_hub_that_refuses_connections_is_named_and_the_cache_still_loads(
    publish_toy: Publish, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(publish_toy("unet"), "hf://team/brain")
    load_backbone("hf://team/brain")
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setitem(sys.modules, "httpx", None)  # the client may use another library
    load_backbone("hf://team/brain")
    with pytest.raises(StorageError, match="cannot read hf://team/absent: the files are not in the cache, and the hub"):
        load_backbone("hf://team/absent")
    with pytest.raises(StorageError, match=r"cannot push to hf://team/brain: .*refused"):
        push(publish_toy("unet"), "hf://team/brain")


def test_a_new_version_replaces_the_files_of_the_old_one_which_its_commit_keeps(publish_toy: Publish, hub: Hub) -> None:
    first = _commit_of(push(publish_toy("unet"), "hf://team/brain"))
    second = _commit_of(push(publish_toy("dynunet"), "hf://team/brain"))
    files = hub.repositories["team/brain"].commits[second]
    assert sum(name.startswith("model-") for name in files) == 1
    assert load_backbone(f"hf://team/brain@{first}").config.model.name == "unet"
    assert load_backbone("hf://team/brain").config.model.name == "dynunet"


def test_a_tag_that_exists_is_kept_and_the_pushed_commit_is_named(publish_toy: Publish, hub: Hub) -> None:
    first = _commit_of(push(publish_toy("unet"), "hf://team/brain", tag="v1"))
    with pytest.raises(
        StorageError, match=r"^hf://team/brain@[0-9a-f]{40} was pushed, and has no tag: the tag v1 exists already"
    ) as refused:
        push(publish_toy("dynunet"), "hf://team/brain", tag="v1")
    repository = hub.repositories["team/brain"]
    assert repository.names["v1"] == first and repository.names["main"] == str(refused.value).split("@")[1][:40]


def test_an_artefact_whose_card_has_the_name_of_the_hubs_is_refused_before_anything_is_written(
    publish_toy: Publish, tmp_path: Path
) -> None:
    url = publish_toy("unet")
    folder = Path(url.removeprefix("file://"))
    to_version_1(folder)
    with pytest.raises(InputError, match=r"unet-2-backbone/1 is of version 1, whose manifest names a file README\.md"):
        export(url, to="huggingface", folder=tmp_path / "hub-folder")
    assert not (tmp_path / "hub-folder").exists()


@pytest.mark.parametrize("scheme", ["file", "s3", "gs", "az", "hf"])
def test_an_export_is_not_written_to_a_url(
    scheme: str, publish_toy: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="an export is written to a folder of this machine"):
        check_folder(Path(f"{scheme}://bucket/folder"))
    check_folder(Path("gsm/folder"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://team/absent", "the repository does not exist, or is private and the token is missing"),
        ("hf://team/brain@v9", "it has no revision v9"),
        ("hf://team/empty", "holds no manifest.json of p2r"),
        ("hf://team", "write hf://ORG/NAME"),
        ("hf://team/brain@../../etc", "write hf://ORG/NAME"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused_by_name(
    publish_toy: Publish, hub: Hub, address: str, message: str
) -> None:
    push(publish_toy("unet"), "hf://team/brain")
    huggingface_hub.HfApi().create_repo("team/empty")
    with pytest.raises(StorageError, match=message):
        load_backbone(address)


def test_a_private_repository_needs_a_token_and_no_message_or_log_shows_it(
    publish_toy: Publish, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    lines = push(publish_toy("unet"), "hf://team/secret", is_private=True)
    assert hub.repositories["team/secret"].is_private
    load_backbone("hf://team/secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "other cache"))
    with pytest.raises(StorageError, match="set HF_TOKEN") as refused:
        load_backbone("hf://team/secret")
    with pytest.raises(StorageError, match="set HF_TOKEN"):
        push(publish_toy("dynunet"), "hf://team/other")
    assert TOKEN not in str(refused.value) + "".join(lines) + caplog.text


def test_a_file_beyond_its_stated_size_is_refused_before_it_is_downloaded(publish_toy: Publish, hub: Hub) -> None:
    commit = _commit_of(push(publish_toy("unet"), "hf://team/brain"))
    files = hub.repositories["team/brain"].commits[commit]
    manifest = json.loads(files["manifest.json"])
    (weights,) = (name for name in files if name.startswith("model-"))
    files[weights] += bytes(1)
    before = len(hub.requests)
    with pytest.raises(StorageError, match=rf"{weights} of hf://team/brain@{commit} has [\d,]+ bytes, more than"):
        load_backbone("hf://team/brain")
    many = {f"f{number}": {"name": f"f{number}", "num_bytes": 1} for number in range(100)}
    content = {"manifest.json": json.dumps({**manifest, "files": many}).encode(), **dict.fromkeys(many, b"x")}
    hub.repositories["team/many"] = Repository(commits={"0" * 40: content}, names={"main": "0" * 40})
    with pytest.raises(InputError, match="is not a valid manifest"):
        load_backbone("hf://team/many")
    fetched = [one.rpartition("/")[2] for one in hub.requests[before:] if one.startswith("GET")]
    assert "manifest.json" in fetched and not {weights, *many} & set(fetched)


def test_a_hub_that_is_down_and_an_empty_cache_are_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        StorageError, match="the files are not in the cache, and the hub cannot be reached or HF_HUB_OFFLINE is set"
    ):
        load_backbone("hf://team/brain")


def test_nothing_is_written_to_an_address_on_a_hub(publish_toy: Publish, hub: Hub) -> None:
    push(publish_toy("unet"), "hf://team/brain")
    storage = Storage("hf://team/brain")
    for write in (
        lambda: storage.write_bytes("x", b""),
        lambda: storage.create("x", b""),
        lambda: storage.delete("manifest.json"),
        storage.check_writable,
    ):
        with pytest.raises(StorageError, match="only read"):
            write()


def test_a_pulled_folder_is_the_published_one(publish_toy: Publish, hub: Hub, tmp_path: Path) -> None:
    url = publish_toy("unet", kind="model")
    push(url, "hf://team/liver")
    lines = pull("hf://team/liver", folder=tmp_path / "liver")
    pin = lines[-1].removeprefix("pin: ")
    assert open_artefact(parse_reference(pin)).sha256 == open_artefact(parse_reference(url)).sha256
    load_model(pin)
    with pytest.raises(InputError, match="not empty"):
        pull(url, folder=tmp_path / "liver")
    (weights,) = (tmp_path / "liver").glob("model-*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        pull(str(tmp_path / "liver"), folder=tmp_path / "copy")
    assert not [path.name for path in tmp_path.iterdir() if "copy" in path.name]


def test_the_card_has_front_matter_that_the_hubs_client_reads(published: dict[str, str], tmp_path: Path) -> None:
    lines = export(published["model"], to="huggingface", folder=tmp_path / "folder")
    assert any("huggingface_hub reads" in line for line in lines)
    data = huggingface_hub.ModelCard.load(tmp_path / "folder" / "README.md").data
    assert data.license == "cc0-1.0"
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert "\np2r predict hf://ORG/NAME scan.nii.gz -o" in card and published["storage"] not in card
    assert "pip install" not in card
    assert re.search(r"\n\| DISC \| [0-9.]+ \|", card)
    assert data.library_name == "p2r"
    assert data.pipeline_tag == "image-segmentation"
    (result,) = data.eval_results
    assert result.metric_type == "dice"
    assert 0 <= result.metric_value <= 1
    assert load_model(str(tmp_path / "folder"))[1].classes == {1: "DISC"}


def test_the_card_of_a_backbone_shows_the_curves_of_its_training(published: dict[str, str], tmp_path: Path) -> None:
    export(published["backbone"], to="huggingface", folder=tmp_path / "folder")
    (picture,) = (tmp_path / "folder").glob("training-*.png")
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert f"![Curves of pretraining, by step]({picture.name})" in card
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert card.count('load_backbone("hf://ORG/NAME")') == 1 and published["storage"] not in card


def test_a_licence_that_the_hub_does_not_know_is_other_with_its_name() -> None:
    assert _licence("LicenseRef-ICBM-152") == {
        "license": "other",
        "license_name": "licenseref-icbm-152",
        "license_link": "README.md",
    }


def test_addresses_are_split_into_repository_and_revision() -> None:
    assert parse_hub_url("hf://team/brain@v1.0") == ("team/brain", "v1.0")
    assert str(parse_hub_url("hf://team/brain/")) == "hf://team/brain"


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    real: Any = sys.modules["huggingface_hub"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"install p2r again with its extra 'hub'"):
        load_backbone("hf://team/brain")
    assert real is huggingface_hub
