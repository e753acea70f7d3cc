"""Several experts read what a branch keeps: the search runs once, and each is as if it were alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.inputs.tables import initialise_unsharded
from embeddings.lookup.plain import PlainBagCollection
from tests.helpers.logs import FEATURES, random_rows, write_log
from tests.trainer.model.test_frame import batch_of, config
from trainer.assemble import build_model
from trainer.config.model import OPTIONAL_ROLES, RolesConfig
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.model.branch import Branch, Expert
from trainer.model.frame import TwoStageModel
from trainer.model.read.target_attention import TargetAttention
from trainer.model.settings import BranchConfig
from trainer.model.sizes import BranchSizes, Dimensions
from trainer.run_config import build_groups

OTHER = RolesConfig(representation_target="other", representation_behavior="other")


class TwoExperts(Branch):
    """Over the sets `representation` and `other`; `chosen` says which of them are there."""

    chosen = (0, 1)

    def __init__(self, settings: BranchConfig, dimensions: Dimensions) -> None:
        super().__init__(settings, dimensions)
        sizes = BranchSizes(settings.model_copy(update={"roles": OTHER}), settings.newest, dimensions)
        self.second = TargetAttention.build(settings, sizes)

    @property
    def experts(self) -> list[Expert]:
        both = [*super().experts, Expert(self.second, "other", "other")]
        return [both[number] for number in self.chosen]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log", {"train": random_rows(7)})


def model_with(
    log: Path, chosen: tuple[int, ...], lookup: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[TwoStageModel, RequestBatch]:
    """The same weights whoever is there: a number for each name."""
    settings = config(log, lookup=lookup)
    groups = build_groups(settings, FEATURES)
    roles = dict.fromkeys(RolesConfig().model_dump(exclude=set(OPTIONAL_ROLES)), "other")
    groups |= build_groups(
        config(log, groups={"other": {"dim": 12, "init_scale": 1.0}}, roles=roles), FEATURES
    )
    weights = {g.table_name(t): torch.empty(t.rows, t.dim) for g in groups.values() for t in g.tables}
    collections = {name: PlainBagCollection(group, weights, True) for name, group in groups.items()}
    monkeypatch.setattr("trainer.model.frame.Branch", type("Some", (TwoExperts,), {"chosen": chosen}))
    model = build_model(settings, groups, collections, resolve_tasks({}, ["click"]))
    initialise_unsharded(model, groups, 1)
    for name, parameter in model.branches.named_parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model, batch_of(settings)


def run(model: TwoStageModel, batch: RequestBatch) -> tuple[list[Tensor], int]:
    """What the head is given, and how often the search ran; then a backward pass that all take part in."""
    parts: list[Tensor] = []
    searches = []
    model.pooling.register_forward_hook(lambda _, __, found: parts.extend(found[0].parts))
    model.branches["main"].search.register_forward_hook(lambda *_: searches.append(1))
    model(batch).logits.square().sum().backward()
    return parts, len(searches)


@pytest.mark.parametrize("lookup", ["selected", "full"])
def test_experts_share_one_search_and_change_nothing_of_each_other(
    log: Path, lookup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chosen in ((0, 1), (0,), (1,)):
        model, batch = model_with(log, chosen, lookup, monkeypatch)
        parts, searches = run(model, batch)
        assert searches == 1
        reached = {g: any(p.grad is not None for p in model.collections[g].parameters()) for g in model.late}
        assert all(reached.values())
        found.append(parts)
    both, first, second = found
    assert [part.shape[1] for part in both] == [16, 16, 16, 24, 24, 24]
    assert len(both) == len(first) + len(second)
    assert all(torch.equal(a, b) for a, b in zip(both, [*first, *second], strict=True))
    assert both[1].abs().max() > 0 and both[4].abs().max() > 0
