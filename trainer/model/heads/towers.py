"""Towers, and the gates that scale their layers and the inputs of experts by a prior (PEPNet)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.model.heads.grouped import applied, linear
from trainer.model.ops.by_group import Groups
from trainer.model.ops.precision import full


class PriorGate(nn.Module):
    """2 sigmoid(W2 relu(W1 [prior ; x without gradient])): factors around 1 (PEPNet, section 3.2, GateNU).

    Args:
        prior, width: of the prior and of x; hidden: of the hidden layer; outputs: how many factors.
    """

    def __init__(self, prior: int, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(prior + width, hidden)
        self.factors = nn.Linear(hidden, outputs)

    def forward(self, prior_CP: Tensor, x_CW: Tensor) -> Tensor:
        """-> float32 [C, outputs]."""
        hidden = self.hidden(torch.cat([prior_CP, x_CW.detach()], dim=1)).relu()
        factors = full(self.factors(hidden))
        return 2 * factors.sigmoid()


class Tower(nn.Module):
    """Linear and PReLU layers, then one linear map: what the experts of a task give -> its logits.

    Args:
        width: d; hidden: widths of the layers; outputs: logits, 1 or 2.
        domains: N with maps for each domain, else 0.
        gate: P and the hidden width of the gate that scales the input of each map, or None.
    """

    def __init__(
        self, width: int, hidden: Sequence[int], outputs: int, domains: int, gate: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.widths = [width, *hidden]
        self.layers = nn.ModuleList(
            linear(before, after, domains) for before, after in pairwise([*self.widths, outputs])
        )
        self.slopes = nn.ModuleList(nn.PReLU() for _ in hidden)
        self.gate = PriorGate(gate[0], width, gate[1], sum(self.widths)) if gate else None

    def forward(self, x_CD: Tensor, prior_CP: Tensor | None, domain: Groups | None) -> Tensor:
        """-> [C, outputs]."""
        factors: Sequence[Tensor] = ()
        if self.gate is not None:
            assert prior_CP is not None
            factors = self.gate(prior_CP, x_CD).split(self.widths, dim=1)
        x = x_CD
        for number, layer in enumerate(self.layers):
            if number:
                x = self.slopes[number - 1](x)
            x = applied(layer, factors[number] * x if factors else x, domain)
        return x
