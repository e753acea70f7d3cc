"""The heads: from what the branches give to one logit a candidate and task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer.config.model import ModelKeys, Width
from trainer.config.tasks import Task
from trainer.model.heads.last_layer import LastLayer
from trainer.model.ops.precision import full


@dataclass(frozen=True)
class HeadInput:
    """What is known of C candidates when the head is asked.

    Attributes:
        sets: set of the representation -> parts, each [C, *], of the branches that read it; one set without a
            name unless the config asks for several.
        beside: what else is known of a candidate, each [C, *]: its numbers and the context.
        prior: [C, P], vectors that only gates read; domain: int64 [C].
    """

    sets: Mapping[str, list[Tensor]]
    beside: list[Tensor]
    prior: Tensor | None = None
    domain: Tensor | None = None

    @property
    def parts(self) -> list[Tensor]:
        """Everything but the prior and the domain: the parts of all sets, then what is beside."""
        return [*(part for parts in self.sets.values() for part in parts), *self.beside]


@dataclass(frozen=True)
class HeadSizes:
    """What a head is built from besides its settings.

    Attributes:
        sets: set -> widths of what each branch gives; owners: set -> `shared`, `task:NAME` or `domain:ID`.
        beside: of all else that is known of a candidate; prior: P, 0 without a prior.
        domains: ids that a domain may have, 0 where candidates have no domain.
        tasks: those that need a tower, T in number.
    """

    sets: Mapping[str, Sequence[int]]
    beside: int
    tasks: Sequence[Task]
    owners: Mapping[str, str] = field(default_factory=dict)
    prior: int = 0
    domains: int = 0

    @property
    def width(self) -> int:
        """Of `HeadInput.parts` side by side."""
        return sum(sum(widths) for widths in self.sets.values()) + self.beside

    @property
    def outputs(self) -> int:
        """Numbers that a head gives for each candidate, see `HeadOutput.of`."""
        two = any(task.two_logits for task in self.tasks)
        return len(self.tasks) * (2 if two else 1)


class HeadOutput(NamedTuple):
    """What a head says of C candidates.

    Attributes:
        logits: float32 [C, T], log odds of each task.
        base: float32 [C, T], the logit of the negative class, for objectives that train two logits a task
            (JRC): that of the positive class is `logits` + `base`. None where no task has such an objective.
        experts: float32 [C, E, d], what the shared experts of the first layer give, for their covariance;
            None where nobody asks for it.
    """

    logits: Tensor
    base: Tensor | None = None
    experts: Tensor | None = None

    @classmethod
    def of(cls, output: Tensor, tasks: int) -> HeadOutput:
        """`output`: [C, T] or [C, 2 T], see `HeadSizes.outputs`; may be in half precision."""
        output = full(output)
        if output.shape[1] == tasks:
            return cls(output)
        return cls(output[:, :tasks], output[:, tasks:])


class TaskWeights(NamedTuple):
    """Which weights of a head belong to tasks; those of a module `task_<name>` belong to that task anyway.

    Attributes:
        rows: names of weights with a row for each task, or with as many for the logits and then for the base.
        mixing: parts of names of weights whose meaning depends on what other tasks there are.
    """

    rows: tuple[str, ...] = ()
    mixing: tuple[str, ...] = ()


class Head(nn.Module):
    """Maps what the branches give to logits, and says what must be known of it.

    Attributes:
        keys: the settings class of a model, or a subclass of it with the keys that this head adds.
        compile_obstacle: why an export cannot compile it; empty if it is one function of the concatenated
            parts.
        takes_towers: whether each task has a tower of its own, as `tasks.<name>.tower` describes it.
        takes_sets: whether it reads more than one set; takes_owners: whether owners of sets mean anything to
            it.
    """

    keys: ClassVar[type[ModelKeys]] = ModelKeys
    compile_obstacle: ClassVar[str] = "needs its parts one by one"
    takes_towers: ClassVar[bool] = False
    takes_sets: ClassVar[bool] = True
    takes_owners: ClassVar[bool] = False

    @classmethod
    def build(cls, model: Any, sizes: HeadSizes) -> Head:
        """The head of a model with these settings."""
        raise NotImplementedError

    @classmethod
    def problem(cls, model: Any) -> str:
        """What is wrong with a model that has this head; empty if nothing is."""
        return ""

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """The weights that no loss but this task's reaches: its tower, its gates and the experts of its own.

        In a step in which nobody observed the task they stay as they are. None unless the head says so.
        """
        return []

    def domain_parameters(self) -> list[nn.Parameter]:
        """The weights of towers that have a row for each domain, [domains, ...] each."""
        return []

    @classmethod
    def reads_prior(cls, model: Any) -> bool:
        """Whether this head looks at `HeadInput.prior`."""
        return False

    @classmethod
    def reads_domain(cls, model: Any) -> bool:
        """Whether settings have it look at `HeadInput.domain`, besides for sets that domains own."""
        return False

    @classmethod
    def unread_keys(cls, model: Any, owners: Collection[str]) -> list[str]:
        """Keys of this head that were given and have no effect, each with its reason.

        Args:
            owners: of the sets of the representation.
        """
        return []

    @classmethod
    def gives_experts(cls, model: Any) -> bool:
        """Whether settings have it give `HeadOutput.experts` in training."""
        return False

    @classmethod
    def last_layer_obstacle(cls, model: Any) -> str:
        """Why a logit of a head with these settings is no linear map of one vector; empty if all are."""
        return f'head = "{model.head}" has no last linear map of its own for each task'

    def last_layers(self) -> list[LastLayer]:
        """The last map of each task with a tower, where `last_layer_obstacle` names nothing."""
        raise NotImplementedError

    @classmethod
    def weights_of_tasks(cls, model: Any) -> TaskWeights:
        """Of a head with these settings; by it a run with other tasks can start from this one's weights.

        A gate may weigh experts of all tasks, unless a head says that its own do not.
        """
        return TaskWeights(mixing=(".gates.",))

    @classmethod
    def keeps_sets_apart(cls, model: Any) -> bool:
        """Whether the sets that a task owns get gradients of its tower alone."""
        return False

    def own_sets(self, task: str) -> list[str]:
        """The sets that get gradients of no tower but this task's."""
        return []

    def forward(self, given: HeadInput) -> HeadOutput:
        raise NotImplementedError


