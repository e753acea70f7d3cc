"""The section tasks of the trainer's configuration: what a model predicts, and how each task is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from embeddings.errors import ConfigError, hint_of
from trainer.config.label_mask import LabelMask
from trainer.config.mistakes import NAME
from trainer.config.model import Width
from trainer.config.toml import Settings

# Ranking losses that train two logits a task, of those in `trainer.objectives.table`, which stands above.
TWO_LOGITS = frozenset({"jrc"})
# What a task's own loss looks at, and its ranking loss.
_OF_LOSS, _OF_RANK = ("weight", "gamma", "mean"), ("bce_weight", "pairs")
# A task's name is part of the names of modules, tensors, columns and files.
TaskName = Annotated[str, StringConstraints(pattern=NAME)]


class TaskConfig(Settings):
    """One task. If there is no section, every label of the log is a task, and their losses are averaged."""

    label: str = ""
    """The label of the log that the task predicts. Empty means the label of the task's own name."""
    mask: str = ""
    """An expression over labels of the log, such as `click == 1`. Where it is not true, or a label that it
    names was not observed, the task is not observed: such a candidate has no part in its loss and its
    metrics. It compares labels with numbers, and has `and`, `or`, `not` and parentheses. Empty means no
    condition."""
    loss: str = ""
    """The loss of each candidate. Empty means train.objective. `none` means that the task is not trained by
    itself, but only as a part of a `product`."""
    gamma: float | None = Field(None, gt=0, allow_inf_nan=False)
    """With `loss = "focal"`, how much less a candidate counts that the model is sure of. Not set means 2."""
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """The factor of the task's loss in the total."""
    mean: Literal["", "step", "domain"] = ""
    """How the losses of candidates become one, see train.mean. Empty means as that says."""
    rank: str = "none"
    """A loss beside `loss` that compares candidates. `none` means none."""
    bce_weight: float = Field(0.5, ge=0, le=1)
    """With `rank`, the share of `loss`. The ranking loss has the rest."""
    pairs: Literal["step", "request", "domain"] = "step"
    """Which candidates the ranking loss compares: all of a `step`, on whatever rank they are, those of one
    `request`, or those of one `domain` in a step."""
    product: tuple[TaskName, ...] = ()
    """Other tasks. The task then has no tower of its own: its probability is the product of theirs, on all
    candidates (ESMM)."""
    tower: tuple[Width, ...] | None = None
    """The widths of the layers of the task's tower, for a head with towers. Not set means model.hidden."""

    @field_validator("mask")
    @classmethod
    def _is_a_mask(cls, text: str) -> str:
        if text:
            LabelMask.parse(text)
        return text

    @model_validator(mode="after")
    def _check_together(self) -> TaskConfig:
        if self.product and self.tower is not None:
            raise ValueError("a task with a product has no tower: leave tower or product out")
        if len(self.product) == 1:
            raise ValueError(f"product names {self.product[0]} alone, and needs two tasks or more")
        if len(set(self.product)) < len(self.product):
            raise ValueError(f"product names a task twice: {', '.join(self.product)}")
        if self.loss == "none" and self.rank != "none":
            raise ValueError(f'rank = "{self.rank}" is trained beside a loss: set loss = "bce"')
        given = self._given()
        if self.loss == "none" and (keys := [key for key in _OF_LOSS if key in given]):
            raise ValueError(
                f'loss = "none" leaves training to a product, so {" and ".join(keys)} would have no '
                "effect: leave loss or these out"
            )
        if self.rank == "none" and (keys := [key for key in _OF_RANK if key in given]):
            raise ValueError(
                f"{' and '.join(keys)} belong to a ranking loss, which the task has not: set "
                'rank = "pair", or leave them out'
            )
        return self

    def _given(self) -> set[str]:
        """The keys that somebody changed. The config of a run folder has all keys that its version knew."""
        fields = type(self).model_fields
        return {key for key in self.model_fields_set if getattr(self, key) != fields[key].default}


