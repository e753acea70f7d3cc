"""The verb that analyses runs hands over what it was given."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.analysis_verbs import SECTION_NAMES
from launch.cli import main
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.sections import SECTIONS


def test_the_help_names_all_sections() -> None:
    assert list(SECTIONS) == list(SECTION_NAMES)


def test_arguments_arrive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = []
    module = ModuleType("pipelines.analyze.analyze")
    vars(module).update(analyze=lambda *given: calls.append(given))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["analyze", "a", "b", "--out", "r"]) == 0
    words = "analyze a --out r --what collapse,tables --split validation --sample 0 --seed 3 --device cpu"
    assert main([*words.split(), "--checkpoint", "best"]) == 0
    given = AnalyzeOptions(("collapse", "tables"), "validation", "best", 0, 3, "cpu")
    assert calls == [([Path("a"), Path("b")], Path("r"), AnalyzeOptions()), ([Path("a")], Path("r"), given)]
    assert main(["analyze", "--out", "r"]) == 2
    assert "RUN" in capsys.readouterr().err
