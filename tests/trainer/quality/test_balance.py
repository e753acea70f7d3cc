"""Strata by feedback balance against one user at a time: by labels of training alone, a partition."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from pipelines.quality_report import balance_table
from tests.helpers.logs import Row, Shape, enrich, random_rows, write_log
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.quality.balance import by_balance, most_comparable, strata, strata_of
from trainer.quality.baselines import baselines
from trainer.quality.scored import Scored

TASKS = ("click", "buy", "like")


def scored(count: int, tasks: int = 3, seed: int = 0) -> Scored:
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.05, 0.95, (count, tasks)).astype(np.float32)
    label = (rng.uniform(size=(count, tasks)) < score).astype(np.float32)
    label[:, -1][rng.uniform(size=count) < 0.3] = np.nan
    place = np.arange(count)
    return Scored(score, label, place // 6, place // 3, place % 3, place, place, TASKS[:tasks])


def slow_stratum(first: float, second: float) -> int:
    if not first and not second:
        return 3
    if min(first, second) and max(first, second) / min(first, second) <= 2:
        return 0
    return 1 if first > second else 2


counts = hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 7)).map(lambda a: a.astype(float))


@settings(max_examples=100, deadline=None)
@given(counts, st.randoms(use_true_random=False))
def test_a_stratum_is_what_its_words_say_and_turns_with_the_tasks(first: Any, rng: Any) -> None:
    second = np.random.default_rng(rng.randint(0, 2**31)).permutation(first)
    found = strata(first, second)
    expected = [slow_stratum(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert found.tolist() == expected
    assert strata(second, first).tolist() == [{1: 2, 2: 1}.get(number, number) for number in expected]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6))
def test_strata_of_every_pair_are_a_partition(count: int, seed: int) -> None:
    some = scored(count, seed=seed)
    # Users have the same numbers in all their candidates.
    positives = np.random.default_rng(seed).integers(0, 5, (count // 6 + 1, 3))[some.user_id].astype(float)
    pairs = by_balance(some, positives, "test")
    assert list(pairs) == [("click", "buy"), ("click", "like"), ("buy", "like")]
    for pair, found in pairs.items():
        assert sum(stratum.candidates for stratum in found.values()) == count
        assert sum(stratum.users for stratum in found.values()) == some.users
        for task in pair:
            whole = some.metrics(TASKS.index(task))
            assert sum(stratum.metrics[task].samples for stratum in found.values()) == whole.samples
            assert sum(stratum.metrics[task].positives for stratum in found.values()) == whole.positives
    best = most_comparable(pairs)
    sizes = {pair: found["comparable"].candidates for pair, found in pairs.items() if "comparable" in found}
    assert not sizes or sizes[best] == max(sizes.values())


def labels_of(row: Row, task: str) -> list[float]:
    return [label for part in row[f"label_{task}"] for label in part]


def test_it_is_training_that_decides_and_the_split_that_is_measured(tmp_path: Path) -> None:
    """From rows, one user at a time: numbers of positives, strata and AUC of each."""
    train, test = (enrich(random_rows(seed, Shape(users=users)), seed) for seed, users in ((1, 30), (2, 40)))
    # A file holds users in any order, and candidates are measured in that of their names.
    log = write_log(tmp_path / "log", {"train": train, "test": test[::-1]}, rich=True)
    beside = baselines(SequenceLogReader(DataConfig(log=log), "test", None))
    assert beside.positives is not None
    candidates = beside.candidates
    score = np.random.default_rng(0).uniform(size=candidates.label.shape).astype(np.float32)
    ((pair, found),) = by_balance(replace(candidates, score=score), beside.positives, "test").items()
    assert pair == ("click", "buy")
    own = {row["user_id"]: [sum(labels_of(row, task)) for task in pair] for row in train}
    of_strata: dict[str, list[int]] = defaultdict(list)
    for place, user in enumerate(candidates.user_id.tolist()):
        number = slow_stratum(*own.get(user, [0, 0]))
        of_strata[strata_of(pair)[number]].append(place)
    assert set(found) == set(of_strata) == {"comparable", "more click", "more buy", "neither"}
    assert set(candidates.user_id[of_strata["neither"]].tolist()) >= set(range(30, 40))
    for name, places in of_strata.items():
        assert found[name].candidates == len(places)
        assert found[name].users == len(set(candidates.user_id[places].tolist()))
        for task in pair:
            column, metrics = TASKS.index(task), found[name].metrics[task]
            y = candidates.label[places, column]
            expected = roc_auc_score(y, score[places, column]) if 0 < y.sum() < y.size else math.nan
            assert metrics.auc == pytest.approx(expected, nan_ok=True) and metrics.positives == y.sum()
    assert 0 < found["neither"].metrics["click"].auc_ci < 0.3
    # Nothing of the measured split decides where a user belongs.
    turned = [
        {**row, **{f"label_{t}": [[1 - y for y in part] for part in row[f"label_{t}"]] for t in pair}}
        for row in test
    ]
    other = write_log(tmp_path / "other", {"train": train, "test": turned[::-1]}, rich=True)
    again = baselines(SequenceLogReader(DataConfig(log=other), "test", None))
    np.testing.assert_array_equal(again.positives, beside.positives)


@pytest.mark.parametrize("trained", [None, np.zeros((60, 3))])
def test_where_training_has_none_of_the_users_the_split_itself_is_counted(trained: Any) -> None:
    some = scored(60)
    pairs = by_balance(some, trained, "test")
    own = np.stack([np.nansum(some.label[some.user_id == user], axis=0) for user in some.user_id])
    expected = by_balance(some, own, "test")
    for pair, found in pairs.items():
        assert list(found) == list(expected[pair])
        for name, stratum in found.items():
            assert stratum.counted_in == "test" and expected[pair][name].counted_in == "train"
            assert repr(stratum.metrics) == repr(expected[pair][name].metrics)
    assert "only GAUC" in balance_table(pairs)[-2]


def test_strata_by_measured_labels_bend_calibration_and_not_the_order_within_requests() -> None:
    """Users are all alike to the model, which knows the truth; only chance decides where they belong."""
    rng, users = np.random.default_rng(0), 6000
    user, place = np.repeat(np.arange(users), 8), np.arange(8 * users)
    odds = rng.normal(0, 1.5, (place.size, 2)) + rng.normal(-1, 1, (users, 2))[user]
    truth = expit(odds)
    label = (rng.uniform(size=truth.shape) < truth).astype(np.float32)
    some = Scored(truth.astype(np.float32), label, user, user, place % 8, place, place, TASKS[:2])
    (found,) = by_balance(some, None, "test").values()
    parts = [found[name].metrics["click"] for name in ("comparable", "more click", "more buy")]
    whole = some.metrics()
    assert all(abs(part.gauc - whole.gauc) < 1.5 * part.gauc_ci < 0.03 for part in parts)
    assert parts[1].pcoc < 0.9 and parts[2].pcoc > 1.5 and whole.pcoc == pytest.approx(1, abs=0.02)


def test_training_itself_is_counted_in_itself(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": enrich(random_rows(1), 1)}, rich=True)
    beside = baselines(SequenceLogReader(DataConfig(log=log), "train", None))
    assert beside.positives is None and "labels they are made of" in beside.missing[-1]


def test_what_a_person_is_told() -> None:
    some = scored(600)
    positives = np.tile([[4.0, 4.0, 1.0]], (600, 1))
    positives[:120] = 0
    lines = balance_table(by_balance(some, positives, "test"))
    assert lines[0].startswith("click and buy ") and "of 3 pairs of tasks" in lines[-1]
    assert "positives in train is above 2 times the other" in lines[-2] and max(map(len, lines)) <= 120
    own = some.part(np.arange(600) >= 120).metrics(0)
    (line,) = (line for line in lines if line.startswith("comparable  "))
    assert line.split()[1:3] == ["80", "480"]
    assert f"{own.auc:.4f} ± {own.auc_ci:.4f}  {own.gauc:.4f} ± {own.gauc_ci:.4f}" in line
    positives = np.tile([[4.0, 1.0, 0.0]], (600, 1))
    assert (
        balance_table(by_balance(some, positives, "test"))[-1]
        == "no user's feedback on two tasks is comparable"
    )
