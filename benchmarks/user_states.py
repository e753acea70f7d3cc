"""How fast a user is scored whose state is kept, by the rate of hits, and what a state takes (user_states.md)

The scorer alone, with random weights: one id feature, 500 candidates, as in `serve`, of which this is a part.
At a rate of hits, some calls are of users whose states are there and others of users who were never seen, in
an order that the seed draws; `extended`: each call brings one more behavior of its user. Kinds run in turn.
--config is a TOML of `UserStateBench`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from statistics import fmean, median

import numpy as np
import torch
from pydantic import PositiveInt

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.serve.scorer import ScorerBench, make_request, make_scorer
from trainer.config.toml import Settings, load_settings
from trainer.serving.request import Request
from trainer.serving.scorer import Scorer
from trainer.serving.user_state.maker import StateMaker
from trainer.serving.user_state.settings import UserStateSettings

_COLUMNS = {
    "kind": "{name}",
    "p50 ms": "{p50_ms:.2f}",
    "mean ms": "{mean_ms:.2f}",
    "CPU ms": "{cpu_ms:.2f}",
    "KB a user": "{kb_per_user:,.0f}",
}


class UserStateBench(Settings):
    """The settings of this benchmark.

    Attributes:
        length: L of every history; dim, width: of the attention vectors and of the representation.
        rows: of each table; candidates: of a request; calls: of a round; threads: of torch.
        rates: of hits. kept: whether states have rows of the representation, one kind of states each.
    """

    length: PositiveInt = 10_000
    dim: PositiveInt = 16
    width: PositiveInt = 128
    rows: PositiveInt = 1_000_000
    candidates: PositiveInt = 500
    calls: PositiveInt = 20
    threads: tuple[PositiveInt, ...] = (1, 2)
    rates: tuple[float, ...] = (0.0, 0.5, 0.9, 1.0)
    kept: tuple[bool, ...] = (True, False)


@dataclass(frozen=True)
class _Kind:
    """One way to be called: a scorer, and the requests of a round."""

    name: str
    scorer: Scorer
    requests: Callable[[], Iterator[Request]]


def main(words: Sequence[str]) -> None:
    given = Options("user_states", __doc__).measuring(config=False).read(words)
    settings = load_settings(UserStateBench, given.config, given.overrides)
    report = Report(given, "States of users", seed=0)
    report.facts = settings.model_dump()
    measure_states(settings, given.repeats, report)
    report.line("processor time as a share of that without states:")
    report.show_ratios(2)
    report.close()


def measure_states(settings: UserStateBench, repeats: int, report: Report) -> None:
    """Every kind of states and rate of hits, in turn."""
    kinds, before = list(_kinds(settings)), torch.get_num_threads()
    for threads in settings.threads:
        torch.set_num_threads(threads)
        rows = _measured(kinds, repeats)
        told = f"{settings.length:,} behaviors, {settings.candidates} candidates, attention {settings.dim}"
        report.line(f"States of users, {told}, threads: {threads}")
        report.table(_COLUMNS, rows)
        report.line()
        report.rows += [{**row, "threads": threads} for row in rows]
        plain, *others = rows
        for row in others:
            report.ratios[f"{row['name']}, {threads} threads"] = row["cpu_ms"] / plain["cpu_ms"]
    torch.set_num_threads(before)


def _kinds(settings: UserStateBench) -> Iterator[_Kind]:
    """The first is without states."""
    serving = ScorerBench(
        rows=settings.rows,
        lengths=(settings.length,),
        compare=settings.length,
        width=settings.width,
        candidates=settings.candidates,
    )
    torch.manual_seed(0)
    representation = torch.randn(settings.rows, settings.width) * 0.1
    attention = torch.randn(settings.rows, settings.dim) * 0.3
    request = make_request(serving, settings.length)

    def scorer(kept: UserStateSettings | None) -> Scorer:
        made = make_scorer(serving, (attention, settings.dim), representation)
        if kept is not None:
            made.states = StateMaker(made.snapshot, made.needs, kept, "bench")
        return made

    plain = scorer(None)
    yield _Kind("without states", plain, lambda: iter([request] * settings.calls))
    for kept in settings.kept:
        name = "" if kept else "no representation, "
        made = scorer(UserStateSettings(representation=kept))
        strangers, rng = count(2), np.random.default_rng(0)
        for rate in settings.rates:
            yield _Kind(
                f"{name}{rate:.0%} hits",
                made,
                lambda r=rate, s=strangers, d=rng: _mixed(request, settings, r, s, d),
            )
        grown = scorer(UserStateSettings(representation=kept))
        yield _Kind(f"{name}extended", grown, lambda s=strangers: _growing(request, settings, next(s)))


def _mixed(
    request: Request,
    settings: UserStateBench,
    rate: float,
    strangers: Iterator[int],
    rng: np.random.Generator,
) -> Iterator[Request]:
    """Calls of user 1, whose state is there, and of users whom nobody has seen."""
    hits = rng.permutation(settings.calls) < round(rate * settings.calls)
    for hit in hits.tolist():
        yield replace(request, user_id=1 if hit else next(strangers))


def _growing(request: Request, settings: UserStateBench, user: int) -> Iterator[Request]:
    """Calls of one user, each with a behavior more than the one before; the first call is a miss."""
    size = request.history.time.size
    for missing in range(settings.calls, -1, -1):
        yield replace(request, history=request.history.part(slice(0, size - missing)), user_id=user)


def _measured(kinds: Sequence[_Kind], repeats: int) -> list[Row]:
    taken: dict[str, list[tuple[float, float]]] = {kind.name: [] for kind in kinds}
    for turn in range(1 + repeats):
        for kind in kinds:
            requests = list(kind.requests())
            # The state of user 1 is there, and a user who grows has one.
            kind.scorer.score([replace(requests[0], user_id=1) if "hits" in kind.name else requests[0]])
            for request in requests[1:]:
                started, cpu = time.perf_counter(), time.process_time()
                kind.scorer.score([request])
                if turn:
                    seconds = time.perf_counter() - started, time.process_time() - cpu
                    taken[kind.name].append(seconds)
    rows: list[Row] = []
    for kind in kinds:
        wall, cpu_of = ([1e3 * value for value in each] for each in zip(*taken[kind.name], strict=True))
        row: Row = {
            "name": kind.name,
            "p50_ms": median(wall),
            "mean_ms": fmean(wall),
            "cpu_ms": median(cpu_of),
        }
        if kind.scorer.states is not None:
            row["kb_per_user"] = kind.scorer.states.cache.statistics().bytes_per_user / 1e3
        rows.append(row)
    return rows
