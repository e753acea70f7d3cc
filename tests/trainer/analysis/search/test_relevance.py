"""Learned relevance by loops, rank correlation over cells, recall by place, and what clusters know."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tests.helpers.models import batch_of, model_of, preset, small_log
from trainer.analysis.search.discriminability import discriminability, pooled_vectors
from trainer.analysis.search.information import Truth, count_truths, places, read_impressions
from trainer.analysis.search.measure import OWN, measure_search
from trainer.analysis.search.ranking import REFERENCES, Ranking, obstacle, wanted_by_place
from trainer.analysis.search.relevance import LearnedRelevance, frequent, rank_correlations, weighted_places
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader

FEATURE, LENGTH, ROWS = "category_id", 12, 9


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("relevance") / "log")


def drawn(rng: np.random.Generator, candidates: int, width: int, k: int = 2) -> Ranking:
    window = rng.integers(0, 5, (candidates, width))
    window[:, 3:] = np.where(rng.random((candidates, max(width - 3, 0))) < 0.3, -1, window[:, 3:])
    window = np.where(np.cumsum(window < 0, axis=1) > 0, -1, window)
    score = np.where(window >= 0, rng.normal(size=window.shape), -np.inf)
    return Ranking(rng.integers(0, 5, candidates), window, score, np.argsort(-score, axis=1)[:, :k])


@given(seed=st.integers(0, 99), candidates=st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_learned_relevance_is_the_mean_of_centred_scores(seed: int, candidates: int) -> None:
    rng = np.random.default_rng(seed)
    categories, bins = np.array([3, 1, 4]), places(8, pooled=True)
    learned, cells = LearnedRelevance(categories, bins), defaultdict(list)
    for ranking in (drawn(rng, candidates, 8), drawn(rng, candidates, 5)):
        learned.add(ranking)
        for target, window, score in zip(ranking.target, ranking.window, ranking.score, strict=True):
            mean = np.mean([s for s, c in zip(score, window, strict=True) if c >= 0])
            for place, (s, category) in enumerate(zip(score, window, strict=True)):
                if category >= 0 and target in categories and category in categories:
                    cells[target, category, bins[place]].append(s - mean)
    found = learned.mean()
    for i, target in enumerate(categories):
        for j, category in enumerate(categories):
            for b in range(bins[-1] + 1):
                expected = cells.get((target, category, b))
                if expected is None:
                    assert math.isnan(found[i, j, b])
                else:
                    assert found[i, j, b] == pytest.approx(np.mean(expected))


def test_cells_are_ranked_where_a_behavior_was_seen() -> None:
    learned = np.array(
        [[[0.1, 0.5], [np.nan, 0.2]], [[1.0, 1.0], [1.0, 1.0]], [[np.nan, np.nan], [1.0, 2.0]]]
    )
    information = np.array([[[1.0, 3.0], [9.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]])
    found = rank_correlations(learned, information)
    assert found[0] == pytest.approx(spearmanr([0.1, 0.5, 0.2], [1, 3, 2]).statistic) == pytest.approx(1)
    # All equal, and too few.
    assert np.isnan(found[1:]).all()
    counts = np.array([[[1.0, 3.0], [0.0, 0.0]]] * 3)
    over = weighted_places(information, [counts])
    assert over[0, 0] == pytest.approx((1 + 9) / 4) and math.isnan(over[0, 1])


def test_the_most_frequent_categories_leave_out_id_0() -> None:
    truth = Truth(np.zeros((4, 4, 1), dtype=np.float32), np.zeros(3, dtype=np.int64), np.array([99, 2, 0, 7]))
    assert frequent(truth).tolist() == [3, 1] and frequent(truth, 1).tolist() == [3]


def test_recall_by_place_counts_the_most_informative_of_each_bin() -> None:
    bins = places(4, pooled=True)  # 0, 1, 1, 2
    window = np.array([[1, 1, 1, 1], [1, 1, 1, -1]])
    gain = np.array([[0.0, 0.9, 0.5, 0.7], [0.3, 0.0, 0.0, 0.0]])
    order = np.array([[1, 2], [1, 0]])
    wanted, kept = wanted_by_place(Ranking(np.ones(2, int), window, np.zeros((2, 4)), order), gain, bins)
    # Of the first the columns 1 and 3; of the second column 0 alone, for the others tell nothing.
    assert wanted.tolist() == [1, 1, 1] and kept.tolist() == [1, 1, 0]


def test_clusters_know_labels_that_lie_apart_and_no_shuffled_ones() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    found = discriminability(rng.normal(size=(400, 3)) + 9 * labels[:, None], labels, range(2), (2, 5, 50))
    assert found is not None and found.clusters == (2, 5)  # 50 clusters would have 8 each
    assert found.normalised.shape == (2, 2)
    assert found.normalised[0] == pytest.approx([1, 1]) and found.information[0] == pytest.approx(
        np.log(2), rel=0.01
    )
    assert (found.by_chance < 0.05).all()
    blind = discriminability(rng.normal(size=(400, 3)), labels, range(2), (2, 5))
    assert blind is not None and (blind.normalised < 0.05).all()
    assert discriminability(rng.normal(size=(400, 3)), np.ones(400, dtype=int), range(2)) is None
    assert discriminability(np.zeros((400, 0)), labels, range(2)) is None


@pytest.mark.parametrize("name", ["dare", "sdim", "twin", "td_sasrec"])
def test_pooled_vectors_are_the_models_own(log: Path, name: str) -> None:
    """h alone, and not the target's vector nor their product."""
    config = preset(name, log)
    model, batch = model_of(config).eval(), batch_of(config)
    seen: list[list[torch.Tensor]] = []
    model.branches["main"].sequence.register_forward_hook(lambda _, __, parts: seen.append(parts))
    found = pooled_vectors(model, batch)
    branches = model.branches.named().values()
    if name == "td_sasrec":  # which pools nothing
        assert found.shape == (batch.candidates, 0)
        return
    assert found.shape == (batch.candidates, sum(branch.widths[""] for branch in branches))
    np.testing.assert_array_equal(found[:, : seen[0][1].shape[1]], seen[0][1].detach().numpy())


def test_a_run_is_measured_as_its_batches_are(log: Path) -> None:
    data = DataConfig(log=log, history_length=LENGTH, batch_candidates=30, prefetch=0, workers=0)
    truths = count_truths(
        read_impressions(SequenceLogReader(data, "train", None), FEATURE, LENGTH, ROWS), ROWS
    )
    assert set(truths) == {"exact", "pooled"}
    config = preset("dare", log)
    model = model_of(config).eval()
    steps = list(SequenceLogReader(data, "train", None, seed=1).steps())
    categories = frequent(truths["pooled"])
    found = measure_search(
        model,
        ((step.batch, step.batch) for step in steps),
        truths,
        FEATURE,
        LearnedRelevance(categories, truths["pooled"].bins),
        enough=1,
    )
    assert not found.obstacle and found.k == config.model.k and found.candidates > 0
    assert set(found.tallies["pooled"]) == {OWN, *REFERENCES}
    for tally in found.tallies["pooled"].values():
        assert 0 <= tally.mean("ndcg") <= 1 and 0 <= tally.mean("hits") <= found.k
        assert np.nanmax(tally.recall_by_place()) <= 1
    assert 0 < found.kept["pooled"].share < 1
    assert len(found.vectors) == len(found.labels) == sum(step.batch.candidates for step in steps)
    assert "several branches" in obstacle(model_of(preset("twin", log)))
    assert "windows" in obstacle(model_of(preset("td_sasrec", log)))
