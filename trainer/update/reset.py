"""Parts of a model that begin anew: new first weights, and a new state of their optimizers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from embeddings.groups import TableGroup
from embeddings.lookup.sharding import set_first_rows
from embeddings.lookup.shards import local_shards, tensors_of
from trainer.update.parts import Parts

# Seed -> the dense weights and buffers that a new model begins with, by name.
FreshDense = Callable[[int], Mapping[str, Tensor]]


def reset_weights(
    model: DistributedModelParallel,
    groups: Mapping[str, TableGroup],
    parts: Parts,
    fresh: FreshDense,
    seed: int,
) -> None:
    """Draw new first weights of these parts, the same under any sharding.

    The state of their optimizers stays, see `reset_state`.

    Args:
        groups: of the model, with their lanes; fresh: what a new model begins with; seed: of the new weights.
    """
    new, weights = fresh(seed) if parts.dense else {}, model.state_dict()
    # Rows that were given are no weights to draw.
    drawn = [group for name, group in groups.items() if name in parts.groups and not group.given]
    set_first_rows(weights, drawn, seed)
    with torch.no_grad():
        for name in parts.dense:
            weights[name].copy_(new[name])
        # Running statistics belong to the weights beside them.
        for name, buffer in model.named_buffers():
            if name in new and _beside(name, parts.dense):
                buffer.copy_(new[name])


@torch.no_grad()
def reset_state(optimizer: CombinedOptimizer, parts: Parts) -> None:
    """Have the optimizers of these parts know of no step."""
    for tensor in states_of(optimizer, parts):
        for part in local_shards(tensor):
            part.tensor.zero_()


def states_of(optimizer: CombinedOptimizer, parts: Parts) -> Iterator[Tensor]:
    """The state of the optimizers of some parts."""
    for key, state in optimizer.state_dict()["state"].items():
        # fused.collections.<group>.<kind>.<table>.weight, or dense.<name>
        kind, _, name = key.partition(".")
        mine = name in parts.dense if kind == "dense" else name.split(".")[1] in parts.groups
        if mine:
            yield from tensors_of(state)


def _beside(name: str, weights: Collection[str]) -> bool:
    module = name.rpartition(".")[0]
    return any(weight.rpartition(".")[0] == module for weight in weights)
