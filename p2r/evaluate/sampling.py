"""Training patients of a task -> the labelled patients of one draw: a pure function of seed, number and index."""

import math
from collections.abc import Mapping, Sequence

from p2r.errors import DataError
from p2r.randomness import keyed_generator


def draw_subjects(
    train_subjects: Sequence[str], *, num_labelled: int, draw: int, seed: int, strata: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Choose the labelled patients of one draw, sorted by name.

    Args:
        train_subjects: Patients to choose from.
        num_labelled: Number of patients to choose.
        draw: Index of the draw.
        seed: Seed of the draws.
        strata: Stratum of each patient, for a draw in proportion to the strata; None: an unstratified draw.

    Raises:
        DataError: if there are fewer than `num_labelled` training patients, or one of them has no stratum.
    """
    available = sorted(set(train_subjects))
    if not 1 <= num_labelled <= len(available):
        raise DataError(
            f"{num_labelled} labelled patients were requested, but the task's train split has {len(available)}: "
            f"finetune.num_labelled and finetune.search.num_labelled must be between 1 and {len(available)}"
        )
    if strata is None:
        generator = keyed_generator(seed, "labelled", num_labelled, draw)
        chosen = generator.choice(len(available), size=num_labelled, replace=False)
        return tuple(available[index] for index in sorted(chosen.tolist()))
    if lacking := [subject for subject in available if subject not in strata]:
        raise DataError(
            f"finetune.stratify needs a stratum for every patient of the train split, {lacking[0]} has none "
            f"({len(lacking)} of {len(available)} lack one): name strata in the task, or leave stratify out"
        )
    generator = keyed_generator(seed, "stratified", num_labelled, draw)
    members = {
        stratum: [subject for subject in available if strata[subject] == stratum]
        for stratum in sorted({strata[subject] for subject in available})
    }
    # Largest remainder method. Ties are broken at random, as for one patient among equal strata.
    shares = {stratum: num_labelled * len(subjects) / len(available) for stratum, subjects in members.items()}
    order = [list(members)[index] for index in generator.permutation(len(members))]
    order.sort(key=lambda stratum: math.floor(shares[stratum]) - shares[stratum])
    missing = num_labelled - sum(math.floor(share) for share in shares.values())
    found: list[str] = []
    for stratum, subjects in members.items():
        count = math.floor(shares[stratum]) + (stratum in order[:missing])
        found += [subjects[index] for index in generator.choice(len(subjects), size=count, replace=False)]
    return tuple(sorted(found))
