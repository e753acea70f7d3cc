"""How fast a snapshot scores one user's candidates, beside other implementations; the start of a server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread, rounds, seconds_of
from benchmarks.inputs.random_snapshot import measure_start
from benchmarks.rivals.serving_programs import PlainProgram, attending_to_all, exported, per_sample
from embeddings.errors import TandemError
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.plain import PlainBagCollection
from embeddings.lookup.stored import Dtype, to_stored
from trainer.assemble import build_model
from trainer.config.tasks import resolve_tasks
from trainer.config.toml import Settings
from trainer.log.bags import Bags
from trainer.run_config import Config
from trainer.serving.request import History, Request
from trainer.serving.scorer import Scorer
from trainer.snapshot import Snapshot
from trainer.snapshot.manifest import InputFeature

# By how tables are stored, and the width of the attention.
Scorers = dict[tuple[Dtype, int], Scorer]
_FEATURE = "item_id"
_NUMBERS = ("p50_ms", "p99_ms", "cpu_ms", "search_cpu_ms", "ranking_cpu_ms")
_STARTS = ("start_s", "start_cpu_s", "resident_mb", "private_mb")


class ScorerBench(Settings):
    """What is scored, and by which scorers.

    Attributes:
        rows: of each table; lengths: L of the history; dims: widths of the attention vectors.
        dtypes: how all tables are stored.
        width: of the representation; candidates: of the request; k: behaviors kept.
        compare: L at which the other implementations are measured too.
        start_rows: of the two tables, of the narrowest of `dims`, that a server is started on; 0 = none.
    """

    rows: PositiveInt = 1_000_000
    lengths: tuple[PositiveInt, ...] = (1_000, 10_000, 50_000)
    dims: tuple[PositiveInt, ...] = (16, 64)
    dtypes: tuple[Dtype, ...] = ("fp32", "int8")
    width: PositiveInt = 128
    candidates: PositiveInt = 500
    k: PositiveInt = 50
    compare: PositiveInt = 10_000
    start_rows: NonNegativeInt = 10_000_000


@dataclass(frozen=True)
class _Manifest:
    """The part of a snapshot's manifest that scoring needs."""

    config: Config
    features: Mapping[str, int]
    step: int = 0
    tasks: tuple[str, ...] = ("click",)
    numeric: tuple[str, ...] = ()
    inputs: Mapping[str, InputFeature] = field(
        default_factory=lambda: {_FEATURE: InputFeature(side="both", multi=False)}
    )
    recorded_features: tuple[str, ...] = (_FEATURE,)
    recorded_context: tuple[str, ...] = ()
    vectors: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)


# Only the times of the recorded requests are read.
_RECORDED = SimpleNamespace(batch=SimpleNamespace(request_time=torch.zeros(0)))


@one_thread()
def measure_scorer(settings: ScorerBench, repeats: int, report: Report) -> None:
    """Times of a request by length, type of the tables and width of the attention."""
    tables = _Tables.of(settings)
    scorers: Scorers = {}
    for dtype in settings.dtypes:
        stored = to_stored(tables.representation, dtype)
        for dim, table in tables.attention.items():
            scorers[dtype, dim] = make_scorer(settings, (to_stored(table, dtype), dim), stored)
    rows = _measure_scores(settings, scorers, repeats, report)
    columns = {"one thread": "{name}", **{key: f"{{{key}:.2f}}" for key in _NUMBERS}}
    _show(report, "The scorer alone, one thread:", columns, rows)


@one_thread()
def measure_others(settings: ScorerBench, repeats: int, report: Report) -> None:
    """The scorer and other implementations of the same weights."""
    rows = _compare(settings, _Tables.of(settings), repeats, report)
    columns = {"one thread": "{name}", "CPU ms": "{cpu_ms:.2f}", "to the scorer": "{to_scorer:.2f}"}
    _show(report, "Other ways to serve the same weights, one thread, fp32:", columns, rows)


