"""Stage one alone: what share of the device's copy rate it reads behaviors at."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.gpu.check import Answer, Check, Row, answer
from benchmarks.gpu.inputs import move_tensors
from benchmarks.gpu.measure import difference, forget_memory, memory
from benchmarks.gpu.plain_forms import without_kernels
from benchmarks.harness.timing import copy_rate, single_seconds
from benchmarks.inputs.windows import full_windows
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query
from trainer.model.windows import Windows

_K, _CANDIDATES, _AIM = 20, 3, 0.70
_FLOATS = 1 << 28


def search(check: Check) -> Answer:
    """How much of a copy's rate stage one reaches over full windows, by L and D: as the trainer runs it,
    with a kernel of its own where it has one and without; the gathered form; and products of slices with
    topk, which gather nothing.

    Expected: the trainer's at 0.70 or more of the copy rate (`different` names cases below that); a
    gathered copy alone cannot pass a third, for it reads, writes and reads again.
    """
    copied = copy_rate(check.device, check.size(1 << 28, 1 << 18), repeats=10, warm=3)
    rows: list[Row] = []
    for length in (1_000, 10_000) if not check.dry else (64,):
        for width in (16, 32, 64, 128) if not check.dry else (16,):
            count = max(2, check.size(_FLOATS, 1 << 14) // (length * width))
            windows, raw = full_windows(count, _CANDIDATES, length, width)
            windows, raw = move_tensors(windows, check.device), move_tensors(raw, check.device)
            rows += _measure(check, windows, raw, copied)
            del windows, raw
            forget_memory()
            check.keep(_judge(check, rows, copied))
    return _judge(check, rows, copied)


def _measure(check: Check, windows: Windows, raw: AttentionVectors, copied: float) -> list[Row]:
    """All ways of one case, and whether they keep the same scores."""
    length, width = windows.index.shape[1], raw.key_ND.shape[1]
    needed, rows = raw.key_ND.numel() * raw.key_ND.element_size(), []
    wanted = _by_slices(windows, raw).sort(dim=1).values
    for name, run in _ways(windows, raw).items():
        apart = difference(run().sort(dim=1).values, wanted)
        taken = single_seconds(run, check.size(10, 1), check.size(3, 1))
        rows.append(
            {
                "L": length,
                "D": width,
                "windows": windows.index.shape[0],
                "way": name,
                "ms": 1000 * taken,
                "of copy": needed / taken / copied,
                "difference": apart,
                **memory(),
            }
        )
    return rows


def _ways(windows: Windows, raw: AttentionVectors) -> Mapping[str, Callable[[], Tensor]]:
    """Each gives the kept scores, [C, K]."""
    scorer = DotScorer(None, None, 1, None, None)
    vectors = scorer.encode(raw)

    @torch.no_grad()
    def ours() -> Tensor:
        kept = DotSearch(_K)(Query(scorer, vectors, raw, move_tensors(windows, raw.key_ND.device)))
        score: Tensor = scorer.of_kept(vectors, kept)[:, 0]
        return score

    def plain() -> Tensor:
        with without_kernels():
            return ours()

    return {
        "the trainer's": ours,
        "the trainer's, plain torch": plain,
        "gather, dot, topk": lambda: _gathered(windows, raw),
        "slices, topk": lambda: _by_slices(windows, raw),
    }


@torch.no_grad()
def _gathered(windows: Windows, raw: AttentionVectors) -> Tensor:
    """Every window's keys side by side first: [W, X, D]."""
    key_WXD = torch.nn.functional.embedding(windows.index, raw.key_ND)
    query_WCD = raw.query_CD.view(windows.index.shape[0], -1, raw.query_CD.shape[1])
    score = torch.bmm(query_WCD, key_WXD.transpose(1, 2)) * raw.query_CD.shape[1] ** -0.5
    return score.flatten(0, 1).topk(_K, dim=1).values


@torch.no_grad()
def _by_slices(windows: Windows, raw: AttentionVectors) -> Tensor:
    """Keys of full windows lie side by side already."""
    count, width = windows.index.shape[0], raw.query_CD.shape[1]
    key_WXD, query_WCD = raw.key_ND.view(count, -1, width), raw.query_CD.view(count, -1, width)
    score = torch.bmm(query_WCD, key_WXD.transpose(1, 2)) * width**-0.5
    return score.flatten(0, 1).topk(_K, dim=1).values


def _judge(check: Check, rows: list[Row], copied: float) -> Answer:
    wrong = [f"{row['way']}, L {row['L']}, D {row['D']}" for row in rows if row["difference"] > 1e-4]
    ours = [row for row in rows if row["way"] == "the trainer's"]
    slow = [f"L {row['L']}, D {row['D']}" for row in ours if row["of copy"] < _AIM]
    return answer(rows, wrong if check.dry else [*wrong, *slow], **{"copy GB/s": copied / 1e9})
