"""From a folder as people have it to a job and a task: what is found, what is written, and that it is valid."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from cluster.first_job import classes_of, drafts_of, survey_folder
from p2r import run as p2r_run
from p2r.data.corpus import subjects_found
from p2r.data.survey import survey
from p2r.errors import DataError
from p2r.evaluate.drafts import draft_job, problems_of
from p2r.evaluate.task_files import load_task
from p2r.job import read_job

P2R = Callable[..., tuple[int, str]]
STATED = ("--licence", "CC0-1.0", "--provenance", "Toys, 2026")


@pytest.fixture
def p2r(p2r: P2R, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> P2R:
    """Call the `p2r` command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("P2R_SCANS", "P2R_LICENCE", "P2R_PROVENANCE", "P2R_TASK"):
        monkeypatch.delenv(name, raising=False)
    return p2r


def write(path: Path, *, seed: int | None, values: int = 2) -> None:
    """Write a scan of noise, or a label map with the values 0 to `values`."""
    grid = np.indices((24, 26, 4))[0] // 6 % (values + 1)
    data = grid if seed is None else np.random.default_rng(seed).integers(1, 900, (24, 26, 4)) + 200 * grid
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(data.astype(np.int16), np.diag([1.5, 1.5, 6.0, 1.0])).to_filename(path)


def _nnunet(root: Path) -> None:
    for case in range(8):
        write(root / f"imagesTr/heart_{case:03d}_0000.nii.gz", seed=case)
        write(root / f"imagesTr/heart_{case:03d}_0001.nii.gz", seed=100 + case)
        write(root / f"labelsTr/heart_{case:03d}.nii.gz", seed=None)
    write(root / "imagesTs/heart_050_0000.nii.gz", seed=50)
    stated = {
        "channel_names": {"0": "cine", "1": "LGE"},
        "labels": {"background": 0, "LV": 1, "RV": 2},
        "numTraining": 8,
    }
    (root / "dataset.json").write_text(json.dumps({**stated, "file_ending": ".nii.gz"}))


def _msd(root: Path) -> None:
    pairs = []
    for case in range(8):
        write(root / f"imagesTr/liver_{case}.nii.gz", seed=case)
        write(root / f"labelsTr/liver_{case}.nii.gz", seed=None)
        pairs.append({"image": f"./imagesTr/liver_{case}.nii.gz", "label": f"./labelsTr/liver_{case}.nii.gz"})
    stated = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "licence": "CC-BY-SA 4.0",
    }
    (root / "dataset.json").write_text(json.dumps({**stated, "reference": "A clinic", "training": pairs, "test": []}))


def _bids(root: Path) -> None:
    for number in range(1, 9):
        for contrast in ("T1w", "FLAIR"):
            write(root / f"sub-{number:02d}/anat/sub-{number:02d}_{contrast}.nii.gz", seed=number + 10 * len(contrast))
        write(
            root / f"derivatives/expert/sub-{number:02d}/anat/sub-{number:02d}_FLAIR_desc-lesion_mask.nii.gz", seed=None
        )
    stated = {
        "Name": "Lesions",
        "BIDSVersion": "1.9.0",
        "License": "CC0-1.0",
        "ReferencesAndLinks": ["A paper", "2020"],
    }
    (root / "dataset_description.json").write_text(json.dumps(stated))


def _bids_flat_labels(root: Path) -> None:
    for number in range(1, 9):
        write(root / f"sub-{number:02d}/anat/sub-{number:02d}_FLAIR.nii.gz", seed=number)
        write(root / f"derivatives/labels/sub-{number:02d}.nii.gz", seed=None)


def _flat(root: Path) -> None:
    for number in range(1, 9):
        for frame in (1, 12):
            write(root / f"patient{number:03d}_frame{frame:02d}.nii.gz", seed=number * 100 + frame)
            write(root / f"patient{number:03d}_frame{frame:02d}_gt.nii.gz", seed=None)
    write(root / "patient009_frame01.nii.gz", seed=9)


def _two_folders(root: Path) -> None:
    for number in range(1, 9):
        write(root / f"images/{number:02d}.nii.gz", seed=number)
        write(root / f"masks/{number:02d}_seg.nii.gz", seed=None)


def _a_folder_each(root: Path) -> None:
    for number in range(1, 9):
        write(root / f"P{number}/t1.nii.gz", seed=number)
        write(root / f"P{number}/seg.nii.gz", seed=None)


