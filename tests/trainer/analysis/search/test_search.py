"""Quality of a search: counts and information by plain loops, NDCG at its ends, the model's own order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.logs import FEATURES
from tests.helpers.models import batch_of, model_of, preset, small_log
from trainer.analysis.search.information import count_truths, places, read_impressions
from trainer.analysis.search.kept import kept_behaviors
from trainer.analysis.search.ranking import Ranking, quality, rank, references
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader

FEATURE, LENGTH = "category_id", 12
ROWS = FEATURES[FEATURE]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("retrieval") / "log")


def reader(log: Path) -> SequenceLogReader:
    data = DataConfig(log=log, history_length=LENGTH, batch_candidates=30, prefetch=0, workers=0)
    return SequenceLogReader(data, "train", None)


def bits(table: list[list[float]]) -> float:
    """Mutual information by its definition."""
    joint = np.array(table) / np.sum(table)
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return float(sum(p * np.log2(p / q) for p, q in zip(joint.flat, outer.flat, strict=True) if p > 0))


@pytest.mark.parametrize("pooled", [False, True])
def test_the_truth_is_that_of_counting_one_candidate_at_a_time(log: Path, pooled: bool) -> None:
    bins = places(LENGTH, pooled)
    present: Counter[tuple[int, int, int, bool]] = Counter()
    total: Counter[tuple[int, int, bool]] = Counter()
    shown: Counter[int] = Counter()
    for step in reader(log).steps():
        batch = step.batch
        ids = batch.features[FEATURE].values().tolist()
        for c, request in enumerate(batch.candidate_request.tolist()):
            target, clicked = ids[batch.behaviors + c], bool(batch.labels[c, 0] > 0)
            shown[target] += 1
            window = ids[int(batch.window_start[request]) : int(batch.window_end[request])][::-1]
            for place, held in enumerate(window):
                present[target, held, int(bins[place]), clicked] += 1
                total[target, int(bins[place]), clicked] += 1
    truths = count_truths(read_impressions(reader(log), FEATURE, LENGTH, ROWS), ROWS)
    truth = truths["pooled" if pooled else "exact"]
    assert dict(shown) == {t: n for t, n in enumerate(truth.shown.tolist()) if n}
    assert truth.gain.shape == (ROWS, ROWS, bins[-1] + 1)
    for target, held, place in {key[:3] for key in present}:
        both = [present[target, held, place, clicked] for clicked in (True, False)]
        rest = [total[target, place, clicked] - n for clicked, n in zip((True, False), both, strict=True)]
        assert truth.gain[target, held, place] == pytest.approx(bits([both, rest]), abs=1e-5)
    assert (truth.gain > 0.1).sum() > 20
    unseen = truth.gain.copy()
    for target, held, place in {key[:3] for key in present}:
        unseen[target, held, place] = 0
    assert (unseen == 0).all()


def test_places_pool_to_powers_of_two() -> None:
    assert places(9, pooled=True).tolist() == [0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert places(3, pooled=False).tolist() == [0, 1, 2]


def made(score: list[float], order: list[int]) -> Ranking:
    window = np.where(np.isfinite(score), 1, -1)
    return Ranking(np.array([1]), window[None], np.array([score]), np.array([order]))


def test_quality_at_its_ends_and_by_hand() -> None:
    gain = np.array([[0.4, 0.0, 0.3, 0.1, 0.9]])  # nothing lies at the last place
    score = [4.0, 1.0, 3.0, 2.0, -np.inf]
    best = quality(made(score, [0, 2]), gain)
    assert (best.ndcg[0], best.hits[0], best.correlation[0]) == pytest.approx((1.0, 2, 1.0))
    swapped = quality(made(score, [2, 0]), gain)
    third = 1 / np.log2(3)
    assert swapped.ndcg[0] == pytest.approx((0.3 + 0.4 * third) / (0.4 + 0.3 * third))
    assert swapped.hits[0] == 2
    worst = quality(made([-s for s in score[:4]] + [-np.inf], [1, 3]), gain)
    assert worst.ndcg[0] == pytest.approx(0.1 * third / (0.4 + 0.3 * third))
    assert (worst.hits[0], worst.correlation[0]) == pytest.approx((0, -1.0))
    tied = quality(made([1.0, 1.0, 3.0, 3.0, -np.inf], [2, 3]), gain)
    assert tied.correlation[0] == pytest.approx(0.0)  # mean ranks 1.5 1.5 3.5 3.5 against 4 1 3 2


@pytest.mark.parametrize("name", ["dare", "twin_paper_dare"])
def test_ranked_is_the_order_of_the_models_own_scores(log: Path, name: str) -> None:
    config = preset(name, log)
    model, batch = model_of(config).eval(), batch_of(config)
    seen = rank(model, batch, FEATURE)
    k = config.model.k
    length = (batch.window_end - batch.window_start)[batch.candidate_request].numpy()
    assert 0 < seen.target.size == (length > k).sum() < length.size
    assert (seen.order == np.argsort(-seen.score, axis=1, kind="stable")[:, :k]).all()
    with torch.no_grad():
        kept = model.search(batch)["main"]
    columns = kept.marks.position.numpy()[length > k] - 1
    assert (np.sort(seen.order, axis=1) == np.sort(columns, axis=1)).all()
    ids = batch.features[FEATURE].values().numpy()
    assert (seen.target == ids[batch.behaviors :][length > k]).all()
    newest = ids[batch.window_end.numpy() - 1][batch.candidate_request.numpy()]
    assert (seen.window[:, 0] == newest[length > k]).all()
    assert ((seen.window >= 0).sum(axis=1) == length[length > k]).all()


def test_references_know_places_and_categories_alone() -> None:
    window = np.array([[3, 1, 3, 2, -1, -1]])
    seen = Ranking(np.array([3]), window, np.zeros((1, 6)), np.zeros((1, 2), dtype=int))
    found = references(seen, np.random.default_rng(0))
    assert found["newest first"].order.tolist() == [[0, 1]]
    assert found["same category, newest first"].order.tolist() == [[0, 2]]
    drawn = [references(seen, np.random.default_rng(i))["random"].order[0].tolist() for i in range(40)]
    assert {place for order in drawn for place in order} == {0, 1, 2, 3}


@pytest.mark.parametrize(("name", "most"), [("td_sasrec", 4), ("sdim", LENGTH), ("dare", 4), ("dsi_tin", 8)])
def test_kept_behaviors_are_those_of_each_candidates_window(log: Path, name: str, most: int) -> None:
    """Searches keep at most K a branch; models without one, all that they look at."""
    more = ["model.branches.content.k=4"] if name == "dsi_tin" else []
    config = preset(name, log, *more)
    model, batch = model_of(config).eval(), batch_of(config)
    index, mask = (part.numpy() for part in kept_behaviors(model, batch))
    request = batch.candidate_request
    start, end = (part[request].numpy() for part in (batch.window_start, batch.window_end))
    assert index.shape == mask.shape and index.shape[0] == batch.candidates
    assert ((index >= start[:, None]) & (index < end[:, None]))[mask].all()
    assert (
        mask.sum(axis=1) == np.minimum(end - start, most if most != 8 else 4) * (2 if most == 8 else 1)
    ).all()
