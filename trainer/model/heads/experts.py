"""The head `experts`: experts over sets of the representation, a mixer, and a tower for each task.

    set s: what the branches give of it, and what stands beside -> experts -> [C, d] each
    task t: the mixer's mixture of the experts that it sees, [C, d] -> tower t -> its logit

Shared bottom, MMoE, PLE, Multi-Embedding, STEM, Crocodile and PEPNet are settings of it, see docs/models.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from embeddings.errors import ConfigError
from trainer.model.heads.expert_layer import ExpertLayer, Stream, joined
from trainer.model.heads.expert_settings import ExpertsKeys, problems_of, reads_prior, unread_keys
from trainer.model.heads.grouped import DomainLinear
from trainer.model.heads.head import Head, HeadInput, HeadOutput, HeadSizes
from trainer.model.heads.last_layer import LastLayer
from trainer.model.heads.mixer import SHARED, key_of
from trainer.model.heads.towers import PriorGate, Tower
from trainer.model.ops.by_group import Groups
from trainer.model.ops.precision import full


class GateReport(NamedTuple):
    """What a gate did for some candidates: the mean weight of each expert, and the mean entropy in nats."""

    weights: dict[str, float]
    entropy: float


class ExpertsHead(Head):
    """Args: model: the section [model]; sizes: see `HeadSizes`."""

    keys = ExpertsKeys
    compile_obstacle = "needs its sets one by one"
    takes_towers = True
    takes_owners = True

    @classmethod
    def build(cls, model: Any, sizes: HeadSizes) -> ExpertsHead:
        for problem in _unfit(model, sizes):
            raise ConfigError(problem)
        return cls(model, sizes)

    @classmethod
    def problem(cls, model: Any) -> str:
        return next(problems_of(model), "")

    @classmethod
    def reads_prior(cls, model: Any) -> bool:
        return reads_prior(model)

    @classmethod
    def reads_domain(cls, model: Any) -> bool:
        return "domain" in (model.mixer.per, model.towers.per)

    @classmethod
    def unread_keys(cls, model: Any, owners: Collection[str]) -> list[str]:
        return list(unread_keys(model, owners))

    @classmethod
    def gives_experts(cls, model: Any) -> bool:
        return bool(model.experts.covariance > 0)

    def __init__(self, model: Any, sizes: HeadSizes) -> None:
        super().__init__()
        experts, towers, tasks = model.experts, model.towers, [f"task:{task.name}" for task in sizes.tasks]
        self.domains = sizes.domains
        self.foreign, self.covariance, self.tasks = experts.foreign, self.gives_experts(model), tasks
        self.apart = self.keeps_sets_apart(model)
        self.sets = {name: Stream(owner, width) for name, owner, width in _sets_of(sizes)}
        self.input_gates = nn.ModuleDict()
        if towers.gate_inputs:
            for name, stream in self.sets.items():
                widths = stream.width, towers.gate_hidden, stream.width
                self.input_gates[_gate_key(name)] = PriorGate(sizes.prior, *widths)
        streams, beside, net = list(self.sets.values()), sizes.beside, experts.net
        between = [SHARED, *(tasks if experts.own else ())]
        layers = []
        for number in range(experts.layers):
            consumers = tasks if number + 1 == experts.layers else between
            layers.append(ExpertLayer(model, streams, beside, net, consumers, tasks, sizes))
            streams, beside, net = [Stream(owner, layers[-1].width) for owner in between], 0, "mlp"
        self.layers = nn.ModuleList(layers)
        domains = sizes.domains if towers.per == "domain" else 0
        gate = (sizes.prior, towers.gate_hidden) if towers.gated else None
        self.towers = nn.ModuleDict()
        for owner, task in zip(tasks, sizes.tasks, strict=True):
            hidden = model.hidden if task.settings.tower is None else task.settings.tower
            outputs = sizes.outputs // len(tasks)
            self.towers[key_of(owner)] = Tower(layers[-1].width, hidden, outputs, domains, gate)

    def forward(self, given: HeadInput) -> HeadOutput:
        streams = []
        for name in self.sets:
            x_CW = joined(given.sets[name])
            if self.input_gates:
                x_CW = x_CW * self.input_gates[_gate_key(name)](given.prior, x_CW)
            streams.append(x_CW)
        beside_CX = joined(given.beside) if given.beside else None
        domain = None if given.domain is None else Groups(given.domain, self.domains)
        shared: list[Tensor] = []
        mixtures: dict[str, Tensor] = {}
        for layer in self._layers():
            outputs, mixtures = layer(streams, beside_CX, given.prior, domain)
            if not shared:
                shared = [x for x, owner in zip(outputs, layer.producers, strict=True) if owner == SHARED]
            streams, beside_CX = list(mixtures.values()), None
        logits = [self.towers[key_of(task)](mixtures[task], given.prior, domain) for task in self.tasks]
        output = HeadOutput.of(torch.stack(logits, dim=2).flatten(1), len(self.tasks))
        if self.covariance and self.training:
            return output._replace(experts=full(torch.stack(shared, dim=1)))
        return output

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """Its tower, and its gates and experts as far as no other task reads what they give."""
        key, last = key_of(f"task:{task}"), len(self.layers) - 1
        modules: list[nn.Module] = [self.towers[key]]
        for number, layer in enumerate(self._layers()):
            # A hidden expert is read by the shared mixture, which every layer but the last has. What it is
            # read into goes to all tasks.
            hides = {"stopped": last, "hidden": 0, "open": -1}[self.foreign]
            if key in layer.banks and last - number <= hides:
                modules.append(layer.banks[key])
            # The mixture goes to the task's experts of the next layer.
            if key in layer.mixer.gates and last - number <= hides + 1:
                modules.append(layer.mixer.gates[key])
        own = [_gate_key(name) for name in self.own_sets(task)]
        modules += [self.input_gates[name] for name in own if name in self.input_gates]
        return [parameter for module in modules for parameter in module.parameters()]

    @classmethod
    def last_layer_obstacle(cls, model: Any) -> str:
        return 'towers.per = "domain" has a last map for each domain' if model.towers.per == "domain" else ""

    def last_layers(self) -> list[LastLayer]:
        lasts = [cast(Tower, self.towers[key_of(task)]).layers[-1] for task in self.tasks]
        return [LastLayer(cast(nn.Linear, last), 0) for last in lasts]

    def domain_parameters(self) -> list[nn.Parameter]:
        maps = [module for module in self.towers.modules() if isinstance(module, DomainLinear)]
        return [weight for each in maps for weight in each.parameters()]

    @classmethod
    def keeps_sets_apart(cls, model: Any) -> bool:
        # With more layers, the shared mixture reads what is hidden from tasks, and passes it on to them.
        foreign, layers = model.experts.foreign, model.experts.layers
        return bool(foreign == "stopped" or (foreign == "hidden" and layers == 1))

    def own_sets(self, task: str) -> list[str]:
        if not self.apart:
            return []
        return [name for name, stream in self.sets.items() if stream.owner == f"task:{task}"]

    @torch.no_grad()
    def gate_reports(self, given: HeadInput) -> dict[str, GateReport]:
        """`<layer>/<consumer>` -> what its gate did; empty without gates.

        An expert is named by its owner and a running number: `shared/0`, `task:click/0`.
        """
        weights: dict[str, Tensor] = {}
        names, hooks = {}, []
        for number, layer in enumerate(self._layers()):
            experts = _numbered(layer.producers)
            for consumer, row in layer.mixer.rows.items() if layer.mixer.gates else ():
                at = f"{number}/{consumer}"
                names[at] = [experts[producer] for producer, _ in row]
                note = partial(lambda at, _, __, weight: weights.update({at: weight}), at)
                hooks.append(layer.mixer.gates[key_of(consumer)].register_forward_hook(note))
        self(given)
        for hook in hooks:
            hook.remove()
        return {
            at: GateReport(
                dict(zip(names[at], weight_CVX.mean((0, 2)).tolist(), strict=True)),
                float(torch.special.entr(weight_CVX).sum(1).mean()),
            )
            for at, weight_CVX in weights.items()
        }

    def _layers(self) -> list[ExpertLayer]:
        return [layer for layer in self.layers if isinstance(layer, ExpertLayer)]


def _numbered(owners: Sequence[str]) -> list[str]:
    return [f"{owner}/{list(owners[:place]).count(owner)}" for place, owner in enumerate(owners)]


def _gate_key(name: str) -> str:
    return f"set_{name}" if name else "set"


def _sets_of(sizes: HeadSizes) -> list[tuple[str, str, int]]:
    """Name, owner and width of each set."""
    return [(name, sizes.owners.get(name, SHARED), sum(widths)) for name, widths in sizes.sets.items()]


def _unfit(model: Any, sizes: HeadSizes) -> Iterable[str]:
    """What settings ask for that sets, tasks and domains of the run do not have."""
    experts, sets = model.experts, _sets_of(sizes)
    owners = [owner for _, owner, _ in sets]
    if not sizes.domains:
        for section in ("mixer", "towers"):
            if getattr(model, section).per == "domain":
                yield f'model.{section}.per = "domain" needs data.domain, the feature that says the domain'
    for name, owner, _ in sets:
        if owner.startswith("task:") and not experts.own:
            key = f"groups.{model.roles.representation_target}.sets.{name}.owner = {owner!r}"
            yield f"{key}: tasks have no experts that could read the set; set model.experts.own = 1"
    without = [task.name for task in sizes.tasks if f"task:{task.name}" not in owners]
    of_domains = {f"domain:{number}" for number in range(sizes.domains)}
    every_domain = sizes.domains and of_domains <= set(owners)
    if SHARED not in owners and ((without and not every_domain) or experts.layers > 1):
        who = "layers above the first" if experts.layers > 1 else f"task {without[0]!r}"
        yield f'all sets have owners, so {who} would have nothing to read: add a set with owner = "shared"'
    if experts.own and without and SHARED not in owners:
        yield (
            f"model.experts.own = {experts.own}: task {without[0]!r} would have no experts of its own, since "
            'it owns no set and none is shared: leave own out, or add a set with owner = "shared"'
        )
    reads_sets = model.mixer.kind == "softmax" and model.mixer.gate == "sets"
    if SHARED not in owners and without and reads_sets:
        yield (
            f"the gate of task {without[0]!r} reads shared sets and those of the task, and there are none: "
            'set model.mixer.gate = "prior", or add a set with owner = "shared"'
        )
    count = owners.count(SHARED) * experts.shared
    if experts.covariance and count < 2:
        yield (
            f"model.experts.covariance is about pairs of shared experts, and there is {count or 'none'}: set "
            "sets of the representation's group, or model.experts.shared, to 2 or more"
        )
    if not experts.hidden and len({width for _, _, width in sets}) > 1:
        yield "model.experts.hidden = [] needs sets of one width, for nothing maps them to one: set hidden"
