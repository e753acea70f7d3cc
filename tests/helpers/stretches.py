"""Windows that are stretches of a history, with exact times, for sequence models that read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.score import AttentionVectors
from trainer.model.time import Marks, age_bucket, no_mark
from trainer.model.windows import Selection, Windows

Array = npt.NDArray[np.float64]


def stretch_behaviors(
    rng: torch.Generator, lengths: list[int], of_candidate: list[int], width: int, columns: int = 0
) -> Behaviors:
    """What a model that works on windows is given: windows of these lengths, each with behaviors of its own.

    Args:
        columns: as wide as windows are padded at least; D is `width`.
    """
    columns = max(columns, *lengths, 1)
    rank = torch.arange(1, columns + 1)
    mask = rank <= torch.tensor(lengths)[:, None]
    index = torch.where(mask, torch.arange(len(lengths) * columns).view(-1, columns), 0)
    step = torch.randint(0, 100_000, mask.shape, generator=rng)
    seconds = torch.where(mask, step.cumsum(1) + 1, 0)
    marks = Marks(torch.where(mask, rank, 0).int(), torch.where(mask, age_bucket(seconds), 0), no_mark(index))
    asked = torch.tensor(of_candidate, dtype=torch.int64)
    windows = Windows(index, mask, marks, None, asked, seconds=seconds)
    count = len(of_candidate)
    raw = AttentionVectors(
        torch.zeros(count, 1), torch.zeros(index.numel(), 1), torch.zeros(count, dtype=torch.int64)
    )
    target, value = (torch.randn(n, width, generator=rng) for n in (count, index.numel()))
    return Behaviors(windows, raw, raw, Selection(index, mask, marks), False, target, value, index)


def alone(behaviors: Behaviors, candidate: int) -> Behaviors:
    """One candidate by itself, and its window cut to its own length."""
    windows = behaviors.windows
    window = int(windows.of_candidate[candidate])
    length = max(int(windows.mask[window].sum()), 1)

    def cut(part: Tensor) -> Tensor:
        return part[window : window + 1, :length]

    seconds = None if windows.seconds is None else cut(windows.seconds)
    index, mask, marks = cut(windows.index), cut(windows.mask), windows.marks.each(cut)
    own = Windows(index, mask, marks, None, torch.zeros(1, dtype=torch.int64), seconds=seconds)
    raw = replace(behaviors.raw, query_CD=behaviors.raw.query_CD[candidate : candidate + 1])
    return Behaviors(
        own, raw, raw, Selection(index, mask, marks), False,
        behaviors.target_CD[candidate : candidate + 1], behaviors.value_SD, cut(behaviors.place),
    )  # fmt: skip


def padded(behaviors: Behaviors, extra: int) -> Behaviors:
    """With more columns of padding, which name a behavior that no window holds."""
    windows = behaviors.windows

    def more(part: Tensor, value: float = 0) -> Tensor:
        return F.pad(part, (0, extra), value=value)

    other = behaviors.value_SD.shape[0] - 1
    index, mask = more(windows.index, other), F.pad(windows.mask, (0, extra))
    marks = windows.marks.each(lambda part: more(part.contiguous(), 3))
    seconds = None if windows.seconds is None else more(windows.seconds, 12345)
    wide = replace(windows, index=index, mask=mask, marks=marks, seconds=seconds)
    selection = Selection(index, mask, marks)
    return replace(behaviors, windows=wide, selection=selection, place=more(behaviors.place, other))


def numbers(part: Tensor) -> Array:
    """In double precision."""
    return part.detach().double().numpy()


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def normed(x: Array, norm: torch.nn.LayerNorm) -> Array:
    """LayerNorm of one vector."""
    scaled = (x - x.mean()) / np.sqrt(x.var() + norm.eps)
    return scaled * numbers(norm.weight) + numbers(norm.bias)


def mapped(x: Array, linear: torch.nn.Linear) -> Array:
    """A linear map of one vector."""
    found: Array = numbers(linear.weight) @ x
    return found if linear.bias is None else found + numbers(linear.bias)


def check_empty_history(model: torch.nn.Module, behaviors: Behaviors) -> None:
    """Windows that hold nothing give finite parts, and finite gradients to all that gets any."""
    nothing = replace(behaviors.windows, mask=torch.zeros_like(behaviors.windows.mask))
    parts = model(replace(behaviors, windows=nothing), None)
    torch.cat(parts, dim=1).square().sum().backward()
    assert all(torch.isfinite(part).all() for part in parts)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
