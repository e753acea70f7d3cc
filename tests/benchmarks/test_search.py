"""`bench search` at a small size: the ways keep the same behaviors, and the report says which is faster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks.search import SearchBench, _Case
from launch.cli import main

SMALL = ["--set", "lengths=[30,3000]", "--set", "dims=[16]", "--set", "candidates=[1,3]", "--set", "k=5"]
SMALL += ["--set", "floats=200000"]


def test_report_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "search.json"
    assert main(["bench", "search", *SMALL, "--repeats", "2", "--json", str(file)]) == 0
    said, tree = capsys.readouterr().out, json.loads(file.read_text())
    assert {"ratios", "rows", "machine", "versions"} <= tree.keys()
    # Three ways, with gradients and without, at two lengths and two numbers of candidates.
    assert len(tree["rows"]) == 3 * 2 * 4 and len(tree["ratios"]) == 2 * 2 * 4
    for row in tree["rows"]:
        assert 0 < row["cpu_min"] <= row["cpu_us_a_candidate"] <= row["cpu_max"]
    place = "L=3000 D=16 C=3"
    us = {
        row["way"]: row["cpu_us_a_candidate"]
        for row in tree["rows"]
        if (row["length"], row["candidates_a_request"], row["gradients"]) == (3000, 3, True)
    }
    assert tree["ratios"][f"train {place}: rows a sample / ours"] == us["rows a sample"] / us["ours"]
    assert "of copy" in said and "commit" in said and "seed 0; n = 2" in said


def test_ways_that_keep_other_behaviors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _Case(SearchBench(floats=20_000, k=3), 50, 8, 2)
    case.check()
    wrong = case.ours

    def other(learns: bool) -> Tensor:
        found = wrong(learns).detach().clone()
        found[-1, -1] -= 1
        return found

    monkeypatch.setattr(case, "ours", other)
    with pytest.raises(AssertionError):
        case.check()
