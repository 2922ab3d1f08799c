"""A segmenter of several contrasts -> its scores on patients of whom only some contrasts are given.

Patients and weights stay the same; only the images change: the channels of the withheld contrasts are zero. A case
that has none of the given contrasts is left out, and the number of patients is stated.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from p2r.contrasts import find_present
from p2r.data.preprocess import Preparation
from p2r.evaluate.rows import ContrastRow
from p2r.evaluate.tasks import Task
from p2r.fewshot.scoring import Case, score_cases


def score_subsets(
    segmenter: nn.Module,
    cases: Callable[[], Iterable[Case]],
    task: Task,
    preparation: Preparation,
    *,
    subsets: Sequence[Sequence[str]],
    largest_component: bool,
    device: str,
) -> list[ContrastRow]:
    """Score a segmenter with each subset of contrasts.

    Args:
        segmenter: Segmenter on `device`.
        cases: Function -> the cases.
        task: Task of the cases.
        preparation: Preparation of scans for the segmenter.
        subsets: Contrasts that are given, by subset.
        largest_component: Keep only the largest connected component of each predicted class.
        device: Device of the segmenter.
    """
    rows = []
    for subset in subsets:
        scored = score_cases(
            segmenter,
            _with_contrasts(cases(), subset, preparation),
            task,
            preparation,
            nsd_tolerance_mm=None,
            largest_component=largest_component,
            device=device,
        )
        summary = scored.summary
        rows.append(
            ContrastRow(
                contrasts=list(subset),
                num_subjects=summary.num_test_subjects,
                dice_mean=summary.dice_mean,
                dice=summary.dice,
                dice_by_subject=summary.dice_by_subject,
            )
        )
    return rows


def _with_contrasts(cases: Iterable[Case], subset: Sequence[str], preparation: Preparation) -> Iterator[Case]:
    """Yield the cases that have a contrast of the subset, without the others."""
    names = preparation.contrasts or ()
    withheld = [index for index, name in enumerate(names) if name not in subset]
    for case in cases:
        images = case.images.images.clone()
        images[:, withheld] = 0
        if find_present(images).any():
            yield replace(case, images=replace(case.images, images=images))
