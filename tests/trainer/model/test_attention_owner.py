"""Attention that one task owns: the others read its weights, and train nothing of what makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings.errors import ConfigError
from tests.helpers.logs import random_rows, write_log
from tests.helpers.models import draw, drawing
from tests.trainer.model.test_experts import model_with
from trainer.assemble import resolve_groups
from trainer.config.tasks import Task, TaskConfig, resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.log.schema import read_manifest
from trainer.loop.remarks import remarks
from trainer.model.frame import TwoStageModel
from trainer.run_config import Config, load_config

TASKS = ("click", "like", "buy")
THREE = resolve_tasks({}, TASKS)
SEVERAL = {"shared": {}, "mine": {"owner": "task:like"}}
RECENT = {"recent": {"search": "recent", "k": 2, "attention_owner": "buy"}}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("owner") / "log", {"train": random_rows(7)})


def built(
    log: Path, sets: Any = 1, tasks: Sequence[Task] = THREE, **model: Any
) -> tuple[TwoStageModel, RequestBatch]:
    owners = {"head": "experts", "experts": {"own": 1}} if sets == SEVERAL else {}
    made, batch = model_with(log, sets, tasks=tasks, **owners, **model)
    draw(made.head, drawing(2))
    return made, batch


def reach(model: TwoStageModel, logit: Tensor, what: str) -> float:
    """The largest gradient of what makes attention weights of a branch, or of everything else."""
    named = dict(model.named_parameters())
    of_scores = [f"branches.{name}.scorer." for name in ("main", "recent")]
    own = {
        "tables": [n for n in named if n.startswith("collections.attention")],
        "main": [n for n in named if n.startswith(of_scores[0])],
        "recent": [n for n in named if n.startswith(of_scores[1])],
    }
    rest = [n for n in named if not any(n in names for names in own.values()) and "auxiliary" not in n]
    parts = [named[name] for name in ([*rest] if what == "rest" else own[what])]
    found = torch.autograd.grad(logit.square().sum(), parts, retain_graph=True, allow_unused=True)
    return max((float(g.abs().max()) for g in found if g is not None), default=0.0)


@pytest.mark.parametrize("sets", [1, SEVERAL])
@pytest.mark.parametrize("model", [{}, {"projection": "heads", "heads": 2}, {"score": "mlp"}])
def test_only_the_loss_of_the_owner_reaches_attention(log: Path, sets: Any, model: Any) -> None:
    owned, batch = built(log, sets, attention_owner="like", **model)
    free, _ = built(log, sets, **model)
    assert list(owned.state_dict()) == list(free.state_dict())
    logits, expected = owned(batch).logits, free(batch).logits
    assert torch.equal(logits, expected)
    for task, name in enumerate(TASKS):
        for what in ("tables", "main"):
            assert reach(free, expected[:, task], what) > 0
            assert (reach(owned, logits[:, task], what) > 0) == (name == "like")
        assert reach(owned, logits[:, task], "rest") == reach(free, expected[:, task], "rest")


def test_each_branch_may_have_an_owner_of_its_own(log: Path) -> None:
    model, batch = built(log, attention_owner="like", branches=RECENT)
    free, _ = built(log, branches={"recent": RECENT["recent"] | {"attention_owner": ""}})
    assert len(model.owned.runs) == 3
    logits = model(batch).logits
    assert torch.equal(logits, free(batch).logits)
    reached = {
        (branch, name) for branch in ("main", "recent") for t, name in enumerate(TASKS)
        if reach(model, logits[:, t], branch) > 0
    }  # fmt: skip
    assert reached == {("main", "like"), ("recent", "buy")}
    assert reach(model, logits[:, 0], "tables") == 0


@pytest.mark.parametrize("kind", [{"auxiliary": "softmax"}, {"auxiliary": "index", "search": "soft"}])
def test_the_auxiliary_loss_keeps_to_the_owner_too(log: Path, kind: dict[str, str]) -> None:
    settings = {"lookup": "full", **kind}
    model, batch = built(log, attention_owner="like", **settings)
    free, _ = built(log, **settings)
    auxiliary = model.train()(batch).auxiliary
    assert torch.equal(auxiliary, free.train()(batch).auxiliary)
    for task, name in enumerate(TASKS):
        assert (reach(model, auxiliary[:, task], "tables") > 0) == (name == "like")


def test_a_product_reaches_attention_through_the_part_that_owns_it(log: Path) -> None:
    given = {name: TaskConfig() for name in TASKS}
    given |= {
        "with": TaskConfig(label="buy", product=("like", "click")),
        "without": TaskConfig(label="buy", product=("click", "buy")),
    }
    model, batch = built(log, tasks=resolve_tasks(given, TASKS), attention_owner="like")
    free, _ = built(log, tasks=resolve_tasks(given, TASKS))
    logits = model(batch).logits
    assert torch.equal(logits, free(batch).logits) and logits.shape[1] == 5
    of_parts = logits[:, :2].sigmoid().prod(1)
    assert torch.allclose(logits[:, 3].sigmoid(), of_parts, atol=1e-6)
    reached = [reach(model, logits[:, task], "main") > 0 for task in range(5)]
    assert reached == [False, True, False, True, False]


def reached_by(model: TwoStageModel, losses: Sequence[Tensor]) -> list[set[str]]:
    """Of each loss, the dense parameters that it moves."""
    named = {n: p for n, p in model.named_parameters() if not n.startswith("collections.")}
    found = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, [*named.values()], retain_graph=True, allow_unused=True)
        pairs = zip(named, gradients, strict=True)
        found.append({name for name, gradient in pairs if gradient is not None and gradient.abs().max() > 0})
    return found


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"projection": "heads", "heads": 2},
        {"score": "mlp"},
        {"search": "soft", "auxiliary": "index", "lookup": "full"},
        {"branches": RECENT, "sequence": "stacked"},
    ],
)
def test_a_task_that_rests_lets_all_that_it_alone_trains_rest(log: Path, model: dict[str, Any]) -> None:
    """Towers, experts and sets of its own, and the attention that it owns: none moves by Adam's memory."""
    made, batch = built(log, SEVERAL, attention_owner="like", **model)
    for branch in made.branches.named().values():
        for parts in branch.of_attention:
            draw(parts, drawing(5))
    prediction = made.train()(batch)
    losses = [prediction.logits[:, t].square().sum() for t in range(len(TASKS))]
    if prediction.auxiliary is not None:
        losses = [each + prediction.auxiliary[:, t].square().sum() for t, each in enumerate(losses)]
    reached = reached_by(made, losses)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    for task, alone in enumerate(reached):
        others = set.union(*(each for place, each in enumerate(reached) if place != task))
        own = {names[id(parameter)] for parameter in made.own_parameters(TASKS[task])}
        assert own & others == set() and alone - others <= own
    assert any(".scorer." in names[id(p)] or ".search." in names[id(p)] for p in made.own_parameters("like"))


