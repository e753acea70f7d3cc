"""The hard search inside the reader, and what the model makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rivals.brute_force_search import hierarchical_search_reference
from embeddings.errors import ConfigError
from tests.helpers.launching import train
from tests.helpers.logs import CONTEXT, FEATURES, RICH, enrich, random_rows, small_log, write_log
from tests.trainer.model.test_frame import model_of
from trainer.assemble import build_model, resolve_groups
from trainer.config.sections import DataConfig, SearchConfig
from trainer.config.tasks import resolve_tasks
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.objectives.bce import loss_sum
from trainer.run_config import Config

LEVELS = ("category_id", "item_id")


def data(log: Path, **search: object) -> DataConfig:
    found = SearchConfig(levels=LEVELS, budget=4, half_life_days=0.0005, **search)  # type: ignore[arg-type]
    return DataConfig(log=log, history_length=30, batch_candidates=40, prefetch=0, search=found)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), delay=st.sampled_from([0, 15]), per_block=st.integers(1, 4))
def test_batches_hold_what_a_brute_force_search_of_each_history_keeps(
    tmp_path_factory: pytest.TempPathFactory, seed: int, delay: int, per_block: int
) -> None:
    rows = random_rows(seed)
    log = write_log(tmp_path_factory.mktemp("log") / "log", {"train": rows})
    changes = {"ingestion_delay": delay, "requests_per_block": per_block}
    config = data(log).model_copy(update=changes)
    reader = SequenceLogReader(config, "train", None, seed=1)
    by_request = {
        (row["user_id"], name): (row, r) for row in rows for r, name in enumerate(row["request_id"])
    }
    for step in reader.steps():
        batch = step.batch
        assert batch.retrieval is not None
        ids = {key: batch.features[key].values() for key in FEATURES}
        within = 0
        for c, r in enumerate(batch.candidate_request.tolist()):
            within = within + 1 if c and r == int(batch.candidate_request[c - 1]) else 0
            row, at = by_request[int(batch.user_id[r]), int(batch.request_id[r])]
            time = np.array(row["history_timestamp"], dtype=np.int64)
            end = int(np.searchsorted(time, row["request_timestamp"][at] - delay, side="left"))
            found = hierarchical_search_reference(
                np.array([row[f"history_{level}"] for level in LEVELS], dtype=np.int64).reshape(2, -1),
                time,
                np.array([[row[f"candidate_{level}"][at][within]] for level in LEVELS], dtype=np.int64),
                np.zeros(1, dtype=np.int64),
                np.array([max(0, end - 30)]),
                np.array([end]),
                np.array([row["request_timestamp"][at]]),
                4,
                0.0005 * 86_400,
            )
            kept = found.index[0][found.index[0] >= 0]
            mine = batch.retrieval.index[c]
            mine = mine[mine >= 0]
            for key, values in ids.items():
                assert values[mine].tolist() == [row[f"history_{key}"][i] for i in kept]
            assert batch.behavior_time[mine].tolist() == time[kept].tolist()
            assert batch.retrieval.rank[c][: kept.size].tolist() == (end - kept).tolist()
            assert batch.retrieval.level[c].tolist() == found.level[0].tolist()
            counts = np.concatenate([found.matches[0], found.decayed[0]])
            assert np.allclose(batch.numeric[c].numpy(), counts, rtol=1e-5)
        assert batch.behaviors <= batch.candidates * 4


def test_count_names_say_what_the_numbers_are(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(1)})
    names = SequenceLogReader(data(log), "train", None).numeric_names()
    levels = ["matches_category_id", "matches_item_id"]
    assert names == [*levels, *(f"recent_{name}" for name in levels)]
    assert SequenceLogReader(data(log, counts=False), "train", None).numeric_names() == []


@pytest.mark.parametrize(
    ("level", "why"), [("nope", "names 'nope'"), ("tags", "names 'tags'"), ("band", "names 'band'")]
)
def test_levels_must_be_single_features_of_both_sides(tmp_path: Path, level: str, why: str) -> None:
    log = write_log(tmp_path / "log", {"train": enrich(random_rows(1), 1)}, rich=True)
    config = DataConfig(log=log, search=SearchConfig(levels=(level,)))
    with pytest.raises(ConfigError, match=f"data.search {why}"):
        SequenceLogReader(config, "train", None)


def test_a_search_that_keeps_everything_changes_no_score(tmp_path: Path) -> None:
    """One category for all: the hard search keeps the whole window, so the scores are those without it."""
    rows = random_rows(4)
    for row in rows:
        row["history_category_id"] = [1] * row["num_behaviors"]
        row["candidate_category_id"] = [[1] * n for n in row["request_num_candidates"]]
    log = write_log(tmp_path / "log", {"train": rows})
    tree = {
        "data": {"log": str(log), "history_length": 30, "batch_candidates": 50, "prefetch": 0},
        "groups": {"attention": {"dim": 4, "init_scale": 1.0}, "representation": {"dim": 8}},
        "model": {"k": 3, "hidden": [8]},
    }
    plain = Config.model_validate(tree)
    tree["data"]["search"] = {"levels": ["category_id"], "budget": 30, "counts": False}
    searched = Config.model_validate(tree)
    model, _ = model_of(plain)
    scores = []
    for config in (plain, searched):
        batch = next(iter(SequenceLogReader(config.data, "train", dict(FEATURES)).steps())).batch
        assert (batch.retrieval is None) == (config is plain)
        scores.append(model(batch).logits)
    assert torch.allclose(scores[0], scores[1], atol=1e-6)


def test_context_numbers_and_one_sided_features_train(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": enrich(random_rows(5), 2)}, rich=True)
    config = Config.model_validate(
        {
            "data": {"log": str(log), "batch_candidates": 60, "prefetch": 0},
            "groups": {"attention": {"dim": 4}, "representation": {"dim": 8}, "context": {"dim": 4}},
            "model": {"k": 3, "hidden": [8], "roles": {"context": "context"}},
        }
    )
    from embeddings.lookup.plain import PlainBagCollection

    manifest = read_manifest(log)
    groups = resolve_groups(config, manifest)
    assert groups["context"].features == list(CONTEXT) and groups["attention"].features == list(RICH)
    weights = {g.table_name(t): torch.randn(t.rows, t.dim) for g in groups.values() for t in g.tables}
    collections = {name: PlainBagCollection(group, weights, trainable=True) for name, group in groups.items()}
    model = build_model(config, groups, collections, resolve_tasks({}, ["click", "like"]), numbers=1)
    batch = next(iter(SequenceLogReader(config.data, "train", None).steps())).batch
    logits = model(batch).logits
    assert logits.shape == (batch.candidates, 2)
    loss_sum(logits, batch.labels, batch.weight).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in collections["context"].parameters())
    other = batch.numeric + 1
    batch.numeric = other
    assert not torch.equal(model(batch).logits, logits)
    halved = loss_sum(logits, batch.labels, batch.weight / 2)
    assert torch.allclose(halved * 2, loss_sum(logits, batch.labels, batch.weight))


def test_training_with_a_hard_search_on_two_ranks(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log", seed=6, users=24)
    settings_ = {"data__search__levels": list(LEVELS), "data__search__budget": 6, "train__max_steps": 6}
    two = train(log, tmp_path / "two", ranks=2, **settings_)
    one = train(log, tmp_path / "one", **settings_)
    assert len(one) == 6 and max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
