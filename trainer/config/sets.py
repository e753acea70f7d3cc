"""The embedding sets of a group, as its settings say them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


def against_owners(
    group: str, sets: int | str | Mapping[str, SetConfig], head: str, takes_sets: bool, takes_owners: bool
) -> Iterator[str]:
    """What is wrong with the sets of the representation for a head.

    Args:
        takes_sets: whether the head reads several sets; takes_owners: whether it minds who owns one.
    """
    where = f"groups.{group}.sets"
    if sets != 1 and not takes_sets:
        yield f'{where}: model.head = "{head}" reads one set; leave sets out, or set model.head = "experts"'
    owned = [f'{where} = "tasks"'] if sets == "tasks" else []
    for key, each in sets.items() if isinstance(sets, Mapping) else ():
        owned += [f"{where}.{key}.owner = {each.owner!r}"] if each.owner != "shared" else []
    if owned and not takes_owners:
        yield (
            f'{owned[0]}: model.head = "{head}" puts all sets side by side, whoever owns them, so that every '
            'task would train them; set model.head = "experts", or give sets no owner, as '
            f"{where} = 4 does"
        )


def against_sets(
    groups: Mapping[str, GroupConfig], whole: str, section: str, settings: Any, domain: str
) -> Iterator[str]:
    """Where several sets serve anything but the representation of all branches.

    Args:
        whole: the group of `model.roles.representation_target`; domain: `data.domain`.
        section: where the branch is configured; settings: those of the branch.
    """
    given = groups[whole].sets
    for name, each in given.items() if isinstance(given, dict) else ():
        if each.owner.startswith("domain:") and not domain:
            yield (
                f"groups.{whole}.sets.{name}.owner = {each.owner!r}: there are no domains; name the "
                "feature that has them with data.domain"
            )
    if settings.time == "concat" and groups[whole].sets != 1:
        yield (
            f'groups.{whole}.sets: {section}.time = "concat" puts time beside the vectors of '
            "one set; leave sets out, or set time to another form"
        )
    for role, name in settings.roles.model_dump().items():
        group = groups.get(name)
        if group is not None and group.sets != 1:
            where = f"groups.{name}.sets: {section}.roles.{role} is {name!r}, and several sets"
            if not role.startswith("representation"):
                yield (
                    f"{where} serve the representation alone; leave groups.{name}.sets out, or name "
                    "another group, one without sets, for that role"
                )
            if name != whole:
                yield (
                    f"{where} serve all representation roles, but model.roles.representation_target is "
                    f"{whole!r}; name one group for all of them"
                )
        elif role.startswith("representation") and groups[whole].sets != 1:
            yield (
                f"groups.{whole}.sets: several sets serve all representation roles of all branches, but "
                f"{section}.roles.{role} is {name!r}; name {whole!r} there"
            )
