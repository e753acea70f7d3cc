"""Candidates without any history: their facts against plain Python, and leaks that are planted and named."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from pipelines.ingest import candidate_facts, history_free
from pipelines.ingest.candidate_facts import GROUPS, Facts
from pipelines.ingest.ingest import ingest, report_lines
from tests.helpers.rawlogs import DAY, START, Log, Row, config, rows, write
from trainer.log.schema import LogManifest

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def by_hand(log: Log, days: int) -> Counter[tuple[Any, ...]]:
    """The facts of all candidates, one tuple each."""
    found: Counter[tuple[Any, ...]] = Counter()
    for one in log.requests().values():
        time, items = one["request_timestamp"], one["candidate_item_id"]
        past = [event for event in log.events if event["timestamp"] < time]
        hour = time // 3600 * 3600
        whole = [e for e in log.events if hour - days * DAY <= e["timestamp"] < hour]
        counts = [sum(event["item_id"] == item for event in past) for item in items]
        for place, item in enumerate(items):
            theirs = [event["timestamp"] for event in past if event["item_id"] == item]
            recent = sum(time - days * DAY <= second for second in theirs)
            others = counts[:place] + counts[place + 1 :]
            below = sum((other < counts[place]) + (other == counts[place]) / 2 for other in others)
            category = one["candidate_category_id"][place]
            facts = {
                "label": one["label_click"][place],
                "position": place,
                "candidates": len(items),
                "count": len(theirs),
                "recent_share": recent / len(whole) if whole else None,
                "rank": below / len(others) if others else None,
                "age": time - min(theirs) if theirs else None,
                "item_id": item,
                "same_category_id": one["candidate_category_id"].count(category) - 1 if category else None,
            }
            found[as_tuple(facts)] += 1
    return found


def as_tuple(facts: dict[str, Any]) -> tuple[Any, ...]:
    plain = {name: None if value is None or math.isnan(value) else value for name, value in facts.items()}
    return tuple(
        (name, None if value is None else round(float(value), 6)) for name, value in sorted(plain.items())
    )


@pytest.mark.parametrize("protocol", ["impressions", "next-basket"])
def test_facts_are_those_of_the_time_before_the_request(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a layout whose rows hold the newest behaviors only: the facts come from all events."""
    caught: list[Facts] = []
    real = candidate_facts.candidate_facts

    def watched(*given: Any) -> Facts:
        caught.append(real(*given))
        return caught[-1]

    monkeypatch.setattr(history_free, "candidate_facts", watched)
    monkeypatch.setattr(history_free, "_LEAST", 1)
    monkeypatch.setattr(candidate_facts, "RECENT_DAYS", 2)
    log = Log(tmp_path, protocol, 5, files={"layout": "request", "max_history": 3})
    facts = caught[0]
    columns = {"label": facts.label, **facts.columns}
    found = Counter(
        as_tuple({name: values[place] for name, values in columns.items()})
        for place in range(facts.label.size)
    )
    assert found == by_hand(log, 2) and found.total() > 40
    unseen = int((~facts.seen).sum())
    assert unseen > 0 and np.isnan(facts.columns["age"]).sum() == unseen
    counts = {split: info.candidates for split, info in log.manifest.splits.items()}
    assert Counter(facts.split.tolist()) == Counter(counts)
    halves = {(request, half) for request, half in zip(facts.request, facts.half, strict=True)}
    assert len(halves) == facts.request.max() + 1, "a request lies in one half"


def planted(leak: str, requests: int = 900, seed: int = 1) -> Facts:
    """Requests of 5 candidates, one of them positive, that one kind of fact tells; "" = none does."""
    random, size = np.random.default_rng(seed), 5 * requests
    request, place = np.repeat(np.arange(requests), 5), np.tile(np.arange(5), requests)
    chosen = random.integers(0, 5, requests)
    if leak == "position":
        chosen = np.where(random.random(requests) < 0.5, 0, chosen)
    label = (place == chosen[request]).astype(np.float64)
    hit = (label > 0) & (random.random(size) < 0.6)
    count = random.integers(1, 300, size).astype(np.float64)
    columns = {
        "position": place.astype(np.float64),
        "candidates": np.full(size, 5.0),
        "count": np.where(hit & (leak == "popularity"), count + 300, count),
        "recent_share": random.random(size),
        "rank": random.random(size),
        "age": random.integers(1, 10**7, size).astype(np.float64),
        "same_type_id": np.where(hit & (leak == "company"), 3.0, random.integers(0, 3, size)),
        "item_id": random.integers(1, 500, size) + np.where(hit & (leak == "item id"), 500.0, 0),
    }
    if leak == "novelty":
        columns["count"][hit], columns["age"][hit], columns["recent_share"][hit] = 0, np.nan, 0
    split = np.where(random.random(requests) < 0.6, "train", "test").astype(object)[request]
    return Facts(split, request, request % 2, label, columns)


WORDS = {
    "popularity": "requests.popularity_days draws negatives by the popularity of the last days",
    "novelty": 'requests.new_items = "drop"',
    "company": "requests.positives = 1",
    "position": "the order of candidates tells the label",
    "item id": 'events.item_ids = "hashed"',
}


