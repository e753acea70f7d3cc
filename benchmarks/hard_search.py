"""Hierarchical hard search beside brute force, by history length

Taxonomy of 20 x 10 x 10 with the item as the fourth level, a third of the behaviors known only to level 1, a
third to level 2; 1,000 candidates in 20 requests; K = 200. Both sides are timed in the same run on the same
block and must agree. Writes benchmarks/hard_search.md unless --page names another file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import single_seconds
from benchmarks.rivals.brute_force_search import hierarchical_search_reference
from trainer.data.hard_search import SearchResult, hierarchical_search

CANDIDATES, REQUESTS, BUDGET = 1_000, 20, 200
REFERENCE_CANDIDATES = 50  # brute force costs the same for each candidate: timing some of them is enough
DAY = 86_400


def block(behaviors: int, candidates: int = CANDIDATES, requests: int = REQUESTS) -> dict[str, Any]:
    """One user block over two years: an item belongs to one leaf, and popular items come back."""
    rng = np.random.default_rng(behaviors)
    # popularity falls as 1 / (rank + 50)
    item = (50 * 4_001 ** rng.random(behaviors + candidates)).astype(np.int64) - 49
    leaf = np.random.default_rng(0).integers(0, 2_000, 200_002)[item]
    path = np.stack([leaf // 100 + 1, leaf // 10 + 1, leaf + 1, item])
    # the item counts as known where the leaf is
    known = rng.integers(0, 3, behaviors)
    history = np.where(np.array([0, 1, 2, 2])[:, None] <= known, path[:, :behaviors], 0)
    when = np.sort(rng.integers(0, 730 * DAY, behaviors))
    end = np.sort(rng.integers(behaviors // 2, behaviors + 1, requests))
    return {
        "levels_history": history,
        "time_history": when,
        "levels_candidate": path[:, behaviors:],
        "request_of_candidate": np.sort(rng.integers(0, requests, candidates)),
        "visible_start": np.zeros(requests, dtype=np.int64),
        "visible_end": end,
        "request_time": when[end - 1] + 60,
        "budget": BUDGET,
        "half_life": 14.0 * DAY,
    }


def some(inputs: dict[str, Any], candidates: slice) -> dict[str, Any]:
    return inputs | {
        "levels_candidate": inputs["levels_candidate"][:, candidates],
        "request_of_candidate": inputs["request_of_candidate"][candidates],
    }


def check(fast: SearchResult, slow: SearchResult) -> None:
    for name in ("index", "level", "matches"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name))
    np.testing.assert_allclose(fast.decayed, slow.decayed, rtol=1e-5, atol=1e-37)


def measure(behaviors: int, repeats: int) -> Row:
    inputs = block(behaviors)
    few = some(inputs, slice(None, None, CANDIDATES // REFERENCE_CANDIDATES))
    check(hierarchical_search(**few), hierarchical_search_reference(**few))
    fast = single_seconds(partial(hierarchical_search, **inputs), repeats)
    part = single_seconds(partial(hierarchical_search_reference, **few), repeats)
    slow = part * CANDIDATES / REFERENCE_CANDIDATES
    return {
        "behaviors": behaviors,
        "ms": 1e3 * fast,
        "candidates_per_s": CANDIDATES / fast,
        "behaviors_per_s": behaviors / fast,
        "brute_ms": 1e3 * slow,
        "brute_candidates_per_s": CANDIDATES / slow,
        "speed_up": slow / fast,
    }


COLUMNS = {
    "N": "{behaviors:,}",
    "ms a block": "{ms:.1f}",
    "candidates/s": "{candidates_per_s:,.0f}",
    "behaviors/s": "{behaviors_per_s:,.0f}",
    "brute force, ms": "{brute_ms:,.0f}",
    "its candidates/s": "{brute_candidates_per_s:,.0f}",
    "speed-up": "{speed_up:,.0f}x",
}


def main(words: Sequence[str]) -> None:
    options = Options("hard_search", __doc__, page=Path(__file__).with_suffix(".md")).measuring()
    options.add_argument("--behaviors", default="1000,10000,50000", metavar="N,N", help="sizes of blocks")
    given = options.read(words)
    report = Report(given, "Hierarchical hard search")
    report.line(
        f"One user block of N behaviors over two years; {CANDIDATES:,} candidates in {REQUESTS} requests, "
        "each of which sees half of the block or more; taxonomy 20 x 10 x 10 and the item as fourth "
        "level; a third of the behaviors known to level 1 alone, a third to level 2, the rest down to the "
        f"item; K = {BUDGET}. Building the inverted lists and the plain and decayed counts is included. "
        f"Median of {given.repeats}. Brute force (a full sort for each candidate, in numpy) runs "
        f"{REFERENCE_CANDIDATES} of the candidates, scaled up to all; the results were checked to be equal."
    )
    report.rows = [measure(int(behaviors), given.repeats) for behaviors in given.behaviors.split(",")]
    report.ratios = {f"speed_up_at_{row['behaviors']}": row["speed_up"] for row in report.rows}
    report.table(COLUMNS, report.rows)
    report.close()
