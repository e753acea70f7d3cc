"""Before the first step: `train --check` finds what training would refuse, and what is left aside is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines.train
from embeddings.errors import TandemError
from launch.cli import main
from pipelines.task_lines import task_lines
from tests.helpers.launching import ROOT, SETTINGS, overrides
from tests.helpers.logs import Shape, enrich, random_rows, small_log, write_log
from tests.helpers.models import batch_of, model_of, preset
from tests.helpers.presets import renamed
from trainer.assemble import resolve_groups
from trainer.checkpoint.warm_start import unshard_run
from trainer.config.sections import DataConfig, TrainConfig
from trainer.config.tasks import Task, TaskConfig, resolve_tasks
from trainer.data.observed import unobserved, unobserved_lines
from trainer.data.reader import SequenceLogReader
from trainer.log.clusters import ClusterInfo
from trainer.log.schema import read_manifest
from trainer.loop.remarks import remarks
from trainer.ranks.process_group import process_group
from trainer.run_config import load_config
from trainer.run_folder import RunFolder
from trainer.update.schedule import dense_schedule, run_steps, schedule_remarks, table_schedule

CONFIG = ROOT / "configs" / "dare.toml"


def words(log: Path, **changes: Any) -> list[str]:
    """Overrides of a small run."""
    given = {"data.log": str(log), **SETTINGS, "train.max_steps": 2}
    named = {k if "." in k else k.replace("__", "."): v for k, v in changes.items()}
    return overrides({**given, **named})[1::2]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("start") / "log", seed=1)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = enrich(random_rows(8, Shape(users=12)), seed=1)
    return write_log(tmp_path_factory.mktemp("rich") / "log", {"train": rows, "later": rows[:3]}, rich=True)


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    pipelines.train.train(CONFIG, run, words(log))
    return run


def tasks_of(given: dict[str, dict[str, Any]]) -> tuple[Task, ...]:
    return resolve_tasks({name: TaskConfig(**settings) for name, settings in given.items()}, ["click"])


def broken(log: Path, to: Path) -> Path:
    """The log with other bytes in a file of its test split, which training reads last or never."""
    shutil.copytree(log, to)
    file = next((to / "test").glob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    return to


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "levels": ({"data__search__levels": ["type_id"]}, "data.search names 'type_id'"),
    "clusters": ({"data__clusters": True, "model__clusters": True, "model__search": "dot"}, "not clustered"),
    "time_group": ({"model__time_target": "joint", "model__time_group": "brand_id"}, "time_group"),
    "match": ({"model__search": "hard", "model__match": "brand_id"}, "brand_id"),
    "pipeline": ({"train__pipeline": "prefetch"}, "prefetch"),
    "plan rule": ({"plan.tables.attention__nothing.sharding": ["row_wise"]}, "no such table"),
    "plan file": ({"plan__file": "nowhere.json"}, "nowhere.json"),
    "init_from": ({"train__init_from": "nowhere"}, "nowhere"),
    "rows": ({"tables__item_id__rows": 3}, "tables.item_id.rows = 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_check_refuses_what_training_refuses(case: str, log: Path, tmp_path: Path) -> None:
    changes, problem = REFUSED[case]
    said = []
    for start in (pipelines.train.check, pipelines.train.train):
        with pytest.raises(TandemError, match=problem) as raised:
            start(CONFIG, tmp_path / start.__name__, words(log, **changes))
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert not (tmp_path / "check").exists()


def test_a_check_sees_the_run_folder(trained: Path, log: Path, tmp_path: Path) -> None:
    """A checkpoint of another model, a file in the way, a training under way; and it leaves all as it is."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    pipelines.train.check(CONFIG, run, words(log, train__max_steps=3))
    with pytest.raises(TandemError, match=r"model.k = 4, now it is 3"):
        pipelines.train.check(CONFIG, run, words(log, model__k=3))
    with RunFolder(run).lock(), pytest.raises(TandemError, match="another training is running"):
        pipelines.train.check(CONFIG, run, words(log))
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == {path: content for path, content in before.items() if path.name != ".lock"}
    (tmp_path / "file").write_text("")
    with pytest.raises(TandemError, match="cannot be written"):
        pipelines.train.check(CONFIG, tmp_path / "file", words(log))
    with pytest.raises(TandemError, match="cannot be written"):
        pipelines.train.train(CONFIG, tmp_path / "file" / "run", words(log))