@pytest.mark.parametrize("owners", [{"like": RECENT}, {"like": {}}, {"click": RECENT}])
def test_the_covariance_of_experts_reaches_no_owned_attention(log: Path, owners: dict[str, Any]) -> None:
    """Nor where every task owns the attention of some branch, or there is no other task."""
    (owner, branches), *_ = owners.items()
    tasks = resolve_tasks({}, [owner, "buy"] if branches else [owner])
    kind = {"head": "experts", "experts": {"shared": 2, "covariance": 0.1}}
    model, batch = built(log, tasks=tasks, attention_owner=owner, branches=branches, **kind)
    prediction = model.train()(batch)
    for what in ["main", "tables", *branches]:
        assert reach(model, prediction.logits, what) > 0
        assert reach(model, prediction.experts, what) == 0
    assert reach(model, prediction.experts, "rest") > 0


def test_scoring_runs_the_head_once(log: Path) -> None:
    model, batch = built(log, attention_owner="like")
    runs: list[int] = []
    model.head.register_forward_hook(lambda *_: runs.append(1))
    trained = model(batch).logits
    assert len(runs) == 2
    with torch.no_grad():
        scored = model(batch).logits
    assert len(runs) == 3 and torch.equal(scored, trained)


def test_an_owner_that_is_no_task_is_refused(log: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[data]\nlog = "{log}"\n[model]\nattention_owner = "clik"\n')
    with pytest.raises(
        ConfigError, match=r"model\.attention_owner = 'clik': no task with a tower .* 'click'"
    ):
        resolve_groups(load_config(path), read_manifest(log))


@pytest.mark.parametrize("sequence", ["attention", "collision"])
def test_an_owner_of_weights_that_are_not_there_is_said(log: Path, tmp_path: Path, sequence: str) -> None:
    path = tmp_path / "run.toml"
    model = f'[model]\nattention_owner = "click"\nsequence = "{sequence}"\nhead = "experts"\n'
    path.write_text(f'[data]\nlog = "{log}"\n{model}[model.towers]\ngate_hidden = 9\n')
    settings, manifest = load_config(path), read_manifest(log)
    said = "\n".join(remarks(settings, manifest, resolve_groups(settings, manifest)))
    assert said.count("model.attention_owner = 'click'") == 1
    assert ("(click is the only task with a tower)" in said) == (sequence == "attention")
    assert "model.towers.gate_hidden = 9 (model.towers has no gates)" in said


def test_running_statistics_are_refused_for_they_would_count_twice() -> None:
    with pytest.raises(ValueError, match='use norm = "layer"'):
        Config.model_validate({"model": {"attention_owner": "click", "norm": "batch"}})
