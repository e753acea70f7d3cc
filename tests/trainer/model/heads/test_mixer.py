"""Laws of mixers: a weighted sum over the experts that a consumer sees; the mask lets gradients through."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.heads import model_with
from tests.helpers.models import draw, drawing
from trainer.model.heads.mixer import SHARED, Mixer, key_of, sees, trains
from trainer.model.ops.by_group import Groups

OWNERS = (SHARED, "task:click", "task:buy", "domain:0", "domain:1")
CONSUMERS = {SHARED: 3, "task:click": 3, "task:buy": 3}
CANDIDATES, WIDTH, DOMAINS = 5, 4, 2


def seen(consumer: str, producer: str, foreign: str, domain: int) -> bool:
    """By the words of the page: shared, own, of the candidate's domain, and others' as `foreign` says."""
    if producer.startswith("domain:"):
        return producer == f"domain:{domain}"
    return producer in (SHARED, consumer) or consumer == SHARED or foreign != "hidden"


@given(
    # The first is shared, so that everybody sees one.
    others=st.lists(st.sampled_from(OWNERS), max_size=5),
    kind=st.sampled_from(["mean", "sum", "softmax"]),
    axis=st.sampled_from(["expert", "element"]),
    foreign=st.sampled_from(["open", "stopped", "hidden"]),
    per=st.sampled_from(["task", "domain"]),
)
def test_mixtures_are_those_of_each_candidate_alone(
    others: list[str], kind: str, axis: str, foreign: str, per: str
) -> None:
    producers = [SHARED, *others]
    mixer_settings = {"kind": kind, **({"axis": axis, "per": per} if kind == "softmax" else {})}
    model = model_with(mixer=mixer_settings, experts={"own": 1, "foreign": foreign})
    mixer = Mixer(model, producers, CONSUMERS, WIDTH, DOMAINS)
    rng = drawing(len(producers))
    draw(mixer, rng)
    outputs = [torch.randn(CANDIDATES, WIDTH, generator=rng).requires_grad_() for _ in producers]
    reads = {consumer: torch.randn(CANDIDATES, width, generator=rng) for consumer, width in CONSUMERS.items()}
    domain_C = torch.randint(0, DOMAINS, (CANDIDATES,), generator=rng)
    mixtures = mixer(outputs, reads, Groups(domain_C, DOMAINS))
    for consumer, found_CD in mixtures.items():
        visible = [p for p, owner in enumerate(producers) if sees(consumer, owner, foreign)]
        for c, domain in enumerate(domain_C.tolist()):
            here = [p for p in visible if seen(consumer, producers[p], foreign, domain)]
            values = torch.stack([outputs[p][c] for p in here])
            weights = torch.ones(len(here), 1)
            if kind == "mean":
                weights = weights / len(here)
            elif kind == "softmax":
                logits = logits_of(mixer, consumer, reads[consumer][c], domain, len(visible))
                weights = torch.stack([logits[visible.index(p)] for p in here]).softmax(0)
            assert torch.allclose(found_CD[c], (weights * values).sum(0), atol=1e-5)
        gradients = torch.autograd.grad(found_CD.sum(), outputs, retain_graph=True, allow_unused=True)
        for producer, gradient in zip(producers, gradients, strict=True):
            reached_C = gradient.abs().sum(1) > 0 if gradient is not None else torch.zeros(CANDIDATES) > 0
            allowed = trains(consumer, producer, foreign)
            expected = [allowed and seen(consumer, producer, foreign, domain) for domain in domain_C.tolist()]
            assert reached_C.tolist() == expected


def logits_of(mixer: Mixer, consumer: str, read: Tensor, domain: int, experts: int) -> Tensor:
    """A gate's [V, 1 or d] for one candidate."""
    gate = mixer.gates[key_of(consumer)]
    (layer,) = gate.layers  # type: ignore[union-attr,misc]
    weight, bias = layer.weight, layer.bias
    if weight.dim() == 3:
        weight, bias = weight[domain], bias[domain]
    logits: Tensor = (weight @ gate.norm(read) + bias).view(experts, -1)  # type: ignore[operator]
    return logits