FOLDERS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "nnunet": (_nnunet, {"form": "nnunet", "scans": 17, "subjects": 9, "pairs": 8, "image_name": "{key}_0000"}),
    "msd": (_msd, {"form": "msd", "scans": 8, "subjects": 8, "pairs": 8, "image_name": "{key}"}),
    "bids": (_bids, {"form": "bids", "scans": 16, "subjects": 8, "pairs": 8, "image_name": "{key}_FLAIR"}),
    "bids_flat_labels": (
        _bids_flat_labels,
        {"form": "bids", "scans": 8, "subjects": 8, "pairs": 8, "image_name": "{key}_FLAIR"},
    ),
    "flat": (_flat, {"form": "folder", "scans": 17, "subjects": 9, "pairs": 16, "image_name": "{key}"}),
    "two_folders": (_two_folders, {"form": "folder", "scans": 8, "subjects": 8, "pairs": 8, "image_name": "{key}"}),
    "a_folder_each": (_a_folder_each, {"form": "folder", "scans": 8, "subjects": 8, "pairs": 8, "image_name": "t1"}),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_as_people_have_it_becomes_a_valid_job_and_task(kind: str, tmp_path: Path, p2r: P2R) -> None:
    make, expected = FOLDERS[kind]
    make(tmp_path / "data")
    found = survey_folder(tmp_path / "data")
    names, pairing = found.names, found.names.pairing
    assert pairing is not None
    assert expected == {
        "form": names.form,
        "scans": len(names.scans),
        "subjects": len(names.subjects),
        "pairs": len(pairing.pairs),
        "image_name": pairing.image_name,
    }
    code, said = p2r("init", "mine", "--scans", tmp_path / "data", *STATED)
    assert code == 0, said
    assert "p2r validate mine/job.yaml mine/task.yaml" in said and "p2r run mine/job.yaml" in said
    job, task = read_job(Path("mine/job.yaml")), load_task(Path("mine/task.yaml"))
    assert job.kind == "pipeline" and job.ingest is not None
    assert (job.ingest.subject_pattern, job.ingest.cohort) == (task.config.subject_pattern, task.config.cohort)
    assert len(task.scans) == expected["pairs"]
    assert list(task.config.classes) == [1, 2]
    assert (job.name, task.name, job.ingest.cohort) == ("mine", "mine", "data")
    assert f"p2r predict {job.storage.removeprefix('file://')}/models/mine/all {tmp_path}" in said
    assert all(len(line) < 140 for line in Path("mine/job.yaml").read_text().splitlines() if line.startswith("#"))
    code, said = p2r("validate", "mine/job.yaml", "mine/task.yaml")
    assert code == 0 and "patients to train" in said, said


def test_files_that_would_not_be_valid_are_not_left_in_the_way(tmp_path: Path, p2r: P2R) -> None:
    _two_folders(tmp_path / "data")
    given = ("init", "mine", "--scans", tmp_path / "data", "--licence", "CC0-1.0", "--provenance")
    code, said = p2r(*given, "Virtual subjects of the demo")
    assert code == 2 and "provenance speaks of virtual subjects" in said, said
    code, said = p2r(*given, "Our clinic")
    assert code == 0, said


def test_written_paths_have_no_dots_and_label_maps_in_derivatives_are_named_as_such(tmp_path: Path, p2r: P2R) -> None:
    _bids(tmp_path / "data")
    (tmp_path / "other").mkdir()
    code, said = p2r("init", "mine", "--scans", tmp_path / "other/../data", *STATED)
    assert code == 0 and "/.." not in said + Path("mine/job.yaml").read_text() + Path("mine/task.yaml").read_text()
    assert (
        "derivatives: derivatives of a BIDS data set, not read as scans (8 images); the task reads its label maps"
        in said
    )


def test_check_says_what_it_would_write_and_draws_the_scans(tmp_path: Path, p2r: P2R) -> None:
    _nnunet(tmp_path / "data")
    (tmp_path / "data/imagesTr/heart_900_0000.nii.gz").write_bytes(b"no scan")
    code, said = p2r("check", tmp_path / "data", "-o", "sheet.png")
    assert code == 0, said
    for words in (
        "18 of 10 subjects", "LGE 8, cine 10", "8 left out of pretraining", "1 LV, 2 RV", "[not_nifti]",
        "kind: pipeline", "split_rule:", "${P2R_LICENCE}",
    ):  # fmt: skip
        assert words in said, words
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("job.yaml").exists()