def said(measured: dict[str, Any], protocol: str = "next-basket", **asked: Any) -> list[str]:
    report = {"history_free": {"task": "click", **measured, "id_order": None}}
    settings = {"protocol": protocol, "requests": asked}
    return history_free.history_free_lines(LogManifest.model_construct(report=report, ingest=settings))


@pytest.fixture(autouse=True)
def small_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_free, "_LEAST", 150)


@pytest.mark.parametrize("leak", WORDS)
def test_a_planted_leak_is_found_and_named(leak: str) -> None:
    found = history_free.measure(planted(leak), ["train", "test"], 7)
    assert set(found["auc"]) == {"train", "test"} and min(found["auc"].values()) > 0.65
    alone = found["alone"]["auc"]
    assert max(alone, key=lambda group: alone[group]) == leak and alone.keys() == GROUPS.keys()
    assert all(value < 0.57 for group, value in alone.items() if group != leak)
    warned = said(found)[-1]
    assert warned.startswith("WARNING: candidates tell the label click without any history: AUC 0.")
    assert f"; {leak} alone has {alone[leak]:.4f}; " in warned and WORDS[leak] in warned
    assert not any(words in warned for other, words in WORDS.items() if other != leak)
    shown = said(found, "impressions")[-1]
    assert shown.endswith(
        "impressions are kept as shown, so this is no fault but a line that a model must beat"
    )


def test_the_advice_is_not_what_was_done_already() -> None:
    found = history_free.measure(planted("popularity"), ["train", "test"], 7)
    assert (
        "requests.popularity_days = 30: try a longer or a shorter time" in said(found, popularity_days=30)[-1]
    )
    found = history_free.measure(planted("novelty"), ["train", "test"], 7)
    assert "requests.popularity_days draws" in said(found, new_items="drop")[-1]


def test_an_honest_log_is_not_warned_of() -> None:
    facts = planted("")
    found = history_free.measure(facts, ["train", "test"], 7)
    assert all(0.4 < value < 0.6 for value in found["auc"].values()) and "alone" not in found
    assert found["candidates"] == {name: int((facts.split == name).sum()) for name in ("train", "test")}
    assert len(said(found)) == 1 and "WARNING" not in said(found)[0]
    assert history_free.measure(facts, ["train", "test"], 7) == found


def test_one_class_and_few_candidates_have_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = planted("")
    one = Facts(facts.split, facts.request, facts.half, np.zeros(facts.label.size), facts.columns)
    unknown = np.full(facts.label.size, np.nan)
    none = Facts(facts.split, facts.request, facts.half, unknown, facts.columns)
    for each in (one, none):
        assert history_free.measure(each, ["train", "test"], 7) == {}
    monkeypatch.setattr(history_free, "_LEAST", 1000)
    assert history_free.measure(facts, ["train", "test"], 7) == {}
    empty = LogManifest.model_construct(report={}, ingest={"protocol": "next-basket"})
    assert history_free.history_free_lines(empty) == [], "a log that was made before this was measured"


def bought(fresh: bool, users: int = 40, days: int = 20) -> list[Row]:
    """Every user takes two items a day: `fresh` ones, which the day brought, or any of 30."""
    random, found = Random(3), []
    for user in range(1, users + 1):
        for day in range(days):
            for second in range(2):
                item = 1000 + (day * 10 + random.randrange(10) if fresh else random.randrange(30))
                time = START + day * DAY + random.randrange(DAY // 2) * 2 + second
                found.append(
                    {"user_id": user, "item_id": item, "timestamp": time, "category": f"c{item % 7}"}
                )
    return found


@pytest.mark.parametrize("fresh", [False, True])
def test_ingest_measures_what_it_draws_and_changes_no_row(fresh: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "e.parquet", bought(fresh), ("user_id", "item_id", "timestamp", "category"))
    changes = {"features": [], "context": [], "split": {"validation": "2017-01-12", "test": "2017-01-17"}}
    plan = config("time-split", **changes, requests={"exclude": "request", "min_history": 8})
    manifest = ingest(source, tmp_path / "log", plan)
    report, lines = manifest.report["history_free"], report_lines(manifest)
    assert list(report["auc"]) == ["train", "validation", "test"] and report["task"] == "click"
    warned = [line for line in lines if line.startswith("WARNING: candidates tell")]
    assert any(line.startswith("label click without any history: a small tree") for line in lines)
    if not fresh:
        assert max(report["auc"].values()) < 0.6 and not warned and abs(report["id_order"]) < 0.3
        quiet = plan.model_copy(update={"report": plan.report.model_copy(update={"history_free": False})})
        without = ingest(source, tmp_path / "quiet", quiet)
        assert "history_free" not in without.report and without.splits == manifest.splits
        assert rows(tmp_path / "quiet") == rows(tmp_path / "log")
        return
    assert min(report["auc"].values()) > 0.8 and report["id_order"] > 0.95
    assert len(warned) == 1 and 'requests.new_items = "drop"' in warned[0]
    assert "novelty alone has" in warned[0] and "item id alone has" in warned[0]
    told = "ids of items follow the time of their first events by +"
    assert any(line.startswith(told) and line.endswith('take events.item_ids = "hashed"') for line in lines)
