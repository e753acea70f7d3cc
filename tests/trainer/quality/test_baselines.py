"""Baselines against one candidate at a time: labels of training alone, counts of the visible past alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit

from tests.helpers.logs import INFOS, Row, Shape, enrich, random_rows, write_log
from trainer.config.sections import DataConfig
from trainer.config.tasks import TaskConfig, resolve_tasks
from trainer.data import files
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.quality import rates
from trainer.quality.baselines import Baselines, baselines, by_baseline
from trainer.quality.ranking import auc
from trainer.quality.rates import STRENGTH
from trainer.run_folder import jsonable

TASKS = ("click", "buy")


def drawn(seed: int, users: int) -> list[Row]:
    return enrich(random_rows(seed, Shape(users=users, behaviors=30)), seed)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    """Half of the test's users are in training too."""
    return {"train": drawn(1, 12), "validation": drawn(2, 6), "test": drawn(3, 24)}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory, splits: dict[str, list[Row]]) -> Path:
    return write_log(tmp_path_factory.mktemp("baselines") / "log", splits, rich=True)


def of(log: Path, split: str = "test", **settings: Any) -> Baselines:
    return baselines(SequenceLogReader(DataConfig(log=log, **settings), split, None))


def candidates(rows: list[Row]) -> Iterator[tuple[Row, int, int]]:
    """(row, request, candidate) in the order of their names; users and requests ascend in these logs."""
    for row in rows:
        for r, count in enumerate(row["request_num_candidates"]):
            for c in range(count):
                yield row, r, c


def counted(rows: list[Row], feature: str, delay: int) -> list[int]:
    found = []
    for row, r, c in candidates(rows):
        wanted, asked = row[f"candidate_{feature}"][r][c], row["request_timestamp"][r]
        end = row["request_history_end"][r]
        seen = zip(row[f"history_{feature}"][:end], row["history_timestamp"][:end], strict=True)
        found.append(sum(value == wanted and (not delay or time < asked - delay) for value, time in seen))
    return found


