"""What a search keeps for a candidate depends on the candidate and its window alone, to the last behavior.

Histories here are a few items over and over, whose copies no search can tell apart but by recency.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.logs import Shape, random_rows, write_log
from tests.helpers.model_references import search_reference
from tests.helpers.models import BEHAVIORS, GROUPS, MARK_ROWS, draw, drawing, drawn_windows
from tests.helpers.presets import PRESETS, of_tasks
from tests.programs.preset_steps import small_config
from tests.trainer.model.retrieve.test_search import walk
from tests.trainer.serving.test_scorer import clustered
from tests.trainer.test_presets import model_of
from trainer.data.reader import SequenceLogReader
from trainer.log.clusters import ClusterInfo, cluster_history
from trainer.model.frame import TwoStageModel
from trainer.model.ops.signs import sign_bits
from trainer.model.ops.top import top_columns_by_topk
from trainer.model.retrieve.dot import DotSearch, SoftSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer, FeatureProjection, MlpScorer, Scorer
from trainer.model.retrieve.search import Query, Search
from trainer.model.retrieve.simhash import HammingSearch
from trainer.model.time import TimeBias, TimeEncoding
from trainer.model.windows import Selection, Windows
from trainer.run_config import Config
from trainer.serving.window_search import per_window


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hundreds of behaviors of seven items, long ago, so that their ages fall into one or two buckets."""
    rng = np.random.default_rng(5)
    rows = random_rows(6, Shape(users=6, behaviors=400, requests=4, candidates=9))
    for row in rows:
        row["history_item_id"] = rng.integers(1, 8, row["num_behaviors"]).tolist()
        row["history_category_id"] = [item // 3 for item in row["history_item_id"]]
        row["request_timestamp"] = [time + 10**7 for time in row["request_timestamp"]]
        row["request_history_end"] = [row["num_behaviors"]] * row["num_requests"]
        row["candidate_category_id"] = [[item // 3 % 9 for item in ids] for ids in row["candidate_item_id"]]
        for feature, divisor in (("department_id", 3), ("type_id", 1)):
            row[f"history_{feature}"] = [i // divisor for i in row["history_category_id"]]
            row[f"candidate_{feature}"] = [[i // divisor for i in c] for c in row["candidate_category_id"]]
    more = {"department_id": 3, "type_id": 9}
    return write_log(tmp_path_factory.mktemp("company") / "log", {"train": rows}, more=more)


def kept_by(model: TwoStageModel, config: Config, rows: dict[str, int]) -> tuple[dict[str, Tensor], Tensor]:
    """For each branch the ranks of what every candidate keeps, and all logits; in one order of candidates."""
    kept: dict[str, list[Tensor]] = {}
    logits, order = [], []
    for step in SequenceLogReader(config.data, "train", rows).steps():
        batch = step.batch
        with torch.no_grad():
            logits.append(model(batch).logits)
            for name, found in model.retrieve(batch).items():
                if model.branches.named()[name].search is not None:
                    rank = torch.where(found.selection.mask, found.selection.marks.position, 0)
                    kept.setdefault(name, []).append(nn.functional.pad(rank, (0, 500 - rank.shape[1])))
        order += [(int(batch.request_id[r]), c) for c, r in enumerate(batch.candidate_request.tolist())]
    place = torch.tensor(np.lexsort(np.array(order).T[::-1]))
    return {name: torch.cat(parts)[place] for name, parts in kept.items()}, torch.cat(logits)[place]


@pytest.fixture(scope="module")
def clustered_log(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with clusters of up to three copies of one item."""
    rows = pq.read_table(log / "train").to_pylist()
    for row in rows:
        vectors = np.eye(8, dtype=np.float32)[row["history_item_id"]].reshape(-1, 8)
        groups, times = np.zeros(len(vectors)), np.array(row["history_timestamp"])
        found = cluster_history(vectors, groups, times, ClusterInfo(chunk=9, cap=3))
        row |= {"cluster_size": found.size.tolist(), "cluster_time": found.time.tolist()}
    return clustered(tmp_path_factory.mktemp("clustered") / "log", rows)


@pytest.mark.parametrize("preset", [preset for preset in (*PRESETS, "twin_v2") if not of_tasks(preset)])
def test_copies_are_kept_alike_alone_in_company_and_by_a_server(
    preset: str, log: Path, request: pytest.FixtureRequest
) -> None:
    if preset == "twin_v2":
        log = request.getfixturevalue("clustered_log")
    config = small_config(preset, log)
    words = {"history_length": 400, "requests_per_block": 8, "batch_candidates": 500}
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update=words),
            "model": config.model.model_copy(update={"k": 30}),
        }
    )
    model, rows = model_of(config, log)
    alone = config.data.model_copy(update={"requests_per_block": 1, "batch_candidates": 1})
    together = kept_by(model, config, rows)
    apart = kept_by(model, config.model_copy(update={"data": alone}), rows)
    for branch in model.branches.named().values():
        if branch.search is not None:
            branch.search = per_window(branch.search)
    served = kept_by(model, config, rows)
    for name, kept in together[0].items():
        assert torch.equal(kept, apart[0][name]) and torch.equal(kept, served[0][name]), name
    assert torch.allclose(together[1], apart[1], atol=1e-4)
    assert torch.allclose(together[1], served[1], atol=1e-4)


def drawn_scorer(kind: str, rng: torch.Generator, width: int) -> Scorer:
    bias = TimeBias(MARK_ROWS)
    made: Scorer
    if kind == "mlp":
        made = MlpScorer(width, 5, bias)
    elif kind == "encoding":
        made = DotScorer(None, None, 1, None, TimeEncoding(MARK_ROWS, width, "joint", GROUPS))
    elif kind == "features":
        maps = (FeatureProjection((width // 2, width - width // 2)) for _ in range(2))
        made = DotScorer(*maps, 1, bias, None)
    elif kind == "heads":
        query, key = (nn.Linear(width, 8, bias=False) for _ in range(2))
        made = DotScorer(query, key, 2, bias, None)
    else:
        form = "shared" if kind == "dot" else "target"
        made = DotScorer(None, None, 1, TimeBias(MARK_ROWS, form, GROUPS, 3), None)  # type: ignore[arg-type]
    draw(made, rng)
    return made


def copies(rng: torch.Generator, width: int, candidates: int, kinds: int) -> AttentionVectors:
    """Behaviors of few kinds: equal ones have equal vectors and cross features."""
    kind = torch.randint(0, kinds, (BEHAVIORS,), generator=rng)
    return AttentionVectors(
        torch.randn(candidates, width, generator=rng),
        torch.randn(kinds, width, generator=rng)[kind],
        torch.randint(0, GROUPS, (candidates,), generator=rng),
        torch.randn(kinds, generator=rng)[kind],
    )


def alike(windows: Windows) -> Windows:
    """All behaviors of one age and place."""
    return replace(windows, marks=windows.marks.each(lambda part: part.clamp(max=1)))


def slow(query: Query, k: int) -> Selection:
    """By exact scores, one candidate and one head after the other."""
    if query.scorer.heads == 1:
        return search_reference(query, k)
    heads, windows, exact = query.scorer.heads, query.windows, query.doubt().exact
    column = torch.zeros(windows.of_candidate.numel(), k, dtype=torch.int64)
    mask = torch.zeros_like(column, dtype=torch.bool)
    for c, window in enumerate(windows.of_candidate.tolist()):
        seen = windows.mask[window].nonzero().squeeze(1)
        score = torch.full((heads, windows.mask.shape[1]), -torch.inf, dtype=torch.float64)
        for head in range(heads):
            score[head, seen] = exact(torch.full_like(seen, c * heads + head), seen)
        best = walk(score, k)
        column[c, : len(best)], mask[c, : len(best)] = torch.tensor(best, dtype=torch.int64), True
    return windows.columns(column, mask)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["dot", "target", "encoding", "features", "heads", "mlp", "soft"]),
    kinds=st.integers(1, 6),
    k=st.sampled_from([1, 3, 9]),
    same=st.booleans(),
    device=st.booleans(),
)
@torch.no_grad()
def test_whatever_rounding_does_the_exact_scores_decide(
    seed: int, kind: str, kinds: int, k: int, same: bool, device: bool
) -> None:
    """Fast scores are shaken within the bound of their error; kept is what exact scores and recency say.

    Ranked as on the CPU, or by the operators that serve other devices.
    """
    rng = drawing(seed)
    windows = drawn_windows(rng, 3, 20, 7, sized=not same)
    raw = copies(rng, 6, 7, kinds)
    scorer = drawn_scorer("dot" if kind == "soft" else kind, rng, 6)
    query = Query(scorer, scorer.encode(raw), raw, alike(windows) if same else windows)
    search: Search = DotSearch(k)
    asked = query
    if kind == "soft":
        search = SoftSearch(k, 6, 4)
        draw(search, rng)
        asked = replace(query, scorer=search.index, vectors=search.index.encode(raw))
    expected = slow(asked, k)
    error_CH = asked.doubt().slack.view(7, -1, 1) / 2
    own = type(asked.scorer).over_windows

    def shaken(self: Scorer, vectors: AttentionVectors, windows: Windows) -> Tensor:
        score_CHX = own(self, vectors, windows)
        return score_CHX + error_CH * (1.8 * torch.rand(score_CHX.shape, generator=rng) - 0.9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(asked.scorer), "over_windows", shaken)
        if device:
            patch.setattr("trainer.model.retrieve.search.top_columns", top_columns_by_topk)
        found = search(query)
    served = per_window(search)(query)
    for kept in (found, served):
        assert torch.equal(kept.mask, expected.mask) and torch.equal(kept.index, expected.index)


@torch.no_grad()
def test_exact_scores_are_the_scores() -> None:
    for kind in ("dot", "target", "encoding", "features", "heads", "mlp"):
        rng = drawing(7)
        windows, raw = drawn_windows(rng, 3, 20, 7, sized=True), copies(rng, 6, 7, 20)
        scorer = drawn_scorer(kind, rng, 6)
        query = Query(scorer, scorer.encode(raw), raw, windows)
        fast_CHX = scorer.over_windows(query.vectors, windows)
        doubt, heads = query.doubt(), scorer.heads
        row, column = torch.nonzero(
            windows.mask[windows.of_candidate].repeat_interleave(heads, 0), as_tuple=True
        )
        assert row.numel() > 50
        off = (doubt.exact(row, column) - fast_CHX.flatten(0, 1)[row, column]).abs()
        assert (off <= doubt.slack[row] / 2).all() and float(doubt.slack.max()) < 1e-3, kind


@torch.no_grad()
def test_many_pairs_of_few_kinds_have_the_scores_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = drawing(8)
    windows, raw = drawn_windows(rng, 3, 20, 7, full=True), copies(rng, 6, 7, 3)
    scorer = drawn_scorer("heads", rng, 6)
    doubt = Query(scorer, scorer.encode(raw), raw, windows).doubt()
    row, column = (
        part.flatten() for part in torch.meshgrid(torch.arange(14), torch.arange(20), indexing="ij")
    )
    alone = torch.cat([doubt.exact(row[i : i + 1], column[i : i + 1]) for i in range(row.numel())])
    assert torch.equal(doubt.exact(row, column), alone)
    monkeypatch.setattr("trainer.model.retrieve.exact._MANY", 1)
    monkeypatch.setattr("trainer.model.retrieve.exact._PAIRS", 100)
    monkeypatch.setattr("trainer.model.retrieve.exact.CELLS", 12)
    monkeypatch.setattr("trainer.model.ops.whole.CELLS", 12)
    assert torch.equal(doubt.exact(row, column), alone)


def test_bits_of_equal_vectors_are_equal_wherever_they_lie() -> None:
    """Vectors in their planes, as far as single precision allows: rounding alone says on which side."""
    rng = drawing(9)
    search = HammingSearch(3, 64, 50, seed=1)
    plane = search.planes.double()
    vector_ND = torch.randn(50, 64, generator=rng).double()
    for n in range(50):
        vector_ND[n] -= plane[:, n] * (vector_ND[n] @ plane[:, n]) / plane[:, n].square().sum()
    vector_ND = vector_ND.float()
    alone = torch.cat([sign_bits(row[None], search.planes) for row in vector_ND])
    for copies in (3, 7, 40):
        assert torch.equal(sign_bits(vector_ND.repeat(copies, 1), search.planes), alone.repeat(copies, 1))
    exact = vector_ND.double() @ plane
    far = exact.abs() > 1e-5
    assert far.float().mean() > 0.9 and not far.all()
    assert torch.equal(alone[far], exact[far] > 0)
