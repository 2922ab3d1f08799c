"""Ranges of subjects, such as `patient[001-014]`."""

import pytest

from p2r.data.scans import expand_subjects
from p2r.errors import DataError


def test_ranges_expand_like_slurms_host_lists() -> None:
    assert expand_subjects(["patient[001-003]"]) == ["patient001", "patient002", "patient003"]
    assert expand_subjects(["p[8-11]"]) == ["p8", "p9", "p10", "p11"]
    assert expand_subjects(["p[098-101,007]x"]) == ["p098x", "p099x", "p100x", "p101x", "p007x"]
    assert expand_subjects(["a[1-2]b[1-2]"]) == ["a1b1", "a1b2", "a2b1", "a2b2"]
    assert expand_subjects(["sub-01", "sub-[01-02]", "plain"]) == ["sub-01", "sub-02", "plain"]
    assert expand_subjects([]) == []


@pytest.mark.parametrize("pattern", ["p[3-1]", "p[1-2", "p1-2]", "p[]", "p[a-b]", "p[[1-2]]", "p[1-]", "", "p[1 2]"])
def test_broken_ranges_are_refused_by_name(pattern: str) -> None:
    with pytest.raises(DataError, match="subjects"):
        expand_subjects(["fine", pattern])


@pytest.mark.parametrize(
    "pattern", ["p[0-1000000000000]", "p[0-9999][0-9999][0-9999]", "p[" + "1" * 5000 + "]", "p[1-900000,1-900000]"]
)
def test_ranges_of_too_many_names_are_refused(pattern: str) -> None:
    with pytest.raises(DataError, match=r"expands to more than 1,000,000 names|neither a number nor a range"):
        expand_subjects([pattern])
