"""AdaTask: lanes of tables and states of tasks against the rule written out, and what it promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from embeddings.errors import ConfigError, DataError
from tests.helpers.launching import ROOT, launched
from tests.helpers.per_task import (
    PER_TASK,
    PRODUCT,
    SMALL_EPS,
    Reference,
    Training,
    differences,
    owned_sets,
    training,
)
from tests.helpers.tables import whole_tensor
from tests.programs.lane_cases import CASES
from tests.programs.preset_steps import small_config
from tests.programs.step_cases import local_tensors, nan_weight
from tests.trainer.test_presets import log_of_tasks
from trainer.assemble import resolve_groups
from trainer.data.reader import Step
from trainer.log.schema import read_manifest
from trainer.loop.remarks import remarks
from trainer.ranks.process_group import process_group
from trainer.run_config import load_config
from trainer.run_folder import on_board
from trainer.update.dense_optimizer import PerTaskAdam
from trainer.update.dominance import relative
from trainer.update.rules.per_task import check_no_replicas


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log_of_tasks(tmp_path_factory.mktemp("tasks") / "log")


OPTIMIZERS = st.sampled_from(["rowwise_adagrad", "adagrad", "sgd"])


@given(
    preset=st.sampled_from(["mmoe", "stem", "ple", "esmm", "pepnet"]),
    foreign=st.sampled_from(["open", "stopped", "hidden"]),
    product=st.booleans(),
    attention=OPTIMIZERS,
    representation=OPTIMIZERS,
    fusion=st.sampled_from(["concat", "sum"]),
    weights=st.sampled_from([(1, 1), (100, 0.01), (0.01, 1)]),
    rank=st.sampled_from(["none", "pair"]),
    owner=st.sampled_from(["", "click"]),
)
@example("mmoe", "open", False, *["rowwise_adagrad"] * 2, "concat", (100, 0.01), "none", "")
@example("esmm", "open", False, "rowwise_adagrad", "adagrad", "concat", (1, 1), "none", "click")
@example("stem", "open", False, *["rowwise_adagrad"] * 2, "sum", (100, 0.01), "none", "")
@example("stem", "stopped", True, *["rowwise_adagrad"] * 2, "concat", (0.01, 1), "none", "")
@example("ple", "hidden", False, *["rowwise_adagrad"] * 2, "concat", (100, 0.01), "none", "")
@settings(max_examples=3, deadline=None)
def test_lanes_and_states_follow_the_rule_written_out(
    log: Path,
    preset: str,
    foreign: str,
    product: bool,
    attention: str,
    representation: str,
    fusion: str,
    weights: tuple[float, float],
    rank: str,
    owner: str,
) -> None:
    """Also where sets, towers and attention belong to a task, whoever else trains them, and where a task is a
    product."""
    words = [
        *(PRODUCT if product and preset != "esmm" else []),
        *(owned_sets(foreign) if preset in ("stem", "ple") else []),
        f"tasks.click.weight={weights[0]}", f"tasks.conversion.weight={weights[1]}",
        f"tasks.click.rank={rank}", f"model.attention_owner={owner}",
        f"groups.attention.optimizer={attention}", f"groups.representation.optimizer={representation}",
        f"groups.representation.fusion={fusion}",
    ]  # fmt: skip
    config = small_config(preset, log, PER_TASK, *words)
    with process_group() as ranks:
        made = training(config, ranks, log.parent)
        slow = Reference(config, made.folded())
        done = 0
        for step in made.steps(4):
            slow.train(step, config.train.learning_rate)
            done += 1
            found = made.folded()
            for name, weight in slow.named.items():
                # Adam turns the rounding of gradients that are all but zero into steps.
                moved = (found[name] - weight).norm()
                assert moved <= 1e-3 * weight.norm() + 1e-6, (done, name, float(moved))
    assert done == 4


@pytest.fixture(scope="module")
def on_ranks(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What `tests.programs.lane_cases` finds on so many ranks."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("ranks") / "found.pt"
        done = launched("tests.programs.lane_cases", str(log), str(out), ranks=ranks, timeout=200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found[ranks] = torch.load(out)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, on_ranks: dict[int, Any]) -> None:
    """Gradients are averaged before a task's state squares them; each lane lies where the plan says."""
    (losses, shares, weights), (others, more, same) = on_ranks[1][case], on_ranks[2][case]
    assert losses == pytest.approx(others, rel=5e-5)
    assert weights.keys() == same.keys() and any(name.endswith("/conversion.weight") for name in weights)
    # On two ranks the sample of rows is another one.
    assert shares.keys() == more.keys() and {"groups.attention", "attention__item_id"} < shares.keys()
    for unit in shares:
        assert sum(shares[unit].values()) == pytest.approx(1) == pytest.approx(sum(more[unit].values()))
        tables = any(mark in unit for mark in ("groups.", "__", "/"))
        assert tables or shares[unit] == pytest.approx(more[unit], abs=0.01)
    for name, weight in weights.items():
        # Adam turns the rounding of gradients that are all but zero into steps.
        assert (weight - same[name]).norm() <= 3e-3 * weight.norm() + 1e-6, name


