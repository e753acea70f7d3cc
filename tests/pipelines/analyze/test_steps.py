"""What is said of configs that were trained for different numbers of steps."""

from __future__ import annotations

from pipelines.analyze.steps import steps_apart


def test_steps_are_said_where_they_differ() -> None:
    assert steps_apart({"a": [300, 300], "b": [300]}) == ""
    said = steps_apart({"a": [1125], "b": [300, 400]})
    assert said == " (steps trained: a 1,125 against b 300 to 400)"
