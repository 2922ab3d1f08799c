"""The protocol on small real files: influence of labels, number of reads, and failing trials."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load

import p2r
import p2r.__main__ as one_process
import p2r.fewshot.search as fewshot
from p2r.backbone import load_model
from p2r.config import FinetuneConfig
from p2r.data.volume import read_volume
from p2r.errors import DamagedError, JobError
from p2r.evaluate.calibration import near_organs
from p2r.evaluate.inference import predict_volume
from p2r.evaluate.models import ensemble
from p2r.evaluate.tasks import load_task
from p2r.fewshot.protocol import Settings, Trial, final_trials, settings_of
from p2r.fewshot.publishing import choose_model, publish_best, publish_other_draws, reason_for
from p2r.fewshot.readings import merge_readings
from p2r.fewshot.results import FewShot, SearchedTrial, TrialResult
from p2r.fewshot.search import attempt, few_shot
from p2r.fewshot.setup import TrialSetup
from p2r.fewshot.trial import run_trial
from p2r.pipeline.local import LocalExecutor
from p2r.storage import Storage

Make = Callable[..., TrialSetup]


def run(*setups: TrialSetup) -> FewShot:
    return few_shot(setups, runner=LocalExecutor(torch.device("cpu"), None), say=lambda line: None)


def final(setup: TrialSetup, mode: str, **settings: float) -> Trial:
    chosen = settings_of(setup.config, mode, {"learning_rate": 1e-2, **settings})
    config = setup.config.model_copy(update={"modes": (mode,)})
    return final_trials(config, load_task(Path(setup.task)), {mode: chosen})[0]


def test_the_published_model_is_the_best_fine_tuned_one_or_the_best_of_all() -> None:
    def result(mode: str, dice: float | None) -> TrialResult:
        facts = {"id": mode, "task": "t", "mode": mode, "protocol": "leak_free", "num_labelled": 1, "draw": 0}
        trial = {**facts, "subjects": ["a"], "settings": {}}
        return TrialResult.model_validate({"trial": trial, "validation": {"dice_mean": dice}})

    found = {"scratch": 0.9, "linear_probe": 0.3, "fine_tune": 0.6, "weak_to_strong": 0.7}
    results = [result(mode, dice) for mode, dice in found.items()]

    def published(mode: str, among: list[TrialResult]) -> tuple[str, str]:
        config = FinetuneConfig.model_validate({"tasks": ["t.yaml"], "published_mode": mode})
        best = choose_model(config, among)
        return best.trial.mode, reason_for(config, best, among).removeprefix("the best validation Dice ")

    assert published("fine_tuned", results) == ("weak_to_strong", "(0.700) of 2 fine-tuned models")
    assert published("any", results) == ("scratch", "(0.900) of 4 models")
    assert published("fine_tuned", results[:1]) == (
        "scratch",
        "validation Dice 0.900; no other model was compared",
    ), "nothing was fine-tuned"
    assert published("fine_tuned", [result("fine_tune", None), results[3]])[0] == "weak_to_strong"


def weights(setup: TrialSetup, result: TrialResult) -> dict[str, torch.Tensor]:
    return load(Storage(setup.storage).read_bytes(result["weights"]))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relabel(data: Path, subjects: list[str]) -> None:
    """Replace the labels of these subjects by wrong but valid ones."""
    for subject in subjects:
        path = data / f"labels/{subject}_T1w.nii.gz"
        image = nibabel.load(path)
        wrong = np.roll(np.asarray(image.dataobj), 3, axis=0) ^ 1
        nibabel.Nifti1Image(wrong.astype(np.int16), image.affine).to_filename(path)


# fine_tune is a part of mean_teacher, and both modes of weak_to_strong are parts of prototype_self_training
MODES = ["scratch", "linear_probe", "mean_teacher", "prototype_self_training", "prototype"]


@pytest.mark.parametrize("options", [{}, {"probe_augmentation": "none", "planes": "centre", "largest_component": True}])
def test_labels_of_test_patients_change_only_the_final_scores(
    make: Make, copy: Path, published: dict[str, str], options: dict[str, Any]
) -> None:
    rates = {mode: [1e-2, 2e-2] for mode in MODES[:-1]}
    values: dict[str, Any] = {"modes": MODES, "search": {"learning_rates": rates}, **options}
    true = make(data=copy, storage="true", **values)
    honest = run(true)
    relabel(copy, ["sub-07", "sub-08"])
    poisoned = make(data=copy, storage="poisoned", **values)
    misled = run(poisoned)

    def without_clocks(found: list[SearchedTrial]) -> list[SearchedTrial]:
        return [row.replaced(seconds=None) for row in found]

    assert len(honest.searched) == 8 and without_clocks(honest.searched) == without_clocks(misled.searched)
    assert honest.chosen == misled.chosen
    assert [result["row"]["mode"] for result in honest.results] == MODES
    for ours, theirs in zip(honest.results, misled.results, strict=True):
        assert equal(weights(true, ours), weights(poisoned, theirs))
        assert ours["validation"] == theirs["validation"] and ours["train_loss"] == theirs["train_loss"]
        predictions = [
            Storage(setup.storage).read_bytes(result["row"]["predictions"])
            for setup, result in ((true, ours), (poisoned, theirs))
        ]
        assert predictions[0] == predictions[1]
        assert ours["row"]["cases"] != theirs["row"]["cases"]
    models = [
        publish_best(
            setup, found.results, p2r.load_backbone(published["backbone"]), Storage(setup.root).child("models")
        )
        for setup, found in ((true, honest), (poisoned, misled))
    ]
    assert len({model["files"]["weights"]["sha256"] for model in models}) == 1


def test_a_frozen_recipe_reads_the_test_patients_once_and_a_changed_recipe_again(make: Make) -> None:
    first, other = make(), make(batch_size=3)
    storage = Storage(first.root)
    row = run(first).results[0]["row"]
    (reading,) = merge_readings(storage)
    assert reading["trial"] == row["id"] and reading["num_scans"] == row["num_scans"] == 2
    assert reading["recipe_sha256"] == first.recipe_sha256(final(first, "scratch"))
    assert run(first).results[0]["row"] == row
    assert merge_readings(storage) == [reading]
    run(other)
    assert len(merge_readings(storage)) == 2
    lines = storage.read_bytes("report/test_reads.jsonl").decode().splitlines()
    assert reading.to_json() in [json.loads(line) for line in lines] and len(lines) == 2
    # A trial that crashed between reading and writing reads again; both readings are kept.
    Storage(first.storage).delete(first.result_path(final(first, "scratch")))
    run(first)
    assert [found["recipe_sha256"] for found in merge_readings(storage)].count(reading["recipe_sha256"]) == 2


@pytest.mark.parametrize(
    "changes", [{"batch_size": 3}, {"foreground_share": 0.5}, {"seed": 1}, {"spacing_mm": 1.5}, {"image_size": 48}]
)
def test_a_changed_setting_of_the_training_is_another_recipe(make: Make, changes: dict[str, Any]) -> None:
    first, other = make(), make(**changes)
    assert first.result_path(final(first, "scratch")) != other.result_path(final(other, "scratch"))


def test_from_scratch_depends_only_on_the_backbones_shape(make: Make) -> None:
    first = make()
    (scratch,) = run(first).results
    other_weights = replace(first, backbone_sha256="0" * 64)
    assert other_weights.result_path(final(first, "scratch")) == first.result_path(final(first, "scratch"))
    assert run_trial(other_weights, final(first, "scratch"), device="cpu") == scratch
    other_shape = replace(first, architecture_sha256="0" * 64)
    assert other_shape.result_path(final(first, "scratch")) != first.result_path(final(first, "scratch"))
    for mode in ("linear_probe", "fine_tune"):
        assert other_weights.result_path(final(first, mode)) != first.result_path(final(first, mode))
    # Its row's label depends on the subjects of the backbone's corpus.
    allowed = make(allow_transductive=True)
    labelled = replace(allowed, backbone_sha256="0" * 64)
    assert labelled.result_path(final(allowed, "scratch")) != allowed.result_path(final(allowed, "scratch"))


def test_validation_scores_read_no_test_patient(make: Make, copy: Path) -> None:
    setup = make(data=copy, score_on="validation")
    for path in (*copy.glob("*/sub-07*"), *copy.glob("*/sub-08*")):
        path.write_bytes(b"")
    (result,) = run(setup).results
    assert result["row"]["split"] == "validation"
    assert merge_readings(Storage(setup.root)) == []


def test_a_recipe_chosen_on_validation_patients_is_evaluated_on_test_patients_without_a_second_training(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"modes": ["scratch"], "curve_steps": 2}
    direct = run(make(storage="direct", **values)).results[0]
    chosen = run(make(storage="two", score_on="validation", **values)).results[0]
    frozen = make(storage="two", **values)
    trial = final(frozen, "scratch")
    kept = Storage(frozen.storage).read_bytes(chosen["weights"])
    Storage(frozen.storage).write_bytes(chosen["weights"], kept[:-8])
    with pytest.raises(DamagedError, match=r"does not contain the weights of trial .*-scratch-n1-d0: .*; delete"):
        run_trial(frozen, trial, device="cpu")
    Storage(frozen.storage).write_bytes(chosen["weights"], kept)
    assert merge_readings(Storage(frozen.root)) == [], "nothing was evaluated so far"

    monkeypatch.setattr("p2r.fewshot.trial._train", lambda *args, **options: pytest.fail("it was trained again"))
    lines: list[str] = []
    found = run_trial(frozen, trial, device="cpu", say=lines.append)
    assert any("already trained" in line for line in lines)
    assert found.seconds is not None and found.seconds > chosen["seconds"]
    reused = {**found.to_json()["row"], "seconds": None, "predictions": None}
    assert reused.pop("training_code") == chosen["row"]["code"]
    assert reused == {**direct["row"], "seconds": None, "predictions": None}
    assert equal(weights(frozen, found), weights(frozen, chosen))
    (reading,) = merge_readings(Storage(frozen.root))
    assert reading.recipe_sha256 == frozen.recipe_sha256(trial)


def test_a_row_holds_every_case_with_its_scores_and_prediction(make: Make, toy_data: Path) -> None:
    setup = make(steps=12, batch_size=4)
    row = run(setup).results[0]["row"]
    assert (
        row["protocol"] == "leak_free"
        and row["transductive"] is False
        and row["device"] == "cpu"
        and row["seconds"] > 0
    )
    assert row["settings"] == {"learning_rate": 1e-2, "steps": 12, "weight_decay": 1e-4}
    assert [(case["subject"], case["frame"], case["stratum"]) for case in row["cases"]] == [
        ("sub-07", 0, None),
        ("sub-08", 0, None),
    ]
    content = Storage(setup.storage).local(row["predictions"])
    with np.load(content, allow_pickle=False) as predictions:
        for case in row["cases"]:
            found = predictions[case["scan"]]
            assert found.dtype == np.uint8
            truth = np.asarray(nibabel.load(toy_data / f"labels/{case['scan']}.nii.gz").dataobj)[
                ::-1, ::-1
            ]  # LPS -> RAS
            assert found.shape == (*truth.shape, 1)
            both, sizes = (found[..., 0] & (truth > 0)).sum(), found.sum() + truth.sum()
            assert case["scores"]["DISC"]["dice"] == pytest.approx(2 * both / sizes, abs=1e-6)
            assert len(case["thirds"]["DISC"]) == 3
    assert row["dice_mean"] == pytest.approx(np.mean([case["scores"]["DISC"]["dice"] for case in row["cases"]]))


def test_a_row_has_the_calibration_of_its_model(make: Make, toy_data: Path) -> None:
    setup = make(steps=12, batch_size=4, planes="centre", modes=["scratch", "prototype"])
    found = [result for result in run(setup).results if "calibration" not in result["validation"]]
    assert len(found) == 2
    for result in found:
        row = result["row"]
        calibration = row["calibration"]
        assert list(calibration["by_subject"]) == ["sub-07", "sub-08"]
        assert 0 < calibration["ece"] < 1 and 0 < calibration["brier_whole"] < 2
        right, number = 0, 0
        with np.load(Storage(setup.storage).local(row["predictions"]), allow_pickle=False) as predictions:
            for name in predictions:
                truth = np.asarray(nibabel.load(toy_data / f"labels/{name}.nii.gz").dataobj)[::-1, ::-1, :, None]
                near = near_organs(truth, (2.0, 2.0, 8.0))
                right += (predictions[name] == truth)[near].sum()
                number += near.sum()
        curve = calibration["reliability"]
        assert sum(curve["num_voxels"]) == number
        accuracy = sum(n * (a or 0) for n, a in zip(curve["num_voxels"], curve["accuracy"], strict=True))
        assert accuracy == pytest.approx(right), "probabilities and references have the same grid"


def make_again(setup: TrialSetup, trial: Trial) -> dict[str, torch.Tensor]:
    Storage(setup.storage).delete("trials")
    return weights(setup, run_trial(setup, trial, device="cpu"))


def test_the_backbone_is_frozen_while_the_head_warms_up(make: Make, published: dict[str, str]) -> None:
    setup = make(steps=3)
    backbone = p2r.load_backbone(published["backbone"]).network.state_dict()

    def moved(**settings: float) -> float:
        found = weights(setup, run_trial(setup, final(setup, "fine_tune", **settings), device="cpu"))
        return max(float((found[f"backbone.{name}"] - value).abs().max()) for name, value in backbone.items())

    assert moved(warmup_head_steps=3) == 0
    assert 0 < moved(warmup_head_steps=2) < moved()
    assert 0 < moved(backbone_learning_rate_factor=0.1) < 0.2 * moved()


def test_probes_without_augmentation_share_features_computed_once(make: Make, tmp_path: Path) -> None:
    setup = make(modes=["linear_probe"], probe_augmentation="none", steps=30, batch_size=3)
    trial = final(setup, "linear_probe")
    first = run_trial(setup, trial, device="cpu")
    kept = {path: path.stat().st_ino for path in (tmp_path / "cache/prepared").iterdir()}
    slower = final(setup, "linear_probe", weight_decay=0.1)
    second = run_trial(setup, slower, device="cpu")
    assert {path: path.stat().st_ino for path in (tmp_path / "cache/prepared").iterdir()} == kept
    assert first["row"]["dice_mean"] > 0.5 and second["weights"] != first["weights"]
    shutil.rmtree(tmp_path / "cache/prepared")
    assert equal(weights(setup, first), make_again(setup, trial))


def test_prototypes_segment_without_training_and_are_published(make: Make, toy_data: Path, tmp_path: Path) -> None:
    setup = make(modes=["prototype"], num_labelled=["all"], prototypes_per_class=2, background_prototypes=3)
    results = run(setup).results
    assert results[0]["row"]["num_labelled"] == 5 and results[0]["row"]["learning_rate"] is None
    assert results[0]["train_loss"] is None and results[0]["row"]["dice_mean"] > 0.5
    backbone = p2r.load_backbone(setup.backbone)
    manifest = publish_best(setup, results, backbone, Storage(str(tmp_path / "models")))
    segmenter, config, _ = load_model(manifest["url"])
    assert config.num_prototypes == (3, 2) * 4 and config.prototype_smoothing_pixels == 2.0
    found = predict_volume(
        segmenter, read_volume(toy_data / "images/sub-07_T1w.nii.gz"), preparation=config.preparation, num_classes=2
    )
    with np.load(Storage(setup.storage).local(results[0]["row"]["predictions"]), allow_pickle=False) as predictions:
        assert np.array_equal(found, predictions["sub-07_T1w"])


def test_models_of_finer_pixels_than_the_backbones_are_trained_and_published(make: Make, tmp_path: Path) -> None:
    setup = make(modes=["prototype"], num_labelled=["all"], spacing_mm=1.25, image_size=48)
    results, backbone = run(setup).results, p2r.load_backbone(setup.backbone)
    assert (backbone.preparation.spacing_mm, backbone.preparation.image_size) == (2.0, 32)
    manifest = publish_best(setup, results, backbone, Storage(str(tmp_path / "models")))
    preparation = load_model(manifest["url"])[1].preparation
    assert (preparation.spacing_mm, preparation.image_size) == (1.25, 48)
    assert results[0]["row"]["dice_mean"] > 0.5


def test_the_other_draws_of_the_best_model_are_published_for_an_ensemble(make: Make, tmp_path: Path) -> None:
    setup = make(modes=["scratch", "prototype"], draws=3, num_labelled=[1, 2])
    results, backbone = run(setup).results, p2r.load_backbone(setup.backbone)
    storage = Storage(str(tmp_path / "models"))
    best = publish_best(setup, results, backbone, storage)
    others = publish_other_draws(setup, results, backbone, storage)
    models = [p2r.load_model(manifest["url"]) for manifest in (best, *others.values())]
    trials = [model.manifest["trial"] for model in models]
    assert sorted(trial["draw"] for trial in trials) == [0, 1, 2] == sorted([best["trial"]["draw"], *others])
    assert len({(trial["mode"], trial["num_labelled"]) for trial in trials}) == 1
    assert len(ensemble(models).manifest["members"]) == 3


def test_paper_compat_is_labelled_and_pastes_predictions_back(make: Make) -> None:
    setup = make(protocol="paper_compat", modes=["scratch", "prototype"], steps=12, batch_size=4)
    found = run(setup)
    for result in found.results:
        row = result["row"]
        assert row["protocol"] == "paper_compat" and "paper_compat" in row["id"]
        assert 0 < row["soft_dice_with_background"] < 1
        with np.load(Storage(setup.storage).local(row["predictions"]), allow_pickle=False) as predictions:
            assert {predictions[name].shape for name in predictions} == {(36, 40, 3, 1)}
    assert result["validation"]["num_scans"] == 1  # a slice of the labelled patient
    assert {case["subject"] for case in found.results[0]["row"]["cases"]} == {"sub-07", "sub-08"}


def test_a_diverging_trial_is_listed_and_the_others_continue(make: Make) -> None:
    search = {"learning_rates": {"scratch": [1e-2, 1e30], "fine_tune": [1e30, 1e31]}}
    setup = make(modes=["scratch", "fine_tune"], steps=4, search=search)
    found = run(setup)
    assert [result["row"]["mode"] for result in found.results] == ["scratch"]
    assert found.results[0]["row"]["learning_rate"] == 1e-2
    assert [failure["trial"] for failure in found.failed] == ["disc-final-fine_tune-n1-d0"]
    assert (
        "no candidate of its search has a result: trial disc-search-fine_tune-n1-d0-lr1e+30 diverged: the loss is nan"
        in (found.failed[0]["reason"])
    )
    assert [row["failed"] is None for row in found.searched] == [True, False, False, False]
    rises = make(modes=["scratch"], steps=30, search={"learning_rates": {"scratch": [1e3]}})
    result = attempt(rises, final(rises, "scratch", learning_rate=1e3), device="cpu", retries=0, say=print)
    assert "diverged: the loss rose from" in result["failed"]


def test_failed_trials_are_retried_and_then_listed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make()
    lines: list[str] = []
    calls: list[int] = []

    def flaky(*_: Any, **__: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("the disk blinked")
        return {"done": True}

    monkeypatch.setattr(fewshot, "run_trial", flaky)
    options: dict[str, Any] = {"device": "cpu", "say": lines.append}
    assert attempt(setup, final(setup, "scratch"), retries=2, **options) == {"done": True}
    calls.clear()
    assert attempt(setup, final(setup, "scratch"), retries=1, **options)["failed"] == "RuntimeError: the disk blinked"
    assert len(calls) == 2 and "attempt 2 of 2 failed: RuntimeError: the disk blinked" in lines[-1]


def test_the_report_has_the_search_and_its_cost(make: Make) -> None:
    setup = make(search={"learning_rates": {"scratch": [1e-3, 1e-2]}})
    found = run(setup)
    assert [row["settings"]["learning_rate"] for row in found.searched] == [1e-3, 1e-2]
    assert all(0 <= row["validation_dice_mean"] <= 1 and row["seconds"] > 0 for row in found.searched)
    assert found.chosen[0]["by"] == "search"
    assert found.overhead["num_trials"] == 3 and found.overhead["num_concurrent"] == 1
    assert -0.05 < found.overhead["overhead_fraction"] < 2
    again = run(setup)
    assert again.overhead == found.overhead, "nothing ran, so the recorded cost is kept"
    assert again.chosen == found.chosen and again.results == found.results


def test_a_search_algorithm_of_tune_needs_ray(make: Make) -> None:
    with pytest.raises(
        JobError, match=r"searcher 'optuna' is a search algorithm of Ray Tune: run the job with p2r run"
    ):
        run(make(search={"searcher": "optuna"}))


def test_settings_of_a_mode_are_its_own() -> None:
    config = FinetuneConfig(tasks=("a",))
    assert settings_of(config, "scratch", {"learning_rate": 1}) == Settings(
        learning_rate=1.0, weight_decay=1e-4, steps=300
    )
    assert settings_of(config, "mean_teacher", {"learning_rate": 1, "ema_decay": 0.5}).ema_decay == 0.5


def test_a_resumed_sweep_has_the_same_report(make: Make) -> None:
    values: dict[str, Any] = {"num_labelled": [1, 2], "search": {"learning_rates": {"scratch": [1e-3, 1e-2]}}}
    whole = run(make(storage="whole", **values))
    cut = make(storage="cut", **values)
    for stops_at in (1, 2, 3):

        def stop(line: str, stops_at: int = stops_at) -> None:
            if f"{stops_at}/2 | disc-search" in line or (stops_at == 3 and "1/2 | disc-final" in line):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            few_shot([cut], runner=LocalExecutor(torch.device("cpu"), None), say=stop)
    resumed = run(cut)

    def rows(found: FewShot) -> list[dict[str, Any]]:
        return [{key: value for key, value in result["row"].items() if key != "seconds"} for result in found.results]

    assert rows(resumed) == rows(whole) and resumed.chosen == whole.chosen
    assert resumed.overhead["num_trials"] == 1


def test_the_report_omits_failed_trials_and_the_exit_code_reports_them(
    write_toy_job: Callable[..., Path],
    published: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = (
        *("kind=finetune", f"finetune.backbone={published['backbone']}", "pretrain=null"),
        *("finetune.modes=[scratch, linear_probe]", "finetune.num_labelled=[1]", "finetune.steps=2"),
        "finetune.search.learning_rates.scratch=[1.0e+30]",
    )
    arguments = [word for override in overrides for word in ("--set", override)]
    monkeypatch.setattr(sys, "argv", ["p2r", str(write_toy_job(tmp_path)), *arguments])
    monkeypatch.setattr("p2r.fewshot.trial_outcome.code_version", lambda: "ran-by")
    monkeypatch.setattr("p2r.pipeline.reporting.code_version", lambda: "reported-by")
    assert one_process.main() == 1
    said = capsys.readouterr()
    assert "p2r: 1 trial failed; the report has the others; run the job again" in said.err
    assert "disc-final-scratch-n1-d0: trial disc-final-scratch-n1-d0 diverged" in said.err
    report = json.loads((tmp_path / "storage/report/report.json").read_text())
    assert [row["mode"] for row in report["rows"]] == ["linear_probe"]
    assert report["context"]["failed"][0]["trial"] == "disc-final-scratch-n1-d0"
    pretrained_by = p2r.load_backbone(published["backbone"]).manifest["code"]
    codes = (report["rows"][0]["code"], report["context"]["code"], report["context"]["backbone"]["code"])
    assert codes == ("ran-by", "reported-by", pretrained_by)
    assert [reading["trial"] for reading in report["context"]["test_reads"]] == ["disc-final-linear_probe-n1-d0"]

    monkeypatch.setattr(
        sys, "argv", [*sys.argv, "--set", "finetune.modes=[scratch]", "--set", f"storage={tmp_path}/none"]
    )
    assert one_process.main() == 1
    report = json.loads((tmp_path / "none/report/report.json").read_text())
    assert report["rows"] == [] and report["context"]["failed"][0]["trial"] == "disc-final-scratch-n1-d0"
    assert "There are no results." in (tmp_path / "none/report/report.md").read_text()
