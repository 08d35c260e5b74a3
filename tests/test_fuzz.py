"""A short round of the fuzzer, the same every time; `python tests/fuzz.py` runs for hours."""

import pytest
from fuzz import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_read_is_answered_with_an_error_of_the_projects_own(name, tmp_path):
    assert fuzz(TARGETS[name], tmp_path / "case", examples=20, number=0) > 0