@dataclass(frozen=True)
class Task:
    """A task of a run: its place among the tasks is its column in labels [C, T] and logits [C, T].

    Attributes:
        name: of the task; label: of the log; settings: as they were given, or the defaults.
        weight: of its loss in the total. Without a section [tasks] that is 1 / T.
        mask: the compiled `settings.mask`, None where that is empty.
        partial: not every candidate is observed, for its label is not there or its mask is not true.
    """

    name: str
    label: str
    settings: TaskConfig
    weight: float
    mask: LabelMask | None = None
    partial: bool = False

    @property
    def has_tower(self) -> bool:
        """Whether the head gives its logit, and no product of others."""
        return not self.settings.product

    @property
    def towers(self) -> tuple[str, ...]:
        """The tasks whose towers its loss reaches: itself, or the factors of a product."""
        return self.settings.product or (self.name,)

    def means_by_domain(self, default: str) -> bool:
        """Whether each domain has a mean of its own in the task's loss; `default`: `train.mean`."""
        return self.settings.loss != "none" and (self.settings.mean or default) == "domain"

    @property
    def two_logits(self) -> bool:
        """Whether its loss trains a logit for each class, where others train their difference alone."""
        return self.settings.rank in TWO_LOGITS

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the log that it needs: its own, and those that its mask names."""
        return tuple(dict.fromkeys((self.label, *(self.mask.labels if self.mask else ()))))


def resolve_tasks(
    configs: Mapping[str, TaskConfig], labels: Sequence[str], partial: Collection[str] = ()
) -> tuple[Task, ...]:
    """The tasks of a run, in the order of the config, or of the log where the config has none.

    Args:
        configs: the section [tasks]; labels: those that the log has.
        partial: of these, those that only a part of the candidates has. It matters to training alone.

    Raises:
        ConfigError: a task or its mask names a label that the log does not have, or a product names no task
            with a tower.
    """
    if not configs:
        weight = 1 / max(1, len(labels))
        return tuple(Task(label, label, TaskConfig(), weight, partial=label in partial) for label in labels)
    tasks = []
    for name, settings in configs.items():
        label = settings.label or name
        if label not in labels:
            raise ConfigError(_no_such_label(name, settings, labels, partial))
        mask = LabelMask.parse(settings.mask) if settings.mask else None
        if mask is not None and (problem := _unknown(mask, configs, labels)):
            raise ConfigError(f"tasks.{name}.mask = {settings.mask!r}: {problem}")
        in_part = mask is not None or label in partial
        tasks.append(Task(name, label, settings, settings.weight, mask, in_part))
    towers = [task.name for task in tasks if task.has_tower]
    for task in tasks:
        for part in task.settings.product:
            if part not in towers:
                problem = _no_factor(task.name, part, configs, labels)
                raise ConfigError(f"tasks.{task.name}.product names {part!r}, {problem}")
    return tuple(tasks)


def _no_such_label(
    name: str, settings: TaskConfig, labels: Sequence[str], partial: Collection[str] = ()
) -> str:
    """What is wrong with the label of a task, and what it may be."""
    known = f"it has {', '.join(labels)}"
    whole = [label for label in labels if label not in partial]
    if settings.product and whole:
        key = f"tasks.{name}.label = {settings.label!r}" if settings.label else f"tasks.{name}"
        return (
            f"{key}: the log has no such label; set tasks.{name}.label to one that is known where a factor "
            f"did not happen, too; all candidates have {', '.join(whole)}"
        )
    if settings.label:
        hint = hint_of(settings.label, labels, known)
        return f"tasks.{name}.label = {settings.label!r}: the log has no such label; {hint}"
    near = hint_of(name, labels, "")
    return (
        f"tasks.{name}: the log has no such label; {f'{near} Otherwise ' if near else ''}set "
        f"tasks.{name}.label to the one that the task predicts; {known}"
    )


def _unknown(mask: LabelMask, configs: Mapping[str, TaskConfig], labels: Sequence[str]) -> str:
    """What is wrong with the labels that a mask names; empty if nothing is."""
    for name in mask.labels:
        if name not in labels and name in configs and (label := configs[name].label) in labels:
            return f"{name} is a task, and a mask compares labels of the log: write {label}"
    return mask.unknown(labels)


def _no_factor(name: str, part: str, configs: Mapping[str, TaskConfig], labels: Sequence[str]) -> str:
    """Why the product of a task cannot have a part, and what it can have."""
    others = [task for task, settings in configs.items() if not settings.product]
    if part == name:
        return (
            f"which is the task itself; name the tasks whose probabilities it multiplies: {', '.join(others)}"
        )
    if part in configs:
        return f"which is a product itself; name its factors instead: {', '.join(configs[part].product)}"
    if part in labels:
        return f"which is a label of the log and no task; add a section [tasks.{part}]"
    known = f"it may name {', '.join(others)}"
    return f"which is no task; {hint_of(part, others, known)}"


def labels_of(configs: Mapping[str, TaskConfig], names: Sequence[str]) -> list[str]:
    """The labels that tasks of these names predict, and those that their masks name, without a log at hand.

    Args:
        configs: the section [tasks] that they were resolved with.
    """
    if not configs:
        return list(names)
    own = [settings.label or name for name, settings in configs.items()]
    masks = [LabelMask.parse(settings.mask).labels for settings in configs.values() if settings.mask]
    return list(dict.fromkeys([*own, *sum(masks, ())]))


def named_tasks(configs: Mapping[str, TaskConfig], names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks of a trained model, where the log that it was trained on is not at hand.

    Args:
        configs: the section [tasks] of its config; names: of its tasks.
    """
    return resolve_tasks(configs, labels_of(configs, names))


def names_of(tasks: Iterable[Task]) -> list[str]:
    """The names of tasks, in their order."""
    return [task.name for task in tasks]