def test_a_patient_under_two_names_is_left_out_of_task_and_corpus(tmp_path: Path, p2r: P2R) -> None:
    _nnunet(tmp_path / "data")
    shutil.copy(tmp_path / "data/imagesTr/heart_002_0000.nii.gz", tmp_path / "data/imagesTr/heart_006_0000.nii.gz")
    code, said = p2r("init", "mine", "--scans", tmp_path / "data", "--contrast", "0000", *STATED)
    assert code == 0 and "heart_006 has the voxels of heart_002: one person under two names" in said, said
    assert "of 7 labelled patients" in Path("mine/task.yaml").read_text()
    task, job = load_task(Path("mine/task.yaml")), read_job(Path("mine/job.yaml"))
    assert "heart_006" not in {subject for subjects in task.subjects.values() for subject in subjects}
    assert job.ingest is not None
    assert {f"imagesTr/heart_006_000{channel}.nii.gz" for channel in (0, 1)} < set(job.ingest.exclude)
    code, said = p2r("validate", "mine/job.yaml", "mine/task.yaml")
    assert code == 0, said


def test_a_licence_and_a_source_that_nobody_stated_are_asked_for_by_name(tmp_path: Path, p2r: P2R) -> None:
    _two_folders(tmp_path / "data")
    code, said = p2r("init", "mine", "--scans", tmp_path / "data")
    assert code == 0 and 'export P2R_LICENCE="..." P2R_PROVENANCE="..."' in said
    code, said = p2r("validate", "mine/job.yaml", "mine/task.yaml")
    assert code == 0 and said.count("needs P2R_LICENCE  needs P2R_PROVENANCE") == 2, said
    assert said.count("5 patients to train") == 2, "splits are shown without a licence"
    code, said = p2r("run", "mine/job.yaml")
    assert code == 2 and "P2R_LICENCE, P2R_PROVENANCE are not set (ingest.licence, ingest.provenance)" in said


def test_a_dataset_json_states_licence_and_reference(tmp_path: Path) -> None:
    _msd(tmp_path / "data")
    drafts = drafts_of(survey_folder(tmp_path / "data"), tmp_path)
    assert drafts.task is not None
    assert "licence: CC-BY-SA 4.0" in drafts.task and "citation: A clinic" in drafts.task
    assert classes_of(survey_folder(tmp_path / "data")) == {1: "liver", 2: "cancer"}


def test_a_bids_data_set_states_licence_reference_and_classes(tmp_path: Path) -> None:
    _bids(tmp_path / "data")
    found = survey_folder(tmp_path / "data")
    drafts = drafts_of(found, tmp_path)
    assert drafts.task is not None
    for words in ("licence: CC0-1.0", "citation: A paper; 2020", "title: Lesions"):
        assert words in drafts.task
    assert classes_of(found) == {1: "label1", 2: "label2"}
    (tmp_path / "data/dseg.tsv").write_text("index\tname\n1\tcore\n2\tedema\n9\tnowhere\n")
    assert classes_of(survey_folder(tmp_path / "data")) == {1: "core", 2: "edema"}
    found.values.clear()
    found.values[1] = 8
    assert classes_of(found) == {1: "lesion"}, "the entity of {key}_FLAIR_desc-lesion_mask"
    (tmp_path / "data/dataset_description.json").write_text("{")
    assert survey(tmp_path / "data", cache=tmp_path).licence == ""


def test_test_images_of_a_data_set_are_left_out_of_pretraining(tmp_path: Path, p2r: P2R) -> None:
    _nnunet(tmp_path / "data")
    code, said = p2r("init", "mine", "--scans", tmp_path / "data", *STATED)
    assert code == 0 and "1 scans, imagesTs/*" in said
    job = read_job(Path("mine/job.yaml"))
    assert job.ingest is not None and job.ingest.exclude == ("imagesTs/*",)
    assert "heart_050" not in subjects_found(job.ingest)
    _msd(tmp_path / "other")
    stated = json.loads((tmp_path / "other/dataset.json").read_text())
    stated |= {"training": stated["training"][:6], "test": ["./imagesTr/liver_6.nii.gz", "held/liver_9.nii.gz"]}
    (tmp_path / "other/dataset.json").write_text(json.dumps(stated))
    write(tmp_path / "other/held/liver_9.nii.gz", seed=9)
    assert survey(tmp_path / "other", cache=tmp_path).test_patterns == ("held/*", "imagesTr/liver_6.nii.gz")


