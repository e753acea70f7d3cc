"""A trained model back from a run folder, sharded over however many ranks there are now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embeddings.agreement import from_every_rank
from embeddings.ids.frozen import FrozenIds
from trainer.assemble import ShardedModel, build_sharded, id_bounds
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.averages import Weights, averaged_weights, steps_missing
from trainer.checkpoint.history_length import at_length
from trainer.checkpoint.id_files import frozen_ids
from trainer.checkpoint.tensors import TensorReader
from trainer.log.schema import LogManifest, read_manifest
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class RestoredModel:
    """A run's verified checkpoint as a model in eval mode.

    Attributes:
        config, manifest: of the run and of its log; sharded: the model; step: steps it was trained.
        averages: the averaged dense weights by name, where they are wanted; the model has the raw ones.
        finders: the maps of ids that come and go, see `trainer.data.living_ids.looked_up`.
        state: of the checkpoint.
    """

    config: Config
    manifest: LogManifest
    sharded: ShardedModel
    step: int
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    finders: Mapping[str, FrozenIds] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the model other dense weights; -> those that it had."""
        dense: dict[str, Tensor] = self.sharded.model.module.dense_tensors()
        before = {name: dense[name].clone() for name in weights}
        for name, weight in weights.items():
            dense[name].copy_(weight)
        return before

    @property
    def rows(self) -> dict[str, int]:
        """Feature -> the bound of its ids in the log."""
        return id_bounds(self.sharded.groups, self.config)


def restore(
    folder: RunFolder, ranks: Ranks, which: str = "", weights: Weights = "raw", history_length: int = 0
) -> RestoredModel:
    """Load a checkpoint that verifies; collective over all ranks.

    Args:
        which: see `trainer.checkpoint.save_load.find_to_use`; weights: those that are wanted.
        history_length: L, 0 = that of the run.

    Raises:
        ConfigError: no run there, or its weights have one history length alone. CheckpointError: it has no
            usable checkpoint, or no averages.
    """
    config = folder.read_config()
    manifest = read_manifest(config.data.log)
    config = at_length(config, manifest, history_length)
    found = checkpoint.find_to_use(folder.checkpoints, which)
    assert found.path is not None
    for line in found.lines if ranks.speaks else []:
        print(line, flush=True)
    if ranks.speaks and found.state.get("best", {}).get("step", -1) >= 0:
        print(f"checkpoint {found.path.name} (--checkpoint takes another)", flush=True)
    averages: dict[str, Tensor] = {}
    if weights == "averaged":
        averages = averaged_weights(TensorReader(found.path), found.path, found.state)
        if ranks.speaks and (missing := steps_missing(found.state)):
            print(
                f"{found.path.name} lies within its phase: its average misses {missing:,} steps", flush=True
            )
    if ranks.device.type != "cpu" and config.plan.mapped_folder:
        if ranks.speaks:
            print("plan.mapped_folder is for CPUs: the tables lie in the GPUs' memory here", flush=True)
        config = config.model_copy(update={"plan": config.plan.model_copy(update={"mapped_folder": None})})
    sharded = build_sharded(config, manifest, ranks, first_rows=False)
    tensors: dict[str, Any] = {"model": sharded.model.state_dict()}
    checkpoint.load_tensors(found.path, tensors)
    sharded.model.load_state_dict(tensors["model"])
    sharded.model.eval()
    finders, path = dict[str, FrozenIds](), found.path
    from_every_rank(lambda: finders.update(frozen_ids(path, config.id_rules)), slow=True)
    return RestoredModel(config, manifest, sharded, int(found.state["step"]), averages, finders, found.state)
