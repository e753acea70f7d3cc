"""Heads built from settings, and made-up inputs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.models import draw, drawing
from trainer.config.tasks import Task, TaskConfig, resolve_tasks
from trainer.model.heads.experts import ExpertsHead
from trainer.model.heads.head import HeadInput, HeadSizes
from trainer.model.settings import ModelConfig

CANDIDATES = 7
PRIOR = {"prior": "prior"}
STEM_SETS = {"shared": "shared", "click": "task:click", "buy": "task:buy"}


def tasks_of(*names: str, **settings: dict[str, Any]) -> tuple[Task, ...]:
    return resolve_tasks({name: TaskConfig(**settings.get(name, {})) for name in names}, names)


def sizes_of(
    sets: Mapping[str, Sequence[int]],
    tasks: Sequence[Task] = tasks_of("click", "buy"),
    owners: Mapping[str, str] | None = None,
    **more: int,
) -> HeadSizes:
    """`more`: beside, prior, domains."""
    return HeadSizes(
        sets, more.pop("beside", 0), [task for task in tasks if task.has_tower], owners or {}, **more
    )


def stem_sizes(width: int = 8, **more: int) -> HeadSizes:
    """A shared set and one for each of two tasks."""
    return sizes_of({name: [width] for name in STEM_SETS}, owners=STEM_SETS, **more)


def model_with(**sections: Any) -> ModelConfig:
    """The section [model] with the head `experts`, and a prior group where a gate asks for it."""
    towers, mixer = sections.get("towers", {}), sections.get("mixer", {})
    gated = mixer.get("gate") == "prior" or towers.get("gated") or towers.get("gate_inputs")
    roles = {"roles": PRIOR} if gated else {}
    return ModelConfig.model_validate({"head": "experts", "hidden": [6], **roles, **sections})


def head_of(sizes: HeadSizes, seed: int = 1, **sections: Any) -> ExpertsHead:
    """With drawn parameters: zeros and ones would hide mistakes."""
    head = ExpertsHead.build(model_with(**sections), sizes)
    draw(head, drawing(seed), 0.4)
    return head


def drawn_input(sizes: HeadSizes, seed: int = 2, candidates: int = CANDIDATES) -> HeadInput:
    """What a head of these sizes may be given; every branch gives its numbers in one part."""
    rng = drawing(seed)

    def drawn(width: int) -> Tensor:
        return torch.randn(candidates, width, generator=rng).requires_grad_()

    sets = {name: [drawn(width) for width in widths] for name, widths in sizes.sets.items()}
    domain = torch.randint(0, sizes.domains, (candidates,), generator=rng) if sizes.domains else None
    beside = [drawn(sizes.beside)] if sizes.beside else []
    return HeadInput(sets, beside, drawn(sizes.prior) if sizes.prior else None, domain)
