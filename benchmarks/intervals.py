"""Intervals of AUC, logloss and PCOC by influence and by a bootstrap over users: coverage, width, time

Scores are drawn for users who differ in their rate and in how well the model understands them; each has 1 to
19 candidates. Of many such draws it is counted how often a 95 % interval holds the value of 200,000 other
users, by both methods. Then both are timed, and the peak of memory is that of the bootstrap alone.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread
from trainer.quality.bootstrap import Interval, Resampled, UserDraws, replicates
from trainer.quality.metrics import measure
from trainer.quality.ranking import Floats, Ints

COMPARED = {"auc": "AUC", "gauc": "GAUC", "logloss": "logloss", "pcoc": "PCOC"}
# Users of the values that intervals should hold.
_TRUTH = 200_000


class Candidates(NamedTuple):
    """Scores, labels, requests and users, [n] each."""

    score: Floats
    label: Floats
    group: Ints
    user: Ints


def drawn(rng: np.random.Generator, users: int) -> Candidates:
    """Candidates of some users, in requests of up to five; the model is too sure of itself."""
    user = np.repeat(np.arange(users), rng.integers(1, 20, users))
    taste = rng.normal(0, 1, users)[user] * rng.normal(0.8, 0.4, users)[user]
    signal = taste + rng.normal(0, 1, user.size)
    label = (rng.uniform(size=user.size) < 1 / (1 + np.exp(1.5 - signal))).astype(np.float64)
    score = 1 / (1 + np.exp(1.6 - signal - rng.normal(0, 0.7, user.size)))
    return Candidates(score, label, np.arange(user.size) // 5 + user * 10**7, user)


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("intervals", __doc__)
    options.add_argument("--users", type=int, nargs="+", default=[30, 100, 300, 1000], help="of a draw")
    options.add_argument("--draws", type=int, default=200, help="of which coverage is counted")
    options.add_argument("--replicates", type=int, default=1000, help="of the bootstrap")
    options.add_argument("--large", type=int, nargs="+", default=[20_000, 200_000], help="candidates to time")
    given = options.read(words)
    report = Report(given, "Intervals", seed=0, n=given.draws)
    truth = measure(*drawn(np.random.default_rng(1), _TRUTH)).as_dict()
    for users in given.users:
        report.rows += covered(users, given.draws, given.replicates, truth)
    columns = {
        "users": "{users:,}",
        "metric": "{metric}",
        "± by influence": "{influence:.4f}",
        "half of the bootstrap's": "{bootstrap:.4f}",
        "holds the truth: influence": "{influence_holds:.1%}",
        "bootstrap": "{bootstrap_holds:.1%}",
    }
    report.table(columns, report.rows)
    report.line()
    timed_rows = [timed(size, given.replicates) for size in given.large]
    report.rows += timed_rows
    columns = {
        "candidates": "{candidates:,}",
        "all metrics with ±, s": "{influence_s:.2f}",
        "bootstrap, s": "{bootstrap_s:.2f}",
        "its memory, MB": "{bootstrap_mb:.0f}",
    }
    report.table(columns, timed_rows)
    report.facts = {"replicates": given.replicates, "truth_users": _TRUTH}
    report.close()


def covered(users: int, draws: int, count: int, truth: dict[str, float]) -> list[Row]:
    """How wide both intervals are, and how often they hold the truth; a row a metric."""
    found: dict[str, list[tuple[float, float, bool, bool]]] = {name: [] for name in COMPARED}
    for number in range(draws):
        part = drawn(np.random.default_rng([2, users, number]), users)
        values = measure(*part).as_dict()
        (resampled,) = replicates([Resampled.of(*part)], UserDraws(users, count, seed=number))
        for name, own in found.items():
            half, value = values[f"{name}_ci"], values[name]
            interval = Interval.of(value, resampled[name], users)
            holds = abs(value - truth[name]) <= half, interval.low <= truth[name] <= interval.high
            own.append((half, interval.half, *holds))
    rows = []
    for name, own in found.items():
        influence, bootstrap, first, second = map(fmean, zip(*own, strict=True))
        sizes = {"influence": influence, "bootstrap": bootstrap}
        held = {"influence_holds": first, "bootstrap_holds": second}
        rows.append({"users": users, "metric": COMPARED[name], **sizes, **held})
    return rows


def timed(candidates: int, count: int) -> Row:
    """Processor seconds of both on so many candidates, and the memory that the bootstrap takes."""
    part = drawn(np.random.default_rng(3), candidates // 10)
    began = time.process_time()
    measure(*part)
    between = time.process_time()
    replicates([Resampled.of(*part)], UserDraws(candidates // 10, count))
    end = time.process_time()
    tracemalloc.start()
    replicates([Resampled.of(*part)], UserDraws(candidates // 10, min(count, 100)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = {"influence_s": between - began, "bootstrap_s": end - between}
    return {"candidates": part.user.size, **seconds, "bootstrap_mb": peak / 1e6}