def test_rates_are_added_up_in_order_and_footers_read_once(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of threads gives the bits of one after another; soft labels round by their order."""
    rng, rows = np.random.default_rng(0), drawn(4, 60)
    for row in rows:
        row["label_click"] = [[float(np.float32(rng.random())) for _ in each] for each in row["label_click"]]
    soft = write_log(tmp_path / "log", {"train": rows, "test": drawn(3, 24)}, rich=True)
    read: list[Path] = []
    footer = rates.read_footer
    monkeypatch.setattr(rates, "read_footer", lambda file: (read.append(file), footer(file))[1])
    found = []
    for threads in (8, 3, 1):
        monkeypatch.setattr(files, "cores", lambda threads=threads: threads)
        scores = of(soft).scores["click"]
        found.append([scores[name].tolist() for name in ("mean_label", "item_rate", "user_item_rate")])
    # In the order of the row groups, each added up for itself.
    groups = [rows[at + part : at + min(part + 3, 6)] for at in range(0, len(rows), 6) for part in (0, 3)]
    total, count = 0.0, 0
    for group in groups:
        labels = [row["label_click"][r][c] for row, r, c in candidates(group)]
        total += float(np.nansum(np.array(labels, dtype=np.float32), dtype=np.float64))
        count += len(labels)
    assert found[0] == found[1] == found[2] and found[0][0][0] == pytest.approx(total / count, abs=1e-15)
    # One thread has one file open after another.
    assert len(groups) == 20 and read[-10:] == sorted(set(read)) and len(set(read)) == 10


@pytest.mark.parametrize("delay", [0, 25])
def test_counts_are_those_of_the_visible_past(log: Path, splits: dict[str, list[Row]], delay: int) -> None:
    found = of(log, ingestion_delay=delay, history_length=3)
    for task in TASKS:
        for name, feature in (("item_count", "item_id"), ("category_count", "category_id")):
            expected = counted(splits["test"], feature, delay)
            assert found.scores[task][name].tolist() == expected and sum(expected) > 10
        items = [row["candidate_item_id"][r][c] for row, r, c in candidates(splits["test"])]
        assert found.scores[task]["popularity"].tolist() == [item % 7 for item in items]


def test_rates_are_those_of_training_for_every_task(log: Path, splits: dict[str, list[Row]]) -> None:
    found = of(log)
    for task in TASKS:
        shown = [
            (row["user_id"], row["candidate_item_id"][r][c], row[f"label_{task}"][r][c])
            for row, r, c in candidates(splits["train"])
        ]
        mean = np.mean([label for *_, label in shown])

        def rate(place: int, name: int, shown: Any = shown, mean: float = mean) -> float:
            own = [entry[2] for entry in shown if entry[place] == name]
            return (sum(own) + STRENGTH * mean) / (len(own) + STRENGTH)

        assert found.scores[task]["mean_label"] == pytest.approx(mean)
        pairs = [(row["user_id"], row["candidate_item_id"][r][c]) for row, r, c in candidates(splits["test"])]
        expected = [(rate(1, item), rate(0, user)) for user, item in pairs]
        by_item = [item for item, _ in expected]
        unknown = [user for (name, _), (_, user) in zip(pairs, expected, strict=True) if name >= 12]
        assert len(unknown) > 20 and unknown == pytest.approx([mean] * len(unknown))
        np.testing.assert_allclose(found.scores[task]["item_rate"], by_item, rtol=1e-6)
        both = [expit(logit(item) + logit(user) - logit(mean)) for item, user in expected]
        np.testing.assert_allclose(found.scores[task]["user_item_rate"], both, rtol=1e-6)
    assert not np.allclose(found.scores["click"]["item_rate"], found.scores["buy"]["item_rate"])


def test_labels_of_the_measured_split_do_not_enter(
    log: Path, splits: dict[str, list[Row]], tmp_path: Path
) -> None:
    turned = [
        {**row, **{f"label_{t}": [[1 - y for y in part] for part in row[f"label_{t}"]] for t in TASKS}}
        for row in splits["test"]
    ]
    other = of(write_log(tmp_path / "log", {**splits, "test": turned}, rich=True))
    first = of(log)
    for task in TASKS:
        for name, score in first.scores[task].items():
            np.testing.assert_array_equal(other.scores[task][name], score)
    assert (other.candidates.label == 1 - first.candidates.label).all()


def test_metrics_of_a_baseline_and_the_models_lead(log: Path) -> None:
    found = of(log)
    label = found.candidates.label
    score = np.random.default_rng(0).uniform(size=label.shape).astype(np.float32)
    table = found.metrics(replace(found.candidates, score=score))
    assert list(table) == list(TASKS)
    for place, task in enumerate(TASKS):
        names = ["mean_label", "item_rate", "user_item_rate", "popularity", "item_count", "category_count"]
        assert list(table[task]) == names
        for name, row in table[task].items():
            own = auc(found.scores[task][name], label[:, place])
            assert row["auc"] == own and row["auc_lead"] == auc(score[:, place], label[:, place]) - own
            assert 0 < row["auc_lead_ci"] < 0.2 and 0 < row["gauc_lead_ci"] < 0.4
            assert ("logloss_lead_ci" in row) == (name in names[:3])
            assert ("logloss" in row) == (name in names[:3]), "an order is no probability"
        assert table[task]["mean_label"]["auc"] == 0.5 and table[task]["mean_label"]["auc_ci"] == 0
    kept = json.loads(json.dumps(jsonable(by_baseline(table))))
    assert kept["item_rate"]["auc"] == kept["item_rate"]["tasks"]["click"]["auc"]
    assert kept["item_rate"]["tasks"]["buy"]["auc"] == table["buy"]["item_rate"]["auc"]


def test_a_log_without_a_vocabulary_has_no_popularity_and_says_so(
    splits: dict[str, list[Row]], tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log", splits, rich=True)
    (log / "vocab" / "item_id.parquet").unlink()
    found = of(log)
    assert "popularity" not in found.scores["click"] and "item_rate" in found.scores["click"]
    assert len(found.missing) == 1 and "the log's vocabulary" in found.missing[0]


def test_a_log_without_items_keeps_what_needs_none(
    splits: dict[str, list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.logs.INFOS", {"category_id": INFOS["category_id"]})
    found = of(write_log(tmp_path / "log", splits))
    assert list(found.scores) == ["click"] and found.missing == []
    assert list(found.scores["click"]) == ["mean_label", "user_item_rate", "category_count"]
    assert found.scores["click"]["category_count"].sum() == sum(counted(splits["test"], "category_id", 0))


def test_training_is_not_measured_on_rates_of_its_own_labels(log: Path) -> None:
    found = of(log, "train")
    assert list(found.scores["buy"]) == ["mean_label", "popularity", "item_count", "category_count"]
    assert len(found.missing) == 1 and "the labels they are made of" in found.missing[0]


def test_training_files_may_be_gone(splits: dict[str, list[Row]], tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", splits, rich=True)
    for file in (log / "train").iterdir():
        file.unlink()
    found = of(log)
    assert list(found.scores["click"]) == ["popularity", "item_count", "category_count"]
    assert len(found.missing) == 1 and found.missing[0].startswith("label rates: ")


def test_a_large_training_split_is_not_read_where_that_takes_long(log: Path) -> None:
    count = read_manifest(log).splits["train"].candidates
    reader = SequenceLogReader(DataConfig(log=log), "test", None)
    (log / "train").rename(log / "elsewhere")
    found = baselines(reader, count - 1)
    (log / "elsewhere").rename(log / "train")
    assert list(found.scores["click"]) == ["popularity", "item_count", "category_count"]
    assert found.missing == [
        f"label rates: training has {count:,} candidates; `tandemrec evaluate` reads them all"
    ]
    assert (
        "item_rate"
        in baselines(SequenceLogReader(DataConfig(log=log), "test", None), most=count).scores["click"]
    )


def test_a_damaged_row_group_of_training_is_left_out_only_where_training_left_it_out(
    splits: dict[str, list[Row]], tmp_path: Path
) -> None:
    bad = [
        {**row, "num_candidates": row["num_candidates"] + (i == 0)} for i, row in enumerate(splits["train"])
    ]
    log = write_log(tmp_path / "log", {**splits, "train": bad}, rich=True)
    (missing,) = of(log).missing
    assert "values for" in missing and "mean_label" not in of(log).scores["buy"]
    rest = of(log, on_bad="skip")
    whole = of(write_log(tmp_path / "rest", {**splits, "train": splits["train"][3:]}, rich=True))
    for name, score in whole.scores["buy"].items():
        np.testing.assert_array_equal(rest.scores["buy"][name], score)


def test_a_task_that_training_never_observed_lacks_rates_and_others_have_theirs(
    log: Path, splits: dict[str, list[Row]], tmp_path: Path
) -> None:
    """The masked task comes first; its candidates of the measured split are still ranked by counts."""
    never = [
        {**row, "label_click": [[0.0] * len(part) for part in row["label_click"]]} for row in splits["train"]
    ]
    other = write_log(tmp_path / "log", {**splits, "train": never}, rich=True)
    given = {"conversion": TaskConfig(label="buy", mask="click == 1"), "buy": TaskConfig()}
    reader = SequenceLogReader(DataConfig(log=other), "test", None, tasks=resolve_tasks(given, list(TASKS)))
    found = baselines(reader)
    assert found.missing == ["label rates of conversion: training has no label of it"]
    table = by_baseline(found.metrics())
    assert table["item_rate"].keys() == {"tasks"} and list(table["item_rate"]["tasks"]) == ["buy"]
    assert list(table["popularity"]["tasks"]) == ["conversion", "buy"]
    clicked = found.candidates.part(~np.isnan(found.candidates.label[:, 0]))
    observed = ~np.isnan(found.candidates.label[:, 0])
    own = auc(found.scores["conversion"]["popularity"][observed], clicked.label[:, 0])
    assert table["popularity"]["auc"] == own and 20 < observed.sum() < observed.size


def test_raw_ids_of_items_have_the_baselines_of_dense_ones_but_popularity(
    tmp_path: Path, log: Path, splits: dict[str, list[Row]]
) -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, INFOS["item_id"].rows).tolist()
    raw = {
        split: [
            {
                **row,
                "history_item_id": [ids[one] for one in row["history_item_id"]],
                "candidate_item_id": [[ids[one] for one in some] for some in row["candidate_item_id"]],
            }
            for row in rows
        ]
        for split, rows in splits.items()
    }
    more = {"item_id": INFOS["item_id"].model_copy(update={"rows": 1, "raw": True})}
    found = of(write_log(tmp_path / "log", raw, rich=True, more=more))
    dense = of(log)
    for task, scores in dense.scores.items():
        assert set(scores) - set(found.scores[task]) == {"popularity"}
        for name, values in found.scores[task].items():
            np.testing.assert_array_equal(values, scores[name], err_msg=name)
    assert any("item popularity: the log's ids of items are raw" in line for line in found.missing)
