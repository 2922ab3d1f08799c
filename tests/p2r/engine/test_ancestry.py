"""Whoever starts from another's weights has seen that one's patients, too."""

import sys
from pathlib import Path
from typing import Any

import pytest

from p2r.artefact import REMOVED, open_artefact
from p2r.data.manifest import load_manifest, manifest_sha256
from p2r.engine.ancestry import added, ancestry, corpus_facts, origins_of_backbone, origins_of_checkpoint
from p2r.engine.checkpoint_manifest import FORMAT, InitialWeights, parse_manifest
from p2r.errors import DamagedError, InputError, StorageError
from p2r.reference import parse_reference
from p2r.storage import Storage, json_bytes
from tests.publishing import corpus_facts as facts
from tests.publishing import publish_toy

A, B = "a" * 64, "b" * 64


def backbone(folder: Path, **values: Any) -> str:
    made = publish_toy(str(folder), **values)
    (origin,) = origins_of_backbone(open_artefact(parse_reference(made["pin"])))
    assert origin == made["pin"]
    return origin


def test_corpora_and_licence_of_a_backbone_are_inherited(tmp_path: Path) -> None:
    origin = backbone(tmp_path / "1", corpora=[facts()], licence="CC BY-NC 4.0")
    assert ancestry(InitialWeights(origins=[origin])) == ([facts()], ["CC BY-NC 4.0"])
    assert ancestry(None) == ([], [])


@pytest.mark.parametrize(
    "case", ["says nothing", "lists none", "gone", "put out of use", "exchanged", "not a pin", "of an older checkpoint"]
)
def test_what_cannot_be_read_any_more_is_unknown_and_not_clean(case: str, tmp_path: Path) -> None:
    corpora = {"says nothing": None, "lists none": []}.get(case, [facts()])
    origin = backbone(tmp_path / "1", corpora=corpora)
    manifest = tmp_path / "1/manifest.json"
    if case == "gone":
        manifest.unlink()
    elif case == "put out of use":
        manifest.write_bytes(json_bytes({"format": REMOVED, "manifest": manifest.read_text(), "removed": "2026-01-01"}))
    elif case == "exchanged":
        manifest.write_bytes(manifest.read_bytes() + b"\n")
    elif case == "not a pin":
        origin = parse_reference(origin).url
    other = backbone(tmp_path / "2", corpora=[facts(B)])
    known = InitialWeights() if case == "of an older checkpoint" else InitialWeights(origins=[origin, other])
    assert ancestry(known).corpora is None


@pytest.mark.parametrize("case", ["a bucket that does not answer", "a missing package"])
def test_what_may_be_there_and_cannot_be_read_now_is_an_error(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "a missing package":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        origin, problem, message = f"hf://org/toy@main@sha256:{A}", InputError, "huggingface_hub"
    else:
        for name, value in {
            "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "P2R_S3_DEADLINE_S": "0.2",
        }.items():
            monkeypatch.setenv(name, value)
        origin, problem, message = f"s3://b/toy/1@sha256:{A}", StorageError, "cannot read s3://b/toy/1"
    with pytest.raises(problem, match=message):
        ancestry(InitialWeights(origins=[origin]))


def test_corpora_of_a_checkpoint_are_pinned_at_the_revisions_that_it_streamed(published: dict[str, str]) -> None:
    corpus = Storage(published["corpus"])
    manifest = load_manifest(corpus)
    sha256 = manifest_sha256(manifest)
    stream = {"corpora": [{"manifest_sha256": sha256, "weight": None}]}
    checkpoint: dict[str, Any] = {
        **{"format": FORMAT, "step": 6, "world_size": 1, "init_from": None},
        **{"config": {"steps": 6, "corpus": None}, "state": {"stream": stream}},
        "files": {"model.safetensors": {"sha256": A, "num_bytes": 1}},
    }

    def origins(**changes: object) -> list[str] | None:
        return origins_of_checkpoint(parse_manifest({**checkpoint, **changes}, where="it"), url)

    url = f"{published['storage']}/pretrain/checkpoints/step-00000006"
    pin = f"{corpus.url}@sha256:{sha256}"
    assert origins() == [pin]
    before = {"origins": ["/x@sha256:" + A, pin]}
    assert origins(init_from=before) == before["origins"]
    assert origins(init_from={"sha256": A}) is None
    elsewhere = parse_manifest(checkpoint, where="it")
    assert origins_of_checkpoint(elsewhere, "s3://elsewhere/step-00000006") is None
    assert origins(state={"stream": 1}) is None
    assert origins(state={"stream": {"corpora": [1]}}) is None
    assert origins(config={"steps": 6, "corpus": [1]}) is None
    hostile: list[dict[str, Any]] = [{"config": []}, {"init_from": "/x"}, {"init_from": {"origins": "/x"}}]
    for rubbish in hostile:
        with pytest.raises(DamagedError):
            origins(**rubbish)
    found = ancestry(InitialWeights(origins=[pin]))
    assert found.licences == ["CC0-1.0"]
    assert found.corpora == [corpus_facts(manifest.facts, url=corpus.url, sha256=sha256, weight=None)]


def test_revisions_of_one_corpus_are_named_once_and_others_each() -> None:
    older, newer, other = facts(), facts(subjects=(A, B), voxels=(A, B)), facts(B)
    assert added([newer], [older, other, other]) == [newer, other]
    assert added([older], [newer]) == [older, newer]  # somebody is in the newer one alone
