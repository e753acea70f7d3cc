"""A position in the data, as checkpoints of today and of earlier versions keep it."""

from __future__ import annotations

import json
from dataclasses import asdict

from trainer.data.cursor import Cursor


def test_what_a_checkpoint_keeps_is_the_same_position() -> None:
    cursor = Cursor(3, 1, 7, 2, 5, "digest")
    again = Cursor.of_state(json.loads(json.dumps(asdict(cursor))))
    assert asdict(again) == asdict(cursor)


def test_a_checkpoint_without_streams_calls_the_place_a_window() -> None:
    old = Cursor.of_state({"epoch": 1, "blocks": 7, "window": 2, "before": 5, "plan": "digest"})
    assert asdict(old) == asdict(Cursor(0, 1, 7, 2, 5, "digest"))
    assert asdict(Cursor.of_state({"epoch": 1, "blocks": 7})) == asdict(Cursor(0, 1, 7))


def test_the_next_pass_stays_in_its_window_and_the_next_window_begins_at_its_start() -> None:
    cursor = Cursor(3, 1, 7, 2, 5, "digest")
    assert cursor.next_pass() == Cursor(3, 2) and cursor.next_window() == Cursor(4)
    # Where it is found is no part of what it means, but it must not be kept for other data.
    assert cursor.next_pass().plan == cursor.next_window().plan == ""