class Perceptron(nn.Module):
    """A normalisation, then Linear and PReLU layers, then one linear map.

    Args:
        width: of all parts together; hidden: widths of the layers; outputs: numbers that it gives.
        norm: `layer` is the same in any company: training, evaluation, ranks and serving agree without
            running statistics. `batch` is the BatchNorm1d of DARE's code, whose statistics each rank takes of
            its own part of the batch, so that two ranks no longer equal one.
    """

    def __init__(
        self, width: int, hidden: Sequence[int], outputs: int, norm: Literal["layer", "batch"] = "layer"
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)]
        for size in hidden:
            layers += [nn.Linear(width, size), nn.PReLU()]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Parts, each [C, *] -> [C, outputs]."""
        output: Tensor = self.layers(torch.cat(parts, dim=1))
        return output


class MlpKeys(ModelKeys):
    """What a model may set besides, for the head `mlp`."""

    hidden: tuple[Width, ...] = (200, 80)
    """The widths of the head's layers."""


class MlpHead(Head):
    """One `Perceptron` over all parts, whose last map has one output a task (shared bottom)."""

    keys = MlpKeys
    compile_obstacle = ""

    @classmethod
    def build(cls, model: Any, sizes: HeadSizes) -> MlpHead:
        return cls(sizes, model.hidden, model.norm)

    @classmethod
    def weights_of_tasks(cls, model: Any) -> TaskWeights:
        # Behind the norm and two modules a layer.
        last = f"layers.{1 + 2 * len(model.hidden)}"
        return TaskWeights(rows=(f"{last}.weight", f"{last}.bias"))

    def __init__(
        self, sizes: HeadSizes, hidden: Sequence[int], norm: Literal["layer", "batch"] = "layer"
    ) -> None:
        super().__init__()
        self.tasks = len(sizes.tasks)
        self.layers = Perceptron(sizes.width, hidden, sizes.outputs, norm).layers

    @classmethod
    def last_layer_obstacle(cls, model: Any) -> str:
        return ""

    def last_layers(self) -> list[LastLayer]:
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return [LastLayer(last, task) for task in range(self.tasks)]

    def forward(self, given: HeadInput) -> HeadOutput:
        return HeadOutput.of(self.layers(torch.cat(given.parts, dim=1)), self.tasks)


class DotHead(Head):
    """Two towers: <user, item> / sqrt(D), scaled for each task, plus a linear score of the item's side.

    Args:
        width: D of user and item; beside: width of what else is known of the candidate; tasks: T.
        outputs: T, or 2 T where some task trains two logits.
    """

    compile_obstacle = "is one product"
    takes_sets = False

    @classmethod
    def build(cls, model: Any, sizes: HeadSizes) -> DotHead:
        (widths,) = sizes.sets.values()
        return cls(sum(widths) // 2, sizes.beside, len(sizes.tasks), sizes.outputs)

    @classmethod
    def problem(cls, model: Any) -> str:
        fits = model.sequence_kind.two_towers and not model.branches
        return "" if fits else 'head = "dot" goes with sequence = "sasrec" and no further branches'

    @classmethod
    def weights_of_tasks(cls, model: Any) -> TaskWeights:
        return TaskWeights(rows=("scale", "item.weight", "item.bias"))

    def __init__(self, width: int, beside: int, tasks: int, outputs: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.scale = nn.Parameter(torch.ones(outputs))
        self.item = nn.Linear(width + beside, outputs)

    def forward(self, given: HeadInput) -> HeadOutput:
        """The parts of the one set are user [C, D] and item [C, D]."""
        user, *item = given.parts
        product_C1 = (user * item[0]).sum(1, keepdim=True) * user.shape[1] ** -0.5
        return HeadOutput.of(product_C1 * self.scale + self.item(torch.cat(item, dim=1)), self.tasks)
