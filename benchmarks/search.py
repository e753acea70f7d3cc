"""Stage one alone, beside what users of PyTorch and TorchRec would write instead

Candidates x behaviors scores and top K, forward and with the gradients of the trainer. On one thread; the
ways run in turn after a round that warms up, on the same vectors, and must keep the same scores. Ratios are
of processor seconds a candidate, which other work on the machine disturbs less than those of the wall.
--config is a TOML of `SearchBench`. With --changes the search is measured change by change instead, and
single pieces beside what they would replace, in milliseconds of the processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import (
    Seconds,
    copy_rate,
    one_thread,
    rounds,
    seconds_of,
    single_seconds,
    spread,
)
from benchmarks.inputs.windows import full_windows
from benchmarks.rivals import search_changes as forms
from trainer.config.toml import Settings, load_settings
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query
from trainer.model.windows import Selection

Rates = dict[str, float]
OURS, ROWS, PADDED = "ours", "rows a sample", "padded dense"
COLUMNS = {
    "L": "{length:,}",
    "D": "{dim}",
    "cand.": "{candidates_a_request}",
    "us/cand.": "{cpu_us_a_candidate:,.1f}",
    "min-max": "{cpu_min:,.1f}-{cpu_max:,.1f}",
    **{name: f"{{{name}:,.1f}}" for name in (ROWS, PADDED)},
    **{f"{name} / ours": f"{{{name} / ours:.2f}}" for name in (ROWS, PADDED)},
}
SHARES = {"of copy": "{share_of_copy:.0%}", "of matmul": "{share_of_matmul:.0%}"}


class SearchBench(Settings):
    """The settings of this benchmark.

    Attributes:
        lengths: L; dims: width of the attention vectors; candidates: of a request; k: behaviors kept.
        floats: candidates x L x width of a case, which has at least one request.
        most: the largest such product for `rows a sample`, which copies the history of each candidate. It
            ranks fewer candidates where all of them would exceed it.
        seed: of the random vectors.
    """

    lengths: tuple[PositiveInt, ...] = (200, 1_000, 10_000, 100_000)
    dims: tuple[PositiveInt, ...] = (128, 64, 32, 16)
    candidates: tuple[PositiveInt, ...] = (1, 4, 19)
    k: PositiveInt = 20
    floats: PositiveInt = 1 << 23
    most: PositiveInt = 1 << 24
    seed: int = Field(0, ge=0)


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("search", __doc__).measuring(config=False)
    options.add_argument("--changes", action="store_true", help="measure the search change by change")
    given = options.read(words)
    if given.changes:
        _measure_changes(given)
        return
    settings = load_settings(SearchBench, given.config, given.overrides)
    report = Report(given, "Search", seed=settings.seed)
    rows: list[Row] = []
    rates = []
    for length in settings.lengths:
        rates.append(machine_rates())
        for dim in settings.dims:
            for candidates in settings.candidates:
                rows += _measured(_Case(settings, length, dim, candidates), given.repeats)
    machine = {name: max(each[name] for each in rates) for name in rates[0]}
    report.rows = [row | _shares(row, machine) for row in rows]
    _show(report, machine)
    report.facts = settings.model_dump() | machine
    report.close()


def machine_rates() -> Rates:
    """The best of some copies (bytes read and written a second) and matrix products (FLOP a second)."""
    width = 1024
    square = torch.randn(width, width)
    product = single_seconds(lambda: torch.mm(square, square), 4, of=min)
    return {
        "copy_bytes_per_s": copy_rate(torch.device("cpu"), 1 << 25, repeats=4, of=min),
        "matmul_flop_per_s": 2 * width**3 / product,
    }


@torch.no_grad()
def _measure_changes(given: argparse.Namespace) -> None:
    report = Report(given, "Search, change by change", seed=0)
    report.facts = {"k": forms.K}
    names = [f"{w} x {s}, L = {length:,}, D = {dim}" for w, s, length, dim in forms.SHAPES]
    queries = [forms.query_of(*shape) for shape in forms.SHAPES]
    report.line(f"ms of the processor, K = {forms.K}; (gain over the first row)")
    changes = []
    for query in queries:
        ways = forms.changes(query)
        kept = [forms.by_value(query, way()) for way in ways.values()]  # type: ignore[arg-type]
        for each in kept[1:]:
            torch.testing.assert_close(each, kept[0])
        changes.append(_milliseconds(ways, given.repeats))
    report.rows = _show_ways(report, ["change", *names], changes)
    pieces = []
    for query in queries:
        tried = forms.tried(query)
        ways = {f"{what}: {name}": way for what, each in tried.items() for name, way in each.items()}
        pieces.append(_milliseconds(ways, given.repeats))
    report.rows += _show_ways(report, ["piece", *names], pieces, gain=False)
    report.close()


def _milliseconds(ways: Mapping[str, forms.Way], repeats: int) -> Rates:
    taken = rounds({name: partial(seconds_of, way) for name, way in ways.items()}, repeats)
    return {name: median(1e3 * seconds.cpu for seconds in each) for name, each in taken.items()}


def _show_ways(
    report: Report, head: Sequence[str], by_shape: Sequence[Rates], gain: bool = True
) -> list[Row]:
    first = [next(iter(each.values())) for each in by_shape]
    cells = [
        [
            name,
            *(
                f"{ms[name]:.2f}" + f" ({was / ms[name]:.1f}x)" * gain
                for ms, was in zip(by_shape, first, strict=True)
            ),
        ]
        for name in by_shape[0]
    ]
    report.cells(head, cells)
    shapes = head[1:]
    return [
        {"way": name, "shape": shape, "cpu_ms": ms[name]}
        for shape, ms in zip(shapes, by_shape, strict=True)
        for name in ms
    ]


class _Case:
    """Full windows of L behaviors, each of one request, and `candidates` candidates of each."""

    def __init__(self, settings: SearchBench, length: int, dim: int, candidates: int) -> None:
        self.length, self.dim, self.candidates, self.k = length, dim, candidates, min(settings.k, length)
        self.requests = max(1, settings.floats // (length * dim * candidates))
        self.windows, raw = full_windows(self.requests, candidates, length, dim, settings.seed)
        self.windows = replace(self.windows, counts=None)
        self.query_CD, self.key_ND = raw.query_CD, raw.key_ND
        self.index_WX, self.request_C = self.windows.index, self.windows.of_candidate
        count = self.requests * candidates
        self.gradient_CK = torch.randn(
            count, self.k, generator=torch.Generator().manual_seed(settings.seed + 1)
        )
        # A copy of the history a candidate: no more of them than memory allows.
        self.copied = min(count, max(1, settings.most // (length * dim)))
        self.scorer = DotScorer(None, None, 1, None, None)

    @property
    def count(self) -> int:
        return self.query_CD.shape[0]

    def ours(self, learns: bool) -> Tensor:
        """The trainer's way: search without gradients, then the scores of the kept behaviors with them."""
        raw = AttentionVectors(self.query_CD, self.key_ND, torch.zeros_like(self.request_C))
        raw = _learning(raw) if learns else raw
        # A new object, for it keeps what is computed from it once a batch.
        windows = replace(self.windows)
        vectors = self.scorer.encode(raw)
        kept: Selection = DotSearch(self.k)(Query(self.scorer, vectors, raw, windows))
        if not learns:
            return kept.index
        score_CK: Tensor = self.scorer.of_kept(vectors, kept)[:, 0]
        score_CK.backward(self.gradient_CK)
        return score_CK

    def rows_a_sample(self, learns: bool) -> Tensor:
        """gather, bmm and topk; each candidate has a copy of its history."""
        key_ND, query_CD = self._leaves(learns)
        key_CXD = F.embedding(self.index_WX[self.request_C[: self.copied]], key_ND)
        query_CD1 = query_CD[: self.copied, :, None] * self.dim**-0.5
        best = torch.bmm(key_CXD, query_CD1).squeeze(2).topk(self.k, dim=1)
        if learns:
            best.values.backward(self.gradient_CK[: self.copied])
        return best.values if learns else best.indices

    def padded_dense(self, learns: bool) -> Tensor:
        """TorchRec's way from a jagged history to a dense one, once a request; then bmm and topk."""
        key_ND, query_CD = self._leaves(learns)
        lengths = torch.full((self.requests,), self.length)
        key_WXD = JaggedTensor(key_ND, lengths=lengths).to_padded_dense(self.length)
        query_WSD = query_CD.view(self.requests, self.candidates, self.dim) * self.dim**-0.5
        best = torch.bmm(query_WSD, key_WXD.transpose(1, 2)).flatten(0, 1).topk(self.k, dim=1)
        if learns:
            best.values.backward(self.gradient_CK)
        return best.values if learns else best.indices

    def check(self) -> None:
        """Raise an error unless all ways keep the same scores."""
        ours, rows, padded = (
            way(True).detach().sort(dim=1, descending=True).values
            for way in (self.ours, self.rows_a_sample, self.padded_dense)
        )
        torch.testing.assert_close(ours, padded, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(ours[: self.copied], rows, atol=1e-3, rtol=1e-4)

    def _leaves(self, learns: bool) -> tuple[Tensor, Tensor]:
        if not learns:
            return self.key_ND, self.query_CD
        return self.key_ND.detach().requires_grad_(), self.query_CD.detach().requires_grad_()


def _learning(raw: AttentionVectors) -> AttentionVectors:
    query_CD, key_ND = (part.detach().requires_grad_() for part in (raw.query_CD, raw.key_ND))
    return AttentionVectors(query_CD, key_ND, raw.group_C)


@dataclass(frozen=True)
class _Way:
    run: Callable[[bool], Tensor]
    candidates: int


def _measured(case: _Case, repeats: int) -> list[Row]:
    """A row for each way, without and with gradients."""
    case.check()
    ways = {
        OURS: _Way(case.ours, case.count),
        ROWS: _Way(case.rows_a_sample, case.copied),
        PADDED: _Way(case.padded_dense, case.count),
    }

    def measure(name: str, learns: bool) -> Seconds:
        with torch.set_grad_enabled(learns):
            return seconds_of(lambda: ways[name].run(learns))

    pairs = [(name, learns) for learns in (False, True) for name in ways]
    # `check` has warmed all of them up.
    taken = rounds({pair: partial(measure, *pair) for pair in pairs}, repeats, warm=0)
    return [_row(case, name, learns, ways[name].candidates, each) for (name, learns), each in taken.items()]


def _row(case: _Case, name: str, learns: bool, count: int, taken: Sequence[Seconds]) -> Row:
    wall, cpu = ([1e6 * each[clock] / count for each in taken] for clock in (0, 1))
    us = spread(cpu)
    return {
        "way": name,
        "gradients": learns,
        "length": case.length,
        "dim": case.dim,
        "candidates_a_request": case.candidates,
        "candidates": count,
        "us_a_candidate": median(wall),
        "cpu_us_a_candidate": us["median"],
        "cpu_min": us["min"],
        "cpu_max": us["max"],
    }


def _shares(row: Row, machine: Rates) -> Row:
    """The least that the work needs over what it took.

    It needs to read a history once a request, and one product a pair of candidate and behavior.
    """
    seconds = 1e-6 * row["cpu_us_a_candidate"]
    needed = 4 * row["length"] * row["dim"] / row["candidates_a_request"]
    products = 2 * row["length"] * row["dim"]
    return {
        "share_of_copy": needed / seconds / machine["copy_bytes_per_s"],
        "share_of_matmul": products / seconds / machine["matmul_flop_per_s"],
    }


def _cases(rows: Sequence[Row]) -> list[Row]:
    """The row of `ours` for every case, with the times of the other ways in it."""
    others = {(row["way"], *_key(row)): row["cpu_us_a_candidate"] for row in rows}
    ours = sorted((row for row in rows if row["way"] == OURS), key=_key)
    cases = []
    for row in ours:
        us = {name: others[name, *_key(row)] for name in (ROWS, PADDED)}
        over = {f"{name} / ours": value / row["cpu_us_a_candidate"] for name, value in us.items()}
        cases.append(row | us | over)
    return cases


def _key(row: Row) -> tuple[Any, ...]:
    return row["gradients"], row["length"], -row["dim"], row["candidates_a_request"]


def _show(report: Report, machine: Rates) -> None:
    cases = _cases(report.rows)
    for learns in (False, True):
        report.line("training: scores, top-K and gradients" if learns else "forward: scores and top-K")
        columns = COLUMNS if learns else COLUMNS | SHARES
        report.table(columns, [case for case in cases if case["gradients"] == learns])
        report.line()
    for case in cases:
        place = f"L={case['length']} D={case['dim']} C={case['candidates_a_request']}"
        for name in (f"{ROWS} / ours", f"{PADDED} / ours"):
            report.ratios[f"{'train' if case['gradients'] else 'forward'} {place}: {name}"] = case[name]
    report.line(
        f"one thread copies {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and written) and multiplies "
        f"{machine['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s; us are of the processor, a candidate, medians"
    )
