"""What the update rule `per_task` cannot be had with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainer.config.sections import TrainConfig
from trainer.config.tables import GroupConfig, PlanConfig


def against_per_task(
    train: TrainConfig, groups: Mapping[str, GroupConfig], plan: PlanConfig, covariance: bool
) -> Iterator[str]:
    """Problems, with what to do about them; `covariance`: the model has the loss of that name."""
    if train.optimizer != "adam":
        yield (
            f'train.optimizer = "{train.optimizer}" decays weights once a step, and the rule updates for '
            'each task; set train.optimizer = "adam" and leave train.weight_decay out'
        )
    if train.max_gradient_norm:
        yield (
            f"train.max_gradient_norm = {train.max_gradient_norm} would scale all tasks by the size of the "
            "largest, and the rule is there to be free of sizes; leave it out"
        )
    if covariance:
        yield "model.experts.covariance is a loss of no task, so that no state is its own; leave it out"
    for name, group in groups.items():
        if group.kind == "sequence":
            yield (
                f'groups.{name}.kind = "sequence": each task adds a table, and TorchRec looks up no '
                'feature twice in sequences; use kind = "bag"'
            )
        if group.max_gradient:
            yield (
                f"groups.{name}.max_gradient = {group.max_gradient} bounds gradients by their size, and the "
                "rule is there to be free of sizes; leave it out"
            )
        if "data_parallel" in group.sharding:
            yield _no_replicas(f"groups.{name}.sharding")
    for name, table in plan.tables.items():
        if "data_parallel" in table.sharding:
            yield _no_replicas(f"plan.tables.{name}.sharding")


def _no_replicas(key: str) -> str:
    return (
        f'{key} names "data_parallel", whose gradients are averaged by the one backward pass that the rule '
        "does without; name other types"
    )
