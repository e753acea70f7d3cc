"""The benchmark of portable models, as far as it needs no conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.portable import PortableBench, _Presets
from tests.helpers.presets import PRESETS


def test_what_cannot_be_tried_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr("benchmarks.portable.portable_of", refused)
    row = _Presets.made(tmp_path, PortableBench()).row("dare")
    assert row["preset"] == "dare" and row["refusal"] == "broke: ValueError: two lines"
    assert "worst" not in row and "dare" in PRESETS
