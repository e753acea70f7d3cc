"""Parts of a sharded model that do not move for a while, whatever is trained beside them.

Tables are updated inside the backward pass, so that a learning rate of 0 would let the state of their
optimizer grow. Their vectors are cut off the graph instead, where the model takes them up
(`trainer.model.border`): there is then no backward pass into these tables, and no exchange of gradients.
Dense weights ask for no gradient, and the optimizer leaves out what has none.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.lookup.sharding import average_in_order
from embeddings.private import BatchNorm, wrap_again
from trainer.model.frame import TwoStageModel
from trainer.update.parts import Parts


def freeze(model: DistributedModelParallel, dense: Mapping[str, nn.Parameter], frozen: Parts) -> bool:
    """Have exactly these parts stay; -> whether the model was wrapped anew, which pipelines must know.

    DistributedDataParallel takes down at its start which weights have gradients, so that it is made anew
    where that has changed. Collective then.

    Args:
        dense: all dense weights, by name.
    """
    shell = model.module
    assert isinstance(shell, TwoStageModel)
    changed = shell.lookups.frozen != frozen.groups
    shell.lookups.frozen = frozen.groups
    for name, weight in dense.items():
        moves = name not in frozen.dense
        changed |= weight.requires_grad != moves
        weight.requires_grad_(moves)
        if not moves:
            weight.grad = None
    keep_statistics(shell, frozen)
    if changed:
        wrap_again(model)
        average_in_order(model)
    return changed


def keep_statistics(shell: TwoStageModel, frozen: Parts) -> None:
    """Have batch normalisation with frozen weights use its running statistics, which then stay.

    Anybody who sets the mode of the whole model calls this after it.
    """
    for name, module in shell.named_modules():
        if isinstance(module, BatchNorm) and shell.training:
            own = {f"{name}.{weight}" for weight, _ in module.named_parameters(recurse=False)}
            module.train(not (own and own <= frozen.dense))
