"""What sequence models with several attention heads share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def split_heads(part: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]."""
    of_heads: Tensor = part.unflatten(2, (heads, -1))
    return of_heads.transpose(1, 2)


def join_heads(part: Tensor) -> Tensor:
    """The inverse: [B, heads, N, d] -> [B, N, heads * d]."""
    return part.transpose(1, 2).flatten(2)


def never_empty(mask_WX: Tensor) -> Tensor:
    """The mask with column 0 visible in windows that hold nothing: a softmax over nothing is no number.

    Whoever uses it makes the outcome of such windows 0.
    """
    nothing_W1 = ~mask_WX.any(1, keepdim=True)
    first_X = torch.arange(mask_WX.shape[1], device=mask_WX.device) == 0
    return mask_WX | (nothing_W1 & first_X)


def start_sharp(key: nn.Linear, gain: float) -> None:
    """First weights of the maps of keys (and of queries, which start as a copy): orthogonal, times gain.

    Of vectors behind a layer norm, equal ones then have a score of about gain^2 sqrt(d) in a head of width
    d, and others one about 0. torch's own start, uniform with a variance of 1 / (3 D), makes a third of
    sqrt(d): among 500 behaviors the attention begins as a plain mean.
    """
    nn.init.orthogonal_(key.weight, gain)


def start_silent(*lasts: nn.Linear) -> None:
    """Have branches beside a residual start as nothing, by their last maps.

    Until they have learned something, no noise of theirs reaches what follows.
    """
    for last in lasts:
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)


def heads_problem(heads: int, width: int, of: str = "representation") -> str:
    """Why so many heads do not fit a representation of this width; empty if they do."""
    if not width % heads:
        return ""
    return f"model.heads = {heads} does not divide the {of}'s width {width}"