def test_a_check_tries_the_weights_to_start_from(trained: Path, log: Path, tmp_path: Path) -> None:
    pipelines.train.check(CONFIG, tmp_path / "new", words(log, train__init_from=str(trained)))
    with pytest.raises(TandemError, match="the config says 8"):
        changes = {"train__init_from": str(trained), "groups__attention__dim": 8}
        pipelines.train.check(CONFIG, tmp_path / "new", words(log, **changes))
    assert not (tmp_path / "new").exists()


def test_a_check_reads_all_splits(log: Path, tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"test/part-.*parquet"):
        pipelines.train.check(CONFIG, tmp_path / "run", words(broken(log, tmp_path / "log")))


def test_tables_too_large_to_build_are_planned(
    log: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    large = words(log, tables__item_id__rows=3_000_000_000)
    pipelines.train.check(CONFIG, tmp_path / "run", large)
    said = capfd.readouterr().out
    assert "144.0 GB were planned, not built" in said and "can be trained on cpu" in said
    assert "no sharding plan for 1 rank(s)" in said and "more ranks may hold them" in said


def test_the_weights_to_start_large_tables_with_are_looked_at(
    log: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.start._SMALL", 1)
    with process_group():
        unshard_run(trained, tmp_path / "plain")
    for source in (trained, tmp_path / "plain"):
        pipelines.train.check(CONFIG, tmp_path / "run", words(log, train__init_from=str(source)))
    for changes in ({"groups__attention__dim": 8}, {"model__hidden": [9]}):
        given = words(log, train__init_from=str(tmp_path / "plain"), **changes)
        with pytest.raises(TandemError, match=r"the config says 8|this model's is"):
            pipelines.train.check(CONFIG, tmp_path / "run", given)
    with pytest.raises(TandemError, match="nowhere"):
        given = words(log, train__init_from=str(tmp_path / "nowhere"))
        pipelines.train.check(CONFIG, tmp_path / "run", given)


def test_a_plan_for_more_ranks_is_checked_for_those(
    log: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipelines.plan.plan import PlanOptions, plan

    file = tmp_path / "plan.json"
    plan(CONFIG, words(log), PlanOptions(4, out=file))
    pipelines.train.check(CONFIG, tmp_path / "run", words(log, plan__file=str(file)))
    assert "is for 4 rank(s) on cpu" in capfd.readouterr().out
    with pytest.raises(TandemError, match=r"plan\.json"):
        changes = {"plan__file": str(file), "groups__attention__dim": 8}
        pipelines.train.check(CONFIG, tmp_path / "run", words(log, **changes))


def test_a_plan_for_gpus_is_checked_where_there_is_none(
    log: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, rule = tmp_path / "plan.json", {"kernels": ["fused_uvm_caching"], "cache_load_factor": 0.5}
    given = {"data.log": str(log), **SETTINGS, "plan.allow_unified_memory": True}
    given |= {f"plan.tables.attention__item_id.{key}": value for key, value in rule.items()}
    question = ["--world-size", "4", "--hbm", "80GB", "--json", str(file)]
    assert main(["plan", "--config", str(CONFIG), *overrides(given), *question]) == 0
    trained = ["train", "--config", str(CONFIG), "--out", str(tmp_path / "run"), *overrides(given)]
    assert main([*trained, "--set", "train.max_steps=2", "--plan", str(file), "--check"]) == 0
    assert "is for 4 rank(s) on cuda" in capfd.readouterr().out
    assert main([*trained, "--set", "train.max_steps=2", "--check"]) == 2
    assert "with kernel fused_uvm_caching there" in capfd.readouterr().err


def test_what_is_left_aside_is_said_by_check_and_training(
    rich: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "groups__attention__features": ["item_id"],
        "groups__representation__features": ["item_id", "tags"],
        "model__attend": ["item_id"],
        "model__hash_bits": 7,
        "train__validate_every": 5,
        "train__warmup_steps": 100,
        "train__early_stopping__metric": "gauc",
        "model__roles__cross": "cross",
        "groups__cross__features": ["band", "action"],
        "tables__category_id__rows": 50,
    }
    roles = {"model__roles__attention_target": "attention"}
    said = []
    pipelines.train.check(CONFIG, tmp_path / "run", words(rich, **changes, **roles))
    said.append(capfd.readouterr().out)
    pipelines.train.train(CONFIG, tmp_path / "run", words(rich, **changes, **roles))
    said.append(capfd.readouterr().out)
    for text in said:
        for line in (
            "not used: 2 context features (city, segments) of the log",
            "not used: 1 feature (category_id) of the log",
            "no effect: band in groups.cross;",
            "no effect: tables.category_id; no group",
            "no validation requests: nothing is measured while training, so train.validate_every = 5",
            "the log has no test requests",
            "not used: split 'later' with",
            "no effect in this configuration: model.hash_bits = 7; train.early_stopping.metric (",
            "train.warmup_steps = 100 is more than a fifth",
        ):
            assert text.count(line) == 1, line


def test_presets_have_no_settings_without_effect(log: Path) -> None:
    manifest = read_manifest(log)
    for name in sorted(path.stem for path in (ROOT / "configs").glob("*.toml")):
        if "extends" not in (ROOT / f"configs/{name}.toml").read_text():
            continue
        # With two tasks, since some settings are about several.
        given = [word for word in renamed(name, log) if not word.startswith("tasks.")]
        config = load_config(ROOT / f"configs/{name}.toml", [f"data.log={log}", *given])
        clusters = ClusterInfo(chunk=9, cap=3) if config.data.clusters else None
        had = manifest.model_copy(update={"clusters": clusters, "tasks": ["click", "conversion"]})
        assert not remarks(config, had, resolve_groups(config, had)), name


def test_what_keeps_tasks_apart_is_said_to_do_nothing_for_one(log: Path) -> None:
    given = [f"data.log={log}", "model.attention_owner=click"]
    config, manifest = load_config(ROOT / "configs/stem.toml", given), read_manifest(log)
    (line,) = remarks(config, manifest, resolve_groups(config, manifest))
    why = "(click is the only task with a tower)"
    assert line == (
        f'no effect in this configuration: groups.representation.sets = "tasks" {why}; '
        f'model.experts.foreign = "stopped" {why}; '
        f"model.attention_owner = 'click' {why}"
    )


def test_a_domain_that_the_log_lacks_is_named_before_what_reads_it(log: Path) -> None:
    config = load_config(ROOT / "configs/crocodile.toml", [f"data.log={log}"])
    with pytest.raises(TandemError) as caught:
        resolve_groups(config, read_manifest(log))
    assert str(caught.value) == (
        "data.domain = 'domain_id': the log has no such feature; set data.domain to the one of candidates "
        "or of requests that says where a candidate was shown: they have item_id, category_id"
    )


def test_a_task_that_no_candidate_of_train_trains_is_said(log: Path) -> None:
    given = tasks_of({"never": {"label": "click", "mask": "click > 0 and click < 0.5"}, "click": {}})
    reader = SequenceLogReader(DataConfig(log=log), "train", None, tasks=given)
    manifest = read_manifest(log)
    (line,) = unobserved_lines(reader, manifest)
    assert line == (
        "tasks.never: no candidate of train is observed (mask = 'click > 0 and click < 0.5') and weighs more "
        "than 0, so the task is not trained"
    )
    assert unobserved(reader, most=0) == ([reader.columns.labels.tasks[0]], 0, False)
    alone = SequenceLogReader(DataConfig(log=log), "train", None, tasks=given[:1])
    with pytest.raises(TandemError, match="no candidate of the split train is observed by a task"):
        list(unobserved_lines(alone, manifest))
    plain = SequenceLogReader(DataConfig(log=log), "train", None)
    assert not list(unobserved_lines(plain, manifest))


def test_the_tasks_of_a_run_are_a_table(log: Path) -> None:
    """One line a task: what it predicts, by which loss, and from how many candidates."""
    given = {
        "a": {"label": "click", "rank": "pair", "bce_weight": 0.7, "pairs": "request", "mean": "domain"},
        "b": {"label": "click", "mask": "click == 1", "loss": "none"},
        "p": {"label": "click", "product": ["a", "b"], "weight": 0.5},
    }
    reader = SequenceLogReader(DataConfig(log=log), "train", None, tasks=tasks_of(given))
    config, manifest = load_config(CONFIG, ["data.domain=action"]), read_manifest(log)
    head, _, *rows, by_domain = task_lines(config, manifest, reader)
    count = f"{reader.candidates:,}"
    assert head.split("  ")[0] == "task" and head.endswith(f"of {count} candidates")
    assert [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows] == [
        ["a", "click", "0.7 bce + 0.3 pair by request", "1", count],
        ["b", "click where click == 1", "that of products", "-", f"at most {count}"],
        ["p", "click = a x b", "bce", "0.5", count],
    ]
    assert by_domain == (
        'mean = "domain": the loss of a is the sum of the means of the domains in a step, each alike; '
        "candidates without action are a domain, too"
    )
    alone = SequenceLogReader(DataConfig(log=log), "train", None)
    assert not list(task_lines(load_config(CONFIG), manifest, alone))


SIDES = [
    ("band", "match", "behaviors and candidates need it, but it has side = 'candidate'"),
    ("action", "match", "side = 'history'"),
    ("action", "time_group", "candidates need it, but it has side = 'history'"),
    ("tags", "time_group", "any number of its ids"),
    ("city", "time_group", "no such feature"),
]


@pytest.mark.parametrize(("feature", "key", "problem"), SIDES)
def test_what_candidates_lack_groups_and_matches_nothing(
    feature: str, key: str, problem: str, rich: Path
) -> None:
    changes = {"model.search": "hard", "model.match": feature} if key == "match" else {}
    changes |= {"model.time_target": "joint", "model.time_group": feature} if key == "time_group" else {}
    if feature == "city":
        changes |= {"groups.user.features": ["city"], "model.roles.context": "user"}
    config = load_config(CONFIG, overrides({"data.log": str(rich), **changes})[1::2])
    with pytest.raises(TandemError, match=problem):
        resolve_groups(config, read_manifest(rich))


def test_a_behavior_matches_by_any_of_its_ids(rich: Path) -> None:
    """Against sets, for every candidate of a batch and every behavior of its window."""
    config = preset("twin_hard", rich, "model.match=tags", "model.k=3")
    model, batch = model_of(config), batch_of(config)
    with torch.no_grad():
        kept = model.search(batch)["main"]
    bags = batch.features["tags"]
    sets = [set(part.tolist()) - {0} for part in bags.values().split(bags.lengths().tolist())]
    several = 0
    for c, request in enumerate(batch.candidate_request.tolist()):
        window = range(int(batch.window_end[request]) - 1, int(batch.window_start[request]) - 1, -1)
        mine = sets[batch.behaviors + c]
        best = sorted(sorted(window, key=lambda n, mine=mine: not mine & sets[n])[:3], reverse=True)
        assert kept.index[c][kept.mask[c]].tolist() == best
        several += len(mine) > 1
    assert several > 5


def test_a_warm_up_ends_within_the_run() -> None:
    share = TrainConfig(warmup=0.08, decay="none")
    assert dense_schedule(share, 1200).warmup_steps == 96 and dense_schedule(share, 3).warmup_steps == 0
    steps = TrainConfig(warmup_steps=100, decay="none")
    assert [dense_schedule(steps, n).warmup_steps for n in (0, 3, 50, 1200)] == [100, 1, 10, 100]
    assert dense_schedule(TrainConfig(warmup_steps=0, warmup=0.5), 100).warmup_steps == 0
    given = {"warmup": 0.1, "tables": {"warmup_steps": 0}}
    assert table_schedule(TrainConfig.model_validate(given), 100).warmup_steps == 0
    given = {"warmup_steps": 9, "tables": {"warmup": 0.5}}
    assert table_schedule(TrainConfig.model_validate(given), 100).warmup_steps == 50
    assert table_schedule(share, 100) == dense_schedule(share, 100)
    assert run_steps(TrainConfig(epochs=3), 100, 30) == 12
    assert run_steps(TrainConfig(max_steps=5), 999, 9) == 5


def test_a_short_run_says_what_would_make_it_longer() -> None:
    (line,) = schedule_remarks(TrainConfig(), 6000, 2048)
    assert "about 3 step(s)" in line
    assert "300 steps would be data.batch_candidates = 64 with train.epochs = 4" in line
    (line,) = schedule_remarks(TrainConfig(), 100_000, 2048)
    assert "data.batch_candidates = 333 with train.epochs = 1" in line
    assert not schedule_remarks(TrainConfig(max_steps=3), 6000, 2048)
    assert not schedule_remarks(TrainConfig(), 300_000, 2048)
    assert len(schedule_remarks(TrainConfig(warmup_steps=100), 6000, 2048)) == 2


def test_the_default_preset_reaches_its_rates_on_a_small_log(log: Path, tmp_path: Path) -> None:
    """Three steps, of which none is warm-up."""
    given = {**{key: value for key, value in SETTINGS.items() if "warmup" not in key}, "data.log": str(log)}
    pipelines.train.train(CONFIG, tmp_path / "run", overrides({**given, "train.decay": "none"})[1::2])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["rate_factor"] for line in lines if line["split"] == "train"]
    assert 3 <= len(rates) < 30 and rates.count(1.0) >= len(rates) - 2
