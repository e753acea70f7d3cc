"""What a run may change between two starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import ConfigError
from tests.helpers.checkpoints import newest
from tests.helpers.launching import ROOT, SETTINGS, losses, overrides, tandemrec, train
from tests.helpers.logs import manifest_of, small_log
from trainer.assemble import check_same_rules
from trainer.checkpoint.compatible import changed_settings, check_resumable, log_fingerprint
from trainer.checkpoint.files import read_state
from trainer.log.schema import LogManifest
from trainer.run_config import Config, load_config

DARE = Path(__file__).parents[3] / "configs" / "dare.toml"


def state(blocks: int = 0) -> dict[str, Any]:
    return {
        "log": "a",
        "config": load_config(DARE).model_dump(mode="json"),
        "cursor": {"epoch": 0, "blocks": blocks},
    }


def changed(*words: str) -> Config:
    return load_config(DARE, words)


def test_a_fingerprint_is_that_of_before_where_every_label_is_observed() -> None:
    split = {"files": [], "rows": 1, "requests": 1, "candidates": 3, "positives": 2, "behaviors": 9}
    tree = manifest_of(rich=True, splits={"train": split}).model_dump(mode="json")
    older = LogManifest(**{name: tree[name] for name in tree if name not in ("partial", "label_weights")})
    assert log_fingerprint(older) == "92bb30b499d189a430ee72f647bf1d8bba57e48009fdffa8665f29ecbbf614f4"
    counted = {**split, "labels": {"click": {"observed": 3, "positives": 2}}}
    assert log_fingerprint(manifest_of(rich=True, splits={"train": counted})) == log_fingerprint(older)
    for name in ("partial", "label_weights"):
        changed = manifest_of(rich=True, splits={"train": split}, **{name: ["buy"]})
        assert log_fingerprint(changed) != log_fingerprint(older)


@pytest.mark.parametrize(
    "word",
    ["train.epochs=9", "train.learning_rate=0.1", "data.batch_candidates=9", "data.workers=3", "data.log=x"],
)
def test_these_may_change_at_any_time(word: str) -> None:
    check_resumable(state(blocks=5), changed(word), "a")


@pytest.mark.parametrize(
    "word",
    ["model.k=9", "groups.attention.dim=8", "groups.attention.optimizer=sgd", "tables.item_id.rows=9999999"],
)
def test_what_shapes_the_model_may_not(word: str) -> None:
    with pytest.raises(ConfigError, match=f"{word.split('=', maxsplit=1)[0]} = .*set it back"):
        check_resumable(state(), changed(word), "a")


def test_what_orders_the_data_may_change_between_epochs_only() -> None:
    given = ["train.seed=3", "data.requests_per_block=9"]
    check_resumable(state(), changed(*given), "a")
    assert changed_settings(state(), changed(*given)) == [
        "data.requests_per_block = 9 (was 8)",
        "train.seed = 3 (was 17)",
    ]
    with pytest.raises(ConfigError, match=r"data.requests_per_block = 8, now it is 9"):
        check_resumable(state(blocks=5), changed("data.requests_per_block=9"), "a")
    # A model that knows places in the history has a number for each.
    with pytest.raises(ConfigError, match=r"data.history_length = 500, now it is 9"):
        check_resumable(state(), changed("data.history_length=9"), "a")


def test_keys_that_a_version_did_not_have_are_no_changes_and_other_defaults_are(tmp_path: Path) -> None:
    """The state of a checkpoint of version 89f0e71, continued with the same configuration file."""
    golden = Path("tests/golden/89f0e71/run")
    then = json.loads((golden / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert changed_settings(then, load_config(golden / "config.toml")) == []
    keys = ("data.sharding", "data.verify", "checkpoint.mode")
    lines = (golden / "config.toml").read_text().splitlines()
    without = [line for line in lines if line.split(" ")[0] not in [key.split(".")[1] for key in keys]]
    (tmp_path / "config.toml").write_text("\n".join(without))
    now = load_config(tmp_path / "config.toml", ["train.validate_candidates=50", "train.max_steps=0"])
    assert changed_settings(then, now) == [
        "data.sharding = 'auto' (was 'steps'; now the default)",
        "data.verify = 'auto' (was True; now the default)",
        "train.max_steps = 0 (was 8; now the default)",
        "train.validate_candidates = 50 (was not set)",
        "checkpoint.mode = 'auto' (was 'async'; now the default)",
    ]


SETS = "groups.representation.sets={one = {}, other = {dim = 8}}"
EXPERTS = "model.head=experts"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            [SETS],
            ["groups.representation.sets={other = {dim = 8}, one = {}}"],
            "groups.representation.sets = 'one, other', now it is 'other, one'; set it back",
        ),
        ([SETS], ["groups.representation.sets=2"], "groups.representation.sets = 'one, other', now it is 2"),
        (
            [EXPERTS, 'groups.representation.sets="tasks"'],
            [EXPERTS, SETS],
            "sets = 'tasks', now it is 'one, other'; set it",
        ),
        (["groups.representation.sets=2"], [], "groups.representation.sets = 2, now it is 1"),
        ([SETS], [SETS.replace("8", "4")], "groups.representation.sets.other.dim = 8, now it is 4"),
    ],
)
def test_sets_stay_in_their_order(before: list[str], after: list[str], message: str) -> None:
    """Each has columns of the head's input or output, which names alone do not tell apart."""
    given = state() | {"config": changed(*before).model_dump(mode="json")}
    check_resumable(given, changed(*before), "a")
    with pytest.raises(ConfigError) as caught:
        check_resumable(given, changed(*after), "a")
    assert message in str(caught.value)


