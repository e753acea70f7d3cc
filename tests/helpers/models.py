"""Small models, and made-up inputs of their parts, for the property tests of trainer.model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.inputs.tables import initialise_unsharded
from embeddings.lookup.jagged import one_id_bags
from embeddings.lookup.plain import PlainBagCollection
from tests.helpers.launching import ROOT
from tests.helpers.logs import Shape, random_rows, write_log
from tests.helpers.presets import fill_given, renamed
from trainer.assemble import build_model, count_numbers, feature_rows, resolve_groups
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.model.frame import TwoStageModel
from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.score import AttentionVectors
from trainer.model.retrieve.search import Retrieval
from trainer.model.time import Marks
from trainer.model.windows import Windows
from trainer.run_config import Config, load_config

BEHAVIORS = 24
GROUPS = 3
MARK_ROWS = {"position": 9, "age": 6, "level": 4}
FORMS = ("shared", "target", "joint")
SMALL = ("data.history_length=12", "data.batch_candidates=48", "data.prefetch=0", "model.k=4")


def drawing(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(module: nn.Module, rng: torch.Generator, std: float = 0.5) -> nn.Module:
    """Give every parameter a random value: zeros would hide mistakes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=rng)
    return module


def drawn_windows(
    rng: torch.Generator,
    windows: int,
    width: int,
    candidates: int,
    *,
    full: bool = False,
    sized: bool = False,
) -> Windows:
    """Windows of up to `width` different behaviors, some of them of no candidate; empty ones among them."""
    shape = windows, width
    length = torch.full((windows,), width) if full else torch.randint(0, width + 1, (windows,), generator=rng)
    mask = torch.arange(width) < length[:, None]
    index = torch.stack(
        [torch.randperm(max(BEHAVIORS, width), generator=rng)[:width] for _ in range(windows)]
    )
    marks = [torch.randint(1, rows, shape, generator=rng) * mask for rows in MARK_ROWS.values()]
    size = torch.rand(shape, generator=rng) * mask if sized else None
    of_candidate = torch.randint(0, windows, (candidates,), generator=rng).sort().values
    return Windows(index * mask, mask, Marks(*marks), size, of_candidate)


def drawn_vectors(
    rng: torch.Generator, width: int, candidates: int, behaviors: int = BEHAVIORS, cross: bool = False
) -> AttentionVectors:
    return AttentionVectors(
        torch.randn(candidates, width, generator=rng),
        torch.randn(behaviors, width, generator=rng),
        torch.randint(0, GROUPS, (candidates,), generator=rng),
        torch.randn(behaviors, generator=rng) if cross else None,
    )


def drawn_behaviors(
    rng: torch.Generator, windows: Windows, width: int, attention: int = 5, whole: bool = False
) -> Behaviors:
    """The representation side of candidates that keep their whole windows, pooled by window with `whole`."""
    candidates = windows.of_candidate.numel()
    target, value = (torch.randn(count, width, generator=rng) for count in (candidates, BEHAVIORS))
    vectors = drawn_vectors(rng, attention, candidates)
    selection = windows.of_candidates()
    place = windows.index if whole else selection.index
    return Behaviors(windows, vectors, vectors, selection, whole, target, value, place)


def small_log(path: Path, seed: int = 4) -> Path:
    """One split, short and empty histories among them."""
    return write_log(path, {"train": random_rows(seed, Shape(users=8))})


def preset(name: str, log: Path, *overrides: str) -> Config:
    """A preset cut down to a small log; wide first weights, so that mistakes show."""
    path = ROOT / f"configs/{name}.toml"
    dims = [
        f"groups.{group}.{key}" for group in load_config(path).groups for key in ("dim=8", "init_scale=0.7")
    ]
    return load_config(path, [f"data.log={log}", *SMALL, *dims, *renamed(name, log), *overrides])


def model_of(config: Config) -> TwoStageModel:
    """The model over plain, trainable tables; time tables are drawn, for they start from zero."""
    manifest = read_manifest(config.data.log)
    groups = resolve_groups(config, manifest)
    weights = {g.table_name(t): torch.empty(t.rows, t.dim) for g in groups.values() for t in g.tables}
    collections = {name: PlainBagCollection(group, weights, True) for name, group in groups.items()}
    numbers = count_numbers(config, manifest.numeric)
    model = build_model(config, groups, collections, resolve_tasks(config.tasks, manifest.tasks), numbers)
    initialise_unsharded(model, groups, config.train.seed)
    fill_given(model, groups, config)
    rng = drawing(3)
    for name, parameter in model.named_parameters():
        if not name.startswith("collections.") and (parameter == 0).all():
            nn.init.normal_(parameter, std=0.5, generator=rng)
    return model


def batch_of(config: Config) -> RequestBatch:
    manifest = read_manifest(config.data.log)
    rows, tasks = feature_rows(resolve_groups(config, manifest)), resolve_tasks(config.tasks, manifest.tasks)
    return next(iter(SequenceLogReader(config.data, "train", rows, tasks=tasks, seed=1).steps())).batch


def stage_one(model: TwoStageModel, batch: RequestBatch) -> dict[str, Retrieval]:
    return model._stage_one(batch)[0].of_branch


def watch(model: TwoStageModel) -> dict[str, tuple[Behaviors, Tensor, list[Tensor]]]:
    """What every branch's sequence model is given and returns, filled in by the next forward pass."""
    seen: dict[str, tuple[Behaviors, Tensor, list[Tensor]]] = {}
    for name, branch in model.branches.items():
        branch.sequence.register_forward_hook(
            lambda _, given, parts, name=name: seen.update({name: (*given, parts)})
        )
    return seen


def with_ids(batch: RequestBatch, change: Callable[[str, Tensor], Tensor]) -> RequestBatch:
    """The batch with other ids; `change` is given a feature and its ids [N + C], one a bag."""
    keys = list(batch.features.keys())
    ids = batch.features.values().view(len(keys), -1)
    changed = torch.stack([change(key, row) for key, row in zip(keys, ids, strict=True)])
    return replace(batch, features=one_id_bags(keys, changed))


def table_gradient(model: TwoStageModel, group: str) -> Tensor:
    """All gradients of a group's tables, flat; 0 where there is none."""
    tables = model.collections[group].parameters()
    return torch.cat([torch.zeros_like(t).flatten() if t.grad is None else t.grad.flatten() for t in tables])
