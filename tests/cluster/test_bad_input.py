"""Everything that a user can get wrong: exit code 2, one message that names what, where and the way out, nothing half-written."""

import gzip
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

import p2r.__main__ as one_process

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(
    write_toy_job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run the toy job in this process; return its exit code and what it said."""

    def run(*overrides: str) -> tuple[int, str]:
        arguments = [word for override in overrides for word in ("--set", override)]
        monkeypatch.setattr(sys, "argv", ["p2r", str(write_toy_job(tmp_path)), *arguments])
        code = one_process.main()
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def copy(toy_data: Path, tmp_path: Path) -> Path:
    """A copy of the toy data, to be broken."""
    return Path(shutil.copytree(toy_data, tmp_path / "data"))


def refused(outcome: tuple[int, str], *words: str) -> None:
    code, said = outcome
    assert code == 2, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said


def test_a_missing_path(run: Run, tmp_path: Path) -> None:
    refused(run("ingest.sources=[/nowhere/at/all]", "ingest.subjects_of=null"), "/nowhere/at/all does not exist")
    assert not list((tmp_path / "storage").rglob("manifest.json"))


def test_an_empty_corpus(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run(f"ingest.sources=[{tmp_path}/empty]", "ingest.subjects_of=null"), "holds no .nii, .nii.gz")


def test_a_corpus_smaller_than_a_global_batch(run: Run) -> None:
    refused(run("pretrain.global_batch=64"), "15", "64", "global")


def _broken(path: Path) -> dict[str, Callable[[], object]]:
    def save(data: np.ndarray) -> None:
        nibabel.Nifti1Image(data, np.diag([2.0, 2.0, 8.0, 1.0])).to_filename(path)

    shape = (36, 40, 3)
    return {
        "truncated": lambda: path.write_bytes(path.read_bytes()[:-800]),
        "not_nifti": lambda: path.write_bytes(gzip.compress(b"this is not an image" * 50)),
        "nonfinite": lambda: save(np.full(shape, np.nan, np.float32)),
        "constant": lambda: save(np.full(shape, 7, np.int16)),
        "not_3d": lambda: save(np.arange(36 * 40, dtype=np.int16).reshape(36, 40)),
    }


@pytest.mark.parametrize("reason", ["truncated", "not_nifti", "nonfinite", "constant", "not_3d"])
def test_a_scan_that_cannot_be_used_gets_a_row_in_the_ledger(run: Run, copy: Path, tmp_path: Path, reason: str) -> None:
    _broken(copy / "images/sub-01_T1w.nii.gz")[reason]()
    code, said = run("kind=ingest", f"ingest.sources=[{copy}/images]", "ingest.subjects_of=null")
    assert code == 0, said
    assert f"1 {reason}" in said
    ledger = (tmp_path / "storage/corpus/ledger.jsonl").read_text()
    assert f'"reason": "{reason}"' in ledger


@pytest.mark.parametrize("reason", ["truncated", "not_nifti", "nonfinite", "constant", "not_3d"])
def test_a_scan_that_cannot_be_used_is_refused_by_predict_and_embed(
    p2r: Run, published: dict[str, str], copy: Path, tmp_path: Path, reason: str
) -> None:
    scan, output = copy / "images/sub-01_T1w.nii.gz", tmp_path / "out.nii.gz"
    _broken(scan)[reason]()
    refused(p2r("predict", published["model"], scan, "-o", output), "sub-01_T1w.nii.gz", reason)
    refused(p2r("embed", published["backbone"], scan, "-o", output), "sub-01_T1w.nii.gz", reason)
    assert not output.exists()


def test_labels_on_another_grid(run: Run, copy: Path, tmp_path: Path) -> None:
    label = copy / "labels/sub-06_T1w.nii.gz"
    image = nibabel.load(label)
    nibabel.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine).to_filename(label)
    refused(run(f"finetune.tasks=[{copy}/task.yaml]"), "the grids differ", "sub-06_T1w.nii.gz has shape (35, 40, 3)")
    assert not (tmp_path / "storage/finetune").exists()


def test_a_label_that_the_task_does_not_name(run: Run, copy: Path) -> None:
    label = copy / "labels/sub-06_T1w.nii.gz"
    image = nibabel.load(label)
    nibabel.Nifti1Image(np.asarray(image.dataobj) * 5, image.affine).to_filename(label)
    refused(run(f"finetune.tasks=[{copy}/task.yaml]"), "holds the value 5", "0 background, 1 DISC")


def test_more_labelled_patients_than_there_are(run: Run) -> None:
    refused(run("finetune.num_labelled=[1, 40]"), "40 labelled patients", "has 5")


def test_a_storage_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run(f"storage={tmp_path}/file/run"), "cannot write", "permissions")


def test_a_checkpoint_of_another_configuration(run: Run) -> None:
    assert run("kind=pretrain")[0] == 0
    refused(run("kind=pretrain", "pretrain.loss.temperature=0.3"), "0.2 in the checkpoint, 0.3 in the job")


def test_a_corpus_of_another_ingest_section(run: Run) -> None:
    assert run("kind=ingest")[0] == 0
    refused(run("kind=ingest", "ingest.licence=CC-BY-4.0"), "licence: 'CC0-1.0' in the corpus, 'CC-BY-4.0' in the job")


def test_test_patients_in_the_backbone_s_corpus(run: Run) -> None:
    refused(run("ingest.subjects_of=null"), "sub-06 of the validation split", "would leak")


def test_a_corpus_that_holds_more_than_the_job_selects(run: Run) -> None:
    assert run("kind=ingest", "ingest.subjects_of=null")[0] == 0
    refused(run("kind=ingest"), "holds 3 subjects that this job does not select (sub-06, sub-07, sub-08)")


def test_too_many_scans_that_cannot_be_used(run: Run, copy: Path) -> None:
    for number in range(1, 6):
        (copy / f"images/sub-{number:02d}_T1w.nii.gz").write_text("no image")
    outcome = run("kind=ingest", f"ingest.sources=[{copy}/images]", "ingest.subjects_of=null")
    refused(outcome, "5 of 8 scans read were refused (5 not_nifti)", "ingest.max_refused_fraction", "ledger.jsonl")


def test_pseudonyms_without_a_secret(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("P2R_PSEUDONYM_KEY", raising=False)
    refused(run("kind=ingest", "ingest.pseudonyms=true"), "P2R_PSEUDONYM_KEY (it is not set)", "openssl rand")


def test_test_patients_that_only_a_secret_would_find(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", "the secret of this test")
    assert run("kind=pretrain", "ingest.pseudonyms=true", "ingest.subjects_of=null", "pretrain.steps=2")[0] == 0
    assert run("kind=publish", "pretrain.steps=2")[0] == 0
    refused(run("kind=finetune"), "sub-06 of the validation split", "would leak", "--allow-transductive")
    monkeypatch.delenv("P2R_PSEUDONYM_KEY")
    refused(run("kind=finetune"), "P2R_PSEUDONYM_KEY (it is not set)")


def test_a_url_without_anything_to_verify(p2r: Run, published: dict[str, str]) -> None:
    refused(p2r("verify", published["storage"]), "has no manifest.json", "backbones/NAME/VERSION")


def test_a_damaged_corpus(p2r: Run, published: dict[str, str], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published["corpus"].removeprefix("file://"), tmp_path / "corpus"))
    (tar, *_) = sorted(copy.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    refused(p2r("verify", copy), "is damaged", tar.name)
    (copy / "manifest.json").write_text("[1]")
    refused(p2r("verify", copy), "this version reads")
    refused(p2r("inspect", copy / "nothing"), "holds nothing of p2r: no manifest.json")


def test_a_cohort_that_hides_a_leak(run: Run) -> None:
    refused(run("ingest.cohort=other"), "ingest.cohort is 'other'", "'default'")


def test_what_is_published_is_never_replaced(run: Run, tmp_path: Path) -> None:
    assert run("kind=pretrain")[0] == 0
    assert run("kind=publish")[0] == 0
    shutil.rmtree(tmp_path / "storage/pretrain")
    assert run("kind=pretrain", "pretrain.seed=1")[0] == 0
    refused(run("kind=publish", "pretrain.seed=1"), "already published with other weights", "publish.version")


def test_a_url_that_holds_no_backbone(p2r: Run, tmp_path: Path, toy_data: Path) -> None:
    scan = toy_data / "images/sub-01_T1w.nii.gz"
    refused(p2r("embed", tmp_path, scan, "-o", tmp_path / "x.nii.gz"), "holds no manifest.json")


def test_an_output_that_is_no_nifti_or_nowhere(
    p2r: Run, published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    scan = toy_data / "images/sub-01_T1w.nii.gz"
    refused(p2r("embed", published["backbone"], scan, "-o", tmp_path / "x.txt"), "must end in .nii or .nii.gz")
    refused(
        p2r("embed", published["backbone"], scan, "-o", tmp_path / "no/x.nii"), "does not exist or cannot be written"
    )


def test_a_picture_of_views_that_is_no_png_or_of_a_job_without_views(
    p2r: Run, repository: Path, tmp_path: Path
) -> None:
    refused(p2r("views", repository / "jobs/demo.yaml", "-o", tmp_path / "x.jpg"), "must end in .png")
    job = tmp_path / "job.yaml"
    job.write_text("kind: finetune\nname: x\nfinetune: {tasks: [a.yaml], backbone: /b}\n")
    refused(p2r("views", job, "-o", tmp_path / "x.png"), "has no section pretrain")


def test_a_damaged_backbone(p2r: Run, published: dict[str, str], tmp_path: Path) -> None:
    copy = shutil.copytree(published["backbone"].removeprefix("file://"), tmp_path / "backbone")
    assert p2r("verify", copy)[0] == 0
    (weights,) = copy.glob("model-*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused(p2r("verify", copy), weights.name, "without the sha256 of its manifest", "damaged")


def test_a_manifest_a_configuration_or_weights_that_are_rubbish(
    p2r: Run, published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    scan = toy_data / "images/sub-01_T1w.nii.gz"
    for number, content in enumerate((pickle.dumps([1]), b"[1, 2]", b"[" * 30_000, b"")):
        copy = shutil.copytree(published["backbone"].removeprefix("file://"), tmp_path / str(number))
        (copy / "manifest.json").write_bytes(content)
        for command in (("verify", copy), ("embed", copy, scan, "-o", tmp_path / "x.nii.gz")):
            refused(p2r(*command), "manifest.json", "restore the file" if content != b"[1, 2]" else "")
        assert p2r("inspect", copy)[0] in (0, 2)
        assert p2r("inspect", tmp_path)[0] == 0


def test_a_pin_that_is_none_or_of_another_version(
    p2r: Run, published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    scan, other = toy_data / "images/sub-01_T1w.nii.gz", "0" * 64
    for url in (published["backbone"], published["model"], published["corpus"]):
        refused(p2r("verify", f"{url}@sha256:{other}"), f"is pinned to the manifest with sha256 {other}")
        refused(p2r("inspect", f"{url}@sha256:{other}"), f"is pinned to the manifest with sha256 {other}")
        refused(p2r("verify", f"{url}@sha256:abc"), "has no valid pin")
    for command, url in (("embed", published["backbone"]), ("predict", published["model"])):
        refused(p2r(command, f"{url}@sha256:{other}", scan, "-o", tmp_path / "x.nii.gz"), "is pinned to the manifest")
    backbone = f"{published['backbone']}@sha256:{other}"
    refused(p2r("compare", backbone, published["storage"]), "is pinned to the manifest with sha256")


def test_a_job_whose_backbone_is_another_or_not_signed(run: Run, published: dict[str, str], tmp_path: Path) -> None:
    url, key = published["backbone"], "ed25519:" + "ab" * 32
    refused(run("kind=finetune", f"finetune.backbone={url}@sha256:{'0' * 64}"), "is pinned to the manifest")
    refused(run("kind=finetune", f"finetune.backbone={url}", f"finetune.backbone_signed_by={key}"), "is not signed")
    refused(run("kind=finetune", f"finetune.backbone={url}@sha256:1"), "finetune.backbone", "has no valid pin")
    refused(run("kind=pretrain", f"pretrain.init_from={url}@sha256:1"), "pretrain.init_from", "has no valid pin")


def test_an_unknown_command_or_option(p2r: Run) -> None:
    refused(p2r("predcit"))
    refused(p2r("run"))


def test_a_job_file_that_is_none(p2r: Run, tmp_path: Path) -> None:
    refused(p2r("run", tmp_path / "absent.yaml"), "absent.yaml cannot be read")
    refused(p2r("validate", tmp_path / "absent.yaml"), "absent.yaml cannot be read")


NAME = os.fsdecode(b"a\x1b[2J\nsound    b\xe2\x80\xae\xc2\x9b31m\xe2\x80\x8b\r\xff<b>")


@pytest.mark.parametrize(
    "words",
    [
        *("validate FOLDER/job.yaml", "validate FOLDER/absent", "validate FOLDER/job.yaml --set name=NAME"),
        *(
            "validate FOLDER/job.yaml --set NAME=1",
            "validate --NAME",
            "NAME",
            "verify FOLDER",
            "verify FOLDER@sha256:NAME",
        ),
        *("inspect FOLDER", "status FOLDER", "check FOLDER", "compare FOLDER FOLDER/x", "sign FOLDER --key FOLDER/k"),
        *(
            "embed FOLDER FOLDER/s.nii -o FOLDER/o.nii",
            "predict FOLDER FOLDER -o FOLDER/o",
            "inspect ROOT",
            "status ROOT",
        ),
    ],
)
def test_a_hostile_name_in_any_argument_is_shown_as_text(
    p2r: Run, repository: Path, tmp_path: Path, words: str
) -> None:
    folder = tmp_path / NAME
    (folder / "backbones" / NAME).mkdir(parents=True)
    (folder / "backbones" / NAME / "manifest.json").write_text("[")
    (folder / "job.yaml").write_text((repository / "jobs/demo.yaml").read_text())
    given = {"FOLDER": str(folder), "ROOT": str(tmp_path), "NAME": NAME}
    arguments = [re.sub("FOLDER|ROOT|NAME", lambda match: given[match[0]], word) for word in words.split()]
    code, said = p2r(*arguments)
    assert code in (0, 2) and "Traceback" not in said
    assert said.replace("\n", "").isprintable()
    assert not re.search("^sound    b", said, re.MULTILINE), "a forged line"
