"""Inputs that are made up: windows for a search, steps for a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.inputs.cells import Cell, config_of
from benchmarks.inputs.synthetic import Draws, as_batch
from trainer.data.batch import RequestBatch
from trainer.data.cursor import Cursor
from trainer.data.reader import Step
from trainer.data.rows import UserRows

_SEED = 7
_Tensors = TypeVar("_Tensors")


def move_tensors(given: _Tensors, device: torch.device) -> _Tensors:
    """A dataclass of tensors, and of such dataclasses, on another device."""

    def move(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device)
        return move_tensors(part, device) if is_dataclass(part) else part

    return replace(given, **{f.name: move(getattr(given, f.name)) for f in fields(given)})  # type: ignore[type-var,arg-type]


# What is done last to a batch, as the reader does it: see `trainer.data.batch`.
Prepare = Callable[[RequestBatch], RequestBatch] | None


def steps_of(cell: Cell, count: int, prepare: Prepare = None) -> list[Step]:
    """Steps of a cell of `tandemrec bench step`, as the reader would give them."""
    return [collated() for collated in draw_steps(cell, count, prepare)]


def draw_steps(cell: Cell, count: int, prepare: Prepare = None) -> Iterator[Callable[[], Step]]:
    """The same, drawn but not yet collated: each call does what the reader does with decoded rows."""
    shape = cell.shape
    draws, data = Draws(shape, _SEED), config_of(cell).data

    def collated(rows: UserRows, number: int) -> Step:
        batch = as_batch(rows, shape.manifest(), data, shape.requests)
        batch = batch if prepare is None else prepare(batch)
        return Step(batch, True, Cursor(blocks=number + 1))

    for number in range(count):
        yield partial(collated, draws.step(), number)
