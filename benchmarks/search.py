"""`tandemrec bench search`: stage one alone, against what PyTorch and TorchRec users would write instead."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from benchmarks.loops import Seconds, one_thread, timed
from benchmarks.report import provenance, write_report
from pipelines.console import quiet_third_parties, table_lines
from trainer.config.toml import Settings, load_settings
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query
from trainer.model.time import Marks
from trainer.model.windows import Selection, Windows

Row = dict[str, Any]
Rates = dict[str, float]
OURS, ROWS, PADDED = "ours", "rows a sample", "padded dense"


class SearchBench(Settings):
    """What is measured.

    Attributes:
        lengths: L; dims: width of the attention vectors; candidates: of a request; k: behaviors kept.
        floats: candidates x L x width of a case, at least one request. most: of the same, what a copy a
            candidate may hold; the baseline ranks fewer candidates where all would take more.
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
def bench_search(config: Path | None, overrides: Sequence[str], repeats: int, report: Path | None) -> None:
    """Candidates x behaviors scores and top-K, forward and with the gradients of the trainer.

    On one thread; the ways are interleaved `repeats` times after a round that warms up, on the same vectors,
    and must keep the same scores. Ratios are of processor seconds a candidate, which other work on the
    machine disturbs less than those of the wall. `config` is a TOML of `SearchBench`.
    """
    quiet_third_parties()
    settings = load_settings(SearchBench, config, overrides)
    rows: list[Row] = []
    rates = []
    for length in settings.lengths:
        rates.append(machine_rates())
        for dim in settings.dims:
            for candidates in settings.candidates:
                rows += _measured(_Case(settings, length, dim, candidates), repeats)
    machine = {name: max(each[name] for each in rates) for name in rates[0]}
    rows = [row | _shares(row, machine) for row in rows]
    _print(rows, machine)
    print("\n".join(provenance(settings.seed, repeats)))
    if report is not None:
        write_report(report, rows, _ratios(rows), settings.model_dump() | machine)


def machine_rates() -> Rates:
    """The best of some copies (bytes read and written a second) and matrix products (FLOP a second)."""
    size, width = 1 << 25, 1024
    source, target, square = torch.ones(size), torch.zeros(size), torch.randn(width, width)

    def best(run: Callable[[], object]) -> float:
        run()
        return min(timed(run).wall for _ in range(4))

    copy, product = best(lambda: target.copy_(source)), best(lambda: torch.mm(square, square))
    return {"copy_bytes_per_s": 2 * 4 * size / copy, "matmul_flop_per_s": 2 * width**3 / product}


