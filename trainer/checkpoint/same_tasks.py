"""What a run may change of its tasks between two starts: how they are trained, and not what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from embeddings.errors import ConfigError
from trainer.config.tasks import Task, TaskConfig, names_of, resolve_tasks
from trainer.run_config import Config

# What a task is. The rest of its section says how it is trained, which the next step does in the new way.
_IDENTITY = ("label", "mask", "product", "tower")
_ADVICE = "set it back, or name another --out"


def check_same_tasks(state: Mapping[str, Any], config: Config, labels: Sequence[str]) -> list[str]:
    """Refuse to continue a run with tasks that its heads were not trained for.

    The log's own labels, which are the tasks of a config without [tasks], may also be named there: masks,
    labels and order count, and not whether they were spelled out.

    Args:
        state: of the checkpoint; config: of this start; labels: of the log, the same in both.

    Returns:
        What differs in how tasks are trained, as far as single settings do not say it: where one of the two
        configs has no section [tasks].

    Raises:
        ConfigError: the tasks differ in their names, order, labels, masks, products or towers, or in whether
            they have two logits, or candidates belong to other domains.
    """
    given = state["config"].get("tasks", {})
    try:
        configs = {name: TaskConfig.model_validate(settings) for name, settings in given.items()}
    except ValidationError as error:
        raise ConfigError(f"this run has tasks of another version of the trainer: {error}") from None
    before, now = resolve_tasks(configs, labels), resolve_tasks(config.tasks, labels)
    names, names_now = (", ".join(names_of(tasks)) for tasks in (before, now))
    if names != names_now:
        raise ConfigError(
            f"this run was started with the tasks {names}, in this order, now they are {names_now}; set "
            "[tasks] back, or name another --out (train.init_from starts it with this run's weights)"
        )
    for old, new in zip(before, now, strict=True):
        was, is_now = _identity(old, config), _identity(new, config)
        for key, value in was.items():
            if is_now[key] != value and not (key == "mask" and _mean_the_same(old, new)):
                raise ConfigError(
                    f"this run was started with tasks.{old.name}.{key} = {value!r}, now it is "
                    f"{is_now[key]!r}; {_ADVICE}"
                )
    domains = state["config"]["data"].get("domain", ""), config.data.domain
    if all(domains) and domains[0] != domains[1]:
        raise ConfigError(
            f"this run was started with data.domain = {domains[0]!r}, now it is {domains[1]!r}; {_ADVICE}"
        )
    if bool(configs) == bool(config.tasks):
        return []
    return [line for old, new in zip(before, now, strict=True) for line in _differences(old, new)]


def _identity(task: Task, config: Config) -> dict[str, Any]:
    """What a task is, by the keys of its section; `config`: whose model is that of before, too."""
    settings = task.settings.model_dump(include=set(_IDENTITY))
    if task.has_tower and settings["tower"] is None and config.model.head_kind.takes_towers:
        settings["tower"] = getattr(config.model, "hidden", None)
    two_logits = {"rank": task.settings.rank if task.two_logits else "of one logit"}
    return {**settings, "label": task.label, **two_logits}


def _mean_the_same(old: Task, new: Task) -> bool:
    """Whether two masks differ in how they are written only."""
    return old.mask is not None and new.mask is not None and old.mask.root == new.mask.root


def _differences(old: Task, new: Task) -> list[str]:
    was, now = (
        {**task.settings.model_dump(exclude=set(_IDENTITY)), "weight": task.weight} for task in (old, new)
    )
    return [
        f"tasks.{new.name}.{key} = {now[key]!r} (was {was[key]!r})" for key in now if was[key] != now[key]
    ]
