"""A minute of fuzzing: readers refuse what they cannot read, and never fail otherwise."""

import signal

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis")

import fuzz
from hypothesis import strategies as st


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_no_uncaught_error():
    for name, found in fuzz.fuzz(60).items():
        assert found.count and not found.errors, f"{name}: {found.errors}"


def endless(_):
    while True:
        pass


def interrupted(_):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("target", "errors", "words"),
    [
        (lambda number: [][number], 2, "IndexError"),
        (endless, 2, "took more than 0.2 seconds"),
        (interrupted, 0, ""),
        (lambda _: int("x"), 0, ""),
    ],
)
def test_what_is_no_refusal_is_found_and_told(monkeypatch, target, errors, words):
    monkeypatch.setattr(fuzz, "targets", lambda: {"one": (st.just(0), target)})
    monkeypatch.setattr(fuzz, "SLOW", 0.2)
    monkeypatch.setattr(fuzz, "MOST_ERRORS", 2)
    told = []
    found = fuzz.fuzz(60 if errors else 0.1, tell=told.append)["one"]
    assert found.count and len(found.errors) == errors and all(words in error for error in found.errors)
    assert told == [f"{found.count:8} one            {errors or 'no'} errors"]