OF_TASKS = 'groups.representation.sets={shared = {}, click = {owner = "task:click"}}'


def test_the_same_sets_may_be_written_in_another_way() -> None:
    width = changed().groups["representation"].dim
    spelled = [OF_TASKS, OF_TASKS.replace("shared = {}", f"shared = {{dim = {width}}}")]
    ways = ["groups.representation.sets=tasks", *spelled]
    narrow = OF_TASKS.replace("shared = {}", "shared = {dim = 4}")
    of_nobody = OF_TASKS.replace('owner = "task:click"', "")

    def with_sets(word: str) -> Config:
        return changed("model.head=experts", "model.experts.own=1", word)

    for before in ways:
        given = state() | {"config": with_sets(before).model_dump(mode="json")}
        for after in ways:
            check_resumable(given, with_sets(after), "a", ["click"])
        for other in (narrow, of_nobody):
            with pytest.raises(ConfigError, match=r"groups\.representation\.sets"):
                check_resumable(given, with_sets(other), "a", ["click"])


def test_states_of_tasks_are_of_the_same_products() -> None:
    """Its factors say what a product reaches, and so where it has a state."""

    def of_product(*factors: str) -> Config:
        tasks = [f"tasks.{name}.label=click" for name in ("a", "b", "c", "both")]
        product = f"tasks.both.product={json.dumps(factors)}"
        return changed("model.head=experts", "train.update=per_task", *tasks, product)

    given = state() | {"config": of_product("a", "b").model_dump(mode="json")}
    check_resumable(given, of_product("b", "a"), "a", ["click"])
    with pytest.raises(ConfigError, match=r"both = a \* b, now .* both = a \* c .*set it back"):
        check_resumable(given, of_product("a", "c"), "a", ["click"])


def test_how_a_task_is_trained_may_change() -> None:
    given = state() | {"config": changed("tasks.a.weight=2").model_dump(mode="json")}
    check_resumable(given, changed("tasks.a.weight=3", "tasks.a.loss=focal"), "a")


@pytest.mark.parametrize("word", ["plan.file=x", "train.epochs=9", "groups.attention.learning_rate=1"])
def test_these_leave_a_plan_as_it_is(word: str) -> None:
    check_same_rules(state()["config"], changed(word), "here")


@pytest.mark.parametrize(
    "word",
    [
        "plan.reserve=0.3",
        "plan.allow_unified_memory=true",
        'groups.attention.sharding=["row_wise"]',
        'plan.tables.attention__item_id.sharding=["row_wise"]',
    ],
)
def test_rules_of_placing_call_for_another_plan(word: str) -> None:
    with pytest.raises(ConfigError, match=f"here: made with {word.split('=', maxsplit=1)[0]} = "):
        check_same_rules(state()["config"], changed(word), "here")


def test_another_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another log"):
        check_resumable(state(), changed(), "b")
    train(small_log(tmp_path / "a", seed=1), tmp_path / "run", train__max_steps=2)
    before = (tmp_path / "run" / "config.toml").read_text()
    other = small_log(tmp_path / "b", seed=2)
    words = ["train", "--config", "configs/dare.toml", "--out", str(tmp_path / "run")]
    done = tandemrec(*words, *overrides({"data.log": str(other)}))
    assert done.returncode == 2 and "another log" in done.stderr
    assert (tmp_path / "run" / "config.toml").read_text() == before


@pytest.mark.slow
def test_sigterm_under_torchrun_saves_and_ends_all_ranks(tmp_path: Path) -> None:
    """torchrun passes SIGTERM on and waits; what a scheduler sends to the ranks besides changes nothing."""
    log, run = small_log(tmp_path / "log", seed=1, users=20), tmp_path / "run"
    settings = {"data.log": str(log), **SETTINGS, "train.epochs": 5000, "checkpoint.check_every": 2}
    words = ["train", "--config", "configs/dare.toml", "--out", str(run), *overrides(settings)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.Popen(
        [*command, "-m", "launch.cli", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(losses_so_far(run)) < 5:
            assert time.monotonic() < deadline and job.poll() is None, "no step was trained"
            time.sleep(0.1)
        ranks = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        assert len(ranks) == 2
        job.send_signal(signal.SIGTERM)
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        said, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    path, refused = newest(run / "checkpoints")
    assert path is not None and not refused, said
    step = read_state(path)["step"]
    assert f"stopped after step {step} as asked" in said and "SIGKILL" not in said
    assert len(losses(run)) == step
    assert [p.name for p in (run / "checkpoints").iterdir()] == [path.name]


def losses_so_far(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)]
