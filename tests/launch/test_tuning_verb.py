"""The verb that tunes hands over what it was given, and nothing of Optuna is imported for other verbs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pipelines.tune.tune
from launch.cli import main
from pipelines.tune.tune import TuneOptions


def test_arguments_arrive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = []
    module = ModuleType("pipelines.tune.tune")
    vars(module).update(tune=lambda *given: calls.append(given), TuneOptions=TuneOptions)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(pipelines.tune, "tune", module)
    short = "tune --config c --space s --out o"
    assert main(short.split()) == 0
    more = "--trials 9 --jobs 2 --storage sqlite:///a.db --set train.seed=1 train.epochs=2"
    assert main([*short.split(), *more.split()]) == 0
    given = Path("c"), TuneOptions(Path("o"), Path("s")), []
    all_given = TuneOptions(Path("o"), Path("s"), "sqlite:///a.db", 9, 2)
    assert calls == [given, (Path("c"), all_given, ["train.seed=1", "train.epochs=2"])]
    assert main(["tune", "--config", "c", "--out", "o"]) == 2
    assert "--space" in capsys.readouterr().err
