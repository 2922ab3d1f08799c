"""Few-shot trials on several contrasts: weights for other contrasts, leaks, scores by subset, refusals, and the published model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load

import p2r
from cluster.applying import predict
from p2r.config import FinetuneConfig
from p2r.data.manifest import voxel_digest
from p2r.data.preprocess import Preparation
from p2r.data.volume import read_volume, voxels_sha256, write_nifti
from p2r.errors import DataError, InputError
from p2r.evaluate.tasks import load_scan, load_task, read_images
from p2r.fewshot.checks import check_subsets, check_task
from p2r.fewshot.leaks import Known
from p2r.fewshot.protocol import final_trials, settings_of
from p2r.fewshot.publishing import publish_best
from p2r.fewshot.results import TrialResult
from p2r.fewshot.setup import TrialSetup
from p2r.fewshot.trial import run_trial
from p2r.modes import MODES
from p2r.report.contrasts import contrast_blocks
from p2r.report.page import Grid
from p2r.storage import Storage
from tests.publishing import corpus_facts, publish_toy
from tests.toy import CONTRASTS, write_toy_sessions

NAMES = tuple(CONTRASTS)
Make = Callable[..., TrialSetup]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sessions of which every split has one without t1, and the test split one of only FLAIR."""
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    missing = {"sub-02": ["t1"], "sub-06": ["t1"], "sub-08": ["t1", "t1ce"]}
    return write_toy_sessions(tmp_path / "data", missing=missing)


@pytest.fixture
def make(data: Path, tmp_path: Path) -> Make:
    """Return a function that makes a checked setup, with a backbone of the given contrasts."""

    def make(*, of: tuple[str, ...] | None = None, storage: str = "storage", **values: Any) -> TrialSetup:
        rates = {mode: [1e-2] for mode, facts in MODES.items() if "steps" in facts.settings}
        given = {"modes": ["fine_tune"], "num_labelled": [1], "draws": 1, "steps": 3, "batch_size": 2, **values}
        url = publish_toy(str(tmp_path / f"backbone-{'-'.join(of or ())}"), contrasts=of, corpora=[corpus_facts()])[
            "url"
        ]
        backbone, root = p2r.load_backbone(url), Storage(str(tmp_path / storage))
        config = FinetuneConfig.model_validate({"tasks": ["t"], "search": {"learning_rates": rates}, **given})
        setup = TrialSetup(
            config=config,
            task=str(data / "task.yaml"),
            backbone=url,
            backbone_sha256=backbone.manifest["sha256"],
            architecture_sha256=backbone.config.sha256(),
            storage=root.at("finetune/discs"),
            root=root.url,
        )
        return check_task(load_task(data / "task.yaml"), backbone, setup)

    return make


def stack(data: Path, *, contrasts: tuple[str, ...] = NAMES) -> None:
    """Turn the task into one of images with contrasts along their fourth axis, and noise for missing ones."""
    noise = np.random.default_rng(2)
    for label in sorted((data / "labels").iterdir()):
        subject = label.name.split(".")[0]
        files = [data / subject / "anat" / f"{name.format(key=subject)}.nii.gz" for name in CONTRASTS.values()]
        images = [
            nibabel.load(file).dataobj if file.exists() else noise.integers(1, 300, (36, 40, 3), np.int16)
            for file in files
        ]
        write_nifti(data / f"stacks/{subject}.nii.gz", np.stack(images, -1), nibabel.load(label).affine)
    name_contrasts(data, contrasts)


def name_contrasts(data: Path, contrasts: tuple[str, ...]) -> None:
    """Name the contrasts along the fourth axis."""
    lines = (data / "task.yaml").read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0] not in ("images", "image_name", "fourth_axis")]
    (data / "task.yaml").write_text("\n".join([*kept, "images: stacks", f"fourth_axis: [{', '.join(contrasts)}]", ""]))


def run(setup: TrialSetup, mode: str = "fine_tune") -> TrialResult:
    chosen = settings_of(setup.config, mode, {"learning_rate": 1e-2})
    config = setup.config.model_copy(update={"modes": (mode,)})
    trial = final_trials(config, load_task(Path(setup.task)), {mode: chosen})[0]
    return run_trial(setup, trial, device="cpu")


def weights(setup: TrialSetup, result: TrialResult) -> dict[str, torch.Tensor]:
    assert result.weights is not None
    return load(Storage(setup.storage).read_bytes(result.weights))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("of", [None, ("flair",), ("t1", "flair", "t1ce")], ids=str)
