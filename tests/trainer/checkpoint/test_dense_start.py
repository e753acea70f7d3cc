"""Heads of a run that starts from a run with other tasks: by the tasks' names."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings.errors import CheckpointError
from trainer.checkpoint.dense_start import TaskHeads, fill_dense
from trainer.config.tasks import TaskConfig, resolve_tasks
from trainer.model.heads.head import DotHead, Head, HeadSizes, MlpHead

WIDTH = 6


def tasks_of(names: Iterable[str], rank: str = "none") -> Any:
    configs = {name: TaskConfig(rank=rank) for name in names}
    return resolve_tasks(configs, list(names))


def head_of(kind: str, names: list[str], rank: str = "none", hidden: tuple[int, ...] = (5, 4)) -> Head:
    sizes = HeadSizes({"": [WIDTH // 2, WIDTH // 2]}, 0, tasks_of(names, rank))
    if kind == "dot":
        return DotHead(WIDTH // 2, 0, len(names), sizes.outputs)
    return MlpHead(sizes, hidden)


def weights_of(head: Head) -> dict[str, Tensor]:
    return {f"head.{name}": tensor for name, tensor in head.state_dict().items()}


def heads_of(kind: str, names: list[str], hidden: tuple[int, ...] = (5, 4)) -> TaskHeads:
    head = DotHead if kind == "dot" else MlpHead
    return TaskHeads(tuple(names), head.weights_of_tasks(SimpleNamespace(hidden=hidden)))


def source_of(weights: dict[str, Tensor], tasks: list[str] | None) -> Any:
    manifest = SimpleNamespace(tasks=None if tasks is None else tuple(tasks))
    return SimpleNamespace(name="source", manifest=manifest, dense=lambda: weights)


@pytest.mark.parametrize("kind", ["mlp", "dot"])
@pytest.mark.parametrize(
    ("before", "now"),
    [(["a", "b"], ["b", "a"]), (["a", "b"], ["c", "b"]), (["a"], ["b", "a"]), (["a", "b"], ["b"])],
)
@pytest.mark.parametrize(
    ("rank_before", "rank"), [("none", "none"), ("jrc", "jrc"), ("none", "jrc"), ("jrc", "none")]
)
def test_each_task_has_the_rows_of_its_name(
    kind: str, before: list[str], now: list[str], rank_before: str, rank: str
) -> None:
    torch.manual_seed(0)
    old, new = head_of(kind, before, rank_before), head_of(kind, now, rank)
    if isinstance(old, DotHead) and isinstance(new, DotHead):
        # All of its scales start as 1.
        for head in (old, new):
            torch.nn.init.normal_(head.scale)
    first = {name: tensor.clone() for name, tensor in weights_of(new).items()}
    lines = fill_dense(weights_of(new), source_of(weights_of(old), before), heads_of(kind, now))
    for name, weight in weights_of(new).items():
        theirs = weights_of(old)[name]
        rows = name in [f"head.{row}" for row in heads_of(kind, now).weights.rows]
        if not rows:
            assert torch.equal(weight, theirs), name
            continue
        halves, theirs_halves = weight.unflatten(0, (-1, len(now))), theirs.unflatten(0, (-1, len(before)))
        for half in range(len(halves)):
            for place, task in enumerate(now):
                known = task in before and half < len(theirs_halves)
                wanted = (
                    theirs_halves[half, before.index(task)]
                    if known
                    else first[name].unflatten(0, (-1, len(now)))[half, place]
                )
                assert torch.equal(halves[half, place], wanted), (name, task)
    fresh, gone = [t for t in now if t not in before], [t for t in before if t not in now]
    said = [f"tasks: {t} not there before, with first weights of their own" for t in fresh]
    assert lines == said + [f"tasks: {t} left out" for t in gone]


def test_the_same_tasks_or_unknown_ones_are_taken_as_they_lie() -> None:
    heads = heads_of("mlp", ["a", "b"])
    for known, asked in ((["a", "b"], heads), (None, heads), (["c", "d"], TaskHeads())):
        old, new = head_of("mlp", ["a", "b"]), head_of("mlp", ["a", "b"])
        assert fill_dense(weights_of(new), source_of(weights_of(old), known), asked) == []
        for name, weight in weights_of(new).items():
            assert torch.equal(weight, weights_of(old)[name])


def towers(names: list[str], experts: int) -> dict[str, Tensor]:
    weights = {"head.layers.0.banks.shared.weight": torch.randn(2)}
    for name in names:
        weights[f"head.towers.task_{name}.weight"] = torch.randn(3)
        weights[f"head.layers.0.mixer.gates.task_{name}.weight"] = torch.randn(experts)
    return weights


@pytest.mark.parametrize("experts", [2, 3])
def test_modules_of_tasks_go_by_name_and_gates_over_them_start_anew(experts: int) -> None:
    """A gate of as many experts would weigh those of other tasks."""
    old, new = towers(["a", "b"], 2), towers(["b", "c"], experts)
    first = {name: tensor.clone() for name, tensor in new.items()}
    heads = TaskHeads(("b", "c"), Head.weights_of_tasks(None))
    lines = fill_dense(new, source_of(old, ["a", "b"]), heads)
    taken = {"head.layers.0.banks.shared.weight", "head.towers.task_b.weight"}
    for name, weight in new.items():
        assert torch.equal(weight, old[name] if name in taken else first[name]), name
    assert lines == [
        "tasks: c not there before, with first weights of their own",
        "tasks: a left out",
        "first weights, since they weigh what other tasks have: head.layers.0.mixer.gates",
    ]


@pytest.mark.parametrize("hidden", [(5,), (5, 3)])
def test_what_no_task_accounts_for_is_refused(hidden: tuple[int, ...]) -> None:
    old, new = head_of("mlp", ["a"]), head_of("mlp", ["a", "b"], hidden=hidden)
    with pytest.raises(CheckpointError, match=r"dense weight head\.layers\.\d\.\w+ is .*this model's is"):
        fill_dense(weights_of(new), source_of(weights_of(old), ["a"]), heads_of("mlp", ["a", "b"], hidden))
    # Of a tower of a task that both have.
    other = {"head.towers.task_a.weight": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"task_a\.weight is \(3,\), this model's is \(4,\)"):
        fill_dense(other, source_of(towers(["a"], 1), ["a"]), TaskHeads(("a", "b")))