class _Case:
    """Full windows of L behaviors, each of one request, and `candidates` candidates of each."""

    def __init__(self, settings: SearchBench, length: int, dim: int, candidates: int) -> None:
        self.length, self.dim, self.candidates, self.k = length, dim, candidates, min(settings.k, length)
        self.requests = max(1, settings.floats // (length * dim * candidates))
        rng = torch.Generator().manual_seed(settings.seed)
        count = self.requests * candidates
        self.key_ND = torch.randn(self.requests * length, dim, generator=rng)
        self.query_CD = torch.randn(count, dim, generator=rng)
        self.gradient_CK = torch.randn(count, self.k, generator=rng)
        ends = torch.arange(1, self.requests + 1) * length
        self.index_WX = ends[:, None] - 1 - torch.arange(length)
        self.request_C = torch.arange(self.requests).repeat_interleave(candidates)
        # A copy of the history a candidate: no more of them than memory allows.
        self.copied = min(count, max(1, settings.most // (length * dim)))
        self.scorer = DotScorer(None, None, 1, None, None)
        mask, zero = torch.ones_like(self.index_WX, dtype=torch.bool), torch.zeros_like(self.index_WX)
        marks = Marks(zero, zero, zero)
        lengths = torch.full((self.requests,), length)
        self.windows = Windows(self.index_WX, mask, marks, None, self.request_C, lengths)

    @property
    def count(self) -> int:
        return self.query_CD.shape[0]

    def ours(self, learns: bool) -> Tensor:
        """As in training: the search without gradient, the scores of what it kept with."""
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
        """gather + bmm + topk, each candidate with a copy of its history."""
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
        """All ways keep the same scores."""
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
    taken: dict[tuple[str, bool], list[Seconds]] = {}
    for _ in range(repeats):
        for learns in (False, True):
            for name, way in ways.items():
                with torch.set_grad_enabled(learns):
                    taken.setdefault((name, learns), []).append(timed(lambda: way.run(learns)))  # noqa: B023
    return [_row(case, name, learns, ways[name].candidates, each) for (name, learns), each in taken.items()]


def _row(case: _Case, name: str, learns: bool, count: int, taken: Sequence[Seconds]) -> Row:
    wall, cpu = ([1e6 * each[clock] / count for each in taken] for clock in (0, 1))
    return {
        "way": name,
        "gradients": learns,
        "length": case.length,
        "dim": case.dim,
        "candidates_a_request": case.candidates,
        "candidates": count,
        "us_a_candidate": statistics.median(wall),
        "cpu_us_a_candidate": statistics.median(cpu),
        "cpu_min": min(cpu),
        "cpu_max": max(cpu),
    }


def _shares(row: Row, machine: Rates) -> Row:
    """What the work needs at least, over what it took: a history read once a request; a product a pair."""
    seconds = 1e-6 * row["cpu_us_a_candidate"]
    needed = 4 * row["length"] * row["dim"] / row["candidates_a_request"]
    products = 2 * row["length"] * row["dim"]
    return {
        "share_of_copy": needed / seconds / machine["copy_bytes_per_s"],
        "share_of_matmul": products / seconds / machine["matmul_flop_per_s"],
    }


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Processor time of a baseline over ours, by case."""
    found: dict[str, float] = {}
    for case in _cases(rows):
        for name in (ROWS, PADDED):
            ours, other = case[OURS], case[name]
            kind = "train" if ours["gradients"] else "forward"
            place = f"L={ours['length']} D={ours['dim']} C={ours['candidates_a_request']}"
            found[f"{kind} {place}: {name} / ours"] = other["cpu_us_a_candidate"] / ours["cpu_us_a_candidate"]
    return found


def _cases(rows: Sequence[Row]) -> list[dict[str, Row]]:
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = row["gradients"], row["length"], row["dim"], row["candidates_a_request"]
        cases.setdefault(key, {})[row["way"]] = row
    return [cases[key] for key in sorted(cases, key=lambda key: (key[0], key[1], -key[2], key[3]))]


def _print(rows: Sequence[Row], machine: Mapping[str, float]) -> None:
    for learns in (False, True):
        cells = [_cells(case, learns) for case in _cases(rows) if case[OURS]["gradients"] == learns]
        print("training: scores, top-K and gradients" if learns else "forward: scores and top-K")
        head = ["L", "D", "cand.", "us/cand.", "min-max", ROWS, PADDED, f"{ROWS} / ours", f"{PADDED} / ours"]
        print("\n".join(table_lines(head if learns else [*head, "of copy", "of matmul"], cells)), end="\n\n")
    print(
        f"one thread copies {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and written) and multiplies "
        f"{machine['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s; us are of the processor, a candidate, medians"
    )


def _cells(case: Mapping[str, Row], learns: bool) -> list[str]:
    ours, rows, padded = (case[name] for name in (OURS, ROWS, PADDED))
    us = [each["cpu_us_a_candidate"] for each in (ours, rows, padded)]
    cells = [f"{ours['length']:,}", str(ours["dim"]), str(ours["candidates_a_request"]), f"{us[0]:,.1f}"]
    cells += [f"{ours['cpu_min']:,.1f}-{ours['cpu_max']:,.1f}", f"{us[1]:,.1f}", f"{us[2]:,.1f}"]
    cells += [f"{us[1] / us[0]:.2f}", f"{us[2] / us[0]:.2f}"]
    if learns:
        return cells
    return [*cells, f"{ours['share_of_copy']:.0%}", f"{ours['share_of_matmul']:.0%}"]