def test_a_backbone_of_one_contrast_or_of_all_is_fine_tuned_on_three(make: Make, of: tuple[str, ...] | None) -> None:
    setup = make(of=of, contrast_subsets=[["flair"], ["flair", "t1"], ["t1ce"]])
    result = run(setup)
    row = result.reported()
    assert row.contrasts == list(NAMES) and row.dice_mean is not None
    stem = weights(setup, result)["backbone.unet.conv_0.conv_0.conv.weight"]
    assert stem.shape[1] == 3
    assert [(one.contrasts, one.num_subjects) for one in row.by_contrasts or ()] == [
        (["flair"], 2),
        (["flair", "t1"], 2),
        (["t1ce"], 1),
    ]
    grid = next(block for block in contrast_blocks([row]) if isinstance(block, Grid))
    assert grid.header[3:] == ("flair (2)", "flair, t1 (2)", "t1ce (1)")


def test_the_subset_of_all_contrasts_scores_like_the_row_itself(make: Make) -> None:
    row = run(make(contrast_subsets=[NAMES, ("flair",)])).reported()
    assert row.by_contrasts is not None
    everything, flair = row.by_contrasts
    assert everything.dice_by_subject == row.dice_by_subject
    assert flair.dice_by_subject != row.dice_by_subject
    assert flair.dice_by_subject["sub-08"] == row.dice_by_subject["sub-08"], "it has nothing else"


def test_trials_read_only_the_contrasts_that_the_job_names(make: Make, data: Path) -> None:
    setup = make(of=NAMES, contrasts=["flair"], planes="centre")
    before = weights(setup, run(setup))
    assert before["backbone.unet.conv_0.conv_0.conv.weight"].shape[1] == 1
    for path in data.glob("sub-0[1-5]/anat/*T1w.nii.gz"):
        image = nibabel.load(path)
        nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine).to_filename(path)
    Storage(setup.storage).delete("trials")
    assert equal(before, weights(setup, run(setup)))


@pytest.mark.parametrize("mode", ["weak_to_strong"])
def test_labels_of_unlabelled_and_of_test_patients_do_not_train(make: Make, data: Path, mode: str) -> None:
    setup = make(of=NAMES, steps=4, confidence_threshold=0.4)
    honest = run(setup, mode)
    before = weights(setup, honest)
    subjects = honest.trial.subjects
    others = [f"sub-{number:02d}" for number in range(1, 6) if f"sub-{number:02d}" not in subjects]
    for subject in others:
        (data / f"labels/{subject}.nii.gz").write_bytes(b"no label map")
    for subject in ("sub-07", "sub-08"):
        image = nibabel.load(data / f"labels/{subject}.nii.gz")
        wrong = np.roll(np.asarray(image.dataobj), 3, axis=0) ^ 1
        nibabel.Nifti1Image(wrong.astype(np.int16), image.affine).to_filename(data / f"labels/{subject}.nii.gz")
    Storage(setup.storage).delete("trials")
    poisoned = run(setup, mode)
    assert equal(before, weights(setup, poisoned)) and honest.validation == poisoned.validation
    assert honest.reported().dice_by_subject != poisoned.reported().dice_by_subject
    for subject in others:  # every contrast of them is read
        for path in (data / subject / "anat").glob("*ce-GD_T1w.nii.gz"):
            image = nibabel.load(path)
            nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine).to_filename(path)
    Storage(setup.storage).delete("trials")
    assert not equal(before, weights(setup, run(setup, mode)))