def measure_starts(settings: ScorerBench, report: Report) -> None:
    """The start of a server on tables of `start_rows` rows, in each type."""
    if not settings.start_rows:
        return
    dim = min(settings.dims)
    config, groups = _model(settings, dim, dim, max(settings.start_rows, settings.rows))
    small = settings.model_copy(update={"rows": 1_000})
    table = torch.zeros(small.rows, dim)
    batch = make_scorer(small, (table, dim), torch.zeros(small.rows, settings.width)).batch(
        [make_request(small, min(settings.lengths))]
    )
    rows = [measure_start(config, groups, batch, dtype) for dtype in settings.dtypes]
    columns = {"": "{name}", **{key: f"{{{key}:.2f}}" for key in _STARTS}}
    _show(report, f"The start of a server, two tables of {settings.start_rows:,} rows:", columns, rows)


def _show(report: Report, heading: str, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    report.line(heading)
    report.table(columns, rows)
    report.line()
    report.rows += rows


@dataclass(frozen=True)
class _Tables:
    """Random tables: of the attention, by their widths, and of the representation."""

    attention: Mapping[int, torch.Tensor]
    representation: torch.Tensor

    @staticmethod
    def of(settings: ScorerBench) -> _Tables:
        torch.manual_seed(0)
        representation = torch.randn(settings.rows, settings.width) * 0.1
        attention = {dim: torch.randn(settings.rows, dim) * 0.3 for dim in settings.dims}
        return _Tables(attention, representation)


def make_scorer(
    settings: ScorerBench, attention: tuple[torch.Tensor, int] | None, representation: torch.Tensor
) -> Scorer:
    """A scorer of these tables.

    Args:
        attention: stored rows and their width; None: the model has no search.
    """
    tables = {"representation": representation}
    if attention is not None:
        tables["attention"] = attention[0]
    config, groups = _model(settings, settings.width, attention[1] if attention else 0, settings.rows)
    collections = {
        name: PlainBagCollection(groups[name], {groups[name].table_name(groups[name].tables[0]): table})
        for name, table in tables.items()
    }
    made = build_model(config, groups, collections, resolve_tasks({}, ["click"])).eval().requires_grad_(False)
    manifest = _Manifest(config, {_FEATURE: settings.rows})
    return Scorer(Snapshot(Path("synthetic"), manifest, made, _RECORDED))  # type: ignore[arg-type]


def _model(
    settings: ScorerBench, width: int, attention: int, rows: int
) -> tuple[Config, dict[str, TableGroup]]:
    """A config like DARE's, with one feature and without time; an attention of width 0 means no search."""
    dims = {"representation": width} | ({"attention": attention} if attention else {})
    of_attention = "attention" if attention else "representation"
    model: dict[str, Any] = {"k": settings.k, "position": False, "age": False}
    model["roles"] = {
        f"{stage}_{side}": group
        for stage, group in (("attention", of_attention), ("representation", "representation"))
        for side in ("target", "behavior")
    }
    config = Config.model_validate(
        {
            "data": {"history_length": max(*settings.lengths, settings.compare)},
            "model": model | {"search": "dot" if attention else "all"},
            "groups": {name: {"dim": dim} for name, dim in dims.items()},
        }
    )
    return config, {n: TableGroup(n, (TableSpec(_FEATURE, rows, dim),)) for n, dim in dims.items()}


def make_request(settings: ScorerBench, length: int) -> Request:
    rng = np.random.default_rng(length)
    history = rng.integers(0, settings.rows, length)
    candidates = Bags(rng.integers(0, settings.rows, settings.candidates))
    times = np.sort(rng.integers(0, 10**9, length))
    return Request(
        0,
        History(times, {_FEATURE: Bags(history)}),
        10**9,
        {_FEATURE: candidates},
        settings.candidates,
        {},
        {},
    )


def _measure_scores(settings: ScorerBench, scorers: Scorers, repeats: int, report: Report) -> list[Row]:
    """Measure every length, type and width, by both clocks in turn.

    Kinds run four times as often where histories are no longer than `compare`.
    """
    rows: list[Row] = []
    for length in settings.lengths:
        request = make_request(settings, length)
        taken: dict[tuple[Dtype, int, str], list[tuple[float, float]]] = {
            (*kind, clock): [] for kind in scorers for clock in ("wall", "cpu")
        }
        for turn in range(1 + repeats * (4 if length <= settings.compare else 1)):
            for (dtype, dim, clock), each in taken.items():
                scorer = scorers[dtype, dim]
                scorer.clock = time.perf_counter if clock == "wall" else time.thread_time
                seconds = scorer.score([request])[1]
                if turn:  # the first warms up
                    each.append(seconds)
        search = {}
        for dtype, dim in scorers:
            name = f"score, L {length:,}, {dtype}, attention {dim}"
            row = _score_row(name, taken[dtype, dim, "wall"], taken[dtype, dim, "cpu"])
            rows.append({**row, "length": length, "dtype": dtype, "dim": dim})
            search[dtype, dim] = row["search_cpu_ms"]
        for dtype in settings.dtypes:
            for narrow, wide in itertools.pairwise(sorted(settings.dims)):
                ratio = search[dtype, wide] / search[dtype, narrow]
                report.ratios[f"search_{wide}_to_{narrow}_at_{length}_{dtype}"] = ratio
    return rows


def _score_row(name: str, wall: Sequence[tuple[float, float]], cpu: Sequence[tuple[float, float]]) -> Row:
    total = [1e3 * (search + ranking) for search, ranking in wall]
    return {
        "name": name,
        "p50_ms": median(total),
        "p99_ms": float(np.quantile(total, 0.99)),
        "cpu_ms": median([1e3 * sum(part) for part in cpu]),
        "repeats": len(wall),
        "search_cpu_ms": median([1e3 * search for search, _ in cpu]),
        "ranking_cpu_ms": median([1e3 * ranking for _, ranking in cpu]),
    }


def _compare(settings: ScorerBench, drawn: _Tables, repeats: int, report: Report) -> list[Row]:
    """Measure the scorer and the other implementations in fp32; their scores must agree."""
    rows: list[Row] = []
    tables, representation, length = drawn.attention, drawn.representation, settings.compare
    request = make_request(settings, length)
    history = torch.from_numpy(request.history.features[_FEATURE].values.copy()).flip(0)
    candidates = torch.from_numpy(request.candidates[_FEATURE].values.copy())
    without = make_scorer(settings, None, representation)
    for dim in (min(tables), max(tables)):
        scorer = make_scorer(settings, (tables[dim], dim), representation)
        scorer.clock = time.thread_time
        plain = PlainProgram(tables[dim], representation, scorer.snapshot.model, settings.k)
        programs = {
            "one_export_program": exported(plain, length, settings.candidates),
            "eager_per_sample": per_sample(plain),
            "attending_to_all": attending_to_all(plain),
        }
        kinds: dict[str, Callable[[], Any]] = {
            "scorer": partial(scorer.score, [request]),
            "scorer_without_search": partial(without.score, [request]),
            **{name: partial(program, history, candidates) for name, program in programs.items()},
        }
        with torch.no_grad():
            expected = torch.from_numpy(scorer.score([request])[0][0].probabilities[:, 0])
            for name in ("one_export_program", "eager_per_sample"):
                worst = float((programs[name](history, candidates) - expected).abs().max())
                if not worst <= 1e-4:
                    raise TandemError(f"{name} scores otherwise, by {worst:.3g}: it is no baseline")
            taken = rounds({name: partial(seconds_of, run) for name, run in kinds.items()}, repeats, warm=0)
        cpu = {name: median(seconds.cpu for seconds in each) for name, each in taken.items()}
        for name, seconds in cpu.items():
            row: Row = {"name": f"{name}, L {length:,}, attention {dim}", "cpu_ms": 1e3 * seconds}
            rows.append(row | {"to_scorer": seconds / cpu["scorer"]})
            if name != "scorer":
                report.ratios[f"scorer_to_{name}_at_{dim}"] = seconds / cpu["scorer"]
    return rows
