from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

BACKBONE = "a9" * 32


def calibration(level: float, num_patients: int) -> dict[str, Any]:
    """The calibration of a row whose model is right as often as its confidence says, but for a part that depends on its Dice."""
    confidence = [None if index < 5 else (index + 0.5) / 15 for index in range(15)]
    figures = {"ece": round(0.6 - level / 2, 4), "brier": 0.3, "ece_whole": 0.01, "brier_whole": 0.02}
    return {
        "num_bins": 15,
        "margin_mm": 10.0,
        **figures,
        "by_subject": {f"patient{index + 101}": figures for index in range(num_patients)},
        "reliability": {
            "num_voxels": [0 if one is None else 1000 for one in confidence],
            "confidence": confidence,
            "accuracy": [None if one is None else one * level for one in confidence],
        },
    }


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    """A function that makes rows as final trials leave them; every mode reads the same draws and patients."""

    def make(
        *,
        modes: tuple[str, ...] = ("scratch", "fine_tune"),
        numbers: tuple[int, ...] = (1, 5),
        num_draws: int = 2,
        num_patients: int = 6,
        classes: tuple[str, ...] = ("RV", "LV"),
        task: str = "acdc",
        gain: float = 0.1,
        seed: int = 0,
        **changes: Any,
    ) -> list[dict[str, Any]]:
        generator = np.random.default_rng(seed)
        hard = generator.normal(0, 0.03, num_patients)
        rows = []
        for number in numbers:
            for draw in range(num_draws):
                labelled = [f"patient{number:02d}{draw}{index}" for index in range(number)]
                for mode in modes:
                    level = 0.5 + 0.05 * np.log(number) + gain * (mode != "scratch")
                    cases: list[dict[str, Any]] = []
                    for index, patient in enumerate(hard):
                        dice = {name: float(level + patient + generator.normal(0, 0.02)) for name in classes}
                        cases.append(
                            {
                                "subject": f"patient{index + 101}",
                                "scan": f"patient{index + 101}_cine",
                                "frame": 0,
                                "stratum": ("NOR", "DCM")[index % 2],
                                "scores": {
                                    name: {"dice": found, "hd95_mm": 9.0, "nsd": 0.5, "absent": "none"}
                                    for name, found in dice.items()
                                },
                                "thirds": {name: [found - 0.1, found, None] for name, found in dice.items()},
                            }
                        )
                    by_class = {
                        name: float(np.mean([case["scores"][name]["dice"] for case in cases])) for name in classes
                    }
                    rows.append(
                        {
                            "task": task,
                            "protocol": "leak_free",
                            "mode": mode,
                            "num_labelled": number,
                            "draw": draw,
                            "subjects": labelled,
                            "seed": 0,
                            "split": "test",
                            "transductive": False,
                            "validation_dice_mean": float(np.mean(list(by_class.values()))),
                            "backbone_sha256": None if mode == "scratch" else BACKBONE,
                            "code": "7c0de",
                            "dice": by_class,
                            "dice_mean": float(np.mean(list(by_class.values()))),
                            "dice_by_subject": {
                                case["subject"]: float(np.mean([score["dice"] for score in case["scores"].values()]))
                                for case in cases
                            },
                            "hd95_mm": 9.0,
                            "nsd": 0.5,
                            "absent": {},
                            "num_test_subjects": num_patients,
                            "num_scans": num_patients,
                            "cases": cases,
                            "calibration": calibration(level, num_patients),
                            "seconds": 61.0,
                            "device": "cpu",
                            **changes,
                        }
                    )
        return rows

    return make