@pytest.mark.parametrize(
    ("of", "values", "message"),
    [
        (("flair", "t2"), {}, "wants the contrast t1, t1ce, which the backbone .* never saw: it reads flair, t2"),
        (NAMES, {"contrasts": ["t2"]}, "finetune.contrasts names t2, the task discs has flair, t1, t1ce"),
        (None, {"contrasts": ["t1"]}, "case sub-02_anat_sub-02 has none of the contrasts t1"),
        (None, {"protocol": "paper_compat"}, "paper_compat reads one contrast"),
    ],
)
def test_contrasts_that_cannot_be_are_refused_before_anything_is_trained(
    make: Make, of: tuple[str, ...] | None, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(of=of, **values)


def test_a_subset_of_contrasts_that_no_task_has_is_refused(make: Make, data: Path) -> None:
    tasks = [load_task(data / "task.yaml")]
    check_subsets(tasks, make(contrast_subsets=[["flair", "t1"]]).config)
    with pytest.raises(DataError, match="contrast_subsets names t2, but the models read flair, t1, t1ce"):
        check_subsets(tasks, make(contrast_subsets=[["t2", "flair"]]).config)
    with pytest.raises(DataError, match="contrast_subsets names t1, but the models read flair"):
        check_subsets(tasks, make(contrasts=["flair"], contrast_subsets=[["t1"]]).config)


def test_contrasts_that_no_patient_has_where_they_are_needed_are_refused(make: Make, data: Path) -> None:
    for subject in ("sub-07", "sub-08"):
        (data / subject / "anat" / f"{subject}_T1w.nii.gz").unlink(missing_ok=True)
    tasks, config = [load_task(data / "task.yaml")], make(contrast_subsets=[["flair"], ["t1"]]).config
    check_subsets(tasks, config.model_copy(update={"score_on": "validation", "contrast_subsets": (("t1ce",),)}))
    with pytest.raises(DataError, match="no test patient of task discs has t1, so there is nothing to score"):
        check_subsets(tasks, config)
    for path in data.glob("sub-0[1-5]/anat/*_ce-GD_T1w.nii.gz"):
        path.unlink()
    with pytest.raises(DataError, match="no train case has the contrast t1ce"):
        make()


def test_a_task_without_names_needs_a_backbone_of_one_contrast(make: Make, data: Path) -> None:
    text = (data / "task.yaml").read_text().splitlines()
    names = [line for line in text if not line.startswith("image_name")] + ['image_name: "{key}_FLAIR"']
    (data / "task.yaml").write_text("\n".join(names) + "\n")
    assert run(make(of=("t1",))).reported().contrasts is None
    with pytest.raises(
        DataError, match=r"the contrast of its scans has no name, the backbone .* reads flair, t1, t1ce"
    ):
        make(of=NAMES)


def test_a_published_model_takes_scans_by_name_and_misses_some(make: Make, data: Path, tmp_path: Path) -> None:
    setup = make(of=NAMES)
    backbone = p2r.load_backbone(setup.backbone)
    url = publish_best(setup, [run(setup)], backbone, Storage(setup.root).child("models"))["url"]
    anat = data / "sub-07/anat"
    scans = {"t1": anat / "sub-07_T1w.nii.gz", "flair": anat / "sub-07_FLAIR.nii.gz"}
    arguments = [f"{name}={path}" for name, path in scans.items()]
    predict([url], arguments, str(tmp_path / "found.nii.gz"), device="cpu", say=lambda line: None)
    found = p2r.load_model(url).predict(scans)
    written = nibabel.load(tmp_path / "found.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), np.asarray(found.dataobj)) and written.shape == (36, 40, 3)
    for given, message in (
        ([arguments[0], arguments[0]], "the contrast t1 is named twice"),
        ([str(scans["t1"]), arguments[1]], "has no contrast: give scans without names, or all by contrast"),
        ([str(scans["t1"])], "is one scan without the name of its contrast"),
        ([f"t2={scans['t1']}"], "never saw the contrast t2"),
        ([arguments[0].upper(), arguments[0]], "the contrast t1 is named twice"),
        (["t1=", arguments[1]], "t1= names no scan"),
    ):
        with pytest.raises(InputError, match=message):
            predict([url], given, str(tmp_path / "other.nii.gz"), device="cpu", say=lambda line: None)


def test_many_patients_are_segmented_by_contrast_and_resumed(make: Make, data: Path, tmp_path: Path) -> None:
    setup = make(of=NAMES)
    url = publish_best(setup, [run(setup)], p2r.load_backbone(setup.backbone), Storage(setup.root).child("models"))[
        "url"
    ]
    given = [f"{name}={data}/{{key}}/anat/{CONTRASTS[name]}.nii.gz" for name in ("t1", "flair")]
    lines: list[str] = []

    def segment(*arguments: str) -> str:
        lines.clear()
        predict([url], arguments, str(tmp_path / "out"), has_probabilities=True, device="cpu", say=lines.append)
        return "\n".join(lines)

    said = segment(*given)
    assert lines[:2] == ["8 patients: t1 of 5, flair of 8", "3 without t1: sub-02, sub-06, sub-08"], said
    assert "2/8 | sub-02 (flair) | 1 DISC: " in said and "8/8 | " in said and "there already" not in said
    scans = {name: data / f"sub-07/anat/{CONTRASTS[name].format(key='sub-07')}.nii.gz" for name in ("t1", "flair")}
    found = p2r.load_model(url).predict(scans)
    assert np.array_equal(found.dataobj, nibabel.load(tmp_path / "out/sub-07.nii.gz").dataobj)
    assert nibabel.load(tmp_path / "out/sub-02_probabilities.nii.gz").shape == (36, 40, 3, 2)
    table = (tmp_path / "out/volumes.csv").read_text().splitlines()
    assert table[0] == "key,contrasts,frame,DISC_ml" and table[2].startswith("sub-02,flair,1,") and len(table) == 9
    assert segment(*given).count("there already") == 8
    # Another scan of any contrast, a contrast that comes or goes, and another order are other inputs.
    shutil.copy(scans["t1"], data / "sub-08/anat/sub-08_T1w.nii.gz")
    scans["flair"].write_bytes(b"no scan")
    said = segment(*given)
    assert said.count("there already") == 6 and "7/8 | sub-07 (t1, flair) | refused: " in said
    assert segment(*reversed(given)).count("there already") == 2, "of patients with one contrast"
    with pytest.raises(InputError, match="never saw the contrast t2"):
        segment(given[0].replace("t1=", "t2="), given[1])
    assert not any(line.startswith("1/8") for line in lines), "found before the first patient"


def test_a_copy_of_a_test_patient_among_unlabelled_images_of_several_contrasts_is_refused(
    make: Make, data: Path
) -> None:
    stack(data)
    (data / "task.yaml").write_text(f"{(data / 'task.yaml').read_text()}unlabelled: use\n")
    image = nibabel.load(data / "stacks/sub-01.nii.gz")
    write_nifti(data / "stacks/sub-09.nii.gz", np.asarray(image.dataobj)[::-1], image.affine)
    run(make(of=NAMES, contrast_subsets=[["flair"]], confidence_threshold=0.4), "weak_to_strong")
    shutil.copy(data / "stacks/sub-07.nii.gz", data / "stacks/sub-09.nii.gz")
    with pytest.raises(DataError, match=r"sub-09\.nii\.gz has no label map and the voxels of .*sub-07\.nii\.gz"):
        make(of=NAMES)


def test_other_names_along_the_fourth_axis_are_other_frozen_features(make: Make, data: Path) -> None:
    stack(data)
    found = []
    for names in (NAMES, NAMES[::-1]):
        name_contrasts(data, names)
        setup = make(of=("flair", "t1"), contrasts=["flair", "t1"], probe_augmentation="none", storage="-".join(names))
        found.append(weights(setup, run(setup, "linear_probe")))
    assert not equal(*found)


def test_a_corpus_that_read_the_contrasts_as_frames_is_recognised(make: Make, data: Path, tmp_path: Path) -> None:
    stack(data)
    task = load_task(data / "task.yaml")
    (scan,) = task.scans_of(("sub-07",))
    salt = "5a" * 32
    digest = voxel_digest(salt, voxels_sha256(read_volume(scan.image)))
    url = publish_toy(str(tmp_path / "leaky"), corpora=[corpus_facts(salt, voxels=(digest,))])["url"]
    known = Known(p2r.load_backbone(url), is_allowed=False)
    loaded = load_scan(scan, task, Preparation(spacing_mm=2.0, image_size=32, contrasts=NAMES))
    with pytest.raises(DataError, match="scan sub-07 of the test split is in the backbone's corpus"):
        known.see_scan(scan, loaded.volumes, "test")


def test_a_network_of_several_contrasts_is_compiled_for_images_of_all(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def note_shape(backbone: object, *, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bool, str]:
        shapes.append(shape)
        return False, "not compiled"

    monkeypatch.setattr("p2r.fewshot.learner.warm_up", note_shape)
    run(make(of=("flair", "t1", "t1ce"), compile=True), "weak_to_strong")
    assert [shape[1] for shape in shapes] == [3]


def test_sessions_without_a_label_map_are_unlabelled_ones_with_the_contrasts_they_have(make: Make, data: Path) -> None:
    task = (data / "task.yaml").read_text().replace("sub-[01-05]", "sub-[03-05]")
    (data / "task.yaml").write_text(f"{task}unlabelled: use\n")
    for name in ("sub-01", "sub-02"):
        (data / f"labels/{name}.nii.gz").unlink()
    found = load_task(data / "task.yaml")
    assert [(scan.subject, set(scan.contrasts)) for scan in found.unlabelled] == [
        ("sub-01", set(NAMES)),
        ("sub-02", {"flair", "t1ce"}),
    ]
    run(make(of=NAMES, num_labelled=["all"]), "mean_teacher")
    preparation = Preparation(spacing_mm=2.0, image_size=32, contrasts=("t1",))
    with pytest.raises(DataError, match="has none of the contrasts t1, only"):
        read_images(found.unlabelled[1], found, preparation)
