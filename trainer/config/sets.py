"""The embedding sets of a group, as its settings say them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from embeddings.errors import ConfigError, hint_of
from embeddings.groups import EmbeddingSet
from trainer.config.tables import GroupConfig, SetConfig
from trainer.config.tasks import Task


def sets_of(
    name: str, group: GroupConfig, tasks: Sequence[Task], domains: int
) -> dict[EmbeddingSet, SetConfig]:
    """The sets of a group, and what was said of each.

    Args:
        name: of the group; tasks: of the run; domains: ids that a domain may have.

    Raises:
        ConfigError: a set's owner is no task with a tower or no domain.
    """
    owned = [task.name for task in tasks if task.has_tower]
    if group.sets == 1:
        return {EmbeddingSet(): SetConfig()}
    if isinstance(group.sets, int):
        return {EmbeddingSet(str(number)): SetConfig() for number in range(group.sets)}
    if group.sets == "tasks":
        if "shared" in owned:
            raise ConfigError(
                f'groups.{name}.sets = "tasks" has a set called shared, as a task is: rename the task'
            )
        sets = {"shared": SetConfig(), **{task: SetConfig(owner=f"task:{task}") for task in owned}}
    else:
        sets = group.sets
    for key, settings in sets.items():
        kind, _, owner = settings.owner.partition(":")
        where = f"groups.{name}.sets.{key}.owner = {settings.owner!r}"
        if kind == "task" and owner not in owned:
            known = hint_of(owner, owned, f"they are {', '.join(owned)}")
            raise ConfigError(f"{where}: no task with a tower has that name; {known}")
        if kind == "domain" and int(owner) >= domains:
            raise ConfigError(f"{where}: the ids of data.domain are below {domains}")
    for key in sets:
        # Sets name modules, and a module's attributes are taken.
        if hasattr(nn.ModuleDict(), key):
            raise ConfigError(
                f"groups.{name}.sets: PyTorch keeps the name {key!r} for itself; give the set, or the task "
                "that owns it, another name"
            )
    return {EmbeddingSet(key, settings.owner): settings for key, settings in sets.items()}
