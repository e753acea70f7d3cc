"""Models and shapes of steps that several benchmarks share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt

from benchmarks.inputs.synthetic import Shape
from trainer.config.toml import Settings
from trainer.run_config import Config

Kind = Literal[
    "plain", "published", "plain attention", "rows", "bare, 1", "ours, 1", "bare, blocks", "ours, blocks"
]
DARE_KINDS: tuple[Kind, ...] = ("rows", "bare, 1", "ours, 1", "bare, blocks", "ours, blocks")


class Cell(Settings):
    """One point of the grid of `tandemrec bench step`.

    Attributes:
        model: `dare` of configs/dare.toml without age, `din` of configs/din.toml.
        items, length, dim: rows of the item table, L, width of each table.
        users: of a step, with 19 requests of 3 candidates each.
        kinds: the training loops that are measured.
    """

    model: Literal["dare", "din"] = "dare"
    items: PositiveInt
    length: PositiveInt
    dim: PositiveInt = 16
    users: PositiveInt = 36
    kinds: tuple[Kind, ...] = DARE_KINDS

    @property
    def name(self) -> str:
        return f"{self.model}, {self.items:,} items, L {self.length:,}, dim {self.dim}"

    @property
    def shape(self) -> Shape:
        # Taobao's 9,408 categories for 4.07 million items, and as many items a category elsewhere.
        return Shape(self.items, max(self.items // 432, 8), self.length, self.users)


def config_of(cell: Cell) -> Config:
    """The trainer's config of a cell."""
    roles = ("attention_target", "attention_behavior", "representation_target", "representation_behavior")
    served = {role: "shared" if cell.model == "din" else role.split("_")[0] for role in roles}
    model: dict[str, Any] = {"age": False, "roles": served}
    if cell.model == "din":
        model |= {"search": "all", "score": "mlp", "score_hidden": 36, "position": False}
        model |= {"target_aware": False}
    return config_with(model, sorted(set(served.values())), cell.dim, cell.length)


def config_with(model: dict[str, Any], groups: list[str], dim: int, length: int) -> Config:
    """A config of these sizes, trained as the presets are."""
    group = {"dim": dim, "learning_rate": 0.2}
    return Config.model_validate(
        {
            "data": {"history_length": length},
            "model": model,
            "groups": dict.fromkeys(groups, group),
            "train": {"learning_rate": 0.003, "warmup_steps": 100},
        }
    )
