"""Experts over streams, and the mixtures of what they give: one layer of the head `experts`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.heads.grouped import GroupedLinear
from trainer.model.heads.head import HeadSizes
from trainer.model.heads.mixer import SHARED, Mixer, key_of
from trainer.model.heads.nets.table import EXPERTS
from trainer.model.ops.by_group import Groups


@dataclass(frozen=True)
class Stream:
    """What experts read: a set, or the mixture of the layer before.

    Attributes:
        owner: who its experts belong to; width: without what stands beside.
    """

    owner: str
    width: int


class ExpertBank(nn.Module):
    """The experts of one owner that read inputs of one width, computed together.

    Args:
        experts: the section [model.experts]; net: a name of `EXPERTS`.
        inputs: S; each: experts on each input; fields, beside: widths of an input's two parts.
    """

    def __init__(self, experts: Any, net: str, inputs: int, each: int, fields: int, beside: int) -> None:
        super().__init__()
        width, self.each = fields + beside, each
        normed = experts.norm == "layer"
        self.norms = nn.ModuleList(nn.LayerNorm(width) if normed else nn.Identity() for _ in range(inputs))
        kind = EXPERTS[net]
        self.net = kind.build(experts, inputs * (1 if kind.alike else each), width, fields)
        self.alike = kind.alike
        self.activates = experts.activation == "relu"
        before, layers = self.net.outputs, []
        for after in experts.hidden:
            layers.append(GroupedLinear(inputs * each, before, after))
            before = after
        self.layers: Iterable[Any] = nn.ModuleList(layers)

    def forward(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Inputs, each [C, width] -> what each expert gives, [C, d]: those of the first input first."""
        x_SCW = torch.stack([norm(x) for norm, x in zip(self.norms, inputs, strict=True)])
        if self.alike:
            # One for all experts of an input, up to their first layer.
            x_ECW = self.net(x_SCW)
        else:
            x_ECW = self.net(x_SCW[:, None].expand(-1, self.each, -1, -1).flatten(0, 1))
        for number, layer in enumerate(self.layers):
            x_ECW = layer(x_ECW) if number else layer.of_shared(x_ECW)
            x_ECW = x_ECW.relu() if self.activates else x_ECW
        every: Sequence[Tensor] = x_ECW.unbind(0)
        if len(every) == len(self.norms):
            # There was no layer in which they part.
            every = [x_CW for x_CW in every for _ in range(self.each)]
        return every


class ExpertLayer(nn.Module):
    """The experts over some streams, and the mixtures of what they give.

    Args:
        model: the section [model]; streams: what is read; beside: the width of what is read beside each.
        net: of the experts; consumers: who reads a mixture; tasks: owners that may have experts.
        sizes: of the head.

    Attributes:
        producers: the owner of each expert; width: d.
    """

    def __init__(
        self,
        model: Any,
        streams: Sequence[Stream],
        beside: int,
        net: str,
        consumers: Sequence[str],
        tasks: Sequence[str],
        sizes: HeadSizes,
    ) -> None:
        super().__init__()
        experts = model.experts
        self.streams, self.from_prior = streams, model.mixer.gate == "prior"
        self.banks = nn.ModuleDict()
        self.reads: dict[tuple[str, str], list[int]] = {}
        self.producers: list[str] = []
        domains = [stream.owner for stream in streams if stream.owner.startswith("domain:")]
        owners = [SHARED, *dict.fromkeys(domains), *(tasks if experts.own else ())]
        for owner in owners:
            numbers = self._streams_of(owner) or (self._streams_of(SHARED) if owner in tasks else [])
            each = experts.own if owner in tasks else experts.shared
            by_width: dict[int, list[int]] = {}
            for number in numbers:
                by_width.setdefault(streams[number].width, []).append(number)
            banks = nn.ModuleDict()
            for width, of_width in by_width.items():
                banks[str(width + beside)] = ExpertBank(experts, net, len(of_width), each, width, beside)
                self.reads[key_of(owner), str(width + beside)] = of_width
                self.producers += [owner] * (len(of_width) * each)
            if banks:
                self.banks[key_of(owner)] = banks
        self.width = (experts.hidden or [streams[0].width + beside])[-1]
        widths = {consumer: self._gate_width(consumer, beside, sizes.prior) for consumer in consumers}
        self.mixer = Mixer(model, self.producers, widths, self.width, sizes.domains)

    def forward(
        self,
        streams: Sequence[Tensor],
        beside_CX: Tensor | None,
        prior_CP: Tensor | None = None,
        domain: Groups | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """-> what each expert gives, [C, d], and consumer -> mixture [C, d]."""
        inputs = [joined([stream, beside_CX]) for stream in streams]
        outputs: list[Tensor] = []
        for (owner, width), numbers in self.reads.items():
            banks: Any = self.banks[owner]
            outputs += banks[width]([inputs[number] for number in numbers])
        reads = {}
        for consumer in self.mixer.rows if self.mixer.gates else ():
            reads[consumer] = self._gate_input(consumer, streams, beside_CX, prior_CP)
        return outputs, self.mixer(outputs, reads, domain)

    def _streams_of(self, *owners: str) -> list[int]:
        return [number for number, stream in enumerate(self.streams) if stream.owner in owners]

    def _gate_width(self, consumer: str, beside: int, prior: int) -> int:
        if self.from_prior:
            return prior
        widths = [self.streams[number].width for number in self._streams_of(consumer, SHARED)]
        return (widths[0] if len(set(widths)) == 1 else sum(widths)) + beside

    def _gate_input(
        self, consumer: str, streams: Sequence[Tensor], beside_CX: Tensor | None, prior_CP: Tensor | None
    ) -> Tensor:
        """The consumer's and the shared streams: their sum (STEM, equation 6), or all side by side."""
        if self.from_prior:
            assert prior_CP is not None
            return prior_CP
        own = [streams[number] for number in self._streams_of(consumer, SHARED)]
        alike = len({each.shape[1] for each in own}) == 1
        return joined([*([torch.stack(own).sum(0)] if alike else own), beside_CX])


def joined(parts: Iterable[Tensor | None]) -> Tensor:
    """Parts [C, *] side by side, without those that are None."""
    there = [part for part in parts if part is not None]
    return there[0] if len(there) == 1 else torch.cat(there, dim=1)
