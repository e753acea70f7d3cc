"""Metrics by domain against slow references: slices are a partition, and masked candidates have no part."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from embeddings.agreement import from_rank_0
from pipelines.quality_report import remarks, report
from tests.helpers.logs import small_log
from trainer.log.schema import FeatureInfo, read_manifest
from trainer.log.vocabulary import spell
from trainer.log.writer import write_manifest
from trainer.quality.balance import by_balance
from trainer.quality.baselines import Baselines
from trainer.quality.domains import OverDomains, SplitMetrics, domain_names, measure_split
from trainer.quality.scored import Scored, read_scores, write_scores
from trainer.ranks.process_group import process_group
from trainer.run_folder import MetricsLog, RunFolder, on_board

TASKS = ("click", "buy", "like", "share", "click_and_buy")


def drawn(seed: int = 0, count: int = 400, tasks: int = 2, domains: int = 3) -> Scored:
    """Labels of all tasks but the first are missing for a third; the last domain has no positive of those."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.02, 0.98, (count, tasks)).round(2).astype(np.float32)
    label = (rng.uniform(size=(count, tasks)) < score).astype(np.float32)
    domain = rng.choice(domains, count, p=np.arange(domains, 0, -1) / (domains * (domains + 1) / 2))
    label[domain == domains - 1, 1:] = 0
    label[:, 1:][rng.uniform(size=(count, tasks - 1)) < 1 / 3] = np.nan
    place = np.arange(count)
    keys = (place // 40, place // 8, place % 8, place, rng.integers(0, 300, count))
    return Scored(score, label, *keys, TASKS[:tasks], domain)


def by_domain(scored: Scored, names: dict[int, str]) -> dict[str, dict[str, Any]]:
    """As `measure_split` does it, with names that are given."""
    every = range(len(scored.tasks))
    return {
        names.get(n, str(n)): own for n, own in scored.metrics_by(lambda part: part.domain, every).items()
    }


def numbers(metrics: dict[str, Any]) -> list[float]:
    return [value for own in metrics.values() for value in own.as_dict().values()]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 4), st.randoms(use_true_random=False))
