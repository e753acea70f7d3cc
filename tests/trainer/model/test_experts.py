"""Several sets of the representation: the search runs once, and each is read as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.inputs.tables import initialise_unsharded
from embeddings.lookup.plain import PlainBagCollection
from tests.helpers.logs import FEATURES, random_rows, write_log
from tests.trainer.model.test_frame import batch_of, config
from trainer.assemble import build_model
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.run_config import build_groups

SETS = {"one": {}, "other": {"dim": 12}}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log", {"train": random_rows(7)})


def model_with(
    log: Path, sets: Any, lookup: str = "selected", tasks: Sequence[str] = ("click",), **model: Any
) -> tuple[TwoStageModel, RequestBatch]:
    """The same weights of a set whoever is there."""
    representation = {"dim": 8, "init_scale": 1.0, "sets": sets}
    settings = config(
        log,
        {"attention": {"dim": 4, "init_scale": 1.0}, "representation": representation},
        lookup=lookup,
        **model,
    )
    resolved = resolve_tasks({}, tasks)
    groups = build_groups(settings, FEATURES, tasks=resolved)
    weights = {g.table_name(t): torch.empty(t.rows, t.dim) for g in groups.values() for t in g.tables}
    collections = {name: PlainBagCollection(group, weights, True) for name, group in groups.items()}
    made = build_model(settings, groups, collections, resolved)
    initialise_unsharded(made, groups, 1)
    for name, parameter in made.branches.named_parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return made, batch_of(settings)


def run(model: TwoStageModel, batch: RequestBatch) -> tuple[dict[str, list[Tensor]], dict[str, int]]:
    """What the head is given, and how often whom was called; then a backward pass that all take part in."""
    parts: dict[str, list[Tensor]] = {}
    calls: dict[str, int] = {}
    model.pooling.register_forward_hook(lambda _, __, found: parts.update(found.given[0].sets))
    once = {"search": model.branches["main"].search, **model.collections}
    for name, module in once.items():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(batch).logits.square().sum().backward()
    return parts, calls


def gradients(model: TwoStageModel, set_: str) -> list[Tensor | None]:
    tables = model.collections["representation"].named_parameters()
    return [table.grad for name, table in tables if f"/{set_}/" in name]


@pytest.mark.parametrize("lookup", ["selected", "full"])
def test_sets_share_one_search_and_one_lookup_and_change_nothing_of_each_other(
    log: Path, lookup: str
) -> None:
    found = []
    for names in (("one", "other"), ("one",), ("other",)):
        model, batch = model_with(log, {name: SETS[name] for name in names}, lookup)
        parts, calls = run(model, batch)
        assert calls == {"search": 1, "attention": 1, "representation": 1}
        assert list(parts) == list(names)
        reached = [gradient for name in names for gradient in gradients(model, name)]
        assert len(reached) == 2 * len(names)
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in reached)
        found.append(parts)
    both, first, second = found
    assert [part.shape[1] for parts in both.values() for part in parts] == [16, 16, 16, 24, 24, 24]
    for name, alone in (("one", first), ("other", second)):
        assert all(torch.equal(a, b) for a, b in zip(both[name], alone[name], strict=True))
        assert both[name][1].abs().max() > 0
