"""Operators that have a form of their own for each device: the CPU's against the device's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.check import Answer, Check, Row, answer
from benchmarks.gpu.inputs import move_tensors
from benchmarks.gpu.measure import difference
from benchmarks.gpu.plain_forms import without_kernels
from benchmarks.inputs.windows import full_windows
from embeddings.first_rows import FirstWeights, initial_rows_
from tests.helpers.models import drawing, drawn_vectors, drawn_windows
from trainer.model.ops import bags, top
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer, MlpScorer
from trainer.model.retrieve.search import Query
from trainer.model.time import age_bucket

_ROWS, _QUERIES, _WIDTH, _KEPT = 5_000, 700, 32, 20
_LARGEST = 1e-5


def forms(check: Check) -> Answer:
    """Whether each operator gives on the device what its CPU form gives: values and gradients of sums and
    products of rows, the top K with ties, infinities and NaN, buckets of ages, first weights, a whole search.

    Expected: `different` is empty. First weights of kind normal may differ in the last bit (logarithms and
    cosines do), others are bit-equal.
    """
    device = check.device
    rows = _operators(device)
    with without_kernels() as asked:
        rows += [{**row, "operator": f"{row['operator']}, plain torch"} for row in _operators(device)]
    ages = torch.cat([torch.arange(1, 1 << 16), (torch.rand(1 << 16, generator=drawing(1)) * 2**40).long()])
    rows.append(_equal("buckets of ages", [age_bucket(ages)], [age_bucket(ages.to(device))]))
    rows += _first_weights(device)
    different = [row["operator"] for row in rows if not row["alike"]]
    return answer(rows, different, **{"modules with kernels": len(asked)})


def _operators(device: torch.device) -> list[Row]:
    return [*_differentiable(device), *_tops(device), *_scorers(device), *_searches(device)]


def _differentiable(device: torch.device) -> list[Row]:
    rng = drawing(3)
    rows = torch.randn(_ROWS, _WIDTH, generator=rng)
    query = torch.randn(_QUERIES, _WIDTH, generator=rng)
    # Few rows of many uses beside many of few.
    index = (torch.rand(_QUERIES, _KEPT, generator=rng) ** 3 * _ROWS).long()
    weight, numbers = torch.randn(_QUERIES, _KEPT, generator=rng), torch.randn(_ROWS, generator=rng)
    cases: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "weighted_bags": (lambda r, w: bags.weighted_bags(r, index.to(r.device), w), (rows, weight)),
        "dots": (lambda q, r: bags.dots(q, r, index.to(r.device)), (query, rows)),
        "rows_at": (lambda r: bags.rows_at(r, index.to(r.device)), (rows,)),
        "rows_at of numbers": (lambda r: bags.rows_at(r, index.to(r.device)), (numbers,)),
    }
    return [_alike(name, _learn(run, given, device)) for name, (run, given) in cases.items()]


def _learn(
    run: Callable[..., Tensor], given: Sequence[Tensor], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Value and gradients on the CPU, each beside the device's."""
    sides = []
    for place in (torch.device("cpu"), device):
        leaves = [part.detach().to(place).requires_grad_() for part in given]
        out = run(*leaves)
        gradient = torch.randn(out.shape, generator=drawing(5))
        out.backward(gradient.to(place))
        sides.append([out, *(leaf.grad for leaf in leaves)])
    return list(zip(*sides, strict=True))


def _tops(device: torch.device) -> list[Row]:
    """Scores in steps of an eighth, so that there are ties at any K."""
    score = torch.randn(300, 4000, generator=drawing(7)).mul(8).round().div(8)
    score[5], score[6, 7] = -torch.inf, torch.nan
    found = []
    for k in (1, 20, 4000):
        for last in (False, True):
            ours, theirs = (top.top_columns(score.to(place), k, last=last) for place in ("cpu", device))
            found.append(_equal(f"top {k}, {'last' if last else 'first'} of equals", ours, theirs))
    return found


def _scorers(device: torch.device) -> list[Row]:
    """DIN's small network over whole windows, by value and gradient."""
    scorer = MlpScorer(_WIDTH, 36, None)
    windows = drawn_windows(drawing(8), 9, 24, 60)
    raw = drawn_vectors(drawing(9), _WIDTH, 60)

    def run(query_CD: Tensor, key_ND: Tensor) -> Tensor:
        place = query_CD.device
        vectors = AttentionVectors(query_CD, key_ND, raw.group_C.to(place))
        scores: Tensor = scorer.to(place).over_windows(vectors, move_tensors(windows, place))
        mask = move_tensors(windows, place).mask[windows.of_candidate.to(place)]
        return scores.masked_fill(~mask[:, None], 0)

    return [_alike("MLP over windows", _learn(run, (raw.query_CD, raw.key_ND), device))]


def _searches(device: torch.device) -> list[Row]:
    """The kept scores: two behaviors whose scores differ by rounding alone may change places at K."""
    scorer, found = DotScorer(None, None, 1, None, None), []
    ragged = drawn_windows(drawing(10), 12, 40, 70), drawn_vectors(drawing(11), _WIDTH, 70, behaviors=40)
    for name, (windows, raw) in {"ragged": ragged, "full": full_windows(30, 3, 700, _WIDTH)}.items():
        sides = []
        for place in (torch.device("cpu"), device):
            there = move_tensors(raw, place)
            vectors = scorer.encode(there)
            kept = DotSearch(_KEPT)(Query(scorer, vectors, there, move_tensors(windows, place)))
            score = scorer.of_kept(vectors, kept)[:, 0].masked_fill(~kept.mask, 0)
            sides.append(score.sort(dim=1).values)
        found.append(_alike(f"search, {name} windows", [(sides[0], sides[1])]))
    return found


def _first_weights(device: torch.device) -> list[Row]:
    found = []
    for kind in ("uniform", "normal"):
        ours, theirs = (
            initial_rows_(torch.empty(20_000, 16, device=place), 17, FirstWeights(kind, 0.05))
            for place in ("cpu", device)
        )
        row = _alike(f"first weights, {kind}", [(ours, theirs)])
        row["bit-equal"] = float((ours == theirs.cpu()).double().mean())
        row["alike"] &= kind == "normal" or row["bit-equal"] == 1
        found.append(row)
    return found


def _alike(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Row:
    worst = max(difference(theirs, ours) for ours, theirs in pairs)
    return {"operator": name, "difference": worst, "alike": worst <= _LARGEST}


def _equal(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Row:
    same = [torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True)]
    return {"operator": name, "difference": 0.0 if all(same) else 1.0, "alike": all(same)}
