"""Hierarchical hard search against brute force: candidates/s and behaviors/s of history, by history length.

    python -m benchmarks.hard_search

prints the table and writes benchmarks/hard_search.md. Taxonomy of 20 x 10 x 10 with the item as the fourth
level, a third of the behaviors known only to level 1, a third to level 2; 1,000 candidates in 20 requests;
K = 200. Both sides are timed in the same run on the same block and must agree.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.brute_force_search import hierarchical_search_reference
from trainer.data.hard_search import SearchResult, hierarchical_search

CANDIDATES, REQUESTS, BUDGET, REPEATS = 1_000, 20, 200, 5
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


def median_seconds(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def check(fast: SearchResult, slow: SearchResult) -> None:
    for name in ("index", "level", "matches"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name))
    np.testing.assert_allclose(fast.decayed, slow.decayed, rtol=1e-5, atol=1e-37)


def row(behaviors: int) -> str:
    inputs = block(behaviors)
    few = some(inputs, slice(None, None, CANDIDATES // REFERENCE_CANDIDATES))
    check(hierarchical_search(**few), hierarchical_search_reference(**few))
    fast = median_seconds(lambda: hierarchical_search(**inputs))
    slow = median_seconds(lambda: hierarchical_search_reference(**few)) * CANDIDATES / REFERENCE_CANDIDATES
    return (
        f"| {behaviors:,} | {1e3 * fast:.1f} | {CANDIDATES / fast:,.0f} | {behaviors / fast:,.0f} "
        f"| {1e3 * slow:,.0f} | {CANDIDATES / slow:,.0f} | {slow / fast:,.0f}x |"
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    lines = [
        "# Hierarchical hard search",
        "",
        "Command: `python -m benchmarks.hard_search`",
        "",
        f"Machine: {processor()}, {os.cpu_count()} cores (one used; others may have been busy). "
        f"Python {platform.python_version()}, numpy {np.__version__}.",
        "",
        f"One user block of N behaviors over two years; {CANDIDATES:,} candidates in {REQUESTS} requests, "
        "each of which sees half of the block or more; taxonomy 20 x 10 x 10 and the item as fourth "
        "level; a third of the behaviors known to level 1 alone, a third to level 2, the rest down to the "
        f"item; K = {BUDGET}. Building the inverted lists and the plain and decayed counts is included. "
        f"Median of {REPEATS}. Brute force (a full sort for each candidate, in numpy) runs "
        f"{REFERENCE_CANDIDATES} of the candidates, scaled up to all; the results were checked to be equal.",
        "",
        "| N | ms a block | candidates/s | behaviors/s | brute force, ms | its candidates/s | speed-up |",
        "|--:|--:|--:|--:|--:|--:|--:|",
        *(row(behaviors) for behaviors in (1_000, 10_000, 50_000)),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
