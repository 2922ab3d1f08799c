"""Modes that learn from unlabelled images: files read, effect of the teacher, and resuming of a killed trial."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load

from p2r.errors import DataError
from p2r.evaluate.tasks import load_task
from p2r.fewshot import saved_training
from p2r.fewshot.protocol import Trial, final_trials, settings_of
from p2r.fewshot.results import TrialResult
from p2r.fewshot.saved_training import SavedTraining, TrainingState
from p2r.fewshot.search import attempt
from p2r.fewshot.setup import TrialSetup
from p2r.fewshot.trial import run_trial
from p2r.job import read_job
from p2r.logs import Say
from p2r.modes import MODES
from p2r.pipeline.local import LocalExecutor
from p2r.pipeline.stages import run_job
from p2r.storage import Storage

Make = Callable[..., TrialSetup]
SEMI_SUPERVISED = [mode for mode, facts in MODES.items() if facts.unlabelled != "none"]


def final(setup: TrialSetup, mode: str, **settings: float) -> Trial:
    chosen = settings_of(setup.config, mode, {"learning_rate": 1e-2, **settings})
    config = setup.config.model_copy(update={"modes": (mode,)})
    return final_trials(config, load_task(Path(setup.task)), {mode: chosen})[0]


def run(setup: TrialSetup, trial: Trial) -> dict[str, Any]:
    Storage(setup.storage).delete("trials")
    return run_trial(setup, trial, device="cpu").to_json()


def weights(setup: TrialSetup, result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load(Storage(setup.storage).read_bytes(result["weights"]))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", SEMI_SUPERVISED)
def test_images_of_unlabelled_patients_are_read_and_their_label_files_are_not(
    make: Make, copy: Path, mode: str
) -> None:
    setup = make(data=copy, steps=3, confidence_threshold=0.4)
    trial = final(setup, mode)
    others = [subject for subject in load_task(copy / "task.yaml").subjects["train"] if subject not in trial.subjects]
    assert len(others) == 4
    before = weights(setup, run(setup, trial))
    for subject in others:
        (copy / f"labels/{subject}_T1w.nii.gz").write_bytes(b"no label map")
    assert equal(before, weights(setup, run(setup, trial)))
    for subject in others:
        image = nibabel.load(copy / f"images/{subject}_T1w.nii.gz")
        changed = np.asarray(image.dataobj)[::-1].copy()
        nibabel.Nifti1Image(changed, image.affine).to_filename(copy / f"images/{subject}_T1w.nii.gz")
    assert not equal(before, weights(setup, run(setup, trial)))


def test_a_mean_teacher_without_memory_or_consistency_is_fine_tuning(make: Make) -> None:
    setup = make(steps=3)
    fine_tuned = weights(setup, run(setup, final(setup, "fine_tune")))
    alike, ours = (
        weights(setup, run(setup, final(setup, "mean_teacher", **settings)))
        for settings in ({"ema_decay": 0.0, "consistency_weight": 0.0}, {"ema_decay": 0.0, "ramp_up_fraction": 0.0})
    )
    assert equal(alike, fine_tuned)
    assert not equal(ours, fine_tuned)


def test_the_appearance_of_strong_views_is_of_modes_with_pseudo_labels(make: Make) -> None:
    strong = {"gamma": [0.2, 5.0], "noise": 0.3}
    for mode in ("mean_teacher", "weak_to_strong"):
        found, recipes = [], []
        for setup in (
            make(steps=3, confidence_threshold=0.4),
            make(steps=3, confidence_threshold=0.4, strong_intensity=strong),
        ):
            trial = final(setup, mode, ramp_up_fraction=0.0)
            found.append(weights(setup, run(setup, trial)))
            recipes.append(setup.recipe_sha256(trial))
        assert equal(*found) == (recipes[0] == recipes[1]) == (mode == "mean_teacher")


def test_weak_to_strong_and_its_control_differ_only_by_their_first_weights(make: Make) -> None:
    setup = make(steps=2, confidence_threshold=0.4, ema_decay=0.0, warmup_head_steps=2)
    pretrained, control = (run(setup, final(setup, mode)) for mode in ("weak_to_strong", "scratch_weak_to_strong"))
    assert pretrained["row"]["backbone_sha256"] == setup.backbone_sha256 and control["row"]["backbone_sha256"] is None
    named = pretrained["row"]["settings"]
    assert {**named, **control["row"]["settings"]} == named
    assert named.keys() - control["row"]["settings"].keys() == {"warmup_head_steps", "backbone_learning_rate_factor"}


class Killed(BaseException):
    """Ends a trial at once, like the loss of a machine."""


@pytest.mark.parametrize("mode", ["fine_tune", "prototype_self_training"])
def test_a_killed_and_resumed_trial_is_bitwise_equal(make: Make, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    setup = make(
        steps=60,
        batch_size=1,
        curve_steps=20,
        warmup_head_steps=30,
        confidence_threshold=0.4,
        self_training_rounds=2,
        self_training_fraction=0.3,
        self_training_min_change=0.0,
    )
    trial, lines = final(setup, mode), list[str]()
    whole = run(setup, trial)
    monkeypatch.setattr(saved_training, "SAVE_INTERVAL_S", 0.0)
    save = SavedTraining.save

    def save_and_die(self: SavedTraining, state: TrainingState) -> None:
        save(self, state)
        raise Killed

    monkeypatch.setattr(SavedTraining, "save", save_and_die)
    Storage(setup.storage).delete("trials")
    for _ in range(2):  # after 25 and 50 steps: within and after the head's warm-up
        with pytest.raises(Killed):
            run_trial(setup, trial, device="cpu", say=lines.append)
    resumed = run_trial(setup, trial, device="cpu", say=lines.append).to_json()
    assert [line for line in lines if "resumes" in line] == [
        f"{trial.id} | resumes after step {step}/60" for step in (25, 50)
    ]
    assert equal(weights(setup, whole), weights(setup, resumed))
    if mode == "prototype_self_training":  # saved within the second round, and after the last one
        told = whole["row"]["pseudo_labels"]["rounds"]
        assert [one["step"] for one in told] == [0, 18] and told[-1]["ended_at_step"] == 36
    for result in (whole, resumed):
        del result["seconds"], result["row"]["seconds"]
    assert resumed == whole
    assert [point["step"] for point in whole["row"]["curve"]] == [20, 40, 60]
    assert Storage(setup.storage).list("unfinished") == [], "a finished trial needs no state"


def test_trials_in_slices_of_time_give_the_report_of_one_run(
    write_toy_job: Callable[..., Path], published: dict[str, str], tmp_path: Path
) -> None:
    given = ("kind=finetune", f"finetune.backbone={published['backbone']}", "pretrain=null", "finetune.steps=60")
    modes = (
        "finetune.publish_model=false",
        "finetune.modes=[scratch_weak_to_strong]",
        "finetune.num_labelled=[1]",
        "finetune.batch_size=1",
    )
    rates = "finetune.search.learning_rates={scratch_weak_to_strong: [1.0e-2]}"
    rows, ends = {}, list[str | None]()
    for name, max_seconds in (("whole", None), ("sliced", 0.0)):
        job = read_job(write_toy_job(tmp_path), (*given, *modes, rates, f"storage={tmp_path / name}"))
        while True:
            made = run_job(job, _Slice(torch.device("cpu"), max_seconds), say=lambda line: None)
            ends.append(made.unfinished)
            if made.unfinished is None:
                break
        (rows[name],) = Storage(job.storage).read_json("report/report.json")["rows"]
        del rows[name]["seconds"]
    assert ends == [None, "finetune", "finetune", None], "25 steps, 25 more, the rest"
    assert rows["sliced"] == rows["whole"]


class _Slice(LocalExecutor):
    """Starts its trial regardless of the clock, so that every slice of time has 25 steps."""

    def run_trials(self, trials: Sequence[tuple[TrialSetup, Trial]], *, say: Say) -> list[TrialResult]:
        return [
            attempt(setup, trial, device="cpu", retries=2, say=say, deadline=self._deadline) for setup, trial in trials
        ]


def test_a_damaged_training_state_costs_its_steps_but_not_the_trial(make: Make) -> None:
    setup = make(steps=3)
    trial = final(setup, "fine_tune")
    whole = weights(setup, run(setup, trial))
    for content in (b"", b"not a file of weights", b"\x00" * 64):
        Storage(setup.storage).write_bytes(setup.state_path(trial), content)
        assert equal(whole, weights(setup, run(setup, trial)))


def test_a_row_has_the_number_of_pseudo_labels_per_class(make: Make) -> None:
    setup = make(steps=4, confidence_threshold=0.4)
    told = run(setup, final(setup, "scratch_weak_to_strong"))["row"]["pseudo_labels"]
    assert told["steps"] == [1, 2, 3, 4]
    assert all(0 < share <= 1 for share in told["confident_fraction"])
    assert list(told["class_fractions"]) == ["background", "DISC"]
    assert np.allclose(np.sum(list(told["class_fractions"].values()), axis=0), 1, atol=1e-4)


def test_a_row_warns_of_an_unreachable_threshold(make: Make) -> None:
    setup = make(steps=3)
    lines = list[str]()
    trial = final(setup, "scratch_weak_to_strong", confidence_threshold=0.999)
    told = run_trial(setup, trial, device="cpu", say=lines.append)["row"]["pseudo_labels"]
    assert told["confident_fraction"] == [0.0, 0.0, 0.0] and told["classes_never_found"] == ["background", "DISC"]
    (warning,) = told["warnings"]
    assert warning.startswith("no pixel reached confidence_threshold 0.999, so unlabelled images had no effect")
    assert any(line.endswith(warning) for line in lines)


def test_a_row_has_the_pseudo_labels_of_every_round(make: Make) -> None:
    anywhere = {"plausible_size_factor": 1000.0, "plausible_margin_mm": 100.0, "agreement_views": 2}
    setup = make(
        steps=8, self_training_fraction=0.25, self_training_min_change=0.0, confidence_threshold=0.4, **anywhere
    )
    lines = list[str]()
    row = run_trial(setup, final(setup, "prototype_self_training"), device="cpu", say=lines.append)["row"]
    told = row["pseudo_labels"]["rounds"]
    assert [(one["step"], one["by"]) for one in told] == [(0, "prototypes"), (2, "teacher"), (4, "teacher")]
    assert told[-1]["ended_by"] == "rounds" and told[-1]["ended_at_step"] == 6
    assert 0 < told[0]["counted_fraction"] <= 1 and told[0]["class_fractions"]["DISC"] > 0
    assert told[0]["frames"] == 4 and told[0]["plausible_frames"] > 0
    assert sum("pseudo-labels by prototypes" in line for line in lines) == 1
    named = row["settings"]
    assert named["agreement_views"] == 2 and named["background_prototypes"] == 16
    assert "rounds" not in run(setup, final(setup, "weak_to_strong"))["row"]["pseudo_labels"]


def test_settings_of_self_training_do_not_change_digests_of_other_modes(make: Make) -> None:
    setup = make()
    for mode in MODES:
        settings: Any = final(setup, mode).to_recipe()["settings"] if mode != "prototype" else {}
        of_rounds = {"self_training_rounds", "agreement_views", "plausible_margin_mm"} & settings.keys()
        assert bool(of_rounds) == MODES[mode].has_rounds


def test_unlabelled_scans_of_another_spacing_or_contrast_are_named_and_used(make: Make, copy: Path) -> None:
    setup = make(data=copy, steps=2)
    trial = final(setup, "mean_teacher")
    assert "warnings" not in run(setup, trial)["row"]
    coarse, inverted, *_ = (f"sub-{n:02d}" for n in range(1, 6) if f"sub-{n:02d}" not in trial.subjects)
    for name in (coarse, inverted):
        path = copy / f"images/{name}_T1w.nii.gz"
        image = nibabel.load(path)
        voxels = np.asarray(image.dataobj)
        if name == coarse:
            nibabel.Nifti1Image(voxels[::4, ::4], image.affine @ np.diag([4.0, 4.0, 1.0, 1.0])).to_filename(path)
        else:
            nibabel.Nifti1Image((1000 - voxels).clip(1), image.affine).to_filename(path)
    lines = list[str]()
    Storage(setup.storage).delete("trials")
    row = run_trial(setup, trial, device="cpu", say=lines.append)["row"]
    spacing, contrast = row["warnings"]
    assert f"voxel size than the labelled ones, such as 8 x 8 mm instead of 2 mm: {coarse}_T1w" in spacing
    assert f"like another contrast: {inverted}_T1w" in contrast
    assert sum(line.endswith(row["warnings"][0]) for line in lines) == 1 and " | WARNING: " in "".join(lines)


def test_if_all_patients_are_labelled_their_images_are_also_the_unlabelled_ones(make: Make) -> None:
    setup = make(steps=2, num_labelled=["all"], confidence_threshold=0.4)
    row = run(setup, final(setup, "weak_to_strong"))["row"]
    assert row["pseudo_labels"]["confident_fraction"][0] > 0
    assert row["warnings"] == [
        "no train patient is left without labels: the labelled patients' own images served as the unlabelled ones"
    ]


def test_scans_without_a_label_map_serve_as_unlabelled_ones(make: Make, copy: Path) -> None:
    task = (copy / "task.yaml").read_text().replace("sub-[01-05]", "sub-[01-03]")
    (copy / "labels/sub-04_T1w.nii.gz").unlink()
    found = []
    for choice in ("leave_out", "use"):
        (copy / "task.yaml").write_text(f"{task}unlabelled: {choice}\n")
        setup = make(data=copy, steps=2, num_labelled=["all"], confidence_threshold=0.4)
        trial = final(setup, "weak_to_strong")
        assert trial.subjects == ("sub-01", "sub-02", "sub-03")
        result = run(setup, trial)
        found.append(weights(setup, result))
        assert ("warnings" in result["row"]) == (choice == "leave_out")
    assert not equal(*found)
    recipe = setup.recipe_sha256(trial)
    shutil.copy(copy / "images/sub-01_T1w.nii.gz", copy / "images/sub-09_T1w.nii.gz")
    assert make(data=copy).recipe_sha256(trial) != recipe, "another unlabelled scan is another recipe"
    for other, words in (
        (
            "images/sub-07_T1w.nii.gz",
            "the voxels of .*sub-07_T1w.nii.gz, a scan of the validation or test patient sub-07",
        ),
        ("labels/sub-01_T1w.nii.gz", "holds only 2 different values, all whole numbers, like a label map"),
    ):
        shutil.copy(copy / other, copy / "images/sub-09_T1w.nii.gz")
        with pytest.raises(DataError, match=words):
            make(data=copy)


def test_a_trial_that_cannot_be_compiled_warns_and_runs_uncompiled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/restored/afterwards")
    lines, found = list[str](), []
    for is_asked in (False, True):
        setup = make(steps=2, compile=is_asked)
        trial = final(setup, "weak_to_strong")
        found.append(weights(setup, run_trial(setup, trial, device="cpu", say=lines.append).to_json()))
    assert equal(*found)
    assert any(" | not compiled: no compiler (no-such-compiler) on this machine" in line for line in lines)
