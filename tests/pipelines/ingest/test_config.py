"""The ingest settings: overrides, and errors that name the key and the cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from embeddings.errors import ConfigError
from pipelines.ingest.config import load_ingest_config

CONFIGS = Path(__file__).parents[3] / "configs"


def test_config_overrides_and_errors(tmp_path: Path) -> None:
    path = CONFIGS / "complete_journey.toml"
    loaded = load_ingest_config(path, ["requests.positives=3", "split.test=2017-12-02", 'task="buy"'])
    assert (loaded.requests.positives, str(loaded.split.test), loaded.task) == (3, "2017-12-02", "buy")
    named = [feature.name for feature in loaded.all_features]
    assert named == ["item_id", "department_id", "category_id", "type_id"]
    assert load_ingest_config(path, ["task=buy"]).task == "buy"
    for override, message in {
        "requests.positive=3": "unknown key 'requests.positive'; did you mean 'requests.positives'",
        "sed=3": "unknown key 'sed'; did you mean 'seed'",
        "requests.positives=0": "requests.positives: .*greater than or equal to 1",
        "split.test=2017-11-01": "validation .* must begin before test",
        "files.rows_per_file=100": "must be a multiple",
        'protocol="ctr"': "protocol: .*next-basket",
        'events.taxonomy=["user"]': "gives the feature name 'user_id' twice",
        'events.item="user_id"': "must be four columns",
        "task": "write it as section.key=value",
        "task.x=1": "'task' is a value, not a section",
        "seed=1\nusers=2": "one value",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_ingest_config(path, [override])
    with pytest.raises(ConfigError, match="no such file"):
        load_ingest_config(tmp_path / "none.toml", [])
    (tmp_path / "bad.toml").write_text("seed =")
    with pytest.raises(ConfigError, match="not readable as TOML"):
        load_ingest_config(tmp_path / "bad.toml", [])


def test_every_protocol_has_a_ready_config() -> None:
    found = {path.stem: load_ingest_config(path) for path in CONFIGS.glob("ingest_*.toml")}
    protocols = {loaded.protocol for loaded in found.values()}
    assert protocols == {"impressions", "leave-last", "time-split"} and len(found) == 5
    assert found["ingest_impressions"].tasks == ("click", "buy")
    assert found["ingest_multi_task"].labels["redeemed"].partial
    assert found["ingest_leave_last"].requests.distances[:2] == (3, 8)
    assert len(found["ingest_leave_last"].requests.distances) == 19
    assert [domain.name for domain in found["ingest_domains"].domains] == ["ads", "content"]
    assert found["ingest_time_split"].engine.memory_bytes == 4_000_000_000


def test_settings_that_contradict_each_other_are_refused() -> None:
    action = '{name = "action", side = "candidate"}'
    for name, override, message in (
        ("leave_last", "files.max_history=5", 'need layout = "request"'),
        ("leave_last", "requests.distances=[3, 3]", "one distance twice"),
        ("leave_last", "requests.distances=[2]", "greater than or equal to 3"),
        ("leave_last", "protocol=time-split", r"give split\.validation and split\.test"),
        ("leave_last", f"features=[{action}]", "'action' comes from impressions"),
        ("leave_last", 'features=[{name = "category_id"}]', "give the name 'category_id' twice"),
        ("leave_last", 'features=[{name = "timestamp"}]', "give the name 'timestamp' twice"),
        ("leave_last", 'features=[{name = "a", separator = ","}]', "feature a: separator needs multi = true"),
        ("leave_last", 'features=[{name = "a", sides = "both"}]', "did you mean .*side"),
        ("leave_last", 'csv.delimiter="::"', r"csv\.delimiter: is one sign"),
        ("leave_last", 'events.timestamp_unit="min"', r"events\.timestamp_unit: .*'us'"),
        ("impressions", "impressions.labels={}", r"impressions\.labels: .*at least 1"),
        ("impressions", "impressions.labels.click=3", r"impressions\.labels\.click: "),
        (
            "impressions",
            'impressions.labels.click={column="a", kind="x"}',
            r"labels\.click\.kind: .*'binary' or",
        ),
        (
            "impressions",
            'impressions.labels.click={colum="a"}',
            r"did you mean 'impressions\.labels\.click\.column'",
        ),
        (
            "impressions",
            'impressions.labels.click={column="a", kind="probability", positive_from=3}',
            "positive_from makes a label binary: leave kind out",
        ),
        ("impressions", "requests.new_items=drop", r"requests\.new_items is about drawn candidates"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_ingest_config(CONFIGS / f"ingest_{name}.toml", [override])