def test_domains_are_a_partition_in_any_order(seed: int, count: int, domains: int, rng: Any) -> None:
    scored = drawn(seed, count, domains=domains)
    found = by_domain(scored, {0: "zero"})
    assert list(found) == [{0: "zero"}.get(d, str(d)) for d in np.unique(scored.domain).tolist()]
    for place, task in enumerate(scored.tasks):
        whole = scored.metrics(place)
        assert sum(own[task].samples for own in found.values()) == whole.samples
        assert sum(own[task].positives for own in found.values()) == whole.positives
        losses = [own[task].logloss * own[task].samples for own in found.values() if own[task].samples]
        assert sum(losses) == pytest.approx(whole.logloss * whole.samples if losses else 0)
        for name, own in found.items():
            inside = scored.domain == (0 if name == "zero" else int(name))
            assert own[task] == scored.part(inside).metrics(place)
    order = np.random.default_rng(rng.randint(0, 2**31)).permutation(count)
    for name, own in by_domain(scored.part(order), {0: "zero"}).items():
        assert numbers(own) == pytest.approx(numbers(found[name]), nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_masked_candidates_have_no_effect(seed: int, count: int) -> None:
    """Neither their scores nor their being there changes a metric of the task, whole or by domain."""
    scored = drawn(seed, count)
    masked = np.isnan(scored.label[:, 1])
    score = scored.score.copy()
    score[masked, 1] = np.random.default_rng(seed).uniform(size=masked.sum())
    other, without = replace(scored, score=score), scored.part(~masked)
    assert repr(other.metrics(1)) == repr(scored.metrics(1)) == repr(without.metrics(1))
    found = by_domain(scored, {})
    for name, own in by_domain(other, {}).items():
        assert repr(own["buy"]) == repr(found[name]["buy"])
    for name, own in by_domain(without, {}).items():
        assert repr(own["buy"]) == repr(found[name]["buy"])
    for history, own in scored.by_history(task=1).items():
        assert repr(own) == repr(other.by_history(task=1)[history])


def test_the_worst_domain_and_the_mean_are_those_of_domains_with_both_classes() -> None:
    scored = drawn(tasks=2)
    assert scored.domain is not None
    over = SplitMetrics(scored.all_metrics(), by_domain(scored, {})).over_domains()
    assert over["click"].left_out == {} and over["buy"].left_out == {"2": "all labels are 0"}
    for task, names in (("click", "012"), ("buy", "01")):
        place, auc, loss = TASKS.index(task), {}, {}
        for name in names:
            inside = (scored.domain == int(name)) & ~np.isnan(scored.label[:, place])
            y, p = scored.label[inside, place], scored.score[inside, place].astype(float)
            auc[name] = roc_auc_score(y, p)
            loss[name] = -np.where(y > 0, np.log(p), np.log1p(-p)).mean()
        own = over[task].as_dict()
        assert own["compared"] == len(names)
        assert own["worst_auc_domain"] == min(auc, key=lambda name: auc[name])
        assert own["worst_logloss_domain"] == max(loss, key=lambda name: loss[name])
        for metric, values, worst in (("auc", auc, min), ("logloss", loss, max)):
            assert own[f"worst_{metric}"] == pytest.approx(worst(values.values()))
            assert own[f"mean_{metric}"] == pytest.approx(np.mean(list(values.values())))


def test_a_domain_of_few_positives_is_never_the_worst() -> None:
    scored = drawn(tasks=2, count=1000)
    assert scored.domain is not None
    few = np.flatnonzero(scored.domain == 1)[:30]
    scored.domain[few], scored.label[few, 0] = 7, np.arange(30) < 3
    # As bad as can be.
    scored.score[few, 0] = 1 - scored.label[few, 0]
    over = OverDomains.of(SplitMetrics({}, by_domain(scored, {})).of_task("click"))
    assert over.left_out == {"7": "only 3 positives, fewer than 20"}
    assert over.worst("auc") != "7" and over.worst("logloss") != "7"


def test_a_task_without_a_comparable_domain_says_why() -> None:
    scored = drawn(tasks=2)
    scored.label[:, 1] = np.nan
    own = OverDomains.of(SplitMetrics({}, by_domain(scored, {})).of_task("buy"))
    assert set(own.left_out.values()) == {"no candidate has a label"}
    found = own.as_dict()
    assert math.isnan(found["mean_auc"]) and found["worst_auc_domain"] is None and found["compared"] == 0


def test_an_entry_has_domains_in_the_form_of_all_metrics() -> None:
    scored = drawn(tasks=2)
    measured = SplitMetrics(scored.all_metrics(), by_domain(scored, {}))
    entry = measured.entry()
    for own in (entry, *entry["by_domain"].values()):
        assert list(own["tasks"]) == ["click", "buy"] and own["auc"] == own["tasks"]["click"]["auc"]
    assert entry["over_domains"]["tasks"]["buy"] == measured.over_domains()["buy"].as_dict()
    plain = measure_split(replace(scored, domain=None), Path("nowhere"), "").entry()
    assert plain.keys() == {*scored.metrics().as_dict(), "tasks"}


def test_the_board_has_a_few_curves_of_each_domain() -> None:
    scored = drawn(tasks=2)
    entry = SplitMetrics(scored.all_metrics(), by_domain(scored, {})).entry()
    tags = dict(on_board("validation", entry))
    assert tags["validation/buy/worst_auc"] == entry["over_domains"]["tasks"]["buy"]["worst_auc"]
    assert tags["validation/mean_logloss"] == entry["over_domains"]["mean_logloss"]
    of_domain = [tag for tag in tags if tag.startswith("validation by domain/1/")]
    names = ("auc", "logloss", "pcoc")
    expected = [*names, *(f"{task}/{name}" for task in ("click", "buy") for name in names)]
    assert of_domain == [f"validation by domain/1/{name}" for name in expected]
    assert all(isinstance(value, int | float) for value in tags.values())
    many = drawn(count=2000, domains=21)
    entry = SplitMetrics(many.all_metrics(), by_domain(many, {})).entry()
    tags = dict(on_board("validation", entry))
    assert "validation/click/worst_auc" in tags and not any("by domain" in tag for tag in tags)


def test_metrics_of_domains_are_written_to_both_files(tmp_path: Path) -> None:
    scored = drawn(tasks=2)
    entry = SplitMetrics(scored.all_metrics(), by_domain(scored, {})).entry()
    with process_group(), MetricsLog(RunFolder(tmp_path), 0) as log:
        log.write(7, "validation", entry)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 7 and line["by_domain"]["2"]["tasks"]["buy"]["auc"] is None
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Scalars("validation by domain/0/buy/auc")
    assert event.value == pytest.approx(entry["by_domain"]["0"]["tasks"]["buy"]["auc"])


def test_scores_keep_the_domain_and_older_files_have_none(tmp_path: Path) -> None:
    scored, file = drawn(tasks=2), tmp_path / "scores.parquet"
    write_scores(scored, file)
    assert pq.read_schema(file).names[5] == "domain"
    assert read_scores(file).domain.tolist() == scored.domain.tolist()  # type: ignore[union-attr]
    write_scores(replace(scored, domain=None), file)
    assert read_scores(file).domain is None and "domain" not in pq.read_schema(file).names


def test_domains_are_called_by_the_names_of_the_log(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    assert domain_names(log, "category_id", np.array([3, 1, 3])) == ({1: "1", 3: "3"}, "")
    values, file = pa.array(["ads", "feed\n", None, "ads"]), log / "vocab" / "scene.parquet"
    pq.write_table(pa.table({"value": values, "id": [1, 2, 3, 4], "count": [1, 1, 1, 1]}), file)
    manifest = read_manifest(log)
    digest = hashlib.sha256(spell(values)).hexdigest()
    context = {"scene": FeatureInfo(rows=5, vocabulary=digest)}
    write_manifest(log, manifest.model_copy(update={"context": context}))
    names, problem = domain_names(log, "scene", np.arange(6))
    assert problem == "" and names == {
        0: "unknown (0)",
        1: "ads (1)",
        2: "feed?",
        3: "None",
        4: "ads (4)",
        5: "unknown (5)",
    }
    file.unlink()
    names, problem = domain_names(log, "scene", np.array([1]))
    assert names == {1: "1"} and problem.startswith("domains have no names: ") and "missing" in problem
    measured = SplitMetrics(drawn().all_metrics(), {}, problem)
    assert problem in remarks("test", measured, {"click": {}, "buy": {}}, "c")


def told(scored: Scored, scale: float = 1.0) -> list[str]:
    """What `evaluate` prints of these scores."""
    scored = replace(scored, score=(scored.score * scale).astype(np.float32))
    measured = SplitMetrics(scored.all_metrics(), by_domain(scored, {0: "feed", 1: "ads"}))
    count = scored.candidate.size
    rates = {task: {"item_rate": np.linspace(0, 1, count)} for task in scored.tasks}
    tables = Baselines(scored, rates, []).metrics(scored)
    slices = {task: scored.by_history(task=place) for place, task in enumerate(scored.tasks)}
    pairs = by_balance(scored, np.ones((count, len(scored.tasks))), "test")
    lines = report(measured, tables, slices, pairs, "type", "domain_id")
    return [*lines, *remarks("test", measured, tables, "type")]


def test_five_tasks_in_three_domains_fit_on_a_screen() -> None:
    scored = drawn(count=4000, tasks=5)
    lines = told(scored)
    tables = lines[: next((n for n, line in enumerate(lines) if line.startswith("test")), None)]
    assert len(lines) < 60 and max(map(len, tables)) <= 120
    text = "\n".join(lines)
    for task in TASKS:
        own = scored.metrics(TASKS.index(task))
        (line,) = (line for line in lines if line.startswith(f"{task} ") and f"{own.samples:,}" in line)
        assert f"{own.auc:.4f} ± {own.auc_ci:.4f}" in line
    for title in ("AUC", "logloss", "PCOC"):
        assert f"\n\n{title} by domain_id" in text
    assert "2 of buy, like, share, click_and_buy (all labels are 0)" in text and "\nworst of domains" in text
    assert "of 10 pairs of tasks" in text


def test_two_tasks_have_a_table_of_domains_each_and_many_domains_are_cut() -> None:
    text = "\n".join(told(drawn(count=4000)))
    assert "\n\nclick, by domain_id" in text and "\n\nbuy, by domain_id" in text
    assert re_line(text, "mean of 2 domains") and "not in the mean and not the worst: 2 (all labels" in text
    many = drawn(count=4000, domains=20)
    text = "\n".join(told(many))
    assert "and 8 smaller domains, see summary.json" in text
    over = OverDomains.of(SplitMetrics({}, by_domain(many, {0: "feed", 1: "ads"})).of_task("click"))
    assert f"worst domain: {over.worst('auc')} by AUC ({over.value(over.worst('auc'), 'auc'):.4f}" in text


def re_line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_a_domain_out_of_scale_is_told_although_the_whole_is_not() -> None:
    scored = drawn(count=6000)
    assert scored.domain is not None
    assert not any("by domain" in line for line in told(scored) if line.startswith("test"))
    score = scored.score.copy()
    score[:, 0] = 0.5
    score[scored.domain == 2, 0] = 0.9
    low = scored.domain == 1
    score[low, 0] = 0.3
    other = replace(scored, score=score)
    (line,) = (line for line in told(other) if line.startswith("test: by domain, PCOC is "))
    pcoc = {name: own["click"].pcoc for name, own in by_domain(other, {1: "ads"}).items()}
    assert f"{pcoc['2']:.2f} in 2 (click)" in line and f"{pcoc['ads']:.2f} in ads (click)" in line
    assert 0.8 < other.metrics(0).pcoc < 1.25


@pytest.mark.parametrize("tasks", [2, 4])
def test_a_task_of_one_domain_is_compared_with_no_other(tasks: int) -> None:
    scored = drawn(count=6000, tasks=tasks)
    assert scored.domain is not None
    scored.label[scored.domain != 0, 1:] = np.nan
    score = scored.score.copy()
    score[:, 1:] /= 4
    lines = told(replace(scored, score=score))
    text = "\n".join(lines)
    assert "not in the mean" not in text and "by domain, PCOC" not in text
    assert "test, buy: PCOC is 0.2" in text
    if tasks == 2:
        assert text.count("\nmean of 3 domains") == text.count("\nworst domain: ") == 1
    else:
        assert re_line(text, "which is").split()[-3:] == ["-"] * 3
    scored.label[scored.domain != 0, 0] = np.nan
    text = "\n".join(told(scored))
    assert "mean of" not in text and "worst" not in text and "which is" not in text


def test_metrics_travel_between_ranks() -> None:
    measured = SplitMetrics(drawn().all_metrics(), by_domain(drawn(), {}))
    with process_group():
        assert repr(from_rank_0(lambda: measured)) == repr(measured)