def test_ids_that_are_exchanged_ahead_change_nothing(on_ranks: dict[int, Any]) -> None:
    for ranks in (1, 2):
        (*plain, weights), (*ahead, same) = (on_ranks[ranks][case] for case in ("mmoe", "ahead"))
        assert plain == ahead
        assert all(torch.equal(weight, same[name]) for name, weight in weights.items())


def digests(made: Training) -> dict[str, Tensor]:
    """Weights and states of Adam and of tables, under the names that both rules share."""
    state = made.optimizer.state_dict()["state"]
    found = dict(local_tensors([made.sharded.model.state_dict(), state]))
    return {name.replace(".click.", "."): tensor.clone() for name, tensor in found.items()}


def test_with_one_task_it_is_plain_adam_to_the_bit(log: Path, tmp_path: Path) -> None:
    found = []
    with process_group() as ranks:
        for words in ((), (PER_TASK,)):
            made = training(small_config("mmoe", log, "tasks.click.weight=1", *words), ranks, tmp_path)
            assert all(step.counted for step in made.steps(5))
            found.append(digests(made))
    assert len(found[0]) > 30 and found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_the_size_of_a_loss_does_not_matter(log: Path, tmp_path: Path) -> None:
    """A thousand times as large, it moves weights by less than a ten-thousandth of themselves."""
    moved = {}
    with process_group() as ranks:
        for rule in ("per_task", "summed"):
            found = []
            for times in (1, 1000):
                # So large that the eps of Adam, which nobody can set, is nothing beside gradients. It would
                # not take long for a search to keep other behaviors.
                weights = [f"tasks.click.weight={1e6 * times}", "tasks.conversion.weight=1e6"]
                config = small_config("mmoe", log, f"train.update={rule}", *weights, *SMALL_EPS)
                made = training(config, ranks, tmp_path)
                list(made.steps(6))
                found.append(made.folded())
            moved[rule] = max(differences(*found).values())
    assert moved["per_task"] < 1e-4, moved
    assert moved["summed"] > 0.05, moved


def test_a_task_without_labels_changes_nothing(log: Path, tmp_path: Path) -> None:
    """Neither weights that only it reaches, nor its state, nor the step count that corrects its means."""
    with process_group() as ranks:
        made = training(small_config("mmoe", log, PER_TASK), ranks, tmp_path)
        list(made.steps(2))
        before = digests(made)

        def unobserved(step: Step) -> Step:
            labels = step.batch.labels.clone()
            labels[:, 1] = torch.nan
            return replace(step, batch=replace(step.batch, labels=labels, sizes=None))

        steps = map(unobserved, islice(made.reader.steps(), 2, 4))
        assert len(list(made.pipeline.train(steps))) == 2
        after = digests(made)
    others = {name for name in before if "conversion" in name}
    assert len(others) > 40
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert not changed & others, changed & others
    assert any("head.towers" in name for name in changed)


