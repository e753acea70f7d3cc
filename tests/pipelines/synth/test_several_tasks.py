"""Planted logs of several tasks and domains: what their equations promise, from the numbers of the log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.synth import collapse, factors
from pipelines.synth.kinds import KINDS
from pipelines.synth.log import Floats, Ints, PlantedSplit
from pipelines.synth.synth import TRUTH, synth
from trainer.log.schema import read_manifest
from trainer.quality.ranking import auc


def logit(p: Floats) -> Floats:
    return np.asarray(np.log(p) - np.log1p(-p))


def vectors_of(part: PlantedSplit, seed: int) -> tuple[Floats, Floats]:
    """u [U, 4] of the users and b [U, M, 4] of the candidates, by the definition."""
    of_item = factors.vectors(seed)
    user = sum(of_item[part.history["item_id"][:, j]] for j in range(factors.BEHAVIORS))
    return np.asarray(user) / 20**0.5, of_item[part.candidates["item_id"][:, 0]]


def train_of(kind: str, seed: int = 5, users: int = 400) -> PlantedSplit:
    return KINDS[kind].generate(seed, users).splits["train"]


def test_tasks_of_agree_want_one_user_vector_or_orthogonal_ones() -> None:
    part = train_of("agree")
    user, item = vectors_of(part, 5)
    segment = part.segment
    assert segment is not None and 0.4 < segment.mean() < 0.6
    wanted = {"click": user, "like": np.where(segment[:, None] == 1, factors.turned(user), user)}
    for task, p in part.probabilities.items():
        assert logit(p[:, 0]) == pytest.approx(-1 + 2 * np.einsum("ur,umr->um", wanted[task], item))
    between = (wanted["click"] * wanted["like"]).sum(axis=1) / (user**2).sum(axis=1)
    assert between[segment == 0] == pytest.approx(1) and between[segment == 1] == pytest.approx(0, abs=1e-9)
    # Whoever scores `like` with what `click` wants is right for half of the users and guesses for the others.
    labels, clicks = part.labels["like"][:, 0], part.probabilities["click"][:, 0]
    half = [auc(clicks[segment == s].reshape(-1), labels[segment == s].reshape(-1)) for s in (0, 1)]
    assert half[0] > 0.8 and abs(half[1] - 0.5) < 0.08


def test_the_truth_of_agree_says_each_users_segment_and_every_tasks_probability(tmp_path: Path) -> None:
    synth(tmp_path / "log", "agree", 5, 30)
    truth = pq.read_table(tmp_path / "log" / TRUTH)
    parts = KINDS["agree"].generate(5, 30).splits.values()
    segments = [part.segment for part in parts if part.segment is not None]
    found = np.repeat(np.concatenate(segments), factors.CANDIDATES)
    assert truth["segment"].to_pylist() == found.tolist()
    assert truth["probability"] == truth["probability_click"] != truth["probability_like"]
    manifest = read_manifest(tmp_path / "log")
    assert (manifest.tasks, manifest.partial) == (["click", "like"], [])


def test_domains_weigh_two_factors_of_a_user_differently() -> None:
    part = train_of("domains", users=3_000)
    user, item = vectors_of(part, 5)
    both = (user[:, None] * item).reshape(*item.shape[:2], 2, 2).sum(axis=3) * 2**0.5  # [U, M, factor]
    domain = part.candidates["domain_id"][:, 0]
    assert (domain == domain[:, :1]).all()  # a request is of one domain
    assert set(np.unique(domain)) == {factors.HEAD, factors.TAIL}
    assert (domain == factors.HEAD).sum() / (domain == factors.TAIL).sum() == pytest.approx(12, rel=0.2)
    weight = np.where(domain[..., None] == factors.HEAD, (1.0, 0.3), (0.3, 1.0))
    assert logit(part.probability[:, 0]) == pytest.approx(-1 + 2 * (weight * both).sum(axis=2))
    # A domain that is scored as the other one loses much.
    for own, name in ((0, factors.HEAD), (1, factors.TAIL)):
        inside = domain == name
        y, wrong = part.labels["click"][:, 0][inside], both[..., 1 - own][inside]
        assert auc(part.probability[:, 0][inside], y) > auc(wrong, y) + 0.15


def test_domains_of_signs_take_a_feature_the_other_way() -> None:
    part = train_of("signs", users=5_000)
    user, item = vectors_of(part, 5)
    affinity = (user[:, None] * item).sum(axis=2)
    domain, band = (part.candidates[name][:, 0] for name in ("domain_id", "band"))
    assert (domain == domain[:, :1]).all()
    assert (domain == factors.HEAD).sum() / (domain == factors.TAIL).sum() == pytest.approx(50, rel=0.3)
    sign = np.where(domain == factors.HEAD, 1, -1) * np.where(band == 2, 1, -1)
    assert logit(part.probability[:, 0]) == pytest.approx(-1 + 2 * (0.8 * affinity + 0.6 * sign))


def test_a_helping_task_tells_the_same_as_click_and_noise_nothing() -> None:
    part = train_of("helper", users=1_000)
    user, item = vectors_of(part, 5)
    affinity = (user[:, None] * item).sum(axis=2)
    labels = {task: labels[:, 0] for task, labels in part.labels.items()}
    for task in ("click", "help"):
        assert logit(part.probabilities[task][:, 0]) == pytest.approx(-1 + 2 * affinity)
    assert (part.probabilities["noise"] == 0.5).all() and not np.array_equal(labels["click"], labels["help"])
    assert abs(np.corrcoef(labels["noise"].ravel(), affinity.ravel())[0, 1]) < 0.05


def test_a_candidates_domain_is_no_feature_of_behaviors(tmp_path: Path) -> None:
    synth(tmp_path / "log", "domains", 5, 30)
    sides = {name: info.side for name, info in read_manifest(tmp_path / "log").features.items()}
    assert sides == {"item_id": "both", "domain_id": "candidate"}
    vocabulary = pq.read_table(tmp_path / "log" / "vocab" / "domain_id.parquet")
    assert sum(vocabulary["count"].to_pylist()) == 30 * factors.CANDIDATES


def test_conversions_are_observed_where_there_was_a_click() -> None:
    part = train_of("funnel")
    click, conversion, both = (part.labels[task] for task in ("click", "conversion", "ctcvr"))
    assert np.array_equal(np.isnan(conversion), click == 0)
    assert np.array_equal(both, np.where(click > 0, conversion, 0.0))
    p = part.probabilities
    assert p["ctcvr"] == pytest.approx(p["click"] * p["conversion"])
    user, item = vectors_of(part, 5)
    x, y = np.moveaxis((user[:, None] * item).reshape(*item.shape[:2], 2, 2).sum(axis=3) * 2**0.5, 2, 0)
    assert logit(p["click"][:, 0]) == pytest.approx(-2.5 + 2 * x)
    assert logit(p["conversion"][:, 0]) == pytest.approx(-1.5 + 2 * (0.8 * x + 0.6 * y))
    # Clicked candidates convert more often than those that nobody clicked would: the bias of the selection.
    clicked = click > 0
    assert p["conversion"][clicked].mean() > p["conversion"][~clicked].mean() + 0.2


@pytest.mark.parametrize(("kind", "rate"), [("sparse_25", 0.25), ("sparse_5", 0.05), ("sparse_1", 0.01)])
def test_the_rate_of_clicks_is_the_one_that_the_kind_is_called_by(kind: str, rate: float) -> None:
    for seed in (1, 2):
        part = train_of(kind, seed, 1_500)
        assert part.probability.mean() == pytest.approx(rate, rel=0.1)
        user, item = vectors_of(part, seed)
        z = logit(part.probability[:, 0]) - 2 * np.einsum("ur,umr->um", user, item)
        assert np.ptp(z) < 1e-9


def test_two_interactions_of_six_fields_and_nothing_besides() -> None:
    """z by plain loops over the definition; no field alone says anything; the topic gives two dimensions."""
    part = train_of("collapse", users=60)
    assert set(part.history) == set(collapse.OF_USERS) and set(part.candidates) == set(collapse.OF_CANDIDATES)
    spaces = [collapse.vectors(5, k) for k in (0, 1)]
    ids: Mapping[str, Ints] = {name: ids[:, 0] for name, ids in part.history.items()}
    for user, place in ((0, 0), (7, 3), (59, 7)):
        mine = {name: of[user] for name, of in ids.items()}
        mine |= {name: of[user, 0, place] for name, of in part.candidates.items()}
        products = [
            float(v[one][mine[one]] @ v[other][mine[other]])
            for v, pairs in zip(spaces, collapse.INTERACTIONS, strict=True)
            for one, other in pairs
        ]
        assert logit(part.probability[user, 0, place]) == pytest.approx(-1 + 2.5 * sum(products) / 24**0.5)
    for v in spaces:
        assert all(of[1:].mean(axis=0) == pytest.approx(0, abs=1e-9) for of in v.values())
        assert np.linalg.matrix_rank(v["topic_id"]) == 2 and np.linalg.matrix_rank(v["brand_id"]) == 4
    assert not set(collapse.INTERACTIONS[0]) & set(collapse.INTERACTIONS[1])
    for pairs in collapse.INTERACTIONS:
        assert sorted(name for pair in pairs for name in pair) == sorted(collapse.FEATURES)
    assert all((ids == ids[:, :1]).all() for ids in part.history.values())
