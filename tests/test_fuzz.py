"""A minute of fuzzing: readers refuse what they cannot read, and never fail otherwise."""

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis")

from fuzz import fuzz


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_no_uncaught_error():
    assert all(fuzz(60).values())