@given(
    seed=st.integers(0, 99),
    present=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6),
)
@settings(max_examples=25, deadline=None)
def test_the_dense_optimizer_adds_up_the_steps_of_one_adam_a_task(
    seed: int, present: list[list[bool]]
) -> None:
    """Of plain Adams that each go their own way from the same start; weights may belong to some tasks."""
    rng = torch.Generator().manual_seed(seed)
    reach = {"shared": ("a", "b", "c"), "two": ("a", "c"), "own": ("b",)}
    weights = {name: nn.Parameter(torch.randn(3, 2, generator=rng)) for name in reach}
    first = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = PerTaskAdam(weights, reach, lambda given: torch.optim.Adam(given, lr=0.01), False)
    optimizer.create_state()
    alone = {
        task: {name: nn.Parameter(first[name].double()) for name, tasks in reach.items() if task in tasks}
        for task in "abc"
    }
    adams = {task: torch.optim.Adam(own.values(), lr=0.01) for task, own in alone.items()}
    for step in present:
        tasks = [task for task, there in zip("abc", step, strict=True) if there]
        scales = dict(zip("abc", (100.0, 1.0, 0.01), strict=True))
        gradients_of = {
            task: {name: scales[task] * torch.randn(3, 2, generator=rng) for name in alone[task]}
            for task in tasks
        }
        optimizer.give(gradients_of)
        optimizer.step()
        for task, gradients in gradients_of.items():
            for name, weight in alone[task].items():
                weight.grad = gradients[name].double()
            adams[task].step()
    for name, weight in weights.items():
        moved = sum(own[name].detach() - first[name] for own in alone.values() if name in own)
        assert torch.allclose(weight.detach(), (first[name] + moved).float(), rtol=1e-4, atol=1e-6)
    for name, state in optimizer.state_dict()["state"].items():
        counts = {key.split(".")[0]: int(value) for key, value in state.items() if key.endswith(".step")}
        assert counts == {task: sum(step["abc".index(task)] for step in present) for task in reach[name]}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.optimizer=adamw", "train.weight_decay=0.1"], 'set train.optimizer = "adam"'),
        (["train.max_gradient_norm=1"], "train.max_gradient_norm = 1.0 .*leave it out"),
        (["groups.attention.max_gradient=1"], "groups.attention.max_gradient = 1.0 .*leave it out"),
        (['groups.attention.kind="sequence"'], 'groups.attention.kind = "sequence".*use kind = "bag"'),
        (['groups.attention.sharding=["data_parallel"]'], "groups.attention.sharding names .*other types"),
        (['plan.tables.attention__item_id.sharding=["data_parallel"]'], "plan.tables.attention__item_id"),
        (["model.experts.covariance=1"], "model.experts.covariance is a loss of no task"),
    ],
)
def test_what_the_rule_cannot_be_had_with_is_refused(words: list[str], problem: str) -> None:
    for rule in (PER_TASK, 'phases=[{passes=1, update="per_task"}]'):
        with pytest.raises(ConfigError, match=f"per_task.*{problem}"):
            load_config(ROOT / "configs/mmoe.toml", [rule, *words])
        load_config(ROOT / "configs/mmoe.toml", words)


def test_no_task_dominates_however_large_its_loss(log: Path, tmp_path: Path) -> None:
    """Of 100 : 1 : 0.01 the plain rule, one accumulator for all, moves nearly every weight by the largest."""
    words = [
        "tasks.click.weight=100", "tasks.conversion.weight=1",
        "tasks.again.label=click", "tasks.again.weight=0.01",
    ]  # fmt: skip
    config = small_config("mmoe", log, PER_TASK, *words, *SMALL_EPS)
    with process_group() as ranks:
        made = training(config, ranks, tmp_path)
        slow = Reference(config, made.folded())
        plain = plain_shares(slow, next(iter(made.reader.steps())))
        list(made.steps(5))
        found = made.step.report()["dominance"]
        assert made.step.report()["dominance"]["mean"].keys() < found["mean"].keys()
    # Behaviors have no domain, so that attention does not depend on its table.
    units = {
        *("groups.attention", "groups.representation", "attention__item_id", "attention__category_id"),
        *("representation__item_id", "representation__category_id", "representation__domain_id"),
        "head.layers.0.banks.shared.72.layers.0",
    }
    assert units < found["mean"].keys() and "attention__domain_id" not in found["mean"]
    for unit, shares in found["mean"].items():
        assert sum(shares.values()) == pytest.approx(1) and set(shares) == {"click", "conversion", "again"}
        assert all(0 <= share <= 1 for share in found["dominated"][unit].values())
    for unit in units:
        assert max(found["mean"][unit].values()) < 0.6, unit
    assert min(plain.values()) > 0.9, plain


def plain_shares(slow: Reference, step: Step) -> dict[str, float]:
    """Of the numbers of each weight of all tasks, those that `click` dominates where there is one state."""
    losses = slow.losses.of(step, slow.model.train()(step.batch)).by_task
    names = [name for name in slow.named if name.startswith("collections.") or ".banks." in name]
    weights = [slow.named[name] for name in names]
    gradients = {task: torch.autograd.grad(loss, weights, retain_graph=True) for task, loss in losses.items()}
    found = {}
    for place, name in enumerate(names):
        shares = relative({task: each[place].square() for task, each in gradients.items()})
        found[name] = float((shares["click"] > 0.9).float().mean())
    return found


