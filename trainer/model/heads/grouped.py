"""Several linear maps at once: of experts that have inputs of one width, or of domains."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.ops.by_group import Groups, linear_by_group


class GroupedLinear(nn.Module):
    """E linear maps of one shape, each with an input of its own: one product of matrices for all.

    Parameters are those of E `nn.Linear`, one after the other, and start as theirs do: `weight` [E, out, in],
    `bias` [E, out].
    """

    def __init__(self, count: int, width: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, width))
        self.bias = nn.Parameter(torch.empty(count, outputs))
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x_ECW: Tensor) -> Tensor:
        """[E, C, in] -> [E, C, out]."""
        if len(self.weight) == 1:  # to the bit as nn.Linear
            return F.linear(x_ECW[0], self.weight[0], self.bias[0])[None]
        return torch.baddbmm(self.bias[:, None], x_ECW, self.weight.transpose(1, 2))

    def of_shared(self, x_SCW: Tensor) -> Tensor:
        """The same where E / S maps, one after the other, read each of S inputs: [S, C, in] -> [E, C, out].

        No input is copied for its maps. Values are those of `forward` but for rounding (1e-6).
        """
        inputs = x_SCW.shape[0]
        if len(self.weight) == inputs:
            return self.forward(x_SCW)
        weight_SXW, bias_SX = (
            part.unflatten(0, (inputs, -1)).flatten(1, 2) for part in (self.weight, self.bias)
        )
        out_SCX = torch.baddbmm(bias_SX[:, None], x_SCW, weight_SXW.transpose(1, 2))
        out_ECO: Tensor = out_SCX.unflatten(2, (-1, self.bias.shape[1])).transpose(1, 2).flatten(0, 1)
        return out_ECO


class DomainLinear(nn.Module):
    """A linear map for each of N domains: parameters as of `GroupedLinear`, chosen by the candidate's domain.

    Every domain's parameters take part in every step, whoever is in the batch. The cost is that of one map
    for all candidates, however many domains there are.
    """

    def __init__(self, domains: int, width: int, outputs: int) -> None:
        super().__init__()
        maps = GroupedLinear(domains, width, outputs)
        self.weight, self.bias = maps.weight, maps.bias

    def forward(self, x_CW: Tensor, domain: Groups) -> Tensor:
        """[C, in] -> [C, out]."""
        return linear_by_group(x_CW, self.weight, self.bias, domain)


def linear(width: int, outputs: int, domains: int = 0) -> nn.Module:
    """One linear map, or one a domain."""
    return DomainLinear(domains, width, outputs) if domains else nn.Linear(width, outputs)


def applied(layer: nn.Module, x_CW: Tensor, domain: Groups | None) -> Tensor:
    """What a map of `linear` makes of candidates."""
    out: Tensor = layer(x_CW, domain) if isinstance(layer, DomainLinear) else layer(x_CW)
    return out
