"""From a config and a log's manifest to a model, sharded for training or plain for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.groups import TableGroup, bag_collection
from embeddings.sharding import Placement, attach_optimizer, make_plan, placements, shard
from trainer.config import Config, build_groups
from trainer.data.schema import LogManifest
from trainer.distributed import Ranks
from trainer.model.two_stage import TwoStageModel


@dataclass(frozen=True)
class Sharded:
    """A model ready to train, and how its tables lie."""

    model: DistributedModelParallel
    groups: Mapping[str, TableGroup]
    placements: list[Placement]


def table_rows(manifest: LogManifest) -> dict[str, int]:
    """Feature -> embedding rows that the log's ids need."""
    return {name: info.rows for name, info in manifest.features.items()}


def feature_rows(groups: Mapping[str, TableGroup]) -> dict[str, int]:
    """Feature -> rows of its tables: the bound that the reader checks ids against."""
    return {table.feature: table.rows for group in groups.values() for table in group.tables}


def build_model(
    config: Config, groups: Mapping[str, TableGroup], collections: Mapping[str, nn.Module], tasks: int
) -> TwoStageModel:
    """The model around given lookups; its dense weights come from train.seed alone."""
    state = torch.get_rng_state()
    torch.manual_seed(config.train.seed)
    model = TwoStageModel(config.model, config.data.history_length, groups, collections, tasks)
    torch.set_rng_state(state)
    return model


def build_sharded(config: Config, manifest: LogManifest, ranks: Ranks) -> Sharded:
    """Plan, shard and initialise; collective over all ranks."""
    groups = build_groups(config, table_rows(manifest))
    collections = {}
    for name, group in groups.items():
        collections[name] = bag_collection(group, torch.device("meta"))
        attach_optimizer(collections[name], group.optimizer)
    model = build_model(config, groups, collections, len(manifest.tasks))
    plan = make_plan(model, groups.values(), ranks.device, ranks.world_size, ranks.local_world_size)
    sharded = shard(model, groups, plan, ranks.device, config.train.seed)
    return Sharded(sharded, groups, placements(plan, groups.values()))
