"""HR, NDCG and intervals against scikit-learn, enumeration and simulation; what must not change an order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import ndcg_score, roc_auc_score

from embeddings.errors import DataError
from tests.helpers.metrics import Case, cases, clustered, grouped_auc
from trainer.quality.metrics import calibration_error, group_keys, logloss, measure
from trainer.quality.ranking import RANKS, Ranked, auc, auc_influence, half_width


def numbers(case: Case) -> list[float]:
    score, label, group, user = case
    return list(measure(score, label, group_keys(group), group_keys(user)).as_dict().values())


@settings(max_examples=100, deadline=None)
@given(cases([0, 1, 0.25]), st.randoms(use_true_random=False))
def test_the_order_of_candidates_and_doubling_them_change_nothing(case: Case, rng: object) -> None:
    order = np.random.default_rng(rng.randint(0, 2**31)).permutation(case[0].size)  # type: ignore[attr-defined]
    first = numbers(case)
    assert numbers(tuple(part[order] for part in case)) == pytest.approx(first, nan_ok=True)  # type: ignore[arg-type]
    renamed = measure(case[0], case[1], case[2] * 10**15 - 7, -case[3] * 10**15)
    assert list(renamed.as_dict().values()) == pytest.approx(first, nan_ok=True)
    found = measure(*(np.tile(part, 2) for part in case))
    once = measure(*case)
    for name in ("auc", "gauc", "gauc_user", "logloss", "ne", "pcoc", "ece", "rate", "groups", "users"):
        assert getattr(found, name) == pytest.approx(getattr(once, name), nan_ok=True), name


@settings(max_examples=100, deadline=None)
@given(cases([0, 1, 0.75]))
def test_only_the_order_of_scores_matters_to_a_ranking(case: Case) -> None:
    score, label, group, user = case
    found = [measure(s, label, group, user) for s in (score, np.tanh(score**3))]
    for name in ("auc", "auc_ci", "gauc", "gauc_ci", "gauc_user", "hr_1", "hr_5", "ndcg_5", "ndcg_10"):
        assert getattr(found[1], name) == pytest.approx(getattr(found[0], name), nan_ok=True), name
    turned = auc(1 - score, label) + auc(score, label)
    assert math.isnan(turned) or turned == pytest.approx(1)


@settings(max_examples=100, deadline=None)
@given(cases([0, 1, 0.2, 0.5]))
def test_a_label_between_stands_for_weights_of_both_classes(case: Case) -> None:
    """Each candidate twice: a positive of weight y and a negative of weight 1 - y."""
    score, label, group, _ = case
    two, weight = np.r_[np.ones(label.size), np.zeros(label.size)], np.r_[label, 1 - label]
    found = auc(score, label)
    if label.sum() > 0 and (1 - label).sum() > 0:
        assert found == pytest.approx(roc_auc_score(two, np.tile(score, 2), sample_weight=weight))
        assert auc_influence(score, label)[1].sum() == pytest.approx(0, abs=1e-9)
    else:
        assert math.isnan(found)
    values, sizes = [], []
    for part in (group == g for g in np.unique(group)):
        if not math.isnan(one := auc(score[part], label[part])):
            values.append(one), sizes.append(part.sum())
    expected = np.average(values, weights=sizes) if sizes else math.nan
    assert grouped_auc(score, label, group) == (pytest.approx(expected, nan_ok=True), len(sizes))


@settings(max_examples=100, deadline=None)
@given(cases([0, 1]), st.sampled_from(RANKS))
def test_ndcg_equals_scikit_learn_and_hits_the_definition(case: Case, k: int) -> None:
    score, label, group, _ = case
    gains, hits = [], []
    for part in (group == g for g in np.unique(group)):
        s, y = score[part], label[part]
        if not 0 < y.sum() < y.size:
            continue
        gains.append(ndcg_score([y], [s], k=k))
        # A tie that reaches over place k is drawn from: the chance that no positive is drawn.
        cut = np.sort(s)[::-1][min(k, s.size) - 1]
        tied, left = y[s == cut], k - int((s > cut).sum())
        none = math.comb(int((1 - tied).sum()), min(left, tied.size)) / math.comb(
            tied.size, min(left, tied.size)
        )
        hits.append(1.0 if y[s > cut].any() else 1 - none)
    hr, ndcg = Ranked.of(score, label, group).at(k)
    if not hits:
        assert math.isnan(hr) and math.isnan(ndcg)
        return
    assert hr == pytest.approx(np.mean(hits)) and ndcg == pytest.approx(np.mean(gains))


def test_hits_among_ties_are_the_mean_over_all_orders() -> None:
    score, label = np.array([0.9, 0.5, 0.5, 0.5, 0.1]), np.array([0, 1, 0, 1, 0])
    for k in (1, 2, 3, 4, 5):
        orders = [[0, *middle, 4] for middle in itertools.permutations([1, 2, 3])]
        expected = np.mean([label[order[:k]].any() for order in orders])
        assert Ranked.of(score, label, np.zeros(5, dtype=np.int64)).at(k)[0] == pytest.approx(expected)


def test_one_positive_that_nothing_tells_from_99_negatives() -> None:
    """Leave-last with a model that knows nothing: by chance, neither all hits nor none."""
    label = np.tile(np.r_[1.0, np.zeros(99)], 20)
    found = measure(np.full(2000, 0.5), label, np.repeat(np.arange(20), 100))
    assert (found.hr_1, found.hr_10, found.auc, found.gauc) == pytest.approx((0.01, 0.1, 0.5, 0.5))
    assert found.auc_ci == pytest.approx(0, abs=1e-12) and found.groups == 20


def test_the_interval_is_that_of_resampled_users() -> None:
    """Of an AUC, of GAUC by request and of the difference of two AUCs, against a bootstrap over users."""
    rng = np.random.default_rng(0)
    one, two, label, user = clustered(rng, 300)
    request = user * 4 + rng.integers(0, 4, user.size)
    places = [np.nonzero(user == u)[0] for u in range(300)]
    drawn = []
    for _ in range(400):
        chosen = rng.integers(0, 300, 300)
        at = np.concatenate([places[u] for u in chosen])
        # A user who is drawn twice has two sets of requests.
        again = np.repeat(np.arange(300), [places[u].size for u in chosen])
        gauc = grouped_auc(one[at], label[at], group_keys(again, request[at]))[0]
        first, second = auc(one[at], label[at]), auc(two[at], label[at])
        drawn.append((first, gauc, first - second))
    difference = auc_influence(one, label)[1] - auc_influence(two, label)[1]
    found = [
        half_width(auc_influence(one, label)[1], user),
        Ranked.of(one, label, group_keys(user, request)).gauc_half_width(user),
        half_width(difference, user),
    ]
    assert found == pytest.approx(1.96 * np.std(drawn, axis=0), rel=0.12)
    assert half_width(auc_influence(one, label)[1], np.arange(user.size)) < 0.85 * found[0]


def test_intervals_hold_the_truth_in_95_of_100_logs() -> None:
    rng = np.random.default_rng(1)
    one, _, label, _ = clustered(rng, 20_000)
    truth, inside = auc(one, label), 0
    for _ in range(300):
        one, _, label, user = clustered(rng, 100)
        value, influence = auc_influence(one, label)
        inside += abs(value - truth) < half_width(influence, user)
    assert 0.91 < inside / 300 < 0.985


def test_the_error_of_independent_candidates_is_delongs() -> None:
    rng = np.random.default_rng(2)
    label = (rng.uniform(size=200) < 0.3).astype(float)
    score = (label + rng.normal(0, 1, 200)).round(1)
    positive, negative = score[label > 0], score[label == 0]
    wins = (positive[:, None] > negative) + (positive[:, None] == negative) / 2
    # DeLong et al. 1988, equations 5 and 6, but for n / (n - 1) instead of one for each class.
    variance = wins.mean(1).var() / positive.size + wins.mean(0).var() / negative.size
    found = half_width(auc_influence(score, label)[1], np.arange(200))
    assert found == pytest.approx(1.959964 * math.sqrt(variance * 200 / 199))


def test_a_single_user_has_no_interval() -> None:
    found = measure(np.array([0.2, 0.7, 0.4]), np.array([0, 1, 1]), np.zeros(3, int), np.zeros(3, int))
    assert math.isnan(found.auc_ci) and math.isnan(found.gauc_ci) and found.auc == 1


def test_ece_is_a_function_of_the_set() -> None:
    """One score for all of two halves: 0.5 by one order and 0.064 by another, once."""
    label = np.r_[np.zeros(500), np.ones(500)]
    for order in (np.arange(1000), np.random.default_rng(3).permutation(1000)):
        assert calibration_error(np.full(1000, 0.5), label[order]) == 0
        assert calibration_error(np.full(1000, 0.9), label[order]) == pytest.approx(0.4)


def test_ece_of_untied_scores_equals_scikit_learns_quantile_bins() -> None:
    rng = np.random.default_rng(4)
    p = rng.uniform(size=2000)
    label = rng.uniform(size=2000) < p**2
    true, predicted = calibration_curve(label, p, n_bins=20, strategy="quantile")
    assert calibration_error(p, label) == pytest.approx(np.abs(true - predicted).mean())


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_what_needs_two_classes_is_nothing_with_one(rate: float) -> None:
    found = measure(np.full(8, 0.25), np.full(8, rate), np.arange(8) // 2, np.arange(8) // 4)
    for name in ("auc", "auc_ci", "gauc", "gauc_ci", "gauc_user", "hr_1", "hr_10", "ndcg_5", "ne"):
        assert math.isnan(getattr(found, name)), name
    assert found.logloss == pytest.approx(-math.log(0.25 if rate else 0.75))
    assert math.isnan(found.pcoc) if not rate else found.pcoc == 0.25
    assert (found.rate, found.positives, found.groups, found.users) == (rate, 8 * rate, 0, 0)


def test_nothing_has_no_metrics() -> None:
    none = np.zeros(0)
    found = measure(none, none, none.astype(int), none.astype(int)).as_dict()
    counts = {name: found.pop(name) for name in ("samples", "positives", "requests", "groups", "users")}
    assert set(counts.values()) == {0} and all(math.isnan(value) for value in found.values())
    assert group_keys(none, none).size == 0


@pytest.mark.parametrize("label", [-1.0, 2.0, math.inf, -math.inf, math.nan, 1.0001])
@pytest.mark.parametrize("metric", [auc, logloss, calibration_error])
def test_labels_outside_0_to_1_are_refused(metric: object, label: float) -> None:
    with pytest.raises(DataError, match=r"1 of 3 labels lie outside 0 to 1 \(the first is"):
        metric(np.array([0.1, 0.5, 0.7]), np.array([0, 1, label]))  # type: ignore[operator]


@pytest.mark.parametrize("metric", [auc, logloss, calibration_error])
def test_unequal_lengths_are_one_error(metric: object) -> None:
    score, label = np.array([0.1, 0.5, 0.7]), np.array([0, 1])
    with pytest.raises(DataError, match="one each a candidate, not 3 and 2"):
        metric(score, label)  # type: ignore[operator]
    with pytest.raises(DataError, match="not 3 x 1 and 3"):
        metric(score[:, None], np.zeros(3))  # type: ignore[operator]


def test_unequal_keys_are_one_error() -> None:
    score, key = np.array([0.1, 0.5]), np.arange(3)
    for measured in (lambda: measure(score, score, key), lambda: grouped_auc(score, score, key)):
        with pytest.raises(DataError, match="not 2 and 2 and 3"):
            measured()


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(score: float) -> None:
    for metric in (auc, logloss, calibration_error):
        with pytest.raises(DataError, match="1 of 2 scores are NaN or infinite"):
            metric(np.array([score, 0.5]), np.array([0, 1]))


def test_logits_are_no_probabilities() -> None:
    with pytest.raises(DataError, match="scores lie in -2 to 3: they must be probabilities"):
        measure(np.array([-2.0, 3.0]), np.array([0, 1]), np.zeros(2, dtype=np.int64))
