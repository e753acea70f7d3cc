"""The heads: from what the branches give to one logit a candidate and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer.config.model import ModelKeys, Width


class Head(nn.Module):
    """Maps the branches' parts to logits, and says what must be known of it.

    Attributes:
        keys: the settings class of a model, or a subclass of it with the keys that this head adds.
        compile_obstacle: why an export cannot compile it; empty if it is one function of the concatenated
            parts.
    """

    keys: ClassVar[type[ModelKeys]] = ModelKeys
    compile_obstacle: ClassVar[str] = "needs its parts one by one"

    @classmethod
    def build(cls, model: Any, widths: Sequence[int], beside: int, tasks: int) -> Head:
        """The head of a model with these settings.

        Args:
            widths: of what each branch gives; beside: of all else that is known of a candidate; tasks: T.
        """
        raise NotImplementedError

    @classmethod
    def problem(cls, model: Any) -> str:
        """What is wrong with a model that has this head; empty if nothing is."""
        return ""

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Parts, each [C, *], those of the branches first -> logits [C, T]."""
        raise NotImplementedError


class MlpKeys(ModelKeys):
    """What a model may set besides, for the head `mlp`."""

    hidden: tuple[Width, ...] = (200, 80)
    """The widths of the head's layers."""


class MlpHead(Head):
    """A normalisation, then Linear and PReLU layers, then one linear output a task.

    Args:
        width: of all parts together; hidden: widths of the layers; tasks: T.
        norm: `layer` is the same in any company: training, evaluation, ranks and serving agree without
            running statistics. `batch` is the BatchNorm1d of DARE's code, whose statistics each rank takes of
            its own part of the batch, so that two ranks no longer equal one.
    """

    keys = MlpKeys
    compile_obstacle = ""

    @classmethod
    def build(cls, model: Any, widths: Sequence[int], beside: int, tasks: int) -> MlpHead:
        return cls(sum(widths) + beside, model.hidden, tasks, model.norm)

    def __init__(
        self, width: int, hidden: Sequence[int], tasks: int, norm: Literal["layer", "batch"] = "layer"
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)]
        for size in hidden:
            layers += [nn.Linear(width, size), nn.PReLU()]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, tasks))

    def forward(self, parts: list[Tensor]) -> Tensor:
        logits: Tensor = self.layers(torch.cat(parts, dim=1))
        return logits


class DotHead(Head):
    """Two towers: <user, item> / sqrt(D), scaled for each task, plus a linear score of the item's side.

    Args:
        width: D of user and item; beside: width of what else is known of the candidate; tasks: T.
    """

    compile_obstacle = "is one product"

    @classmethod
    def build(cls, model: Any, widths: Sequence[int], beside: int, tasks: int) -> DotHead:
        return cls(sum(widths) // 2, beside, tasks)

    @classmethod
    def problem(cls, model: Any) -> str:
        fits = model.sequence_kind.two_towers and not model.branches
        return "" if fits else 'head = "dot" goes with sequence = "sasrec" and no further branches'

    def __init__(self, width: int, beside: int, tasks: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(tasks))
        self.item = nn.Linear(width + beside, tasks)

    def forward(self, parts: list[Tensor]) -> Tensor:
        """[user [C, D], item [C, D], whatever is beside] -> logits [C, T]."""
        user, *item = parts
        product_C1 = (user * item[0]).sum(1, keepdim=True) * user.shape[1] ** -0.5
        logits: Tensor = product_C1 * self.scale + self.item(torch.cat(item, dim=1))
        return logits