def test_a_model_of_folded_tables_scores_alike(log: Path, tmp_path: Path) -> None:
    config = small_config("stem", log, PER_TASK)
    with process_group() as ranks:
        made = training(config, ranks, tmp_path)
        *_, step = made.steps(3)
        lanes = [
            weight for name, weight in made.sharded.model.state_dict().items() if "/conversion.w" in name
        ]
        assert lanes and all(whole_tensor(weight).any() for weight in lanes if len(whole_tensor(weight)) > 3)
        slow, fast = Reference(config, made.folded()).model.eval(), made.sharded.model.eval()
        with torch.no_grad():
            assert torch.allclose(slow(step.batch).logits, fast(step.batch).logits, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_loss_is_heard_beside_large_ones(seed: int) -> None:
    """Three tasks want one vector in three places, with losses of 100 : 1 : 0.01. The plain rule ends at the
    place of the largest loss, this one about as far from each of them."""
    rng = torch.Generator().manual_seed(seed)
    wanted = dict(zip("abc", torch.randn(3, 16, generator=rng), strict=True))
    scales = {"a": 100.0, "b": 1.0, "c": 0.01}
    ends = {}
    for rule in ("per_task", "summed"):
        weights = {"shared": nn.Parameter(torch.zeros(16))}
        tasks = tuple(wanted) if rule == "per_task" else ("all",)
        optimizer = PerTaskAdam(
            weights, {"shared": tasks}, lambda given: torch.optim.Adam(given, lr=0.01), False
        )
        optimizer.create_state()
        for _ in range(400):
            here = weights["shared"].detach()
            noise = torch.randn(16, generator=rng)
            pulls = {task: scales[task] * (here - place + noise) for task, place in wanted.items()}
            given = pulls if rule == "per_task" else {"all": sum(pulls.values())}
            optimizer.give({task: {"shared": pull} for task, pull in given.items()})
            optimizer.step()
        here = weights["shared"].detach()
        ends[rule] = {task: float((here - place).norm() / place.norm()) for task, place in wanted.items()}
    assert max(ends["per_task"].values()) < 1.7 * min(ends["per_task"].values()), ends
    assert ends["summed"]["a"] < 0.3 and min(ends["summed"][task] for task in "bc") > 0.9, ends


def test_a_bad_step_leaves_lanes_and_states_as_they_were(log: Path, tmp_path: Path) -> None:
    """Where the guard reads its answer late, too, and the fused optimizers leave the step out."""
    config = small_config("mmoe", log, PER_TASK)
    with process_group() as ranks:
        for late in (False, True):
            made = training(config, ranks, tmp_path, late=late)
            list(made.steps(2))
            before = digests(made)
            bad = map(nan_weight, islice(made.reader.steps(), 2, 3))
            with pytest.raises(DataError, match=r"step 3 .* group attention, task conversion"):
                list(made.pipeline.train(bad))
            after = digests(made)
            changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
            assert not changed, changed


def test_a_plan_from_elsewhere_must_not_hold_tables_on_every_rank() -> None:
    kinds = {"a__item_id": "table_wise", "a__item_id/buy": "data_parallel"}
    placed = {name: ParameterSharding(kind, "dense", [0]) for name, kind in kinds.items()}
    plan = ShardingPlan({"collections.a": EmbeddingModuleShardingPlan(placed)})
    with pytest.raises(ConfigError, match="table a__item_id/buy is data_parallel in this plan; plan again"):
        check_no_replicas(plan)


def test_dominance_has_curves_of_its_own() -> None:
    found = {"mean": {"groups.a": {"buy": 0.75, "like": 0.25}}, "dominated": {"head": {"buy": 0.5}}}
    assert dict(on_board("train", {"loss": 0.5, "dominance": found})) == {
        "train/loss": 0.5,
        "dominance mean/groups.a/buy": 0.75,
        "dominance mean/groups.a/like": 0.25,
        "dominance dominated/head/buy": 0.5,
    }


def test_one_task_alone_is_told_that_the_rule_has_no_effect(log: Path) -> None:
    words = ("tasks.click.weight=1", "tasks.conversion.weight=0", PER_TASK)
    for words_, told in ((words, True), (words[:1] + words[2:], True), ((PER_TASK,), False)):
        config, manifest = small_config("mmoe", log, *words_), read_manifest(log)
        said = remarks(config, manifest, resolve_groups(config, manifest))
        line = 'no effect: update = "per_task", since click is the only task with a loss of its own'
        assert (line in said) == told
