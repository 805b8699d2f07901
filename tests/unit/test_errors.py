"""Messages that hold text from strangers."""

from __future__ import annotations

import pytest

from lora_trainer.errors import MAX_LINE, MAX_LINES, ConfigError, DataError, printable, shown


def test_a_message_does_not_steer_a_terminal_or_break_a_line():
    assert str(DataError("a\x1b[2J\nb\u202e\ud800猫 é")) == "a\\x1b[2J\\nb\\u202e\\ud800猫 é"


def test_a_long_message_keeps_both_ends():
    text = str(DataError("start " + "x" * 10_000 + " end"))
    assert len(text) <= MAX_LINE + 10
    assert text.startswith("start x")
    assert text.endswith("x end")


def test_problems_are_counted_beyond_a_hundred():
    error = ConfigError([f"key{number}: wrong\n" for number in range(MAX_LINES + 1200)])
    assert len(error.problems) == MAX_LINES + 1
    assert error.problems[-1] == "… and 1,200 more"
    assert str(error).count("\n") == MAX_LINES
    assert ConfigError(["a: b"]).problems == ("a: b",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "'x'"),
        (7, "7"),
        ([1, "a"], "[1, 'a']"),
        pytest.param(16**5000, "a whole number of 20,001 bits", id="huge"),
        (None, "None"),
    ],
)
def test_a_value_is_shown_as_it_is(value, text):
    assert shown(value) == text


def test_a_large_or_deep_value_is_shown_in_part():
    deep: list = []
    for _ in range(60):
        deep = [deep] * 9
    for value in ("x" * 10**6, list(range(10**6)), {"a": "x" * 10**6}, deep):
        assert len(shown(value)) < 2000


def test_short_text_stays():
    assert printable("C:\\猫\u3000犬") == "C:\\猫\u3000犬"
