"""A task's subjects -> train, validation and test: by names, or by a seeded rule. A subject is in one split only."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from p2r.config import Section
from p2r.data.subjects import expand_subjects
from p2r.errors import DataError
from p2r.randomness import keyed_number

Split = Literal["train", "validation", "test"]


HELD_OUT: tuple[Split, ...] = ("validation", "test")


Patterns = Annotated[tuple[str, ...], Field(min_length=1)]


def _check_share(share: float) -> float:
    if share <= 0 or (share >= 1 and not share.is_integer()):
        raise ValueError("must be a number of subjects, or a fraction of them between 0 and 1")
    return share


Share = Annotated[float, AfterValidator(_check_share)]


class Splits(Section):
    """Subjects of each split, as names or ranges such as `patient[001-014]`."""

    train: Patterns
    """Subjects from which labelled patients are drawn."""
    validation: Patterns
    """Subjects on which learning rates and the published model are chosen."""
    test: Patterns
    """Subjects that are evaluated once per frozen recipe."""


class SplitRule(Section):
    """Splits by a seeded rule: first test subjects, then validation subjects; the others are for training.

    A subject's position in the draw is a digest of the seed and its own name. Fractions without strata compare the position
    with a bound: sizes are approximate, and adding subjects never moves others. Numbers of subjects, and strata, take the
    first positions: sizes are exact, and an added subject can move another one to another split.
    """

    seed: int = 0
    """Seed of the splits."""
    validation: Share
    """Number of validation subjects, or their fraction, such as 10 or 0.1."""
    test: Share
    """Number of test subjects, or their fraction."""
    stratified: bool = False
    """Take each split from all strata in proportion to their size."""
    leave_out: tuple[str, ...] = ()
    """Subjects that are in no split, as names or ranges."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.test < 1 and self.validation < 1 and self.test + self.validation >= 1:
            raise ValueError(
                f"validation and test take {self.validation:g} + {self.test:g} of the subjects; leave some for training"
            )
        return self


def expand_splits(splits: Splits, path: Path) -> dict[str, tuple[str, ...]]:
    """Return the subjects of each split by name; `path` is the task's file, for messages."""
    patterns: dict[str, tuple[str, ...]] = splits.model_dump()
    owner = assign_owners(patterns, "splits", "test results would include training subjects", path)
    return {split: tuple(sorted(subject for subject in owner if owner[subject] == split)) for split in patterns}


def assign_owners(patterns: Mapping[str, tuple[str, ...]], key: str, reason: str, path: Path) -> dict[str, str]:
    """Return the entry of `key` for each subject; a subject may be in only one entry."""
    owner: dict[str, str] = {}
    for name, subject_patterns in patterns.items():
        try:
            subjects = expand_subjects(subject_patterns)
        except DataError as error:
            raise DataError(f"task {path}: {key}.{name}: {error}") from None
        for subject in subjects:
            if owner.setdefault(subject, name) != name:
                raise DataError(
                    f"task {path}: {subject} is in the {key} {owner[subject]} and {name}: {reason}; keep it in one of them"
                )
    return owner


def split_by_rule(
    rule: SplitRule, subjects: set[str], strata: Mapping[str, str], path: Path, *, known: set[str]
) -> dict[str, tuple[str, ...]]:
    """Return the subjects of each split.

    Args:
        rule: The rule.
        subjects: All labelled subjects of the task.
        strata: Stratum of each subject.
        path: The task's file, for messages.
        known: All subjects that `leave_out` may name.

    Raises:
        DataError: The rule leaves a split without subjects, or names an unknown one.
    """
    try:
        left_out = set(expand_subjects(rule.leave_out))
    except DataError as error:
        raise DataError(f"task {path}: split_rule.leave_out: {error}") from None
    if unknown := sorted(left_out - known):
        raise DataError(
            f"task {path}: split_rule.leave_out names {join_few(unknown)} without any scan; correct the names"
        )
    subjects = subjects - left_out
    if rule.stratified and (without := sorted(subjects - strata.keys())):
        raise DataError(
            f"task {path}: split_rule.stratified needs a stratum for every subject, {join_few(without)} ha"
            f"{'s' if len(without) == 1 else 've'} none; add a stratum, or name the subject in split_rule.leave_out"
        )
    by_bound = not rule.stratified and rule.test < 1
    test = (
        _choose_below(rule.test, subjects, "test", rule)
        if by_bound
        else _choose_first(_count_subjects(rule.test, subjects), subjects, "test", rule, strata)
    )
    validation = (
        _choose_below(rule.validation / (1 - rule.test), subjects - test, "validation", rule)
        if by_bound and rule.validation < 1
        else _choose_first(_count_subjects(rule.validation, subjects), subjects - test, "validation", rule, strata)
    )
    found = {"train": subjects - test - validation, "validation": validation, "test": test}
    if empty := [split for split, members in found.items() if not members]:
        raise DataError(
            f"task {path}: split_rule leaves {', '.join(empty)} without subjects, of {len(subjects)} in total; choose other numbers "
            "of subjects"
        )
    return {split: tuple(sorted(members)) for split, members in found.items()}


def _count_subjects(share: float, subjects: set[str]) -> int:
    return int(share) if share >= 1 else round(share * len(subjects))


def _draw_position(subject: str, split: str, rule: SplitRule) -> float:
    """Return the position of a subject in the draw, in [0, 1), independent of other subjects."""
    return keyed_number(rule.seed, "split", split, subject) / 2**128


def _choose_below(bound: float, pool: set[str], split: str, rule: SplitRule) -> set[str]:
    return {subject for subject in pool if _draw_position(subject, split, rule) < bound}


def _choose_first(number: int, pool: set[str], split: str, rule: SplitRule, strata: Mapping[str, str]) -> set[str]:
    """Choose the first `number` subjects of the pool; if stratified, in proportion to each stratum (largest remainders)."""
    stratum_of = {subject: strata[subject] if rule.stratified else "" for subject in pool}
    members = {
        stratum: sorted(
            (subject for subject in pool if stratum_of[subject] == stratum),
            key=lambda subject: _draw_position(subject, split, rule),
        )
        for stratum in sorted(set(stratum_of.values()))
    }
    number = min(number, len(pool))
    shares = {stratum: number * len(subjects) / len(pool) for stratum, subjects in members.items()}
    by_remainder = sorted(shares, key=lambda stratum: math.floor(shares[stratum]) - shares[stratum])
    one_more = by_remainder[: number - sum(math.floor(share) for share in shares.values())]
    return {
        subject
        for stratum, subjects in members.items()
        for subject in subjects[: math.floor(shares[stratum]) + (stratum in one_more)]
    }


def join_few(names: list[str]) -> str:
    """Return up to five names, and the number of further names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
