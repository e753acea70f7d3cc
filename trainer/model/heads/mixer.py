"""Mixers: who sees which expert, with or without its gradient, and how what they see becomes one vector.

An owner is `shared`, `task:NAME` or `domain:ID`. A consumer is a task, or `shared`: who reads the shared
mixture of stacked layers. Every expert is a producer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.heads.grouped import applied, linear
from trainer.model.ops.by_group import Groups
from trainer.model.ops.precision import full

SHARED = "shared"


def key_of(owner: str) -> str:
    """An owner's name as part of names of modules."""
    return owner.replace(":", "_")


def sees(consumer: str, producer: str, foreign: str) -> bool:
    """Whether a consumer reads the experts of an owner at all. A domain's are for all tasks."""
    return foreign != "hidden" or consumer == SHARED or not _foreign(consumer, producer)


def trains(consumer: str, producer: str, foreign: str) -> bool:
    """The mask of gradients, grad_mask[consumer, producer] (STEM, section 4.2).

    The published shared mixture passes gradients to experts of tasks: what it gives reaches all tasks in the
    next layer, so one task trains what another owns. Here it reads them as a foreign task does.
    """
    return foreign != "stopped" or not _foreign(consumer, producer)


def _foreign(consumer: str, producer: str) -> bool:
    return producer.startswith("task:") and producer != consumer


class Gate(nn.Module):
    """The weights of V experts: softmax over V of a small network.

    Args:
        sizes: widths of input and layers; experts: V; elements: weights an expert, 1 or d.
        domains: N with a network for each domain, else 0; norm: of the input.
    """

    def __init__(self, sizes: Sequence[int], experts: int, elements: int, domains: int, norm: bool) -> None:
        super().__init__()
        self.experts = experts
        self.norm = nn.LayerNorm(sizes[0]) if norm else nn.Identity()
        widths = [*sizes, experts * elements]
        self.layers = nn.ModuleList(linear(before, after, domains) for before, after in pairwise(widths))

    def forward(self, read_CW: Tensor, domain: Groups | None, present_CV: Tensor | None) -> Tensor:
        """-> [C, V, 1 or d]; experts that are not `present_CV` have no weight."""
        x = self.norm(read_CW)
        for number, layer in enumerate(self.layers):
            x = applied(layer, x.relu() if number else x, domain)
        logits_CVX: Tensor = full(x).unflatten(1, (self.experts, -1))
        if present_CV is not None:
            logits_CVX = logits_CVX.masked_fill(~present_CV[:, :, None], -torch.inf)
        return logits_CVX.softmax(1)


class Mixer(nn.Module):
    """Maps what P experts give, each [C, d], to a vector [C, d] for each consumer.

    Weights and sums are in single precision, also where autocast halves products.

    Args:
        model: the section [model]; producers: the owner of each expert.
        consumers: consumer -> the width of what its gate reads.
        width: d; domains: N, 0 where candidates have no domain.

    Attributes:
        rows: consumer -> the experts that it sees, as (number, whether it trains it).
    """

    def __init__(
        self, model: Any, producers: Sequence[str], consumers: Mapping[str, int], width: int, domains: int
    ) -> None:
        super().__init__()
        settings, foreign = model.mixer, model.experts.foreign
        self.kind = settings.kind
        self.domain_of = [int(owner[7:]) if owner.startswith("domain:") else None for owner in producers]
        self.rows = {
            consumer: tuple(
                (number, trains(consumer, producer, foreign))
                for number, producer in enumerate(producers)
                if sees(consumer, producer, foreign)
            )
            for consumer in consumers
        }
        self.gates = nn.ModuleDict()
        for consumer, read in consumers.items() if self.kind == "softmax" else ():
            self.gates[key_of(consumer)] = Gate(
                [read, *settings.hidden],
                len(self.rows[consumer]),
                width if settings.axis == "element" else 1,
                domains if settings.per == "domain" else 0,
                settings.gate == "sets" and model.experts.norm == "layer",
            )

    def forward(
        self, outputs: Sequence[Tensor], reads: Mapping[str, Tensor], domain: Groups | None
    ) -> dict[str, Tensor]:
        """Consumer -> [C, d]. `reads`: what each gate reads."""
        seen: dict[Any, Tensor] = {}
        mixed: dict[Any, Tensor] = {}
        mixtures = {}
        for consumer, row in self.rows.items():
            if row not in seen:
                # The whole mask of gradients is this `detach`.
                each = [full(outputs[number] if live else outputs[number].detach()) for number, live in row]
                seen[row] = torch.stack(each, dim=1)
            if self.kind == "softmax":
                present_CV = self._present(row, domain)
                weight_CVX = self.gates[key_of(consumer)](reads[consumer], domain, present_CV)
                mixtures[consumer] = (weight_CVX * seen[row]).sum(1)
                continue
            if row not in mixed:
                mixed[row] = self._added(seen[row], self._present(row, domain))
            mixtures[consumer] = mixed[row]
        return mixtures

    def _present(self, row: Sequence[tuple[int, bool]], domain: Groups | None) -> Tensor | None:
        """Which of a row's experts are everybody's or the candidate's own domain's, [C, V]; None: all."""
        owners = [self.domain_of[number] for number, _ in row]
        if all(owner is None for owner in owners):
            return None
        assert domain is not None
        domain_C = domain.of_row
        everybody = torch.ones_like(domain_C, dtype=torch.bool)
        return torch.stack([everybody if owner is None else domain_C == owner for owner in owners], dim=1)

    def _added(self, seen_CVD: Tensor, present_CV: Tensor | None) -> Tensor:
        if present_CV is None:
            return seen_CVD.mean(1) if self.kind == "mean" else seen_CVD.sum(1)
        total_CD = (seen_CVD * present_CV[:, :, None]).sum(1)
        return total_CD / present_CV.sum(1, keepdim=True) if self.kind == "mean" else total_CD