def test_a_dataset_json_above_the_folder_of_images_is_pointed_out(tmp_path: Path, p2r: P2R) -> None:
    _msd(tmp_path / "data")
    code, said = p2r("init", "mine", "--scans", tmp_path / "data/imagesTr")
    assert code == 0 and f"{tmp_path}/data/dataset.json: name {tmp_path}/data instead" in said
    code, said = p2r("init", "whole", "--scans", tmp_path / "data")
    assert code == 0 and "instead" not in said


def test_contrasts_along_the_fourth_axis_enter_the_job_and_the_task(tmp_path: Path, p2r: P2R) -> None:
    _msd(tmp_path / "data")
    (stated := json.loads((tmp_path / "data/dataset.json").read_text()))["modality"] = {"0": "FLAIR", "1": "T1w"}
    (tmp_path / "data/dataset.json").write_text(json.dumps(stated))
    code, said = p2r("init", "mine", "--scans", tmp_path / "data")
    assert code == 0 and "each image holds 2 contrasts: FLAIR, T1w" in said and "flair,t1w=" in said
    assert not re.search("^contrasts", said, re.MULTILINE), "their names would say that there is but one"
    job, task = read_job(Path("mine/job.yaml")), load_task(Path("mine/task.yaml"))
    assert job.ingest is not None and job.ingest.sessions is not None and job.pretrain is not None
    assert job.ingest.sessions.fourth_axis == "contrasts" and tuple(job.ingest.sessions.contrasts) == ("flair", "t1w")
    assert job.pretrain.model.contrasts == task.config.fourth_axis == ("flair", "t1w")


@pytest.mark.parametrize("channels", [["MRI", "mri"], ["§", "T1*"], ["a" * 80, "b: {"], ["channel_1", "§"]])
def test_channels_of_any_name_become_contrasts(tmp_path: Path, channels: list[str]) -> None:
    _msd(tmp_path / "data")
    stated = json.loads((tmp_path / "data/dataset.json").read_text())
    stated["modality"] = {str(number): name for number, name in enumerate(channels)}
    (tmp_path / "data/dataset.json").write_text(json.dumps(stated))
    drafts = drafts_of(survey_folder(tmp_path / "data"), tmp_path)
    assert drafts.task is not None
    for name, text in {"job": drafts.job, "task": drafts.task}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    names = load_task(tmp_path / "task.yaml").config.fourth_axis
    model = read_job(tmp_path / "job.yaml", unset={})
    assert (
        names is not None and len(names) == 2 and model.pretrain is not None and model.pretrain.model.contrasts == names
    )


def test_images_with_other_contrasts_than_their_dataset_json_are_named(tmp_path: Path, p2r: P2R) -> None:
    _msd(tmp_path / "data")
    stated = json.loads((tmp_path / "data/dataset.json").read_text()) | {"modality": {"0": "T1", "1": "T2", "2": "PD"}}
    (tmp_path / "data/dataset.json").write_text(json.dumps(stated))
    code, said = p2r("init", "mine", "--scans", tmp_path / "data")
    assert code == 0 and "along its fourth axis, which 3 contrasts are to share, t1, t2, pd" in said


def test_the_first_version_of_nnunet_lists_images_without_the_numbers_of_their_files(tmp_path: Path, p2r: P2R) -> None:
    _msd(tmp_path / "data")
    stated = json.loads((tmp_path / "data/dataset.json").read_text()) | {"modality": {"0": "FLAIR", "1": "T1w"}}
    (tmp_path / "data/dataset.json").write_text(json.dumps(stated))
    for path in sorted((tmp_path / "data").glob("images*/*.nii.gz")):
        shutil.copy(path, path.with_name(path.name.replace(".nii", "_0001.nii")))
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    code, said = p2r("check", tmp_path / "data")
    assert code == 0 and "fourth" not in said and re.search(r"contrasts +FLAIR \d+, T1w \d+", said), said


