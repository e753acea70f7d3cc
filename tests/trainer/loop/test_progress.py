"""What a user sees of how far a run is."""

from __future__ import annotations

import io
from itertools import count

import pytest

import trainer.loop.progress
from trainer.loop.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, speaks: bool = True) -> str:
    """Four reports, 4 seconds apart."""
    ticks = count(0, 4)
    monkeypatch.setattr(trainer.loop.progress.time, "monotonic", lambda: float(next(ticks)))
    with Progress("train", speaks, stream) as bar:
        for done in (0.0, 0.25, 0.5):
            bar.show(done, f"step {done}")
        bar.show(1.0, "the end", last=True)
    return stream.getvalue()


def test_elsewhere_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch).splitlines() == [
        "train [######..................]  25% step 0.25 0:12 left",
        "train [########################] 100% the end 0:00 left",
    ]


def test_a_terminal_has_every_report_and_one_line_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch)
    for part in ("step 0.25", "step 0.5", "train [########################] 100% the end 0:00 left"):
        assert part in text
    assert text.count("\n") < 3


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch, speaks=False) == ""
    assert shown(Terminal(), monkeypatch, speaks=False) == ""
