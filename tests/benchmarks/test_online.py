"""What the benchmarks of living ids and of streams compute from what they measured."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.online import december
from benchmarks.online.capacity import CASES, settings_of
from benchmarks.online.freshness import Probe, Timeline, delays, followed, served_at
from benchmarks.online.plot import line_plot, ticks_of
from tests.helpers.logs import small_log
from trainer.log.schema import read_manifest


def test_a_case_says_its_rules() -> None:
    assert settings_of(CASES["static"], "item_id", 1000) == []
    assert settings_of(CASES["lfu"], "item_id", 1000) == [
        "ids.item_id.capacity=100",
        'ids.item_id.eviction="lfu"',
    ]


def timeline() -> Timeline:
    """Windows appear at 100, 110 and 120; version v2 knows the second one and serves from 125 on."""
    line = Timeline({"a": 100.0, "b": 110.0, "c": 120.0}, {"a": 4, "b": 2, "c": 1})
    line.probes += [Probe(104, "v1", 0.9, 0.1), Probe(125, "v2", 0.6, 0.5), Probe(140, "v3", 0.4, 0.5)]
    return line


def test_an_event_is_served_by_the_first_answer_that_knows_its_window() -> None:
    served = served_at(timeline(), {"v1": "a", "v2": "b", "v3": "c"})
    assert served == {"b": 125, "c": 140}  # nobody saw when the first answer's version came
    # Two events of b at 102.5 and 107.5, one of c in the middle of its ten seconds.
    assert sorted(delays(timeline(), served, 10.0)) == [17.5, 22.5, 25.0]


def test_scores_follow_when_the_right_star_stays_above() -> None:
    line = timeline()
    assert followed(line, 101.0) == 39.0
    line.probes.append(Probe(150, "v3", 0.5, 0.4))
    assert math.isnan(followed(line, 101.0))


def test_a_drawing_is_xml_with_a_line_each() -> None:
    lines = {"a": [0.5, math.nan, 0.7], "b & c": [0.6, 0.61, 0.62]}
    drawing = ElementTree.fromstring(line_plot("<t>", "day", ["1", "2", "3"], lines, (1, "flip")))
    found = drawing.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in found] == [2, 3]


@pytest.mark.parametrize(("low", "high"), [(0.7612, 0.8049), (0.0, 1.0), (-3.0, 1234.0), (0.5, 0.5)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = ticks_of(low, high)
    assert ticks[0] <= low <= high <= ticks[-1] + 1e-12 and 2 <= len(ticks) <= 9


def test_candidates_of_a_log_meet_their_scores(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    manifest = read_manifest(log)
    table = december.candidates_of(log, manifest, ("validation", "test"))
    assert table.num_rows == manifest.splits["validation"].candidates + manifest.splits["test"].candidates
    rows = table.to_pylist()
    scored = table.select(["user_id", "request_id", "candidate"]).append_column(
        "score_click", [np.arange(table.num_rows, dtype=np.float32)]
    )
    mixed = scored.take(np.random.default_rng(0).permutation(table.num_rows))
    assert december.scores_for(table, mixed, "click").tolist() == list(range(table.num_rows))
    with pytest.raises(SystemExit, match="have a score"):
        december.scores_for(table, mixed.slice(1), "click")
    first = next(row for row in rows if row["candidate"] == 1)
    assert rows[rows.index(first) - 1]["request_id"] == first["request_id"]