def test_init_overwrites_nothing(tmp_path: Path, p2r: P2R) -> None:
    _two_folders(tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/job.yaml").write_text("mine\n")
    code, said = p2r("init", "mine", "--scans", tmp_path / "data")
    assert code == 2 and "mine/job.yaml exists already" in said
    assert (tmp_path / "mine/job.yaml").read_text() == "mine\n"
    assert not (tmp_path / "mine/task.yaml").exists()


def test_scans_without_labels_make_a_job_that_pretrains(tmp_path: Path, p2r: P2R) -> None:
    for number in range(6):
        write(tmp_path / f"data/p{number}_t1.nii.gz", seed=number)
    code, said = p2r("init", "mine", "--scans", tmp_path / "data", *STATED)
    assert code == 0 and "no label maps were found" in said
    assert read_job(Path("mine/job.yaml")).kind == "pretrain"
    assert not Path("mine/task.yaml").exists()


@pytest.mark.parametrize("num_labelled", [0, 3])
def test_too_few_label_maps_for_a_task_print_commands_that_lead_to_features(
    num_labelled: int, tmp_path: Path, p2r: P2R, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every printed command as it stands; the run in this process, and small."""
    monkeypatch.setenv("P2R_STORAGE", str(tmp_path / "runs"))
    for number in range(6):
        write(tmp_path / f"data/images/p{number}.nii.gz", seed=number)
        if number < num_labelled:
            write(tmp_path / f"data/labels/p{number}.nii.gz", seed=None)
    code, said = p2r("init", "mine", "--scans", tmp_path / "data", *STATED)
    assert code == 0 and "the job only pretrains" in said, said
    job = Path("mine/job.yaml")
    text = re.sub(r"  image: .*", "  image: {spacing_mm: 2.0, size: 32}", job.read_text())
    text = re.sub(r"  model: .*", "  model: {channels: [4, 4, 8, 8, 8], feature_channels: 4, head_channels: 8}", text)
    job.write_text(text.replace("  steps: 300", "  steps: 2").replace("  global_batch: 16", "  global_batch: 4"))
    commands = [shlex.split(line)[1:] for line in said.split("next:\n")[1].splitlines() if line.strip()]
    assert [words[0] for words in commands] == ["validate", "run", "publish", "embed"]
    for words in commands:
        if words[0] == "run":
            p2r_run(words[1], say=lambda line: None)
        else:
            code, said = p2r(*words)
            assert code == 0, said
    assert Path("features.nii.gz").exists()


def test_a_layout_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    _two_folders(tmp_path / "data")
    with pytest.raises(DataError, match=r"no dataset\.json"):
        survey(tmp_path / "data", form="nnunet", cache=tmp_path)
    with pytest.raises(DataError, match="not a BIDS data set"):
        survey(tmp_path / "data", form="bids", cache=tmp_path)
    with pytest.raises(DataError, match="8 label maps but no scan"):
        _bids(tmp_path / "b")
        (tmp_path / "only").mkdir()
        (tmp_path / "b/derivatives").rename(tmp_path / "only/masks")
        survey(tmp_path / "only", cache=tmp_path)


def test_labels_with_gaps_say_what_to_do() -> None:
    assert problems_of([1, 2, 3]) is None
    assert "renumber them (missing: 3)" in str(problems_of([1, 2, 4]))


def test_the_job_that_travels_with_p2r_is_the_one_that_init_writes(repository: Path) -> None:
    text = (repository / "jobs/own.yaml").read_text()
    body = draft_job(
        name="own", sources="${P2R_SCANS}", licence="${P2R_LICENCE}", provenance="${P2R_PROVENANCE}", cohort="folder",
        subject_pattern=r"^(.+?)\.nii", task="tasks/folder.yaml", voxels=None, num_labelled=8,
    )  # fmt: skip
    assert text.endswith(body)


def test_the_block_of_the_readme_leads_from_own_scans_to_a_segmentation(
    repository: Path, toy_data: Path, tmp_path: Path, p2r: P2R, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of it as it stands; the run in this process, and small."""
    data = tmp_path / "data/mine"
    for kind in ("images", "labels"):
        (data / kind).mkdir(parents=True)
        for path in sorted((toy_data / kind).iterdir()):
            shutil.copy(path, data / kind / f"P{int(path.name[4:6]):03d}.nii.gz")
    monkeypatch.setenv("P2R_STORAGE", str(tmp_path / "runs"))
    text = (
        (repository / "README.md").read_text().split("## Your own data\n")[1].split("\n    p2r ", 1)[1].split("\n\n")[0]
    )
    commands = [shlex.split(line.strip().removeprefix("p2r "), comments=True) for line in text.splitlines()]
    assert [words[0] for words in commands] == ["check", "init", "validate", "run", "predict"]
    small: dict[str, Any] = {
        "steps": 4,
        "num_labelled": [1],
        "draws": 1,
        "modes": ["scratch", "fine_tune"],
        "batch_size": 2,
    }
    for words in commands:
        here = [word.replace("/data/mine", str(data)).replace("~/p2r-runs", str(tmp_path / "runs")) for word in words]
        if words[0] == "run":
            made = p2r_run(
                here[1],
                say=lambda line: None,
                pretrain__steps=2,
                pretrain__global_batch=4,
                pretrain__image={"size": 32, "spacing_mm": 2.0},
                pretrain__model={"channels": [4, 4, 8, 8, 8], "feature_channels": 4, "head_channels": 8},
                **{f"finetune__{name}": value for name, value in small.items()},
            )
            assert set(made["models"]) == {"mine", "mine/all"}
        else:
            code, said = p2r(*here)
            assert code == 0, said
    segmentation = nibabel.load("P001_segmentation.nii.gz")
    assert segmentation.shape == nibabel.load(data / "images/P001.nii.gz").shape


# p2r validate, and the same checks at the start of p2r run


def test_validate_and_run_follow_every_path_before_ray_starts(tmp_path: Path, p2r: P2R) -> None:
    _two_folders(tmp_path / "data")
    p2r("init", "mine", "--scans", tmp_path / "data", *STATED)
    job = "mine/job.yaml"
    for override, words in {
        "ingest.sources=[/nowhere]": "ingest.sources: /nowhere does not exist",
        f"ingest.sources=['file://{tmp_path}/da%74a']": f"did you mean file://{tmp_path}/data?",
        "ingest.sources=['s3://your-bucket/scans']": "your-bucket is a placeholder",
        "ingest.sources=[/data/<scans>]": "<scans> is a placeholder",
        "storage=/path/to/runs": "/path/to/ is a placeholder",
        "finetune.tasks=[absent.yaml]": "absent.yaml cannot be read",
        "finetune.backbone=/nowhere": "finetune.backbone: /nowhere has no manifest.json",
        "pretrain.init_from=/nowhere": "pretrain.init_from: /nowhere has no manifest.json",
        "pretrain.micro_batch=3": "pretrain.micro_batch must divide a worker's part of the global batch, got 3",
    }.items():
        for command in ("validate", "run"):
            code, said = p2r(command, job, "--set", override)
            assert code == 2 and words in said and "starting Ray" not in said, said
    (tmp_path / "data/masks/03_seg.nii.gz").unlink()
    for command in ("validate", "run"):
        code, said = p2r(command, job)
        assert code == 2 and "finetune.tasks" in said and "03.nii.gz" in said and "unlabelled: leave_out" in said
        assert "starting Ray" not in said and not (tmp_path / "runs").exists()
    code, said = p2r("validate", job, "--set", "kind=publish")
    assert code == 0 and "task" not in said, "only sections that the job's kind uses are checked"
    code, said = p2r("validate", "mine/jop.yaml")
    assert code == 2 and "did you mean mine/job.yaml?" in said


def test_validate_refuses_settings_that_no_worker_could_have_and_notes_slow_ones(
    write_toy_job: Callable[..., Path], tmp_path: Path, p2r: P2R
) -> None:
    job = write_toy_job(tmp_path)
    gpu = "resources.gpus_per_worker=1"
    for overrides, words in (
        (["pretrain.micro_batch=3"], "pretrain.micro_batch must divide a worker's part of the global batch, got 3"),
        (["pretrain.precision=tf32", "resources.gpus_per_worker=0"], "pretrain.precision tf32 needs GPUs"),
    ):
        code, said = p2r("validate", job, *(word for override in overrides for word in ("--set", override)))
        assert code == 2 and words in said, said
    for overrides, words in (
        (
            ["pretrain.precision=bf16", gpu, "pretrain.model.embedding_channels=48"],
            "set pretrain.model.embedding_channels",
        ),
        (["pretrain.precision=bf16", gpu, "pretrain.loss.temperature=0.01"], "set pretrain.loss.temperature to 0.01"),
        (["pretrain.precision=fp32", gpu], "set pretrain.precision to bf16 or tf32"),
    ):
        code, said = p2r("validate", job, *(word for override in overrides for word in ("--set", override)))
        assert code == 0 and "note: on GPUs, the loss has no kernels for" in said and words in said, said
    code, said = p2r(
        "validate",
        job,
        "--set",
        "pretrain.precision=bf16",
        "--set",
        gpu,
        "--set",
        "pretrain.model.embedding_channels=64",
    )
    assert code == 0 and "no kernels" not in said, said
